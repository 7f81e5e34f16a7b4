"""The FastAPI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from asgi_correlation_id import CorrelationIdMiddleware
from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from starlette.middleware.gzip import DEFAULT_EXCLUDED_CONTENT_TYPES, GZipMiddleware

from api import auth, problems
from api.caching.cache import AnswerCache
from api.caching.following import Follower
from api.dashboard import pages, plotly_js, provider_signin, service_pages, signin, views
from api.declared import NotAllowed, read_declarations
from api.limits.rates import Rates
from api.middleware import access, bodies, headers, hosts, traces
from api.readiness import Readiness, SchemaGate
from api.routes import (
    admin,
    answers,
    asked,
    catalogue,
    events,
    exports,
    health,
    keys,
    metrics,
    searches,
    trials,
)
from nas import tracing
from nas.errors import InvalidInput
from nas.planning.tasks import task_cards
from nas.settings import Settings, is_loopback, settings
from nas.store import Standings, Store
from nas.store.quotas import Quotas

DESCRIPTION = """
Neural-architecture search over einsum-structured linear layers: for this task and this compute
budget, which structure should a model use, and how much does it save over dense?

FLOPs are train FLOPs unless the name says otherwise: 1 MAC = 2 FLOPs, training = 3 × forward, all
matrix products counted. Losses are means over fixed validation samples, in the unit of the task.
"""


def create_app(configured: Settings | None = None, *, address: str = "127.0.0.1") -> FastAPI:
    """The service on the database of `configured`, whose schema is upgraded when it starts.

    Until the database can be reached, every route but those of `health` and `metrics` answers 503.

    Parameters
    ----------
    address
        Where it listens.  Unless that is loopback, it requires keys, whatever the settings say.

    Raises
    ------
    InvalidInput
        Other origins are allowed without access control, or a provider of OpenID Connect cannot be
        used as it is set.
    """
    used = configured or settings()
    task_cards()  # now: a plug-in that is not counted yet takes a while, and one may be missing
    access_control = used.access_control or not is_loopback(address)
    if used.allowed_origins and not access_control:
        raise InvalidInput(
            "EINSUM_NAS_ALLOWED_ORIGINS", ", ".join(used.allowed_origins),
            "none unless EINSUM_NAS_ACCESS_CONTROL=true: pages of other origins need keys",
        )  # fmt: skip

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        store = Store(used.resolved_database_url, quotas=Quotas.of(used))
        app.state.store = store
        app.state.cache = AnswerCache(Standings(store))
        app.state.settings = used
        app.state.store_reader = metrics.StoreReader(store)
        follower = app.state.follower = Follower(store, used.event_streams)
        readiness = app.state.readiness = Readiness(store, used)
        try:
            await readiness.start()
            yield
        finally:
            await follower.stop()
            await readiness.stop()
            store.close()
            await run_in_threadpool(tracing.stop)

    tracing.start()
    app = FastAPI(
        title="einsum-nas",
        version=version("einsum-nas"),
        description=DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
        openapi_url=None,  # it has a route that says who may read it
        docs_url=None,  # that page loads scripts from another site; use /openapi.json
        redoc_url=None,
        exception_handlers=problems.HANDLERS,
        telemetry=traces.configured(),
    )
    app.add_exception_handler(NotAllowed, service_pages.not_allowed)
    app.state.access_control = access_control
    # from here on: each middleware is outside of those before it
    app.add_middleware(bodies.BodyLimit)
    app.state.rates = rates = Rates(used)
    app.add_middleware(auth.Access, settings=used, rates=rates, access_control=access_control)
    app.add_middleware(SchemaGate)
    hosts.install(app, used, address)
    metrics.install(app)
    app.add_middleware(access.AccessLog)
    app.add_middleware(
        CorrelationIdMiddleware, header_name="X-Request-ID", validator=access.usable_id
    )
    # the level: half of the time of the highest for a few per cent more bytes
    app.add_middleware(
        GZipMiddleware, minimum_size=1000, compresslevel=5,
        exclude_content_types=(
            *DEFAULT_EXCLUDED_CONTENT_TYPES, "application/vnd.apache.parquet",
            "application/octet-stream",
        ),
    )  # fmt: skip
    headers.install(app)
    app.state.provider = provider_signin.provider_of(used, access_control=access_control)
    if app.state.provider is not None:
        app.include_router(provider_signin.router)
    for router in (
        health.router, metrics.router, searches.changing, searches.router, trials.router,
        answers.router, asked.router, catalogue.router, events.router, exports.router, admin.router,
        keys.router, pages.router, views.router, service_pages.router, plotly_js.router,
        signin.router,
    ):  # fmt: skip
        app.include_router(router)
    app.mount("/static", pages.Files(), name="static")
    read_declarations(app)
    auth.document(app, access_control=access_control)
    return app
