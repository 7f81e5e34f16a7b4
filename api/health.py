"""Whether this service can do its work: what probes are told, and why it cannot.

Ready means: the database answers, its schema is this program's, and it takes a committed write.
A database that is away when the service starts is waited for in the background.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from api.problems import RETRY_AFTER_SECONDS, problem, responses
from nas.errors import EinsumNasError, StoreUnavailable
from nas.settings import Settings
from nas.store import Store, upgrade
from nas.store.gauges import read_database
from nas.store.processes import LIVE_SECONDS, WORD_SECONDS, Processes
from nas.store.troubles import DatabaseTrouble

_log = logging.getLogger(__name__)
health = APIRouter()
#: Seconds that an examination holds: probes share it, so that they do not hammer the database.
KEPT_SECONDS = 2.0
#: Seconds after which a database that says nothing counts as away.
PATIENCE_SECONDS = 5.0
#: Seconds that the start waits for the first attempt at the schema before it listens all the same.
_START_SECONDS = 30.0
#: Seconds between attempts at a database that was away at the start.
_RETRY_SECONDS = 2.0
#: Bytes of the write that shows, after one has failed, that there is space again: a row that is
#: only renewed fits into a page that is there already.
_SPARE_BYTES = 64 * 1024
#: Asked every few seconds by whatever supervises the service.
PROBES = ("/healthz", "/readyz", "/metrics")
#: Answered whatever the state of the database.
_ALWAYS = (*PROBES, "/static/")

PartName = Literal["database", "schema", "writable"]


@dataclass(frozen=True, slots=True)
class Part:
    """One part of readiness; texts name neither hosts nor users nor files."""

    status: Literal["ok", "failing", "unknown"]
    finding: str = ""
    advice: str = ""


_UNKNOWN = Part("unknown", "not looked at: the database does not answer")


@dataclass(frozen=True, slots=True)
class Report:
    """What an examination found."""

    database: Part
    schema: Part = _UNKNOWN
    writable: Part = _UNKNOWN
    #: workers that were heard of lately; None where that could not be read
    workers: int | None = None
    #: seconds of one small query
    round_trip_seconds: float | None = None
    revision: str | None = None
    #: time.monotonic()
    found_at: float = field(default_factory=time.monotonic)

    @property
    def parts(self) -> dict[PartName, Part]:
        """By name, the one that the others need first."""
        return {"database": self.database, "schema": self.schema, "writable": self.writable}

    @property
    def failing(self) -> PartName | None:
        """The first part that is not well."""
        return next((name for name, part in self.parts.items() if part.status != "ok"), None)


def _failing(error: StoreUnavailable) -> Part:
    if isinstance(error, DatabaseTrouble):
        return Part("failing", error.finding, error.advice)
    return Part("failing", "it does not answer", "see the log of this service")


def refuse_unusable(settings: Settings) -> None:
    """Raise where waiting cannot help; a database that is only away is no error.

    Raises
    ------
    InvalidInput
        A URL that names no database.
    EinsumNasError
        A file that is no database, or a schema newer than this program.
    """
    store = Store(settings.resolved_database_url)
    try:
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
    finally:
        store.close()


class Readiness:
    """Brings the schema up to date when the service starts, and examines the database.

    Parameters
    ----------
    store
        Used from threads of its own, so that requests that hang do not keep it from its work.
    """

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store, self._settings = store, settings
        self._processes = Processes(store)
        self._name = f"api:{socket.gethostname()}:{os.getpid()}"
        self._limiter = CapacityLimiter(1)
        self._last: Report | None = None
        self._looking: asyncio.Task[Report] | None = None
        self._failing_since: float | None = None
        #: whether a request has just met a database that does not take or give what it should,
        #: and how often that has been
        self._doubted, self._doubts = False, 0
        self._doubted_at = -KEPT_SECONDS
        self._looking_since = 0
        self._background: list[asyncio.Task[None]] = []
        #: whether requests can be let through: the schema has been seen to be this program's
        self.opened = False

    async def start(self) -> None:
        """Bring the schema up to date, at once or, where the database is away, once it is back.

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
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(tried.wait(), _START_SECONDS)
        self._background.append(asyncio.create_task(self._watch()))

    async def stop(self) -> None:
        """Leave the register of processes."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        with contextlib.suppress(StoreUnavailable, TimeoutError):
            async with asyncio.timeout(_RETRY_SECONDS):
                await self._thread(self._processes.gone, self._name)

    def doubt(self) -> None:
        """A request met a database that is unavailable: examine it anew, and more thoroughly."""
        self._doubted, now = True, time.monotonic()
        if now - self._doubted_at >= KEPT_SECONDS:  # many requests may meet it at once
            self._doubted_at, self._last = now, None
            self._doubts += 1

    async def report(self) -> Report:
        """What was found at most `KEPT_SECONDS` ago, or is found now, within the patience."""
        last = self._last
        if last is not None and time.monotonic() - last.found_at < KEPT_SECONDS:
            return last
        # a look that began before the doubt does not remove it
        if self._looking is None or self._looking.done() or self._looking_since != self._doubts:
            self._looking_since = self._doubts
            self._looking = asyncio.create_task(self._look())
        try:
            # one probe that goes away must not take the others' look along; and not wait_for,
            # which in Python 3.11 forgets that it was cancelled where the look ends just then
            async with asyncio.timeout(PATIENCE_SECONDS):
                return await asyncio.shield(self._looking)
        except TimeoutError:
            return self._noted(
                Report(
                    Part(
                        "failing",
                        f"it has said nothing for {PATIENCE_SECONDS:.0f} s",
                        "look at the load on it and at the network",
                    )
                )
            )

    async def _look(self) -> Report:
        doubts = self._doubts
        try:
            found = await self._thread(self._examine)
        except Exception:
            _log.exception("the database cannot be examined")
            found = Report(Part("failing", "it cannot be examined", "see the log of this service"))
        report = self._noted(found)
        if doubts == self._doubts:
            self._last = report
        return report

    async def _thread(self, call: Any, *given: Any) -> Any:
        return await to_thread.run_sync(
            partial(call, *given), limiter=self._limiter, abandon_on_cancel=True
        )

    async def _open(self, tried: asyncio.Event) -> None:
        limiter = CapacityLimiter(1)  # an upgrade takes its time, and probes go on meanwhile
        while not await to_thread.run_sync(self._upgraded, limiter=limiter, abandon_on_cancel=True):
            tried.set()
            await asyncio.sleep(_RETRY_SECONDS)
        tried.set()

    def _upgraded(self) -> bool:
        try:
            upgrade(self._settings.resolved_database_url)
        except Exception as error:
            self.opened = self._current()  # a database that is full or read-only can be read
            if isinstance(error, StoreUnavailable):
                advice = f": {error.advice}" if isinstance(error, DatabaseTrouble) else ""
                _log.error("the schema cannot be brought up to date yet: %s%s", error, advice)
            else:
                _log.exception("the schema cannot be brought up to date")
            return False
        self.opened = True
        return True

    def _current(self) -> bool:
        try:
            return read_database(self._store).schema.verdict == "current"
        except StoreUnavailable:
            return False

    async def _watch(self) -> None:
        """Say now and then that this service lives, and log when that no longer goes well."""
        while True:
            await self.report()
            await asyncio.sleep(WORD_SECONDS)

    def _examine(self) -> Report:
        try:
            facts = read_database(self._store)
        except StoreUnavailable as error:
            _log.debug("%s", error)
            return Report(_failing(error))
        database = Part("ok")
        schema, writable, workers = Part("ok"), Part("ok"), None
        state = facts.schema
        if not self.opened and state.verdict in ("missing", "older"):
            schema = Part("failing", "it is being brought up to date", "wait, and see the log")
        elif state.verdict != "current":
            finding = f"revision {state.found}, and this program needs {state.needed}"
            schema = Part("failing", finding, state.advice)
        if schema.status == "ok":
            try:
                self._write()
            except StoreUnavailable as error:
                _log.debug("%s", error)
                writable = _failing(error)
            with contextlib.suppress(StoreUnavailable):
                workers = len(self._processes.alive(LIVE_SECONDS, kind="worker"))
        else:
            writable = Part("unknown", "not tried: the schema is not this program's")
        return Report(
            database, schema, writable, workers, facts.round_trip_seconds, state.found
        )  # fmt: skip

    def _write(self) -> None:
        doubted, self._doubted = self._doubted, False
        try:
            if doubted:
                spare = secrets.token_urlsafe(_SPARE_BYTES)  # it cannot be packed
                self._processes.seen(self._name, "api", "idle", about={"spare": spare})
            self._processes.seen(self._name, "api", "idle")
        except StoreUnavailable:
            self._doubted = True
            raise

    def _noted(self, report: Report) -> Report:
        """Log what is wrong, and that it is over."""
        name, now = report.failing, time.monotonic()
        if name is not None:
            part = report.parts[name]
            self._failing_since = self._failing_since or now
            _log.error("not ready: %s: %s; %s", name, part.finding, part.advice)
        elif self._failing_since is not None:
            _log.warning("ready again after %.0f s", now - self._failing_since)
            self._failing_since = None
        return report


class Gate:
    """Answers 503 to everything but probes until the schema has been seen to be right."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(_ALWAYS):
            await self._app(scope, receive, send)
            return
        readiness: Readiness = scope["app"].state.readiness
        if readiness.opened:
            await self._app(scope, receive, send)
            return
        report = await readiness.report()
        await _not_ready(report, report.failing or "schema")(scope, receive, send)


def _not_ready(report: Report, name: PartName) -> JSONResponse:
    part = report.parts[name]
    detail = f"{name}: {part.finding or 'it is being prepared'}"
    return problem(
        503, "not-ready", "Not ready", f"{detail}; {part.advice}" if part.advice else detail,
        headers={"Retry-After": str(RETRY_AFTER_SECONDS)}, part=name,
        parts={n: asdict(p) for n, p in report.parts.items()},
    )  # fmt: skip


@health.get("/healthz", summary="The process answers")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}


@health.get(
    "/readyz",
    responses=responses(503),
    summary="The database answers, its schema is this program's, and it takes writes",
)
async def readyz(request: Request) -> Response:
    readiness: Readiness = request.app.state.readiness
    report = await readiness.report()
    if report.failing is not None:
        return _not_ready(report, report.failing)
    round_trip = report.round_trip_seconds or 0.0
    return JSONResponse(
        {
            "status": "ready",
            "database": {"status": "ok", "round_trip_ms": round(1e3 * round_trip, 3)},
            "schema": {"status": "ok", "revision": report.revision},
            "writable": {"status": "ok"},
            "workers": report.workers,
        }
    )
