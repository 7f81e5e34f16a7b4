"""Protection against clients that are slow or silent, or open too many connections.

uvicorn parses requests and writes responses.  It waits without end for the rest of a head or body,
and for a client that does not read, and it limits neither heads nor connections.  This module says
which deadlines all of these have, and what a connection may send and hold; `api.uvicorn_private`
enforces them.  A long response, such as an event stream, has no deadline while the client reads it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

from api.limits.rates import network_of
from api.problems import RETRY_AFTER_SECONDS, problem

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
        too_many = self.status == HTTPStatus.TOO_MANY_REQUESTS
        later = {"Retry-After": str(RETRY_AFTER_SECONDS)} if too_many else None
        status, phrase = self.status.value, self.status.phrase
        told = problem(status, "http", phrase, self.detail, headers=later)
        headers = (name + b": " + value for name, value in told.raw_headers)
        head = (f"HTTP/1.1 {status} {phrase}".encode(), *headers, b"connection: close")
        return b"\r\n".join((*head, b"", told.body))


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
        #: by network; None for all proxies
        self._open_of: Counter[str | None] = Counter()
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
            why = "too many connections are open; try again later"
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, why)
        network = None if self._trusted(address) else network_of(address)
        most = limits.connections_of_one
        if network is not None and self._open_of[network] >= most:
            why = f"this address has {most} connections open, the most allowed"
            raise Refused(HTTPStatus.TOO_MANY_REQUESTS, why)
        self._open += 1
        self._open_of[network] += 1
        return network

    def leave(self, network: str | None) -> None:
        """Take back what `enter` counted."""
        self._open -= 1
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
