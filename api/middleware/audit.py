"""Records of requests in the audit log: every change, and refusals up to a rate."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from functools import partial

from anyio import CapacityLimiter, to_thread
from asgi_correlation_id import correlation_id

from api.limits.rates import Rates
from nas.errors import StoreUnavailable
from nas.store import Store
from nas.store.audit import Audit

_log = logging.getLogger(__name__)
#: Callers whose refusals are counted at once.
_COUNTED = 10_000


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request and its outcome."""

    method: str
    path: str
    status: int
    reason: str | None
    address: str
    #: the key or the address that its rate is counted by
    who: str
    tenant: str | None
    key_id: str | None

    @property
    def outcome(self) -> str:
        if self.status < 400:
            return "done"
        return "refused" if self.status in (401, 403, 404, 429) else "failed"


class AuditTrail:
    """Writes the records of requests to the audit log.

    A flood of refused or failed requests must not fill the disk.  Past a rate, per caller and in
    total, such requests are only counted, and the caller's next record tells how many.
    """

    def __init__(self, store: Store, rates: Rates) -> None:
        self._audit, self._rates = Audit(store), rates
        self._limiter = CapacityLimiter(4)
        #: caller → refusals that are counted, but in no record yet
        self._counted: Counter[str] = Counter()

    async def note(self, record: RequestRecord) -> None:
        """Append a record; to the service's own log where the database cannot be reached."""
        reason = record.reason
        if record.outcome != "done":
            if self._is_too_much(record.who):
                if record.who in self._counted or len(self._counted) < _COUNTED:
                    self._counted[record.who] += 1
                return
            if counted := self._counted.pop(record.who, 0):
                more = f"(and {counted} more refused since the last record)"
                reason = more if reason is None else f"{reason} {more}"
        values: dict[str, str | int | None] = {
            "tenant": record.tenant, "key_id": record.key_id, "target": record.path,
            "status": record.status, "reason": reason, "address": record.address,
            "request_id": correlation_id.get(),
        }  # fmt: skip
        action = f"{record.method} {record.outcome}"
        add = partial(self._audit.add, action, **values)
        try:
            await to_thread.run_sync(add, limiter=self._limiter)
        except StoreUnavailable as error:
            _log.error("the audit log cannot be written (%s): %s %s", error, action, values)

    def _is_too_much(self, who: str) -> bool:
        if self._rates.spend("audit", who) is not None:
            return True
        return self._rates.spend("audit_total", "anyone") is not None
