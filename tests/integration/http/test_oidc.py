"""Signing in by a provider of OpenID Connect: who gets in as what, and every forged way refused."""

from __future__ import annotations

import base64
import hmac
import json
import re
import time
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx2 as httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import delete

from api.app import create_app
from api.dashboard.provider_signin import provider_of
from api.limits import rates
from api.oidc import FLOW_SECONDS, Flow, Provider
from api.server import behind_proxies
from nas.errors import Conflict, InvalidInput
from nas.settings import Settings
from nas.store import Store, upgrade
from nas.store.audit import Audit, Entry
from nas.store.engine import writing
from nas.store.keys import Key, Keys
from nas.store.schema import KeyRow
from tests.support.provider import (
    CLIENT,
    KEY,
    SECRET,
    LoopbackProvider,
    independent_provider,
    public_jwk,
    running_provider,
    signed,
)

PAGE = {"Accept": "text/html"}
ACCESS: dict[str, Any] = {
    "nas": {"tenant": "mine"},
    "operators": {"tenant": "mine", "scopes": ["read", "admin"]},
    "others": {"tenant": "theirs", "scopes": ["read"]},
}
OTHER = generate_private_key(65537, 2048)


class House(NamedTuple):
    client: TestClient
    store: Store
    provider: LoopbackProvider

    def begin(self, query: str = "", **options: Any) -> Any:
        return self.client.get(f"/login/oidc{query}", headers=PAGE, **options)

    def back(self, begun: Any) -> str:
        """Where the provider leads the browser."""
        assert begun.status_code == 303, begun.text
        sent = httpx.get(begun.headers["location"])
        assert sent.status_code == 303, sent.text
        return str(sent.headers["location"])

    def end(self, url: str) -> Any:
        parts = urlsplit(url)
        return self.client.get(f"{parts.path}?{parts.query}", headers=PAGE)

    def sign_in(self, query: str = "") -> Any:
        return self.end(self.back(self.begin(query)))

    @property
    def cookie(self) -> str | None:
        return self.client.cookies.get("einsum_nas_session")

    def told(self) -> list[Entry]:
        return Audit(self.store).entries(limit=20)


def settings_for(home: Path, provider: LoopbackProvider, **more: Any) -> Settings:
    return Settings(
        home=home, access_control=True, trusted_proxies="10.0.0.1",
        **{"oidc_issuer": provider.issuer, "oidc_client_id": CLIENT,
           "oidc_client_secret": SECRET, "oidc_access": ACCESS, **more},
    )  # fmt: skip


@pytest.fixture(scope="module")
def running() -> Iterator[LoopbackProvider]:
    with running_provider() as provider:
        yield provider


@pytest.fixture
def provider(running: LoopbackProvider) -> LoopbackProvider:
    running.reset()
    return running


@pytest.fixture(scope="module")
def started(
    running: LoopbackProvider, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[TestClient, Settings]]:
    """One service for the tests of this file, whose routes take a while to build."""
    settings = settings_for(tmp_path_factory.mktemp("home"), running)
    upgrade(settings.resolved_database_url)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rates, "_SIGN_INS", "1000/minute")
        client = opened(settings)
    with client:
        yield client, settings


@pytest.fixture
def house(started: tuple[TestClient, Settings], provider: LoopbackProvider) -> Iterator[House]:
    client, settings = started
    application(client).state.provider = Provider(settings)  # which has asked nothing yet
    client.cookies.clear()
    store = Store(settings.resolved_database_url)
    with writing(store.engine) as session:
        session.execute(delete(KeyRow))
    yield House(client, store, provider)
    store.close()


APPS: dict[int, FastAPI] = {}


def application(client: TestClient) -> FastAPI:
    return APPS[id(client)]


def opened(settings: Settings, address: str = "10.0.0.9") -> TestClient:
    app = create_app(settings)
    proxied = behind_proxies(app, settings)
    client = TestClient(
        proxied, "http://127.0.0.1", client=(address, 5000), follow_redirects=False
    )  # fmt: skip
    APPS[id(client)] = app
    return client


