"""Which Host names the service answers to, and which origins may read it; by default only its own.

That protects against DNS rebinding: a page elsewhere that points its own name to this machine.
"""

from __future__ import annotations

import socket

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.declared import declared_of
from api.problems import problem
from nas.errors import InvalidInput, echo
from nas.settings import Settings

_LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")
_MARK = "einsum_nas.host"
_ANY = ("0.0.0.0", "::")
_ACCEPTED = "accepted: this machine's own names, and those of EINSUM_NAS_ALLOWED_HOSTS"
_HEADERS = ("Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID", "X-Tenant")


def install(app: FastAPI, settings: Settings, address: str) -> None:
    """Refuse requests with other Host names; allow the origins of the settings by CORS."""
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.allowed_origins, allow_methods=("GET", "POST"),
            allow_headers=_HEADERS, allow_credentials=False,
        )  # fmt: skip
    app.add_middleware(Hosts, allowed=names_of(address, settings.allowed_hosts))


def names_of(address: str, more: tuple[str, ...]) -> list[str]:
    """This machine's own names, the address that the service listens on, and those of the settings.

    Raises
    ------
    InvalidInput
        A pattern with a `*` elsewhere than at its beginning.
    """
    for name in more:
        if "*" in name[1:] or (name.startswith("*") and not name.startswith("*.") and name != "*"):
            accepted = "names separated by commas; *.example.com for its subdomains, * for any name"
            raise InvalidInput("EINSUM_NAS_ALLOWED_HOSTS", name, accepted)
    own = {*_LOOPBACK_NAMES, socket.gethostname(), socket.getfqdn()}
    if address not in _ANY:
        own.add(f"[{address}]" if ":" in address else address)
    return sorted({*(name.lower() for name in own if name), *more})


class Hosts:
    """Middleware that passes on probes and requests to an allowed Host, and answers 400 else."""

    def __init__(self, app: ASGIApp, *, allowed: list[str]) -> None:
        self._app = app
        self._named = TrustedHostMiddleware(_mark, allowed_hosts=allowed, www_redirect=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        declared = declared_of(scope) if scope["type"] == "http" else None
        # machines that probe know the address only
        if declared and not (declared.probe and declared.scopes is None):
            looked_at = {**scope, _MARK: False}
            await self._named(looked_at, receive, _unsaid)
            if not looked_at[_MARK]:
                given = Headers(scope=scope).get("host", "nothing")
                detail = f"Host: got {echo(given)}; {_ACCEPTED}"
                await problem(400, "unknown-host", "Unknown host", detail)(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def _mark(scope: Scope, _receive: Receive, _send: Send) -> None:
    scope[_MARK] = True


async def _unsaid(_message: Message) -> None:
    """Drop the library's refusal; ours says what is accepted."""
