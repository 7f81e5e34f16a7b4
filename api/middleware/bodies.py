"""Strict parsing of requests: JSON bodies, query strings, paths and headers.

What is ambiguous is refused, not guessed: two values of one field, a parameter that does not exist,
text that is not valid Unicode, NaN and infinities.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from email.message import Message
from typing import Any
from urllib.parse import unquote_to_bytes

from fastapi import HTTPException, Request
from fastapi.dependencies.utils import get_flat_params
from fastapi.params import Query
from fastapi.routing import APIRoute
from pydantic import BeforeValidator
from pydantic.json_schema import SkipJsonSchema
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from api.problems import problem
from nas.errors import InvalidInput, echo

#: Largest request body, bytes.
MAX_BODY = 64 * 1024
#: Deepest nesting of objects and lists in a body.
MAX_DEPTH = 16
#: Largest whole number that is read as an integer; larger ones are read as floats.
_MAX_WHOLE = 2**63 - 1
_JSON = "application/json"
#: Databases and file systems do not accept NUL, and UTF-8 has no lone surrogates.
_UNUSABLE = re.compile("[\x00\ud800-\udfff]")
#: Headers that this service reads, each of which may be given once.
_ONCE = ("Content-Type", "Idempotency-Key", "Last-Event-ID", "X-Tenant", "Authorization")
TOO_LARGE = f"a body of at most {MAX_BODY} bytes is accepted"


class BodyLimit:
    """Middleware that answers 413 for a body whose Content-Length is too large, on any route.

    Without a Content-Length, reading the body fails beyond the limit.  `FastAPI(max_body_size=)`
    would answer outside of every middleware, and as plain text.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = RequestBodyLimitMiddleware(app, MAX_BODY)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            lengths = [value for name, value in scope["headers"] if name == b"content-length"]
            # digits only: the server has parsed the length already
            if any(len(n) > 18 or int(n) > MAX_BODY for n in lengths):
                answer = problem(413, "http", "Content Too Large", TOO_LARGE)
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def read_json(request: Request) -> Any:
    """The body as plain values.

    Raises
    ------
    HTTPException
        415 if it is not JSON in UTF-8, 413 if it is too long.
    InvalidInput
        It is missing, not JSON, or ambiguous.
    """
    body = await request.body()
    if not body:
        raise InvalidInput("body", "nothing", "a JSON object")
    _check_type(request.headers.get("content-type"))
    return parse_json(body)


async def read_json_if_any(request: Request) -> Any:
    """The body as plain values, or an empty object if there is none; raises as `read_json`."""
    return await read_json(request) if await request.body() else {}


def _check_type(given: str | None) -> None:
    message = Message()
    message["content-type"] = given or ""
    charset = message.get_content_charset("utf-8")
    if message.get_content_type() != _JSON or charset not in ("utf-8", "utf8"):
        raise HTTPException(
            415, f"Content-Type: got {echo(given or 'nothing')}; accepted: {_JSON}, in UTF-8"
        )


def parse_json(body: bytes) -> Any:
    """JSON as plain values: finite numbers, usable text, each field once, `MAX_DEPTH` levels.

    >>> parse_json(b'{"trials": 4, "train_flops": 3e11}')
    {'trials': 4, 'train_flops': 300000000000.0}

    Raises
    ------
    InvalidInput
        Names the field, or ``body``.
    """
    try:
        values = json.loads(
            body.decode(),
            object_pairs_hook=_each_once,
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=_no_number,
        )
    except UnicodeDecodeError as error:
        shown = body[:100].decode(errors="backslashreplace")
        raise InvalidInput("body", shown, f"UTF-8, which byte {error.start} is not") from None
    except json.JSONDecodeError as error:
        shown = body[:100].decode(errors="backslashreplace")
        accepted = f"one JSON object; at character {error.pos}: {error.msg}"
        raise InvalidInput("body", shown, accepted) from None
    except RecursionError:
        raise _too_deep() from None
    _check(values, "body", 1)
    return values


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise InvalidInput(echo(twice), "two values", "each field once")
    return values


def _whole(text: str) -> int | float:
    # some programs write 1e20 as an integer, and budgets may be that large
    number = int(text) if len(text) <= 20 else _finite(text)
    return number if abs(number) <= _MAX_WHOLE else float(number)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _no_number(text)
    return number


def _no_number(text: str) -> InvalidInput:
    raise InvalidInput("body", text, "finite numbers")


def _too_deep() -> InvalidInput:
    accepted = f"at most {MAX_DEPTH} levels of nested objects and lists"
    return InvalidInput("body", "JSON that is nested deeper", accepted)


def _check(value: Any, field: str, depth: int) -> None:
    """Raise `InvalidInput` for text that no database accepts, and for too deep nesting."""
    if isinstance(value, str):
        if _UNUSABLE.search(value):
            raise InvalidInput(field, value, "text without NUL and lone surrogates")
    elif isinstance(value, (dict, list)):
        if depth > MAX_DEPTH:
            raise _too_deep()
        items = value.items() if isinstance(value, dict) else ((field, v) for v in value)
        for name, inner in items:
            _check(name, "body", depth)
            _check(inner, echo(name), depth + 1)


async def read_strictly(request: Request) -> None:
    """A dependency that refuses query parameters, paths, headers and bodies unknown to the route.

    Raises
    ------
    InvalidInput
        A parameter that does not exist or is given twice, text that is no UTF-8 or holds NUL, a
        header given twice, a body where none is read.
    """
    _check_text("query", request.scope["query_string"])
    _check_text("path", request.scope.get("raw_path") or b"")
    route = request.scope["route"]
    assert isinstance(route, APIRoute)
    parameters = get_flat_params(route.dependant)
    known = [p.alias for p in parameters if isinstance(p.field_info, Query)]
    given = Counter(name for name, _ in request.query_params.multi_items())
    for name, times in given.items():
        if name not in known:
            accepted = f"only {', '.join(known)}" if known else "no parameters"
            raise InvalidInput("query", name, accepted)
        if times > 1:
            raise InvalidInput(name, f"{times} values", "one value")
    for name in _ONCE:
        if len(values := request.headers.getlist(name)) > 1:
            raise InvalidInput(name, f"{len(values)} values", "one value")
    if "requestBody" not in (route.openapi_extra or {}) and _has_body(request):
        raise InvalidInput("body", "a body", f"none: {request.method} {route.path} takes no body")


def _has_body(request: Request) -> bool:
    length = request.headers.get("content-length", "0")
    return length.strip("0") != "" or "transfer-encoding" in request.headers


def _check_text(field: str, quoted: bytes) -> None:
    raw = unquote_to_bytes(quoted)
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        shown = raw.decode(errors="backslashreplace")
        raise InvalidInput(field, shown, "percent-encoded UTF-8") from None
    if "\x00" in text:
        raise InvalidInput(field, text, "text without NUL")


def _in_digits(pattern: str, accepted: str) -> BeforeValidator:
    """Accept one notation of numbers only: programs differ in how they read the others."""
    written = re.compile(pattern, re.ASCII)

    def check(given: Any) -> Any:
        if isinstance(given, str) and not written.fullmatch(given):
            raise ValueError(accepted)
        return given

    return BeforeValidator(check)


#: Behind the limits of a number in a query, a path or a header, so that the document names them.
WHOLE = _in_digits(r"-?(0|[1-9]\d{0,19})", "a whole number in digits")
REAL = _in_digits(r"-?(0|[1-9]\d{0,400})(\.\d{1,400})?([eE][+-]?\d{1,4})?", "a finite number")
#: What an optional parameter is without being sent; null cannot be.
Absent = SkipJsonSchema[None]
