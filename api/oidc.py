"""The OpenID Connect provider by which people sign in: its addresses and keys, and its ID tokens.

OpenID Connect Core 1.0, section 3.1, with PKCE (RFC 7636).
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import secrets
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import httpx2 as httpx
import jwt
from jwt import PyJWK

from nas.errors import EinsumNasError, InvalidInput, echo, one_line
from nas.logs import masked
from nas.settings import Settings, is_loopback

_log = logging.getLogger(__name__)
#: Signatures with a public key only: one with the client's secret could be made by whoever has it.
_ALGORITHMS = (
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA",
)  # fmt: skip
#: Claims that an ID token must have.
_REQUIRED = ["iss", "sub", "aud", "exp", "iat"]
#: Seconds by which clocks may differ.
_LEEWAY = 30
#: Seconds for one answer of the provider; bytes of one; and requests to it at once.
_TIMEOUT, _MOST_BYTES, _AT_ONCE = 10.0, 1 << 20, 8
#: Seconds for which what the provider publishes is kept, and between two attempts at reading it.
_KEPT, _AGAIN = 3600.0, 10.0
#: Seconds for which a sign-in that has begun may be ended.
FLOW_SECONDS = 600
_ENDPOINTS = ("authorization_endpoint", "token_endpoint", "jwks_uri")


class ProviderTrouble(EinsumNasError):
    """The provider cannot be reached, or does not do what the standard says."""


class SignInRefused(EinsumNasError):
    """What came back from the provider lets nobody in; the message says why."""


@dataclass(frozen=True, slots=True)
class Flow:
    """A sign-in that one browser has begun; its cookie is all that is kept of it.

    State, nonce and PKCE's verifier are derived from one random secret, so that each is bound to
    the browser that has the cookie, and to where it wants to go.
    """

    secret: str
    started_at: int
    admin: bool
    target: str

    @classmethod
    def begin(cls, target: str, *, admin: bool) -> Flow:
        return cls(secrets.token_urlsafe(32), int(time.time()), admin, target)

    @classmethod
    def read(cls, cookie: str) -> Flow | None:
        """The flow of a cookie; None for a text that is no flow's, or of one that took too long."""
        try:
            secret, rest = cookie.split(".")
            started_at, admin, target = json.loads(base64.urlsafe_b64decode(rest))
            flow = cls(str(secret), int(started_at), bool(admin), str(target))
        except (ValueError, TypeError, OverflowError, RecursionError):
            return None
        fresh = -_LEEWAY <= time.time() - flow.started_at <= FLOW_SECONDS
        return flow if fresh and len(secret) == 43 and secret.isascii() else None

    @property
    def cookie(self) -> str:
        rest = json.dumps([self.started_at, self.admin, self.target]).encode()
        return f"{self.secret}.{base64.urlsafe_b64encode(rest).decode()}"

    @property
    def state(self) -> str:
        return self._derived("state", self.cookie)

    @property
    def nonce(self) -> str:
        return self._derived("nonce")

    @property
    def verifier(self) -> str:
        return self._derived("verifier")

    @property
    def challenge(self) -> str:
        return _base64url(hashlib.sha256(self.verifier.encode()).digest())

    def _derived(self, what: str, of: str = "") -> str:
        text = f"{what} {of}".encode()
        return _base64url(hmac.digest(self.secret.encode(), text, "sha256"))


def _base64url(given: bytes) -> str:
    return base64.urlsafe_b64encode(given).rstrip(b"=").decode()


