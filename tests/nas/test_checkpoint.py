"""A run that is killed goes on to the curve it would have had, to the bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nas.checkpoint import Checkpoint, prune

#: Trains a small run with a checkpoint after every step, and prints its points as they come.
PROGRAM = """
import dataclasses, json, sys
from pathlib import Path
import torch
from nas.checkpoint import Checkpoint
from nas.cost import plan_of_steps
from nas.proxy import train
from nas.recipe import RECIPES, with_overrides
from nas.tasks import load_data
from nas.taxonomy import parse_theta

torch.set_num_threads(1)
name, path = sys.argv[1:]
settings = {"batch": 8, "warmup_steps": 5, **json.loads(sys.stdin.read())}
recipe = with_overrides(RECIPES[name], settings)
data = load_data(recipe)
plan = plan_of_steps(recipe, parse_theta("btt:rho=1/4"), 32, 120)
checkpoint = Checkpoint(Path(path), "key", every_seconds=0.0) if path != "none" else None
for p in train(plan, recipe, data.train, data.validation, 3, checkpoint=checkpoint):
    print(json.dumps([p.step, p.loss, p.window_losses]), flush=True)
"""
#: recipe → settings that make it quick
SMALL = {
    "mlp-regression-1": {"pool": 0, "validation_samples": 32},
    "ar-digits-1": {"validation_samples": 32},
}


def begin(recipe: str, path: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, recipe, path],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(json.dumps({**SMALL[recipe], "evaluations": 12}))
    process.stdin.close()
    return process


def curve(process: subprocess.Popen[str]) -> list[str]:
    with process:
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
    assert process.returncode == 0
    return lines


@pytest.mark.parametrize("recipe", SMALL)
def test_a_killed_run_ends_with_the_curve_of_an_uninterrupted_one(
    recipe: str, tmp_path: Path
) -> None:
    whole = curve(begin(recipe, "none"))
    assert len(whole) >= 6
    path = tmp_path / "deep" / "run.pt"
    killed = begin(recipe, str(path))
    assert killed.stdout is not None
    for _ in range(len(whole) // 2):  # half way through its evaluations
        killed.stdout.readline()
    while not path.exists():
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait(60) == -signal.SIGKILL
    killed.stdout.close()
    step = torch.load(path, weights_only=True)["step"]
    assert 0 < step < 120
    assert curve(begin(recipe, str(path))) == whole


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "c.pt", "a")
    assert checkpoint.load() is None
    assert not checkpoint.is_due
    checkpoint.save({"step": 3, "w": torch.ones(2)})
    loaded = checkpoint.load()
    assert loaded is not None
    assert loaded["step"] == 3
    assert torch.equal(loaded["w"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]
    checkpoint.remove()
    assert checkpoint.load() is None


def test_another_runs_state_and_a_broken_file_are_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "c.pt"
    Checkpoint(path, "a").save({"step": 3})
    assert Checkpoint(path, "b").load() is None
    assert "belongs to another run" in caplog.text
    path.write_bytes(path.read_bytes()[:40])
    assert Checkpoint(path, "a").load() is None
    assert "cannot be read" in caplog.text


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return os.mkdir, (str(marker),)

    torch.save({"key": "a", "state": Evil()}, tmp_path / "c.pt")
    assert Checkpoint(tmp_path / "c.pt", "a").load() is None
    assert not marker.exists()


def test_a_run_goes_on_where_no_checkpoint_can_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    checkpoint = Checkpoint(tmp_path / "file" / "c.pt", "a")
    checkpoint.save({"step": 1})
    assert "no checkpoint" in caplog.text
    checkpoint.remove()
    assert "stays behind" in caplog.text


def test_states_that_nobody_uses_are_pruned(tmp_path: Path) -> None:
    for name, age in (("old.pt", 8), ("old.pt.half", 8), ("new.pt", 6)):
        (tmp_path / name).write_text("")
        then = time.time() - age * 86_400
        os.utime(tmp_path / name, (then, then))
    prune(tmp_path)
    prune(tmp_path / "missing")
    assert [p.name for p in tmp_path.iterdir()] == ["new.pt"]


def test_a_save_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "c.pt", "a")
    checkpoint.save({"step": 1})
    with pytest.raises(Exception, match="pickle"):
        checkpoint.save({"step": 2, "bad": lambda: None})
    loaded = checkpoint.load()
    assert loaded is not None
    assert loaded["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]