def leads_to(page: Any) -> str:
    assert page.status_code == 200, page.text
    (found,) = re.findall(r'http-equiv="refresh" content="0;url=([^"]*)"', page.text)
    return unescape(str(found))


def refused(house: House, page: Any, part: str, status: int = 403) -> None:
    """A page that says why, no session, and a record of it."""
    assert page.status_code == status, page.text
    assert part in unescape(page.text), page.text
    assert page.headers["content-type"].startswith("text/html")
    assert house.cookie is None
    line = house.told()[0]
    assert (line.status, line.target) == (status, "/login/oidc/callback")
    assert line.address == "10.0.0.9"
    assert part[:40] in str(line.reason)


def accounts(house: House) -> list[Key]:
    return [k for k in Keys(house.store).list() if k.subject is not None]


def test_a_person_gets_a_session_like_that_of_a_key(house: House) -> None:
    assert 'href="/login/oidc?next=/tasks"' in house.client.get("/login?next=/tasks").text
    begun = house.begin("?next=/tasks")
    asked = {k: v[0] for k, v in parse_qs(urlsplit(begun.headers["location"]).query).items()}
    assert begun.headers["location"].startswith(f"{house.provider.issuer}/authorize?")
    assert {k: asked[k] for k in ("response_type", "client_id", "scope", "redirect_uri", "tenant",
                                  "code_challenge_method")} == {
        "response_type": "code", "client_id": CLIENT, "scope": "openid profile", "tenant": "a b",
        "redirect_uri": "http://127.0.0.1/login/oidc/callback", "code_challenge_method": "S256",
    }  # fmt: skip
    assert len({asked["state"], asked["nonce"], asked["code_challenge"]}) == 3
    cookie = begun.headers["set-cookie"].lower()
    for part in ("httponly", "samesite=lax", "path=/login/oidc;", f"max-age={FLOW_SECONDS}"):
        assert part in cookie
    page = house.end(house.back(begun))
    assert leads_to(page) == "/tasks"
    session, forgotten = page.headers.get_list("set-cookie")
    for part in ("HttpOnly", "SameSite=strict", "Path=/;", "Max-Age=43200"):
        assert part in session
    assert "einsum_nas_oidc=" in forgotten
    assert "Max-Age=0" in forgotten
    policy = page.headers["content-security-policy"]
    assert "form-action 'self';" in policy
    assert house.provider.issuer not in policy

    assert house.client.get("/tasks", headers=PAGE).status_code == 200
    shown = house.client.get("/", headers=PAGE).text
    assert "tenant <b>mine</b> · key <b>Ada L.</b>" in shown
    assert house.client.get("/v1/workers").status_code == 403  # no admin unasked
    assert house.client.get("/v1/keys").status_code == 403
    origin = {"Origin": "http://127.0.0.1"}
    body = {"train_flops": 2e11, "trials": 2}
    assert house.client.post("/v1/searches", json=body).status_code == 403
    made = house.client.post("/v1/searches", json=body, headers=origin)
    assert made.json()["tenant"] == "mine"
    (account,) = accounts(house)
    assert [(e.action, e.tenant, e.key_id) for e in house.told()[::-1]][:2] == [
        ("account created", "mine", account.id), ("signed in", "mine", account.id),
    ]  # fmt: skip
    assert house.client.post("/logout", headers=origin).status_code == 303
    assert house.client.get("/v1/searches").status_code == 401


def test_the_operator_ends_it(house: House) -> None:
    house.sign_in()
    assert house.client.get("/v1/searches").status_code == 200
    (account,) = accounts(house)
    keys = Keys(house.store)
    assert not keys.any_usable()  # an account is no key with which the service could be opened
    with pytest.raises(Conflict, match="no key but an account"):
        keys.rotate(account.id)
    keys.revoke(account.id)
    assert house.client.get("/v1/searches").status_code == 401
    house.client.cookies.clear()
    refused(house, house.sign_in(), f"the operator has revoked account {account.id}")
    keys.restore(account.id)
    leads_to(house.sign_in())
    assert [a.id for a in accounts(house)] == [account.id]
    made, _ = keys.create("mine", "x", ["read"])
    with pytest.raises(Conflict, match="no account"):
        keys.restore(made.id)


