"""Whether the service is ready, the process that makes it so, and the 503 until then.

Ready means: the database answers, its schema is the one that this program needs, and a write can be
committed.  If the database cannot be reached when the service starts, the service waits for it in
the background.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import time
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

from anyio import CapacityLimiter, to_thread
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from api.declared import declared_of
from api.problems import problem
from nas.errors import EinsumNasError, StoreUnavailable
from nas.settings import Settings
from nas.store import Store, upgrade
from nas.store.gauges import read_database
from nas.store.processes import LIVE_SECONDS, WORD_SECONDS, Processes
from nas.store.troubles import DatabaseTrouble

_log = logging.getLogger(__name__)
#: Seconds for which a report is reused, so that many probes do not burden the database.
KEPT_SECONDS = 2.0
#: Seconds after which a database that does not answer counts as unavailable.
PATIENCE_SECONDS = 5.0
#: Seconds that the start waits for the first attempt to upgrade the schema; then the service
#: listens even if that goes on.
_START_SECONDS = 30.0
#: Seconds between attempts to upgrade the schema of a database that was unavailable at the start.
_RETRY_SECONDS = 2.0
#: Bytes of a test write after a write has failed.  They must not fit into pages that the database
#: has already, so that success shows that there is disk space again.
_SPARE_BYTES = 64 * 1024

PartName = Literal["database", "schema", "writable"]


@dataclass(frozen=True, slots=True)
class Part:
    """The result of one readiness check; its texts reveal no hosts, users or files."""

    status: Literal["ok", "failing", "unknown"]
    finding: str = ""
    advice: str = ""


_UNKNOWN = Part("unknown", "not checked: the database does not answer")


@dataclass(frozen=True, slots=True)
class Report:
    """The results of all readiness checks."""

    database: Part
    schema: Part = _UNKNOWN
    writable: Part = _UNKNOWN
    #: workers seen recently; None if that could not be read
    workers: int | None = None
    #: seconds that a small query took
    round_trip_seconds: float | None = None
    revision: str | None = None
    #: time.monotonic()
    found_at: float = field(default_factory=time.monotonic)

    @property
    def parts(self) -> dict[PartName, Part]:
        """The checks by name; each one depends on those before it."""
        return {"database": self.database, "schema": self.schema, "writable": self.writable}

    @property
    def failing(self) -> PartName | None:
        """The first check that is not ok; None if all are."""
        return next((name for name, part in self.parts.items() if part.status != "ok"), None)


def _failing(error: StoreUnavailable) -> Part:
    _log.debug("%s", error)
    if isinstance(error, DatabaseTrouble):
        return Part("failing", error.finding, error.advice)
    return Part("failing", "it does not answer", "see the log of this service")


def refuse_unusable(settings: Settings) -> None:
    """Refuse to start with a database that waiting cannot make usable.

    A database that only cannot be reached at the moment is not refused.

    Raises
    ------
    InvalidInput
        The URL is not one of a database.
    EinsumNasError
        The file is not a database, or the schema is newer than this program.
    """
    try:
        with closing(Store(settings.resolved_database_url)) as store:
            schema = read_database(store).schema
    except DatabaseTrouble as error:
        if error.kind == "damaged":
            raise EinsumNasError(f"{error}: {error.advice}") from error
    except StoreUnavailable:
        pass
    else:
        if schema.verdict == "newer":
            raise EinsumNasError(
                f"the database is at schema revision {schema.found}, this program at "
                f"{schema.needed}: {schema.advice}"
            )


class Readiness:
    """Upgrades the schema when the service starts, and checks the database from then on.

    Parameters
    ----------
    store
        Used in separate threads, so that requests that hang do not block the checks.
    """

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store, self._settings = store, settings
        self._processes = Processes(store)
        self._name = f"api:{socket.gethostname()}:{os.getpid()}"
        self._limiter = CapacityLimiter(1)
        self._last: Report | None = None
        self._looking: asyncio.Task[Report] | None = None
        self._failing_since: float | None = None
        #: whether a request has just found the database unavailable, and how often that happened
        self._doubted, self._doubts = False, 0
        self._doubted_at = -KEPT_SECONDS
        self._looking_since = 0
        self._background: list[asyncio.Task[None]] = []
        #: whether requests can be served: the schema has been found to be the needed one
        self.opened = False

    async def start(self) -> None:
        """Upgrade the schema, at once or as soon as the database can be reached.

        Raises
        ------
        EinsumNasError
            Waiting cannot help; see `refuse_unusable`.
        """
        try:
            await self._thread(refuse_unusable, self._settings)
        except EinsumNasError as error:
            _log.error("cannot start: %s", error)
            raise
        tried = asyncio.Event()
        self._background = [asyncio.create_task(self._open(tried))]
        with suppress(TimeoutError):
            await asyncio.wait_for(tried.wait(), _START_SECONDS)
        self._background.append(asyncio.create_task(self._watch()))

    async def stop(self) -> None:
        """Stop checking, and remove this service from the table of processes."""
        tasks = [*self._background, *([self._looking] if self._looking else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with suppress(StoreUnavailable, TimeoutError):
            async with asyncio.timeout(_RETRY_SECONDS):
                await self._thread(self._processes.gone, self._name)

    def doubt(self) -> None:
        """Check again, with a larger test write: a request has found the database unavailable."""
        self._doubted, now = True, time.monotonic()
        if now - self._doubted_at >= KEPT_SECONDS:  # many requests may find that at once
            self._doubted_at, self._last = now, None
            self._doubts += 1

    async def report(self) -> Report:
        """A report at most `KEPT_SECONDS` old; failing if none comes within `PATIENCE_SECONDS`."""
        last = self._last
        if last is not None and time.monotonic() - last.found_at < KEPT_SECONDS:
            return last
        # a check that began before the last doubt says nothing about it
        if self._looking is None or self._looking.done() or self._looking_since != self._doubts:
            self._looking_since = self._doubts
            self._looking = asyncio.create_task(self._look())
        try:
            # shielded: the cancellation of one probe must not cancel the check that others wait
            # for.  Not wait_for, which in Python 3.11 loses a cancellation that comes at the end
            async with asyncio.timeout(PATIENCE_SECONDS):
                return await asyncio.shield(self._looking)
        except TimeoutError:
            finding = f"it has not answered for {PATIENCE_SECONDS:.0f} s"
            return self._noted(Report(Part("failing", finding, "check its load and the network")))

    async def _look(self) -> Report:
        doubts = self._doubts
        try:
            found = await self._thread(self._examine)
        except Exception:
            _log.exception("the database cannot be checked")
            found = Report(Part("failing", "it cannot be checked", "see the log of this service"))
        report = self._noted(found)
        if doubts == self._doubts:
            self._last = report
        return report

    async def _thread(self, call: Any, *given: Any) -> Any:
        return await to_thread.run_sync(
            partial(call, *given), limiter=self._limiter, abandon_on_cancel=True
        )

    async def _open(self, tried: asyncio.Event) -> None:
        limiter = CapacityLimiter(1)  # not `self._limiter`: probes must go on during an upgrade
        while not await to_thread.run_sync(self._upgraded, limiter=limiter, abandon_on_cancel=True):
            tried.set()
            await asyncio.sleep(_RETRY_SECONDS)
        tried.set()

    def _upgraded(self) -> bool:
        try:
            upgrade(self._settings.resolved_database_url)
        except Exception as error:
            current = False
            with suppress(StoreUnavailable):  # a full or read-only database can still be read
                current = read_database(self._store).schema.verdict == "current"
            self.opened = current
            if isinstance(error, StoreUnavailable):
                advice = f": {error.advice}" if isinstance(error, DatabaseTrouble) else ""
                _log.error("the schema cannot be upgraded yet: %s%s", error, advice)
            else:
                _log.exception("the schema cannot be upgraded")
            return False
        self.opened = True
        return True

    async def _watch(self) -> None:
        """Check regularly, which also records that this service is alive, and log failures."""
        while True:
            await self.report()
            await asyncio.sleep(WORD_SECONDS)

    def _examine(self) -> Report:
        try:
            facts = read_database(self._store)
        except StoreUnavailable as error:
            return Report(_failing(error))
        schema, writable, workers = Part("ok"), Part("ok"), None
        state = facts.schema
        if not self.opened and state.verdict in ("missing", "older"):
            schema = Part("failing", "it is being upgraded", "wait, and see the log")
        elif state.verdict != "current":
            finding = f"revision {state.found}, and this program needs {state.needed}"
            schema = Part("failing", finding, state.advice)
        if schema.status != "ok":
            writable = Part("unknown", "not checked: the schema is not the needed one")
        else:
            try:
                self._write()
            except StoreUnavailable as error:
                writable = _failing(error)
            with suppress(StoreUnavailable):
                workers = len(self._processes.alive(LIVE_SECONDS, kind="worker"))
        seconds = facts.round_trip_seconds
        return Report(Part("ok"), schema, writable, workers, seconds, state.found)

    def _write(self) -> None:
        doubted, self._doubted = self._doubted, False
        try:
            if doubted:
                spare = secrets.token_urlsafe(_SPARE_BYTES)  # random: it cannot be compressed
                self._processes.seen(self._name, "api", "idle", about={"spare": spare})
            self._processes.seen(self._name, "api", "idle")
        except StoreUnavailable:
            self._doubted = True
            raise

    def _noted(self, report: Report) -> Report:
        """Log a failure, and its end."""
        name, now = report.failing, time.monotonic()
        if name is not None:
            part = report.parts[name]
            self._failing_since = self._failing_since or now
            _log.error("not ready: %s: %s; %s", name, part.finding, part.advice)
        elif self._failing_since is not None:
            _log.warning("ready again after %.0f s", now - self._failing_since)
            self._failing_since = None
        return report


class SchemaGate:
    """Middleware that answers 503 on routes that need the store, until its schema is there."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and declared_of(scope).needs_store:
            readiness: Readiness = scope["app"].state.readiness
            if not readiness.opened:
                await not_ready(await readiness.report())(scope, receive, send)
                return
        await self._app(scope, receive, send)


def not_ready(report: Report) -> JSONResponse:
    """The response that names the failing check, or else the schema, and the results of all."""
    name = report.failing or "schema"
    part = report.parts[name]
    detail = f"{name}: {part.finding or 'it is being prepared'}"
    return problem(
        503, "not-ready", "Not ready", f"{detail}; {part.advice}" if part.advice else detail,
        part=name, parts={n: asdict(p) for n, p in report.parts.items()},
    )  # fmt: skip
