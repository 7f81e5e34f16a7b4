"""What monitoring reads from the store: its schema, and a few numbers that are cheap to query."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import and_, case, func, select, text
from sqlalchemy.orm import Session

from nas.store import rows
from nas.store.engine import SECONDS_PER_DAY, reading
from nas.store.migrate import known_revisions, stored_revision
from nas.store.processes import LIVE_SECONDS
from nas.store.quotas import counted
from nas.store.schema import ProcessRow, SearchRow, TrialRow, WeightsRow, database_now
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


@dataclass(slots=True)
class TenantGauges:
    """What one tenant has, or several together."""

    #: state → how many
    searches: Counter[str] = field(default_factory=Counter)
    #: charged to its quota now; see `nas.store.quotas`
    train_flops: float = 0.0
    #: of all kept weights
    weights_bytes: int = 0

    def add(self, other: TenantGauges) -> None:
        self.searches.update(other.searches)
        self.train_flops += other.train_flops
        self.weights_bytes += other.weights_bytes


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
    #: of every tenant that has a search
    tenants: Mapping[str, TenantGauges]


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
    working = (
        select(ProcessRow.state, func.count())
        .where(
            ProcessRow.kind == "worker", ProcessRow.seen_at >= database_now() - LIVE_SECONDS
        )
        .group_by(ProcessRow.state)
    )  # fmt: skip
    with reading(store.engine) as session:
        stale, leases, dead, oldest = session.execute(totals).one()
        tenants = _tenants(session, store.quotas.days)
        return Gauges(
            schema=_schema(session),
            searches=_sum(tenants.values()).searches,
            trials=_counted(session, _tallies(session)),
            workers=_counted(session, working),
            oldest_queued_seconds=max(0.0, float(oldest)),
            leases_expired=int(leases),
            stale_writes=int(stale),
            dead_lettered=int(dead),
            tenants=tenants,
        )


def of_most(tenants: Mapping[str, TenantGauges], most: int, rest: str) -> dict[str, TenantGauges]:
    """The tenants that have been charged the most, and the others together under the name `rest`.

    So the number of time series has a bound, and sums over all tenants are those of the store.
    """
    ordered = sorted(tenants, key=lambda name: (-tenants[name].train_flops, name))
    told = {name: tenants[name] for name in ordered[:most]}
    if ordered[most:]:
        told[rest] = _sum(tenants[name] for name in ordered[most:])
    return told


def _sum(tenants: Iterable[TenantGauges]) -> TenantGauges:
    total = TenantGauges()
    for tenant in tenants:
        total.add(tenant)
    return total


def _tenants(session: Session, quota_days: float) -> dict[str, TenantGauges]:
    since = database_now() - quota_days * SECONDS_PER_DAY
    charged = func.coalesce(func.sum(case((counted(since), SearchRow.charged_flops))), 0.0)
    by_state = select(SearchRow.tenant, SearchRow.state, func.count(), charged).group_by(
        SearchRow.tenant, SearchRow.state
    )
    found: dict[str, TenantGauges] = {}
    for name, state, count, flops in session.execute(by_state):
        part = TenantGauges(Counter({state: int(count)}), float(flops))
        found.setdefault(name, TenantGauges()).add(part)
    kept = (
        select(SearchRow.tenant, func.sum(WeightsRow.bytes))
        .join(TrialRow, TrialRow.search_id == SearchRow.id)
        .join(WeightsRow, WeightsRow.trial_id == TrialRow.id)
        .group_by(SearchRow.tenant)
    )
    for name, kept_bytes in session.execute(kept):
        found.setdefault(name, TenantGauges()).weights_bytes = int(kept_bytes)
    return found


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
