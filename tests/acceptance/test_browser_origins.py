"""Pages of other origins, in a real browser: they see nothing of the service and change nothing.

They lie on another port: once of the same host, to which the browser sends the session's cookie
along (ports make no other site), and once of another, to which it does not.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote

import httpx2 as httpx
import pytest

from tests.support.browser import chromium, needs_chromium, watched
from tests.support.services import Service, api, running
from tests.support.tiers import FULL, only, thinned

pytestmark = needs_chromium
SEARCH = {"train_flops": 2e11, "trials": 2}
COOKIE = "einsum_nas_session"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def open_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(api(tmp_path_factory.mktemp("open"), log_format="json")) as ready:
        yield ready


@pytest.fixture(scope="module")
def locked_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One that asks for keys."""
    home = tmp_path_factory.mktemp("locked")
    options = {"access_control": "true", "failure_limit": "1000/minute", "log_format": "json"}
    with running(api(home, **options)) as ready:
        yield ready


def make_key(service: Service, name: str, *scopes: str) -> str:
    chosen = [part for scope in scopes for part in ("--scope", scope)]
    command = [sys.executable, "-m", "nas.cli", "keys", "create", "--name", name, "--json", *chosen]
    made = subprocess.run(command, env=service.environment, capture_output=True, check=True)
    return str(json.loads(made.stdout)["key"])


class _Elsewhere(BaseHTTPRequestHandler):
    """A site of a single page, which is a script too."""

    def do_GET(self) -> None:
        script = self.path.endswith(".js")
        body = (
            b"window.ran = true" if script else b"<!doctype html><title>other</title><h1>other</h1>"
        )
        self.send_response(200)
        self.send_header("Content-Type", "text/javascript" if script else "text/html")
        self.send_header("Content-Length", str(len(body)))
        with suppress(ConnectionError):  # the page has gone on
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Elsewhere)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(
    params=only(["localhost"], ["127.0.0.1", "localhost"]), ids=["same site", "other site"]
)
def elsewhere(request: pytest.FixtureRequest, port: int) -> str:
    return f"http://{request.param}:{port}"


def submit(service: Service, key: str | None = None) -> str:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    made = httpx.post(f"{service.url}/v1/searches", json=SEARCH, headers=headers)
    assert made.status_code == 201, made.text
    return str(made.json()["id"])


def searches(service: Service, key: str | None = None) -> dict[str, tuple[str, bool, bool, int]]:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    found = httpx.get(f"{service.url}/v1/searches", headers=headers).json()["items"]
    return {
        s["id"]: (s["state"], s["cancel_requested"], s["pause_requested"], s["priority"])
        for s in found
    }


FRAME = """([url, kind]) => new Promise((resolve) => {
  const frame = document.createElement(kind);
  frame.onload = frame.onerror = () => resolve();
  frame[kind === 'object' ? 'data' : 'src'] = url;
  document.body.append(frame);
})"""


@FULL
def test_nothing_shows_in_a_frame(browser: Any, open_service: Service, elsewhere: str) -> None:
    search = submit(open_service)
    with watched(browser, open_service.url, elsewhere) as (context, _):
        for kind in ("iframe", "object", "embed"):
            for path in (
                "/",
                f"/searches/{search}",
                "/v1/searches",
                "/static/icon.svg",
                "/healthz",
            ):
                page = context.new_page()
                page.goto(elsewhere)
                page.evaluate(FRAME, [open_service.url + path, kind])
                shown = [f for f in page.frames if f.url.startswith(open_service.url)]
                assert shown == [], (kind, path)
                page.close()
        # what may be framed is
        page = context.new_page()
        page.goto(elsewhere)
        page.evaluate(FRAME, [f"{elsewhere}/inner", "iframe"])
        assert [f.text_content("h1") for f in page.frames] == ["other", "other"]


READ = """async (url) => {
  try { return (await fetch(url, { credentials: 'include' })).status } catch (e) { return e.name }
}"""


def test_answers_cannot_be_read(browser: Any, open_service: Service, elsewhere: str) -> None:
    with watched(browser, open_service.url, elsewhere) as (context, _):
        page = context.new_page()
        page.goto(elsewhere)
        for path in ("/", "/v1/searches", "/v1/tasks", "/openapi.json", "/metrics", "/healthz"):
            assert page.evaluate(READ, open_service.url + path) == "TypeError", path
        assert page.evaluate(READ, f"{elsewhere}/x") == 200
        page.goto(open_service.url)
        assert page.evaluate(READ, f"{open_service.url}/v1/searches") == 200


EMBED = """([url, kind]) => new Promise((resolve) => {
  const element = document.createElement(kind);
  element.onload = () => resolve('load');
  element.onerror = () => resolve('error');
  if (kind === 'link') { element.rel = 'stylesheet'; element.href = url; } else element.src = url;
  document.head.append(element);
})"""


