"""What the audit log is told of requests: every change, and refusals up to a rate."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from anyio import CapacityLimiter, to_thread
from asgi_correlation_id import correlation_id

from api.rates import Rates
from nas.errors import StoreUnavailable
from nas.store import Store
from nas.store.audit import Audit

_log = logging.getLogger(__name__)


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
    def refused(self) -> bool:
        return self.status in (401, 403, 404, 429)


class Trail:
    """Writes lines of the audit log.

    A flood of refusals must not fill the disk: past a rate of each caller and of all together they
    are counted, and the next line that is written for one tells how many there were.
    """

    def __init__(self, store: Store, rates: Rates) -> None:
        self._audit, self._rates = Audit(store), rates
        self._limiter = CapacityLimiter(4)
        self._untold = 0

    async def note(self, line: Line) -> None:
        """Append a line; where the database is away the service's own log has it instead."""
        reason = line.reason
        if line.refused:
            if self._is_too_much(line.who):
                self._untold += 1
                return
            if self._untold:
                reason = f"{reason} (and {self._untold} more refused since the last line)"
                self._untold = 0
        told: dict[str, str | int | None] = {
            "tenant": line.tenant, "key_id": line.key_id, "target": line.path,
            "status": line.status, "reason": reason, "address": line.address,
            "request_id": correlation_id.get(),
        }  # fmt: skip
        action = f"{line.method} {'refused' if line.refused else 'done'}"
        if not line.refused and line.status >= 400:
            action = f"{line.method} failed"
        try:
            await to_thread.run_sync(lambda: self._audit.add(action, **told), limiter=self._limiter)
        except StoreUnavailable as error:
            _log.error("the audit log cannot be written (%s): %s %s", error, action, told)

    def _is_too_much(self, who: str) -> bool:
        if self._rates.spend("told", who) is not None:
            return True
        return self._rates.spend("told_in_all", "anyone") is not None
