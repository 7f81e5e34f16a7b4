"""What the audit log is told of requests: every change, and refusals up to a rate."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass

from anyio import CapacityLimiter, to_thread
from asgi_correlation_id import correlation_id

from api.rates import Rates
from nas.errors import StoreUnavailable
from nas.store import Store
from nas.store.audit import Audit

_log = logging.getLogger(__name__)
#: Callers whose refusals are counted at once.
_COUNTED = 10_000


@dataclass(frozen=True, slots=True)
class Line:
    """What came of one request."""

    method: str
    path: str
    status: int
    reason: str | None
    address: str
    #: the key or the address that it was counted under
    who: str
    tenant: str | None
    key_id: str | None

    @property
    def outcome(self) -> str:
        if self.status < 400:
            return "done"
        return "refused" if self.status in (401, 403, 404, 429) else "failed"


class Trail:
    """Writes lines of the audit log.

    A flood of what was refused or has failed must not fill the disk: past a rate of each caller and
    of all together they are counted, and the next line about the same caller tells how many.
    """

    def __init__(self, store: Store, rates: Rates) -> None:
        self._audit, self._rates = Audit(store), rates
        self._limiter = CapacityLimiter(4)
        #: caller → refusals that no line tells of yet
        self._untold: Counter[str] = Counter()

    async def note(self, line: Line) -> None:
        """Append a line; where the database is away the service's own log has it instead."""
        reason = line.reason
        if line.outcome != "done":
            if self._is_too_much(line.who):
                if line.who in self._untold or len(self._untold) < _COUNTED:
                    self._untold[line.who] += 1
                return
            if untold := self._untold.pop(line.who, 0):
                more = f"(and {untold} more refused since the last line)"
                reason = more if reason is None else f"{reason} {more}"
        told: dict[str, str | int | None] = {
            "tenant": line.tenant, "key_id": line.key_id, "target": line.path,
            "status": line.status, "reason": reason, "address": line.address,
            "request_id": correlation_id.get(),
        }  # fmt: skip
        action = f"{line.method} {line.outcome}"
        try:
            await to_thread.run_sync(lambda: self._audit.add(action, **told), limiter=self._limiter)
        except StoreUnavailable as error:
            _log.error("the audit log cannot be written (%s): %s %s", error, action, told)

    def _is_too_much(self, who: str) -> bool:
        if self._rates.spend("told", who) is not None:
            return True
        return self._rates.spend("told_in_all", "anyone") is not None
