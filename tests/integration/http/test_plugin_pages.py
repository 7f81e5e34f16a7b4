"""Pages and answers about tasks of plug-ins that cannot be used, or are other ones by now."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from api.app import create_app
from nas.planning import tasks
from nas.planning.request import SearchRequest
from nas.planning.tasks import TaskCard, task_cards
from nas.settings import Settings
from nas.store import Leases, Store, upgrade
from nas.training.plugin import described
from tests.support.tasks import Plain


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> dict[str, TaskCard]:
    found = {
        **task_cards(),
        "plain": tasks.card_of("x", json.loads(json.dumps(described(Plain())))),
    }
    monkeypatch.setattr(tasks, "_installed", lambda: found)
    return found


def test_a_task_that_cannot_be_used_is_told_and_breaks_no_page(
    known: dict[str, TaskCard], tmp_path: Path
) -> None:
    used = Settings(home=tmp_path)
    upgrade(used.resolved_database_url)
    store = Store(used.resolved_database_url)
    request = SearchRequest.checked(
        {"task": "plain", "recipe": "plain-deep", "train_flops": 1e9, "trainer": "client"}
    )
    search = store.create_search(request)[0].id
    claimed = Leases(store).claim("w", 30.0, trainer="client")
    assert claimed is not None
    assert Leases(store).claim("w", 30.0) is None
    Leases(store).set_fingerprint(claimed[0], "0123456789abcdef")
    why = "InvalidInput: model: got <b>none</b>"
    with TestClient(create_app(used), base_url="http://127.0.0.1") as client:
        assert "trained by" in client.get(f"/searches/{search}").text
        mine = next(t for t in client.get("/v1/tasks").json()["items"] if t["name"] == "plain")
        (data,) = mine["fingerprints"]
        assert (data["recipe"], data["trainer"]) == ("plain-deep", "client")
        assert "data of clients" in client.get("/tasks").text
        known["plain"] = TaskCard("plain", "unknown", (), "x", why)
        for page in ("/", "/tasks", "/new", "/space", "/v1/tasks", "/v1/searches"):
            assert client.get(page).status_code == 200, page
        assert "got &lt;b&gt;none&lt;/b&gt;" in client.get("/tasks").text
        mine = next(t for t in client.get("/v1/tasks").json()["items"] if t["name"] == "plain")
        assert (mine["refusal"], mine["recipes"]) == (why, [])
        assert [d["recipe"] for d in mine["fingerprints"]] == ["plain-deep"]
        refused = client.post("/v1/searches", json={"task": "plain", "train_flops": 1e9})
        assert refused.status_code == 422
        assert "this one cannot be used" in refused.json()["accepted"]
        assert client.get(f"/searches/{search}").status_code == 422
        del known["plain"]
        assert client.get("/").status_code == 200
        assert client.get("/v1/searches").json()["items"][0]["request"]["task"] == "plain"
    store.close()
