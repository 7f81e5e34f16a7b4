"""The store: the one source of truth about searches.  Only this package imports sqlalchemy."""

from nas.records.run import CurvePoint, Run
from nas.records.search import Search
from nas.records.trial import MeasuredCost, StoredPoint, Trial, TrialFailure
from nas.store.evidence import Standings
from nas.store.fronts import AXES
from nas.store.leases import Leases
from nas.store.migrate import upgrade
from nas.store.records import (
    ConfirmedPair,
    DeviceState,
    Event,
    Lease,
    Renewal,
    Round,
    ScopeState,
    TrialDraft,
)
from nas.store.scopes import of_tenant, task_scope
from nas.store.searches import Store

__all__ = [
    "AXES", "ConfirmedPair", "CurvePoint", "DeviceState", "Event", "Lease", "Leases",
    "MeasuredCost", "Renewal", "Round", "Run", "ScopeState", "Search", "Standings", "Store",
    "StoredPoint", "Trial", "TrialDraft", "TrialFailure", "of_tenant", "task_scope", "upgrade",
]  # fmt: skip
