"""All that this service uses of uvicorn beyond its documented interface.

Another release of uvicorn may change, without notice: the class of its protocol, whose callbacks,
queue of requests and flow control `GuardedProtocol` extends; and the hosts of its proxy middleware.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from typing import Any, Literal, cast

from starlette.types import ASGIApp
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from api.limits.connections import Gate, Refused
from api.limits.fair_queue import GONE


def believing(app: ASGIApp, proxies: list[str]) -> tuple[ASGIApp, Callable[[str], bool]]:
    """The application with what proxies tell of a request, and whether an address is a proxy's."""
    found = ProxyHeadersMiddleware(app, proxies)  # type: ignore[arg-type]
    return cast(ASGIApp, found), found.trusted_hosts.__contains__


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with deadlines and bounds."""

    gate: Gate

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limits = self.gate.limits
        self._entered = False
        self._network: str | None = None
        self._timer: asyncio.TimerHandle | None = None
        #: what the client has to send next (None: nothing), and since when
        self._phase: Literal["request", "head", "body"] | None = "request"
        self._since = self.loop.time()
        #: requests whose answer is not complete, in order
        self._open: deque[RequestResponseCycle] = deque()
        #: bytes of the request that is being read, and of its headers
        self._request_bytes = self._header_bytes = 0
        #: the reason for which the parser was stopped
        self._refusal: Refused | None = None
        #: (since when, bytes) of a response that waits to be read while nothing is added to it
        self._unread: tuple[float, int] | None = None
        self._closing_since: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        try:
            self._network = self.gate.enter(self.client[0] if self.client else "")
        except Refused as refusal:
            self.gate.tell("too many")
            self._closing_since = self.loop.time()
            # close at once: a connection over the bound must not use even the time of a clean close
            transport.write(refusal.answer())
            transport.close()
        else:
            self._entered = True
            with suppress(OSError):  # the client may have disconnected already
                plain = transport.get_extra_info("socket")
                plain.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.limits.send_bytes)
        self._timer = self.loop.call_later(self.limits.look_seconds, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._entered:
            self._entered = False
            self.gate.leave(self._network)
        self._unset_keepalive_if_required()
        self._abandon()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._closing_since is not None:
            return
        if self._phase is None and not self._unanswered:
            self._expect("request")  # empty lines count, too, although they belong to no request
        self._request_bytes += len(data)
        super().data_received(data)
        if self._phase in ("request", "head") and self._request_bytes > self.limits.head_bytes:
            self._refuse(Refused(*self._head_too_large()))
        elif self._request_bytes > self.limits.request_bytes:
            self._refuse(Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "the request is too large"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._request_bytes = self._header_bytes = 0
        self._expect("head")
        if len(self.pipeline) >= self.limits.waiting:
            raise self._stop(HTTPStatus.TOO_MANY_REQUESTS, "too many requests wait for a response")

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        most = self.limits.target_bytes
        if len(self.url) > most:
            why = f"the target is longer than {most} bytes"
            raise self._stop(HTTPStatus.REQUEST_URI_TOO_LONG, why)

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._header_bytes += len(name) + len(value)
        limits = self.limits
        if len(self.headers) > limits.headers or self._header_bytes > limits.head_bytes:
            raise self._stop(*self._head_too_large())

    def on_headers_complete(self) -> None:
        self._expect("body")
        self._unread = None  # a new request shows that the client reads responses
        super().on_headers_complete()
        cycle = self.cycle
        self._open.append(cycle)
        scope: Any = cycle.scope  # the application gets it later, in another task
        scope["extensions"] = {GONE: lambda: cycle.disconnected}

    def on_message_complete(self) -> None:
        self._phase = None
        self._request_bytes = 0
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = None

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread = None

    def send_400_response(self, msg: str) -> None:
        """Answer with the reason for which the parser was stopped."""
        invalid = Refused(HTTPStatus.BAD_REQUEST, "not a valid HTTP/1.1 request")
        self._refuse(self._refusal or invalid)

    def _unsupported_upgrade_warning(self) -> None:
        """Log nothing: a request to change the protocol is answered in HTTP/1.1."""

    def _expect(self, phase: Literal["request", "head", "body"]) -> None:
        self._phase, self._since = phase, self.loop.time()

    def _stop(self, status: HTTPStatus, why: str) -> Refused:
        """The error that stops the parser."""
        self._refusal = Refused(status, why)
        return self._refusal

    def _head_too_large(self) -> tuple[HTTPStatus, str]:
        most = f"{self.limits.headers} headers and {self.limits.head_bytes} bytes"
        why = f"the head of a request may have at most {most}"
        return HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, why

    @property
    def _unanswered(self) -> deque[RequestResponseCycle]:
        """Requests whose response is not complete, in order."""
        while self._open and self._open[0].response_complete:
            self._open.popleft()
        return self._open

    def _refuse(self, refusal: Refused) -> None:
        """Answer, unless another response has to come first or has begun, and close."""
        if self._closing_since is not None or self.transport.is_closing():
            return
        self.gate.tell(refusal.status.phrase.lower())
        unanswered = self._unanswered
        if self._phase == "body":
            own = unanswered and unanswered[0] is self.cycle and not self.cycle.response_started
        else:
            own = not unanswered
        if own:
            self.transport.write(refusal.answer())
        self._close()

    def _close(self) -> None:
        """Close for writing, and read on for a moment.

        Closing with unread input would send a reset, which may overtake the response.
        """
        self._unset_keepalive_if_required()
        self._closing_since = self.loop.time()
        self._abandon()
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()

    def _abandon(self) -> None:
        """Tell every request of this connection, not only the newest, that its client is gone."""
        self.pipeline.clear()
        for cycle in self._unanswered:
            cycle.disconnected = True
            cycle.message_event.set()
        self._open.clear()
        self.flow.resume_writing()

    def _look(self) -> None:
        """Close the connection if it has missed a deadline."""
        now = self.loop.time()
        limits = self.limits
        self._timer = self.loop.call_later(limits.look_seconds, self._look)
        if self._closing_since is not None:
            if now - self._closing_since > limits.closing_seconds:
                self.transport.abort()
        elif self._is_stalled(now):
            self.gate.tell("its answer is not read")
            self.transport.abort()
        elif self._phase == "body":
            if now - self._since > limits.body_seconds:
                self._expire("body", limits.body_seconds)
        elif self._phase is not None:
            if self._unanswered:
                self._since = now  # a client that waits for a response need not send a request
            elif now - self._since > limits.head_seconds:
                self._expire("head", limits.head_seconds)

    def _is_stalled(self, now: float) -> bool:
        """Whether the client reads (almost) nothing of the response that waits for it."""
        size = self.transport.get_write_buffer_size()
        complete = not self._unanswered or self.transport.is_closing()
        if not size or not (complete or self.flow.write_paused):
            self._unread = None  # all is read, or the buffer has room and the response still grows
            return False
        if self._unread is None:
            self._unread = now, size
        since, before = self._unread
        if now - since <= self.limits.stall_seconds:
            return False
        self._unread = now, size
        return before - size < min(self.limits.stall_bytes, before)

    def _expire(self, part: str, seconds: float) -> None:
        if self._phase == "request":
            self.gate.tell("nothing asked")
            self._close()
        else:
            why = f"the {part} of the request was not complete after {seconds:g} s"
            self._refuse(Refused(HTTPStatus.REQUEST_TIMEOUT, why))


def guarded(gate: Gate) -> type[asyncio.Protocol]:
    """The protocol of the connections that a gate counts, for uvicorn."""
    return cast("type[asyncio.Protocol]", type("Guarded", (GuardedProtocol,), {"gate": gate}))
