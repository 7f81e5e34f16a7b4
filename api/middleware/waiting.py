"""Answers 503 until the database has the schema that this program needs."""

from __future__ import annotations

from dataclasses import asdict

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from api.declared import declared_of
from api.problems import problem
from api.readiness import PartName, Readiness, Report


class SchemaGate:
    """Middleware that answers 503 on routes that need the store, until its schema is there."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and declared_of(scope).needs_store:
            readiness: Readiness = scope["app"].state.readiness
            if not readiness.opened:
                report = await readiness.report()
                await not_ready(report, report.failing or "schema")(scope, receive, send)
                return
        await self._app(scope, receive, send)


def not_ready(report: Report, name: PartName) -> JSONResponse:
    """The response that names a failing check and the results of all."""
    part = report.parts[name]
    detail = f"{name}: {part.finding or 'it is being prepared'}"
    return problem(
        503, "not-ready", "Not ready", f"{detail}; {part.advice}" if part.advice else detail,
        part=name, parts={n: asdict(p) for n, p in report.parts.items()},
    )  # fmt: skip
