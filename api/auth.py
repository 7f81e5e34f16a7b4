"""Who asks, whether they may, and how often: before anything else of a request is looked at."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, HTTPException, Request
from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.audit import Line, Trail
from api.looks import Looks
from api.problems import problem, responses, unavailable
from api.rates import Rates, network_of
from nas.errors import InvalidInput, StoreUnavailable
from nas.settings import Settings
from nas.store import Store
from nas.store.keys import SCOPES, Found, Key, Keys, digest_of

_log = logging.getLogger(__name__)
COOKIE = "einsum_nas_session"
#: Open to anyone: what says nothing of anyone.
OPEN = frozenset(("/healthz", "/readyz", "/openapi.json", "/login"))
_OPEN_FOLDER = "/static/"
#: Of the service and all its tenants.
ADMIN = frozenset(("/metrics", "/v1/workers", "/v1/audit"))
#: Posts that change nothing.
_READING_POSTS = frozenset(("/v1/searches/preview",))
_READING = frozenset(("GET", "HEAD", "OPTIONS"))
_REMEMBERED = 4096
#: Seconds between two notes that a key is used, and notes under way.
_USED_SECONDS, _MOST_NOTING = 3600.0, 64
_HOW = (
    "send it as Authorization: Bearer; `einsum-nas keys create` on the service's machine makes one"
)
_ELSEWHERE = "this service has no access control and answers on loopback only"
_FOREIGN = "requests from pages of other sites are refused"
_KINDS = {
    401: ("key-needed", "No usable key"),
    403: ("not-allowed", "Not allowed"),
    404: ("not-found", "Not found"),
    429: ("too-many-requests", "Too many requests"),
}


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: a key, or whoever this machine belongs to."""

    #: None for whoever this machine belongs to, who names one or takes the default
    tenant: str | None = None
    key_id: str | None = None
    key_name: str | None = None
    scopes: tuple[str, ...] = SCOPES


OWNER = Caller()


def scope_of(method: str, path: str) -> str | None:
    """The scope that a request needs; None for one that is open to anyone."""
    if path in OPEN or path.startswith(_OPEN_FOLDER):
        return None
    if path in ADMIN:
        return "admin"
    return "read" if method in _READING or path in _READING_POSTS else "submit"


def is_loopback(address: str) -> bool:
    """Whether an address, or `localhost`, is reached from this machine only."""
    try:
        return ipaddress.ip_address(address.strip("[]").partition("%")[0]).is_loopback
    except ValueError:
        return address == "localhost"


async def for_operators(request: Request) -> None:
    """A dependency: once more, by the route that was met, what was decided by the path before."""
    caller: Caller = request.state.caller
    if "admin" not in caller.scopes:
        raise HTTPException(403, "this needs a key with scope admin")


def refuse_keyless(settings: Settings, address: str) -> None:
    """Raise for an address that others can reach where no key would let anyone in.

    A database that is away says nothing about keys: then the service starts, and stays shut.

    Raises
    ------
    InvalidInput
        Naming the address, and how a key is made.
    """
    if is_loopback(address):
        return
    store = Store(settings.resolved_database_url)
    try:
        if Keys(store).any_usable():
            return
    except StoreUnavailable as error:
        _log.warning("no key can be looked for yet: %s", error)
        return
    finally:
        store.close()
    raise InvalidInput(
        "host", address,
        "a loopback address (127.0.0.1, ::1, localhost) as long as there is no API key; for any "
        "other make one first: einsum-nas keys create --name NAME",
    )  # fmt: skip


def install(app: FastAPI, settings: Settings, *, access_control: bool) -> None:
    """Let nobody past without a key, or, without access control, nobody but this machine."""
    app.state.rates = rates = Rates(settings)
    app.add_middleware(Access, settings=settings, rates=rates, access_control=access_control)


def document(app: FastAPI, *, access_control: bool) -> None:
    """Say in the OpenAPI document what key each operation needs, and how it is refused."""
    described = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = described()
            if access_control:
                schemes = found.setdefault("components", {}).setdefault("securitySchemes", {})
                schemes["key"] = {
                    "type": "http", "scheme": "bearer",
                    "description": "An API key: `einsum-nas keys create` makes one.",
                }  # fmt: skip
            for path, operations in found["paths"].items():
                for method, operation in operations.items():
                    _document(operation, scope_of(method.upper(), path), access_control)
        return described()

    app.openapi = openapi  # type: ignore[method-assign]


def _document(operation: dict[str, Any], needed: str | None, access_control: bool) -> None:
    if needed is not None and access_control:
        operation["security"] = [{"key": []}]
        operation["description"] = (
            operation.get("description", "") + f"\n\nNeeds a key with scope `{needed}`."
        ).strip()
    refusals = (401, 403, 429) if needed is not None and access_control else (403, 429)
    for status, described in responses(*refusals).items():
        operation["responses"].setdefault(str(status), described)


