"""Authentication and rate limits, checked before anything else of a request.

What an authenticated caller may do stands at the routes; see `api.declared`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import closing, suppress
from functools import partial
from typing import Any
from urllib.parse import quote

from anyio import CapacityLimiter, to_thread
from cachetools import LRUCache, TTLCache
from fastapi import FastAPI, Request
from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.caching.coalescing import Coalescer
from api.declared import OWNER, Caller, declared_of
from api.limits.rates import Rates, network_of
from api.middleware.audit import AuditTrail
from api.middleware.prefix import path_of, root_of
from api.problems import problem, responses, unavailable
from nas.errors import InvalidInput, StoreUnavailable
from nas.settings import Settings, is_loopback
from nas.store import Store
from nas.store.keys import Found, Key, Keys, digest_of

_log = logging.getLogger(__name__)
COOKIE = "einsum_nas_session"
_READING = frozenset(("GET", "HEAD", "OPTIONS"))
_REMEMBERED = 4096
#: Seconds between two updates of a key's time of last use, and such updates at once.
_USED_SECONDS, _MOST_NOTING = 3600.0, 64
_HOW = (
    "send it as Authorization: Bearer KEY; `einsum-nas keys create` on the service's machine "
    "creates one"
)
_ELSEWHERE = "this service has no access control, so it answers requests to loopback only"
_FOREIGN = "requests from pages of other sites are refused"
_KINDS = {
    401: ("key-needed", "No usable key"),
    403: ("not-allowed", "Not allowed"),
    404: ("not-found", "Not found"),
    429: ("too-many-requests", "Too many requests"),
}


def refuse_keyless(settings: Settings, address: str) -> None:
    """Refuse to listen on an address that others can reach while no usable key exists.

    Where the database cannot be reached, the service starts, and refuses requests until it can.

    Raises
    ------
    InvalidInput
        There is no usable key.  The message names the address, and how a key is made.
    """
    if is_loopback(address):
        return
    try:
        with closing(Store(settings.resolved_database_url)) as store:
            if Keys(store).any_usable():
                return
    except StoreUnavailable as error:
        _log.warning("cannot check yet whether a key exists: %s", error)
        return
    raise InvalidInput(
        "host", address,
        "a loopback address (127.0.0.1, ::1, localhost) as long as there is no API key; for "
        "another address create a key first: einsum-nas keys create --name NAME",
    )  # fmt: skip


def document(app: FastAPI, *, access_control: bool) -> None:
    """Add to the OpenAPI document which key each operation needs, and how it is refused."""
    described = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = described()
            if not access_control:
                found["components"].pop("securitySchemes")
            for route, declared in app.state.declarations:
                for method, operation in found["paths"].get(route.path, {}).items():
                    if method.upper() in route.methods:
                        _document(operation, declared.scopes if access_control else None)
                        if not access_control:
                            operation.pop("security", None)
        return described()

    app.openapi = openapi  # type: ignore[method-assign]


def _document(operation: dict[str, Any], needed: tuple[str, ...] | None) -> None:
    refusals = [403, 429]
    if needed is not None:
        refusals.insert(0, 401)
        described = operation.get("description", "")
        why = f"Needs a key with scope `{', '.join(needed)}`."
        operation["description"] = f"{described}\n\n{why}".strip()
    for status, refused in responses(*refusals).items():
        operation["responses"].setdefault(str(status), refused)


class Access:
    """Middleware that checks rates, keys and origins, and writes the audit log.

    Without access control, it serves this machine only, and requires no key.
    """

    def __init__(
        self, app: ASGIApp, *, settings: Settings, rates: Rates, access_control: bool
    ) -> None:
        self._app, self._on = app, access_control
        self._origins = frozenset(settings.allowed_origins)
        self._rates = rates
        #: digest → id of its key, to count requests by key before the key is looked up
        self._known: LRUCache[str, str] = LRUCache(_REMEMBERED)
        self._keys: Coalescer[Found] | None = None
        self._trail: AuditTrail | None = None
        #: keys whose time of last use this process has just stored
        self._noted: TTLCache[str, None] = TTLCache(_REMEMBERED, _USED_SECONDS)
        self._noting: set[asyncio.Task[None]] = set()
        self._noter = CapacityLimiter(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            context = RequestContext(scope)
            refusal = await self._refusal(context, scope)
            if refusal is not None:
                await refusal(scope, receive, send)
            elif self._on and (
                context.caller is not None or context.changes or context.declared.audited
            ):
                await self._traced(context, scope, receive, send)
            else:
                await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close"})  # there are none here
        else:
            await self._app(scope, receive, send)

    async def _refusal(self, context: RequestContext, scope: Scope) -> Response | None:
        """The response to a request that is refused; None for one that may go on.

        Sets the caller of a request that may go on.
        """
        wait = self._over(context)
        if wait is not None:
            why, headers = f"too many requests; try again in {wait} s", {"Retry-After": str(wait)}
            return await self._refused(context, scope, 429, why, headers)
        if not context.path.isprintable():
            # a router may ignore characters that do not print, and then take another route
            return await self._refused(context, scope, 404, "no route has this path")
        if not self._on and not is_loopback(context.server):
            return await self._refused(context, scope, 403, _ELSEWHERE)
        if context.changes and self._is_foreign(context):
            return await self._refused(context, scope, 403, _FOREIGN)
        if not self._on:
            context.caller = OWNER
        elif not scope["app"].state.readiness.opened and context.declared.scopes is not None:
            return unavailable(Request(scope), StoreUnavailable("the schema is not there yet"))
        else:
            try:
                refusal = await self._unknown(context, scope)
            except StoreUnavailable as error:
                return unavailable(Request(scope), error)
            if refusal is not None:
                return refusal
        scope.setdefault("state", {})["caller"] = context.caller
        return None

    def _over(self, context: RequestContext) -> int | None:
        """Seconds until the request is within its rate; None if it is now."""
        known = None if context.digest is None else self._known.get(context.digest)
        who = f"address {context.network}" if known is None else f"key {known}"
        context.counted_as = who
        wait = self._rates.spend("request", who)
        if wait is None and context.method not in _READING:  # previews count: they take long, too
            wait = self._rates.spend("submit", who)
        return wait

    def _is_foreign(self, context: RequestContext) -> bool:
        """Whether a page of another site sent it; programs send neither an Origin nor a cookie."""
        if context.origin is None or context.origin in self._origins:
            return context.by_cookie
        return context.origin.partition("://")[2] != context.host

    async def _unknown(self, context: RequestContext, scope: Scope) -> Response | None:
        """Find the caller; the response to one who is unknown or names another tenant."""
        needs_key = context.declared.scopes is not None
        if not needs_key and not context.is_page:
            return None
        if context.digest is not None:
            found = await self._find(scope, context.digest)
            if found.key is not None and found.refusal is None:
                key = found.key
                context.caller = Caller(key.tenant, key.parent or key.id, key.name, key.scopes)
                # long responses ask again, from time to time, whether their key is still valid
                scope.setdefault("state", {})["still_welcome"] = partial(
                    self._is_welcome, scope, context.digest
                )
            elif needs_key:
                context.key_id = None if found.key is None else found.key.id
                return await self._refused(context, scope, 401, f"this key is {found.refusal}")
        if not needs_key:
            return None
        if context.caller is None:
            why = "this is not a key" if context.credential else "a key is needed"
            return await self._refused(context, scope, 401, why, how=_HOW)
        if context.tenant not in (None, context.caller.tenant):
            why = f"X-Tenant: this key is of tenant {context.caller.tenant}; leave it out"
            return await self._refused(context, scope, 403, why)
        return None

    async def _find(self, scope: Scope, digest: str) -> Found:
        if self._keys is None:
            self._keys = Coalescer(Keys(scope["app"].state.store).find)
        found = await self._keys.get(digest) or Found(None, "unknown")
        if found.key is not None and found.refusal is None:
            self._known[digest] = found.key.parent or found.key.id
            self._note_use(scope["app"].state.store, found.key)
        else:
            self._known.pop(digest, None)
        return found

    def _note_use(self, store: Store, key: Key) -> None:
        """Store a key's time of last use, at most once an hour, without delaying the request."""
        recent = key.id in self._noted or time.time() - (key.used_at or 0.0) < _USED_SECONDS
        if recent or len(self._noting) >= _MOST_NOTING:
            return
        self._noted[key.id] = None

        async def note() -> None:
            with suppress(StoreUnavailable):
                await to_thread.run_sync(Keys(store).note_use, key, limiter=self._noter)

        task = asyncio.create_task(note())
        self._noting.add(task)
        task.add_done_callback(self._noting.discard)

    async def _is_welcome(self, scope: Scope, digest: str) -> bool:
        return (await self._find(scope, digest)).refusal is None

    async def _refused(
        self, context: RequestContext, scope: Scope, status: int, why: str,
        headers: dict[str, str] | None = None, how: str = "",
    ) -> Response:  # fmt: skip
        if self._on:
            await self._note(context, scope, status, why)
        if status == 401 and context.is_page:
            root = root_of(scope)
            return RedirectResponse(f"{root}/login?next={quote(root + context.path)}", 303)
        kind, title = _KINDS[status]
        given = {"WWW-Authenticate": "Bearer"} if status == 401 else headers
        return problem(status, kind, title, f"{why}: {how}" if how else why, headers=given)

    async def _note(
        self, context: RequestContext, scope: Scope, status: int, why: str | None
    ) -> None:
        if self._trail is None:
            self._trail = AuditTrail(scope["app"].state.store, self._rates)
        caller = context.caller
        tenant, key_id = (caller.tenant, caller.key_id) if caller else (None, context.key_id)
        await self._trail.note(
            context.method, status, why, who=context.counted_as,
            target=context.path, address=context.address, tenant=tenant, key_id=key_id,
        )  # fmt: skip

    async def _traced(
        self, context: RequestContext, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Pass the request on, and write its audit record before the response begins."""

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                status = int(message["status"])
                hidden = "does not exist, or belongs to another tenant" if status == 404 else None
                reason = scope["state"].get("refusal", hidden)
                if reason or (context.changes and "signed_in" not in scope["state"]):
                    await self._note(context, scope, status, reason)
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception:
            if context.changes:  # its response is made outside of this middleware
                await self._note(context, scope, 500, "an error of this service")
            raise


class RequestContext:
    """The parts of a request that access control decides by."""

    def __init__(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        self.method, self.path, self.declared = scope["method"], path_of(scope), declared_of(scope)
        #: the client's, and the part of it that rates are counted by
        self.address = str((scope.get("client") or ("unknown",))[0])
        self.network = network_of(self.address)
        #: address that the request arrived at
        self.server = str((scope.get("server") or ("unknown",))[0])
        self.host, self.origin = headers.get("host", ""), headers.get("origin")
        self.tenant = headers.get("x-tenant")
        shown = headers.get("authorization")
        cookies = cookie_parser(headers.get("cookie", ""))
        cookie = cookies.get(COOKIE) if shown is None else None
        secret = cookie if shown is None else _bearer(shown)
        self.by_cookie = cookie is not None
        #: whether anything was sent as a key, valid or not
        self.credential = self.by_cookie or shown is not None
        self.digest = None if secret is None else digest_of(secret)
        wants_page = self.method == "GET" and "text/html" in headers.get("accept", "")
        #: whether a browser requests a page
        self.is_page = wants_page and not self.path.startswith("/v1/")
        self.caller: Caller | None = None
        #: of a key that exists, but is expired or revoked
        self.key_id: str | None = None
        self.counted_as = ""

    @property
    def changes(self) -> bool:
        """Whether the request may change something."""
        return self.method not in _READING and self.declared.scopes != ("read",)


def _bearer(value: str) -> str | None:
    scheme, _, secret = value.partition(" ")
    return secret.strip() if scheme.lower() == "bearer" else None
