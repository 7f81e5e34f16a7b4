"""The service below a path of a proxy: every address that it gives leads back to it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.app import create_app
from api.dashboard.signin import inside
from api.middleware.prefix import checked_root, own_segments, path_of, root_of
from api.server import behind_proxies
from nas.errors import InvalidInput
from nas.settings import Settings
from nas.store import Store, upgrade
from nas.store.keys import Keys
from tests.support.tiers import only

PROXY, STRANGER = "10.0.0.1", "10.0.0.2"
PREFIX = "/team/nas"
BODY = {"train_flops": 2e11, "trials": 2}
PAGE = {"Accept": "text/html"}


@dataclass
class Proxied:
    """A service as a browser sees it through a proxy."""

    client: TestClient
    key: str
    #: whether the proxy leaves the prefix in the path
    keeps: bool
    headers: dict[str, str]

    def ask(self, method: str, path: str, **options: Any) -> Any:
        """The response to a request for a path of the proxy; redirects are not followed."""
        assert path.startswith(f"{PREFIX}/") or path == PREFIX, path
        sent = path if self.keeps else path.removeprefix(PREFIX) or "/"
        headers = {**self.headers, "Origin": "http://127.0.0.1", **options.pop("headers", {})}
        return self.client.request(method, sent, headers=headers, **options)

    def cookie(self) -> dict[str, str]:
        """What a browser sends once it has signed in."""
        form = {"key": self.key, "next": f"{PREFIX}/"}
        signed_in = self.ask("POST", f"{PREFIX}/login", data=form)
        assert (signed_in.status_code, signed_in.headers["location"]) == (303, f"{PREFIX}/")
        given = signed_in.headers["set-cookie"]
        assert f"Path={PREFIX};" in given
        self.client.cookies.clear()
        return {"Cookie": given.partition(";")[0]}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("home")
    upgrade(Settings(home=made).resolved_database_url)
    return made


@pytest.fixture(scope="module")
def key(home: Path) -> str:
    store = Store(Settings(home=home).resolved_database_url)
    made = Keys(store).create("default", "ada", ["read", "submit"])[1]
    store.close()
    return made


def client(home: Path, address: str = PROXY, **options: Any) -> TestClient:
    used = Settings(home=home, access_control=True, trusted_proxies=PROXY, **options)
    app = behind_proxies(create_app(used), used)
    return TestClient(app, "http://127.0.0.1", client=(address, 5000), follow_redirects=False)


@pytest.fixture(scope="module", params=only(["setting"], ["setting", "header"]))
def told(request: pytest.FixtureRequest, home: Path) -> Iterator[tuple[TestClient, dict[str, str]]]:
    """The service, and what the proxy tells it of the prefix."""
    by_setting = request.param == "setting"
    opened = client(home, **({"root_path": f"{PREFIX}/"} if by_setting else {}))
    with opened:
        yield opened, {} if by_setting else {"X-Forwarded-Prefix": PREFIX}


@pytest.fixture(params=[False, True], ids=["taken away", "kept"])
def proxied(
    request: pytest.FixtureRequest, told: tuple[TestClient, dict[str, str]], key: str
) -> Proxied:
    return Proxied(told[0], key, request.param, told[1])


def links(page: str) -> set[str]:
    """Where a page leads to, and what it loads."""
    return {unescape(found) for found in re.findall(r'(?:href|src|action)="([^"]*)"', page)}


def test_every_address_of_a_page_leads_back(proxied: Proxied) -> None:
    for asked in (PREFIX, f"{PREFIX}/"):
        refused = proxied.ask("GET", asked, headers=PAGE)
        assert (refused.status_code, refused.headers["location"]) == (
            303, f"{PREFIX}/login?next={PREFIX}/",
        )  # fmt: skip
    signing_in = proxied.ask("GET", refused.headers["location"], headers=PAGE)
    assert f'name="next" value="{PREFIX}/"' in signing_in.text
    assert f"{PREFIX}/login" in links(signing_in.text)

    cookie = proxied.cookie()
    made = proxied.ask("POST", f"{PREFIX}/v1/searches", json=BODY, headers=cookie)
    assert made.status_code == 201, made.text
    at, search = made.headers["location"], made.json()["id"]
    assert at == f"{PREFIX}/v1/searches/{search}"
    clone = proxied.ask("POST", f"{at}/clone", json={"seed": 1}, headers=cookie)
    assert clone.headers["location"] == f"{PREFIX}/v1/searches/{clone.json()['id']}"

    seen = {f"{PREFIX}/"}
    waiting = [f"{PREFIX}/", f"{PREFIX}/searches/{clone.json()['id']}"]
    while waiting:
        link = waiting.pop()
        page = proxied.ask("GET", link, headers={**cookie, **PAGE})
        if "/export?" in link:  # there is nothing to export yet
            assert "has no" in page.json()["detail"], page.text
            continue
        assert page.status_code == 200, link
        if page.headers["content-type"].startswith("text/html"):
            new = {link for link in links(page.text) if "/logout" not in link} - seen
            seen |= new
            waiting += new
    ends = {link.removeprefix(PREFIX).partition("?")[0] for link in seen}
    assert ends >= {"/", "/static/search.js", "/static/style.css", "/tasks", "/tasks/text",
                    "/space", "/workers", "/reference", "/openapi.json", f"/searches/{search}",
                    "/static/plotly-basic.min.js"}  # fmt: skip
    assert proxied.ask("GET", f"{PREFIX}/searches/{search}/live", headers=cookie).status_code == 200

    proxied.ask("POST", f"{at}/cancel", headers=cookie)
    events = proxied.ask("GET", f"{at}/events", headers=cookie)
    assert "event: cancelled" in events.text
    out = proxied.ask("POST", f"{PREFIX}/logout", headers=cookie)
    assert (out.status_code, out.headers["location"]) == (303, f"{PREFIX}/login")
    assert f"Path={PREFIX};" in out.headers["set-cookie"]
    assert proxied.ask("GET", at, headers=cookie).status_code == 401


def test_what_looks_at_paths_still_does(proxied: Proxied) -> None:
    """Scopes, probes, methods, headers of static files, and the routes' names in metrics."""
    bearer = {"Authorization": f"Bearer {proxied.key}"}
    assert proxied.ask("GET", f"{PREFIX}/healthz").status_code == 200
    assert proxied.client.get("/healthz", headers=proxied.headers).status_code == 200
    for path in ("/metrics", "/v1/workers", "/v1/audit"):
        refused = proxied.ask("GET", PREFIX + path, headers=bearer)
        assert (refused.status_code, "scope admin" in refused.text) == (403, True), path
    assert proxied.ask("GET", f"{PREFIX}/v1/searches").status_code == 401
    wrong = proxied.ask("DELETE", f"{PREFIX}/v1/searches", headers=bearer)
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST, GET")
    static = proxied.ask("GET", f"{PREFIX}/static/style.css")
    assert static.headers["cache-control"].startswith("public")
    described = proxied.ask("GET", f"{PREFIX}/openapi.json").json()
    assert described["servers"] == [{"url": PREFIX}]
    assert "/v1/searches" in described["paths"]