@pytest.mark.parametrize(
    ("name", "shown"),
    [("<script>alert(1)</script>", "scriptalert(1)/script"), ("Zoë 李", "Zoë 李"), (" ", "ada"),
     (None, "ada"), (7, "ada"), ("\ud800\x00\n", "no name"), ("x" * 500, "x" * 64)],
)  # fmt: skip
def test_a_name_is_what_a_key_may_be_called(house: House, name: Any, shown: str) -> None:
    house.provider.claims["name"] = name
    leads_to(house.sign_in())
    assert [a.name for a in accounts(house)] == [shown]


def test_a_page_too_far_to_keep(house: House) -> None:
    """Browsers would drop the cookie."""
    assert leads_to(house.sign_in("?" + urlencode({"next": "/" + "é" * 2000}))) == "/"


def test_groups_decide_the_tenant_and_the_scopes(house: House) -> None:
    claims = house.provider.claims
    claims["groups"] = ["others", "nas", "unknown"]  # the order of the settings counts
    house.sign_in()
    assert house.client.get("/v1/searches").status_code == 200
    before = house.cookie
    assert accounts(house)[0].tenant == "mine"
    assert accounts(house)[0].scopes == ("read", "submit")
    claims["groups"] = "others"  # one text, too
    house.client.cookies.clear()
    house.sign_in()
    (account,) = accounts(house)
    assert (account.tenant, account.scopes) == ("theirs", ("read",))
    # what was opened before the change has ended
    house.client.cookies.clear()
    headers = {"Cookie": f"einsum_nas_session={before}"}
    assert house.client.get("/v1/searches", headers=headers).status_code == 401


@pytest.mark.parametrize(
    "groups", [None, [], ["unknown"], "NAS", ["nas "], [["nas"]], {"nas": 1}, 7, ["*"], [""]]
)
def test_who_is_in_no_group_gets_no_entry(house: House, groups: Any) -> None:
    house.provider.claims["groups"] = groups
    if groups is None:
        del house.provider.claims["groups"]
    refused(house, house.sign_in(), "none of the provider's groups of this account may enter")
    assert Keys(house.store).list() == []


def test_admin_is_given_if_asked_for_and_allowed(house: House) -> None:
    refused(house, house.sign_in("?admin=true"), "this account has no scope admin")
    house.provider.claims["groups"] = ["nas", "operators"]
    house.sign_in()
    assert house.client.get("/v1/workers").status_code == 403
    house.client.cookies.clear()
    house.sign_in("?admin=true")
    assert house.client.get("/v1/workers").status_code == 200
    assert accounts(house)[0].scopes == ("read", "submit", "admin")


# --- forged answers of the provider


def unsigned(claims: dict[str, Any]) -> str:
    return jwt.encode(claims, "", "none", headers={"kid": "one"})


def by_secret(claims: dict[str, Any]) -> str:
    """Signed with the client's secret, which a client could forge."""
    return jwt.encode(claims, SECRET.ljust(64, "x"), "HS256", headers={"kid": "one"})


def by_public_key(claims: dict[str, Any]) -> str:
    """Signed with the public key as if it were a secret: HS256 by hand, for no library does it."""
    head = {"alg": "HS256", "typ": "JWT", "kid": "one"}
    parts = [base64.urlsafe_b64encode(json.dumps(p).encode()).rstrip(b"=") for p in (head, claims)]
    body = b".".join(parts)
    key = json.dumps(public_jwk(KEY)).encode()
    mac = base64.urlsafe_b64encode(hmac.digest(key, body, "sha256")).rstrip(b"=")
    return (body + b"." + mac).decode()


def by_another_key(claims: dict[str, Any]) -> str:
    return jwt.encode(claims, OTHER, "RS256", headers={"kid": "one"})


def with_its_own_key(claims: dict[str, Any]) -> str:
    """The header brings the key along, and says where to get it."""
    more = {"kid": "two", "jwk": public_jwk(OTHER, "two"), "jku": "http://127.0.0.1:9/keys"}
    return jwt.encode(claims, OTHER, "RS256", headers=more)


