"""Keys over REST: who may make, replace and revoke which, and that no secret is told twice."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fastapi.testclient import TestClient
from jsonschema import Draft202012Validator
from sqlalchemy import update

from api.app import create_app
from nas.errors import NotPermitted
from nas.settings import Settings
from nas.store import Store, upgrade
from nas.store import delegation as rules
from nas.store.audit import Audit, Entry
from nas.store.engine import writing
from nas.store.keys import Keys
from nas.store.schema import KeyRow
from tests.support.hostile import FRAGMENTS, TEXTS, bodies_with, places

DAY = 86_400.0
MANAGER = ("read", "submit", "keys")
ORIGIN = {"Origin": "http://127.0.0.1"}


class House(NamedTuple):
    client: TestClient
    store: Store
    log: pytest.LogCaptureFixture

    def key(self, scopes: Any = MANAGER, tenant: str = "mine", **options: Any) -> tuple[str, str]:
        """(id, secret) of a key that the operator has made."""
        made, secret = Keys(self.store).create(tenant, "made here", scopes, **options)
        return made.id, secret

    def ask(self, method: str, path: str, secret: str | None, **options: Any) -> Any:
        headers = dict(options.pop("headers", {}))
        if secret is not None:
            headers["Authorization"] = f"Bearer {secret}"
        return self.client.request(method, f"/v1/keys{path}", headers=headers, **options)

    def make(self, secret: str, **body: Any) -> dict[str, Any]:
        made = self.ask("POST", "", secret, json={"name": "ci", **body})
        assert made.status_code == 201, made.text
        found: dict[str, Any] = made.json()
        return found

    def keys(self) -> dict[str, tuple[Any, ...]]:
        """What may not change of every key, by its id."""
        found = Keys(self.store).list()
        return {k.id: (k.tenant, k.name, k.scopes, k.expires_at, k.revoked_at) for k in found}

    def works(self, secret: str) -> bool:
        headers = {"Authorization": f"Bearer {secret}"}
        return bool(self.client.get("/v1/searches", headers=headers).status_code == 200)

    def told(self, limit: int = 500) -> list[Entry]:
        return Audit(self.store).entries(limit=limit)


@pytest.fixture
def house(migrated_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[House]:
    settings = Settings(home=tmp_path, access_control=True, database_url=migrated_url)
    caplog.set_level("DEBUG")
    with TestClient(create_app(settings), "http://127.0.0.1", follow_redirects=False) as client:
        deadline = time.monotonic() + 600
        while client.get("/readyz").status_code != 200:
            assert time.monotonic() < deadline
        store = Store(migrated_url)
        yield House(client, store, caplog)
        store.close()


only_sqlite = pytest.mark.parametrize("migrated_url", ["sqlite"], indirect=True)


def refused(response: Any, status: int, part: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert part in response.json()["detail"], response.text
    assert len(response.content) < 4096


def test_a_key_makes_replaces_and_revokes_keys_of_its_tenant(house: House) -> None:
    by, secret = house.key()
    made = house.ask("POST", "", secret, json={"name": "ci", "scopes": ["read"]})
    assert made.status_code == 201, made.text
    first = made.json()
    assert made.headers["location"] == f"/v1/keys/{first['id']}"
    assert (first["tenant"], first["scopes"], first["created_by"]) == ("mine", ["read"], by)
    assert (first["expires_at"], first["revoked_at"], first["rotated_from"]) == (None, None, None)
    assert house.works(first["key"])

    shown = house.ask("GET", f"/{first['id']}", secret).json()
    assert {k: v for k, v in first.items() if k != "key"} == {**shown, "used_at": None}
    rotated = house.ask("POST", f"/{first['id']}/rotate", secret, json={"grace_seconds": 60})
    assert rotated.status_code == 201, rotated.text
    second = rotated.json()
    assert (second["rotated_from"], second["created_by"]) == (first["id"], by)
    assert (second["name"], second["scopes"]) == ("ci", ["read"])
    assert house.works(first["key"])  # for the minute
    assert house.works(second["key"])
    third = house.ask("POST", f"/{second['id']}/rotate", secret).json()
    assert not house.works(second["key"])  # without a grace at once
    for _ in range(2):
        revoked = house.ask("POST", f"/{third['id']}/revoke", secret)
        assert revoked.status_code == 200, revoked.text
        assert revoked.json()["revoked_at"] is not None
        assert not house.works(third["key"])
    refused(house.ask("POST", f"/{third['id']}/rotate", secret), 409, "is revoked")

    ids = [first["id"], second["id"], third["id"]]
    listed = house.ask("GET", "", secret).json()
    assert [k["id"] for k in listed["items"]] == [*ids[::-1], by]
    assert listed["next"] is None
    pages = []
    query: dict[str, Any] = {"limit": 3}
    for _ in range(2):
        page = house.ask("GET", "", secret, params=query).json()
        pages += [k["id"] for k in page["items"]]
        query["cursor"] = page["next"]
    assert pages == [*ids[::-1], by]

    records = [e for e in house.told() if e.action.startswith("key ") and e.reason]
    assert [e.action for e in records if f"by {by}" in str(e.reason)] == [
        "key revoked", "key rotated", "key rotated", "key created",
    ]  # fmt: skip
    asked = [e for e in house.told() if e.action == "POST done"]
    assert {(e.key_id, e.tenant) for e in asked} == {(by, "mine")}
    assert len(asked) == 5


def test_a_secret_is_in_one_answer_and_nowhere_else(house: House) -> None:
    _, secret = house.key()
    once = {"Idempotency-Key": "once"}
    made = house.ask("POST", "", secret, json={"name": "ci"}, headers=once).json()
    again = house.ask("POST", "", secret, json={"name": "ci"}, headers=once)
    other = house.ask("POST", f"/{made['id']}/rotate", secret, json={"grace_seconds": 9}).json()
    answers = [again, house.ask("GET", "", secret), house.ask("GET", f"/{made['id']}", secret)]
    answers.append(house.ask("POST", f"/{other['id']}/revoke", secret))
    answers.append(house.ask("GET", f"/{made['key']}", secret))  # a secret where an id belongs
    answers.append(house.ask("POST", "", secret, json={"name": made["key"], "scopes": ["x"]}))
    answers.append(house.ask("POST", "", made["key"], json={"name": "x"}))
    answers.append(house.ask("POST", "", secret, json={"name": made["key"]}))
    assert [a.status_code for a in answers] == [200] * 4 + [422, 422, 403, 422]
    # the client of this test has a log, too
    log = [r.getMessage() for r in house.log.records if not r.name.startswith("httpx2")]
    written = "".join(a.text for a in answers) + repr(house.told()) + "\n".join(log)
    for one in (made["key"], other["key"], secret):
        assert one[5:] not in written
    with writing(house.store.engine) as session:
        stored = repr([tuple(row) for row in session.execute(KeyRow.__table__.select())])
    assert made["key"][5:] not in stored


def test_a_repeated_request_makes_no_second_key(house: House) -> None:
    _, secret = house.key()
    once = {"Idempotency-Key": "a deploy".replace(" ", "-")}
    made = house.ask("POST", "", secret, json={"name": "ci"}, headers=once)
    again = house.ask("POST", "", secret, json={"name": "ci"}, headers=once)
    assert (made.status_code, again.status_code) == (201, 200)
    assert again.json() == {**made.json(), "key": None}
    assert again.headers["location"] == made.headers["location"]
    other = house.ask("POST", "", secret, json={"name": "cd"}, headers=once)
    refused(other, 422, "was used before with another request")
    assert other.json()["type"] == "urn:einsum-nas:idempotency-conflict"

    path = f"/{made.json()['id']}/rotate"
    refused(house.ask("POST", path, secret, headers=once), 422, "was used before")
    twice = {"Idempotency-Key": "rotation"}
    body = {"grace_seconds": 5}
    rotated = house.ask("POST", path, secret, json=body, headers=twice)
    same = house.ask("POST", path, secret, json=body, headers=twice)
    assert (rotated.status_code, same.status_code) == (201, 200)
    assert same.json() == {**rotated.json(), "key": None}
    # another tenant's keys are its own
    _, theirs = house.key(tenant="theirs")
    assert house.ask("POST", "", theirs, json={"name": "ci"}, headers=once).status_code == 201


@only_sqlite
def test_no_key_gives_a_scope_that_it_has_not(house: House) -> None:
    _, secret = house.key(["read", "keys"])
    _, operator = house.key(["read", "submit", "admin", "keys"])
    before = len(Keys(house.store).list())
    for scopes in (["submit"], ["read", "admin"], None):
        body = {"name": "x"} | ({} if scopes is None else {"scopes": scopes})
        refused(house.ask("POST", "", secret, json=body), 403, "it may not give scope")
    # nor gets the secret of one that has more, nor ends it
    wide, _ = house.key(["read", "admin"])
    for act in ("rotate", "revoke"):
        refused(house.ask("POST", f"/{wide}/{act}", secret), 403, "with scope admin")
    assert len(Keys(house.store).list()) == before + 1
    lines = [e for e in house.told() if e.status == 403]
    assert len(lines) == 5
    assert all("it may not" in str(e.reason) for e in lines)
    made = house.make(operator, scopes=["read", "admin", "keys"])
    assert made["scopes"] == ["read", "admin", "keys"]
    refused(house.ask("POST", "", made["key"], json={"name": "x"}), 403, "scope submit")


def test_no_key_makes_one_that_outlives_it(house: House) -> None:
    id_, secret = house.key(seconds=10 * DAY)
    ends = next(k for k in Keys(house.store).list() if k.id == id_).expires_at
    refused(
        house.ask("POST", "", secret, json={"name": "x", "lifetime_seconds": 11 * DAY}), 403,
        "makes none that lives longer",
    )  # fmt: skip
    short = house.make(secret, lifetime_seconds=DAY)
    assert short["expires_at"] == pytest.approx(short["created_at"] + DAY)
    assert house.make(secret)["expires_at"] == ends
    # neither by replacing itself, late in its life, nor one that never expires
    with writing(house.store.engine) as session:
        early = {"created_at": time.time() - 9 * DAY, "expires_at": time.time() + DAY}
        session.execute(update(KeyRow).where(KeyRow.id == id_).values(**early))
    for replaced in (house.key()[0], id_):
        body = {"grace_seconds": 60}
        made = house.ask("POST", f"/{replaced}/rotate", secret, json=body).json()
        assert made["expires_at"] == pytest.approx(early["expires_at"])


@only_sqlite
def test_keys_of_another_tenant_are_as_if_they_were_not_there(house: House) -> None:
    id_, secret = house.key()
    _, theirs = house.key(["read", "submit", "admin", "keys"], tenant="theirs")
    before = house.keys()
    for method, path in (("GET", ""), ("POST", "/rotate"), ("POST", "/revoke")):
        found = house.ask(method, f"/{id_}{path}", theirs)
        missing = house.ask(method, f"/{'0' * 12}{path}", theirs)
        refused(found, 404, f"no key '{id_}'")
        assert found.text.replace(id_, "0" * 12) == missing.text
    assert id_ not in house.ask("GET", "", theirs).text
    refused(house.ask("GET", "", theirs, params={"cursor": id_}), 422, "cursor: got")
    for given in ({"tenant": "mine"}, {"created_by": id_}, {"digest": "0" * 64}, {"key": "enas_"}):
        refused(house.ask("POST", "", theirs, json={"name": "x", **given}), 422, "only the fields")
    headers = {"X-Tenant": "mine"}
    refused(house.ask("POST", "", theirs, json={"name": "x"}, headers=headers), 403, "X-Tenant")
    assert house.keys() == before
    assert house.works(secret)


@only_sqlite
def test_sessions_are_no_keys(house: House) -> None:
    """A browser's session changes no keys, and is none that could be replaced by one."""
    id_, secret = house.key(["read", "submit", "admin", "keys"])
    form = {"key": secret, "admin": "true"}
    assert house.client.post("/login", data=form).status_code == 303
    for origin in (ORIGIN, {}, {"Origin": "http://evil.example"}):
        answer = house.ask("POST", "", None, json={"name": "x"}, headers=origin)
        assert answer.status_code == 403
    refused(house.ask("GET", "", None), 403, "scope keys")
    house.client.cookies.clear()
    with writing(house.store.engine) as session:
        query = KeyRow.__table__.select().where(KeyRow.parent == id_)
        (row,) = session.execute(query).all()
    for act in ("rotate", "revoke"):
        refused(house.ask("POST", f"/{row.id}/{act}", secret), 404, "no key")
    assert row.id not in house.ask("GET", "", secret).text
    # of a key that is revoked they end with it
    headers = {"Cookie": "einsum_nas_session=x"}
    assert house.ask("POST", f"/{id_}/revoke", secret).status_code == 200
    assert house.ask("GET", "", None, headers=headers).status_code == 401


