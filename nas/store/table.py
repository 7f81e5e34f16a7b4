"""The trials of a search as a table: filtered, sorted, a page at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import String, cast, func, or_, select

from nas.records.trial import Trial, TrialKind, TrialState
from nas.store import rows
from nas.store.engine import reading
from nas.store.schema import TrialRow
from nas.store.searches import Store

#: What trials can be sorted by; those without a value come last.
SORTS = {
    name: getattr(TrialRow, "model_params" if name == "params" else name)
    for name in ("number", "name", "state", "loss", "width", "steps", "train_flops", "params",
                 "seconds_per_step", "finished_at")
}  # fmt: skip


class Outcome(NamedTuple):
    """What became of a trial, as in a `Trial`; thousands are read several times as fast."""

    id: int
    number: int
    kind: TrialKind
    state: TrialState
    name: str
    theta: Sequence[float]
    width: int
    params: int
    loss: float | None
    started_at: float | None
    finished_at: float | None
    trained_flops: int


_OUTCOME = [
    TrialRow.trained_steps * TrialRow.train_flops_per_step
    if name == "trained_flops"
    else getattr(TrialRow, rows.column_of(name))
    for name in Outcome._fields
]


def outcomes(store: Store, search_id: str, limit: int) -> list[Outcome]:
    """What became of the first trials of a search, in the order of their numbers.

    Raises
    ------
    NotFound
        No such search.
    """
    query = select(*_OUTCOME).where(TrialRow.search_id == search_id)
    with reading(store.engine) as session:
        store.row(session, search_id)
        found = session.connection().execute(query.order_by(TrialRow.number).limit(limit))
        return [Outcome(*row) for row in found]


def trial_page(
    store: Store,
    search_id: str,
    *,
    sort: str = "number",
    down: bool = False,
    state: str | None = None,
    text: str | None = None,
    offset: int = 0,
    limit: int = 100,
) -> tuple[list[Trial], int]:
    """Trials of a search, and how many there are in all pages.

    Parameters
    ----------
    sort
        One of `SORTS`; trials that are equal in it come in the order of their numbers.
    down
        Whether the greatest come first.
    text
        Only trials whose design, name, error or number contains it.

    Raises
    ------
    NotFound
        No such search.
    """
    wanted = [TrialRow.search_id == search_id]
    if state is not None:
        wanted.append(TrialRow.state == state)
    if text is not None:
        said = (TrialRow.design, TrialRow.name, TrialRow.error, cast(TrialRow.number, String))
        wanted.append(or_(*(c.icontains(text, autoescape=True) for c in said)))
    by = SORTS[sort]
    query = (
        select(*TrialRow.__table__.columns)
        .where(*wanted)
        .order_by(by.is_(None), by.desc() if down else by, TrialRow.number)
        .offset(offset)
        .limit(limit)
    )
    with reading(store.engine) as session:
        store.row(session, search_id)
        found = [rows.to_trial(r) for r in session.execute(query)]
        total = session.scalar(select(func.count()).select_from(TrialRow).where(*wanted)) or 0
    return found, total
