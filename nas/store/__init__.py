"""The store: the only truth about searches. The only place that imports sqlalchemy."""

from nas.store.leases import Leases
from nas.store.migrate import upgrade
from nas.store.records import (
    CurvePoint,
    Event,
    Lease,
    Search,
    StoredPoint,
    Trial,
    TrialDraft,
)
from nas.store.searches import Store

__all__ = [
    "CurvePoint", "Event", "Lease", "Leases", "Search", "Store", "StoredPoint", "Trial",
    "TrialDraft", "upgrade",
]  # fmt: skip
