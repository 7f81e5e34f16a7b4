"""Runs the service under uvicorn, with bounds on connections and open files.

Slow clients and floods of many requests are kept away by the proxy in front, `docker/edge`, without
which others should not reach this port.
"""

from __future__ import annotations

import gc
import ipaddress
import logging
import sys
from collections.abc import Iterable
from contextlib import suppress

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from api.middleware.prefix import Prefix, checked_root, own_segments
from nas.errors import InvalidInput
from nas.settings import Settings, is_loopback

_log = logging.getLogger(__name__)
#: Most open connections, where the system allows as many files.
_CONNECTIONS = 10_000
#: Files that one connection may need: its socket, and a file that is sent.
_FILES_OF_ONE = 2
#: Files for everything else: the database, logs, pages, and connections about to be refused.
_OTHER_FILES = 300
#: Largest head of a request, bytes; beyond it uvicorn answers 400.
_HEAD_BYTES = 64 * 1024
#: Seconds for which a connection without a request is kept: longer than a proxy keeps it, which
#: would otherwise send a request on one that is just being closed.
_KEEP_ALIVE_SECONDS = 75
#: Interpreter's switch interval, seconds.  A response passes through several threads, and beside
#: requests that compute it would wait for one interval at each of them.
_SWITCH_SECONDS = 0.0005


def raise_file_limit() -> int:
    """Raise this process's limit on open files, as far as needed and allowed; return the limit."""
    wanted = _FILES_OF_ONE * _CONNECTIONS + _OTHER_FILES
    if sys.platform == "win32":
        return wanted
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft < wanted:
        # some systems refuse even the maximum that they report
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return wanted
    return soft


def connections_for(settings: Settings, files: int) -> int:
    """Most connections of a process that may open `files` files; more are answered 503."""
    connections = max(8, min(_CONNECTIONS, (files - _OTHER_FILES) // _FILES_OF_ONE))
    if settings.event_streams > connections:
        _log.warning(
            "event_streams is %d, but this process may open %d files: at most %d connections",
            settings.event_streams, files, connections,
        )  # fmt: skip
    return connections


def checked_proxies(given: Iterable[str]) -> list[str]:
    """Validate addresses and networks of proxies.

    Raises
    ------
    InvalidInput
        One is neither an address nor a network.
    """
    proxies = list(given)
    for proxy in proxies:
        try:
            ipaddress.ip_network(proxy)
        except ValueError:
            accepted = "addresses or networks separated by commas, such as 10.0.0.2,10.1.0.0/16"
            raise InvalidInput("EINSUM_NAS_TRUSTED_PROXIES", proxy, accepted) from None
    return proxies


def behind_proxies(app: FastAPI, settings: Settings) -> ASGIApp:
    """The application with what trusted proxies tell of a request.

    Raises
    ------
    InvalidInput
        A trusted proxy of the settings is neither an address nor a network, or the path below which
        they serve the service is none.
    """
    own = own_segments(app)
    root = checked_root(settings, own)
    proxies = checked_proxies(settings.trusted_proxies)
    believed = ProxyHeadersMiddleware(app, proxies)  # type: ignore[arg-type]
    networks = [ipaddress.ip_network(proxy) for proxy in proxies]

    def is_trusted(address: str) -> bool:
        try:
            found = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(found in network for network in networks)

    # outside: it has to see the proxy's own address
    return Prefix(believed, root, is_trusted, own)  # type: ignore[arg-type]


def serve(app: FastAPI, settings: Settings, host: str, port: int) -> None:
    """Serve an application until this process is told to end.

    Raises
    ------
    InvalidInput
        See `behind_proxies`.
    """
    outside = behind_proxies(app, settings)
    if not (is_loopback(host) or settings.trusted_proxies):
        _log.warning(
            "%s can be reached by others, and no proxy is named in EINSUM_NAS_TRUSTED_PROXIES: "
            "keys travel readable, and one slow or greedy client can stop the others", host,
        )  # fmt: skip
    sys.setswitchinterval(_SWITCH_SECONDS)
    gc.collect()
    gc.freeze()  # a full collection over all modules would delay every response by 0.1 s
    uvicorn.run(
        outside,
        host=host,
        port=port,
        http="h11",  # the one of uvicorn's parsers that bounds a request's head
        h11_max_incomplete_event_size=_HEAD_BYTES,
        limit_concurrency=connections_for(settings, raise_file_limit()),
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        ws="none",
        workers=1,
        proxy_headers=False,  # done above
        server_header=False,
        log_level="warning",
        log_config=None,  # `nas.logs` configures logging
        access_log=False,
        timeout_graceful_shutdown=2,
    )