@only_sqlite
def test_pages_of_other_sites_change_no_keys(house: House) -> None:
    _, secret = house.key()
    evil = {"Origin": "http://evil.example"}
    for path in ("", f"/{'0' * 12}/rotate", f"/{'0' * 12}/revoke"):
        answer = house.ask("POST", path, secret, json={"name": "x"}, headers=evil)
        refused(answer, 403, "pages of other sites")


def test_a_key_ends_itself_and_can_do_nothing_more(house: House) -> None:
    """Whoever has found its secret in a log can still end it."""
    id_, secret = house.key()
    assert house.ask("POST", f"/{id_}/revoke", secret).status_code == 200
    assert house.ask("POST", "", secret, json={"name": "x"}).status_code == 401


@only_sqlite
def test_a_key_that_was_revoked_after_its_request_was_let_in(house: House) -> None:
    id_, secret = house.key()
    other = house.make(secret)
    Keys(house.store).revoke(id_)
    late = rules.TenantKeys(house.store, "mine", id_)
    for act in (
        lambda: late.create("x", ["read"]),
        lambda: late.rotate(other["id"]),
        lambda: late.revoke(other["id"]),
    ):
        with pytest.raises(NotPermitted, match="this key is revoked"):
            act()
    assert house.works(other["key"])


