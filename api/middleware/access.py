"""Access log, request ids on all log records of a request, and a handler of unexpected errors."""

from __future__ import annotations

import logging
import re
import time

from asgi_correlation_id import correlation_id
from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.declared import declared_of
from api.middleware.prefix import path_of
from api.problems import route_of, unexpected
from nas.errors import echo
from nas.logs import bound

_log = logging.getLogger(__name__)
#: Most characters of a query that a log record repeats.
_LONGEST_QUERY = 100
_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


def usable_id(given: str) -> bool:
    """Whether a client's request id is accepted: at most 128 letters, digits and ``. _ : -``."""
    return _REQUEST_ID.fullmatch(given) is not None


class AccessLog:
    """Logs requests, and answers 500 for errors that nothing else has handled."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status: int | None = None
        started = time.perf_counter()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
            await send(message)

        with bound(request_id=correlation_id.get()):
            try:
                await self._app(scope, receive, noting)
            except Exception as error:
                if status is not None:
                    raise  # a stream broke off: the server closes the connection
                # here, not in the framework's outermost layer, so that the response has its id
                await unexpected(Request(scope), error)(scope, receive, noting)
            finally:
                _write(scope, status, 1e3 * (time.perf_counter() - started))


def _write(scope: Scope, status: int | None, milliseconds: float) -> None:
    # the audit log records floods, which must not fill the disk through this log
    quiet = declared_of(scope).probe or status == 429
    level = logging.DEBUG if quiet else logging.INFO
    if not _log.isEnabledFor(level):
        return
    route = route_of(scope)
    query = scope.get("query_string", b"").decode("latin-1")
    told = {
        "method": echo(scope["method"]), "route": route, "path": echo(path_of(scope)),
        "query": echo(query[:_LONGEST_QUERY] + ("…" if len(query) > _LONGEST_QUERY else "")),
        "status": status, "milliseconds": round(milliseconds, 3),
    }  # fmt: skip
    shown = "gone" if status is None else status
    _log.log(level, "%s %s %s in %.1f ms", told["method"], route, shown, milliseconds, extra=told)
