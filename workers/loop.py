"""The worker: claims a search under a lease, runs it, releases it, and claims the next.

Beside it runs the keeper of the searches whose trials clients train; see `workers.asked`.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from functools import partial

from nas import tracing
from nas.errors import ClusterUnavailable, InvalidInput, LeaseLost, StoreUnavailable
from nas.logs import bound
from nas.records.evidence import Evidence
from nas.search import scheduler_of
from nas.search.scheduling import Scheduler
from nas.service.prior import fixed_evidence
from nas.settings import Settings
from nas.store import Lease, Leases, Search, Store, upgrade
from nas.store.quotas import Quotas
from nas.tasks import TaskData, load_data
from nas.tasks.data import LoadingStopped
from workers import metrics
from workers.asked import Keeper
from workers.holding import close, hold
from workers.presence import Presence
from workers.ray.address import cluster_address
from workers.session import SearchSession, Signals
from workers.webhooks import Teller

_log = logging.getLogger(__name__)
Runner = Callable[[SearchSession, TaskData, Settings], None]
Connect = Callable[[Settings], None]
#: Seconds between attempts to join a cluster that is unavailable: at first, and at most.
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 30.0


class Worker:
    """Claims searches and runs them, one at a time, until told to stop.

    Parameters
    ----------
    runner
        Runs the trials of a session; by default on Ray.
    connect
        Called before each claim.  While it raises `ClusterUnavailable`, nothing is claimed, so that
        no search uses up its attempts on an unavailable cluster.
    """

    def __init__(
        self, settings: Settings, *, runner: Runner | None = None, connect: Connect | None = None
    ) -> None:
        self._settings = settings
        self._store = Store(settings.resolved_database_url, quotas=Quotas.of(settings))
        self._leases = Leases(
            self._store,
            max_attempts=settings.max_attempts,
            backoff_seconds=settings.backoff_seconds,
            tenant_concurrency=settings.tenant_concurrency,
        )
        self._runner = runner or _ray_runner
        # a runner of another kind needs no cluster
        self._connect = connect or (_join_cluster if runner is None else lambda _: None)
        self._wait = _FIRST_WAIT
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self._presence = Presence(self._store, self.name, settings)
        self._shutdown = threading.Event()
        self._signals: Signals | None = None

    def stop(self) -> None:
        """End after the trials in flight have been stopped; the search goes back to the queue."""
        self._shutdown.set()
        self._presence.tell("draining")
        if self._signals is not None:
            self._signals.shutdown.set()

    def run(self, *, until_idle: bool = False, search_id: str | None = None) -> None:
        """Work until `stop`.

        Parameters
        ----------
        until_idle
            Return when no search can be claimed.
        search_id
            Take this search only, and return when it has ended.
        """
        with bound(worker=self.name):
            self._await_schema()
        keeper = Keeper(self._settings, self._store, self.name, search_id)
        with bound(worker=self.name), self._presence, keeper, Teller(self._store):
            while not self._shutdown.is_set():
                if not self._connected():
                    continue
                self._presence.tell("idle")
                claimed, ended = self._claim(search_id)
                if claimed is not None:
                    self._presence.tell("busy", claimed[0].search_id)
                    self._work(*claimed)
                elif until_idle or ended:
                    return
                else:
                    self._shutdown.wait(self._settings.poll_seconds)

    def _await_schema(self) -> None:
        """Upgrade the database's schema, as soon as the database can be reached."""
        while not self._shutdown.is_set():
            try:
                upgrade(self._settings.resolved_database_url)
                return
            except StoreUnavailable as error:
                _log.warning("waiting for the database: %s", error)
                self._rest()

    def _claim(self, search_id: str | None) -> tuple[tuple[Lease, Search] | None, bool]:
        """(the claim if any, whether the requested search `search_id` has ended)."""
        ended = False
        seconds = self._settings.lease_seconds
        try:
            claimed = self._leases.claim(self.name, seconds, search_id=search_id)
            if claimed is None and search_id is not None:
                ended = self._store.search(search_id).finished_at is not None
        except StoreUnavailable as error:
            metrics.CLAIMS.labels("unavailable").inc()
            _log.warning("no claim: %s", error)
            return None, False
        metrics.CLAIMS.labels("nothing" if claimed is None else "claimed").inc()
        return claimed, ended

    def _connected(self) -> bool:
        """Whether there is a cluster to run trials on; waits a while if there is none."""
        try:
            self._connect(self._settings)
        except ClusterUnavailable as error:
            _log.warning("nothing is claimed: %s", error)
            self._await_cluster(str(error))
            return False
        return True

    def _await_cluster(self, reason: str) -> None:
        self._presence.tell("waiting", reason=reason[:500])
        self._rest()

    def _rest(self) -> None:
        """Wait for what is unavailable, twice as long each time in a row."""
        self._shutdown.wait(self._wait)
        self._wait = min(self._wait * 2, _LONGEST_WAIT)

    def _work(self, lease: Lease, search: Search) -> None:
        signals = Signals()
        self._signals = signals
        if self._shutdown.is_set():
            signals.shutdown.set()
        waits_for: str | None = None
        try:
            work = partial(self._run_search, lease, search, signals)
            hold(self._leases, lease, search, signals, work)
        except ClusterUnavailable as error:
            waits_for = str(error)
            _log.warning("search %s waits for its cluster: %s", search.id, error)
        finally:
            self._signals = None
        if waits_for is not None:
            self._await_cluster(waits_for)

    def _run_search(self, lease: Lease, search: Search, signals: Signals) -> None:
        wanted, name = search.request, search.request.data
        try:
            with tracing.span("load data", {"einsum_nas.search.id": search.id}):
                data = load_data(
                    wanted.settings, search.data_path,
                    shown=name, root=search.data_root, stop=lambda: signals.stop,
                )  # fmt: skip
        except LoadingStopped as stopped:
            self._end_unloaded(lease, search, signals, str(stopped))
            return
        wanted.check_budget(data.recipe)
        _log.info("search %s: %s", search.id, data.summary)
        stored = self._leases.set_fingerprint(lease, data.fingerprint)
        if stored != data.fingerprint:
            raise InvalidInput(
                "data",
                name or f"the default data of task {search.task}",
                f"the data this search began with, fingerprint {stored}; found {data.fingerprint}",
            )
        session = SearchSession(
            self._store, lease, search, data.recipe, data.fingerprint, signals,
            leases=self._leases, scheduler=self._scheduler(lease, search, data),
        )  # fmt: skip
        with session.spans.ending():
            self._runner(session, data, self._settings)
        self._wait = _FIRST_WAIT
        close(session)

    def _end_unloaded(self, lease: Lease, search: Search, signals: Signals, why: str) -> None:
        """Give up a search that was to stop while its data was loaded."""
        if signals.lost.is_set():
            raise LeaseLost(f"search {search.id}: claimed by another worker")
        if signals.cancel.is_set():
            self._leases.release(lease, "cancelled")
        elif signals.overtime.is_set():
            self._leases.release(lease, "failed", why, failure="limit", limit_reached="seconds")
        else:
            self._leases.hand_back(lease)

    def _scheduler(self, lease: Lease, search: Search, data: TaskData) -> Scheduler | None:
        """What decides the rounds of a search, if it has any; it knows what was measured before."""
        evidence: tuple[Evidence, ...] = ()
        if search.request.stopping_rule == "frontier":
            evidence = fixed_evidence(
                self._store, self._leases, lease, search, data.recipe, data.fingerprint
            )
        return scheduler_of(search.request, data.recipe, evidence)


def _join_cluster(settings: Settings) -> None:
    """Join the cluster of `RAY_ADDRESS`; a local one is started when there is work."""
    if cluster_address() is not None:
        from workers.ray import cluster  # ray takes seconds to import

        cluster.connect(settings)
        cluster.trial_capacity(cluster.trial_resources(settings))


def _ray_runner(session: SearchSession, data: TaskData, settings: Settings) -> None:
    from workers.ray import cluster, runner

    try:
        cluster.connect(settings)
        runner.run_session(session, data, settings)
    except LeaseLost:
        raise
    except Exception:
        cluster.disconnect()  # its state is unknown: the next search connects again
        raise


def main(settings: Settings, *, until_idle: bool = False, search_id: str | None = None) -> None:
    """Run a worker in this process; SIGTERM, SIGINT or SIGHUP make it hand its search back."""
    worker = Worker(settings)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: worker.stop())
    if settings.metrics_port is not None:
        metrics.serve(settings.metrics_port, settings.host)
    tracing.start()
    try:
        worker.run(until_idle=until_idle, search_id=search_id)
    finally:
        tracing.stop()
