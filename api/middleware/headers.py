"""Security headers of responses: what a page may load and do, and who may cache or frame it."""

from __future__ import annotations

from fastapi import FastAPI
from secure import Secure
from secure.headers import (
    CacheControl,
    ContentSecurityPolicy,
    CrossOriginOpenerPolicy,
    CrossOriginResourcePolicy,
    PermissionsPolicy,
    ReferrerPolicy,
    StrictTransportSecurity,
    XContentTypeOptions,
    XFrameOptions,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_Headers = tuple[tuple[bytes, bytes], ...]
_YEAR_SECONDS = 365 * 86400
#: Browser features that pages may not use, because none needs them.
_NOT_NEEDED = (
    "accelerometer", "camera", "display-capture", "geolocation", "gyroscope", "magnetometer",
    "microphone", "midi", "payment", "usb",
)  # fmt: skip


def install(app: FastAPI) -> None:
    """Wrap the whole application, so that every response has the headers.

    `add_middleware` would put it inside of the framework's own middleware, which answers some
    requests itself: bodies that are too large, and errors that nothing else has caught.
    """
    build = app.build_middleware_stack

    def build_inside() -> ASGIApp:
        return SecurityHeaders(build())

    app.build_middleware_stack = build_inside  # type: ignore[method-assign]


def _nothing() -> ContentSecurityPolicy:
    """The policy of all but pages: a browser that shows one as a page lets it do nothing."""
    return ContentSecurityPolicy().default_src("'none'").frame_ancestors("'none'")


def _page() -> ContentSecurityPolicy:
    """The policy of pages: they load scripts and styles from this service only."""
    return (
        ContentSecurityPolicy()
        .default_src("'none'")
        .script_src("'self'")
        .style_src("'self'")
        .img_src("'self'", "blob:")  # blob: a figure on its way to a PNG
        .connect_src("'self'")
        .form_action("'self'")
        .frame_ancestors("'none'")
        .base_uri("'none'")
        .require_trusted_types_for("'script'")
        .trusted_types("default")  # that of static/plotly-setup.js
    )


def _built(csp: ContentSecurityPolicy, referrer: ReferrerPolicy) -> _Headers:
    permissions = PermissionsPolicy()
    for feature in _NOT_NEEDED:
        permissions.add_directive(feature)
    built = Secure(
        csp=csp,
        referrer=referrer,
        permissions=permissions,
        coop=CrossOriginOpenerPolicy().same_origin(),
        corp=CrossOriginResourcePolicy().same_origin(),
        xcto=XContentTypeOptions().nosniff(),
        xfo=XFrameOptions().deny(),
    )
    items = built.allowlist_headers().deduplicate_headers().header_items()
    return tuple((name.lower().encode(), value.encode()) for name, value in items)


def _value(header: CacheControl | StrictTransportSecurity) -> bytes:
    return header.header_value.encode()


# pages do not have `no_referrer`: it makes browsers send `Origin: null` with the pages' own forms
_OF_PAGES = _built(_page(), ReferrerPolicy().same_origin())
_OF_OTHERS = _built(_nothing(), ReferrerPolicy().no_referrer())
_HTTPS_ONLY = _value(StrictTransportSecurity().max_age(_YEAR_SECONDS))
_NOT_KEPT = _value(CacheControl().no_store())
#: Headers that only this module sets; those of the application are dropped.
_OWN = frozenset((b"server", b"strict-transport-security", *(name for name, _ in _OF_PAGES)))


class SecurityHeaders:
    """Adds the headers when a response begins, so that streams are not delayed."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

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
        headers.append((b"strict-transport-security", _HTTPS_ONLY))
    if b"cache-control" not in named:
        headers.append((b"cache-control", _NOT_KEPT))
    return headers
