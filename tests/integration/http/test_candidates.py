"""Searches with given candidates, stopping rules and totals, over REST and as the command line
submits them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from nas.settings import Settings

GOOD: dict[str, Any] = {"train_flops": 2e11}
CANDIDATES = [{"design": "monarch", "width": 32}, {"design": "low-rank:rho=1/2", "width": 48}]


@pytest.fixture(scope="module")
def settings(text_folder: Path) -> Settings:
    return Settings(data_dir=text_folder.parent)


def test_given_candidates_come_back_and_are_cloned(client: TestClient) -> None:
    made = client.post("/v1/searches", json={**GOOD, "candidates": CANDIDATES})
    assert made.status_code == 201, made.text
    search = made.json()
    assert (search["request"]["candidates"], search["request"]["trials"]) == (CANDIDATES, 2)
    detail = client.get(f"/v1/searches/{search['id']}").json()
    assert search.items() <= detail.items()
    # what is shown can be submitted again
    key = {"Idempotency-Key": "abc"}
    for status in (201, 200):
        again = client.post("/v1/searches", json=search["request"], headers=key)
        assert (again.status_code, again.json()["request"]) == (status, search["request"])
    cloned = client.post(f"/v1/searches/{search['id']}/clone", json={"seed": 3})
    assert cloned.status_code == 201, cloned.text
    assert cloned.json()["request"] == {**search["request"], "seed": 3}


@pytest.mark.parametrize(
    ("changes", "field", "told"),
    [
        ({"candidates": [*CANDIDATES, {"design": "monarch", "width": 33}]}, "candidates[2]",
         "'monarch' of width 33"),
        ({"candidates": CANDIDATES, "stopping": "median"}, "stopping", "median"),
        ({"total_train_flops": 1e11}, "total_train_flops", "100000000000"),
        ({"stopping": "frontier", "sampler": "tpe"}, "sampler", "tpe"),
    ],
)  # fmt: skip
def test_contradictions_are_refused_before_anything_is_stored(
    client: TestClient, changes: dict[str, Any], field: str, told: str
) -> None:
    for path in ("/v1/searches", "/v1/searches/preview"):
        answer = client.post(path, json={**GOOD, **changes})
        assert answer.status_code == 422
        problem = answer.json()
        assert problem["field"] == field
        assert told in problem["value"]
        assert problem["accepted"]
    assert client.get("/v1/searches").json()["items"] == []


def test_a_total_is_shown_with_the_rule_and_rounds(client: TestClient) -> None:
    made = client.post("/v1/searches", json={**GOOD, "total_train_flops": 1e13})
    assert made.status_code == 201, made.text
    search = made.json()
    request = search["request"]
    assert (request["total_train_flops"], request["trials"]) == (1e13, 10_000)
    assert (search["rounds"], search["runs_total"]) == (0, None)