def cut(claims: dict[str, Any]) -> str:
    return signed(claims).rpartition(".")[0] + "."


@pytest.mark.parametrize(
    ("sign", "part"),
    [(unsigned, "signed by 'none'"), (by_secret, "signed by 'HS256'"),
     (by_public_key, "signed by 'HS256'"), (by_another_key, "Signature verification failed"),
     (with_its_own_key, "a key that the provider does not publish"),
     (cut, "Signature verification failed"), (lambda _: "x.y.z", "the ID token is not usable"),
     (lambda _: "", "the ID token is not usable"),
     (lambda _: None, "gave no ID token"), (lambda _: {"alg": "none"}, "gave no ID token")],
)  # fmt: skip
def test_a_token_that_the_provider_has_not_signed(house: House, sign: Any, part: str) -> None:
    house.provider.sign = sign
    refused(house, house.sign_in(), part)
    assert accounts(house) == []


@pytest.mark.parametrize(
    ("change", "part"),
    [({"nonce": "another"}, "its nonce differs"), ({"nonce": None}, "its nonce differs"),
     ({"nonce": ["a"]}, "its nonce differs"), ({"aud": "another"}, "Audience doesn't match"),
     ({"aud": []}, "the ID token is not usable"), ({"aud": None}, "the ID token is not usable"),
     ({"iss": "https://evil.example"}, "Invalid issuer"),
     ({"iss": None}, "the ID token is not usable"),
     ({"exp": 1}, "expired"), ({"exp": None}, "the ID token is not usable"),
     ({"exp": "later"}, "the ID token is not usable"), ({"iat": 9e9}, "not yet valid"),
     ({"nbf": 9e9}, "not yet valid"), ({"aud": [CLIENT, "another"]}, "another client"),
     ({"azp": "another"}, "another client"), ({"sub": ""}, "names nobody"),
     ({"sub": "x" * 300}, "names nobody"), ({"sub": "\ud800"}, "names nobody"),
     ({"sub": 7}, "the ID token is not usable")],
)  # fmt: skip
def test_a_token_that_is_not_for_this_sign_in(house: House, change: Any, part: str) -> None:
    def changed(claims: dict[str, Any]) -> dict[str, Any]:
        more = {**claims, **change}
        return {name: value for name, value in more.items() if value is not None}

    house.provider.change = changed
    refused(house, house.sign_in(), part)
    assert accounts(house) == []


def test_a_token_of_an_earlier_sign_in_is_none_of_this(house: House) -> None:
    kept: list[str] = []

    def keep(claims: dict[str, Any]) -> str:
        kept.append(signed(claims))
        return kept[0]

    house.provider.sign = keep
    leads_to(house.sign_in())
    house.client.cookies.clear()
    refused(house, house.sign_in(), "its nonce differs")


# --- forged ways back


def changed_query(url: str, **values: str | None) -> str:
    parts = urlsplit(url)
    query = {name: found[0] for name, found in parse_qs(parts.query).items()} | values
    return parts._replace(
        query=urlencode({k: v for k, v in query.items() if v is not None})
    ).geturl()


OTHER_TAB = "begun in another browser or tab"


@pytest.mark.parametrize("state", [None, "", "x", "A" * 43, "é", "x" * 4000])
def test_another_state(house: House, state: str | None) -> None:
    url = changed_query(house.back(house.begin()), state=state)
    refused(house, house.end(url), OTHER_TAB)
    assert len(house.provider.codes) == 1  # which nobody has exchanged


def test_a_sign_in_that_another_browser_began(house: House) -> None:
    """Whoever is led to the end of somebody else's sign-in does not get that account."""
    url = house.back(house.begin())
    house.client.cookies.clear()
    refused(house, house.end(url), OTHER_TAB)
    house.begin()
    refused(house, house.end(url), OTHER_TAB)


