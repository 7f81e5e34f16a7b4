"""Quotas of a tenant: searches that have not ended, train FLOPs, and searches that run at once.

When a search is submitted, it is charged the most train FLOPs that it may use.  Once it has ended,
it is charged one whole run for each attempt at a run, even if the attempt was stopped early or
continued from a checkpoint, so that stopping and restarting cannot regain quota.  An attempt at a
slice of a run, after which the run pauses, is charged as the slice: a run that is stopped there
costs what it has trained.  Reused results cost nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from sqlalchemy import ColumnElement, func, or_, select
from sqlalchemy.orm import Session

from nas.errors import QuotaExceeded
from nas.planning.request import SearchRequest
from nas.settings import Settings
from nas.store import rows
from nas.store.engine import SECONDS_PER_DAY, one_at_a_time
from nas.store.records import TERMINAL
from nas.store.schema import SearchRow, TenantRow, TrialRow

#: First key of the lock under which a tenant's quotas are checked; an arbitrary constant.
_QUOTA_LOCK = 7305616


@dataclass(frozen=True, slots=True)
class Quotas:
    """Limits of one tenant; None means no limit."""

    #: searches that have not ended
    searches: int | None = None
    #: train FLOPs of its searches that have not ended, or ended within `days`
    train_flops: float | None = None
    days: float = 30.0
    #: searches that run at once; see `nas.store.leases`
    concurrency: int | None = None
    #: of all kept weights
    weights_bytes: int | None = None

    @classmethod
    def of(cls, settings: Settings) -> Quotas:
        """The quotas of tenants that have none of their own, from the settings."""
        return cls(
            settings.tenant_searches, settings.tenant_train_flops, settings.quota_days,
            settings.tenant_concurrency, settings.tenant_weights_bytes,
        )  # fmt: skip


UNLIMITED = Quotas()


@dataclass(frozen=True, slots=True)
class Use:
    """What a tenant uses, and its quotas."""

    tenant: str
    #: that have not ended
    searches: int
    #: that run now
    running: int
    #: train FLOPs charged within the quota's days
    train_flops: float
    quotas: Quotas

    @property
    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def most_flops(request: SearchRequest) -> float:
    """Train FLOPs that a search may use at most."""
    runs = request.trials + (0 if request.confirm else request.references)
    most = request.train_flops * runs * request.replicates
    limit = request.limits.total_train_flops if request.limits else None
    totals = (request.total_train_flops, limit)
    return min([most, *(total for total in totals if total is not None)])


def used_flops(session: Session, search_id: str) -> float:
    """Train FLOPs of every attempt at the runs of a search; reused results have none."""
    spent = TrialRow.charged_steps * TrialRow.train_flops_per_step
    return _total(session, spent, TrialRow.search_id == search_id)


def owed_flops(session: Session, search_id: str, most: float) -> float:
    """Train FLOPs that an ended search may use in addition if it is retried, of `most` in total."""
    own = (TrialRow.search_id == search_id, TrialRow.state == "complete")
    return max(most - _total(session, TrialRow.train_flops, *own), 0.0)


def _total(session: Session, flops: Any, *where: ColumnElement[bool]) -> float:
    return float(session.scalar(select(func.sum(flops)).where(*where)) or 0.0)


def check_quotas(
    session: Session, tenant: str, defaults: Quotas, train_flops: float, *, further: int = 1
) -> None:
    """Raise `QuotaExceeded` if the tenant's quotas do not allow more, in the caller's transaction.

    Parameters
    ----------
    train_flops, further
        Additional train FLOPs, and additional searches that have not ended.
    """
    quotas = quotas_of(session, tenant, defaults)
    if quotas.searches is None and quotas.train_flops is None:
        return
    one_at_a_time(session, _QUOTA_LOCK, func.hashtext(tenant))
    use = use_of(session, tenant, quotas)
    if quotas.searches is not None and use.searches + further > quotas.searches:
        raise QuotaExceeded(
            "searches", tenant,
            f"tenant {tenant} may have {quotas.searches} searches that have not ended, and has "
            f"{use.searches}; wait until one ends, or cancel one",
        )  # fmt: skip
    if quotas.train_flops is not None and use.train_flops + train_flops > quotas.train_flops:
        raise QuotaExceeded(
            "train_flops", tenant,
            f"tenant {tenant} may use {quotas.train_flops:.6g} train FLOPs in {quotas.days:g} "
            f"days, has used or planned {use.train_flops:.6g}, and this search may use "
            f"{train_flops:.6g} more; reduce it, or set limits.total_train_flops",
        )  # fmt: skip


def quotas_of(session: Session, tenant: str, defaults: Quotas) -> Quotas:
    own = session.get(TenantRow, tenant)
    if own is None:
        return defaults
    named = {name: getattr(own, name) for name in ("searches", "train_flops", "concurrency")}
    return replace(defaults, **{name: n for name, n in named.items() if n is not None})


def use_of(session: Session, tenant: str, quotas: Quotas) -> Use:
    since = rows.now(session) - quotas.days * SECONDS_PER_DAY
    unended = SearchRow.state.not_in(TERMINAL)
    own = SearchRow.tenant == tenant
    counts = select(func.count()).select_from(SearchRow)
    return Use(
        tenant,
        session.scalar(counts.where(own, unended)) or 0,
        session.scalar(counts.where(own, SearchRow.state == "running")) or 0,
        _total(session, SearchRow.charged_flops, own, counted(since)),
        quotas,
    )  # fmt: skip


def counted(since: float | ColumnElement[float]) -> ColumnElement[bool]:
    """Whether the charge of a search counts: it has not ended, or ended after a time."""
    return or_(SearchRow.state.not_in(TERMINAL), SearchRow.finished_at > since)
