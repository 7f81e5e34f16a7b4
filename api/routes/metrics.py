"""`/metrics`: requests by route, and the state of the store at the moment of the scrape."""

from __future__ import annotations

import asyncio
import logging
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, get_args

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from prometheus_fastapi_instrumentator import Instrumentator
from prometheus_fastapi_instrumentator import metrics as of_requests

from api.declared import ADMIN, PROBE
from nas.errors import StoreUnavailable
from nas.records.search import SearchState
from nas.records.trial import TrialState
from nas.settings import Settings
from nas.store import Store
from nas.store.gauges import Gauges, of_most, read_gauges
from nas.store.processes import ProcessState

_log = logging.getLogger(__name__)
router = APIRouter(include_in_schema=False, dependencies=[ADMIN, PROBE])
#: Seconds that a scrape waits for the store; then it is answered without the store's metrics.
PATIENCE_SECONDS = 4.0
#: Label of the tenants beyond `EINSUM_NAS_METRICS_TENANTS` together; no tenant can have this name.
REST = "_other"
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


def install(app: FastAPI) -> None:
    """Count the requests of one application, in a registry of its own."""
    registry = CollectorRegistry()
    app.state.metrics = registry
    shared: dict[str, Any] = {"metric_namespace": "einsum_nas", "registry": registry}
    instrumentator = Instrumentator(
        should_group_status_codes=False, should_exclude_streaming_duration=True, registry=registry
    )
    for count in (
        of_requests.requests(metric_doc="HTTP requests by method, route and status", **shared),
        of_requests.latency(
            metric_doc="Seconds until a response began, by method, route and status",
            buckets=_BUCKETS, should_exclude_streaming_duration=True, **shared,
        ),
    ):  # fmt: skip
        assert count is not None
        instrumentator.add(_bounded(count))
    instrumentator.instrument(app)


def _bounded(count: Callable[[of_requests.Info], None]) -> Callable[[of_requests.Info], None]:
    """Count unknown HTTP methods as one, so that clients cannot create new time series."""

    def record(info: of_requests.Info) -> None:
        if info.method not in _METHODS:
            info.method = "other"
        count(info)

    return record


class StoreReader:
    """Reads the store for scrapes, which share one read and wait `PATIENCE_SECONDS` at most."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._limiter = CapacityLimiter(1)
        self._reading: asyncio.Task[Gauges | None] | None = None

    async def read(self) -> Gauges | None:
        """The state of the store; None where it does not answer."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read())
        try:
            return await asyncio.wait_for(asyncio.shield(self._reading), PATIENCE_SECONDS)
        except TimeoutError:
            return None

    async def _read(self) -> Gauges | None:
        try:
            return await to_thread.run_sync(
                read_gauges, self._store, limiter=self._limiter, abandon_on_cancel=True
            )
        except StoreUnavailable:
            return None
        except Exception:  # such as a schema that is not there yet
            _log.exception("the store's metrics cannot be read")
            return None


class StoreCollector(Collector):
    """The store's metrics; if it could not be read, only that the database is down."""

    def __init__(self, found: Gauges | None, most_tenants: int) -> None:
        self._found = found
        self._most_tenants = most_tenants

    def collect(self) -> Iterator[Metric]:
        found, of_python = self._found, platform.python_version()
        yield _labelled(
            "build_info", "Version of einsum-nas and of Python", ("version", "python"),
            {(version("einsum-nas"), of_python): 1},
        )  # fmt: skip
        up = "1 if the database answered this scrape, else 0"
        yield GaugeMetricFamily("einsum_nas_database_up", up, value=0 if found is None else 1)
        if found is None:
            return
        yield _labelled(
            "schema_info",
            "Revision that the database's schema has, and the one that the program needs",
            ("revision", "needed"), {(found.schema.found or "none", found.schema.needed): 1},
        )  # fmt: skip
        for name, text, states, counts in (
            ("searches", "Searches by state", get_args(SearchState), found.searches),
            ("trials", "Trials of all searches by state", get_args(TrialState), found.trials),
            ("workers", "Workers seen recently, by state", get_args(ProcessState), found.workers),
        ):
            numbers = dict.fromkeys(states, 0) | dict(counts)
            yield _labelled(name, text, ("state",), {(state,): n for state, n in numbers.items()})
        for name, text, value in (
            ("oldest_queued_search_age_seconds",
             "Seconds since the oldest queued search was submitted; 0 if none is queued",
             found.oldest_queued_seconds),
            ("leases_expired",
             "Running searches whose lease has run out and that no worker has taken over yet",
             found.leases_expired),
            ("dead_lettered_searches", "Searches given up after too many attempts",
             found.dead_lettered),
        ):  # fmt: skip
            yield GaugeMetricFamily(f"einsum_nas_{name}", text, value=value)
        yield CounterMetricFamily(
            "einsum_nas_stale_writes_refused_total",
            "Writes refused because another worker had claimed the search",
            value=found.stale_writes,
        )
        yield from self._of_tenants(found)

    def _of_tenants(self, found: Gauges) -> Iterator[Metric]:
        told = of_most(found.tenants, self._most_tenants, REST)
        states = get_args(SearchState)
        yield _labelled(
            "tenant_searches", "Searches of a tenant by state", ("tenant", "state"),
            {(name, state): t.searches[state] for name, t in told.items() for state in states},
        )  # fmt: skip
        yield _labelled(
            "tenant_train_flops",
            "Train FLOPs charged to a tenant's quota: of searches that have not ended, or ended "
            "within EINSUM_NAS_QUOTA_DAYS",
            ("tenant",), {(name,): t.train_flops for name, t in told.items()},
        )  # fmt: skip
        yield _labelled(
            "tenant_weights_bytes", "Bytes of the kept weights of a tenant",
            ("tenant",), {(name,): t.weights_bytes for name, t in told.items()},
        )  # fmt: skip


def _labelled(
    name: str, text: str, labels: Sequence[str], values: Mapping[tuple[str, ...], float]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"einsum_nas_{name}", text, labels=labels)
    for given, value in values.items():
        family.add_metric(given, value)
    return family


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """All metrics in Prometheus' text format; status 200 even if the database is down."""
    reader: StoreReader = request.app.state.store_reader
    scraped = CollectorRegistry()
    used: Settings = request.app.state.settings
    scraped.register(StoreCollector(await reader.read(), used.metrics_tenants))
    own: CollectorRegistry = request.app.state.metrics
    body = generate_latest(own) + generate_latest(scraped)
    return Response(body, headers={"Content-Type": CONTENT_TYPE_LATEST})
