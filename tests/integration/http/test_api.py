"""The REST service on a store with known results."""

from __future__ import annotations

import html
import json
import math
import pickle
import re
import threading
import time
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from fastapi.testclient import TestClient

import nas.tasks
from api.dashboard import pages, plotly_js
from api.dashboard.figures import draw_scatter, scatter_data
from api.routes import searches
from api.schemas import SearchPage, TrialPage
from nas.designs.taxonomy import parse_theta
from nas.designs.theta import Theta
from nas.planning.recipe import RECIPES
from nas.planning.request import SearchRequest
from nas.planning.runs import RunPlan, plan_at, plan_of_steps, references
from nas.records.answers import Answer
from nas.settings import Settings
from nas.store import AXES, CurvePoint, Leases, Run, Store, StoredPoint, TrialDraft
from nas.tasks import corpus
from tests.support.services import PATIENCE
from tests.support.tables import small_table

BUDGET = 2e11
GOOD: dict[str, Any] = {"train_flops": BUDGET, "trials": 2}


@pytest.fixture(scope="module")
def settings(text_folder: Path) -> Settings:
    return Settings(data_dir=text_folder.parent)


def plant(client: TestClient) -> str:
    """A finished search: dense of loss 2.2 at 5 widths, Monarch 2.0, a failed one 1.0."""
    store: Store = client.app.state.store  # type: ignore[attr-defined]
    leases = Leases(store)
    request = SearchRequest.checked(GOOD)
    search, _ = store.create_search(request)
    got = leases.claim("w", 60, search_id=search.id)
    assert got is not None
    lease = got[0]
    leases.set_fingerprint(lease, "0011223344556677")
    recipe = request.settings
    monarch = plan_at(recipe, parse_theta("monarch"), 0.5, BUDGET)
    cheap = plan_at(recipe, parse_theta("low-rank:rho=1/2"), 0.5, BUDGET)
    runs: list[tuple[RunPlan, float | None]] = [
        *((p, 2.2 + 0.01 * i) for i, p in enumerate(references(recipe, BUDGET, 5))),
        (monarch, 2.0), (cheap, None),
    ]  # fmt: skip
    for number, (plan, loss) in enumerate(runs):
        kind: Any = "reference" if plan.dense else "candidate"
        draft = TrialDraft(number, kind, plan, 0, f"k{number}", plan.name)
        trial = leases.add_trial(lease, draft)
        leases.start_trial(lease, trial.id)
        if loss is None:
            step = plan.steps // 2
            leases.add_point(lease, trial.id, _point(plan, step, 1.0))
            leases.fail_trial(lease, trial.id, "loss is nan")
            continue
        for step, at in ((plan.steps // 4, loss * 1.3), (plan.steps, loss)):
            leases.add_point(lease, trial.id, _point(plan, step, at))
        leases.complete_trial(lease, trial.id, {"device": "cpu"})
    leases.release(lease, "succeeded")
    return search.id


def _point(plan: RunPlan, step: int, loss: float) -> StoredPoint:
    windows = tuple(loss + 0.1 * math.sin(i) for i in range(64))
    mean = sum(windows) / 64
    seconds = step * (0.01 if plan.dense else 0.02)
    return StoredPoint(step, float(step * plan.train_flops_per_step), mean, 0.01, seconds, windows)


def test_create_read_list_and_cancel(client: TestClient) -> None:
    made = client.post("/v1/searches", json=GOOD)
    assert made.status_code == 201
    search = made.json()
    assert made.headers["location"] == f"/v1/searches/{search['id']}"
    assert search["state"] == "queued"
    detail = client.get(f"/v1/searches/{search['id']}").json()
    overview = detail.pop("overview")
    assert (overview["trained_flops"], overview["seconds_left"]) == (0, None)
    assert detail == {**search, "progress": None}
    assert client.get("/v1/searches").json()["items"] == [search]
    assert client.post(f"/v1/searches/{search['id']}/cancel").json()["state"] == "cancelled"
    again = client.post(f"/v1/searches/{search['id']}/cancel")
    assert again.status_code == 409
    assert again.headers["content-type"] == "application/problem+json"


def test_an_idempotency_key_makes_one_search(client: TestClient) -> None:
    key = {"Idempotency-Key": "abc"}
    first = client.post("/v1/searches", json=GOOD, headers=key)
    second = client.post("/v1/searches", json=GOOD, headers=key)
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json()["id"] == second.json()["id"]
    other = client.post("/v1/searches", json={**GOOD, "seed": 3}, headers=key)
    assert other.status_code == 422
    assert other.json()["type"] == "urn:einsum-nas:idempotency-conflict"


BAD_FIELDS: list[tuple[str, Any]] = [
    ("train_flops", 0), ("train_flops", -5), ("train_flops", 1e30), ("train_flops", 1e6),
    ("train_flops", "x"), ("task", "nope"), ("sampler", "nope"), ("objective", "nope"),
    ("trials", 0), ("trials", 1.5), ("data", "../../etc/passwd"), ("data", "/etc/passwd"),
    ("data", "missing.txt"), ("data", "hf:imdb"), ("data", "empty.txt"),
    ("data", "texts/accents.txt"), ("data", "a\x00b"), ("nonsense", 1),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS)
def test_bad_fields_get_one_clear_error_and_store_nothing(
    client: TestClient, text_folder: Path, field: str, value: Any
) -> None:
    (text_folder.parent / "empty.txt").write_text("")
    for path in ("/v1/searches", "/v1/searches/preview"):
        answer = client.post(path, json={**GOOD, field: value})
        assert answer.status_code == 422
        assert answer.headers["content-type"] == "application/problem+json"
        problem = answer.json()
        assert problem["field"] == field
        assert str(value)[:4] in problem["value"] or "\\x00" in problem["value"]
        assert problem["accepted"]
        assert len(answer.content) < 4096
        assert str(text_folder.parent) not in answer.text
    assert client.get("/v1/searches").json()["items"] == []


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b'{"train_flops": NaN}', b'{"train_flops": 1e999}',
     b'{"train_flops": 2e11, "data": ' + b"[" * 950 + b"]" * 950 + b"}",
     b'{"train_flops": -Infinity}', b"[" * 60_000, b'{"task": "\\ud800", "train_flops": 2e11}',
     b"\xff\xfe", b'{"train_flops": ' + b"9" * 5000 + b"}", b'{"a": "' + b"x" * 60_000 + b'"}'],
)  # fmt: skip
def test_bodies_that_are_no_request_are_refused(client: TestClient, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    answer = client.post("/v1/searches", content=body, headers=headers)
    assert answer.status_code == 422, answer.text
    assert len(answer.content) < 4096
    assert answer.json()["field"] in ("body", "train_flops", "task", "a", "data")
    assert client.get("/v1/searches").json()["items"] == []


def test_pages_of_other_sites_can_neither_write_nor_read(client: TestClient) -> None:
    evil = {"Origin": "http://evil.example", "Content-Type": "text/plain"}
    assert client.post("/v1/searches", json=GOOD, headers=evil).status_code == 403
    assert client.get("/v1/searches", headers={"Host": "evil.example"}).status_code == 400
    assert client.get("/v1/searches").json()["items"] == []
    own = {"Origin": "http://127.0.0.1"}
    assert client.post("/v1/searches", json=GOOD, headers=own).status_code == 201


def test_a_huge_body_is_refused(client: TestClient) -> None:
    answer = client.post("/v1/searches", content=b"x" * 1_000_000)
    assert answer.status_code == 413
    assert len(answer.content) < 4096


@pytest.mark.parametrize(
    "path",
    ["/v1/structures?theta=1/2,0,1/4,0,1/2,1/2,0&d_in=8&d_out=8",
     "/v1/structures?theta=2,0,0,0,1,0,0&d_in=8&d_out=8", "/v1/structures?theta=monarch&d_in=8",
     "/v1/structures?theta=monarch&d_in=0&d_out=8", "/v1/structures?theta=monarch&d_in=x&d_out=8",
     "/v1/structures?theta=monarch&d_in=8&d_out=8&sizing=x",
     "/v1/best?task=text&train_flops=nan", "/v1/best?task=text&train_flops=-1",
     "/v1/best?task=text&params=0", "/v1/best?task=text&params=1e6&train_flops=1e12",
     "/v1/best?task=text",
     "/v1/best?task=nope&train_flops=1e12", "/v1/best?train_flops=1e12", "/v1/frontier",
     "/v1/frontier?task=text&search=x", "/v1/searches?limit=0", "/v1/searches?cursor=x",
     "/v1/trials/x", "/v1/trials/9223372036854775808", "/v1/searches?cursor=99999999999999999999",
     "/v1/frontier?search=%00", "/v1/frontier?task=text@%00",
     "/v1/searches/x/trials?cursor=99999999999999999999"],
)  # fmt: skip
def test_bad_queries_name_the_field(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 422, answer.text
    assert {"field", "value", "accepted"} <= set(answer.json())


@pytest.mark.parametrize(
    "path",
    ["/v1/searches/x", "/v1/searches/x/trials", "/v1/searches/x/events", "/v1/trials/1",
     "/v1/frontier?search=x", "/v1/best?search=x&train_flops=1e12", "/v1/frontier?task=text",
     "/v1/frontier?task=text@zzz",
     "/searches/x", "/nowhere", "/v1/searches/x%00/trials"],
)  # fmt: skip
def test_what_is_not_there_is_a_404_problem(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"


def test_trials_come_in_pages_with_exact_flops(client: TestClient) -> None:
    search = plant(client)
    first = client.get(f"/v1/searches/{search}/trials?limit=4").json()
    second = client.get(f"/v1/searches/{search}/trials?limit=4&cursor={first['next']}").json()
    trials = first["items"] + second["items"]
    assert [t["number"] for t in trials] == list(range(7))
    assert second["next"] is None
    for t in trials:
        assert t["train_flops"] == t["steps"] * t["train_flops_per_step"]
        assert BUDGET - t["train_flops_per_step"] < t["train_flops"] <= BUDGET
    curve = client.get(f"/v1/trials/{trials[5]['id']}").json()["curve"]
    assert [p["step"] for p in curve] == [trials[5]["steps"] // 4, trials[5]["steps"]]


def test_pages_are_what_their_models_say(client: TestClient) -> None:
    search = plant(client)
    for path, model in ((f"/v1/searches/{search}/trials", TrialPage), ("/v1/searches", SearchPage)):
        page = client.get(path).json()
        assert page["items"]
        assert model.model_validate(page).model_dump(mode="json") == page


def test_answers_come_in_the_encoding_that_is_asked_for(client: TestClient) -> None:
    search = plant(client)
    path = f"/v1/frontier?search={search}"
    plain = client.get(path, headers={"Accept-Encoding": "identity"})
    packed = client.get(path, headers={"Accept-Encoding": "gzip"})
    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == "gzip"
    assert int(packed.headers["content-length"]) < int(plain.headers["content-length"])
    assert packed.json() == plain.json()


def test_best_is_the_lowest_completed_run_within_the_budget(client: TestClient) -> None:
    search = plant(client)
    for query in (f"search={search}", "task=text", "task=text@0011223344556677"):
        best = client.get(f"/v1/best?{query}&train_flops={BUDGET}").json()
        assert best["name"] == "monarch"
        assert best["expected_loss"] == pytest.approx(2.0, abs=0.01)
        low, high = best["validation_interval"]
        assert low < best["expected_loss"] < high
        assert best["interval"] is None  # one seed: how much another would move it is not known
        assert "one seed" in best["interval_means"]
        assert best["best_dense"]["loss"] == pytest.approx(2.2, abs=0.01)
        assert best["dense_minus_structured"]["difference"] == pytest.approx(0.2)
        # windows move together, so the difference is sure although each loss is not
        low, high = best["dense_minus_structured"]["difference_interval"]
        assert low == pytest.approx(0.2)
        assert high == pytest.approx(0.2)
        assert best["indistinguishable"] == []
        assert best["kind"] == "measured"
        assert (best["verdict"], best["base_width"]) == ("unconfirmed", 64)  # one seed
        assert "one seed" in best["verdict_reason"]
    # Monarch goes from 2.6 to 2.0 over a factor of 4 in compute, straight in log-log
    share = math.log(2.6 / 2.2) / math.log(2.6 / 2.0)
    multiplier = best["multiplier_over_dense"]
    assert multiplier["kind"] == "exact"
    assert multiplier["value"] == pytest.approx(4 ** (1 - share), rel=0.02)
    # a step of Monarch takes twice as long as one of dense
    trials = {t["number"]: t for t in client.get(f"/v1/searches/{search}/trials").json()["items"]}
    seconds = {n: trials[n]["steps"] * (0.01 if n == 0 else 0.02) for n in (0, 5)}
    realised = best["realised_multiplier_over_dense"]
    assert realised == best["structured_realised_multiplier"]
    assert realised.pop("value") == pytest.approx(
        4 ** (1 - share) * seconds[0] / seconds[5], rel=0.02
    )
    assert realised == {
        "kind": "exact", "interval": None, "seeds": 1, "reason": None, "device": "cpu, float32",
        "together": [1],
    }  # fmt: skip
    assert best["best_structured"]["train_seconds"] == pytest.approx(seconds[5])
    assert best["best_structured"]["device"] == "cpu, float32"
    assert client.get("/v1/best?task=text&train_flops=1").status_code == 404
    # two points a curve are no law: nothing is said about budgets beyond what was measured
    beyond = client.get("/v1/best?task=text&train_flops=1e12")
    assert beyond.status_code == 404
    assert "beyond all measured budgets" in beyond.json()["detail"]
    assert "einsum-nas search" in beyond.json()["detail"]
    far = client.get("/v1/best?task=text&train_flops=1e15")
    assert far.status_code == 422
    assert far.json()["field"] == "train_flops"


def test_best_within_budgets_of_other_units(client: TestClient) -> None:
    search = plant(client)
    trials = {t["number"]: t for t in client.get(f"/v1/searches/{search}/trials").json()["items"]}
    narrow = trials[0]
    for unit, value in (
        ("params", narrow["params"]), ("inference_flops", narrow["forward_flops_per_token"])
    ):  # fmt: skip
        best = client.get(f"/v1/best?search={search}&{unit}={value}").json()
        assert best["best_dense"]["number"] == 0
        assert best["budget_axis"] == unit
        assert best["budget_unit"]
        assert client.get(f"/v1/best?search={search}&{unit}=0.5").status_code == 404
    within = trials[5]["steps"] * 0.02
    best = client.get(f"/v1/best?search={search}&train_seconds={within}&device=CPU").json()
    assert (best["budget_axis"], best["budget_unit"]) == ("train_seconds", "seconds of training")
    assert (best["device"], best["other_devices"], best["not_timed"]) == ("cpu, float32", [], 0)
    assert (best["name"], best["best_structured"]["train_seconds"]) == ("monarch", within)
    assert best["structured_realised_multiplier"]["kind"] == "exact"
    assert best["structured_multiplier"]["kind"] == "exact"
    none = client.get(f"/v1/best?search={search}&train_seconds=0.001")
    assert none.status_code == 404
    assert "on cpu, float32: the least measured is" in none.json()["detail"]
    for query in ("train_seconds=1&device=tpu", "params=1&device=cpu"):
        refused = client.get(f"/v1/best?search={search}&{query}")
        assert (refused.status_code, refused.json()["field"]) == (422, "device")
    # no step was timed here
    slow = client.get(f"/v1/best?search={search}&step_seconds=1")
    assert slow.status_code == 404
    assert "none was measured" in slow.json()["detail"]


def test_fronts_on_other_axes(client: TestClient) -> None:
    search = plant(client)
    front = client.get(f"/v1/frontier?search={search}&x=params").json()
    params = [p["params"] for p in front["frontier"]]
    assert params == sorted(params)
    assert {p["steps"] for p in front["dense"]} <= {
        t["steps"] for t in client.get(f"/v1/searches/{search}/trials").json()["items"]
    }
    assert client.get(f"/v1/frontier?search={search}&x=step_seconds").json()["frontier"] == []
    timed = client.get(f"/v1/frontier?search={search}&x=train_seconds&device=cpu").json()
    assert (timed["x_unit"], timed["device"]) == ("seconds of training", "cpu, float32")
    seconds = [p["train_seconds"] for p in timed["frontier"]]
    assert seconds == sorted(seconds)
    assert len(seconds) > 2
    refused = client.get(f"/v1/frontier?search={search}&device=cpu")
    assert (refused.status_code, refused.json()["field"]) == (422, "device")
    live = client.get(f"/searches/{search}/live?x=train_seconds").json()
    assert live["measured"] == {"device": "cpu, float32", "other_devices": [], "not_timed": 0}
    x_axis = live["scatter"]["layout"]["xaxis"]["title"]["text"]
    assert x_axis == "seconds of training, measured on cpu, float32"
    assert set(drawn(live)["dense"]["x"]) >= {p["train_seconds"] for p in timed["dense"]}
    live = client.get(f"/searches/{search}/live?x=params").json()
    assert set(drawn(live)["dense"]["x"]) >= {p["params"] for p in front["dense"]}
    refused = client.get(f"/v1/frontier?search={search}&x=parsecs").json()
    assert (refused["field"], refused["value"]) == ("x", "parsecs")
    assert "params" in refused["accepted"]


def test_an_answer_is_never_older_than_the_store(client: TestClient) -> None:
    search = plant(client)
    before = client.get(f"/v1/frontier?search={search}").json()
    ask = f"/v1/best?task=text&train_flops={BUDGET}"
    assert client.get(ask).json() == client.get(ask).json()
    store: Store = client.app.state.store  # type: ignore[attr-defined]
    leases, request = Leases(store), SearchRequest.checked({**GOOD, "seed": 5})
    second, _ = store.create_search(request)
    got = leases.claim("w", 60, search_id=second.id)
    assert got is not None
    leases.set_fingerprint(got[0], "0011223344556677")
    plan = plan_at(request.settings, parse_theta("kronecker"), 0.5, BUDGET)
    trial = leases.add_trial(got[0], TrialDraft(0, "candidate", plan, 5, "new", "kronecker"))
    leases.start_trial(got[0], trial.id)
    leases.add_point(got[0], trial.id, _point(plan, plan.steps, 1.5))
    assert client.get(ask).json()["name"] == "monarch"  # it has not completed
    leases.complete_trial(got[0], trial.id, {})
    assert client.get(ask).json()["name"].startswith("kronecker")
    assert client.get(ask).json()["evidence"]["searches"] == 2
    assert client.get(f"/v1/frontier?search={search}").json() == before


def test_a_search_is_confirmed_with_fresh_seeds(client: TestClient) -> None:
    search = plant(client)
    path = f"/v1/searches/{search}/confirm"
    made = client.post(path, json={"top": 1, "seeds": 2}, headers={"Idempotency-Key": "c"})
    assert made.status_code == 201
    again = client.post(path, json={"top": 1, "seeds": 2}, headers={"Idempotency-Key": "c"})
    assert (again.status_code, again.json()["id"]) == (200, made.json()["id"])
    confirm = made.json()["request"]["confirm"]
    trials = {t["number"]: t for t in client.get(f"/v1/searches/{search}/trials").json()["items"]}
    # the only completed candidate, and the best dense run
    assert [r["trial_id"] for r in confirm["runs"]] == [trials[5]["id"], trials[0]["id"]]
    assert [r["steps"] for r in confirm["runs"]] == [trials[5]["steps"], trials[0]["steps"]]
    assert 0 not in confirm["seeds"]
    assert made.json()["runs_total"] == 4
    assert made.json()["task_fingerprint"] == "0011223344556677"


@pytest.mark.parametrize(
    ("body", "field", "status"),
    [({"top": 2}, "top", 422), ({"top": 0}, "top", 422), ({"seeds": "3"}, "seeds", 422),
     ({"longer": 0.5}, "longer", 422), ({"longer": 1e9}, "longer", 422), ({"k": 1}, "k", 422),
     ([], "body", 422)],
)  # fmt: skip
def test_bad_confirmations_name_the_field(
    client: TestClient, body: Any, field: str, status: int
) -> None:
    search = plant(client)
    answer = client.post(f"/v1/searches/{search}/confirm", json=body)
    assert (answer.status_code, answer.json()["field"]) == (status, field)
    assert answer.json()["accepted"]
    assert len(client.get("/v1/searches").json()["items"]) == 1


def test_a_confirmation_asked_for_again_is_the_same_whatever_has_run(client: TestClient) -> None:
    search = plant(client)
    path = f"/v1/searches/{search}/confirm"
    made = client.post(path, json={"top": 1, "seeds": 2}, headers={"Idempotency-Key": "c"}).json()
    second = client.post(path, json={"top": 1, "seeds": 2}).json()
    seeds = [m["request"]["confirm"]["seeds"] for m in (made, second)]
    assert not set(seeds[0]) & set(seeds[1])  # although none of them has run
    store: Store = client.app.state.store  # type: ignore[attr-defined]
    leases = Leases(store)
    got = leases.claim("w", 60, search_id=made["id"])
    assert got is not None
    run = made["request"]["confirm"]["runs"][0]
    theta = Theta(*run["theta"])
    plan = plan_of_steps(SearchRequest.checked(GOOD).settings, theta, run["width"], run["steps"])
    draft = TrialDraft(
        0, "confirmation", plan, seeds[0][0], "fresh", "monarch", confirms=run["trial_id"]
    )
    trial = leases.add_trial(got[0], draft)
    leases.start_trial(got[0], trial.id)
    leases.add_point(got[0], trial.id, _point(plan, plan.steps, 2.1))
    leases.complete_trial(got[0], trial.id, {})
    again = client.post(path, json={"top": 1, "seeds": 2}, headers={"Idempotency-Key": "c"})
    assert (again.status_code, again.json()["id"]) == (200, made["id"])
    other = client.post(path, json={"top": 1, "seeds": 3}, headers={"Idempotency-Key": "c"})
    assert other.status_code == 422


def test_confirmations_are_made_by_their_own_route_only(client: TestClient) -> None:
    search = plant(client)
    made = client.post(f"/v1/searches/{search}/confirm", json={"top": 1, "seeds": 1}).json()
    for path in ("/v1/searches", "/v1/searches/preview"):
        answer = client.post(path, json=made["request"])
        assert (answer.status_code, answer.json()["field"]) == (422, "confirm")


def test_only_a_search_that_has_ended_is_confirmed(client: TestClient) -> None:
    queued = client.post("/v1/searches", json=GOOD).json()["id"]
    assert client.post(f"/v1/searches/{queued}/confirm", json={}).status_code == 409
    assert client.post("/v1/searches/nope/confirm", json={}).status_code == 404


def test_nothing_yet_says_what_to_run(client: TestClient) -> None:
    search = client.post("/v1/searches", json=GOOD).json()["id"]
    for path in (f"/v1/best?search={search}&train_flops=1e11", "/v1/frontier?task=images"):
        answer = client.get(path)
        assert answer.status_code == 404
        assert "einsum-nas search" in answer.json()["detail"]


def test_the_frontier_is_the_non_dominated_set(client: TestClient) -> None:
    search = plant(client)
    front = client.get(f"/v1/frontier?search={search}").json()
    assert front["points"] == 12  # the failed run's point is not among them
    for key in ("frontier", "structured", "dense"):
        flops, losses = ([p[k] for p in front[key]] for k in ("train_flops", "loss"))
        assert flops == sorted(flops)
        assert losses == sorted(losses, reverse=True)
    assert {p["name"] for p in front["dense"]} == {"dense"}
    assert front["frontier"][-1]["name"] == "monarch"


def test_a_preview_shows_every_family_that_may_be_proposed(client: TestClient) -> None:
    space = {
        "families": [
            "einsum",
            "btt-moe",
            "dense-moe",
            "convolution",
            "blast",
            "pixelfly",
            "cola-mlp",
            "activated",
        ],
        "factors": [2, 3],
    }
    preview = client.post("/v1/searches/preview", json={**GOOD, "space": space}).json()
    assert list(preview["widths"]) == [
        "dense", "monarch", "low-rank:rho=1/2", "btt:cores=3,rho=1/8",
        "btt-moe:experts=8,active=2", "dense-moe:experts=8,active=2", "convolution",
        "blast",
        "pixelfly", "cola-mlp", "activated(monarch;silu)",
    ]  # fmt: skip
    assert all(preview["widths"].values())
    alone = client.post("/v1/searches/preview", json=GOOD).json()
    assert preview["minimum_train_flops"] >= alone["minimum_train_flops"]
    space = {"families": ["dense-moe"], "experts": [4, 8], "active": [2, 3], "shared": [0, 1]}
    preview = client.post("/v1/searches/preview", json={**GOOD, "space": space}).json()
    assert list(preview["widths"]) == [
        "dense", "dense-moe:experts=4,active=2,shared=1", "dense-moe:experts=8,active=3",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"families": ["moe"]}, "btt-moe"),
        ({"experts": [8], "active": [9], "families": ["btt-moe"]}, "active=9 of experts=8"),
        ({"experts": [1]}, "2 to 1024"),
        ({"active": [2], "shared": [2], "families": ["btt-moe"]}, "shared=2 of active=2"),
        ({"factors": [9]}, "2 to 4"),
        ([], "families, factors"),
    ],
)
def test_a_space_that_cannot_be_is_a_problem(client: TestClient, space: Any, words: str) -> None:
    for path in ("/v1/searches", "/v1/searches/preview"):
        answer = client.post(path, json={**GOOD, "space": space})
        assert answer.status_code == 422
        assert words in answer.json()["detail"]


@pytest.mark.parametrize(
    "text",
    [
        "btt:cores=3,rho=1/8",
        "btt-moe:experts=8,active=2",
        "ffn-moe",
        "ffn-moe:experts=8,active=4,shared=1,granularity=4",
        "convolution",
        "blast",
        "block-sparse",
        "pixelfly",
        "sum(monarch;kronecker)",
        "cola-mlp",
        "activated(kronecker;relu)",
        "monarch@heads",
        "blast@heads",
        "btt:cores=3,rho=1/8@heads",
    ],
)
def test_every_design_can_be_inspected(client: TestClient, text: str) -> None:
    found = client.get("/v1/structures", params={"theta": text, "d_in": 64, "d_out": 256})
    assert found.status_code == 200
    assert found.json()["flops"] == 2 * found.json()["macs"]


def test_preview_runs_nothing(client: TestClient) -> None:
    preview = client.post("/v1/searches/preview", json=GOOD).json()
    assert preview["total_runs"] == 2 + 5
    assert len({r["width"] for r in preview["references"]}) == 5
    assert all(r["train_flops"] <= BUDGET for r in preview["references"])
    thrice = client.post("/v1/searches/preview", json={**GOOD, "replicates": 3}).json()
    assert (thrice["replicates"], thrice["total_runs"]) == (3, 3 * preview["total_runs"])
    most = "total_train_flops_at_most"
    assert thrice[most] == 3 * preview[most]
    assert client.get("/v1/searches").json()["items"] == []


def test_the_page_of_a_search_tells_how_many_seeds_a_candidate_has(client: TestClient) -> None:
    made = client.post("/v1/searches", json={**GOOD, "replicates": 3}).json()
    assert "<b>3</b> seeds a candidate" in client.get(f"/searches/{made['id']}").text


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_can_be_previewed_at_its_least_budget(client: TestClient, recipe: str) -> None:
    listed = client.get("/v1/tasks").json()["items"]
    assert [t["name"] for t in listed] == ["text", "regression", "pixels", "images"]
    task, found = next((t["name"], r) for t in listed for r in t["recipes"] if r["name"] == recipe)
    least = {"task": task, "recipe": recipe, "train_flops": found["minimum_train_flops"]}
    preview = client.post("/v1/searches/preview", json=least).json()
    if not RECIPES[recipe].has_default_data:
        assert (preview["field"], preview["value"]) == ("data", "nothing")
        assert "has no default data" in preview["accepted"]
        return
    assert len(preview["references"]) >= 3
    assert preview["loss_unit"] == found["loss_unit"]
    assert preview["recipe"] == found["settings"]
    less = {**least, "train_flops": 0.99 * least["train_flops"]}
    assert client.post("/v1/searches/preview", json=less).json()["field"] == "train_flops"


def test_settings_of_a_recipe_can_be_set_anew(client: TestClient) -> None:
    body = {**GOOD, "task": "regression", "overrides": {"depth": 6, "input_dim": 16}}
    preview = client.post("/v1/searches/preview", json=body).json()
    assert (preview["recipe"]["depth"], preview["recipe"]["input_dim"]) == (6, 16)
    for overrides, field in (
        ({"depth": -1}, "depth"),
        ({"lr": "x"}, "lr"),
        ({"speed": 1}, "overr"),
    ):
        answer = client.post("/v1/searches", json={**body, "overrides": overrides})
        assert answer.status_code == 422
        assert answer.json()["field"].startswith(field)


def test_data_of_other_tasks_is_checked_before_it_is_taken(
    client: TestClient, text_folder: Path
) -> None:
    folder = text_folder.parent
    (folder / "rows.csv").write_text("".join(f"{i},{i % 7},{i * i % 11}\n" for i in range(400)))
    (folder / "evil.npz").write_bytes(pickle.dumps({"inputs": [1]}))
    table = {"task": "regression", "train_flops": 1e11, "data": "rows.csv"}
    assert client.post("/v1/searches", json=table).status_code == 201
    preview = client.post("/v1/searches/preview", json=table).json()
    assert preview["recipe"]["input_dim"] == 2  # the table's, not the recipe's
    for body in ({**table, "data": "evil.npz"}, {**table, "task": "images", "data": "evil.npz"}):
        answer = client.post("/v1/searches", json=body)
        assert answer.status_code == 422
        assert "never unpickled" in answer.json()["accepted"]
        assert str(folder) not in answer.text


def test_data_inside_the_folder_is_taken(client: TestClient) -> None:
    made = client.post("/v1/searches", json={**GOOD, "data": "texts"})
    assert made.status_code == 201
    assert made.json()["request"]["data"] == "texts"


def test_who_waits_for_data_to_be_read_is_in_nobodys_way(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One reads, three wait, more are refused; and nobody else notices."""
    go_on = threading.Event()
    read = nas.tasks.check_data

    def slowly(*given: Any, **more: Any) -> Any:
        assert go_on.wait(60)
        return read(*given, **more)

    monkeypatch.setattr(searches, "check_data", slowly)
    statuses: list[int] = []

    def submit(seed: int) -> None:
        body = {**GOOD, "data": "texts", "seed": seed}
        statuses.append(client.post("/v1/searches", json=body).status_code)

    threads = [threading.Thread(target=submit, args=(seed,)) for seed in range(50)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + PATIENCE
    while len(statuses) < 46:
        assert time.monotonic() < deadline, statuses
        time.sleep(0.01)
    assert set(statuses) == {503}
    assert client.get("/v1/searches").status_code == 200
    assert client.post("/v1/searches", json=GOOD).status_code == 201
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert sorted(statuses) == [201] * 4 + [503] * 46


def test_tokens_are_learnt_by_the_worker(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "learn_tokens", None)
    body = {**GOOD, "data": "texts", "recipe": "gpt-bpe-1", "train_flops": 2e11}
    body["overrides"] = {"vocabulary": 300, "context": 32}
    for path in ("/v1/searches/preview", "/v1/searches"):
        made = client.post(path, json=body)
        assert made.status_code in (200, 201), made.text


def test_events_stream_to_their_end_and_resume(client: TestClient) -> None:
    search = plant(client)
    stream = client.get(f"/v1/searches/{search}/events").text
    kinds = [line[7:] for line in stream.splitlines() if line.startswith("event: ")]
    ids = [int(line[4:]) for line in stream.splitlines() if line.startswith("id: ")]
    assert kinds[0] == "queued"
    assert kinds[-1] == "succeeded"
    assert kinds.count("trial_complete") == 6
    assert kinds.count("trial_failed") == 1
    rest = client.get(f"/v1/searches/{search}/events", headers={"Last-Event-ID": str(ids[-3])}).text
    assert rest.count("event: ") == 2


def test_health(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    ready = client.get("/readyz").json()
    assert (ready["status"], ready["workers"]) == ("ready", 0)
    assert {ready[part]["status"] for part in ("database", "schema", "writable")} == {"ok"}


def test_structures_are_those_of_the_library(client: TestClient) -> None:
    got = client.get("/v1/structures?theta=monarch&d_in=1024&d_out=1024").json()
    assert (got["macs"], got["params"], got["rank"]) == (65536, 65536, 1024)
    theta = "1/2,1/4,1/4,1/4,1/2,1/4,0"
    for sizing, dropped in (("least-waste", 0), ("paper", 377)):
        got = client.get(f"/v1/structures?theta={theta}&d_in=3072&d_out=3072&sizing={sizing}")
        assert got.json()["dropped_inputs"] == dropped


def test_the_openapi_document_describes_every_route(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/healthz", "/readyz", "/v1/best", "/v1/frontier", "/v1/searches", "/v1/searches/preview",
        "/v1/keys", "/v1/keys/{key_id}", "/v1/keys/{key_id}/revoke", "/v1/keys/{key_id}/rotate",
        "/v1/searches/{search_id}", "/v1/searches/{search_id}/cancel",
        "/v1/searches/{search_id}/clone", "/v1/searches/{search_id}/confirm",
        "/v1/searches/{search_id}/delete", "/v1/searches/{search_id}/ask",
        "/v1/trials/{trial_id}/points",
        "/v1/searches/{search_id}/labels", "/v1/searches/{search_id}/pause",
        "/v1/searches/{search_id}/priority",
        "/v1/searches/{search_id}/resume", "/v1/searches/{search_id}/retry", "/v1/workers",
        "/v1/audit", "/v1/searches/{search_id}/export",
        "/v1/searches/{search_id}/events", "/v1/searches/{search_id}/trials", "/v1/structures",
        "/v1/tasks", "/v1/trials/{trial_id}", "/v1/trials/{trial_id}/weights",
    }  # fmt: skip
    body = document["paths"]["/v1/searches"]["post"]["requestBody"]
    assert "train_flops" in json.dumps(body)
    for path, model in (("/v1/best", "Answer"), ("/v1/frontier", "FrontierAnswer")):
        answer = document["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]
        assert answer["schema"]["$ref"].endswith(model)


def test_pages_need_nothing_from_elsewhere(client: TestClient) -> None:
    search = plant(client)
    for path in ("/", f"/searches/{search}"):
        page = client.get(path)
        assert page.status_code == 200
        assert "http://" not in page.text
        assert "https://" not in page.text
    assert len(client.get("/static/plotly.min.js").content) > 1_000_000
    heads = [plotly_js.file_of(s).read_text()[:300] for s in ("plotly", "plotly-basic")]
    versions = [re.findall(r"plotly.js (?:\(basic - minified\) )?v([\d.]+)", h) for h in heads]
    assert versions[0] == versions[1] != []  # figures are drawn by one version


def test_a_picture_tells_kinds_of_designs_apart() -> None:
    """One series a kind, with a marker of its own, that the front's points have too."""
    texts = ("0.5,0,0.5,0,0.5,0.5,0", "btt:cores=3,rho=1/8", "btt-moe:experts=8,active=2")
    points = [curve_point(i, 10.0**i, 3.0 - i / 2, text) for i, text in enumerate(texts, 1)]
    data = scatter_data([*points, curve_point(9, 5.0, 4.0, "0,0,1,0,0,1,0", dense=True)])
    kinds = ["two factors", "three factors", "mixture of experts"]
    assert [data[f"structured: {kind}"].name for kind in kinds] == kinds
    assert data["structured_front"].symbols == ("circle", "diamond", "square")
    drawn = draw_scatter(data, "train_flops", "nats")
    assert [t["name"] for t in drawn["data"]][:3] == kinds
    assert drawn["layout"]["legend"]["y"] == 1  # above the points
    more = ("blast", "lost", "convolution", "cola-mlp")
    points += [curve_point(i, 10.0**i, 1.0, text) for i, text in enumerate(more, 4)]
    many = draw_scatter(scatter_data(points), "train_flops", "nats")
    assert many["layout"]["legend"]["x"] > 1  # beside them, or there would be no room for points
    alone = scatter_data(points[:1])
    assert set(alone) == {"structured", "dense", "structured_front", "dense_front"}


def curve_point(
    trial: int, flops: float, loss: float, design: str, *, dense: bool = False
) -> CurvePoint:
    run = Run(
        trial_id=trial, search_id="s", number=trial, kind="candidate", dense=dense, name=design,
        theta=[], design=design, width=32, depth=2, steps=1, seed=0, model=str(trial),
        train_flops_per_step=1, inference_flops=1e3, params=100, step_seconds=None,
        peak_memory=None,
    )  # fmt: skip
    return CurvePoint(1, flops, loss, 0.03, 1.0, run=run)


def drawn(live: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The traces of the scatter by name."""
    return {trace["name"]: trace for trace in live["scatter"]["data"]}


def test_the_live_document_holds_the_figures(client: TestClient) -> None:
    search = plant(client)
    live = client.get(f"/searches/{search}/live").json()
    fronts = {"structured front", "dense front (reference)"}
    bands = {f"95% interval of the {front}" for front in fronts}
    assert drawn(live).keys() == {"structured", "dense", *fronts, *bands}
    for front in fronts:  # its losses lie in the middle of their intervals
        low, high = (t for t in live["scatter"]["data"] if t["name"].endswith(f"of the {front}"))
        middle = [(a + b) / 2 for a, b in zip(low["y"], high["y"], strict=True)]
        assert middle == pytest.approx(drawn(live)[front]["y"])
        assert all(a < b for a, b in zip(low["y"], high["y"], strict=True))
    assert len(live["curves"]["data"]) == live["curves_total"] == 6
    assert live["points_shown"] == live["points_total"] > 6
    for name in ("scatter", "curves"):  # plotly refuses what it does not know
        assert go.Figure(live[name]).to_dict()["data"]


@pytest.mark.parametrize("x", AXES)
def test_a_large_search_is_drawn_from_few_of_its_points(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, x: str
) -> None:
    search = plant(client)
    whole = client.get(f"/searches/{search}/live?x={x}").json()
    monkeypatch.setattr("api.dashboard.detail.MOST", 1)
    monkeypatch.setattr("api.dashboard.detail._GRID", (2, 2))
    monkeypatch.setattr("api.dashboard.figures.SHOWN_CURVES", 2)
    pages._figures.cache_clear()
    few = client.get(f"/searches/{search}/live?x={x}").json()
    assert few["points_total"] == whole["points_total"]
    if x == "train_flops":  # on others all points are on a front
        assert few["points_shown"] < whole["points_shown"]
    for then, now in zip(whole["scatter"]["data"], few["scatter"]["data"], strict=True):
        assert set(now["x"]) <= set(then["x"])
        if "front" in then["name"]:
            assert now == then
    assert (len(few["curves"]["data"]), few["curves_total"]) == (2, 6)


def test_a_page_is_told_what_changed_since_an_event(client: TestClient) -> None:
    search = plant(client)
    whole = client.get(f"/searches/{search}/live").json()
    rows = client.get(f"/searches/{search}/rows").json()
    assert whole["changed"] is None
    ends = {
        e.data["number"]: e.id
        for e in client.app.state.store.events(search, limit=1000)  # type: ignore[attr-defined]
        if e.kind.startswith("trial_")
    }
    of = {t["number"]: t["id"] for t in rows["trials"]}
    assert rows["order"] == list(of.values())
    # the log ends with the end of the search, after which anything may differ
    live = client.get(f"/searches/{search}/live?since={ends[6]}").json()
    assert live["changed"] is None
    assert live["last"] == whole["last"] > ends[6]
    for page, part in (("live", "changed"), ("rows", "trials")):
        same = client.get(f"/searches/{search}/{page}?since={whole['last']}").json()
        assert same[part] == []
        later = client.get(f"/searches/{search}/{page}?since={whole['last'] + 1}").json()
        assert later == (whole if page == "live" else rows)
        assert client.get(f"/searches/{search}/{page}?since=-1").status_code == 422
    same = client.get(f"/searches/{search}/live?since={whole['last']}").json()
    none: dict[str, list[Any]] = {key: [] for key in ("x", "y", "text", "customdata")}
    for then, now in zip(whole["scatter"]["data"], same["scatter"]["data"], strict=True):
        assert now == (then | none if then.get("meta") == "runs" else then)
    assert [t["uid"] for t in same["curves"]["data"]] == [t["uid"] for t in whole["curves"]["data"]]
    assert (
        client.get(f"/searches/{search}/rows?since={whole['last']}").json()["order"]
        == rows["order"]
    )


def test_of_too_few_points_no_power_law_is_drawn(client: TestClient) -> None:
    search = plant(client)
    front = client.get(f"/v1/frontier?search={search}").json()
    assert front["structured_law"] is front["dense_law"] is None
    assert client.get(f"/searches/{search}/laws").json() == []


def test_the_answer_of_a_search_is_asked_for_at_any_budget(client: TestClient) -> None:
    search = plant(client)
    live = client.get(f"/searches/{search}/live").json()
    low, high = live["budgets"]
    assert live["budget"] == high == live["search"]["request"]["train_flops"]
    for budget in (low, (low * high) ** 0.5, high):
        live = client.get(f"/searches/{search}/live?budget={budget}").json()
        asked = client.get(f"/v1/best?search={search}&train_flops={budget}").json()
        assert (live["budget"], live["best"]) == (budget, asked)
        assert live["scatter"]["layout"]["shapes"][0]["x0"] == budget
    for wrong in ("0", "-1", "nan", "much"):
        assert client.get(f"/searches/{search}/live?budget={wrong}").status_code == 422


def test_the_table_of_trials_is_sorted_and_filtered(client: TestClient) -> None:
    search = plant(client)
    every = client.get(f"/v1/searches/{search}/trials").json()["items"]

    def rows(query: str) -> list[dict[str, Any]]:
        found = client.get(f"/searches/{search}/rows{query}").json()
        assert found["total"] == len(found["trials"])
        assert found["pages"] == 1
        return found["trials"]  # type: ignore[no-any-return]

    assert [t["number"] for t in rows("")] == [t["number"] for t in every]
    losses = [t["loss"] for t in rows("?sort=loss")]
    measured = sorted(t["loss"] for t in every if t["loss"] is not None)
    assert losses == [*measured, *[None] * (len(every) - len(measured))]
    assert [t["loss"] for t in rows("?sort=-loss")][: len(measured)] == measured[::-1]
    failed = [t for t in every if t["state"] == "failed"]
    assert failed
    assert [t["number"] for t in rows("?state=failed")] == [t["number"] for t in failed]
    assert [t["number"] for t in rows(f"?text={failed[0]['error'][:5]}")] == [failed[0]["number"]]
    assert rows("?text=100%25") == rows("?text=nowhere") == []
    assert client.get(f"/searches/{search}/rows?page=2").json()["trials"] == []
    for query, field in (("sort=colour", "sort"), ("state=tired", "state")):
        refused = client.get(f"/searches/{search}/rows?{query}")
        assert (refused.status_code, refused.json()["field"]) == (422, field)
        assert query.partition("=")[2] in refused.text


def test_a_search_has_an_analysis_and_a_log(client: TestClient) -> None:
    search = plant(client)
    page = client.get(f"/searches/{search}/analysis")
    figures = [
        json.loads(html.unescape(t)) for t in re.findall(r'data-figure="([^"]+)"', page.text)
    ]
    titles = [figure["layout"]["title"]["text"] for figure in figures]
    assert titles == ["Hypervolume over cost", "Timeline"]  # of one candidate there is no order
    for figure in figures:
        assert go.Figure(figure).to_dict()["data"]
    log = client.get(f"/searches/{search}/log").text
    for event in client.app.state.store.events(search):  # type: ignore[attr-defined]
        assert f"<td>{event.kind}</td>" in log
    empty = client.post("/v1/searches", json=GOOD).json()["id"]
    assert "No run has begun yet" in client.get(f"/searches/{empty}/analysis").text
    assert "queued" in client.get(f"/searches/{empty}/log").text
    for page_of in ("analysis", "log", "rows"):
        assert client.get(f"/searches/nowhere/{page_of}").status_code == 404


def test_searches_are_compared_side_by_side(client: TestClient) -> None:
    one, two = plant(client), plant(client)
    other = client.post("/v1/searches", json={**GOOD, "seed": 77}).json()["id"]
    for query in (f"ids={one},{two},{other}", f"id={one}&id={two}&id={other}",
                  f"ids={one[:12]}+{two[:12]}+{other[:12]}"):  # fmt: skip
        page = client.get(f"/compare?{query}").text
        rows = re.findall(r'<tr( class="differs")?><th scope="row">([^<]+)</th>(.*?)</tr>', page)
        cells = {name: (bool(d), re.findall("<td>(.*?)</td>", rest)) for d, name, rest in rows}
        assert cells["seed"][0]
        assert cells["seed"][1][-1] == "77"
        assert cells["verdict"][1][-1] == "nothing measured yet"
        assert not cells["train FLOPs"][0] or len(set(cells["train FLOPs"][1])) > 1
        figure = json.loads(html.unescape(re.findall(r'data-figure="([^"]+)"', page)[0]))
        assert go.Figure(figure).to_dict()["data"]
        assert len({t["name"] for t in figure["data"]}) == 4  # two fronts of two searches
    assert client.get("/compare").status_code == client.get(f"/compare?id={one}").status_code == 200
    refused = client.get("/compare?ids=" + ",".join([one, two, other, *("x" * 9,) * 3]))
    assert refused.status_code == 404
    many = [client.post("/v1/searches", json=GOOD).json()["id"] for _ in range(6)]
    refused = client.get("/compare", params={"id": many})
    assert (refused.status_code, refused.json()["field"]) == (422, "ids")
    assert "2 to 5" in refused.json()["accepted"]


def test_every_trial_has_a_page(client: TestClient) -> None:
    search = plant(client)
    trials = client.get(f"/v1/searches/{search}/trials").json()["items"]
    for trial in trials:
        page = client.get(f"/trials/{trial['id']}")
        assert page.status_code == 200
        shown = "–" if trial["loss"] is None else f"{trial['loss']:.4f}"
        assert f'<p class="big">{shown}</p>' in page.text
        assert page.text.count("network and sizes") == 6
        if trial["error"]:
            assert trial["error"] in page.text
    assert client.get("/trials/123456").status_code == 404


def test_a_structure_has_a_page_with_its_network(client: TestClient) -> None:
    page = client.get("/structures?theta=btt:rho=1/4&d_in=64&d_out=256")
    assert "9,216 MACs per token" in page.text
    source = re.search(r'src="([^"]+network.svg[^"]+)"', page.text)
    assert source is not None
    drawn = client.get(html.unescape(source[1]))
    assert drawn.headers["content-type"] == "image/svg+xml"
    assert "γ 8" in drawn.text
    assert "network.svg" not in client.get("/structures?theta=ffn-moe&d_in=64&d_out=64").text
    activated = client.get("/structures?theta=activated(monarch;relu)&d_in=64&d_out=64").text
    assert "network.svg" in activated
    assert "no: relu of 64 numbers per token between the factors" in activated
    assert "<dt>rank</dt>" not in activated
    missing = client.get("/structures/network.svg?theta=convolution&d_in=64&d_out=64")
    assert missing.status_code == 404
    refused = client.get("/structures?theta=nonsense&d_in=64&d_out=64")
    assert (refused.status_code, refused.json()["field"]) == (422, "theta")


def test_what_is_large_is_compressed_where_the_client_accepts_it(client: TestClient) -> None:
    search = plant(client)
    for path in ("/", f"/searches/{search}/live", "/openapi.json", "/static/plotly-basic.min.js"):
        sizes = {}
        for encoding in ("gzip", "identity"):
            with client.stream("GET", path, headers={"Accept-Encoding": encoding}) as response:
                sizes[encoding] = sum(map(len, response.iter_raw()))
                assert response.headers.get("content-encoding", "identity") == encoding
                assert "accept-encoding" in response.headers["vary"].lower()
        assert sizes["gzip"] < sizes["identity"] / 2


def test_until_a_search_has_runs_its_page_shows_what_was_published(
    client: TestClient, tmp_path: Path
) -> None:
    with small_table(tmp_path / "data"):
        for task, shown in (("text", None), ("regression", "published")):
            made = client.post("/v1/searches", json={**GOOD, "task": task}).json()["id"]
            best = client.get(f"/searches/{made}/live").json()["best"]
            assert (best and best["kind"]) == shown


def test_before_any_run_the_published_table_answers_unless_it_is_refused(
    client: TestClient, tmp_path: Path
) -> None:
    path = "/v1/best?task=regression&train_flops=1e11"
    with small_table(tmp_path / "data"):
        best = Answer.model_validate(client.get(path).json())
        assert (best.kind, best.evidence.searches) == ("published", 0)
        assert best.published is not None
        assert best.published.name == "EinBench regression"
        assert client.get(f"{path}&published=true").json() == best.model_dump(mode="json")
        refused = client.get(f"{path}&published=false")
        assert (refused.status_code, refused.json()["title"]) == (404, "Not found")
        odd = client.get(f"{path}&published=1")
        assert (odd.status_code, odd.json()["field"]) == (422, "published")


def test_a_search_with_a_total_shows_how_it_is_divided_and_how_far_it_is(
    client: TestClient,
) -> None:
    body = {"train_flops": BUDGET, "total_train_flops": 50 * BUDGET, "references": 3}
    preview = client.post("/v1/searches/preview", json=body).json()
    assert (preview["stopping_rule"], preview["total_runs"]) == ("frontier", None)
    assert preview["total_train_flops_at_most"] == 50 * BUDGET
    parts = preview["parts"]
    whole = parts["references"] + parts["exploring"] + parts["confirming"]
    assert whole == pytest.approx(50 * BUDGET)
    assert parts["racing"] <= parts["exploring"]
    assert parts["confirmed"] >= 2
    assert parts["fresh_seeds"] >= 2
    assert 10 < parts["least_candidates"] < parts["most_candidates"]
    assert parts["train_seconds"] is None
    in_seconds = {**body, "total_train_flops": None, "total_seconds": 60.0}
    assert client.post("/v1/searches/preview", json=in_seconds).json()["parts"] is None
    search = client.post("/v1/searches", json=body).json()
    assert search["runs_total"] is None
    told = client.get(f"/v1/searches/{search['id']}").json()["progress"]
    assert told == {
        "round": 0, "phase": None, "spent": 0.0, "total": 50 * BUDGET, "unit": "train FLOPs",
        "trained_flops": 0, "stopped_flops": 0,
    }  # fmt: skip
    page = client.get(f"/searches/{search['id']}")
    assert "<b>1e13</b> in total" in page.text
