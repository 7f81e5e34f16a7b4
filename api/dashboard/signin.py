"""Signing in to the dashboard: a key is exchanged for a cookie that no script can read."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import parse_qs, unquote, urlsplit

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, RedirectResponse

from api.auth import COOKIE
from api.dashboard.pages import templates
from api.declared import PUBLIC, SIGNED_IN, Caller
from api.limits.rates import Rates
from api.middleware.prefix import root_of
from nas.settings import Settings
from nas.store.keys import Key, Keys, digest_of

router = APIRouter(include_in_schema=False)
#: Bytes of the form.
_LONGEST_FORM = 4096
_SECONDS_PER_HOUR = 3600.0
_NO_KEY = "This is not a valid key of this service: it is unknown, revoked or expired."


def inside(target: str, root: str = "") -> str:
    """The page to go to after signing in; the first one for a target outside of this service.

    Parameters
    ----------
    root
        Path below which the service is served; a target has it, too.
    """
    first = f"{root}/"
    try:
        parts = urlsplit(target)
    except ValueError:
        return first
    below = target.startswith(first) and not target.startswith(("//", "/\\"))
    plain = below and target.isprintable() and ".." not in unquote(parts.path).split("/")
    return target if plain and not parts.scheme and not parts.netloc else first


@router.get("/login", dependencies=[PUBLIC], response_class=HTMLResponse)
def login_page(
    request: Request, target: Annotated[str, Query(alias="next", max_length=2048)] = "/"
) -> Response:
    if not request.app.state.access_control:  # there is nothing to sign in for
        return RedirectResponse(inside(target, root_of(request.scope)), 303)
    return page(request, target)


def page(request: Request, target: str, error: str | None = None, status: int = 200) -> Response:
    """The page for signing in, which then leads to `target`."""
    provider = request.app.state.provider
    shown = {
        "next": inside(target, root_of(request.scope)), "error": error,
        "provider": None if provider is None else provider.host,
    }  # fmt: skip
    return templates.TemplateResponse(request, "login.html", shown, status_code=status)


@router.post("/login", dependencies=[PUBLIC])
async def login(request: Request) -> Response:
    """Exchange a key for a session."""
    fields = parse_qs((await _form(request)).decode("utf-8", "replace"))
    target = fields.get("next", ["/"])[0]
    digest = digest_of(fields.get("key", [""])[0].strip())
    settings: Settings = request.app.state.settings
    keys = Keys(request.app.state.store)
    found = None
    if digest is not None:
        found = (await run_in_threadpool(keys.find, [digest]))[digest]
    # the secret of a session must not open another session
    if found is None or found.key is None or found.refusal is not None or found.key.parent:
        return page(request, target, _NO_KEY, 403)
    rates: Rates = request.app.state.rates
    if rates.spend("sign_in", found.key.id) is not None:
        return page(request, target, "This key has signed in too often; try again later.", 429)
    admin = bool(fields.get("admin"))
    if "read" not in found.key.scopes:
        return page(request, target, "The dashboard needs a key with scope `read`.", 403)
    if admin and "admin" not in found.key.scopes:
        return page(request, target, "This key has no scope `admin`: leave the box empty.", 403)
    seconds = _SECONDS_PER_HOUR * settings.session_hours
    session, secret = await run_in_threadpool(keys.sign_in, found.key, seconds, admin=admin)
    response = RedirectResponse(inside(target, root_of(request.scope)), 303)
    admit(request, response, session, secret)
    return response


def admit(request: Request, response: Response, session: Key, secret: str) -> None:
    """Give the browser the cookie of a session that was opened just now."""
    response.set_cookie(
        COOKIE, secret, path=_cookie_path(request), httponly=True, samesite="strict",
        secure=request.url.scheme == "https",
        max_age=round((session.expires_at or session.created_at) - session.created_at),
    )  # fmt: skip
    request.state.signed_in = True  # the audit log has a record of that already


async def _form(request: Request) -> bytes:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _LONGEST_FORM:
            return b""
    return body


def _cookie_path(request: Request) -> str:
    """Where browsers send the session's cookie: not to what else the host of a proxy serves."""
    return root_of(request.scope) or "/"


@router.post("/logout", dependencies=[SIGNED_IN])
async def logout(request: Request) -> Response:
    """Revoke the session and delete its cookie."""
    caller: Caller = request.state.caller
    digest = digest_of(request.cookies.get(COOKIE, ""))
    if caller.key_id is not None and digest is not None:
        keys = Keys(request.app.state.store)
        found = (await run_in_threadpool(keys.find, [digest]))[digest]
        if found.key is not None and found.key.parent is not None:
            await run_in_threadpool(keys.revoke, found.key.id)
    response = RedirectResponse(f"{root_of(request.scope)}/login", 303)
    response.delete_cookie(COOKIE, path=_cookie_path(request), httponly=True, samesite="strict")
    return response
