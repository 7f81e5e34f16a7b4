"""Reports a worker's state to the store, so that users see it, and deletes old data regularly."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from nas.errors import StoreUnavailable
from nas.logs import bound
from nas.settings import Settings
from nas.store import Store
from nas.store.processes import WORD_SECONDS, Processes, ProcessState
from nas.store.retention import prune

_log = logging.getLogger(__name__)
#: Seconds between two rounds of tidying up, and before the first: a worker that is started for
#: one search has no time for it.
_TIDY_SECONDS = 3600.0
_FIRST_TIDY_SECONDS = 300.0
#: Seconds after which a process that was not heard of is struck out.
_FORGOTTEN_SECONDS = 7 * 86_400.0


class Presence:
    """A thread that keeps the worker's entry in the table of processes up to date.

    It is separate from the work, so that a database that hangs does not delay the work.
    """

    def __init__(self, store: Store, name: str, settings: Settings) -> None:
        self._store, self._name, self._settings = store, name, settings
        self._processes = Processes(store)
        self._told: tuple[ProcessState, str | None, dict[str, Any]] = ("idle", None, {})
        self._changed, self._done = threading.Event(), threading.Event()
        self._tidied = time.monotonic() - _TIDY_SECONDS + _FIRST_TIDY_SECONDS
        self._thread = threading.Thread(target=self._keep, name="presence", daemon=True)

    def __enter__(self) -> Presence:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._changed.set()
        self._thread.join(5.0)

    def tell(self, state: ProcessState, search_id: str | None = None, **about: Any) -> None:
        """What the worker does from now on."""
        told = (state, search_id, about)
        if told != self._told:
            self._told = told
            self._changed.set()

    def _keep(self) -> None:
        with bound(worker=self._name):
            while not self._done.is_set():
                self._changed.clear()
                self._write()
                self._changed.wait(WORD_SECONDS)
            try:
                self._processes.gone(self._name)
            except StoreUnavailable as error:
                _log.warning("the register still lists this worker: %s", error)

    def _write(self) -> None:
        state, search_id, about = self._told
        try:
            self._processes.seen(self._name, "worker", state, search_id=search_id, about=about)
            if time.monotonic() - self._tidied > _TIDY_SECONDS:
                self._tidied = time.monotonic()
                self._tidy()
        except StoreUnavailable as error:
            _log.warning("not entered in the register: %s", error)
        except Exception:  # a thread that dies in silence would make the worker look dead
            _log.exception("not entered in the register")

    def _tidy(self) -> None:
        used = self._settings
        deleted = prune(
            self._store, event_days=used.event_days, failed_days=used.failed_days,
            audit_days=used.audit_days, weights_days=used.weights_days,
        )  # fmt: skip
        self._processes.forget(_FORGOTTEN_SECONDS)
        _log.info("tidied up: %s", deleted)