def test_a_code_that_was_used(house: House) -> None:
    begun = house.begin()
    flow = begun.headers["set-cookie"].partition(";")[0]
    url = house.back(begun)
    leads_to(house.end(url))
    house.client.cookies.clear()
    refused(house, house.end(url), OTHER_TAB)
    # with the cookie stolen, too: the provider takes a code once
    parts = urlsplit(url)
    headers = {**PAGE, "Cookie": flow}
    again = house.client.get(f"{parts.path}?{parts.query}", headers=headers)
    refused(house, again, "the provider refuses the code: invalid_grant")


def test_a_code_of_another_sign_in(house: House) -> None:
    """PKCE: a code that was seen on its way is of no use in another browser's sign-in."""
    stolen = parse_qs(urlsplit(house.back(house.begin())).query)["code"][0]
    house.client.cookies.clear()
    url = changed_query(house.back(house.begin()), code=stolen)
    refused(house, house.end(url), "the provider refuses the code: invalid_grant")


@pytest.mark.parametrize(
    ("values", "part"),
    [({"code": None, "error": "access_denied"}, "let nobody in: access_denied"),
     ({"error": "<script>alert(1)</script>"}, "let nobody in: <script>"),
     ({"code": None}, "no answer of it"), ({"iss": "https://evil.example"}, "no answer of it")],
)  # fmt: skip
def test_an_answer_without_a_code(house: House, values: dict[str, Any], part: str) -> None:
    page = house.end(changed_query(house.back(house.begin()), **values))
    refused(house, page, part)
    assert "<script>alert" not in page.text


@pytest.mark.parametrize(
    "cookie",
    ["", "x", ".", "a.b", "é.x", "x" * 8000,
     "A" * 43 + "." + base64.urlsafe_b64encode(b"[1, true, \"/\"]").decode(),
     "A" * 43 + "." + base64.urlsafe_b64encode(b"[" * 3000).decode(),
     "A" * 43 + "." + base64.urlsafe_b64encode(b"[1e999, true, 1]").decode(),
     "A" * 43 + "." + base64.urlsafe_b64encode(b"{}").decode()],
)  # fmt: skip
def test_a_cookie_that_is_none(house: House, cookie: str) -> None:
    assert Flow.read(cookie) is None
    url = urlsplit(house.back(house.begin()))
    house.client.cookies.clear()
    headers = {b"Accept": b"text/html", b"Cookie": f"einsum_nas_oidc={cookie}".encode()}
    refused(house, house.client.get(f"{url.path}?{url.query}", headers=headers), OTHER_TAB)


def test_a_sign_in_that_took_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = Flow.begin("/x", admin=True)
    assert Flow.read(flow.cookie) == flow
    for seconds in (FLOW_SECONDS + 5, -120):
        with monkeypatch.context() as patch:
            now = time.time()
            patch.setattr(time, "time", lambda now=now + seconds: now)
            assert Flow.read(flow.cookie) is None
    # what it leads to cannot be changed without the state changing too
    other = Flow(flow.secret, flow.started_at, False, "/y")
    assert len({flow.state, other.state, Flow.begin("/x", admin=True).state}) == 3


@pytest.mark.parametrize(
    "target",
    ["//evil.example", "https://evil.example", "/\\evil.example", "javascript:alert(1)", "x", "//[",
     "/a/../../b", '/"><script>'],
)  # fmt: skip
def test_signing_in_leads_nowhere_else(house: House, target: str) -> None:
    page = house.sign_in("?" + urlencode({"next": target}))
    assert leads_to(page) in ("/", target if target.startswith('/"') else "/")
    assert "<script>" not in page.text.replace('<script src="/static/theme.js">', "")
    assert "evil" not in page.text


# --- a provider that does not do what it should


