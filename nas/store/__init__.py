"""The store: the one source of truth about searches.  Only this package imports sqlalchemy."""

from nas.store.evidence import Standings
from nas.store.fronts import AXES
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
from nas.store.scopes import of_tenant, task_scope
from nas.store.searches import Store

__all__ = [
    "AXES", "ConfirmedPair", "CurvePoint", "Event", "Lease", "Leases", "MeasuredCost", "Renewal",
    "Run", "ScopeState", "Search", "Standings", "Store", "StoredPoint", "Trial", "TrialDraft",
    "TrialFailure", "of_tenant", "task_scope", "upgrade",
]  # fmt: skip
