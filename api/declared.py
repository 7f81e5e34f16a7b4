"""What a route declares besides its signature: who may use it, and how the service treats it.

Each route declares one permission: `PUBLIC`, `SIGNED_IN`, or a scope.  Middleware runs before a
route is chosen, so it looks up here what the route of a request declares.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from fastapi import Depends, FastAPI, Request, Security, params
from fastapi.routing import RouteContext, iter_route_contexts
from fastapi.security import HTTPBearer, SecurityScopes
from starlette.routing import Match, Mount
from starlette.types import Scope

from nas.store.keys import SCOPES

_FOUND = "einsum_nas.declared"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request: the holder of a key, or, without access control, the machine's user."""

    #: None for the machine's user, who names a tenant or takes the default
    tenant: str | None = None
    key_id: str | None = None
    key_name: str | None = None
    scopes: tuple[str, ...] = SCOPES


OWNER = Caller()


class NotAllowed(Exception):
    """The caller's key lacks the scope that the route needs."""


_key = HTTPBearer(
    scheme_name="key",
    description="An API key, created by `einsum-nas keys create`.",
    auto_error=False,
)


async def require(
    request: Request, needed: SecurityScopes, _in_document: Annotated[object, Depends(_key)]
) -> None:
    """A dependency that requires scopes of the caller, whom `api.auth` has found.

    Raises
    ------
    NotAllowed
        The caller lacks one.
    """
    caller: Caller = request.state.caller
    for scope in needed.scopes:
        if scope not in caller.scopes:
            has = ", ".join(caller.scopes)
            why = request.state.refusal = f"this needs a key with scope {scope}; this one has {has}"
            raise NotAllowed(why)


class _Mark:
    """A dependency that does nothing; each instance marks routes."""

    async def __call__(self) -> None: ...


READ, SUBMIT, ADMIN, KEYS = (Security(require, scopes=[scope]) for scope in SCOPES)
#: Any key, whatever its scopes.
SIGNED_IN = Security(require)
#: Open to anyone: the route reveals nothing about any tenant.
PUBLIC = Depends(_Mark())
#: What the route refuses is recorded in the audit log, although it needs no key.
AUDITED = Depends(_Mark())
#: Whatever supervises the service requests the route every few seconds: it is answered whatever
#: the state of the database, and is not in the access log.
PROBE = Depends(_Mark())
#: The route is answered whatever the state of the database.
WITHOUT_STORE = Depends(_Mark())


@dataclass(frozen=True, slots=True)
class Declared:
    """What the route of a request declares."""

    #: scopes that a key must have; None: no key is needed
    scopes: tuple[str, ...] | None
    probe: bool = False
    #: whether its refusals are recorded although it needs no key
    audited: bool = False
    #: whether the route waits until the database has the needed schema
    needs_store: bool = True


#: Of a path without a route: strangers are not told that there is none.
_NO_ROUTE = Declared(scopes=())


def _declared(route: RouteContext) -> Declared:
    mounted = route.original_route
    if isinstance(mounted, Mount) and isinstance(
        found := getattr(mounted.app, "declared", None), Declared
    ):
        return found
    given: list[params.Depends] = getattr(route, "dependencies", [])
    needed = [
        tuple(one.scopes or ()) if isinstance(one, params.Security) else None
        for one in given
        if one.dependency is require or one == PUBLIC
    ]
    if len(needed) != 1:
        raise LookupError(f"{route.path} declares {len(needed)} permissions, not one")
    probe = PROBE in given
    return Declared(
        needed[0], probe, AUDITED in given, needs_store=not probe and WITHOUT_STORE not in given
    )


def read_declarations(app: FastAPI) -> None:
    """Keep in the application's state what its routes declare; call this once it has them all.

    Raises
    ------
    LookupError
        A route declares no permission, or several.
    """
    app.state.declarations = [(r, _declared(r)) for r in iter_route_contexts(app.routes)]


def declared_of(scope: Scope, app: FastAPI | None = None) -> Declared:
    """What the route that will serve a request declares.

    Parameters
    ----------
    app
        Needed outside of the application only, where `scope` does not have it yet.
    """
    if _FOUND not in scope:
        scope[_FOUND] = _find(scope, app or scope["app"])
    found: Declared = scope[_FOUND]
    return found


def _find(scope: Scope, app: FastAPI) -> Declared:
    other = _NO_ROUTE
    for route, declared in app.state.declarations:
        match, _ = route.matches(scope)
        if match is Match.FULL:
            return declared  # type: ignore[no-any-return]
        if match is Match.PARTIAL and other is _NO_ROUTE:  # it will refuse the method
            other = replace(declared, scopes=None if declared.scopes is None else ())
    return other
