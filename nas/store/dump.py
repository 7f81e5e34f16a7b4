"""Reads all runs of a task or a search in bounded memory; opens databases of other programs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, inspect, select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import SQLAlchemyError

from nas.errors import InvalidInput, StoreUnavailable, one_line
from nas.records.run import CurvePoint, Run
from nas.records.trial import StoredPoint, Trial
from nas.store import rows
from nas.store.engine import ACCEPTED, connect_arguments, parse, reading, shown_url
from nas.store.schema import SearchRow, TrialRow
from nas.store.scopes import repeats, within
from nas.store.searches import Store
from nas.store.selecting import curves_of


@dataclass(frozen=True, slots=True)
class StoredRun:
    """A trial in whatever state, with its curve and what it was trained on."""

    trial: Trial
    #: in the order of their steps, without the losses of single samples
    points: tuple[StoredPoint, ...]
    task: str
    #: None until a worker has loaded the search's data
    fingerprint: str | None
    #: whether it shares the result of another run of the scope, and so is no evidence of its own
    repeats: bool

    def curve_points(self) -> list[CurvePoint]:
        """The points with what identifies their run, as analysis takes them."""
        run = Run.of(self.trial)
        return [
            CurvePoint(p.step, p.train_flops, p.loss, p.loss_stderr, p.train_seconds, run=run)
            for p in self.points
        ]


def iterate_runs(
    store: Store,
    *,
    search_id: str | None = None,
    task: str | None = None,
    fingerprint: str | None = None,
    batch: int = 500,
) -> Iterator[StoredRun]:
    """Every trial of a search, or of the tenant's on a task's data, in the order of their ids.

    Trials are read in pages of `batch`, each in a transaction of its own with the curves of all
    of them in one query, so that memory does not grow with the store and a slow reader holds no
    transaction open.  What is written meanwhile is seen as it is when its page is read.

    Raises
    ------
    NotFound
        No such search.
    """
    query = (
        select(TrialRow, SearchRow.task, SearchRow.task_fingerprint, repeats(search_id))
        .join(SearchRow, TrialRow.search_id == SearchRow.id)
        .where(*within(search_id, task, fingerprint, store.tenant))
        .order_by(TrialRow.id)
        .limit(batch)
    )
    after: int | None = None
    while True:
        with reading(store.engine) as session:
            if after is None and search_id is not None:
                store.row(session, search_id)
            page = session.execute(
                query if after is None else query.where(TrialRow.id > after)
            ).all()
            curves = curves_of(session, [row.id for row, *_ in page])
            runs = [
                StoredRun(
                    rows.to_trial(row), tuple(curves.get(row.id, ())), name, found, bool(twin)
                )
                for row, name, found, twin in page
            ]
        yield from runs
        if len(runs) < batch:
            return
        after = runs[-1].trial.id


@dataclass(frozen=True, slots=True)
class ForeignDatabase:
    """A database of another program, known to be no store of ours."""

    #: with the driver that is installed; holds the password
    url: str
    #: without password and connection options
    shown: str
    #: for the driver
    connect_args: dict[str, Any]


def foreign_database(url: str, field: str) -> ForeignDatabase:
    """The database at `url`, looked at before another program's tables are made in it.

    A SQLite file that does not exist is accepted if its folder does, and is not created here.

    Raises
    ------
    InvalidInput
        About `field`: no URL, another kind of database, one that cannot be reached, or one that
        holds a store of searches or another program's schema.
    """
    parsed = parse(url, field)
    shown = shown_url(parsed)
    if parsed.get_backend_name() == "postgresql":
        found = ForeignDatabase(
            _plain(parsed.set(drivername="postgresql+psycopg")), shown, connect_arguments(parsed)
        )
    else:
        path = Path(str(parsed.database))
        if not path.parent.is_dir():
            raise InvalidInput(field, shown, f"{ACCEPTED}: folder {path.parent} does not exist")
        found = ForeignDatabase(_plain(parsed.set(drivername="sqlite")), shown, {})
        if not path.exists():
            return found
    with refusing(found, field):
        tables = _tables(found)
    if "searches" in tables or ("studies" not in tables and tables & {"trials", "alembic_version"}):
        raise InvalidInput(
            field,
            shown,
            "an empty database or one of Optuna; this one has other tables of the same names",
        )
    return found


def _plain(url: URL) -> str:
    return url.render_as_string(hide_password=False)


def _tables(database: ForeignDatabase) -> set[str]:
    engine = create_engine(database.url, connect_args=database.connect_args)
    try:
        return set(inspect(engine).get_table_names())
    finally:
        engine.dispose()


@contextmanager
def refusing(database: ForeignDatabase, field: str) -> Iterator[None]:
    """Turn errors of a database that is being opened into `InvalidInput` about `field`."""
    try:
        yield
    except SQLAlchemyError as error:
        accepted = f"{ACCEPTED} that can be opened and written: {_reason(error, database)}"
        raise InvalidInput(field, database.shown, accepted) from None


@contextmanager
def translating(database: ForeignDatabase) -> Iterator[None]:
    """Turn errors of a database that has been opened into `StoreUnavailable`."""
    try:
        yield
    except SQLAlchemyError as error:
        raise StoreUnavailable(f"{database.shown}: {_reason(error, database)}") from None


def _reason(error: SQLAlchemyError, database: ForeignDatabase) -> str:
    """One line of what the driver says, without the password."""
    said = one_line(getattr(error, "orig", None) or error)
    password = make_url(database.url).password
    return said.replace(str(password), "***") if password else said
