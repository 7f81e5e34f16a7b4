"""One real search: every run's budget, the answers, the client, cancellation."""

from __future__ import annotations

import asyncio
import time
from operator import itemgetter
from pathlib import Path

import pytest

from nas.client import AsyncClient, Client, RemoteSearch, ServiceError
from nas.errors import Conflict, IdempotencyConflict, InvalidInput, NotFound
from nas.planning.recipe import stored_recipe
from nas.tasks import load_data
from nas.training.weights import load_model, run_of
from tests.support.commands import execute
from tests.support.services import Service
from tests.support.small import SMALL_SEARCH
from tests.unit.training.test_weights import validation_loss


def test_every_run_meets_its_budget_to_within_one_step(finished_search: RemoteSearch) -> None:
    trials = finished_search.trials()
    budget = SMALL_SEARCH["train_flops"]
    assert [t["number"] for t in trials] == list(range(7))
    assert [t["kind"] for t in trials] == ["reference"] * 3 + ["candidate"] * 4
    assert len({t["width"] for t in trials[:3]}) == 3
    for t in trials:
        assert t["state"] == "complete"
        assert t["train_flops"] <= budget < t["train_flops"] + t["train_flops_per_step"]
        assert t["environment"]["threads"] == 1
        assert t["environment"]["execution_plans"].keys() == set(t["structures"])
        curve = finished_search.client.trial(t["id"])["curve"]
        assert curve[-1]["train_flops"] == t["train_flops"]
        assert curve[-1]["loss"] == t["loss"] < curve[0]["loss"]
    assert len({(*tuple(t["structures"]), t["steps"]) for t in trials}) == 7


def test_the_answer_is_the_lowest_loss(finished_search: RemoteSearch) -> None:
    trials = finished_search.trials()
    best = finished_search.best()
    lowest = min(t["loss"] for t in trials)
    assert best["expected_loss"] <= lowest
    assert best["best_dense"]["loss"] <= min(t["loss"] for t in trials if t["dense"])
    front = finished_search.frontier()
    assert front["frontier"][-1]["loss"] == best["expected_loss"]
    assert front["trials"] == 7


def test_the_best_model_comes_back_trained(
    service: Service, finished_search: RemoteSearch, text_folder: Path, tmp_path: Path
) -> None:
    trials = finished_search.trials()
    best = finished_search.best()
    assert best.weights == min(trials, key=itemgetter("loss"))["id"]
    file = tmp_path / "best.safetensors"
    words = ("download", str(best.weights), "--server", service.url, "--out", str(file))
    done = execute(tmp_path / "home", *words)
    assert done.returncode == 0, done.stderr
    run = run_of(file)
    (trial,) = (t for t in trials if t["id"] == best.weights)
    told = {"trial_id": trial["id"]} | {k: trial[k] for k in ("design", "width", "steps", "loss")}
    assert told.items() <= run.items()
    data = load_data(stored_recipe(run["recipe"]), str(text_folder))
    assert data.fingerprint == run["fingerprint"]
    for model in (best.model(), load_model(file)):
        loss = validation_loss(model, data.recipe, (data.train, data.validation))
        assert loss == pytest.approx(trial["loss"], rel=1e-5)
    other = next(t["id"] for t in trials if t["id"] != best.weights)
    words = ("download", str(other), "--server", service.url, "--out", str(tmp_path / "other"))
    refused = execute(tmp_path / "home", *words)
    assert refused.returncode != 0
    assert f"trial {best.weights}" in refused.stderr
    assert not (tmp_path / "other").exists()


def test_the_client_raises_what_the_service_says(service: Service) -> None:
    with Client(service.url) as client:
        with pytest.raises(InvalidInput, match=r"sampler: got cma; accepted: surrogate \| tpe"):
            client.search(train_flops=2e11, sampler="cma")
        with pytest.raises(NotFound, match="no search 'x'"):
            client.get_search("x")
        client.search(train_flops=2e11, seed=7, idempotency_key="client").cancel()
        with pytest.raises(IdempotencyConflict):
            client.search(train_flops=2e11, seed=8, idempotency_key="client")


def test_a_running_search_can_be_cancelled(service: Service, finished_search: RemoteSearch) -> None:
    with Client(service.url) as client:
        search = client.search(train_flops=1e13, trials=50, seed=11, data="texts")
        for _ in range(600):
            search = search.refresh()
            if search.data["trial_counts"].get("running"):
                break
            time.sleep(0.1)
        assert search.data["trial_counts"]["running"] > 0
        search.cancel()
        ended = search.wait(timeout_seconds=60)
        assert ended.state == "cancelled"
        assert set(ended.data["trial_counts"]) == {"stopped"}
        with pytest.raises(Conflict):
            ended.cancel()


def test_the_same_search_again_reuses_every_run(
    service: Service, finished_search: RemoteSearch
) -> None:
    with Client(service.url) as client:
        again = client.search(**SMALL_SEARCH).wait(timeout_seconds=120)
        assert again.state == "succeeded"
        losses = [t["loss"] for t in finished_search.trials()]
        assert [t["loss"] for t in again.trials()] == losses
        assert all(t["reused_from"] is not None for t in again.trials())


def test_tasks_and_structures(service: Service, finished_search: RemoteSearch) -> None:
    with Client(service.url) as client:
        task, *others = client.tasks()
        assert [t["name"] for t in others] == ["regression", "pixels", "images"]
        used = {f["fingerprint"] for f in task["fingerprints"]}
        assert finished_search.data["task_fingerprint"] in used
        assert client.structure("dense", 64, 128)["macs"] == 8192
        assert client.preview(**SMALL_SEARCH)["total_runs"] == 7
        listed = [s["id"] for s in client.searches()]
        assert finished_search.id in listed


def test_the_asynchronous_client_is_the_same(
    service: Service, finished_search: RemoteSearch
) -> None:
    async def ask() -> None:
        async with AsyncClient(service.url) as client:
            search = await client.get_search(finished_search.id)
            assert (await search.wait()).data == finished_search.data
            assert await search.trials() == finished_search.trials()
            assert await search.best() == finished_search.best()
            assert await search.frontier("params") == finished_search.frontier("params")
            budget = finished_search.data["request"]["train_flops"]
            task = f"text@{finished_search.data['task_fingerprint']}"
            best = await client.best(task=task, train_flops=budget)
            assert best == finished_search.client.best(task=task, train_flops=budget)
            assert best.weights is not None
            with pytest.raises(InvalidInput, match=r"await client\.model"):
                best.model()
            assert not (await client.model(best.weights)).training
            assert await client.frontier(task=task) == finished_search.client.frontier(task=task)
            assert await client.tasks() == finished_search.client.tasks()
            ids = [s["id"] async for s in client.searches()]
            assert ids == [s["id"] for s in finished_search.client.searches()]
            with pytest.raises(InvalidInput, match="parsecs"):
                await client.frontier(x="parsecs")
            with pytest.raises(NotFound):
                await client.get_search("nope")
        async with AsyncClient("http://127.0.0.1:1") as nobody:
            with pytest.raises(ServiceError):
                await nobody.tasks()

    asyncio.run(ask())
