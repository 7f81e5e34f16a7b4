from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from nas.planning.cost import structures_of
from nas.training.distributed import rank_execution, rank_plans
from nas.training.run import Execution, train
from nas.training.weights import load_model
from tests.support.ranks import DESIGNS, RANKS, TINY, TRAIN, VALIDATION, plan
from tests.support.tiers import FULL
from tests.unit.training.test_weights import validation_loss

SHARDINGS = ("none", "full")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each run told its first rank, and `one`: what a single process found."""
    folder = tmp_path_factory.mktemp("ranks")
    # in processes of their own: what process groups leave behind does not survive a fork
    ran = subprocess.run(
        [sys.executable, "-m", "tests.support.ranks", str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS))
    assert first == second
    one: dict[str, Any] = json.loads((folder / "one.json").read_text())
    return dict(first) | one | {"folder": folder}


def losses(found: dict[str, Any]) -> list[float]:
    return [p["loss"] for p in found["points"]]


@FULL
@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("design", [d for d in DESIGNS if d != "btt-moe"])
def test_ranks_give_the_curve_of_one_device(
    told: dict[str, Any], sharding: str, design: str
) -> None:
    torch.set_num_threads(1)
    expected = [asdict(p) for p in train(plan(design), TINY, TRAIN, VALIDATION, 3)]
    found = told[f"{sharding} {design}"]["points"]
    assert [p["step"] for p in found] == [p["step"] for p in expected] == [12, 17, 24]
    for point, other in zip(found, expected, strict=True):
        assert point["train_flops"] == other["train_flops"]
        for name in ("loss", "loss_stderr", "window_losses"):
            assert point[name] == pytest.approx(other[name], rel=1e-4), name


@FULL
@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("design", DESIGNS)
def test_the_first_rank_keeps_the_weights_of_all(
    told: dict[str, Any], sharding: str, design: str
) -> None:
    kept = sorted(p.name for p in told["folder"].glob(f"* {sharding} {design}.safetensors"))
    assert kept == [f"0 {sharding} {design}.safetensors"]
    model = load_model(told["folder"] / kept[0])
    loss = validation_loss(model, TINY, (TRAIN, VALIDATION))
    assert loss == pytest.approx(told[f"{sharding} {design}"]["points"][-1]["loss"], rel=1e-4)


@FULL
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_gates_are_balanced_over_the_whole_batch(told: dict[str, Any], sharding: str) -> None:
    """The auxiliary loss is no mean of the ranks' own: a curve tells the two apart."""
    expected = told["exact"]
    found = told[f"{sharding} exact"]
    assert losses(found) == pytest.approx(losses(expected), rel=1e-9)
    assert found["routers"] == pytest.approx(expected["routers"], rel=1e-9)


@FULL
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_checkpoint_of_all_ranks_goes_on_to_the_same_curve(
    told: dict[str, Any], sharding: str
) -> None:
    whole = told[f"{sharding} btt-moe"]
    assert told[f"{sharding} begun"]["points"] == whole["points"][:2]
    assert told[f"{sharding} resumed"] == whole
    # the state of another model is not used
    assert told[f"{sharding} other"] == told[f"{sharding} monarch"]


@FULL
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_diverging_run_ends_on_all_ranks(told: dict[str, Any], sharding: str) -> None:
    found = told[f"{sharding} diverged"]
    assert found["points"] == []
    assert found["failure"].startswith("training loss is nan at step ")


def test_ranks_compile_and_capture_nothing() -> None:
    assert rank_execution(Execution.on("cuda", 1e20)) == Execution("cuda", bf16=True)


def test_plans_suit_a_rank_s_part() -> None:
    recipe = replace(TINY, ranks=2)
    p = plan("monarch")
    assert set(rank_plans(p, recipe)) == {
        s.fingerprint for s in structures_of(recipe, p.design, p.width)
    }
