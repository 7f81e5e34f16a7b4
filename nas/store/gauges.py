"""What monitoring reads from the store: its schema, and a few numbers that are cheap to query."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import and_, case, func, select, text
from sqlalchemy.orm import Session

from nas.store import rows
from nas.store.engine import reading
from nas.store.migrate import known_revisions, stored_revision
from nas.store.processes import LIVE_SECONDS
from nas.store.schema import ProcessRow, SearchRow, database_now
from nas.store.searches import Store


@dataclass(frozen=True, slots=True)
class SchemaState:
    """The revision of a database beside the one that this program needs."""

    found: str | None
    needed: str

    @property
    def verdict(self) -> Literal["current", "missing", "older", "newer"]:
        """How the database's schema compares with the one that the program needs."""
        if self.found == self.needed:
            return "current"
        if self.found is None:
            return "missing"
        return "older" if self.found in known_revisions() else "newer"

    @property
    def advice(self) -> str:
        """What to do; empty if the schema is current."""
        return {
            "current": "",
            "missing": "run `einsum-nas db upgrade`, or see whether the database is the right one",
            "older": "run `einsum-nas db upgrade`",
            "newer": "upgrade einsum-nas to the version that upgraded the database",
        }[self.verdict]


@dataclass(frozen=True, slots=True)
class Database:
    """Facts about a database."""

    #: such as SQLite 3.40.1
    product: str
    round_trip_seconds: float
    #: its clock less this machine's, seconds; half a round trip uncertain
    clock_ahead_seconds: float
    schema: SchemaState


@dataclass(frozen=True, slots=True)
class Gauges:
    """The state of a store at one moment."""

    schema: SchemaState
    #: state → how many
    searches: Mapping[str, int]
    #: state → how many, over all searches
    trials: Mapping[str, int]
    #: state → number of workers that were seen recently
    workers: Mapping[str, int]
    #: seconds since the oldest queued search was submitted
    oldest_queued_seconds: float
    #: running searches whose lease has run out: whoever held them is gone
    leases_expired: int
    #: writes refused because another worker had claimed the search
    stale_writes: int
    #: searches given up after too many attempts
    dead_lettered: int


def _schema(session: Session) -> SchemaState:
    return SchemaState(stored_revision(session.connection()), known_revisions()[-1])


def read_database(store: Store) -> Database:
    """Read facts about a database with a few small queries.

    Raises
    ------
    StoreUnavailable
        It does not answer.
    """
    with reading(store.engine) as session:
        asked_at, asked = time.time(), time.perf_counter()
        clock = rows.now(session)
        seconds = time.perf_counter() - asked
        name = session.get_bind().dialect.name
        query = "SELECT sqlite_version()" if name == "sqlite" else "SHOW server_version"
        product = f"{'SQLite' if name == 'sqlite' else 'PostgreSQL'} {session.scalar(text(query))}"
        return Database(product, seconds, clock - asked_at - seconds / 2, _schema(session))


def read_gauges(store: Store) -> Gauges:
    """Read all gauges, in a handful of queries that count neither trials nor points.

    Raises
    ------
    StoreUnavailable
        The database does not answer.
    """
    expired = and_(SearchRow.state == "running", SearchRow.lease_until < database_now())
    given_up = and_(SearchRow.state == "failed", SearchRow.failure == "attempts")
    queued_at = case((SearchRow.state == "queued", SearchRow.created_at))
    totals = select(
        func.coalesce(func.sum(SearchRow.stale_writes), 0),
        func.count(case((expired, 1))),
        func.count(case((given_up, 1))),
        func.coalesce(database_now() - func.min(queued_at), 0.0),
    )
    by_state = select(SearchRow.state, func.count()).group_by(SearchRow.state)
    working = (
        select(ProcessRow.state, func.count())
        .where(
            ProcessRow.kind == "worker", ProcessRow.seen_at >= database_now() - LIVE_SECONDS
        )
        .group_by(ProcessRow.state)
    )  # fmt: skip
    with reading(store.engine) as session:
        stale, leases, dead, oldest = session.execute(totals).one()
        return Gauges(
            schema=_schema(session),
            searches=_counted(session, by_state),
            trials=_counted(session, _tallies(session)),
            workers=_counted(session, working),
            oldest_queued_seconds=max(0.0, float(oldest)),
            leases_expired=int(leases),
            stale_writes=int(stale),
            dead_lettered=int(dead),
        )


def _counted(session: Session, query: Any) -> dict[str, int]:
    return {str(name): int(n) for name, n in session.execute(query)}


def _tallies(session: Session) -> Any:
    """State of trials → how many, summed over the tallies of all searches by the database."""
    each = "json_each" if session.get_bind().dialect.name == "sqlite" else "json_each_text"
    counts = getattr(func, each)(SearchRow.tally).table_valued("key", "value", name="counts")
    value = func.sum(counts.c.value.cast(SearchRow.sequence.type))
    return (
        select(counts.c.key, value)
        .select_from(SearchRow)
        .join(counts, text("true"))
        .where(counts.c.key != rows.REFERENCES)
        .group_by(counts.c.key)
    )
