"""Names, tags and notes of searches, and the list that is searched by them."""

from __future__ import annotations

import html
import re
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.dashboard import listing
from nas.errors import span
from nas.records.progress import Overview
from nas.settings import Settings
from nas.store import Leases, Store


@pytest.fixture(scope="module")
def settings() -> Settings:
    return Settings()


def made(client: TestClient, **fields: Any) -> str:
    asked = {"task": "text", "train_flops": 2e11, "trials": 2, **fields}
    return str(client.post("/v1/searches", json=asked).json()["id"])


def listed(client: TestClient, query: str = "") -> list[str]:
    """Ids of the page's rows, in order."""
    page = client.get(f"/{query}")
    assert page.status_code == 200, page.text
    return re.findall(r'<tr data-id="([0-9a-f]{32})"', page.text)


def test_labels_change_alone_and_are_logged(client: TestClient) -> None:
    search = made(client)
    path = f"/v1/searches/{search}/labels"
    found = client.post(path, json={"name": "Text · widths", "tags": ["paper", "v2"]}).json()
    assert (found["name"], found["tags"], found["notes"]) == (
        "Text · widths",
        ["paper", "v2"],
        None,
    )
    found = client.post(path, json={"notes": "a\nb", "archived": True}).json()
    assert (found["name"], found["tags"]) == ("Text · widths", ["paper", "v2"])
    assert (found["notes"], found["archived"], found["state"]) == ("a\nb", True, "queued")
    assert client.post(path, json={"name": None, "tags": []}).json()["name"] is None
    store: Store = client.app.state.store  # type: ignore[attr-defined]
    events = [e.data for e in store.events(search) if e.kind == "labels"]
    assert events[1] == {"changed": ["archived", "notes"]}
    client.post(f"/v1/searches/{search}/cancel")
    assert client.post(path, json={"name": "ended"}).json()["name"] == "ended"


@pytest.mark.parametrize(
    ("labels", "field"),
    [
        ({"name": ""}, "name"), ({"name": "   "}, "name"), ({"name": "x" * 121}, "name"),
        ({"name": "a\u0007"}, "name"), ({"name": 3}, "name"),
        ({"tags": "paper"}, "tags"), ({"tags": ["a,b"]}, "tags"), ({"tags": ["a", "a"]}, "tags"),
        ({"tags": ["x" * 41]}, "tags"), ({"tags": [f"t{i}" for i in range(17)]}, "tags"),
        ({"tags": None}, "tags"), ({"notes": "x" * 4001}, "notes"), ({"notes": "\x00"}, "notes"),
        ({"archived": 1}, "archived"), ({}, "labels"), ({"colour": "red"}, "colour"),
    ],
)  # fmt: skip
def test_what_is_no_label_is_refused_and_named(
    client: TestClient, labels: dict[str, Any], field: str
) -> None:
    search = made(client)
    before = client.get(f"/v1/searches/{search}").json()
    refused = client.post(f"/v1/searches/{search}/labels", json=labels)
    assert refused.status_code == 422, refused.text
    assert refused.json()["field"].partition(".")[0] == field
    assert refused.json()["accepted"]
    assert client.get(f"/v1/searches/{search}").json() == before


def test_the_list_is_searched_by_name_tag_and_beginning_of_an_id(client: TestClient) -> None:
    first, second = made(client, seed=1), made(client, seed=2, task="regression")
    third = made(client, seed=3)
    client.post(f"/v1/searches/{first}/labels", json={"name": "100% wide", "tags": ["Paper"]})
    client.post(f"/v1/searches/{second}/labels", json={"name": "narrow_one"})
    client.post(f"/v1/searches/{third}/labels", json={"archived": True})
    everything = [second, first]
    for query, found in {
        "": everything, "?text=paper": [first], "?text=100%25": [first], "?text=%25": [first],
        "?text=_": [second], f"?text={second[:6].upper()}": [second], "?text=nothing": [],
        "?task=regression": [second], "?state=queued": everything, "?state=running": [],
        "?archived=true": [third], f"?archived=true&text={third[:5]}": [third],
        "?text=&state=&task=": everything,
    }.items():  # fmt: skip
        assert listed(client, query) == found, query
    rest = "/v1/searches?text={}&archived={}&task={}"
    assert [s["id"] for s in client.get(rest.format("WIDE", "false", "text")).json()["items"]] == [
        first
    ]
    assert client.get(rest.format("WIDE", "true", "text")).json()["items"] == []
    for bad in ("state=asleep", "task=juggling", "text=%00", "before=x"):
        assert client.get(f"/?{bad}").status_code == 422


def test_every_search_is_on_some_page(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "_ROWS", 3)
    searches = [made(client, seed=i) for i in range(7)]
    found, query = [], ""
    for _ in range(3):
        page = client.get(f"/{query}").text
        found += listed(client, query)
        older = re.search(r'rel="next" href="/([^"]*)"', page)
        query = html.unescape(older[1]) if older else ""
    assert found == searches[::-1]
    assert query == ""


def test_the_cells_that_change_are_those_of_the_page(client: TestClient) -> None:
    search = made(client)
    store: Store = client.app.state.store  # type: ignore[attr-defined]
    assert Leases(store).claim("w", 60, search_id=search)
    cells = client.get("/searches").json()[search]
    assert (cells["state"], cells["structured"], cells["runs"]) == ("running", "–", "0")
    shown = dict(
        re.findall(r'data-cell="(\w+)">([^<]*)<', client.get("/").text.partition(search)[2])
    )
    assert {k: v for k, v in shown.items() if k != "took"} == {
        k: v for k, v in cells.items() if k != "took"
    }


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (42, "42 s"), (400, "6.7 min"), (3600, "60 min"), (9000, "2.5 h"),
     (400_000, "4.6 days"), (4e6, "46 days")],
)  # fmt: skip
def test_time_spans_are_told_in_their_greatest_unit(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_what_is_left_takes_as_long_for_its_share_as_what_is_done() -> None:
    seen = {"structured": 2.0, "dense": None, "trained_flops": 10, "held_seconds": 30.0}
    assert Overview(**seen, share=0.25).seconds_left == pytest.approx(90.0)
    for share in (None, 0.0, 1.0, 1.2):
        assert Overview(**seen, share=share).seconds_left is None
