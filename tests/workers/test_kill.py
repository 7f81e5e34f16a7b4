"""A real worker, real Ray, and SIGKILL in the middle of a search."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nas.request import SearchRequest
from nas.store import Store, Trial, upgrade
from tests.conftest import service_environment

REQUEST = SearchRequest.checked({"train_flops": 5e10, "trials": 4, "references": 3, "seed": 2})


def start_worker(home: Path) -> subprocess.Popen[bytes]:
    environment = service_environment(home, concurrency="1", lease_seconds="3")
    with (home / "log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "nas.cli", "worker", "--until-idle"],
            env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def open_store(home: Path) -> Store:
    home.mkdir()
    url = f"sqlite:///{home / 'einsum-nas.db'}"
    upgrade(url)
    return Store(url)


def await_trials(store: Store, search_id: str, complete: int, running: int) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        counts = store.search(search_id).trial_counts
        if counts.get("complete", 0) >= complete and counts.get("running", 0) >= running:
            return
        time.sleep(0.1)
    raise AssertionError(store.search(search_id))


@pytest.mark.timeout(900)
def test_kill_nine_loses_no_trial_and_changes_no_proposal(tmp_path: Path) -> None:
    whole, broken = (open_store(tmp_path / name) for name in ("whole", "broken"))
    expected_id, search_id = (s.create_search(REQUEST)[0].id for s in (whole, broken))
    undisturbed = start_worker(tmp_path / "whole")

    victim = start_worker(tmp_path / "broken")
    await_trials(broken, search_id, complete=4, running=1)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    finished = [t for t in broken.trials(search_id) if t.state == "complete"]
    curves = {t.id: broken.curve(t.id) for t in finished}
    (interrupted,) = [t for t in broken.trials(search_id) if t.state == "running"]
    assert len(finished) >= 4
    time.sleep(3.5)  # until the lease has run out

    heir = start_worker(tmp_path / "broken")
    assert heir.wait(300) == 0, (tmp_path / "broken" / "log").read_text()
    assert undisturbed.wait(300) == 0, (tmp_path / "whole" / "log").read_text()

    ended = broken.search(search_id)
    assert (ended.state, ended.failures, ended.epoch) == ("succeeded", 1, 2)
    trials = broken.trials(search_id)
    assert [t.number for t in trials] == list(range(7))
    assert {t.state for t in trials} == {"complete"}
    for before in finished:
        assert broken.trial(before.id) == before
        assert broken.curve(before.id) == curves[before.id]
    assert broken.trial(interrupted.id).attempts == 2

    def proposal(t: Trial) -> tuple[object, ...]:
        return (t.number, t.kind, t.params, t.theta, t.width, t.steps, t.seed, t.key)

    expected = whole.trials(expected_id)
    assert [proposal(t) for t in trials] == [proposal(t) for t in expected]
    # the same runs: equal to the bit, the interrupted one too
    assert [t.loss for t in trials] == [t.loss for t in expected]
    whole.close()
    broken.close()
