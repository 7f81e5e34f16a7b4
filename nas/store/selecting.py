"""Queries that several modules need: columns of a record, newest rows, pages, curves of runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any

from sqlalchemy import Engine, Select, select
from sqlalchemy.orm import Session

from nas.records.trial import StoredPoint
from nas.store import rows
from nas.store.engine import AT_ONCE, pieces, reading
from nas.store.schema import PointRow

#: Most rows of one page.
MAX_PAGE = 500


def columns_of(record: type[Any], table: type[Any]) -> list[Any]:
    """The columns that hold the fields of a record, a dataclass."""
    return [getattr(table, field.name) for field in fields(record)]


def newest(
    table: type[Any], key: Any, before: int | None, limit: int, **equal: str | None
) -> Select[Any]:
    """The rows of a table with the greatest keys below `before`, at most `MAX_PAGE`.

    Parameters
    ----------
    equal
        Column → the value that it must have; None for any.
    """
    columns = table.__table__.columns  # plain rows: ORM objects are slower
    query = select(*columns).order_by(key.desc()).limit(min(limit, MAX_PAGE))
    if before is not None:
        query = query.where(key < before)
    return query.where(*(columns[c] == value for c, value in equal.items() if value is not None))


def pages(engine: Engine, query: Any, key: Any) -> Iterator[Sequence[Any]]:
    """The rows of a query, which has `key` among its columns, in its order and `AT_ONCE` at a time.

    Each page is read in a transaction of its own, so that no other is blocked for long.
    """
    page: Sequence[Any] = ()
    while True:
        rest = query.where(key > getattr(page[-1], key.key)) if page else query
        with reading(engine) as session:
            page = session.execute(rest.order_by(key).limit(AT_ONCE)).all()
        if not page:
            return
        yield page


def curves_of(session: Session, trials: Iterable[int]) -> dict[int, list[StoredPoint]]:
    """Trial id → its points by step, without the losses of single samples, most of the bytes."""
    curves: dict[int, list[StoredPoint]] = {}
    for part in pieces(sorted(trials)):
        query = (
            select(PointRow.trial_id, *rows.POINT)
            .where(PointRow.trial_id.in_(part))
            .order_by(PointRow.trial_id, PointRow.step)
        )  # fmt: skip
        for row in session.execute(query):
            curves.setdefault(row.trial_id, []).append(StoredPoint(*row[1:]))
    return curves
