"""Searches whose trials clients train: this process proposes, offers, and takes over results.

Such a search occupies no worker: a thread of its own holds its lease.  What clients are told and
tell goes through the store (`nas.store.offers`), so that they need this process only for the next
proposal, and a search goes on wherever its lease is claimed next.
"""

from __future__ import annotations

import logging
import threading
from functools import partial
from types import TracebackType

from nas.errors import EinsumNasError, StoreUnavailable
from nas.logs import bound, carried
from nas.planning.recipe import Recipe
from nas.planning.tasks import usable_tasks
from nas.records.trial import StoredPoint
from nas.settings import Settings
from nas.store import Lease, Leases, Search, Store
from nas.store.offers import Offers
from nas.store.progress import read_points
from nas.tasks.data import task_fingerprint
from workers.holding import close, hold
from workers.session import SearchSession, Signals

_log = logging.getLogger(__name__)
#: Seconds between looks for what clients have told.
_LOOK_SECONDS = 0.2
#: Trials that are offered before anybody asks for them; more would be proposed knowing less.
_AHEAD = 1
#: Searches that one process keeps at most; others wait for another one, or for the end of these.
_MOST_KEPT = 32


def client_fingerprint(recipe: Recipe, data: str | None) -> str:
    """Fingerprint of a task that clients train: of the data they name its name alone is known."""
    return task_fingerprint(recipe, f"of clients: {data or ''}")


class Keeper:
    """Claims the searches whose trials clients train, and keeps each in a thread.

    Parameters
    ----------
    name
        Of the worker, shown to users.
    search_id
        Keep this search only.
    """

    def __init__(
        self, settings: Settings, store: Store, name: str, search_id: str | None = None
    ) -> None:
        self._settings, self._name, self._search_id = settings, name, search_id
        # connections of its own: what it waits for must not keep a worker from renewing its lease
        store = self._store = Store(settings.resolved_database_url, tenant=store.tenant)
        self._leases = Leases(
            store, max_attempts=settings.max_attempts, backoff_seconds=settings.backoff_seconds
        )
        self._done = threading.Event()
        self._thread = threading.Thread(target=carried(self._claim), name="keeper", daemon=True)
        self._kept: dict[threading.Thread, Signals] = {}

    def __enter__(self) -> Keeper:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        """Hand every search back."""
        self._done.set()
        self._thread.join(self._settings.lease_seconds)
        for signals in list(self._kept.values()):
            signals.shutdown.set()
        for thread in list(self._kept):
            thread.join(self._settings.lease_seconds)
        self._store.close()

    def _claim(self) -> None:
        claim = partial(
            self._leases.claim, self._name, self._settings.lease_seconds,
            search_id=self._search_id, trainer="client",
        )  # fmt: skip
        while not self._done.is_set():
            claimed = None
            try:
                if len(self._kept) < _MOST_KEPT:
                    claimed = claim(tasks=usable_tasks())
            except StoreUnavailable as error:
                _log.warning("no claim of what clients train: %s", error)
            except Exception:  # without this thread no client would get a trial
                _log.exception("no claim of what clients train")
            if claimed is None:
                self._done.wait(self._settings.poll_seconds)
                continue
            signals = Signals()
            keep = carried(partial(self._keep, *claimed, signals))
            thread = threading.Thread(target=keep, name=f"keeper of {claimed[1].id}", daemon=True)
            self._kept[thread] = signals
            thread.start()

    def _keep(self, lease: Lease, search: Search, signals: Signals) -> None:
        def lose(_: int) -> None:
            signals.lost.set()  # clients' processes go on: this one may be theirs

        try:
            with bound(worker=self._name):
                work = partial(self._run, lease, search, signals)
                hold(self._leases, lease, search, signals, work, kill=lose)
        finally:
            self._kept.pop(threading.current_thread(), None)

    def _run(self, lease: Lease, search: Search, signals: Signals) -> None:
        recipe = search.request.settings
        fingerprint = client_fingerprint(recipe, search.request.data)
        stored = self._leases.set_fingerprint(lease, fingerprint)
        if stored != fingerprint:  # another process may have the version that it began with
            raise EinsumNasError(f"task {search.task} is another version here than it began with")
        session = SearchSession(
            self._store, lease, search, recipe, stored, signals, leases=self._leases
        )
        with session.spans.ending():
            AskedRuns(session, self._store, self._settings.max_attempts).run()
        close(session)


class AskedRuns:
    """The trials of one session, as far as clients have come with them.

    Parameters
    ----------
    attempts
        Leases on a trial that may run out before it is given up.
    """

    def __init__(self, session: SearchSession, store: Store, attempts: int) -> None:
        self._session, self._store, self._attempts = session, store, attempts
        self._offers = Offers(store)
        #: retries while the database is unavailable
        self._sql = session._sql
        self._done = threading.Event()

    def run(self) -> None:
        """Until the session is exhausted or is to stop."""
        session, search_id = self._session, self._session.search.id
        held = set(self._sql(self._offers.news, search_id).held)
        stored = self._sql(read_points, self._store, search_id)
        session.adopted = {i: stored.get(i, {}) for i in held}
        session.prepare()
        left = held & session.due
        while not session.exhausted:
            news = self._sql(self._offers.news, search_id)
            free = sum(holder is None for holder in news.held.values())
            while (free < _AHEAD or left) and (pack := session.next_pack()) is not None:
                for trial in pack.trials:
                    self._sql(self._offers.open, search_id, trial.id)
                    free += trial.id not in left
                    left.discard(trial.id)
            if not session.signals.stop:
                self._take_over()
            self._done.wait(_LOOK_SECONDS)

    def _take_over(self) -> None:
        """Store what clients have told, and end or repeat the trials that they have left."""
        session = self._session
        news = self._sql(self._offers.news, session.search.id)
        running = set(session.running)
        points = [(i, self._counted(i, p)) for i, p in news.points if i in running]
        if points:
            session.points(points)
            self._sql(self._offers.taken, points)
        for trial_id, error in news.ended.items():
            if trial_id in running:
                self._end(trial_id, news.held[trial_id], error)
            if trial_id not in session.due:
                self._sql(self._offers.settle, trial_id)
        for trial_id in news.lost:
            if trial_id in running and self._sql(self._offers.withdraw, trial_id):
                self._repeat(trial_id, news.held[trial_id])

    def _counted(self, trial_id: int, point: StoredPoint) -> StoredPoint:
        flops = float(point.step * self._session.running[trial_id].train_flops_per_step)
        return StoredPoint(
            point.step, flops, point.loss, point.loss_stderr, point.train_seconds,
            point.window_losses,
        )  # fmt: skip

    def _end(self, trial_id: int, holder: str | None, error: str | None) -> None:
        if error is None:
            self._session.complete(trial_id, {"trainer": "client", "holder": holder})
        else:
            self._session.fail(trial_id, error)

    def _repeat(self, trial_id: int, holder: str | None) -> None:
        """Offer a trial anew whose holder is gone."""
        attempts = self._sql(self._store.trial, trial_id).attempts
        if attempts >= self._attempts:
            why = f"{attempts} leases on it ran out, the last one that of {holder}"
            self._session.fail(trial_id, why, "process")
            return
        _log.warning(
            "trial %d: the lease of %s has run out, attempt %d", trial_id, holder, attempts
        )
        self._session.restart(trial_id)
        self._sql(self._offers.open, self._session.search.id, trial_id)
