"""Who gets in: every operation of the OpenAPI document against every key that must not do it."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles
from fastapi.testclient import TestClient
from sqlalchemy import update

from api.app import create_app
from api.declared import PROBE, PUBLIC, READ, SUBMIT, declared_of, read_declarations
from api.limits import rates
from api.middleware.audit import AuditTrail
from nas.errors import InvalidInput
from nas.settings import Settings, is_loopback
from nas.store import Leases, Store, upgrade
from nas.store.audit import Audit, Entry
from nas.store.engine import writing
from nas.store.keys import SCOPES, Keys
from nas.store.schema import KeyRow
from tests.support.services import PATIENCE
from tests.support.stored import begun, run

BODY = {"train_flops": 2e11, "trials": 2}
NOWHERE = "0" * 32
#: Each request comes from another one, so that the log's line of it can be told.
_addresses = (f"10.{a}.{b}.7" for a, b in itertools.product(range(256), repeat=2))


@dataclasses.dataclass
class House:
    """A service with access control, the secrets of its keys, and another tenant's things."""

    running: TestClient
    store: Store
    #: name → secret
    keys: dict[str, str]
    ids: dict[str, str]
    #: of another tenant
    theirs: dict[str, str]

    def client(self, address: str | None = None) -> TestClient:
        """A client at an address, by default one not used before."""
        whence = (address or next(_addresses), 50000)
        app = self.running.app
        found = TestClient(app, "http://127.0.0.1", client=whence, follow_redirects=False)
        found.portal = self.running.portal  # all in the loop that the service runs in
        return found

    def ask(
        self, method: str, path: str, key: str | None = None, **options: Any
    ) -> tuple[Any, Entry | None]:
        """The response, and what the audit log says of it; from an address not used before."""
        address = next(_addresses)
        client = self.client(address)
        headers = dict(options.pop("headers", {}))
        if key is not None:
            headers["Authorization"] = f"Bearer {self.keys.get(key, key)}"
        response = client.request(method, path, headers=headers, **options)
        lines = [e for e in Audit(self.store).entries(limit=20) if e.address == address]
        assert len(lines) <= 1
        return response, lines[0] if lines else None


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    home = tmp_path_factory.mktemp("home")
    settings = Settings(home=home, access_control=True)
    upgrade(settings.resolved_database_url)
    store = Store(settings.resolved_database_url)
    keys = Keys(store)
    made: dict[str, str] = {}
    for scope in SCOPES:
        made[scope] = keys.create("mine", scope, [scope])[1]
    made["all"] = keys.create("mine", "all", SCOPES)[1]
    other, made["other"] = keys.create("theirs", "other", SCOPES)
    revoked, made["revoked"] = keys.create("mine", "revoked", SCOPES)
    keys.revoke(revoked.id)
    expired, made["expired"] = keys.create("mine", "expired", SCOPES, seconds=60)
    with writing(store.engine) as session:
        past = {"expires_at": time.time() - 1}
        session.execute(update(KeyRow).where(KeyRow.id == expired.id).values(**past))
    made["unknown"] = "enas_" + "A" * 43
    theirs = begun(store.view("theirs"))
    trial = run(store, theirs, 0, [3.0, 2.0])
    Leases(store).release(theirs, "succeeded")
    with pytest.MonkeyPatch.context() as patch:  # a minute may pass while one test runs
        patch.setattr(rates, "_SIGN_INS", "30/year")
        patch.setattr(rates, "_AUDIT_TOTAL", "1000000/minute")  # every refusal here is looked for
        app = create_app(settings)
    with TestClient(app, "http://127.0.0.1") as client:
        deadline = time.monotonic() + PATIENCE
        while client.get("/readyz").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield House(
            client, store, made,
            {"search_id": NOWHERE, "trial_id": "999999", "key_id": NOWHERE[:12]},
            {"search_id": theirs.search_id, "trial_id": str(trial), "key_id": other.id},
        )  # fmt: skip
    store.close()