class Access:
    """Rates, keys, scopes and origins, and the audit log of what came of it."""

    def __init__(
        self, app: ASGIApp, *, settings: Settings, rates: Rates, access_control: bool
    ) -> None:
        self._app, self._on = app, access_control
        self._origins = frozenset(settings.allowed_origins)
        self._rates = rates
        #: digest → key that it was found to be, for counting only
        self._known: OrderedDict[str, str] = OrderedDict()
        self._keys: Looks[Found] | None = None
        self._trail: Trail | None = None
        #: key → when its use was written down, by this process's clock
        self._noted: dict[str, float] = {}
        self._noting: set[asyncio.Task[None]] = set()
        self._noter = CapacityLimiter(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            asked = Asked.of(scope)
            refusal = await self._refusal(asked, scope)
            if refusal is not None:
                await refusal(scope, receive, send)
            elif self._on and (asked.caller is not None or asked.changes):
                await self._traced(asked, scope, receive, send)
            else:
                await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close"})  # there are none here
        else:
            await self._app(scope, receive, send)

    async def _refusal(self, asked: Asked, scope: Scope) -> Response | None:
        """Why the request goes no further; None if it does, and then it is known who asks."""
        wait = self._over(asked)
        if wait is not None:
            return await self._refused(asked, scope, 429, f"too many requests; in {wait} s again",
                                       {"Retry-After": str(wait)})  # fmt: skip
        if not asked.path.isprintable():
            # a router may take it for the route without what cannot be seen, and we would not
            return await self._refused(asked, scope, 404, "no route has such a path")
        if not self._on and not is_loopback(asked.server):
            return await self._refused(asked, scope, 403, _ELSEWHERE)
        if asked.changes and self._is_foreign(asked):
            return await self._refused(asked, scope, 403, _FOREIGN)
        if not self._on:
            asked.caller = OWNER
        elif not scope["app"].state.readiness.opened and scope_of(asked.method, asked.path):
            return unavailable(Request(scope), StoreUnavailable("its schema is not there yet"))
        else:
            try:
                refusal = await self._unknown(asked, scope)
            except StoreUnavailable as error:
                return unavailable(Request(scope), error)
            if refusal is not None:
                return refusal
        scope.setdefault("state", {})["caller"] = asked.caller
        return None

    def _over(self, asked: Asked) -> int | None:
        """Seconds until the request may be made, if it may not now."""
        known = None if asked.digest is None else self._known.get(asked.digest)
        who = f"address {asked.network}" if known is None else f"key {known}"
        asked.counted_as = who
        wait = self._rates.spend("request", who)
        if wait is None and asked.method not in _READING:  # previews take their time, too
            wait = self._rates.spend("submit", who)
        return wait

    def _is_foreign(self, asked: Asked) -> bool:
        """Whether a page of another site asks; programs send no Origin, and no cookie."""
        if asked.origin is None:
            return asked.by_cookie
        if asked.origin in self._origins:
            return asked.by_cookie
        return asked.origin.partition("://")[2] != asked.host

    async def _unknown(self, asked: Asked, scope: Scope) -> Response | None:
        """Why the caller may not ask this, after finding out who that is."""
        needed = scope_of(asked.method, asked.path)
        if needed is None and not asked.is_page:
            return None
        if asked.digest is not None:
            found = await self._find(scope, asked.digest)
            if found.key is not None and found.refusal is None:
                key = found.key
                asked.caller = Caller(key.tenant, key.parent or key.id, key.name, key.scopes)
                self._watch(scope, asked.digest)
            elif needed is not None:
                asked.key_id = None if found.key is None else found.key.id
                return await self._refused(asked, scope, 401, f"this key is {found.refusal}")
        if needed is None:
            return None
        if asked.caller is None:
            why = "this is no key" if asked.credential else "a key is needed"
            return await self._refused(asked, scope, 401, why, how=_HOW)
        if asked.path != "/logout" and needed not in asked.caller.scopes:
            has = ", ".join(asked.caller.scopes)
            why = f"this needs a key with scope {needed}; this one has {has}"
            return await self._refused(asked, scope, 403, why)
        if asked.tenant not in (None, asked.caller.tenant):
            why = f"X-Tenant: this key is of tenant {asked.caller.tenant}; leave it out"
            return await self._refused(asked, scope, 403, why)
        return None

    async def _find(self, scope: Scope, digest: str) -> Found:
        if self._keys is None:
            self._keys = Looks(Keys(scope["app"].state.store).find)
        found = await self._keys.get(digest) or Found(None, "unknown")
        if found.key is not None and found.refusal is None:
            self._known[digest] = found.key.parent or found.key.id
            self._known.move_to_end(digest)
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
            self._note_use(scope["app"].state.store, found.key)
        else:
            self._known.pop(digest, None)
        return found

    def _note_use(self, store: Store, key: Key) -> None:
        """Write down that a key is used, now and then, and while the request goes on."""
        last = max(key.used_at or 0.0, self._noted.get(key.id, 0.0))
        if time.time() - last < _USED_SECONDS or len(self._noting) >= _MOST_NOTING:
            return
        if len(self._noted) >= _REMEMBERED:
            self._noted.clear()
        self._noted[key.id] = time.time()

        async def note() -> None:
            with suppress(StoreUnavailable):
                await to_thread.run_sync(Keys(store).note_use, key, limiter=self._noter)

        task = asyncio.create_task(note())
        self._noting.add(task)
        task.add_done_callback(self._noting.discard)

    def _watch(self, scope: Scope, digest: str) -> None:
        """Let an answer that goes on for long ask again whether it may."""

        async def still_welcome() -> bool:
            return (await self._find(scope, digest)).refusal is None

        scope.setdefault("state", {})["still_welcome"] = still_welcome

    async def _refused(
        self, asked: Asked, scope: Scope, status: int, why: str,
        headers: dict[str, str] | None = None, how: str = "",
    ) -> Response:  # fmt: skip
        if self._on:
            await self._note(asked, scope, status, why)
        if status == 401 and asked.is_page:
            return RedirectResponse(f"/login?next={quote(asked.path)}", 303)
        kind, title = _KINDS[status]
        given = {"WWW-Authenticate": "Bearer"} if status == 401 else headers
        return problem(status, kind, title, f"{why}: {how}" if how else why, headers=given)

    async def _note(self, asked: Asked, scope: Scope, status: int, why: str | None) -> None:
        if self._trail is None:
            self._trail = Trail(scope["app"].state.store, self._rates)
        caller = asked.caller
        await self._trail.note(
            Line(
                asked.method, asked.path, status, why, asked.address, asked.counted_as,
                None if caller is None else caller.tenant,
                asked.key_id if caller is None else caller.key_id,
            )
        )  # fmt: skip

    async def _traced(self, asked: Asked, scope: Scope, receive: Receive, send: Send) -> None:
        """The answer, of which the audit log has told before it begins."""

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                status = int(message["status"])
                hidden = "not there, or another tenant's" if status == 404 else None
                signed_in = asked.path == "/login" and status < 400  # which is told by itself
                if hidden or (asked.changes and not signed_in):
                    await self._note(asked, scope, status, hidden)
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception:
            if asked.changes:  # answered outside of here
                await self._note(asked, scope, 500, "an error of this service")
            raise


@dataclass(slots=True)
class Asked:
    """What of a request decides whether it may be."""

    method: str
    path: str
    #: whence it came, and what of that is counted as one
    address: str
    network: str
    #: where it arrived
    server: str
    host: str
    origin: str | None
    tenant: str | None
    #: what was shown as a key, whether or not it can be one
    credential: bool
    by_cookie: bool
    digest: str | None
    #: whether a browser asks for a page
    is_page: bool
    caller: Caller | None = None
    #: of a key that is known, but opens nothing
    key_id: str | None = None
    counted_as: str = ""

    @classmethod
    def of(cls, scope: Scope) -> Asked:
        headers = Headers(scope=scope)
        shown = headers.get("authorization")
        cookie = None if shown is not None else _cookie(headers.get("cookie"))
        secret = cookie if shown is None else _bearer(shown)
        address = str((scope.get("client") or ("unknown",))[0])
        path, method = str(scope["path"]), str(scope["method"])
        wants_page = method == "GET" and "text/html" in headers.get("accept", "")
        return cls(
            method, path, address, network_of(address),
            str((scope.get("server") or ("unknown",))[0]), headers.get("host", ""),
            headers.get("origin"), headers.get("x-tenant"),
            shown is not None or cookie is not None, cookie is not None,
            None if secret is None else digest_of(secret),
            wants_page and not path.startswith("/v1/"),
        )  # fmt: skip

    @property
    def changes(self) -> bool:
        """Whether it may change anything."""
        return self.method not in _READING and self.path not in _READING_POSTS


def _bearer(value: str) -> str | None:
    scheme, _, secret = value.partition(" ")
    return secret.strip() if scheme.lower() == "bearer" else None


def _cookie(value: str | None) -> str | None:
    return None if value is None else cookie_parser(value).get(COOKIE)
