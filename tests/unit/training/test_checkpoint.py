"""A run that is killed goes on to the curve it would have had, to the bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nas.training.checkpoint import Checkpoint, prune
from tests.support.paths import ROOT
from tests.support.runs import SMALL, STEPS, points
from tests.support.tiers import only


@pytest.mark.parametrize("recipe", only(["mlp-regression-1"], SMALL))
def test_a_killed_run_ends_with_the_curve_of_an_uninterrupted_one(
    recipe: str, tmp_path: Path
) -> None:
    path = tmp_path / "deep" / "run.pt"
    killed = subprocess.Popen(
        [sys.executable, "-m", "tests.support.runs", recipe, str(path)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert killed.stdout is not None
    begun = [int(killed.stdout.readline()) for _ in range(4)]  # half of its evaluations
    while not path.exists():
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait(60) == -signal.SIGKILL
    killed.stdout.close()
    step = torch.load(path, weights_only=True)["step"]
    assert 0 < step < STEPS
    whole = list(points(recipe, None))
    assert [p.step for p in whole[:4]] == begun
    assert len(whole) == 8
    assert list(points(recipe, path)) == whole


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


def sized(folder: Path, **ages: float) -> None:
    """Files of 10 bytes that were written so many seconds ago."""
    for name, age in ages.items():
        (folder / name).write_bytes(b"0123456789")
        os.utime(folder / name, (time.time() - age,) * 2)


@pytest.mark.parametrize(
    ("max_bytes", "kept"),
    [
        (None, ["first", "last", "middle"]),
        (30, ["first", "last", "middle"]),
        (29, ["last", "middle"]),
        (10, ["last"]),
        (9, []),
        (0, []),
    ],
)
def test_the_oldest_states_make_room(
    tmp_path: Path, max_bytes: int | None, kept: list[str]
) -> None:
    sized(tmp_path, first=300, middle=200, last=100)
    prune(tmp_path, max_bytes=max_bytes)
    assert sorted(p.name for p in tmp_path.iterdir()) == kept


def test_old_states_do_not_take_the_room_of_newer_ones(tmp_path: Path) -> None:
    sized(tmp_path, ancient=8 * 86_400, older=200, newer=100)
    prune(tmp_path, max_bytes=20)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["newer", "older"]


def test_what_is_no_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.utime(tmp_path / "folder", (time.time() - 8 * 86_400,) * 2)
    sized(tmp_path, older=200, newer=100)
    prune(tmp_path, max_bytes=20)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "newer", "older"]


def test_a_save_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "c.pt", "a")
    checkpoint.save({"step": 1})
    with pytest.raises(Exception, match="pickle"):
        checkpoint.save({"step": 2, "bad": lambda: None})
    loaded = checkpoint.load()
    assert loaded is not None
    assert loaded["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]