def operations() -> list[tuple[str, str]]:
    """Every operation of the document; and what is served besides it."""
    document = create_app(Settings(access_control=True)).openapi()
    found = [
        (method.upper(), path)
        for path, its in document["paths"].items()
        for method in its
    ]  # fmt: skip
    besides = [("GET", "/"), ("GET", "/searches/{search_id}"), ("GET", "/metrics"),
               ("GET", "/searches/{search_id}/live"), ("POST", "/logout"),
               ("GET", "/searches/{search_id}/analysis"), ("GET", "/searches/{search_id}/log"),
               ("GET", "/searches/{search_id}/rows"), ("GET", "/searches/{search_id}/laws"),
               ("GET", "/compare"),
               ("GET", "/tasks"), ("GET", "/space"), ("GET", "/workers"), ("GET", "/admin"),
               ("GET", "/reference"),
               ("GET", "/v1/nothing"), ("PUT", "/v1/searches"),
               ("DELETE", "/v1/searches/{search_id}"),
               ("TRACE", "/v1/searches"), ("GET", "/docs"), ("GET", "/static2")]  # fmt: skip
    return found + besides


APP = create_app(Settings(access_control=True))


def scopes_of(method: str, path: str) -> tuple[str, ...] | None:
    """The scopes that a request needs; None: no key."""
    return declared_of(request_for(path, method), APP).scopes


def request_for(path: str, method: str = "GET") -> dict[str, Any]:
    return {"type": "http", "method": method, "path": path, "root_path": "", "headers": []}


CLOSED = [o for o in operations() if scopes_of(*o) is not None]
OPEN = ("/healthz", "/readyz", "/openapi.json", "/login")
ADMIN = ("/metrics", "/v1/workers", "/v1/audit", "/admin")


def filled(path: str, ids: dict[str, str]) -> str:
    return path.format(**{**ids, "name": "x"})


def is_problem(response: Any, status: int) -> bool:
    return bool(
        response.status_code == status
        and response.headers["content-type"] == "application/problem+json"
        and len(response.content) < 4096
        and response.json()["status"] == status
    )


def test_nothing_else_is_open() -> None:
    assert {o for o in operations() if scopes_of(*o) is None} == {
        ("GET", "/healthz"), ("GET", "/readyz"),
    }  # fmt: skip
    assert {scopes_of(*o) for o in CLOSED} == {*((scope,) for scope in SCOPES), ()}
    for path in ("/static", "/Static/x", "/login/", "//login", "/v1/../login", "/healthz/x"):
        assert scopes_of("GET", path) == ()
    for path in (*OPEN, "/static/x", "/static/plotly.min.js"):
        assert scopes_of("GET", path) is None
    for path in ADMIN:
        assert scopes_of("GET", path) == ("admin",)


def test_every_route_declares_one_permission() -> None:
    """What changes anything needs scope submit, or keys for keys, except for signing in and out."""
    declared = {
        (method, route.path): found.scopes
        for route, found in APP.state.declarations
        for method in route.methods or ("GET",)
    }
    assert len(declared) >= 30
    assert {path for (_, path), scopes in declared.items() if scopes is None} == {
        *OPEN, "/static", "/static/plotly.min.js", "/static/plotly-basic.min.js",
    }  # fmt: skip
    unsafe = {path: scopes for (method, path), scopes in declared.items() if method == "POST"}
    others = {"/login": None, "/logout": (), "/v1/searches/preview": ("read",)} | dict.fromkeys(
        ("/v1/keys", "/v1/keys/{key_id}/rotate", "/v1/keys/{key_id}/revoke"), ("keys",)
    )
    assert unsafe == {**dict.fromkeys(unsafe, ("submit",)), **others}
    assert {
        path: (found.needs_store, found.probe)
        for path in (r.path for r, _ in APP.state.declarations)
        if not (found := declared_of(request_for(path), APP)).needs_store
    } == {
        "/healthz": (False, True), "/readyz": (False, True), "/metrics": (False, True),
        "/static/plotly.min.js": (False, False), "/static/plotly-basic.min.js": (False, False),
    }  # fmt: skip


