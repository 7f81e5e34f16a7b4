"""A provider of OpenID Connect on the loopback that does what tests ask for, also what is wrong.

It lets in whoever comes, at once; it checks what a careful provider does: the client and its
secret, the redirect URI, PKCE, and that a code is used once.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote_plus, urlencode, urlsplit

import httpx2 as httpx
import jwt
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key
from jwt.algorithms import RSAAlgorithm

from tests.support.services import free_port, wait_for

CLIENT, SECRET = "nas", "a secret/with+signs"
KEY = generate_private_key(65537, 2048)


def public_jwk(key: RSAPrivateKey, kid: str = "one") -> dict[str, Any]:
    found: dict[str, Any] = RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)
    return {**found, "kid": kid, "use": "sig", "alg": "RS256"}


def signed(claims: dict[str, Any]) -> str:
    """An ID token as it should be."""
    return jwt.encode(claims, KEY, "RS256", headers={"kid": "one"})


@dataclass
class LoopbackProvider:
    """The provider; a test changes its parts."""

    issuer: str = ""
    #: of whom it lets in
    claims: dict[str, Any] = field(
        default_factory=lambda: {"sub": "ada", "name": "Ada L.", "groups": ["nas"]}
    )
    #: changes the claims of a token; and makes it
    change: Callable[[dict[str, Any]], dict[str, Any]] = lambda claims: claims
    sign: Callable[[dict[str, Any]], str] = signed
    keys: list[dict[str, Any]] = field(default_factory=lambda: [public_jwk(KEY)])
    #: instead of those of discovery
    metadata: dict[str, Any] = field(default_factory=dict)
    #: path → (status, body) that it answers whatever is asked
    answers: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    asked: list[dict[str, str]] = field(default_factory=list)
    codes: dict[str, dict[str, str]] = field(default_factory=dict)

    def reset(self) -> None:
        fresh = LoopbackProvider(self.issuer)
        for name, value in vars(fresh).items():
            setattr(self, name, value)

    def discovery(self) -> dict[str, Any]:
        return {
            "issuer": self.issuer,
            "authorization_endpoint": f"{self.issuer}/authorize?tenant=a%20b",
            "token_endpoint": f"{self.issuer}/token", "jwks_uri": f"{self.issuer}/keys",
            "id_token_signing_alg_values_supported": ["RS256"], **self.metadata,
        }  # fmt: skip

    def authorize(self, asked: dict[str, str]) -> str:
        """Where it sends the browser."""
        self.asked.append(asked)
        code = secrets.token_urlsafe(16)
        self.codes[code] = asked
        back = {"code": code, "state": asked["state"], "iss": self.issuer}
        return f"{asked['redirect_uri']}?{urlencode(back)}"

    def token(self, form: dict[str, str], authorization: str) -> tuple[int, dict[str, Any]]:
        given = base64.b64decode(authorization.removeprefix("Basic ")).decode()
        client, _, secret = given.partition(":")
        if (unquote_plus(client), unquote_plus(secret)) != (CLIENT, SECRET):
            return 401, {"error": "invalid_client"}
        asked = self.codes.pop(form.get("code", ""), None)
        if asked is None or form.get("redirect_uri") != asked["redirect_uri"]:
            return 400, {"error": "invalid_grant"}
        digest = hashlib.sha256(form.get("code_verifier", "").encode()).digest()
        challenge = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
        if (asked["code_challenge_method"], asked["code_challenge"]) != ("S256", challenge):
            return 400, {"error": "invalid_grant"}
        now = int(time.time())
        claims = {
            **self.claims, "iss": self.issuer, "aud": CLIENT, "iat": now, "exp": now + 300,
            "nonce": asked["nonce"],
        }  # fmt: skip
        token = self.sign(self.change(claims))
        return 200, {"access_token": "x", "token_type": "Bearer", "id_token": token}


@contextmanager
def running_provider() -> Iterator[LoopbackProvider]:
    """A provider that runs until the end of the block."""
    provider = LoopbackProvider()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = urlsplit(self.path)
            if path.path in provider.answers:
                return self._answer(*provider.answers[path.path])
            if path.path == "/.well-known/openid-configuration":
                return self._json(200, provider.discovery())
            if path.path == "/keys":
                return self._json(200, {"keys": provider.keys})
            asked = {name: values[0] for name, values in parse_qs(path.query).items()}
            self.send_response(303)
            self.send_header("Location", provider.authorize(asked))
            self.end_headers()
            return None

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            if self.path in provider.answers:
                return self._answer(*provider.answers[self.path])
            form = {name: values[0] for name, values in parse_qs(body).items()}
            return self._json(*provider.token(form, self.headers.get("Authorization", "")))

        def _json(self, status: int, value: dict[str, Any]) -> None:
            self._answer(status, json.dumps(value).encode())

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if status == 302:
                self.send_header("Location", body.decode())
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    provider.issuer = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield provider
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def independent_provider(*people: dict[str, Any]) -> Iterator[str]:
    """The issuer of a provider that others have written, in a process of its own.

    It listens as `localhost`: to browsers another site than 127.0.0.1.

    Parameters
    ----------
    people
        Claims of whom it knows.
    """
    port = free_port()
    claims = [word for person in people for word in ("--user-claims", json.dumps(person))]
    with subprocess.Popen(
        [sys.executable, "-m", "oidc_provider_mock", "--port", str(port), *claims],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        issuer = f"http://localhost:{port}"

        def answers() -> bool:
            assert process.poll() is None
            try:
                return httpx.get(f"{issuer}/jwks").is_success
            except httpx.TransportError:
                return False

        try:
            wait_for(answers, f"the provider on {issuer}")
            yield issuer
        finally:
            process.terminate()
