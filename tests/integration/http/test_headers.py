"""Every answer carries the headers that bound what a browser does with it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from starlette.responses import Response

from api.app import create_app
from api.dashboard import pages as dashboard
from nas.settings import Settings

#: On whatever is answered.
ALWAYS = {
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
#: What a policy must not say: it would let markup run.
LOOSE = ("unsafe", "*", "http:", "https:", "data:", "nonce-", "strict-dynamic")
SEARCH = {"train_flops": 2e11, "trials": 2}


@pytest.fixture
def app(tmp_path: Path) -> FastAPI:
    made = create_app(Settings(home=tmp_path, rate_limit="100000/second"))

    async def broken() -> None:
        raise RuntimeError("a fault of ours")

    async def other() -> Any:
        return Response("x", headers={
            "Server": "x", "X-Frame-Options": "ALLOWALL", "Strict-Transport-Security": "max-age=0",
            "Cache-Control": "private, max-age=7", "Content-Security-Policy": "default-src *",
        })  # fmt: skip

    made.add_api_route("/broken", broken)
    made.add_api_route("/other", other)
    return made


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(
        app, "http://127.0.0.1", client=("127.0.0.1", 5000), raise_server_exceptions=False,
        follow_redirects=False,
    ) as opened:  # fmt: skip
        yield opened


def directives(policy: str) -> dict[str, str]:
    return {d.split(" ")[0]: d.partition(" ")[2] for d in policy.split("; ")}


def check(answer: Any) -> None:
    """Assert what holds for every answer."""
    headers = answer.headers
    assert {name: headers.get(name) for name in ALWAYS} == ALWAYS
    assert "server" not in headers
    policies = headers.get_list("content-security-policy")
    assert len(policies) == 1
    assert not any(word in policies[0] for word in LOOSE)
    policy = directives(policies[0])
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    is_page = headers.get("content-type", "").startswith("text/html")
    assert headers["referrer-policy"] == ("same-origin" if is_page else "no-referrer")
    if is_page:
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["base-uri"] == "'none'"
        assert policy["form-action"] == "'self'"
        assert policy["require-trusted-types-for"] == "'script'"
    else:
        assert set(policy) == {"default-src", "frame-ancestors"}
    assert "camera=()" in headers["permissions-policy"]
    assert len(headers.get_list("cache-control")) == 1


def test_every_route_and_every_method(app: FastAPI, client: TestClient) -> None:
    """Each with nothing that it needs, and so with errors of several layers."""
    known = client.post("/v1/searches", json=SEARCH).json()["id"]
    paths = [*client.get("/openapi.json").json()["paths"], "/", "/searches/{search_id}", "/login",
             "/searches/{search_id}/live", "/logout", "/metrics", "/openapi.json", "/nowhere",
             "/tasks", "/tasks/{task}", "/space", "/workers", "/admin", "/reference",
             "/static/search.js", "/static/plotly.min.js", "/static/none", "/broken",
             "/other"]  # fmt: skip
    statuses = set()
    for path in paths:
        for search in (known, "unknown"):
            url = path.replace("{search_id}", search).replace("{trial_id}", "1")
            if url.endswith("/events") and search == known:
                continue  # which does not end: below
            for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "X-OWN"):
                answer = client.request(method, url)
                check(answer)
                statuses.add(answer.status_code)
                if not url.startswith(("/static/", "/other")):
                    assert "no-store" in answer.headers["cache-control"], url
    assert statuses >= {200, 404, 405, 422, 500}
    told = {r.path for r in app.routes if isinstance(r, APIRoute)}
    assert told <= set(paths)


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ({"headers": {"Host": "evil.example"}}, 400),
        ({"headers": {"Origin": "https://evil.example"}, "method": "POST"}, 403),
        ({"content": b"x" * 200_000, "method": "POST"}, 413),
        ({"content": b"{", "method": "POST"}, 415),
        ({"json": {"train_flops": -1}, "method": "POST"}, 422),
    ],
)
def test_refusals(client: TestClient, asked: dict[str, Any], status: int) -> None:
    answer = client.request(asked.pop("method", "GET"), "/v1/searches", **asked)
    assert answer.status_code == status
    check(answer)


def test_refusals_for_want_of_a_key_and_for_asking_too_often(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, access_control=True, rate_limit="5/hour")
    with TestClient(create_app(settings), "http://127.0.0.1", follow_redirects=False) as client:
        answers = [client.get("/v1/searches"), client.get("/", headers={"Accept": "text/html"}),
                   client.get("/login"), *(client.get("/v1/tasks") for _ in range(3))]  # fmt: skip
    assert [a.status_code for a in answers] == [401, 303, 200, 401, 401, 429]
    for answer in answers:
        check(answer)


def test_answers_before_the_database_is_there(app: FastAPI, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    app = create_app(Settings(home=tmp_path, database_url=f"sqlite:///{tmp_path}/file/x.db"))
    with TestClient(app, "http://127.0.0.1", raise_server_exceptions=False) as client:
        answer = client.get("/v1/searches")
        assert answer.status_code == 503
        check(answer)


def test_headers_of_what_is_inside_do_not_loosen_them(client: TestClient) -> None:
    answer = client.get("/other")
    check(answer)
    assert "strict-transport-security" not in answer.headers
    # how long an answer may be kept is its own to say
    assert answer.headers["cache-control"] == "private, max-age=7"


def test_https_is_kept_to_where_it_is_spoken(app: FastAPI) -> None:
    for scheme, expected in (("http", None), ("https", "max-age=31536000")):
        with TestClient(app, f"{scheme}://127.0.0.1") as client:
            answer = client.get("/v1/tasks")
            assert answer.headers.get("strict-transport-security") == expected


def test_files_may_be_kept_and_asked_about(client: TestClient) -> None:
    first = client.get("/static/search.js")
    assert first.headers["cache-control"] == "public, max-age=3600"
    again = client.get("/static/search.js", headers={"If-None-Match": first.headers["etag"]})
    assert again.status_code == 304
    check(again)
    assert again.headers["cache-control"] == "public, max-age=3600"
    assert client.get("/static/plotly.min.js").headers["cache-control"] == "public, max-age=86400"
    assert client.get("/static/nothing.js").headers["cache-control"] == "no-store"


def test_a_stream_begins_with_them(client: TestClient) -> None:
    search = client.post("/v1/searches", json=SEARCH).json()["id"]
    client.post(f"/v1/searches/{search}/cancel")
    answer = client.get(f"/v1/searches/{search}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    check(answer)
    assert "no-store" in answer.headers["cache-control"]
    assert "event: cancelled" in answer.text


class _Inline(HTMLParser):
    """Collects what a policy without inline scripts and styles would refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = dict(attributes)
        if tag == "style" or (tag == "script" and "src" not in names):
            self.found.append(tag)
        self.found += [n for n in names if n == "style" or n.startswith("on")]
        self.found += [v for v in names.values() if v and v.startswith(("javascript:", "data:"))]


def inline(template: str) -> list[str]:
    parser = _Inline()
    # conditions between attributes are no markup
    parser.feed(re.sub(r"{%.*?%}", "", template))
    unescaped = re.findall(r"\|\s*safe\b|autoescape|xmlattr", template)
    return parser.found + unescaped


def test_templates_have_no_scripts_and_no_styles_of_their_own() -> None:
    wrong = "<script>x</script><p style='a' onclick=b><a href='javascript:c'>{{ d | safe }}"
    assert inline(wrong) == ["script", "style", "onclick", "javascript:c", "| safe"]
    found = sorted((dashboard.STATIC.parent / "templates").glob("*.html"))
    assert [t.stem for t in found] == [
        "admin",
        "analysis",
        "base",
        "compare",
        "index",
        "log",
        "login",
        "new",
        "plotly",
        "reference",
        "refused",
        "search",
        "signed_in",
        "space",
        "structure",
        "task",
        "tasks",
        "trial",
        "workers",
    ]
    for template in found:
        assert inline(template.read_text(encoding="utf-8")) == [], template.name
