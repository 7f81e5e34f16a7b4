"""Errors as application/problem+json (RFC 9457), in one form for every route."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import compile_path
from starlette.types import Scope

from api.declared import NotAllowed
from api.middleware.prefix import path_of
from nas.errors import (
    Conflict,
    IdempotencyConflict,
    InvalidInput,
    LeaseLost,
    NotFound,
    NotPermitted,
    QuotaExceeded,
    StoreUnavailable,
    echo,
)
from nas.logs import masked
from nas.planning.accepted import in_words
from nas.store.troubles import DatabaseTrouble

_log = logging.getLogger(__name__)
PROBLEM_JSON = "application/problem+json"
#: When a client may try again where the database is unavailable.
RETRY_AFTER_SECONDS = 5
#: Most characters of one text of a problem; `InvalidInput` has shortened the client's value.
_LONGEST = 1000
#: Schema of a problem, in the OpenAPI document of every route.
PROBLEM_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string", "format": "uri"},
        "title": {"type": "string"},
        "status": {"type": "integer", "minimum": 400, "maximum": 599},
        "detail": {"type": "string", "maxLength": _LONGEST},
        "field": {"type": "string", "description": "the field, parameter or header at fault"},
        "value": {"type": "string", "description": "its value, shortened"},
        "accepted": {"type": "string", "description": "what is accepted"},
        "reason": {"type": "string", "description": "why the database is unavailable"},
        "quota": {"type": "string", "description": "the quota that would be exceeded"},
        "tenant": {"type": "string", "description": "the tenant whose quota it is"},
        "part": {"type": "string", "description": "the readiness check that fails"},
        "parts": {"type": "object", "description": "the result of every readiness check"},
    },
}
#: What parameters accept whose schemas do not say it in words that suit a client.
_PARAMETER_ACCEPTS = {
    "key_id": "the id of a key: 12 hex digits",
    "search_id": "the id of a search",
    "search": "the id of a search",
    "task": "the name of a task, or name@fingerprint",
    "tenant": "the name of a tenant: 1 to 64 of letters, digits, . _ -",
    "x-tenant": "the name of a tenant: 1 to 64 of letters, digits, . _ -",
    "idempotency-key": "1 to 255 visible ASCII characters, without spaces",
    "last-event-id": "the id of an event",
    "cursor": "the `next` of an earlier page",
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
    """One problem document; every 503 says when to try again."""
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    body = {"type": f"urn:einsum-nas:{kind}", "title": title, "status": status, "detail": detail}
    # such as a secret that was sent where an id belongs
    texts = {k: masked(v)[:_LONGEST] for k, v in {**body, **extra}.items() if isinstance(v, str)}
    return JSONResponse({**body, **extra, **texts}, status, headers, media_type=PROBLEM_JSON)


def route_of(scope: Scope) -> str:
    """The template of the route that serves a request, such as ``/v1/searches/{search_id}``."""
    return str(getattr(scope.get("route"), "path", "none"))


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses=` of a route for the OpenAPI document."""
    content = {PROBLEM_JSON: {"schema": PROBLEM_SCHEMA}}
    schema = {"type": "integer", "minimum": 0}
    seconds = {"description": "seconds until the client may try again", "schema": schema}
    later = {"headers": {"Retry-After": seconds}}
    return {
        s: {"description": _MEANINGS[s], "content": content} | (later if s in (429, 503) else {})
        for s in statuses
    }


