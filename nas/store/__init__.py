"""The store: the one source of truth about searches.  Only this package imports sqlalchemy."""

from nas.store.leases import Leases
from nas.store.migrate import upgrade
from nas.store.records import (
    ConfirmedPair,
    CurvePoint,
    Event,
    Lease,
    MeasuredCost,
    Renewal,
    Run,
    ScopeState,
    Search,
    StoredPoint,
    Trial,
    TrialDraft,
    TrialFailure,
)
from nas.store.searches import Store
from nas.store.standings import AXES, Standings, of_tenant, task_scope

__all__ = [
    "AXES", "ConfirmedPair", "CurvePoint", "Event", "Lease", "Leases", "MeasuredCost", "Renewal",
    "Run", "ScopeState", "Search", "Standings", "Store", "StoredPoint", "Trial", "TrialDraft",
    "TrialFailure", "of_tenant", "task_scope", "upgrade",
]  # fmt: skip
