"""Runs go on from a remote folder where the disk of their node is gone, whatever happens to it."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import nas.remote
import nas.training.checkpoint
from nas.remote import RemoteFolder
from nas.service import doctor
from nas.settings import Settings
from nas.training.checkpoint import Checkpoint, checkpoint_of, forget, prune
from nas.training.run import Point
from tests.support.paths import ROOT
from tests.support.remotes import PASSWORD, Remote
from tests.support.runs import STEPS, points
from tests.support.services import wait_for
from tests.support.tiers import FULL

RECIPE = "mlp-regression-1"


@pytest.fixture(params=["s3", *(pytest.param(kind, marks=FULL) for kind in ("ftp", "file"))])
def remote(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Remote]:
    found = Remote(request.param, tmp_path / "remote")
    found.start()
    for name, value in found.environment.items():
        monkeypatch.setenv(name, value)
    yield found
    found.stop()
    for _ in range(4):  # calls that hung have ended, and take no room of the next test's
        assert nas.remote._threads.acquire(timeout=100)
    for _ in range(4):
        nas.remote._threads.release()


@pytest.fixture(scope="module")
def whole() -> list[Point]:
    """The curve of a run that nothing interrupts."""
    return list(points(RECIPE, None))


@pytest.fixture
def served(remote: Remote) -> Remote:
    """One with a server, which can fail."""
    if remote.kind == "file":
        pytest.skip("a folder has no server")
    return remote


def checkpoint(folder: Path, url: str, key: str = "a", run: str = "run") -> Checkpoint:
    return checkpoint_of(folder, run, [key], RemoteFolder(url))


def saved(folder: Path, url: str, step: int, run: str = "run") -> Checkpoint:
    """A checkpoint that has been copied."""
    made = checkpoint(folder, url, run=run)
    made.save({"step": step, "w": torch.full((1000,), float(step))})
    made.flush()
    return made


def step_of(found: Checkpoint) -> int | None:
    state = found.load()
    if state is None:
        return None
    assert torch.equal(state["w"], torch.full((1000,), float(state["step"])))
    return int(state["step"])


def test_a_killed_run_goes_on_on_another_machine_to_the_same_curve(
    remote: Remote, tmp_path: Path, whole: list[Point]
) -> None:
    here = tmp_path / "here" / "run.pt"
    killed = subprocess.Popen(
        [sys.executable, "-m", "tests.support.runs", RECIPE, str(here), remote.url],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert killed.stdout is not None
    for _ in range(4):  # half of its evaluations
        killed.stdout.readline()
    wait_for(lambda: "run.pt" in remote.names(), "a copy")
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    shutil.rmtree(here.parent)
    there = tmp_path / "there" / "run.pt"
    state = Checkpoint(there, "key", remote=RemoteFolder(remote.url)).load()
    assert state is not None
    assert 0 < state["step"] < STEPS
    assert list(points(RECIPE, there, remote.url)) == whole


def test_the_state_that_is_farthest_is_used(remote: Remote, tmp_path: Path) -> None:
    saved(tmp_path / "here", remote.url, 1)
    saved(tmp_path / "there", remote.url, 2)  # the run went on elsewhere
    assert step_of(checkpoint(tmp_path / "here", remote.url)) == 2
    alone = checkpoint_of(tmp_path / "here", "run", ["a"])
    alone.save({"step": 3, "w": torch.full((1000,), 3.0)})  # while nothing could be copied
    assert step_of(checkpoint(tmp_path / "here", remote.url)) == 3


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty"])
def test_a_damaged_copy_is_never_used(
    remote: Remote, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path / "here", remote.url, 7)
    (name,) = remote.names()
    content = bytearray((remote.folder / name).read_bytes())
    number = content.index(torch.full((1000,), 7.0).numpy().tobytes())
    content[number + 1000] ^= 1
    damaged = {"torn": content[: len(content) // 2], "flipped": content, "empty": b""}[damage]
    (remote.folder / name).write_bytes(bytes(damaged))
    assert step_of(checkpoint(tmp_path / "elsewhere", remote.url)) is None
    assert "damaged" in caplog.text
    assert step_of(checkpoint(tmp_path / "here", remote.url)) == 7  # the last good one


def test_what_is_no_longer_wanted_is_deleted_there_too(remote: Remote, tmp_path: Path) -> None:
    ended = saved(tmp_path, remote.url, 1, run="ended")
    saved(tmp_path, remote.url, 1, run="stopped")
    saved(tmp_path, remote.url, 1, run="other")
    assert len(remote.names()) == 3
    ended.remove()
    wait_for(lambda: len(remote.names()) == 2, "the ended run's copy to go")
    forget(tmp_path, "stopped", RemoteFolder(remote.url))
    wait_for(lambda: len(remote.names()) == 1, "the stopped run's copy to go")
    assert step_of(checkpoint(tmp_path / "elsewhere", remote.url, run="other")) == 1


def test_the_rules_of_age_and_size_hold_there_too(remote: Remote, tmp_path: Path) -> None:
    for number, run in enumerate(("oldest", "older", "old", "new")):
        saved(tmp_path / "local", remote.url, number, run=run)
        path = next(p for p in remote.folder.iterdir() if p.stat().st_mtime > time.time() - 1000)
        then = time.time() - (10 - number * 3) * 86_400  # 10, 7, 4 and 1 days
        os.utime(path, (then, then))
    half = remote.folder / f"{'0' * 32}-{'0' * 64}.pt.0123.part"
    half.write_bytes(b"half")
    os.utime(half, (time.time() - 8 * 86_400,) * 2)
    theirs = remote.folder / "theirs.pt"
    theirs.write_bytes(b"not ours")
    os.utime(theirs, (time.time() - 80 * 86_400,) * 2)
    prune(tmp_path / "missing", remote=RemoteFolder(remote.url))
    wait_for(lambda: len(remote.names()) == 3, "what is older than a week to go")
    size = next(p.stat().st_size for p in remote.folder.iterdir() if p != theirs)
    prune(tmp_path / "missing", max_bytes=size, remote=RemoteFolder(remote.url))
    wait_for(lambda: len(remote.names()) == 2, "the older one to make room")
    assert "theirs.pt" in remote.names()
    assert step_of(checkpoint(tmp_path / "elsewhere", remote.url, run="new")) == 3


@FULL
def test_a_run_goes_on_while_the_store_is_down(
    served: Remote, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch, whole: list[Point],
) -> None:  # fmt: skip
    monkeypatch.setattr(nas.remote, "REST_SECONDS", 0.0)
    trained = points(RECIPE, tmp_path / "here" / "run.pt", served.url)
    curve = [next(trained) for _ in range(4)]
    wait_for(lambda: "run.pt" in served.names(), "a copy")
    served.stop()
    curve += list(trained)
    assert curve == whole
    wait_for(lambda: "run.pt is not copied" in caplog.text, "a warning")
    assert PASSWORD not in caplog.text
    served.start()
    again = list(points(RECIPE, tmp_path / "there" / "run.pt", served.url))  # from the last copy
    assert again == curve


def test_a_store_that_hangs_holds_nobody_up(
    served: Remote, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch, whole: list[Point],
) -> None:  # fmt: skip
    monkeypatch.setattr(nas.remote, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(nas.training.checkpoint, "_LAST_SECONDS", 1.0)
    served.hang()
    curve = list(points(RECIPE, tmp_path / "run.pt", served.url))
    assert curve == whole
    assert "no answer for 1 s" in caplog.text
    assert PASSWORD not in caplog.text
    saved(tmp_path, served.url, 1)
    prune(tmp_path / "missing", remote=RemoteFolder(served.url))


@FULL
def test_a_process_ends_while_its_store_hangs(served: Remote, tmp_path: Path) -> None:
    served.hang()
    program = (
        "import sys, nas.remote as r, pathlib; r.ANSWER_SECONDS = 1.0\n"
        f"r.RemoteFolder({served.url!r}).fetch('a', pathlib.Path('unused'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "no answer for 1 s" in done.stderr


@FULL
def test_the_doctor_tries_it(served: Remote) -> None:
    used = Settings(checkpoints_url=served.url)
    (check,) = doctor._checkpoints(used)
    assert (check.status, served.names()) == ("ok", [])
    served.stop()
    (check,) = doctor._checkpoints(used)
    assert check.status == "problem"
    assert PASSWORD not in check.finding


def test_calls_that_hang_are_bounded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nas.remote, "REST_SECONDS", 0.0)
    caplog.set_level(logging.WARNING)
    silent = Remote("ftp", tmp_path)
    silent.start()
    try:
        silent.hang()
        found = [RemoteFolder(silent.url).delete(lambda entries: ()) for _ in range(6)]
        assert sum(each.cancelled() for each in found) >= 2
        assert "earlier calls have not ended" in caplog.text
    finally:
        silent.stop()
        for each in found:
            wait_for(each.done, "calls to end")