def test_answers_cannot_be_embedded(browser: Any, open_service: Service, elsewhere: str) -> None:
    submit(open_service)
    with watched(browser, open_service.url, elsewhere) as (context, _):
        page = context.new_page()
        page.goto(elsewhere)
        for kind, path in (
            ("script", "/v1/searches"), ("script", "/v1/tasks"), ("script", "/openapi.json"),
            ("script", "/metrics"), ("script", "/static/search.js"), ("link", "/static/style.css"),
            ("img", "/static/icon.svg"), ("img", "/v1/searches"), ("link", "/v1/searches"),
        ):  # fmt: skip
            assert page.evaluate(EMBED, [open_service.url + path, kind]) == "error", path
        assert page.evaluate(EMBED, [f"{elsewhere}/own.js", "script"]) == "load"
        page.goto(open_service.url)
        for kind, path in (("img", "/static/icon.svg"), ("link", "/static/style.css")):
            assert page.evaluate(EMBED, [open_service.url + path, kind]) == "load"


def test_a_window_that_was_opened_is_out_of_reach(
    browser: Any, open_service: Service, elsewhere: str
) -> None:
    with watched(browser, open_service.url, elsewhere) as (context, _):
        page = context.new_page()
        page.goto(elsewhere)
        for url, severed in ((open_service.url, True), (f"{elsewhere}/own", False)):
            with context.expect_page() as opened:
                page.evaluate("(url) => { window.opened = open(url) }", url)
            opened.value.wait_for_load_state("load")
            assert opened.value.evaluate("opener === null") is severed
            assert page.evaluate("opened.closed") is severed


#: Ways to send a request that ask nobody first, and one that does.
SEND = """async ([url, body]) => {
  const way = { method: 'POST', body, credentials: 'include' };
  const plain = { 'Content-Type': 'text/plain' };
  await fetch(url, { ...way, mode: 'no-cors', headers: plain }).catch(() => 0);
  await fetch(url, { ...way, headers: plain }).catch(() => 0);
  await fetch(url, { ...way, headers: { 'Content-Type': 'application/json' } }).catch(() => 0);
  await fetch(url, { ...way, mode: 'no-cors', referrerPolicy: 'no-referrer' }).catch(() => 0);
  navigator.sendBeacon(url, new Blob([body], { type: 'text/plain' }));
}"""
POST_FORM = """([url, fields, type]) => {
  const form = document.createElement('form');
  Object.assign(form, { method: 'post', action: url, enctype: type });
  for (const [name, value] of Object.entries(fields)) {
    const input = document.createElement('input');
    Object.assign(input, { name, value });
    form.append(input);
  }
  document.body.append(form);
  form.submit();
}"""


def posts_of(service: Service) -> list[tuple[str, int]]:
    """Path and status of every post, as the service has logged them: browsers tell less."""
    lines = (json.loads(line) for line in (service.home / "log").read_text().splitlines())
    return [(e["path"], e["status"]) for e in lines if e.get("method") == "POST"]


def attack(
    context: Any, service: Service, elsewhere: str, search: str, key: str
) -> tuple[list[tuple[str, int]], list[bool]]:
    """Everything that a page elsewhere can send.

    What the service answered to it, and which of the forms came with a cookie.
    """
    page = context.new_page()
    forms: list[Any] = []
    page.on("request", lambda r: forms.append(r) if r.is_navigation_request() else None)
    page.goto(elsewhere)
    before = len(posts_of(service))
    changes = [f"/v1/searches/{search}/{act}" for act in ("cancel", "pause", "clone", "confirm")]
    scripted = ["/v1/searches", f"/v1/searches/{search}/priority", *changes, "/logout", "/login"]
    for path in scripted:
        body = f"key={key}&next=/" if path == "/login" else json.dumps(SEARCH)
        page.evaluate(SEND, [service.url + path, body])
    for path in (*changes, "/logout", "/login"):
        for kind in ("application/x-www-form-urlencoded", "multipart/form-data", "text/plain"):
            page.goto(elsewhere)
            with page.expect_navigation():
                page.evaluate(POST_FORM, [service.url + path, {"key": key, "next": "/"}, kind])
    cookies = ["cookie" in r.all_headers() for r in forms if r.method == "POST"]
    assert len(cookies) == 18
    answered = posts_of(service)[before:]
    # each of the ways that ask nobody first has come through to the service
    for path in scripted:
        assert sum(p == path for p, _ in answered) >= 4, path
    return answered, cookies