def test_a_tenant_has_so_many_keys(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has rates of its own, so that more of them would undo the rates."""
    monkeypatch.setattr(rules, "MOST_KEYS", 3)
    id_, secret = house.key()
    house.make(secret)
    last = house.make(secret)
    told = "over REST no more than 3 are made"
    refused(house.ask("POST", "", secret, json={"name": "x"}), 409, told)
    path = f"/{last['id']}/rotate"
    refused(house.ask("POST", path, secret, json={"grace_seconds": 60}), 409, told)
    assert house.ask("POST", path, secret).status_code == 201  # one for one
    house.ask("POST", f"/{id_}/revoke", secret)
    assert len([k for k in Keys(house.store).list("mine") if k.revoked_at is None]) == 2


@only_sqlite
def test_every_field_takes_hostile_values_for_what_they_are(house: House) -> None:
    _, secret = house.key()
    document = house.client.get("/openapi.json").json()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {secret}"}
    fragments = [*(json.dumps(t, ensure_ascii=False) for t in TEXTS), *FRAGMENTS]
    target = house.make(secret)["id"]
    for path in ("/v1/keys", "/v1/keys/{key_id}/rotate"):
        content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        example = next(iter(content["examples"].values()))["value"]
        for place in places(content["schema"]):
            for body in bodies_with(example, place, fragments):
                answer = house.client.post(
                    path.replace("{key_id}", target), content=body, headers=headers
                )
                if answer.status_code == 201:
                    made = answer.json()
                    assert set(made["scopes"]) <= set(MANAGER)
                    if path.endswith("rotate"):
                        target = made["id"]
                    else:
                        house.ask("POST", f"/{made['id']}/revoke", secret)
                    continue
                assert answer.status_code in (403, 409, 413, 415, 422), (place, body[:200])
                assert answer.headers["content-type"] == "application/problem+json"
                assert len(answer.content) < 4096
    assert house.works(secret)


@only_sqlite
def test_examples_of_the_document_are_taken(house: House) -> None:
    _, secret = house.key()
    document = house.client.get("/openapi.json").json()
    made = house.make(secret)
    for path in ("/v1/keys", "/v1/keys/{key_id}/rotate"):
        content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        for example in content["examples"].values():
            Draft202012Validator(content["schema"]).validate(example["value"])
            url = path.removeprefix("/v1/keys").replace("{key_id}", made["id"])
            answer = house.ask("POST", url, secret, json=example["value"])
            assert answer.status_code == 201, answer.text


def test_without_access_control_the_command_line_makes_keys(tmp_path: Path) -> None:
    """Otherwise another user of this machine could make one for later."""
    settings = Settings(home=tmp_path)
    upgrade(settings.resolved_database_url)
    with TestClient(create_app(settings), "http://127.0.0.1") as client:
        for path in ("", f"/{'0' * 12}/rotate", f"/{'0' * 12}/revoke"):
            body = None if path else {"name": "x"}
            refused(client.post(f"/v1/keys{path}", json=body), 403, "`einsum-nas keys` on the")
        assert client.get("/v1/keys").json() == {"items": [], "next": None}
