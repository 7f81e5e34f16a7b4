"""Tells webhooks of the events of searches: signed, and never to a private address unless allowed.

The signature is that of https://www.standardwebhooks.com: HMAC-SHA256 over id, time and body.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import json
import logging
import socket
import threading
import time
from urllib.parse import urlsplit, urlunsplit

import httpx2 as httpx

from nas.errors import EinsumNasError, StoreUnavailable, one_line
from nas.logs import carried
from nas.store import Store
from nas.store.webhooks import SECRET_PREFIX, Delivery, Webhooks

_log = logging.getLogger(__name__)
#: Seconds for each part of an attempt, such as the connection.
_TIMEOUT_SECONDS = 15.0
#: Seconds for all of it, attempts at once, and ones left hanging at which no more are begun.
_WHOLE_SECONDS, _AT_ONCE, _MOST_HANGING = 30.0, 4, 32
#: Seconds between looks for what is to be told.
_LOOK_SECONDS = 2.0
#: Days for which what was told is kept, and seconds between the times at which it is looked at.
_KEPT_DAYS, _PRUNE_SECONDS = 30.0, 3600.0


#: Addresses of IPv6 that stand for one of IPv4, which may be any.
_EMBEDDING = tuple(
    map(ipaddress.IPv6Network,
        ("::/96", "::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16"))
)  # fmt: skip


class NotTold(EinsumNasError):
    """An attempt that failed."""


def headers_of(delivery: Delivery, body: bytes, at: int) -> dict[str, str]:
    """Id, time and signature of a delivery."""
    signed = f"{delivery.name}.{at}.".encode() + body
    key = base64.b64decode(delivery.secret.removeprefix(SECRET_PREFIX))
    digest = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    return {
        "webhook-id": delivery.name,
        "webhook-timestamp": str(at),
        "webhook-signature": f"v1,{digest}",
        "content-type": "application/json",
        "user-agent": "einsum-nas",
    }


def address_of(host: str, port: int, *, private: bool) -> str:
    """The address to connect to.

    Raises
    ------
    NotTold
        The name has none, or any of them is of this machine or of a private network, and that is
        not allowed.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise NotTold(f"{host} has no address: {error}") from None
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    for address in addresses:
        if not private and not _is_public(address):
            raise NotTold(f"{host} is {address}, which is no public address; allow it by --private")
    return str(addresses[0])


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address) and (
        address.is_site_local or any(address in network for network in _EMBEDDING)
    ):
        return False
    return address.is_global and not address.is_multicast


def tell(client: httpx.Client, delivery: Delivery) -> None:
    """Make one attempt at a delivery; it is taken by a status from 200 to 299.

    The connection goes to the address that was looked at, whatever the name means a moment later;
    a redirection is not followed.

    Raises
    ------
    NotTold
        It was not taken.
    """
    parts = urlsplit(delivery.url)
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    address = address_of(host, port, private=delivery.private)
    at = f"[{address}]" if ":" in address else address
    target = urlunsplit((parts.scheme, f"{at}:{port}", parts.path or "/", parts.query, ""))
    body = json.dumps(delivery.body).encode()
    headers = {"host": parts.netloc, **headers_of(delivery, body, int(time.time()))}
    try:
        with client.stream(
            "POST", target, content=body, headers=headers, extensions={"sni_hostname": host}
        ) as response:
            status = response.status_code
    except httpx.HTTPError as error:
        raise NotTold(f"{type(error).__name__}: {one_line(error)}") from None
    if not 200 <= status < 300:
        raise NotTold(f"answered {status}")


class Teller:
    """A thread that makes the deliveries which are due; any number of processes may have one."""

    def __init__(self, store: Store, look_seconds: float = _LOOK_SECONDS) -> None:
        self._hooks, self._look = Webhooks(store), look_seconds
        self._done = threading.Event()
        self._threads = [
            threading.Thread(target=carried(self._run), name=f"webhooks {i}", daemon=True)
            for i in range(_AT_ONCE)
        ]
        self._pruned = time.monotonic()
        #: attempts that had not ended in their time
        self._hanging: list[threading.Thread] = []

    def __enter__(self) -> Teller:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(_TIMEOUT_SECONDS)

    def _run(self) -> None:
        while not self._done.is_set():
            try:
                while not self._done.is_set() and self._one():
                    pass
                if time.monotonic() - self._pruned > _PRUNE_SECONDS:
                    self._pruned = time.monotonic()
                    self._hooks.prune(_KEPT_DAYS * 86_400.0)
            except StoreUnavailable as error:
                _log.warning("webhooks wait: %s", error)
            except Exception:  # without this thread fewer would be told
                _log.exception("webhooks wait")
            self._done.wait(self._look)

    def _one(self) -> bool:
        """Try the next delivery; whether there was one."""
        delivery = self._hooks.take()
        if delivery is None:
            return False
        error = self._attempt(delivery)
        if error is not None:
            _log.warning("%s, attempt %d: %s", delivery.name, delivery.attempt, error)
        self._hooks.settle(delivery, error)
        return True

    def _attempt(self, delivery: Delivery) -> str | None:
        """Why it was not taken, or None.

        In a thread of its own, which is left where a receiver answers byte by byte.
        """
        said: list[str | None] = []

        def attempt() -> None:
            try:
                # no proxy of the environment: the address was looked at here
                with httpx.Client(timeout=_TIMEOUT_SECONDS, trust_env=False) as client:
                    tell(client, delivery)
            except NotTold as failed:
                said.append(str(failed))
            except Exception as failed:  # whatever a library raises for an odd address
                said.append(f"{type(failed).__name__}: {one_line(failed)}")
            else:
                said.append(None)

        self._hanging = [thread for thread in self._hanging if thread.is_alive()]
        if len(self._hanging) >= _MOST_HANGING:
            return "too many earlier attempts have not ended"
        thread = threading.Thread(target=attempt, name=delivery.name, daemon=True)
        thread.start()
        thread.join(_WHOLE_SECONDS)
        if said:
            return said[0]
        self._hanging.append(thread)
        return f"no whole answer within {_WHOLE_SECONDS:g} s"