def test_nothing_is_changed_from_elsewhere(
    browser: Any, open_service: Service, elsewhere: str
) -> None:
    search = submit(open_service)
    before = searches(open_service)
    with watched(browser, open_service.url, elsewhere) as (context, _):
        answered, _ = attack(context, open_service, elsewhere, search, "enas_" + "A" * 43)
    assert {status for _, status in answered} == {403}
    assert searches(open_service) == before
    # which a program may do, that sends no origin
    assert httpx.post(f"{open_service.url}/v1/searches/{search}/cancel").status_code == 200
    assert searches(open_service) != before


def sign_in(page: Any, service: Service, key: str, path: str = "/") -> None:
    page.goto(service.url + path)
    assert page.url.startswith(f"{service.url}/login")
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_selector("#logout")


def test_nothing_is_changed_with_the_session_of_someone_signed_in(
    browser: Any, locked_service: Service, elsewhere: str
) -> None:
    key, other = make_key(locked_service, "ours"), make_key(locked_service, "theirs")
    search = submit(locked_service, key)
    before = searches(locked_service, key)
    with watched(browser, locked_service.url, elsewhere) as (context, _):
        page = context.new_page()
        sign_in(page, locked_service, key)
        (cookie,) = context.cookies()
        answered, cookies = attack(context, locked_service, elsewhere, search, other)
        assert {status for _, status in answered} == {403}
        # the same site is sent the cookie: it is the origin that is refused
        assert set(cookies) == {elsewhere.startswith("http://127.0.0.1:")}
        assert context.cookies() == [cookie]
        page.reload()
        assert "key ours" in page.text_content(".who")
    assert searches(locked_service, key) == before


def test_signing_in_and_out(browser: Any, locked_service: Service) -> None:
    key = make_key(locked_service, "a person")
    search = submit(locked_service, key)
    url = locked_service.url
    with watched(browser, url) as (context, seen):
        page = context.new_page()
        sign_in(page, locked_service, key, f"/searches/{search}")
        assert page.url == f"{url}/searches/{search}"
        page.wait_for_selector("#search[data-ready]")
        assert page.text_content(".who span") == "tenant default · key a person"
        (cookie,) = context.cookies()
        assert (cookie["name"], cookie["path"]) == (COOKIE, "/")
        assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
        # no script gets at it, and the key itself is kept nowhere
        assert page.evaluate("document.cookie") == ""
        assert page.evaluate("localStorage.length + sessionStorage.length") == 0
        assert cookie["value"] != key
        session = {"Cookie": f"{COOKIE}={cookie['value']}"}
        assert httpx.get(f"{url}/v1/searches", headers=session).status_code == 200

        # a page that is open when the session ends leads back to where it was
        page.select_option("#axis", "params")
        left = f"/searches/{search}?x=params"  # with what was chosen there
        page.wait_for_url(url + left)
        second = context.new_page()
        second.goto(url)
        second.get_by_role("button", name="Sign out").click()
        second.wait_for_url(f"{url}/login")
        assert context.cookies() == []
        assert httpx.get(f"{url}/v1/searches", headers=session).status_code == 401
        page.wait_for_url(f"{url}/login?next={quote(left, safe='')}")
        page.get_by_label("API key").fill(key)
        page.keyboard.press("Enter")
        page.wait_for_url(url + left)
        assert seen.nothing, seen


def test_what_is_no_key_is_told_and_repeated_nowhere(browser: Any, locked_service: Service) -> None:
    wrong = "enas_" + "B" * 43
    with watched(browser, locked_service.url) as (context, seen):
        page = context.new_page()
        page.goto(f"{locked_service.url}/login")
        for given in (wrong, '"><img class=evil src=x onerror=hit(1)>', "\u202e{{7*7}}"):
            page.get_by_label("API key").fill(given)
            page.get_by_role("button", name="Sign in").click()
            page.wait_for_selector("#key[aria-invalid=true]")
            assert "not a valid key of this service" in page.get_by_role("alert").text_content()
            assert given not in page.content()
            assert page.input_value("#key") == ""
        assert context.cookies() == []
        assert seen.nothing, seen


@pytest.mark.parametrize(
    "target",
    thinned(["https://evil.invalid/", "//evil.invalid/", "/\\evil.invalid/", "javascript:hit(1)",
     "\t//evil.invalid/", "/\t/evil.invalid/", "data:text/html,<script>hit(1)</script>",
     "/%2f/evil.invalid/..%2f..", "http:evil.invalid", '"><script>hit(1)</script>'], 1),
)  # fmt: skip
def test_signing_in_leads_nowhere_else(browser: Any, locked_service: Service, target: str) -> None:
    key = make_key(locked_service, "led away", "read")
    with watched(browser, locked_service.url) as (context, seen):
        page = context.new_page()
        page.goto(f"{locked_service.url}/login?next={quote(target, safe='')}")
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Sign in").click()
        page.wait_for_load_state("load")
        assert page.url.startswith(f"{locked_service.url}/")
        assert context.cookies() != []
        assert seen.nothing, seen