def refusals(
    *statuses: int, rules: Mapping[str, str] | None = None
) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that reads the store, with 422 and 503 besides those named.

    Parameters
    ----------
    rules
        Values refused although they fit the route's schemas: `field` of the problem → the rule.
    """
    found = responses(*sorted({*statuses, 422, 503}))
    found[422]["x-rules"] = dict(rules or {})
    return found


_MEANINGS = {
    400: "Not a request for this service",
    401: "No usable key",
    403: "Not allowed",
    404: "Not found",
    409: "Not possible in the present state",
    413: "The body is too long",
    415: "The body is not JSON in UTF-8",
    422: "A field, parameter or header is invalid; `field` names it, `accepted` says what is valid",
    429: "Too many requests, or a quota is used up",
    503: "The database is unavailable; try again later",
}
#: Statuses of every route that reads a body.
OF_BODIES = (413, 415, 422)


def _invalid(_request: Request, error: InvalidInput) -> JSONResponse:
    return problem(
        422, "invalid-input", "Invalid input", str(error),
        field=echo(error.field), value=error.value, accepted=error.accepted,
    )  # fmt: skip


def _invalid_parameter(request: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    # a location is (where, name, …); the rest names the types that were tried
    field = str(first["loc"][1]) if len(first["loc"]) > 1 else "request"
    given = "nothing" if first["type"] == "missing" else echo(first.get("input"))
    told = first["msg"].removeprefix("Value error, ")
    accepted = _PARAMETER_ACCEPTS.get(field.lower()) or _in_words(request, field) or told
    return _invalid(request, InvalidInput(field, given, accepted))


def _in_words(request: Request, field: str) -> str | None:
    """What a parameter accepts, by the route's schema of it."""
    paths: dict[str, Any] = request.app.openapi()["paths"]
    operation = paths.get(route_of(request.scope), {}).get(request.method.lower(), {})
    schemas = {p["name"].lower(): p["schema"] for p in operation.get("parameters", ())}
    return in_words(schemas[field.lower()]) if field.lower() in schemas else None


def _quota(_request: Request, error: QuotaExceeded) -> JSONResponse:
    return problem(
        429, "quota-exceeded", "Quota exceeded", str(error), quota=error.quota, tenant=error.tenant
    )


def _not_permitted(request: Request, error: NotPermitted) -> JSONResponse:
    request.state.refusal = str(error)  # the reason in the audit log
    return problem(403, "not-allowed", "Not allowed", str(error))


def _telling(status: int, kind: str, title: str) -> Callable[[Request, Exception], JSONResponse]:
    """A handler of errors whose text is the detail of the problem."""
    return lambda _request, error: problem(status, kind, title, str(error))


def _idempotency(_request: Request, error: Exception) -> JSONResponse:
    return problem(422, "idempotency-conflict", "Idempotency-Key used before", echo(str(error)))


def unavailable(request: Request, error: StoreUnavailable) -> JSONResponse:
    request.app.state.readiness.doubt()
    what = f"{echo(request.method)} {route_of(request.scope)} refused with 503"
    if not isinstance(error, DatabaseTrouble):
        _log.error("%s: %s", what, error)
        detail = "the database is unavailable"
        return problem(503, "unavailable", "Service unavailable", detail)
    _log.error("%s: %s: %s", what, error, error.advice)
    detail = f"the database is unavailable: {error.finding}; try again later"
    return problem(503, "unavailable", "Service unavailable", detail, reason=error.kind)


def _http(request: Request, error: HTTPException) -> JSONResponse:
    title = HTTPStatus(error.status_code).phrase
    response = problem(error.status_code, "http", title, str(error.detail))
    response.headers.update(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = ", ".join(_methods(request))
        response.headers["Allow"] = allowed or response.headers["Allow"]
    return response


def _methods(request: Request) -> list[str]:
    """The documented methods of a path; the framework's own list has one route's methods only."""
    paths = request.app.openapi()["paths"]
    at = [path for path in paths if compile_path(path)[0].match(path_of(request.scope))]
    # a fixed path takes precedence over a path with parameters that matches, too
    found = min(at, key=lambda path: path.count("{"), default=None)
    return [method.upper() for method in paths.get(found, ())]


def unexpected(request: Request, error: Exception) -> JSONResponse:
    """500 for an unexpected error, which is logged in full."""
    _log.error("%s %s failed", echo(request.method), route_of(request.scope), exc_info=error)
    detail = "an error of this service; its log has the details"
    return problem(500, "internal", "Internal error", detail)


#: Of an application's errors; the most specific class wins.
HANDLERS: dict[int | type[Exception], Callable[[Request, Any], Any]] = {
    InvalidInput: _invalid,
    RequestValidationError: _invalid_parameter,
    NotAllowed: _telling(403, "not-allowed", "Not allowed"),
    NotPermitted: _not_permitted,
    NotFound: _telling(404, "not-found", "Not found"),
    IdempotencyConflict: _idempotency,
    Conflict: _telling(409, "conflict", "Conflict"),
    LeaseLost: _telling(409, "lease-lost", "The lease was lost"),
    QuotaExceeded: _quota,
    StoreUnavailable: unavailable,
    HTTPException: _http,
    # nobody reads it: the connection ended before the request was complete
    ClientDisconnect: lambda _request, _error: Response(status_code=400),
    Exception: unexpected,
}