def test_the_document_says_which_scope_an_operation_needs() -> None:
    for path, operations_at in APP.openapi()["paths"].items():
        for method, operation in operations_at.items():
            needed = scopes_of(method.upper(), path)
            expected = None if needed is None else [{"key": list(needed)}]
            assert operation.get("security") == expected, path
            assert ("401" in operation["responses"]) == (needed is not None)
    open_to_this_machine = json.dumps(create_app(Settings()).openapi())
    assert '"security' not in open_to_this_machine


@pytest.mark.parametrize("given", [[], [READ, SUBMIT], [PUBLIC, READ], [PROBE]])
def test_a_route_without_one_permission_is_refused(given: list[Any]) -> None:
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.add_api_route("/x", lambda: None, dependencies=given)
    with pytest.raises(LookupError, match="/x declares"):
        read_declarations(app)


def test_a_folder_without_a_permission_is_refused(tmp_path: Path) -> None:
    app = FastAPI(openapi_url=None)
    app.mount("/x", StaticFiles(directory=tmp_path))
    with pytest.raises(LookupError, match="/x declares"):
        read_declarations(app)


@pytest.mark.parametrize(("method", "path"), CLOSED)
@pytest.mark.parametrize("key", [None, "unknown", "expired", "revoked", "nonsense", "enas_x"])
def test_without_a_usable_key_nothing_is_told(
    house: House, method: str, path: str, key: str | None
) -> None:
    for ids in (house.ids, house.theirs):
        response, line = house.ask(method, filled(path, ids), key, json=BODY)
        assert is_problem(response, 401), response.text
        assert response.headers["www-authenticate"] == "Bearer"
        assert line is not None
        assert (line.status, line.target) == (401, filled(path, ids))
        known = key in ("expired", "revoked")
        assert (line.key_id is not None) == known
        if known:
            assert str(key) in str(line.reason)
            assert str(key) in response.json()["detail"]


@pytest.mark.parametrize(("method", "path"), [o for o in CLOSED if o[1] != "/logout"])
def test_a_key_does_what_its_scopes_say_and_no_more(house: House, method: str, path: str) -> None:
    needed = scopes_of(method, path)
    assert needed is not None
    for scope in SCOPES:
        response, line = house.ask(method, filled(path, house.ids), scope, json=BODY)
        if needed == ():  # no route: nothing to be allowed
            assert response.status_code in (404, 405), response.text
            continue
        if needed == (scope,):
            assert response.status_code not in (401, 403), response.text
            continue
        assert is_problem(response, 403), response.text
        assert f"scope {needed[0]}" in response.json()["detail"]
        assert line is not None
        assert (line.status, line.tenant) == (403, "mine")


#: Bodies that are read after the search has been found; other operations read none.
BODIES = {
    "/priority": {"priority": 1},
    "/labels": {"name": "n"},
    "/confirm": {"top": 1, "seeds": 1},
    "/clone": {},
    "/ask": {},
    "/points": {"token": "0" * 32},
}
#: Operations that name a search, a trial or a key.
OF_IDS = [o for o in CLOSED if "{" in o[1] and o[0] in ("GET", "POST")]


@pytest.mark.parametrize(("method", "path"), OF_IDS)
def test_what_is_another_tenants_is_as_if_it_were_not_there(
    house: House, method: str, path: str
) -> None:
    body = next((b for end, b in BODIES.items() if path.endswith(end)), None)
    before = house.store.search(house.theirs["search_id"])
    keys = [(k.id, k.revoked_at) for k in Keys(house.store).list("theirs")]
    theirs, line = house.ask(method, filled(path, house.theirs), "all", json=body)
    nobodys, _ = house.ask(method, filled(path, house.ids), "all", json=body)
    assert is_problem(theirs, 404), theirs.text
    assert line is not None
    assert (line.status, line.tenant, line.target) == (404, "mine", filled(path, house.theirs))
    # the answers differ in nothing but the id that was asked for
    told = json.dumps(theirs.json())
    for name, value in house.theirs.items():
        if f"{{{name}}}" in path:  # an id of one digit is a part of others
            told = told.replace(value, house.ids[name])
    assert json.loads(told) == nobodys.json()
    assert house.store.search(house.theirs["search_id"]) == before
    assert [(k.id, k.revoked_at) for k in Keys(house.store).list("theirs")] == keys


