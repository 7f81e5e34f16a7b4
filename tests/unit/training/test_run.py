from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from nas.designs.taxonomy import parse_theta
from nas.errors import RunFailed
from nas.planning.cost import structures_of
from nas.planning.recipe import IMAGES, IMAGES_VIT, PIXELS, REGRESSION, TEXT, Recipe
from nas.planning.runs import RunPlan, plan_at, plan_of_steps
from nas.tasks import load_data
from nas.tasks.batches import validation_set
from nas.training.run import Execution, Point, evaluation_steps, execution_plans, train
from tests.support.tiers import only

TINY = dataclasses.replace(
    TEXT,
    depth=2,
    context=16,
    batch=4,
    min_steps=20,
    warmup_steps=5,
    validation_samples=24,
    min_validation_samples=4,
)
_RNG = np.random.default_rng(0)
#: Learnable text: each character is one of the two that follow its predecessor.
_STEPS = np.cumsum(_RNG.integers(1, 3, size=20_000)) % 96
TRAIN = {"tokens": _STEPS[:15_000].astype(np.uint8)}
VALIDATION = {"tokens": _STEPS[15_000:].astype(np.uint8)}


def plan(text: str, steps: int = 60, width: int = 32, recipe: Recipe = TINY) -> RunPlan:
    found = plan_at(recipe, parse_theta(text), 0.0, 1e10)
    return dataclasses.replace(found, width=width, steps=steps)


def points(text: str, seed: int = 0, recipe: Recipe = TINY, steps: int = 60) -> list[Point]:
    return list(train(plan(text, steps, recipe=recipe), recipe, TRAIN, VALIDATION, seed))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def btt() -> list[Point]:
    """The run that others are compared with."""
    torch.set_num_threads(1)
    return points("btt:rho=1/4")


def test_same_seed_same_curve_whatever_else_was_drawn(btt: list[Point]) -> None:
    torch.manual_seed(99)
    torch.rand(7)
    second = points("btt:rho=1/4")
    strip = [dataclasses.replace(p, seconds=0.0) for p in btt]
    assert strip == [dataclasses.replace(p, seconds=0.0) for p in second]
    assert points("btt:rho=1/4", seed=1)[-1].loss != btt[-1].loss


def test_a_stored_execution_plan_repeats_the_run(btt: list[Point]) -> None:
    p = plan("btt:rho=1/4")
    stored = execution_plans(p, TINY)
    assert set(stored) == {s.fingerprint for s in structures_of(TINY, p.design, p.width)}
    repeated = train(p, TINY, TRAIN, VALIDATION, 0, layer_plans=stored)
    assert [c.loss for c in repeated] == [c.loss for c in btt]
    other = dict.fromkeys(stored, "b-first tile=16 first=blocks second=batched gemm=blas")
    curve = list(train(p, TINY, TRAIN, VALIDATION, 0, layer_plans=other))
    assert curve[-1].loss == pytest.approx(btt[-1].loss, rel=1e-3)


def test_evaluating_more_often_changes_no_result() -> None:
    often = points("monarch", recipe=dataclasses.replace(TINY, evaluations=12))
    seldom = points("monarch", recipe=dataclasses.replace(TINY, evaluations=2))
    assert len(often) > len(seldom)
    assert often[-1].loss == seldom[-1].loss


@pytest.mark.parametrize("text", only(["monarch"], ["dense", "monarch", "low-rank:rho=1/2"]))
def test_training_learns(text: str) -> None:
    curve = points(text, steps=200)
    # the two equally likely successors bound the loss from below by log 2
    assert math.log(2) < curve[-1].loss < 0.75 * curve[0].loss < math.log(96)


def test_points_carry_exact_flops_and_the_windows() -> None:
    p = plan("monarch")
    curve = points("monarch")
    assert [c.step for c in curve] == evaluation_steps(p, TINY)
    assert curve[-1].step == p.steps
    assert curve[-1].train_flops == p.train_flops
    for c in curve:
        assert c.train_flops == c.step * p.train_flops_per_step
        assert len(c.window_losses) == TINY.validation_samples
        assert np.mean(c.window_losses) == pytest.approx(c.loss)


def test_validation_windows_are_distinct_and_do_not_overlap() -> None:
    text = np.arange(17 * 10 + 3, dtype=np.uint8) % 251
    for count, expected in ((6, 6), (24, 10)):
        recipe = dataclasses.replace(TINY, validation_samples=count)
        inputs, targets = validation_set(recipe, {}, {"tokens": text})
        assert inputs.shape == (expected, 16)
        seen = torch.cat([inputs, targets[:, -1:]], dim=1).flatten().tolist()
        assert len(seen) == len(set(seen))  # every character of this text is its own
        assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_an_exploding_run_ends_with_its_reason() -> None:
    wild = dataclasses.replace(REGRESSION, pool=256, batch=16, validation_samples=32, lr=1e30)
    data = load_data(wild)
    p = plan_of_steps(wild, parse_theta("monarch"), 16, 60)
    with pytest.raises(RunFailed, match=r"loss is (nan|inf) at step \d+ of 60"):
        list(train(p, wild, data.train, data.validation, 0))


#: Recipe → what a model that knows nothing but the mean answer would lose, at most.
TASKS = {
    "pixels": (dataclasses.replace(PIXELS, batch=16), math.log(17)),
    "images": (IMAGES, math.log(10)),
    "vit": (IMAGES_VIT, math.log(10)),
    "regression": (dataclasses.replace(REGRESSION, pool=4096, lr=3e-3), 1.0),
    "fresh": (dataclasses.replace(REGRESSION, pool=0, batch=64, lr=3e-3), 1.0),
}


@pytest.mark.parametrize("name", only(["regression", "images"], TASKS))
def test_every_task_is_learned(name: str) -> None:
    recipe, ignorant = TASKS[name]
    recipe = dataclasses.replace(recipe, validation_samples=128, evaluations=2)
    data = load_data(recipe)
    p = plan_of_steps(recipe, parse_theta("btt:rho=1/4"), 32, 80 if name == "fresh" else 150)
    curve = list(train(p, recipe, data.train, data.validation, 0))
    assert curve[-1].loss < 0.6 * ignorant
    assert len(curve[-1].window_losses) == 128


def test_steps_in_bfloat16_and_compiled_are_near_those_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # the backend that needs no compiler for C++; what it traces is what others compile
    compiled: list[object] = []

    def compile_(model: torch.nn.Module) -> object:
        compiled.append(model)
        return real(model, backend="aot_eager")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", compile_)
    recipe = dataclasses.replace(TINY, depth=1)  # one block compiles in a third of the time
    p = plan("btt:rho=1/4", recipe=recipe)
    exact = points("btt:rho=1/4", recipe=recipe)
    near = list(train(p, recipe, TRAIN, VALIDATION, 0, Execution("cpu", bf16=True, compile=True)))
    assert len(compiled) == 1
    assert near[-1].loss == pytest.approx(exact[-1].loss, rel=0.02)
    assert near[-1].loss != exact[-1].loss
    assert Execution.on("cuda") == Execution("cuda", bf16=True, graphs=True)
    assert Execution.on("cuda", 1e18) == Execution("cuda", bf16=True, compile=True, graphs=True)
    assert Execution.on("cpu") == Execution()
