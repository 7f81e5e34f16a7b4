"""Prometheus metrics of a worker; `api.routes.metrics` has those of the service."""

from __future__ import annotations

import time
from importlib.metadata import version

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    start_http_server,
)

from nas.errors import InvalidInput

#: Metrics of this process, which is one worker.
REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)

_BUILD = Gauge("einsum_nas_build_info", "Version of einsum-nas", ["version"], registry=REGISTRY)
_BUILD.labels(version("einsum-nas")).set(1)


def _counter(name: str, help_text: str, label: str | None = None, *values: str) -> Counter:
    """A counter of events, by a label if one is given.

    Every series is created at once: a rate over one that appears later would miss its first event.
    """
    labels = () if label is None else (label,)
    counter = Counter(f"einsum_nas_worker_{name}", help_text, labels, registry=REGISTRY)
    for value in values:
        counter.labels(value)
    return counter


CLAIMS = _counter(
    "claims_total", "Attempts to claim a search, by outcome",
    "outcome", "claimed", "nothing", "unavailable",
)  # fmt: skip
TRIALS = _counter(
    "trials_total", "Trials that ended or paused on this worker, by state",
    "state", "complete", "paused", "stopped", "failed",
)  # fmt: skip
TRIAL_SECONDS = Histogram(
    "einsum_nas_worker_trial_seconds", "Wall-clock seconds from start to end of a trial",
    buckets=(1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 14400, 86400), registry=REGISTRY,
)  # fmt: skip
STALE_WRITES = _counter(
    "stale_writes_total", "Writes refused because another worker had claimed the search"
)
RENEWALS = _counter(
    "lease_renewals_total", "Attempts to renew a lease, by outcome",
    "outcome", "renewed", "lost", "unavailable",
)  # fmt: skip
RAY_RECONNECTS = _counter("ray_reconnects_total", "Reconnections to the Ray cluster")
_SINCE_RENEWAL = Gauge(
    "einsum_nas_worker_seconds_since_lease_renewal",
    "Seconds since the lease was last renewed; 0 while none is held", registry=REGISTRY,
)  # fmt: skip


def lease_renewed() -> None:
    """Record that a lease has just been taken or renewed."""
    renewed_at = time.monotonic()
    _SINCE_RENEWAL.set_function(lambda: time.monotonic() - renewed_at)


def lease_ended() -> None:
    """Record that no lease is held any more."""
    _SINCE_RENEWAL.set_function(lambda: 0.0)


def serve(port: int, host: str) -> int:
    """Serve `/metrics` in a thread until the process ends; return the port.

    Raises
    ------
    InvalidInput
        The process cannot listen on the address or the port.
    """
    try:
        server, _ = start_http_server(port, host, REGISTRY)
    except OSError as error:
        accepted = f"a free port of an address of this machine ({error.strerror})"
        raise InvalidInput("EINSUM_NAS_METRICS_PORT", f"{host}:{port}", accepted) from None
    return int(server.server_port)
