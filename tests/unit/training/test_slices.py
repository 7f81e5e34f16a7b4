"""A run in slices is the run at once, wherever it was paused and whatever became of its state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.designs.design import parse_design
from nas.planning.recipe import REGRESSION
from nas.planning.runs import plan_of_steps
from nas.tasks import load_data
from nas.training.checkpoint import Checkpoint, checkpoint_of, forget
from nas.training.run import evaluation_steps, train_replicates

RECIPE = replace(
    REGRESSION, pool=256, batch=8, validation_samples=16, evaluations=6, warmup_steps=2, depth=2
)
PLAN = plan_of_steps(RECIPE, parse_design("monarch"), 16, 30)
STEPS = evaluation_steps(PLAN, RECIPE)
SEEDS = (3, 5)


def curve(path: Path, until: int | None = None) -> list[dict[int, Any]]:
    torch.set_num_threads(1)
    data = load_data(RECIPE)
    found = train_replicates(
        PLAN, RECIPE, data.train, data.validation, SEEDS,
        checkpoint=Checkpoint(path, "key"), until=until,
    )  # fmt: skip
    return [{seed: replace(p, seconds=0.0) for seed, p in each.items()} for each in found]  # type: ignore[type-var]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[int, Any]]:
    return curve(tmp_path_factory.mktemp("whole") / "c.pt")


@settings(max_examples=5, deadline=None)
@given(pauses=st.sets(st.sampled_from(STEPS[:-1]), min_size=1), lost=st.booleans())
def test_slices_give_the_curve_of_the_run_at_once(
    whole: list[dict[int, Any]], tmp_path_factory: pytest.TempPathFactory,
    pauses: set[int], lost: bool,
) -> None:  # fmt: skip
    path = tmp_path_factory.mktemp("slices") / "c.pt"
    for until in sorted(pauses):
        found = curve(path, until)
        assert found == whole[: STEPS.index(until) + 1]
        assert path.exists()
    if lost:
        path.unlink()
    assert curve(path) == whole


def test_a_state_that_is_farther_than_the_slice_is_kept(
    whole: list[dict[int, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "c.pt"
    curve(path, STEPS[3])
    state = path.read_bytes()
    assert curve(path, STEPS[1]) == whole[:2]
    assert curve(path, STEPS[3]) == whole[:4]
    assert path.read_bytes() == state


@pytest.mark.parametrize("until", [0, STEPS[0] + 1, PLAN.steps + 1])
def test_a_slice_ends_at_an_evaluation(tmp_path: Path, until: int) -> None:
    with pytest.raises(ValueError, match=f"until: got {until}; accepted: one of"):
        curve(tmp_path / "c.pt", until)


def test_states_of_a_run_are_forgotten_however_it_was_computed(tmp_path: Path) -> None:
    for run, how in (("a", ["cpu"]), ("a", ["cuda"]), ("b", ["cpu"])):
        checkpoint_of(tmp_path, run, how).save({"step": 1})
    assert len(list(tmp_path.iterdir())) == 3
    assert checkpoint_of(tmp_path, "a", ["other"]).load() is None
    forget(tmp_path, "a")
    assert checkpoint_of(tmp_path, "a", ["cpu"]).load() is None
    assert checkpoint_of(tmp_path, "b", ["cpu"]).load() is not None
    forget(tmp_path / "none", "a")