@pytest.mark.parametrize("name", ["search", "task"])
@pytest.mark.parametrize("path", ["/v1/best", "/v1/frontier"])
def test_nor_do_answers_tell_of_another_tenants(house: House, path: str, name: str) -> None:
    value = house.theirs["search_id"] if name == "search" else "text@f1"
    query = {name: value, **({"train_flops": "2e9"} if path.endswith("best") else {})}
    theirs, _ = house.ask("GET", path, "other", params=query)
    assert theirs.status_code == 200, theirs.text  # it is there, for whose it is
    mine, line = house.ask("GET", path, "all", params=query)
    assert is_problem(mine, 404), mine.text
    assert line is not None
    assert line.status == 404


def test_every_parameter_of_the_document_that_is_an_id_is_tried() -> None:
    """A new way to name what is stored has to come into these tests."""
    document = create_app(Settings(access_control=True)).openapi()
    named = {
        p["name"]
        for its in document["paths"].values()
        for operation in its.values()
        for p in operation.get("parameters", ())
        if p["in"] in ("path", "query")
    }
    assert {n for n in named if n.endswith("_id") or n in ("search", "task", "tenant")} == {
        "search_id", "trial_id", "key_id", "search", "task", "tenant",
    }  # fmt: skip


def test_a_body_that_is_too_long_needs_a_key_first(house: House) -> None:
    headers = {"Content-Type": "application/json"}
    long: dict[str, Any] = {"content": b" " * 70_000, "headers": headers}
    response, line = house.ask("POST", "/v1/searches", **long)
    assert is_problem(response, 401)
    assert line is not None
    response, line = house.ask("POST", "/v1/searches", "submit", **long)
    assert is_problem(response, 413)
    assert line is not None
    assert line.action == "POST failed"


def test_a_key_where_none_belongs_is_not_kept(house: House) -> None:
    secret = house.keys["all"]
    response, line = house.ask(
        "GET", f"/v1/searches/{secret}", "read", headers={"X-Request-ID": secret}
    )
    assert response.status_code == 404
    assert line is not None
    assert (line.target, line.request_id) == ("/v1/searches/enas_***", "enas_***")


def test_a_key_opens_few_sessions_in_a_minute(house: House) -> None:
    before = Audit(house.store).entries(limit=1)[0].id
    statuses = [signed_in(house, "read")[1].status_code for _ in range(32)]
    assert statuses == [303] * 30 + [429] * 2
    lines = [e for e in Audit(house.store).entries(limit=500) if e.id > before]
    assert [e.action for e in lines].count("signed in") == 30
    assert len(lines) == 32


def test_a_list_is_of_ones_own(house: House) -> None:
    made, line = house.ask("POST", "/v1/searches", "submit", json=BODY)
    assert made.status_code == 201, made.text
    assert made.json()["tenant"] == "mine"
    assert line is not None
    assert (line.status, line.action, line.tenant) == (201, "POST done", "mine")
    for query in ({}, {"tenant": "theirs"}, {"tenant": "mine"}):
        listed, _ = house.ask("GET", "/v1/searches", "read", params=query)
        assert {s["tenant"] for s in listed.json()["items"]} <= {"mine"}
    tasks, _ = house.ask("GET", "/v1/tasks", "read")
    assert not any(t["fingerprints"] for t in tasks.json()["items"])
    page, _ = house.ask("GET", "/", "read")
    assert house.theirs["search_id"] not in page.text
    assert made.json()["id"] in page.text


def test_a_header_does_not_choose_the_tenant(house: House) -> None:
    refused, line = house.ask("GET", "/v1/searches", "read", headers={"X-Tenant": "theirs"})
    assert is_problem(refused, 403)
    assert line is not None
    same, _ = house.ask("GET", "/v1/searches", "read", headers={"X-Tenant": "mine"})
    assert same.status_code == 200


def test_what_is_open_says_nothing_of_anyone(house: House) -> None:
    for path in [*sorted(OPEN), "/static/style.css"]:
        response, line = house.ask("GET", path)
        assert response.status_code == 200, path
        assert line is None
        assert house.theirs["search_id"] not in response.text


