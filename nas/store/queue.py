"""The queue: which search is claimed next, which ones wait, and which ones run.

Of the tenants that have a search to claim, it is the turn of the one that runs the fewest, and of
these of the one that has waited longest; those at their limit are skipped.  Of a tenant's searches
the one of the highest priority is next, and of these the oldest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, func, or_, select
from sqlalchemy.orm import Session

from nas.planning.request import Trainer
from nas.records.search import Search
from nas.store import rows
from nas.store.engine import reading
from nas.store.schema import SearchRow, TenantRow
from nas.store.searches import Store

#: The order of one tenant's searches.
WITHIN_TENANT = (SearchRow.priority.desc(), SearchRow.sequence)
#: Why a search is not claimed though workers are free: its tenant runs as many as it may, or it
#: failed for want of infrastructure and is tried again later.
HeldBack = Literal["limit", "later"]


def is_ready(at: float) -> ColumnElement[bool]:
    """Whether a search could be claimed at a time: queued, or running under a lease that is out."""
    expired = (SearchRow.state == "running") & (SearchRow.lease_until < at)
    return or_((SearchRow.state == "queued") & (SearchRow.not_before <= at), expired)


def is_trained_by(trainer: Trainer) -> ColumnElement[bool]:
    """Whether workers, or clients that ask for them, train the trials of a search."""
    given = func.coalesce(SearchRow.request["trainer"].as_string(), "workers")
    return given == trainer


def any_limit(session: Session, default: int | None) -> bool:
    """Whether any tenant has a limit of searches that run at once.

    Parameters
    ----------
    default
        Of tenants without a quota of their own; None for no limit.
    """
    own = select(TenantRow.name).where(TenantRow.concurrency.is_not(None)).limit(1)
    return default is not None or session.scalar(own) is not None


def below_limits(at: float, default: int | None) -> list[ColumnElement[bool]]:
    """Excludes the searches of tenants that run as many as they may."""
    most = func.coalesce(TenantRow.concurrency, default)
    full = (
        select(SearchRow.tenant)
        .outerjoin(TenantRow, TenantRow.name == SearchRow.tenant)
        .where(SearchRow.state == "running", SearchRow.lease_until >= at, is_trained_by("workers"))
        .group_by(SearchRow.tenant, TenantRow.concurrency)
        .having(func.count() >= most)  # without a limit this is NULL, and excludes no tenant
    )
    none = select(TenantRow.name).where(TenantRow.concurrency == 0)
    return [SearchRow.tenant.not_in(full), SearchRow.tenant.not_in(none)]


def turns(session: Session, claimable: Sequence[ColumnElement[bool]], at: float) -> list[str]:
    """Tenants with a search to claim, ordered by running searches, then by waiting time."""
    tenants = list(session.scalars(select(SearchRow.tenant).where(*claimable).distinct()))
    if len(tenants) < 2:
        return tenants
    rank = _ranks(session, tenants, claimable, at)
    return sorted(tenants, key=rank.__getitem__)


def _ranks(
    session: Session, tenants: Sequence[str], claimable: Sequence[ColumnElement[bool]], at: float
) -> dict[str, tuple[Any, ...]]:
    """Tenant → (searches that it runs, when its last one began, its oldest one to claim)."""
    held = (SearchRow.state == "running") & (SearchRow.lease_until >= at)
    runs = held & is_trained_by("workers")
    had = (
        select(
            SearchRow.tenant,
            func.count().filter(runs),
            func.coalesce(func.max(SearchRow.started_at), 0.0),
            func.min(SearchRow.sequence).filter(*claimable),
        )
        .where(SearchRow.tenant.in_(tenants))
        .group_by(SearchRow.tenant)
    )
    return {tenant: tuple(of_one) for tenant, *of_one in session.execute(had)}


@dataclass(frozen=True, slots=True)
class Waiting:
    """A search of the queue."""

    search: Search
    held_back: HeldBack | None
    #: until it may be claimed, of one that is tried again later
    seconds: float


@dataclass(frozen=True, slots=True)
class Running:
    """A search that a worker holds."""

    search: Search
    #: that this worker has held it
    held_seconds: float
    #: until its lease ends unless the worker renews it
    lease_seconds: float


@dataclass(frozen=True, slots=True)
class Queue:
    """The queue at one moment."""

    #: that moment by the database's clock, seconds since 1970
    at: float
    #: in the order in which they are claimed if none ends and none is added; those that are held
    #: back come last
    waiting: Sequence[Waiting]
    waiting_total: int
    #: those that were claimed last come first
    running: Sequence[Running]
    running_total: int


def read_queue(store: Store, limit: int) -> Queue:
    """The first searches that wait, and the last that were claimed, at most `limit` of each.

    Of a confined store those of its tenant, in the order among themselves.
    """
    default = store.quotas.concurrency
    own = [SearchRow.tenant == store.tenant] if store.confined else []
    holds = (SearchRow.state == "running", *own)
    brief = (SearchRow.id, SearchRow.tenant, SearchRow.sequence, SearchRow.started_at)
    with reading(store.engine) as session:
        at = rows.now(session)
        ready = [is_ready(at), *own]
        found = session.execute(select(*brief).where(*ready).order_by(*WITHIN_TENANT)).all()
        tenants = sorted({row.tenant for row in found})
        limits = dict(
            session.execute(
                select(TenantRow.name, TenantRow.concurrency).where(
                    TenantRow.name.in_(tenants), TenantRow.concurrency.is_not(None)
                )
            ).all()
        )
        order, full = _simulated(
            found, _ranks(session, tenants, ready, at),
            {tenant: limits.get(tenant, default) for tenant in tenants}, at, limit,
        )  # fmt: skip
        later = (SearchRow.state == "queued", SearchRow.not_before > at, *own)
        soon = session.execute(
            select(SearchRow.id, SearchRow.not_before)
            .where(*later)
            .order_by(SearchRow.not_before, SearchRow.sequence)
        ).all()
        held: list[tuple[str, HeldBack | None, float]] = [
            *((id_, None, 0.0) for id_ in order), *((id_, "limit", 0.0) for id_ in full),
            *((id_, "later", not_before - at) for id_, not_before in soon),
        ]  # fmt: skip
        first = select(SearchRow).where(SearchRow.id.in_([id_ for id_, *_ in held[:limit]]))
        searches = {row.id: rows.to_search(row) for row in session.scalars(first)}
        leased = [*holds, SearchRow.lease_until >= at]
        last = select(SearchRow).where(*leased).order_by(SearchRow.claimed_at.desc())
        running = [
            Running(rows.to_search(row), at - (row.claimed_at or at), (row.lease_until or at) - at)
            for row in session.scalars(last.limit(limit))
        ]
        count = select(func.count()).select_from(SearchRow).where(*leased)
        running_total = session.scalar(count) or 0
    waiting = [Waiting(searches[id_], why, seconds) for id_, why, seconds in held[:limit]]
    return Queue(at, waiting, len(held), running, running_total)


def _simulated(
    found: Sequence[Any],
    ranks: Mapping[str, tuple[Any, ...]],
    limits: Mapping[str, int | None],
    at: float,
    count: int,
) -> tuple[list[str], list[str]]:
    """(the first `count` searches in the order of their claims, the others: where these are fewer,
    those of tenants that are at their limit by then).

    Parameters
    ----------
    found
        Searches to claim, each tenant's in order.
    """
    left: dict[str, list[Any]] = {}
    for row in found:
        left.setdefault(row.tenant, []).append(row)
    state = {tenant: (runs, last) for tenant, (runs, last, _) in ranks.items()}
    order: list[str] = []

    def full(tenant: str) -> bool:
        most = limits[tenant]
        return most is not None and state[tenant][0] >= most

    while len(order) < count:
        able = [tenant for tenant, its in left.items() if its and not full(tenant)]
        if not able:
            break
        turn = min(able, key=lambda t: (*state[t], min(row.sequence for row in left[t])))
        row = left[turn].pop(0)
        runs, last = state[turn]
        # each claim is later than the one before
        began = at + len(order) if row.started_at is None else last
        state[turn] = runs + 1, max(last, began)
        order.append(row.id)
    return order, [row.id for its in left.values() for row in its]