@pytest.mark.parametrize(
    ("path", "answer"),
    [("/.well-known/openid-configuration", (500, b"{}")),
     ("/.well-known/openid-configuration", (200, b"<html>")),
     ("/.well-known/openid-configuration", (200, b"[]")),
     ("/.well-known/openid-configuration", (200, b"[" * 100_000)),
     ("/.well-known/openid-configuration", (200, b'{"a": "' + b"x" * 2_000_000 + b'"}')),
     ("/.well-known/openid-configuration", (302, b"https://evil.example/"))],
)  # fmt: skip
def test_discovery_that_fails(house: House, path: str, answer: tuple[int, bytes]) -> None:
    house.provider.answers[path] = answer
    page = house.begin("?next=/tasks")
    assert (page.status_code, page.headers["retry-after"]) == (503, "10")
    assert "out of reach or answers wrongly" in page.text
    assert 'name="next" value="/tasks"' in page.text  # keys are taken still
    assert house.told()[0].target == "/login/oidc"


@pytest.mark.parametrize(
    "metadata",
    [{"issuer": "http://127.0.0.1:1"}, {"issuer": None}, {"token_endpoint": None},
     {"token_endpoint": "http://evil.example/token"}, {"jwks_uri": "file:///etc/passwd"},
     {"authorization_endpoint": "javascript:alert(1)"}, {"jwks_uri": "https://a@evil.example/"},
     {"authorization_endpoint": ["x"]}],
)  # fmt: skip
def test_discovery_that_leads_astray(house: House, metadata: dict[str, Any]) -> None:
    house.provider.metadata = metadata
    assert house.begin().status_code == 503


@pytest.mark.parametrize(
    ("path", "answer"),
    [("/token", (500, b"{}")), ("/token", (200, b"nothing")), ("/keys", (404, b"{}")),
     ("/token", (200, b"[]"))],
)  # fmt: skip
def test_a_provider_that_fails_at_the_end(house: House, path: str, answer: Any) -> None:
    url = house.back(house.begin())
    house.provider.answers[path] = answer
    refused(house, house.end(url), "out of reach or answers wrongly", 503)