def test_a_key_in_the_address_is_no_key(house: House) -> None:
    secret = house.keys["all"]
    for query in ({"key": secret}, {"api_key": secret}, {"access_token": secret}):
        response, _ = house.ask("GET", "/v1/searches", params=query)
        assert response.status_code == 401
    for scheme in ("Basic", "Token", ""):
        headers = {"Authorization": f"{scheme} {secret}".strip()}
        response, _ = house.ask("GET", "/v1/searches", headers=headers)
        assert response.status_code == 401


def test_the_audit_log_is_for_operators_and_has_no_secrets(house: House) -> None:
    tenants: set[str | None] = set()
    query: dict[str, Any] = {"limit": 500}
    while True:
        response, _ = house.ask("GET", "/v1/audit", "admin", params=query)
        assert response.status_code == 200
        assert not any(secret[5:] in response.text for secret in house.keys.values())
        tenants |= {e["tenant"] for e in response.json()["items"]}
        if response.json()["next"] is None:
            break
        query["cursor"] = response.json()["next"]
    assert {"mine", "theirs"} <= tenants


def test_a_flood_of_refusals_does_not_fill_the_log(house: House) -> None:
    client = house.client()
    before = Audit(house.store).entries(limit=1)[0].id
    statuses = [client.get("/v1/searches").status_code for _ in range(600)]
    assert set(statuses) <= {401, 429}
    assert Audit(house.store).entries(limit=1)[0].id - before <= 240  # of two windows at most


def test_the_number_of_a_flood_is_told_with_its_callers_next(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "_AUDIT", "3/day")
    trail = AuditTrail(house.store, rates.Rates(Settings()))
    flooding, other = next(_addresses), next(_addresses)

    async def note(address: str) -> None:
        await trail.note("GET", 401, "a key is needed", who=address, target="/x", address=address)

    async def flood() -> None:
        for _ in range(10):
            await note(flooding)
        await note(other)
        trail._rates = rates.Rates(Settings())  # the day is over
        await note(flooding)

    asyncio.run(flood())
    entries = Audit(house.store).entries(limit=20)
    told = [e.reason for e in entries if e.address == flooding]
    assert (
        told
        == ["a key is needed (and 7 more refused since the last record)"] + ["a key is needed"] * 3
    )
    assert [e.reason for e in entries if e.address == other] == ["a key is needed"]


@pytest.mark.parametrize("end", ["%0A", "%0D", "%00", "%1F", "%7F", "%C2%85", "%E2%80%A8"])
def test_what_cannot_be_seen_in_a_path_opens_nothing(house: House, end: str) -> None:
    """A pattern of a route ends before a last line feed, too."""
    for path in (*sorted(ADMIN), *sorted(OPEN), "/v1/searches/preview", "/v1/searches"):
        for method in ("GET", "POST"):
            response, _ = house.ask(method, path + end, "read", json=BODY)
            assert is_problem(response, 404), response.text


@pytest.mark.parametrize(("path", "key"), [("/healthz", None), ("/v1/searches", "submit")])
def test_a_flood_of_failures_does_not_fill_the_log_either(
    house: House, path: str, key: str | None
) -> None:
    client, before = house.client(), Audit(house.store).entries(limit=1)[0].id
    headers = {} if key is None else {"Authorization": f"Bearer {house.keys[key]}"}
    for _ in range(400):
        assert client.post(path, json={"trials": -1}, headers=headers).status_code in (405, 422)
    assert Audit(house.store).entries(limit=1)[0].id - before <= 240


# --- browsers


def signed_in(house: House, key: str = "all", next_: str = "/") -> tuple[TestClient, Any]:
    client = house.client()
    return client, client.post("/login", data={"key": house.keys[key], "next": next_})


