"""What a trial's actor does with its run, without Ray around it."""

from __future__ import annotations

import faulthandler
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nas.designs.design import parse_design
from nas.planning.recipe import REGRESSION, Recipe
from nas.planning.runs import plan_of_steps
from nas.records.device import device_of, processor_name
from nas.tasks import load_data
from nas.training.checkpoint import Checkpoint
from nas.training.run import CPU
from workers.ray.trainable import ProxyTrainable

SMALL = replace(
    REGRESSION, pool=256, batch=16, validation_samples=32, evaluations=4, warmup_steps=0
)


def actor(
    folder: Path,
    recipe: Recipe = SMALL,
    key: str = "k",
    design: str = "monarch",
    seeds: Sequence[int] = (0,),
    until: int | None = None,
) -> ProxyTrainable:
    """An actor that has been given its run."""
    made = ProxyTrainable.__new__(ProxyTrainable)  # Tune's own set-up wants a cluster
    data = load_data(recipe)
    made._data = (data.train, data.validation)
    made._threads, made._checkpoints, made._execution = 1, folder, CPU
    made._memory = made._remote = None
    give(made, recipe, key, design, seeds, until)
    return made


def give(
    made: ProxyTrainable, recipe: Recipe, key: str, design: str, seeds: Sequence[int],
    until: int | None = None,
) -> None:  # fmt: skip
    """Give an actor its next runs."""
    plan = plan_of_steps(recipe, parse_design(design), 16, 24)
    run = {
        "plan": plan.as_dict(),
        "recipe": recipe.as_dict(), "seeds": list(seeds), "seconds": 3600.0, "key": key,
        "until": until,
    }  # fmt: skip
    made.reset_config({"run": json.dumps(run)})
    assert report(made).keys() == {"begun"}


def report(made: ProxyTrainable) -> dict[str, Any]:
    return dict(json.loads(made.step()["report"]))


def reports(made: ProxyTrainable) -> list[dict[str, Any]]:
    """Every report to the end; the seconds left out."""
    found = [report(made)]
    while "runs" in found[-1]:
        for each in found[-1]["runs"].values():
            each.get("point", {}).pop("seconds", None)
        found.append(report(made))
    found[-1].get("ended", {}).pop("cost", None)  # measured: never twice the same
    found[-1].get("ended", {}).pop("resumed_at", None)  # of the way, not of the result
    return found


@pytest.fixture(autouse=True)
def _save_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "is_due", property(lambda _: True))


@pytest.fixture(autouse=True)
def _no_time_limit_is_left_behind() -> Iterator[None]:
    yield
    faulthandler.cancel_dump_traceback_later()


def test_an_actor_goes_on_where_the_last_one_stood(tmp_path: Path) -> None:
    whole = reports(actor(tmp_path / "one"))
    assert [list(r) for r in whole] == [["runs"]] * 4 + [["ended"]]
    first = actor(tmp_path / "two")
    for _ in range(3):
        report(first)
    (state,) = (tmp_path / "two").iterdir()
    assert reports(actor(tmp_path / "two")) == whole
    assert not state.exists()  # the result is the store's now
    assert not list((tmp_path / "one").iterdir())


def test_a_slice_leaves_its_state_to_the_next(tmp_path: Path) -> None:
    whole = reports(actor(tmp_path / "one"))
    first = reports(actor(tmp_path / "two", until=12))
    assert first[:-1] == whole[:2]
    assert list(first[-1]) == ["ended"]
    (state,) = (tmp_path / "two").iterdir()
    shorter = reports(actor(tmp_path / "two", until=8))
    assert (shorter[:-1], state.exists()) == (whole[:1], True)
    assert reports(actor(tmp_path / "two")) == whole
    assert not state.exists()


def test_evaluations_that_follow_one_another_soon_are_told_together(tmp_path: Path) -> None:
    whole = reports(actor(tmp_path / "one"))
    made = actor(tmp_path / "two")
    made._report_seconds = 3600.0
    step = made.step()
    assert step["done"]
    told = json.loads(step["report"])["batch"]
    for part in told:
        for each in part.get("runs", {}).values():
            each["point"].pop("seconds")
    for of_the_way in ("cost", "resumed_at"):
        told[-1]["ended"].pop(of_the_way)
    assert told == whole


def test_a_run_ends_with_where_it_ran_and_what_it_cost(tmp_path: Path) -> None:
    made = actor(tmp_path)
    ended: dict[str, Any] = {"runs": None}
    while "runs" in ended:
        ended = report(made)
    environment = ended["ended"]["environments"]["0"]
    assert (environment["device"], environment["replicates"]) == ("cpu", 1)
    threads = f"{environment['threads']} thread"
    assert str(device_of(environment)).startswith(f"cpu {processor_name()}, {threads}")
    cost = ended["ended"]["cost"]
    assert cost["seconds_per_step"] > 0
    assert cost["peak_memory_bytes"] > 0


