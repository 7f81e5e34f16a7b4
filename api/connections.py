"""Connections of clients that are slow, silent, or too many.

uvicorn parses requests and writes answers; it waits for ever for the rest of a head or of a body
and for a client that does not read, and it limits neither heads nor connections.  Here every
connection has deadlines for those, and what it may send and hold has bounds.  An answer that goes
on, such as a stream of events, has no deadline while it is read.
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

from api.fair_queue import GONE
from api.problems import PROBLEM_JSON, RETRY_AFTER_SECONDS
from api.rates import network_of

_log = logging.getLogger(__name__)
#: Seconds between lines of the log about connections that were refused or cut off.
_TELL_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What one connection, one address and all of them may take of this process."""

    #: open connections, in all and of one address; see `nas.settings` for those of streams
    connections: int
    connections_of_one: int
    #: seconds for the head of a request, from the connection's begin or the head's first byte
    head_seconds: float = 10.0
    #: seconds for the body of a request, from the end of its head
    body_seconds: float = 20.0
    #: seconds in which a client has to read `stall_bytes` of what waits for it
    stall_seconds: float = 20.0
    stall_bytes: int = 16 * 1024
    #: bytes that the system buffers for a client that reads slowly: what it has read is seen only
    #: when a third of this is free, and each connection may keep as much
    send_bytes: int = 128 * 1024
    #: seconds that a connection may take to close
    closing_seconds: float = 2.0
    #: seconds between looks at the deadlines of a connection
    look_seconds: float = 1.0
    #: bytes of the target in the request line, and of the names and values of all headers
    target_bytes: int = 8 * 1024
    head_bytes: int = 32 * 1024
    headers: int = 100
    #: bytes of a whole request as it is sent; a body that is refused is read up to here, so that
    #: the client comes to read the refusal
    request_bytes: int = 1024 * 1024
    #: requests that wait on their connection for the answers to earlier ones
    waiting: int = 32


class Refused(Exception):
    """A request that is not taken, by its status and the reason told."""

    def __init__(self, status: HTTPStatus, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail

    def answer(self) -> bytes:
        """The whole answer, after which the connection closes."""
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
    """Counts open connections, and tells the log of those that were not kept.

    Parameters
    ----------
    trusted
        Whether an address is a proxy's, which brings the connections of many.
    """

    def __init__(self, limits: Limits, trusted: Callable[[str], bool]) -> None:
        self.limits, self._trusted = limits, trusted
        self._open = 0
        self._open_of: Counter[str] = Counter()
        self._untold: Counter[str] = Counter()
        self._told_at = -_TELL_SECONDS

    def enter(self, address: str) -> str | None:
        """Count a connection; as what, for `leave`.

        Raises
        ------
        Refused
            There are too many; it is not counted.
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
                    f"{limits.connections_of_one} connections of this address are open, as many "
                    "as may be",
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
        """Note that a connection was not kept: a line for many, as clients decide how many."""
        self._untold[what] += 1
        now = time.monotonic()
        if now - self._told_at >= _TELL_SECONDS:
            self._told_at = now
            told = ", ".join(f"{n}: {name}" for name, n in self._untold.most_common())
            self._untold.clear()
            _log.warning("connections closed: %s; %d are open", told, self._open)


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with deadlines and bounds."""

    gate: Gate

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limits = self.gate.limits
        self._entered = False
        self._network: str | None = None
        self._timer: asyncio.TimerHandle | None = None
        #: what is expected of the client: a request, the rest of one, or nothing; and since when
        self._phase: Literal["request", "head", "body"] | None = "request"
        self._since = self.loop.time()
        #: requests whose answer is not complete, in order
        self._open: deque[RequestResponseCycle] = deque()
        #: bytes of the request that is being read, and of its names and values of headers
        self._request_bytes = self._header_bytes = 0
        #: what the parser is stopped for
        self._refusal: Refused | None = None
        #: since when, and how much: what waits to be written while nothing is added to it
        self._unread: tuple[float, int] | None = None
        self._closing_since: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        try:
            self._network = self.gate.enter(self.client[0] if self.client else "")
        except Refused as refusal:
            self.gate.tell("too many")
            self._closing_since = self.loop.time()
            # at once: what is over the bound may take nothing, not even the time to close well
            transport.write(refusal.answer())
            transport.close()
        else:
            self._entered = True
            with suppress(OSError):  # it may be gone already
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
            self._expect("request")  # also by empty lines, which are no part of one
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
                Refused(HTTPStatus.TOO_MANY_REQUESTS, "too many requests without an answer")
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
        self._unread = None  # what is asked next shows that answers are read
        super().on_headers_complete()
        cycle = self.cycle
        self._open.append(cycle)
        scope: Any = cycle.scope  # the application gets it later, in a task of its own
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
        """Answer what the parser stopped for."""
        refusal = self._refusal
        self._refuse(refusal or Refused(HTTPStatus.BAD_REQUEST, "this is no HTTP/1.1 request"))

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: whoever asks for another protocol is answered in this one."""

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
            f"the head of a request has at most {limits.headers} headers and {limits.head_bytes} "
            "bytes",
        )

    @property
    def _unanswered(self) -> deque[RequestResponseCycle]:
        """Requests whose answer is not complete, in order."""
        while self._open and self._open[0].response_complete:
            self._open.popleft()
        return self._open

    def _refuse(self, refusal: Refused) -> None:
        """Answer, unless another answer comes first or has begun, and close."""
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
        """Say that nothing more comes, and read on for a moment.

        To close with input unread would be a reset, which may overtake the answer.
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
        """Tell every request on this connection, not the newest only, that its client is gone."""
        self.pipeline.clear()
        for cycle in self._unanswered:
            cycle.disconnected = True
            cycle.message_event.set()
        self._open.clear()
        self.flow.resume_writing()

    def _look(self) -> None:
        """Close what is over its time."""
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
                self._since = now  # whoever waits for an answer need not ask again
            elif now - self._since > limits.head_seconds:
                self._expire("head", limits.head_seconds)

    def _is_stalled(self, now: float) -> bool:
        """Whether the client reads nothing, or next to nothing, of what waits for it."""
        size = self.transport.get_write_buffer_size()
        complete = not self._unanswered or self.transport.is_closing()
        if not size or not (complete or self.flow.write_paused):
            self._unread = None  # all is read, or the answer still grows and has room to
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
            why = f"the {part} of the request was not here after {seconds:g} s"
            self._refuse(Refused(HTTPStatus.REQUEST_TIMEOUT, why))


def guarded(gate: Gate) -> type[asyncio.Protocol]:
    """The protocol of the connections that a gate counts, for uvicorn."""
    return cast("type[asyncio.Protocol]", type("Guarded", (GuardedProtocol,), {"gate": gate}))
