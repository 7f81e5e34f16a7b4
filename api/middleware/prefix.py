"""The path below which a proxy serves the service: `/nas` where its pages are `/nas/searches/…`.

ASGI calls it `root_path`, and has `path` begin with it.  Routes, access control and logs know the
rest of a path only; every address in a response has the whole.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from nas.errors import InvalidInput, echo
from nas.settings import Settings

_log = logging.getLogger(__name__)
_HEADER = "X-Forwarded-Prefix"
#: Segments of characters that mean nothing in addresses, headers and cookies; none is all dots.
_PREFIX = re.compile(r"(/(?!\.+(/|$))[A-Za-z0-9._~-]+)+")
_LONGEST = 200


def root_of(scope: Scope) -> str:
    """The path below which a request found the service; empty where there is no such proxy."""
    # a folder that is mounted in the application has its own `root_path`
    return str(scope.get("app_root_path", scope.get("root_path", "")))


def path_of(scope: Scope) -> str:
    """The path of a request as the routes have it."""
    root, path = root_of(scope), str(scope["path"])
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def own_segments(app: FastAPI) -> frozenset[str]:
    """First segments of the service's own paths: what a proxy has left is not told from these."""
    return frozenset(route.path.split("/")[1] for route, _ in app.state.declarations) - {""}


def checked_root(settings: Settings, own: frozenset[str]) -> str:
    """The path of the settings without a slash at its end; empty if there is none.

    Parameters
    ----------
    own
        See `own_segments`.

    Raises
    ------
    InvalidInput
        It is no path, or begins as the service's own paths do.
    """
    given = settings.root_path
    found = "" if given is None else _usable(given, own)
    if found is None:
        others = ", ".join(sorted(own))
        accepted = f"a path such as /nas: letters, digits and . _ ~ -, not beginning with {others}"
        raise InvalidInput("EINSUM_NAS_ROOT_PATH", given, accepted)
    return found


def _usable(prefix: str, own: frozenset[str]) -> str | None:
    """The prefix as `root_path` has it; None for one that cannot be used."""
    bare = prefix.rstrip("/")
    if not bare and prefix:
        return ""
    if len(bare) > _LONGEST or _PREFIX.fullmatch(bare) is None or bare.split("/")[1] in own:
        return None
    return bare


class Prefix:
    """Middleware outside of all others, which tells the application below which path it is served.

    It is the same whether the proxy passes the prefix on as a part of the path or takes it away.
    A request without it, such as a probe that comes past the proxy, is served too.

    Parameters
    ----------
    root
        The prefix of requests that have none in a header.
    trusted
        Whether the header of a proxy at an address is believed.
    own
        See `own_segments`.
    """

    def __init__(
        self, app: ASGIApp, root: str, trusted: Callable[[str], bool], own: frozenset[str]
    ) -> None:
        self._app, self._root, self._trusted, self._own = app, root, trusted, own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (root := self._root_for(scope)):
            scope = _below(scope, root)
        await self._app(scope, receive, send)

    def _root_for(self, scope: Scope) -> str:
        given = Headers(scope=scope).get(_HEADER)
        if given is None or not self._trusted(str((scope.get("client") or ("",))[0])):
            return self._root
        found = _usable(given.strip(), self._own)
        if found is None:
            _log.warning("%s: %s is not used: no path such as /nas", _HEADER, echo(given))
            return self._root
        return found


def _below(scope: Scope, root: str) -> Scope:
    path, raw = str(scope["path"]), scope.get("raw_path")
    if path == root:  # as a proxy passes on what was asked for without a slash
        path, raw = f"{root}/", f"{root}/".encode()
    elif not path.startswith(f"{root}/"):
        path, raw = root + path, None if raw is None else root.encode() + raw
    return {**scope, "root_path": root, "path": path, "raw_path": raw}
