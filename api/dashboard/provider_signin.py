"""Signing in to the dashboard by a provider of OpenID Connect; the session is one as by a key."""

from __future__ import annotations

import hmac
import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, RedirectResponse

from api.dashboard.pages import templates
from api.dashboard.signin import admit, inside, page
from api.declared import AUDITED, PUBLIC
from api.limits.rates import Rates, network_of
from api.middleware.prefix import root_of
from nas.errors import InvalidInput, NotPermitted
from nas.logs import masked
from nas.settings import Access, Settings
from nas.store.keys import Keys

if TYPE_CHECKING:
    from api.oidc import Flow, Provider

_log = logging.getLogger(__name__)
router = APIRouter(prefix="/login/oidc", include_in_schema=False, dependencies=[PUBLIC, AUDITED])
#: Of the sign-in that a browser has begun.  The provider leads back from another site, so that a
#: cookie for this site alone would not come along.
_COOKIE = "einsum_nas_oidc"
#: Characters of it; browsers drop cookies of 4,096 bytes with their name.
_LONGEST_COOKIE = 3500
_SECONDS_PER_HOUR = 3600.0
Sent = Annotated[str, Query(max_length=4096)]


def provider_of(settings: Settings, *, access_control: bool) -> Provider | None:
    """The provider of the settings; None if there is none.

    Raises
    ------
    InvalidInput
        It cannot be used as it is set.
    """
    if settings.oidc_issuer is None:
        return None
    name = "EINSUM_NAS_OIDC_ISSUER"
    if not access_control:
        accepted = "none unless EINSUM_NAS_ACCESS_CONTROL=true: there is nothing to sign in for"
        raise InvalidInput(name, masked(settings.oidc_issuer), accepted)
    if find_spec("jwt") is None or find_spec("cryptography") is None:
        accepted = "none without the extra packages: pip install 'einsum-nas[oidc]'"
        raise InvalidInput(name, masked(settings.oidc_issuer), accepted)
    from api.oidc import Provider

    return Provider(settings)


@router.get("")
async def begin(
    request: Request,
    target: Annotated[str, Query(alias="next", max_length=2048)] = "/",
    admin: Literal["true", "false"] = "false",
) -> Response:
    """Send the browser to the provider."""
    from api.oidc import FLOW_SECONDS, Flow, ProviderTrouble

    provider: Provider = request.app.state.provider
    root, asked = root_of(request.scope), admin == "true"
    flow = Flow.begin(inside(target, root), admin=asked)
    if len(flow.cookie) > _LONGEST_COOKIE:
        flow = Flow.begin(f"{root}/", admin=asked)
    try:
        url = await provider.sign_in_url(flow, _redirect_uri(request))
    except ProviderTrouble as error:
        return _out_of_reach(request, flow.target, error)
    response = RedirectResponse(url, 303)
    response.set_cookie(
        _COOKIE, flow.cookie, path=_path(request), max_age=FLOW_SECONDS, httponly=True,
        samesite="lax", secure=request.url.scheme == "https",
    )  # fmt: skip
    return response


@router.get("/callback", response_class=HTMLResponse)
async def end(
    request: Request, state: Sent = "", code: Sent = "", error: Sent = "", iss: Sent = ""
) -> Response:
    """Open a session for whom the provider sends back, if somebody with their groups may enter."""
    from api.oidc import Flow, ProviderTrouble, SignInRefused

    provider: Provider = request.app.state.provider
    rates: Rates = request.app.state.rates
    flow = Flow.read(request.cookies.get(_COOKIE, ""))
    if flow is None or not hmac.compare_digest(state.encode(), flow.state.encode()):
        why = "This sign-in was begun in another browser or tab, or too long ago. Begin again."
        request.state.refusal = why
        return page(request, "/", why, 403)  # a flow that goes on in this browser is left alone
    target = inside(flow.target, root_of(request.scope))
    if rates.spend(
        "sign_in", f"provider {network_of(str(request.client and request.client.host))}"
    ):
        why = "There were too many sign-ins from this address; try again later."
        return _refused(request, target, why, 429)
    if error or not code or iss not in ("", provider.issuer):
        told = f"The provider let nobody in: {error[:100]}" if error else "This is no answer of it."
        return _refused(request, target, told, 403)
    try:
        claims = await provider.claims(flow, code, _redirect_uri(request))
        session, secret = await run_in_threadpool(_open, request, flow, claims)
    except ProviderTrouble as trouble:
        return _out_of_reach(request, target, trouble)
    except (SignInRefused, NotPermitted) as refusal:
        return _refused(request, target, f"Not signed in: {refusal}.", 403)
    # a redirection would go on with what the provider's site began, to which browsers send no
    # cookie of a session; a page of ours begins anew
    response = templates.TemplateResponse(request, "signed_in.html", {"target": target})
    admit(request, response, session, secret)
    return _over(request, response)


def _open(request: Request, flow: Flow, claims: dict[str, Any]) -> Any:
    from api.oidc import SignInRefused

    settings: Settings = request.app.state.settings
    provider: Provider = request.app.state.provider
    access = _access(settings, claims)
    if access is None:
        raise SignInRefused(
            f"none of the provider's {settings.oidc_claim} of this account may enter here"
        )
    if flow.admin and "admin" not in access.scopes:
        raise SignInRefused("this account has no scope admin; sign in without it")
    names = (claims.get(name) for name in ("name", "preferred_username", "email", "sub"))
    return Keys(request.app.state.store).sign_in_account(
        f"{provider.issuer}\n{claims['sub']}",
        next((name for name in names if isinstance(name, str) and name.strip()), ""),
        access.tenant, access.scopes, _SECONDS_PER_HOUR * settings.session_hours, admin=flow.admin,
    )  # fmt: skip


def _access(settings: Settings, claims: dict[str, Any]) -> Access | None:
    """What the claims' groups give: all scopes of the first one's tenant; None for none."""
    given = claims.get(settings.oidc_claim)
    groups = {g for g in (given if isinstance(given, list) else [given]) if isinstance(g, str)}
    found = [access for group, access in settings.oidc_access.items() if group in groups]
    if not found:
        return None
    tenant = found[0].tenant
    scopes = frozenset().union(*(a.scopes for a in found if a.tenant == tenant))
    return Access(tenant=tenant, scopes=scopes)


def _redirect_uri(request: Request) -> str:
    """Where the provider leads back to, as the browser sees this service."""
    host = request.headers.get("host", "")
    return f"{request.url.scheme}://{host}{_path(request)}/callback"


def _path(request: Request) -> str:
    return f"{root_of(request.scope)}{router.prefix}"


def _refused(request: Request, target: str, why: str, status: int) -> Response:
    request.state.refusal = why
    return _over(request, page(request, target, why, status))


def _out_of_reach(request: Request, target: str, trouble: Exception) -> Response:
    _log.error("the provider of OpenID Connect: %s", masked(str(trouble)))
    why = "The provider is out of reach or answers wrongly; the service's log has the details."
    request.state.refusal = why
    response = page(request, target, why, 503)
    response.headers["Retry-After"] = "10"
    return _over(request, response)


def _over(request: Request, response: Response) -> Response:
    """The response, with which the browser forgets that it has begun."""
    response.delete_cookie(_COOKIE, path=_path(request), httponly=True, samesite="lax")
    return response
