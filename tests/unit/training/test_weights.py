"""Weights of runs as files, and the models that these make again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nas.designs.design import parse_design
from nas.errors import InvalidInput
from nas.planning.recipe import REGRESSION, Recipe
from nas.planning.runs import RunPlan, plan_of_steps
from nas.tasks import load_data
from nas.tasks.data import Arrays
from nas.training import weights as module
from nas.training.run import Point, train_replicates
from nas.training.tasks import task_of
from nas.training.weights import Keeping, load_model, run_of
from tests.support.tiers import FULL, only
from tests.unit.training.test_run import TINY, TRAIN, VALIDATION
from tests.unit.training.test_stacked import DESIGNS

SEEDS = (3, 5)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def about(recipe: Recipe, plan: RunPlan) -> dict[str, Any]:
    return {
        "recipe": recipe.as_dict(), "design": plan.design.text, "width": plan.width,
        "trials": {str(s): 100 + s for s in SEEDS},
    }  # fmt: skip


def any_of(about: dict[str, Any]) -> Keeping:
    return Keeping(None, 2**24, about)


def trained(
    recipe: Recipe, plan: RunPlan, data: tuple[Arrays, Arrays], keeping: Keeping
) -> dict[int, Point]:
    """The last point of each run."""
    last: dict[int, Point] = {}
    for news in train_replicates(plan, recipe, *data, SEEDS, keeping=keeping):
        last |= {seed: p for seed, p in news.items() if isinstance(p, Point)}
    return last


def validation_loss(model: nn.Module, recipe: Recipe, data: tuple[Arrays, Arrays]) -> float:
    task = task_of(recipe)
    x, y = task.validation(recipe, *data)
    with torch.no_grad():
        return task.loss(recipe, model(x), y).double().mean().item()


@pytest.mark.parametrize(
    "name",
    only(
        {
            "monarch",
            "blast",
            "pixelfly:rank=1/4,blocks=1/2",
            "ffn-moe:experts=8,active=4,shared=1,granularity=4",
        },
        DESIGNS,
    ),
)
def test_a_loaded_model_has_the_loss_of_its_run(name: str, tmp_path: Path) -> None:
    plan = plan_of_steps(TINY, parse_design(name), 32, 12)
    keeping = any_of(about(TINY, plan))
    data = (TRAIN, VALIDATION)
    last = trained(TINY, plan, data, keeping)
    assert last[3].loss != last[5].loss
    for seed in SEEDS:
        file = tmp_path / f"{seed}.safetensors"
        file.write_bytes(keeping.found[seed])
        before = torch.get_rng_state()
        model = load_model(file)
        assert torch.equal(torch.get_rng_state(), before)
        assert not model.training
        assert validation_loss(model, TINY, data) == pytest.approx(last[seed].loss, rel=1e-5)
        run = run_of(file)
        assert (run["seed"], run["loss"], run["trial_id"]) == (seed, last[seed].loss, 100 + seed)


@FULL
def test_of_a_task_with_features_too(tmp_path: Path) -> None:
    recipe = replace(REGRESSION, depth=2, batch=32, min_steps=16, warmup_steps=2)
    loaded = load_data(recipe, None)
    data = (loaded.train, loaded.validation)
    plan = plan_of_steps(loaded.recipe, parse_design("btt:rho=1/4"), 48, 20)
    keeping = any_of(about(loaded.recipe, plan))
    last = trained(loaded.recipe, plan, data, keeping)
    file = tmp_path / "m.safetensors"
    file.write_bytes(keeping.found[5])
    found = validation_loss(load_model(file), loaded.recipe, data)
    assert found == pytest.approx(last[5].loss, rel=1e-5)


def test_only_what_is_wanted_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of_steps(TINY, parse_design("monarch"), 32, 12)
    data = (TRAIN, VALIDATION)
    every = any_of(about(TINY, plan))
    losses = {seed: p.loss for seed, p in trained(TINY, plan, data, every).items()}
    assert set(every.found) == set(SEEDS)

    some = Keeping(max(losses.values()), 2**24, about(TINY, plan))
    trained(TINY, plan, data, some)
    assert list(some.found) == [min(losses, key=lambda s: losses[s])]
    assert not some.left

    small = Keeping(None, 1000, about(TINY, plan))
    trained(TINY, plan, data, small)
    assert not small.found
    assert set(small.left) == set(SEEDS)
    assert "more than 1,000" in small.left[3]

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save", full)
    refused = any_of(about(TINY, plan))
    assert trained(TINY, plan, data, refused).keys() == set(SEEDS)
    assert "No space left" in refused.left[5]


def test_a_run_that_pauses_leaves_nothing() -> None:
    plan = plan_of_steps(TINY, parse_design("dense"), 32, 24)
    keeping = any_of(about(TINY, plan))
    step = next(iter(train_replicates(plan, TINY, TRAIN, VALIDATION, SEEDS)))[3].step  # type: ignore[union-attr]
    runs = train_replicates(
        plan, TINY, TRAIN, VALIDATION, SEEDS, until=step, keeping=keeping
    )  # fmt: skip
    assert len(list(runs)) == 1
    assert not keeping.found


def test_other_files_are_refused(tmp_path: Path) -> None:
    import safetensors.torch

    with pytest.raises(InvalidInput, match="absent"):
        load_model(tmp_path / "absent.safetensors")
    for name, metadata in (("bare", None), ("other", {"format": "pt"})):
        file = tmp_path / f"{name}.safetensors"
        safetensors.torch.save_file({"w": torch.zeros(2)}, str(file), metadata)
        with pytest.raises(InvalidInput, match="einsum-nas download"):
            load_model(file)
    text = tmp_path / "text.safetensors"
    text.write_text(json.dumps({}))
    with pytest.raises(InvalidInput, match="einsum-nas download"):
        run_of(text)