def test_a_key_that_the_provider_has_changed(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new key is read once a token names it; those of another use are not taken."""
    monkeypatch.setattr("api.oidc._AGAIN", 0.0)
    leads_to(house.sign_in())
    house.client.cookies.clear()

    def by_new(claims: dict[str, Any]) -> str:
        return jwt.encode(claims, OTHER, "RS256", headers={"kid": "two"})

    house.provider.sign = by_new
    house.provider.keys = [public_jwk(KEY), {**public_jwk(OTHER, "two"), "use": "enc"}]
    refused(house, house.sign_in(), "a key that the provider does not publish")
    house.provider.keys = [public_jwk(KEY), public_jwk(OTHER, "two")]
    leads_to(house.sign_in())


# --- where it is served, and how it is set


def test_behind_a_proxy_that_speaks_tls_below_a_path(
    tmp_path: Path, provider: LoopbackProvider
) -> None:
    settings = settings_for(tmp_path, provider, allowed_hosts="nas.example.org")
    upgrade(settings.resolved_database_url)
    told = {"X-Forwarded-Prefix": "/nas", "X-Forwarded-Proto": "https", "Host": "nas.example.org"}
    for address, trusted in (("10.0.0.1", True), ("10.0.0.9", False)):
        with opened(settings, address) as client:
            client.headers.update(told)
            root = "/nas" if trusted else ""
            assert f'href="{root}/login/oidc?next={root}/"' in client.get("/login").text
            begun = client.get("/login/oidc", params={"next": f"{root}/tasks"})
            (asked,) = parse_qs(urlsplit(begun.headers["location"]).query)["redirect_uri"]
            base = "https://nas.example.org/nas" if trusted else "http://nas.example.org"
            assert asked == f"{base}/login/oidc/callback"
            cookie = begun.headers["set-cookie"]
            assert ("Secure" in cookie) is trusted
            assert f"Path={root}/login/oidc;" in cookie
            back = urlsplit(httpx.get(begun.headers["location"]).headers["location"])
            headers = {"Cookie": cookie.partition(";")[0]}
            page = client.get(f"/login/oidc/callback?{back.query}", headers=headers)
            assert leads_to(page) == f"{root}/tasks"
            session = page.headers.get_list("set-cookie")[0]
            assert f"Path={root or '/'};" in session
            assert ("Secure" in session) is trusted


def test_too_many_from_one_address(
    tmp_path: Path, provider: LoopbackProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each end of a sign-in asks the provider something."""
    monkeypatch.setattr(rates, "_SIGN_INS", "3/hour")
    settings = settings_for(tmp_path, provider)
    upgrade(settings.resolved_database_url)
    store = Store(settings.resolved_database_url)
    with opened(settings) as client:
        house = House(client, store, provider)
        provider.sign = unsigned
        for _ in range(3):
            refused(house, house.sign_in(), "signed by")
        refused(house, house.sign_in(), "too many sign-ins", 429)
    store.close()


def test_what_is_open_besides(tmp_path: Path, provider: LoopbackProvider) -> None:
    def is_open(app: Any) -> set[str]:
        return {r.path for r, declared in app.state.declarations if declared.scopes is None}

    without = is_open(create_app(Settings(home=tmp_path, access_control=True)))
    app = create_app(settings_for(tmp_path, provider))
    assert is_open(app) - without == {"/login/oidc", "/login/oidc/callback"}
    with TestClient(app, "http://127.0.0.1", follow_redirects=False) as client:
        for path in ("/login/oidc", "/login/oidc/callback"):
            assert client.post(path).status_code in (403, 405)


@pytest.mark.parametrize(
    ("given", "part"),
    [({"oidc_issuer": "http://idp.example"}, "OIDC_ISSUER: got .*https://HOST"),
     ({"oidc_issuer": "idp.example"}, "https://HOST"), ({"oidc_issuer": "https://"}, "https://HOST"),
     ({"oidc_issuer": "https://me:hush@idp.example"}, "https://HOST"),
     ({"oidc_issuer": "https://idp.example/?a=b"}, "https://HOST"),
     ({"oidc_client_id": None}, "OIDC_CLIENT_ID"), ({"oidc_access": {}}, "OIDC_ACCESS"),
     ({"access_control": False}, "EINSUM_NAS_ACCESS_CONTROL=true")],
)  # fmt: skip
def test_settings_that_cannot_be(
    tmp_path: Path, provider: LoopbackProvider, given: dict[str, Any], part: str
) -> None:
    used = settings_for(tmp_path, provider).model_copy(update=given)
    with pytest.raises(InvalidInput, match=part) as told:
        provider_of(used, access_control=used.access_control)
    assert "hush" not in str(told.value)


@pytest.mark.parametrize(
    "access",
    [{"g": {"tenant": "a/b"}}, {"g": {"scopes": ["read"]}},
     {"g": {"tenant": "a", "scopes": []}},
     {"g": {"tenant": "a", "scopes": ["submit"]}},
     {"g": {"tenant": "a", "scopes": ["read", "keys"]}},
     {"g": {"tenant": "a", "more": 1}}, {"g": "a"}],
)  # fmt: skip
def test_access_that_cannot_be(access: Any) -> None:
    with pytest.raises(ValueError, match="oidc_access"):
        Settings(oidc_access=access)


# --- an independent provider


def test_a_provider_that_others_have_written(tmp_path: Path) -> None:
    person = {"sub": "grace", "groups": ["nas"], "name": "Grace H."}
    with independent_provider(person) as found:
        issuer = LoopbackProvider(found)
        settings = settings_for(tmp_path, issuer)
        upgrade(settings.resolved_database_url)
        store = Store(settings.resolved_database_url)
        with opened(settings) as client:
            house = House(client, store, issuer)
            begun = house.begin("?next=/tasks")
            sent = httpx.post(begun.headers["location"], data={"sub": "grace"})
            assert leads_to(house.end(sent.headers["location"])) == "/tasks"
            assert client.get("/v1/searches").status_code == 200
            (account,) = accounts(house)
            assert (account.name, account.tenant) == ("Grace H.", "mine")
            client.cookies.clear()
            denied = httpx.post(house.begin().headers["location"], data={"action": "deny"})
            # this provider leaves out the state of what it denies
            refused(house, house.end(denied.headers["location"]), OTHER_TAB)
            stranger = httpx.post(house.begin().headers["location"], data={"sub": "eve"})
            refused(house, house.end(stranger.headers["location"]), "may enter here")
        store.close()
