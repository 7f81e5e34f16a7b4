"""Holding a search that was claimed: its lease is renewed while the work goes on.

A heartbeat thread renews the lease after a third of its length at most, and more often if that is
long, because a renewal also returns requests to cancel or pause.  If no renewal has succeeded for
two thirds of the length, the watchdog ends the process, since another worker may soon own the
search.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import ParamSpec

from nas import tracing
from nas.errors import ClusterUnavailable, InvalidInput, LeaseLost, StoreUnavailable
from nas.logs import bound, carried
from nas.store import Lease, Leases, Search
from workers import metrics
from workers.session import SearchSession, Signals

_log = logging.getLogger(__name__)
#: Most seconds between renewals, and so until a worker learns that its search is to be cancelled.
_LONGEST_UNHEARD = 2.0
#: Exit status of a process that its watchdog ended.
WATCHDOG_STATUS = 75

P = ParamSpec("P")


class Heartbeat:
    """Renews a lease in the background and ends the process when that is no longer possible.

    Parameters
    ----------
    kill
        Ends the process.  The default neither flushes nor cleans up, because nothing may be
        written once another worker may hold the lease.
    """

    def __init__(
        self,
        leases: Leases,
        lease: Lease,
        signals: Signals,
        kill: Callable[[int], object] = os._exit,
    ) -> None:
        self._leases, self._lease, self._signals, self._kill = leases, lease, signals, kill
        self._renewed_at = time.monotonic()
        self._done = threading.Event()
        self._threads = [
            threading.Thread(target=carried(self._renew), name="heartbeat", daemon=True),
            threading.Thread(target=carried(self._watch), name="watchdog", daemon=True),
        ]

    def __enter__(self) -> Heartbeat:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._threads[0].join(self._lease.seconds)

    def end(self) -> None:
        """Stop renewing and watching, without ending the process."""
        self._done.set()

    def _renew(self) -> None:
        while not self._done.wait(min(self._lease.seconds / 3, _LONGEST_UNHEARD)):
            asked_at = time.monotonic()
            try:
                self._signals.hear(self._leases.renew(self._lease))
                self._renewed_at = asked_at
                metrics.RENEWALS.labels("renewed").inc()
                metrics.lease_renewed()
            except LeaseLost:
                metrics.RENEWALS.labels("lost").inc()
                # either the run has just released it, or another worker has claimed the search
                if not self._done.is_set():
                    self._signals.lost.set()
                return
            except StoreUnavailable as error:
                metrics.RENEWALS.labels("unavailable").inc()
                _log.warning("lease not renewed: %s", error)
            except Exception:  # if this thread ended, the lease would be lost
                _log.exception("lease not renewed")

    def _watch(self) -> None:
        limit = self._lease.seconds * 2 / 3
        while not self._done.wait(self._lease.seconds / 30):
            away = time.monotonic() - self._renewed_at
            if away > limit and not self._signals.lost.is_set():
                _log.error("lease not renewed for %.1f s: ending this process", away)
                self._kill(WATCHDOG_STATUS)
                return


def hold(
    leases: Leases,
    lease: Lease,
    search: Search,
    signals: Signals,
    work: Callable[[], None],
    kill: Callable[[int], object] | None = None,
) -> None:
    """Do the work of a claimed search while its lease is renewed; what goes wrong ends it or puts
    it back.

    Parameters
    ----------
    kill
        See `Heartbeat`.

    Raises
    ------
    ClusterUnavailable
        The work did; the search is queued again.
    """
    ids = bound(search_id=search.id, epoch=lease.epoch)
    options = {} if kill is None else {"kill": kill}
    with ids, Heartbeat(leases, lease, signals, **options) as heartbeat:
        _log.info("search %s claimed, epoch %d", search.id, lease.epoch)
        metrics.lease_renewed()
        about = {"einsum_nas.search.id": search.id, "einsum_nas.epoch": lease.epoch}
        try:
            # what is done for the search is not within the claim, which is lost with its process
            with tracing.current(leases.span(lease)), tracing.span("claim", about, alone=True):
                work()
        except LeaseLost as error:
            metrics.STALE_WRITES.inc()
            _log.warning("%s", error)
        except ClusterUnavailable:
            _end(search, leases.hand_back, lease)
            raise
        except InvalidInput as error:
            _end(search, leases.release, lease, "failed", str(error), failure="input")
        except Exception as error:
            _log.exception("search %s: infrastructure error", search.id)
            _end(search, leases.requeue, lease, f"{type(error).__name__}: {error}")
        finally:
            heartbeat.end()
            metrics.lease_ended()


def _end(search: Search, write: Callable[P, None], *args: P.args, **named: P.kwargs) -> None:
    """Do the last write to a search; if it fails, another worker takes over after the lease."""
    try:
        write(*args, **named)
    except (LeaseLost, StoreUnavailable) as error:
        _log.warning("search %s left to its lease: %s", search.id, error)


def close(session: SearchSession) -> None:
    """End a search whose runner has returned, or hand it back."""
    if session.signals.lost.is_set():
        raise LeaseLost(f"search {session.search.id}: claimed by another worker")
    session.hand_back() if session.signals.hand_back else session.finish()