def test_a_prefix_that_is_none_is_not_used(home: Path) -> None:
    own = own_segments(create_app(Settings(home=home)))
    with client(home) as opened:
        for prefix in (
            "//evil.example", "/\\evil.example", "https://evil.example", "nas", "/a//b", "/..",
            "/a/../b", "/n;a", "/n a", '/"><script>', "/%2e%2e", "/v1", "/static/x", "/login",
            "/" + "n" * 300, "/\u00e9",
        ):  # fmt: skip
            accepted = r"EINSUM_NAS_ROOT_PATH: got .*; accepted: a path such as /nas"
            with pytest.raises(InvalidInput, match=accepted):
                checked_root(Settings(home=home, root_path=prefix), own)
            sent = {b"Accept": b"text/html", b"X-Forwarded-Prefix": prefix.encode("latin-1")}
            found = opened.get("/", headers=sent)
            assert found.headers["location"] == "/login?next=/", prefix


def test_a_prefix_is_believed_of_trusted_proxies_only(home: Path) -> None:
    with client(home, STRANGER) as opened:
        found = opened.get("/", headers={**PAGE, "X-Forwarded-Prefix": PREFIX})
        assert found.headers["location"] == "/login?next=/"
    with client(home, root_path="/nas") as opened:  # what the proxy says is nearer to the truth
        found = opened.get("/", headers={**PAGE, "X-Forwarded-Prefix": PREFIX})
        assert found.headers["location"].startswith(f"{PREFIX}/login")
    with client(home, root_path="/") as opened:
        assert opened.get("/", headers=PAGE).headers["location"] == "/login?next=/"


def test_no_path_of_the_service_can_be_a_prefix(home: Path) -> None:
    app = create_app(Settings(home=home))
    routes = app.openapi()["paths"]
    pages = ("/", "/new", "/searches/{id}", "/trials/{id}", "/structures", "/login", "/logout",
             "/compare", "/tasks", "/tasks/{task}", "/space", "/workers", "/admin", "/reference",
             "/static/x", "/metrics", "/openapi.json")  # fmt: skip
    assert {path.split("/")[1] for path in [*routes, *pages]} - {""} == own_segments(app)


@pytest.mark.parametrize(
    ("target", "page"),
    [
        ("/nas/searches/x", "/nas/searches/x"), ("/nas/", "/nas/"), ("/", "/nas/"),
        ("/other", "/nas/"), ("/nasty/", "/nas/"), ("/nas/../other", "/nas/"),
        ("/nas/%2e%2E/other", "/nas/"), ("//evil.example", "/nas/"), ("https://e.x/nas/", "/nas/"),
    ],
)  # fmt: skip
def test_signing_in_leads_to_a_page_below_the_prefix(target: str, page: str) -> None:
    assert inside(target, "/nas") == page


def test_a_mounted_folder_changes_neither_path() -> None:
    """Starlette writes its own prefix into the scope, which middleware sees afterwards."""
    scope = {"path": "/nas/static/x.css", "root_path": "/nas/static", "app_root_path": "/nas"}
    assert (root_of(scope), path_of(scope)) == ("/nas", "/static/x.css")
    assert path_of({"path": "/nasty/x", "root_path": "/nas"}) == "/nasty/x"
