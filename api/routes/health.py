"""Liveness, readiness, and the document that describes the service: open to anyone."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from api.declared import PROBE, PUBLIC
from api.middleware.prefix import root_of
from api.problems import responses
from api.readiness import Readiness, not_ready

router = APIRouter(dependencies=[PUBLIC])


@router.get("/healthz", dependencies=[PROBE], summary="Check that the process answers")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}


@router.get(
    "/readyz",
    dependencies=[PROBE],
    responses=responses(503),
    summary="Check that the database answers, has the needed schema and accepts writes",
)
async def readyz(request: Request) -> Response:
    readiness: Readiness = request.app.state.readiness
    report = await readiness.report()
    if report.failing is not None:
        return not_ready(report)
    round_trip = report.round_trip_seconds or 0.0
    return JSONResponse(
        {
            "status": "ready",
            "database": {"status": "ok", "round_trip_ms": round(1e3 * round_trip, 3)},
            "schema": {"status": "ok", "revision": report.revision},
            "writable": {"status": "ok"},
            "workers": report.workers,
        }
    )


@router.api_route("/openapi.json", methods=["GET", "HEAD"], include_in_schema=False)
async def openapi(request: Request) -> JSONResponse:
    """The OpenAPI document; its paths lie below the one that a proxy serves the service at."""
    found: dict[str, Any] = request.app.openapi()
    root = root_of(request.scope)
    return JSONResponse({**found, "servers": [{"url": root}]} if root else found)
