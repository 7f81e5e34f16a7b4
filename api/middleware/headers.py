"""Security headers of responses: what a page may load and do, and who may cache or frame it."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Browser features that pages may not use, because none needs them.
_NOT_NEEDED = (
    "accelerometer", "camera", "display-capture", "geolocation", "gyroscope", "magnetometer",
    "microphone", "midi", "payment", "usb",
)  # fmt: skip
#: Pages load scripts and styles from this service only.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob:; "  # blob: a figure on its way to a PNG
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'; "
    "require-trusted-types-for 'script'; trusted-types default"  # that of static/plotly-setup.js
)


def _headers(policy: str, referrer: str) -> tuple[tuple[bytes, bytes], ...]:
    values = {
        "content-security-policy": policy,
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "permissions-policy": ", ".join(f"{feature}=()" for feature in _NOT_NEEDED),
        "referrer-policy": referrer,
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
    }
    return tuple((name.encode(), value.encode()) for name, value in values.items())


# pages do not have `no-referrer`: it makes browsers send `Origin: null` with the pages' own forms
_OF_PAGES = _headers(_PAGE_POLICY, "same-origin")
#: A browser that shows anything else as a page lets it do nothing.
_OF_OTHERS = _headers("default-src 'none'; frame-ancestors 'none'", "no-referrer")
#: Headers that only this module sets; those of the application are dropped.
_OWN = frozenset((b"server", b"strict-transport-security", *(name for name, _ in _OF_PAGES)))


def install(app: FastAPI) -> None:
    """Wrap the whole application, so that every response has the headers.

    `add_middleware` would put it inside of the framework's own middleware, which answers some
    requests itself: bodies that are too large, and errors that nothing else has caught.
    """
    build = app.build_middleware_stack
    app.build_middleware_stack = lambda: SecurityHeaders(build())  # type: ignore[method-assign]


class SecurityHeaders:
    """Adds the headers when a response begins, so that streams are not delayed."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = _all_headers(scope, message)
            await send(message)

        await self._app(scope, receive, with_headers)


def _all_headers(scope: Scope, start: Message) -> list[tuple[bytes, bytes]]:
    given = [(name.lower(), value) for name, value in start.get("headers", ())]
    named = dict(given)
    kind = named.get(b"content-type", b"").partition(b";")[0].strip().lower()
    headers = [(name, value) for name, value in given if name not in _OWN]
    headers += _OF_PAGES if kind == b"text/html" else _OF_OTHERS
    if scope.get("scheme") == "https":
        headers.append((b"strict-transport-security", b"max-age=31536000"))  # a year
    if b"cache-control" not in named:
        headers.append((b"cache-control", b"no-store"))
    return headers
