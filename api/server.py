"""The service as a process: uvicorn, with bounds on what clients may take of it."""

from __future__ import annotations

import gc
import ipaddress
import logging
import sys
from collections.abc import Iterable
from contextlib import suppress

import uvicorn
from starlette.types import ASGIApp
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from api.connections import Gate, Limits, guarded
from api.fair_queue import FairQueue
from nas.errors import InvalidInput
from nas.settings import Settings

_log = logging.getLogger(__name__)
#: Most open connections, where the system allows as many files.
_CONNECTIONS = 10_000
#: Files that a connection keeps open: itself, and one that it is sent.
_FILES_OF_ONE = 2
#: Files that are no connection: the database, logs, pages, and connections about to be refused.
_OTHER_FILES = 300
#: Connections of one address besides event streams.
_PLAIN = 1000
#: Share of all connections that one address may have.
_SHARE = 0.75
#: Seconds after which a thread that computes lets another go on.  An answer goes through several
#: threads, and would wait for this long at each of them beside requests that compute.
_SWITCH_SECONDS = 0.0005


def raise_file_limit() -> int:
    """Let this process open as many files as it may, within reason; how many that are."""
    wanted = _FILES_OF_ONE * _CONNECTIONS + _OTHER_FILES
    if sys.platform == "win32":
        return wanted
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft < wanted:
        # not every system takes what it says is the most
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return wanted
    return soft


def limits_for(settings: Settings, files: int) -> Limits:
    """Bounds on connections for a process that may open so many files.

    One address may hold every event stream and then some, but never all connections.
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
    """Addresses and networks of proxies.

    Raises
    ------
    InvalidInput
        One that is neither.
    """
    proxies = list(given)
    for proxy in proxies:
        try:
            ipaddress.ip_network(proxy)
        except ValueError:
            accepted = "addresses or networks, such as 10.0.0.2 or 10.0.0.0/8, apart by commas"
            raise InvalidInput("EINSUM_NAS_TRUSTED_PROXIES", proxy, accepted) from None
    return proxies


def serve(
    app: ASGIApp, settings: Settings, host: str, port: int, *, limits: Limits | None = None
) -> None:
    """Serve an application until this process is told to end.

    Parameters
    ----------
    limits
        By default what the system's limit on open files, which is raised, allows.

    Raises
    ------
    InvalidInput
        A trusted proxy of the settings that is no address.
    """
    proxies = checked_proxies(settings.trusted_proxies)
    files = raise_file_limit()
    used = limits or limits_for(settings, files)
    believed = ProxyHeadersMiddleware(FairQueue(app), proxies)  # type: ignore[arg-type]
    gate = Gate(used, trusted=believed.trusted_hosts.__contains__)
    sys.setswitchinterval(_SWITCH_SECONDS)
    gc.collect()
    gc.freeze()  # to look through all modules for garbage again would stop every answer for 0.1 s
    uvicorn.run(
        believed,
        host=host,
        port=port,
        http=guarded(gate),
        ws="none",
        workers=1,
        proxy_headers=False,  # as above
        server_header=False,
        log_level="warning",
        log_config=None,  # through our own, like everything else
        access_log=False,
        timeout_graceful_shutdown=2,
    )