def test_runs_that_train_together_are_told_by_their_seeds(tmp_path: Path) -> None:
    *evaluations, ended = reports(actor(tmp_path, seeds=(3, 5, 4)))
    assert [set(e["runs"]) for e in evaluations] == [{"3", "4", "5"}] * 4
    for seed in (3, 5):
        *alone, _ = reports(actor(tmp_path, seeds=(seed,)))
        for one, found in zip(alone, evaluations, strict=True):
            expected, point = (e["runs"][str(seed)]["point"] for e in (one, found))
            assert point["loss"] == pytest.approx(expected["loss"], rel=1e-3)
            assert point["step"] == expected["step"]
    environments = ended["ended"]["environments"]
    assert {s: e["replicates"] for s, e in environments.items()} == {"3": 3, "5": 3, "4": 3}
    assert not list(tmp_path.iterdir())


def test_what_is_left_of_a_pack_goes_on_where_the_last_actor_stood(tmp_path: Path) -> None:
    whole = reports(actor(tmp_path / "one", seeds=(0, 1, 2)))
    first = actor(tmp_path / "two", seeds=(0, 1, 2))
    for _ in range(3):
        report(first)
    rest = reports(actor(tmp_path / "two", seeds=(0, 2)))
    for expected, found in zip(whole[:-1], rest[:-1], strict=True):
        assert set(found["runs"]) == {"0", "2"}
        for seed, each in found["runs"].items():
            loss = expected["runs"][seed]["point"]["loss"]
            assert each["point"]["loss"] == pytest.approx(loss, rel=1e-3)
    environments = rest[-1]["ended"]["environments"]
    assert {s: e["replicates"] for s, e in environments.items()} == {"0": 2, "2": 2}
    assert not list((tmp_path / "two").iterdir())


def test_an_error_that_is_none_of_a_single_run_ends_the_pack(tmp_path: Path) -> None:
    made = actor(tmp_path, seeds=(0, 1))
    made._data = (made._data[0], {})
    give(made, SMALL, "k", "monarch", (0, 1))
    failure = report(made)["failure"]
    assert (failure["kind"], failure["reason"].partition(":")[0]) == ("run", "KeyError")


def test_another_run_has_another_checkpoint(tmp_path: Path) -> None:
    first = actor(tmp_path)
    for _ in range(3):
        report(first)
    (state,) = tmp_path.iterdir()
    other = actor(tmp_path, key="other")
    report(other)
    report(other)
    assert len(list(tmp_path.iterdir())) == 2
    assert state.exists()


def test_a_failed_run_reports_why_and_leaves_no_state(tmp_path: Path) -> None:
    made = actor(tmp_path, replace(SMALL, lr=1e30))
    *_, failed, ended = reports(made)
    assert "loss is" in failed["runs"]["0"]["failure"]
    assert ended["ended"]["environments"] == {}
    assert not tmp_path.exists() or not list(tmp_path.iterdir())


def test_a_state_that_does_not_fit_is_not_used(tmp_path: Path) -> None:
    first = actor(tmp_path)
    for _ in range(3):
        report(first)
    (state,) = tmp_path.iterdir()
    content = torch.load(state, weights_only=True)
    content["parameters"].pop()
    torch.save(content, state)
    assert reports(actor(tmp_path)) == reports(actor(tmp_path / "fresh"))


@pytest.mark.parametrize("design", ["btt-moe:experts=4,active=2", "ffn-moe:experts=4,active=1"])
def test_a_mixture_ends_with_the_statistics_of_its_routers(tmp_path: Path, design: str) -> None:
    *_, last = reports(actor(tmp_path, design=design))
    router = last["ended"]["environments"]["0"]["router"]
    assert (router["dropped"], router["gates"]) == (0, 6 if "btt" in design else 3)
    assert router["assignments"] > 0
    assert 1 <= router["mean_max_load"] <= router["max_load"] <= 4
    assert 0 <= router["load_entropy"] <= math.log(4) + 1e-6
    json.dumps(router, allow_nan=False)


def test_a_mixture_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    design = "btt-moe:experts=4,active=2"
    whole = reports(actor(tmp_path / "one", design=design))
    first = actor(tmp_path / "two", design=design)
    for _ in range(3):
        report(first)
    assert reports(actor(tmp_path / "two", design=design)) == whole