class Provider:
    """The provider of the settings.

    Raises
    ------
    InvalidInput
        The issuer is no address that can be trusted, or no client id or access is set.
    """

    def __init__(self, settings: Settings) -> None:
        issuer = settings.oidc_issuer or ""
        parts = urlsplit(issuer)
        #: whether it is on this machine, where it may do without TLS
        self._local = parts.scheme == "http" and is_loopback(parts.hostname or "")
        if not (self._is_safe(issuer) and not parts.query and not parts.fragment):
            accepted = "https://HOST[/PATH] as the provider names itself; http on loopback only"
            raise InvalidInput("EINSUM_NAS_OIDC_ISSUER", masked(issuer), accepted)
        if not settings.oidc_client_id:
            accepted = "the client's id at the provider of EINSUM_NAS_OIDC_ISSUER"
            raise InvalidInput("EINSUM_NAS_OIDC_CLIENT_ID", "nothing", accepted)
        if not settings.oidc_access:
            accepted = 'who may sign in: {"GROUP": {"tenant": "NAME", "scopes": ["read"]}}'
            raise InvalidInput("EINSUM_NAS_OIDC_ACCESS", "nothing", accepted)
        self.issuer, self.host = issuer, parts.hostname or issuer
        self._client_id, self._secret = settings.oidc_client_id, settings.oidc_client_secret
        self._scope = " ".join(dict.fromkeys(("openid", *settings.oidc_scopes)))
        self._metadata: dict[str, Any] | None = None
        self._keys: list[dict[str, Any]] = []
        self._read_at = self._tried_at = self._keys_at = -_KEPT
        self._reading, self._asking = asyncio.Lock(), asyncio.Semaphore(_AT_ONCE)

    def _is_safe(self, url: Any) -> bool:
        try:
            parts = urlsplit(url)
            named = bool(parts.hostname) and parts.username is None and parts.port != 0
        except (ValueError, AttributeError, TypeError):
            return False
        if not named or not url.isascii() or not url.isprintable() or " " in url:
            return False
        here = self._local and parts.scheme == "http" and is_loopback(parts.hostname or "")
        return parts.scheme == "https" or here

    async def sign_in_url(self, flow: Flow, redirect_uri: str) -> str:
        """The address of the provider at which a browser goes on.

        Raises
        ------
        ProviderTrouble
            What the provider publishes cannot be read.
        """
        parts = urlsplit(str((await self._published())["authorization_endpoint"]))
        asked = {
            "response_type": "code", "client_id": self._client_id, "redirect_uri": redirect_uri,
            "scope": self._scope, "state": flow.state, "nonce": flow.nonce,
            "code_challenge": flow.challenge, "code_challenge_method": "S256",
        }  # fmt: skip
        query = urlencode([*parse_qsl(parts.query, keep_blank_values=True), *asked.items()])
        return urlunsplit(parts._replace(query=query, fragment=""))

    async def claims(self, flow: Flow, code: str, redirect_uri: str) -> dict[str, Any]:
        """The claims of the ID token for which a code is exchanged, checked.

        Raises
        ------
        SignInRefused
            The provider refuses the code, or its token is not one for this sign-in.
        ProviderTrouble
            The provider cannot be reached, or answers with something else.
        """
        given = {
            "grant_type": "authorization_code", "code": code, "redirect_uri": redirect_uri,
            "client_id": self._client_id, "code_verifier": flow.verifier,
        }  # fmt: skip
        published = await self._published()
        methods = str(published.get("token_endpoint_auth_methods_supported", "client_secret_basic"))
        auth: httpx.BasicAuth | None = None
        if self._secret is not None:
            secret = self._secret.get_secret_value()
            if "client_secret_basic" in methods:
                # RFC 6749, 2.3.1: both are encoded as forms are
                pair = (urlencode({"": text})[1:] for text in (self._client_id, secret))
                auth = httpx.BasicAuth(*pair)
            else:
                given["client_secret"] = secret
        found = await self._ask("POST", published["token_endpoint"], data=given, auth=auth)
        token = found.get("id_token")
        if not isinstance(token, str):
            raise SignInRefused("the provider gave no ID token")
        return await self._checked(token, flow)

    async def _checked(self, token: str, flow: Flow) -> dict[str, Any]:
        try:
            header = jwt.get_unverified_header(token)
            if header.get("alg") not in _ALGORITHMS:
                raise SignInRefused(f"the ID token is signed by {header.get('alg')!r:.20}")
            claims: dict[str, Any] = jwt.decode(
                token, await self._key_of(header), algorithms=list(_ALGORITHMS),
                audience=self._client_id, issuer=self.issuer, leeway=_LEEWAY,
                options={"require": _REQUIRED, "enforce_minimum_key_length": True},
            )  # fmt: skip
        except jwt.PyJWTError as error:
            raise SignInRefused(f"the ID token is not usable: {one_line(error):.100}") from None
        if not _is_same(claims.get("nonce"), flow.nonce):
            raise SignInRefused("the ID token is of another sign-in: its nonce differs")
        several = isinstance(claims["aud"], list) and len(claims["aud"]) > 1
        if claims.get("azp", None if several else self._client_id) != self._client_id:
            raise SignInRefused("the ID token was issued to another client")
        sub = str(claims["sub"])
        if not (0 < len(sub) <= 255 and sub.isascii() and sub.isprintable()):
            raise SignInRefused("the ID token names nobody: sub")
        return claims

    async def _key_of(self, header: dict[str, Any]) -> PyJWK:
        """The provider's key that a token names; those published are read again for a new name."""
        for again in (False, True):
            keys = await self._published_keys(again=again)
            named = [k for k in keys if header.get("kid") in (None, k.get("kid"))]
            found = [k for k in named if k.get("alg", header["alg"]) == header["alg"]]
            if len(found) == 1:
                return PyJWK(found[0], algorithm=header["alg"])
        raise SignInRefused("the ID token is signed with a key that the provider does not publish")

    async def _published(self) -> dict[str, Any]:
        async with self._reading:
            now = time.monotonic()
            if self._metadata is None or now - self._read_at > _KEPT:
                if now - self._tried_at < _AGAIN:
                    if self._metadata is not None:
                        return self._metadata
                    raise ProviderTrouble("the provider could not be reached a moment ago")
                url = f"{self.issuer.rstrip('/')}/.well-known/openid-configuration"
                try:
                    found = await self._ask("GET", url)
                finally:
                    self._tried_at = time.monotonic()  # which waiting for it may have delayed
                if found.get("issuer") != self.issuer:
                    told = echo(found.get("issuer"))
                    raise ProviderTrouble(f"the provider names itself {told}, not {self.issuer}")
                for name in _ENDPOINTS:
                    if not self._is_safe(found.get(name)):
                        told = echo(found.get(name))
                        raise ProviderTrouble(f"the provider's {name} is {told}, not https")
                self._metadata, self._read_at = found, now
            return self._metadata

    async def _published_keys(self, *, again: bool) -> list[dict[str, Any]]:
        url = (await self._published())["jwks_uri"]
        async with self._reading:
            now = time.monotonic()
            if now - self._keys_at > (_AGAIN if again else _KEPT):
                found = (await self._ask("GET", url)).get("keys")
                usable = (
                    [k for k in found if isinstance(k, dict)] if isinstance(found, list) else []
                )
                self._keys = [
                    k for k in usable
                    if k.get("use", "sig") == "sig" and k.get("kty") in ("RSA", "EC", "OKP")
                ]  # fmt: skip
                self._keys_at = now
            return self._keys

    async def _ask(self, method: str, url: str, **options: Any) -> dict[str, Any]:
        """A JSON object of the provider; redirections are not followed."""
        body = b""
        try:
            async with (
                self._asking,
                asyncio.timeout(_TIMEOUT),
                httpx.AsyncClient(timeout=_TIMEOUT, trust_env=not self._local) as client,
                client.stream(
                    method, url, headers={"Accept": "application/json"}, **options
                ) as answer,
            ):
                async for part in answer.aiter_bytes():
                    body += part
                    if len(body) > _MOST_BYTES:
                        raise ProviderTrouble(f"{url} answers with more than {_MOST_BYTES} bytes")
            found = json.loads(body)
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
            told = one_line(error) or type(error).__name__
            raise ProviderTrouble(f"{method} {url}: {told}") from None
        except (ValueError, RecursionError):
            raise ProviderTrouble(f"{url} answers {answer.status_code}, and no JSON") from None
        if method == "POST" and 400 <= answer.status_code < 500:
            told = echo(found.get("error") if isinstance(found, dict) else found)
            raise SignInRefused(f"the provider refuses the code: {told}")
        if not answer.is_success or not isinstance(found, dict):
            raise ProviderTrouble(f"{url} answers {answer.status_code}, and no JSON object")
        return found


def _is_same(given: Any, expected: str) -> bool:
    return isinstance(given, str) and hmac.compare_digest(given.encode(), expected.encode())
