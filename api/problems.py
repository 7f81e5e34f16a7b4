"""Errors as application/problem+json (RFC 9457), small and the same for every route."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Scope

from nas.errors import (
    Conflict,
    IdempotencyConflict,
    InvalidInput,
    NotFound,
    QuotaExceeded,
    StoreUnavailable,
    echo,
)
from nas.store import AXES
from nas.store.troubles import DatabaseTrouble

_log = logging.getLogger(__name__)
PROBLEM_JSON = "application/problem+json"
#: When a client may try again where the database is unavailable.
RETRY_AFTER_SECONDS = 5
#: For the OpenAPI document of every route.
PROBLEM_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "field": {"type": "string", "description": "the field that cannot be used"},
        "value": {"type": "string", "description": "what was given, shortened"},
        "accepted": {"type": "string", "description": "what is accepted"},
        "reason": {"type": "string", "description": "why the database is unavailable"},
        "quota": {"type": "string", "description": "the quota that is used up"},
        "tenant": {"type": "string", "description": "whose quota it is"},
        "part": {"type": "string", "description": "the part of readiness that fails"},
        "parts": {"type": "object", "description": "every part of readiness"},
    },
}
_PARAMETER_ACCEPTS = {
    "d_in": "a whole number from 1 to 16777216",
    "d_out": "a whole number from 1 to 16777216",
    **dict.fromkeys(
        ("train_flops", "inference_flops", "params", "step_seconds", "peak_memory"),
        "a finite number above 0",
    ),
    "x": " | ".join(AXES),
    "search_id": "the id of a search",
    "search": "the id of a search",
    "task": "the name of a task, or name@fingerprint",
    "limit": "a whole number from 1 to 500",
    "cursor": "the `next` of an earlier page",
    "trial_id": "a whole number",
    "theta": "exponents or a name; see the documentation",
}


def problem(
    status: int,
    kind: str,
    title: str,
    detail: str,
    *,
    headers: dict[str, str] | None = None,
    **extra: Any,
) -> JSONResponse:
    """One problem document."""
    body = {"type": f"urn:einsum-nas:{kind}", "title": title, "status": status, "detail": detail}
    return JSONResponse({**body, **extra}, status, headers, media_type=PROBLEM_JSON)


def route_of(scope: Scope) -> str:
    """The template of the route that a request met, such as ``/v1/searches/{search_id}``."""
    return str(getattr(scope.get("route"), "path", "none"))


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses=` of a route for the OpenAPI document."""
    titles = {
        400: "Bad request", 401: "No usable key", 403: "Not allowed", 404: "Not found",
        409: "Conflict", 413: "Too large", 415: "Not JSON", 422: "Invalid input",
        429: "Too many requests, or the quota is used up", 503: "Unavailable",
    }  # fmt: skip
    content = {PROBLEM_JSON: {"schema": PROBLEM_SCHEMA}}
    return {s: {"description": titles[s], "content": content} for s in statuses}


def _invalid(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, InvalidInput)
    return problem(
        422, "invalid-input", "Invalid input", str(error),
        field=error.field, value=error.value, accepted=error.accepted,
    )  # fmt: skip


def _invalid_parameter(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = str(first["loc"][-1]) if first["loc"] else "request"
    given = "nothing" if first["type"] == "missing" else echo(first.get("input"))
    accepted = _PARAMETER_ACCEPTS.get(field, str(first["msg"]))
    return _invalid(request, InvalidInput(field, given, accepted))


def _not_found(_request: Request, error: Exception) -> JSONResponse:
    return problem(404, "not-found", "Not found", str(error))


def _quota(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, QuotaExceeded)
    return problem(
        429, "quota-exceeded", "Quota exceeded", str(error), quota=error.quota, tenant=error.tenant
    )


def _conflict(_request: Request, error: Exception) -> JSONResponse:
    return problem(409, "conflict", "Conflict", str(error))


def _idempotency(_request: Request, error: Exception) -> JSONResponse:
    return problem(422, "idempotency-conflict", "Idempotency-Key used before", echo(str(error)))


def unavailable(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StoreUnavailable)
    request.app.state.readiness.doubt()
    what = f"{echo(request.method)} {route_of(request.scope)} refused with 503"
    later = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    if not isinstance(error, DatabaseTrouble):
        _log.error("%s: %s", what, error)
        detail = "the database is unavailable"
        return problem(503, "unavailable", "Service unavailable", detail, headers=later)
    _log.error("%s: %s: %s", what, error, error.advice)
    detail = f"the database is unavailable: {error.finding}; try again later"
    return problem(
        503, "unavailable", "Service unavailable", detail, headers=later, reason=error.kind
    )


def _http(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    response = problem(error.status_code, "http", str(error.detail), str(error.detail))
    response.headers.update(error.headers or {})
    return response


def unexpected(request: Request, error: Exception) -> JSONResponse:
    """500 for an error of this service, which its log tells in full."""
    _log.error("%s %s failed", echo(request.method), route_of(request.scope), exc_info=error)
    return problem(500, "internal", "Internal error", "an error of this service; it is in its log")


def install(app: FastAPI) -> None:
    """Register the handlers; the most specific class of an error wins."""
    app.add_exception_handler(InvalidInput, _invalid)
    app.add_exception_handler(RequestValidationError, _invalid_parameter)
    app.add_exception_handler(NotFound, _not_found)
    app.add_exception_handler(IdempotencyConflict, _idempotency)
    app.add_exception_handler(Conflict, _conflict)
    app.add_exception_handler(QuotaExceeded, _quota)
    app.add_exception_handler(StoreUnavailable, unavailable)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, unexpected)
