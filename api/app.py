"""The FastAPI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import Depends, FastAPI
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.staticfiles import StaticFiles

from api import access, dashboard, events, health, lifecycle, metrics, problems, routes
from api.cache import AnswerCache
from nas.settings import Settings, settings
from nas.store import Standings, Store

_LOOPBACK_NAMES = ["127.0.0.1", "localhost", "[::1]"]
DESCRIPTION = """
Neural-architecture search over einsum-structured linear layers: for this task and this compute
budget, which structure should a model use, and how much does it save over dense?

FLOPs are train FLOPs unless the name says otherwise: 1 MAC = 2 FLOPs, training = 3 × forward, all
matrix products counted. Losses are means over fixed validation samples, in the unit of the task.
"""


def create_app(configured: Settings | None = None, *, any_host: bool = False) -> FastAPI:
    """The service on the database of `configured`, which is migrated when the service starts.

    A database that is away at the start is waited for: until it is there, every route but those of
    `health` and `metrics` answers 503.

    Parameters
    ----------
    any_host
        Answer to every Host header.  By default only to this machine's own names, so that no web
        page elsewhere reaches a service on loopback by pointing its own name there.
    """
    used = configured or settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        store = Store(used.resolved_database_url)
        app.state.store = store
        app.state.cache = AnswerCache(Standings(store))
        app.state.settings = used
        app.state.store_reader = metrics.StoreReader(store)
        readiness = app.state.readiness = health.Readiness(store, used)
        try:
            await readiness.start()
            yield
        finally:
            await readiness.stop()
            store.close()

    app = FastAPI(
        title="einsum-nas",
        version=version("einsum-nas"),
        description=DESCRIPTION,
        lifespan=lifespan,
        max_body_size=routes.MAX_BODY,
        docs_url=None,  # its page loads scripts from elsewhere; /openapi.json is the reference
        redoc_url=None,
    )
    problems.install(app)
    app.add_middleware(health.Gate)
    if not any_host:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=_LOOPBACK_NAMES)
    metrics.install(app)
    access.install(app)
    app.include_router(health.health)
    app.include_router(metrics.router)
    app.include_router(routes.router, dependencies=[Depends(problems.refuse_other_origins)])
    app.include_router(lifecycle.router, dependencies=[Depends(problems.refuse_other_origins)])
    app.include_router(events.router)
    app.include_router(dashboard.router)
    app.mount("/static", StaticFiles(directory=dashboard.STATIC), name="static")
    return app
