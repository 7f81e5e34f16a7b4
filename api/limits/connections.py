"""Protection against clients that are slow or silent, or open too many connections.

uvicorn parses requests and writes responses.  It waits without end for the rest of a head or body,
and for a client that does not read, and it limits neither heads nor connections.  This module adds
deadlines for all of these, and bounds on what a connection may send and hold.  A long response,
such as an event stream, has no deadline while the client reads it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from api.limits.fair_queue import GONE
from api.limits.rates import network_of
from api.problems import PROBLEM_JSON, RETRY_AFTER_SECONDS

_log = logging.getLogger(__name__)
#: Seconds between log records about connections that were refused or closed.
_TELL_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What one connection, one address and all of them may use of this process."""

    #: open connections, in total and of one address; `nas.settings` limits event streams
    connections: int
    connections_of_one: int
    #: seconds for the head of a request, from the opening of the connection or its first byte
    head_seconds: float = 10.0
    #: seconds for the body of a request, from the end of its head
    body_seconds: float = 20.0
    #: a client has to read `stall_bytes` of a waiting response in so many seconds
    stall_seconds: float = 20.0
    stall_bytes: int = 16 * 1024
    #: size of a connection's send buffer in the system, bytes.  Progress of a slow client is seen
    #: only once a third of it is free, and each connection may occupy all of it
    send_bytes: int = 128 * 1024
    #: seconds that a connection may take to close
    closing_seconds: float = 2.0
    #: seconds between checks of a connection's deadlines
    look_seconds: float = 1.0
    #: bytes of the target in the request line, and of the names and values of all headers
    target_bytes: int = 8 * 1024
    head_bytes: int = 32 * 1024
    headers: int = 100
    #: bytes of a whole request; a refused body is still read up to here, because a client reads
    #: the refusal only after it has sent the body
    request_bytes: int = 1024 * 1024
    #: pipelined requests that wait for the responses to earlier ones of their connection
    waiting: int = 32


class Refused(Exception):
    """A request that is refused, with the status and the detail of the response."""

    def __init__(self, status: HTTPStatus, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail

    def answer(self) -> bytes:
        """The whole response, after which the connection closes."""
        told = {
            "type": "urn:einsum-nas:http", "title": self.status.phrase,
            "status": self.status.value, "detail": self.detail,
        }  # fmt: skip
        body = json.dumps(told).encode()
        later = self.status in (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.TOO_MANY_REQUESTS)
        head = (
            f"HTTP/1.1 {self.status.value} {self.status.phrase}\r\n"
            f"content-type: {PROBLEM_JSON}\r\n"
            f"content-length: {len(body)}\r\n"
            + (f"retry-after: {RETRY_AFTER_SECONDS}\r\n" if later else "")
            + "connection: close\r\n\r\n"
        )
        return head.encode() + body


class Gate:
    """Counts open connections, and logs how many were refused or closed.

    Parameters
    ----------
    trusted
        Tells whether an address is a proxy's, which forwards the connections of many clients.
    """

    def __init__(self, limits: Limits, trusted: Callable[[str], bool]) -> None:
        self.limits, self._trusted = limits, trusted
        self._open = 0
        self._open_of: Counter[str] = Counter()
        self._untold: Counter[str] = Counter()
        self._told_at = -_TELL_SECONDS

    def enter(self, address: str) -> str | None:
        """Count a connection; return the network that it is counted for, to be given to `leave`.

        Raises
        ------
        Refused
            Too many are open; this one is not counted.
        """
        limits = self.limits
        if self._open >= limits.connections:
            raise Refused(
                HTTPStatus.SERVICE_UNAVAILABLE, "too many connections are open; try again later"
            )
        network = None if self._trusted(address) else network_of(address)
        if network is not None:
            if self._open_of[network] >= limits.connections_of_one:
                raise Refused(
                    HTTPStatus.TOO_MANY_REQUESTS,
                    f"this address has {limits.connections_of_one} connections open, the most "
                    "allowed",
                )
            self._open_of[network] += 1
        self._open += 1
        return network

    def leave(self, network: str | None) -> None:
        """Take back what `enter` counted."""
        self._open -= 1
        if network is not None:
            self._open_of[network] -= 1
            if not self._open_of[network]:
                del self._open_of[network]

    def tell(self, what: str) -> None:
        """Count a refused or closed connection; one log record tells of many, to bound the log."""
        self._untold[what] += 1
        now = time.monotonic()
        if now - self._told_at >= _TELL_SECONDS:
            self._told_at = now
            told = ", ".join(f"{n}: {name}" for name, n in self._untold.most_common())
            self._untold.clear()
            _log.warning("connections closed: %s; %d are open", told, self._open)


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
            self._refuse(self._head_too_large())
        elif self._request_bytes > self.limits.request_bytes:
            self._refuse(Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "the request is too large"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._request_bytes = self._header_bytes = 0
        self._expect("head")
        if len(self.pipeline) >= self.limits.waiting:
            raise self._stop(
                Refused(HTTPStatus.TOO_MANY_REQUESTS, "too many requests wait for a response")
            )

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > self.limits.target_bytes:
            most = self.limits.target_bytes
            raise self._stop(
                Refused(HTTPStatus.REQUEST_URI_TOO_LONG, f"the target is longer than {most} bytes")
            )

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._header_bytes += len(name) + len(value)
        limits = self.limits
        if len(self.headers) > limits.headers or self._header_bytes > limits.head_bytes:
            raise self._stop(self._head_too_large())

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
        refusal = self._refusal
        self._refuse(refusal or Refused(HTTPStatus.BAD_REQUEST, "not a valid HTTP/1.1 request"))

    def _unsupported_upgrade_warning(self) -> None:
        """Log nothing: a request to change the protocol is answered in HTTP/1.1."""

    def _expect(self, phase: Literal["request", "head", "body"]) -> None:
        self._phase, self._since = phase, self.loop.time()

    def _stop(self, refusal: Refused) -> Refused:
        """The error that stops the parser."""
        self._refusal = refusal
        return refusal

    def _head_too_large(self) -> Refused:
        limits = self.limits
        return Refused(
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
            f"the head of a request may have at most {limits.headers} headers and "
            f"{limits.head_bytes} bytes",
        )

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
