"""Runs the service under uvicorn, with bounds on connections and open files."""

from __future__ import annotations

import gc
import ipaddress
import logging
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from api.declared import declared_of
from api.limits.connections import Gate, Limits
from api.limits.fair_queue import FairQueue
from api.middleware.prefix import Prefix, checked_root, own_segments
from api.uvicorn_private import believing, guarded
from nas.errors import InvalidInput
from nas.settings import Settings

_log = logging.getLogger(__name__)
#: Most open connections, where the system allows as many files.
_CONNECTIONS = 10_000
#: Files that one connection may need: its socket, and a file that is sent.
_FILES_OF_ONE = 2
#: Files for everything else: the database, logs, pages, and connections about to be refused.
_OTHER_FILES = 300
#: Connections of one address besides event streams.
_PLAIN = 1000
#: Share of all connections that one address may have.
_SHARE = 0.75
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


def limits_for(settings: Settings, files: int) -> Limits:
    """Bounds on connections for a process that may open `files` files.

    One address may have all event streams open and some more connections, but never all of them.
    """
    connections = max(8, min(_CONNECTIONS, (files - _OTHER_FILES) // _FILES_OF_ONE))
    of_one = min(settings.event_streams + _PLAIN, int(_SHARE * connections))
    if settings.event_streams > connections:
        _log.warning(
            "event_streams is %d, but this process may open %d files: at most %d connections",
            settings.event_streams, files, connections,
        )  # fmt: skip
    return Limits(connections, of_one)


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


def behind_proxies(app: FastAPI, settings: Settings) -> tuple[ASGIApp, Callable[[str], bool]]:
    """(the application with what proxies tell of a request, whether that of an address is believed)

    Raises
    ------
    InvalidInput
        A trusted proxy of the settings is neither an address nor a network, or the path below which
        they serve the service is none.
    """
    own = own_segments(app)
    root = checked_root(settings, own)
    queued = FairQueue(app, lambda scope: declared_of(scope, app).probe)
    believed, trusted = believing(queued, checked_proxies(settings.trusted_proxies))
    # outside: it has to see the proxy's own address
    return Prefix(believed, root, trusted, own), trusted


def serve(
    app: FastAPI, settings: Settings, host: str, port: int, *, limits: Limits | None = None
) -> None:
    """Serve an application until this process is told to end.

    Parameters
    ----------
    limits
        By default as many as the system's limit on open files, once raised, allows.

    Raises
    ------
    InvalidInput
        See `behind_proxies`.
    """
    outside, trusted = behind_proxies(app, settings)
    files = raise_file_limit()
    used = limits or limits_for(settings, files)
    gate = Gate(used, trusted=trusted)
    sys.setswitchinterval(_SWITCH_SECONDS)
    gc.collect()
    gc.freeze()  # a full collection over all modules would delay every response by 0.1 s
    uvicorn.run(
        outside,
        host=host,
        port=port,
        http=guarded(gate),
        ws="none",
        workers=1,
        proxy_headers=False,  # done above
        server_header=False,
        log_level="warning",
        log_config=None,  # `nas.logs` configures logging
        access_log=False,
        timeout_graceful_shutdown=2,
    )