def test_a_browser_signs_in_and_out(house: House) -> None:
    client, response = signed_in(house, next_="/searches/x?a=1")
    assert (response.status_code, response.headers["location"]) == (303, "/searches/x?a=1")
    cookie = response.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert "path=/" in cookie
    assert house.keys["all"] not in response.headers["set-cookie"]
    assert client.get("/v1/searches").status_code == 200
    assert client.get("/v1/workers").status_code == 403  # a session is no operator's
    no_origin = client.post("/v1/searches", json=BODY)
    assert is_problem(no_origin, 403)
    origin = {"Origin": "http://127.0.0.1"}
    assert client.post("/v1/searches", json=BODY, headers=origin).status_code == 201
    secret = client.cookies["einsum_nas_session"]
    assert client.post("/logout", headers=origin).status_code == 303
    stolen, _ = house.ask("GET", "/v1/searches", headers={"Cookie": f"einsum_nas_session={secret}"})
    assert is_problem(stolen, 401)
    assert client.post("/login", data={"key": secret}).status_code == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "http://"])
def test_a_page_of_another_site_changes_nothing(house: House, origin: str) -> None:
    client, _ = signed_in(house)
    before = len(house.store.searches())
    for path in ("/v1/searches", "/logout", "/login"):
        response = client.post(path, json=BODY, headers={"Origin": origin})
        assert is_problem(response, 403), response.text
    with_key = {"Origin": origin, "Authorization": f"Bearer {house.keys['all']}"}
    assert client.post("/v1/searches", json=BODY, headers=with_key).status_code == 403
    assert client.get("/v1/searches", headers={"Origin": origin}).headers.get(
        "access-control-allow-origin"
    ) is None  # fmt: skip
    assert len(house.store.searches()) == before
    assert client.get("/v1/searches").status_code == 200  # still signed in


@pytest.mark.parametrize(
    "target",
    [
        "//[",
        "//%5B",
        "http://[",
        "//evil.example",
        "https://evil.example",
        "/\\evil.example",
        "javascript:alert(1)",
        "x",
    ],
)
def test_signing_in_leads_nowhere_else(house: House, target: str) -> None:
    _, response = signed_in(house, next_=target)
    assert (response.status_code, response.headers["location"]) == (303, "/")


@pytest.mark.parametrize("key", ["revoked", "expired", "unknown"])
def test_a_key_that_opens_nothing_signs_nobody_in(house: House, key: str) -> None:
    _, response = signed_in(house, key)
    assert response.status_code == 403
    assert "set-cookie" not in response.headers
    assert "not a valid key of this service" in response.text
    assert house.keys[key] not in response.text


def test_an_operators_key_has_nothing_to_see(house: House) -> None:
    _, response = signed_in(house, "admin")
    assert response.status_code == 403
    assert "needs a key with scope" in response.text


def test_a_browser_without_a_session_is_sent_to_sign_in(house: House) -> None:
    page = {"Accept": "text/html"}
    response, line = house.ask("GET", "/searches/abc", headers=page)
    assert (response.status_code, response.headers["location"]) == (
        303,
        "/login?next=/searches/abc",
    )
    assert line is not None
    api, _ = house.ask("GET", "/v1/searches", headers=page)
    assert api.status_code == 401


# --- without access control


def test_without_access_control_no_other_origin_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="EINSUM_NAS_ACCESS_CONTROL=true"):
        create_app(Settings(home=tmp_path, allowed_origins=("https://app.example",)))


def test_without_access_control_only_this_machine_is_answered(tmp_path: Path) -> None:
    app = create_app(Settings(home=tmp_path))
    with TestClient(app, "http://127.0.0.1") as client:
        assert client.get("/v1/searches").status_code == 200
    for server, status in (("192.0.2.1", 403), ("127.0.0.9", 200), ("::1", 200)):
        host = f"[{server}]" if ":" in server else server
        with TestClient(app, f"http://{host}", headers={"Host": "localhost"}) as client:
            assert client.get("/v1/searches").status_code == status, server
    assert create_app(Settings(home=tmp_path), address="192.0.2.1").state.access_control
    assert not create_app(Settings(home=tmp_path)).state.access_control


@pytest.mark.parametrize(
    ("address", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("[::1]", True),
     ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("example.org", False), ("", False),
     ("localhost.example.org", False)],
)  # fmt: skip
def test_what_is_loopback(address: str, loopback: bool) -> None:
    assert is_loopback(address) is loopback
