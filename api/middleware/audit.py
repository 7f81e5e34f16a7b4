"""Records of requests in the audit log: every change, and refusals up to a rate."""

from __future__ import annotations

import logging
from collections import Counter
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

    async def note(
        self, method: str, status: int, reason: str | None, *, who: str, **about: str | None
    ) -> None:
        """Append a record; to the service's own log where the database cannot be reached.

        Parameters
        ----------
        who
            The key or the address that the request's rate is counted by.
        about
            `target`, `address`, `tenant` and `key_id` of the record.
        """
        outcome = "refused" if status in (401, 403, 404, 429) else "failed"
        if status < 400:
            outcome = "done"
        elif self._is_too_much(who):
            if who in self._counted or len(self._counted) < _COUNTED:
                self._counted[who] += 1
            return
        elif counted := self._counted.pop(who, 0):
            more = f"(and {counted} more refused since the last record)"
            reason = more if reason is None else f"{reason} {more}"
        values = {**about, "status": status, "reason": reason, "request_id": correlation_id.get()}
        add = partial(self._audit.add, f"{method} {outcome}", **values)
        try:
            await to_thread.run_sync(add, limiter=self._limiter)
        except StoreUnavailable as error:
            _log.error(
                "the audit log cannot be written (%s): %s %s %s", error, method, outcome, values
            )

    def _is_too_much(self, who: str) -> bool:
        if self._rates.spend("audit", who) is not None:
            return True
        return self._rates.spend("audit_total", "anyone") is not None
