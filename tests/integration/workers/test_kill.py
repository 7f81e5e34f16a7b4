"""A real worker, real Ray, and SIGKILL in the middle of a search."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nas.planning.request import SearchRequest
from nas.store import Store, Trial, upgrade
from tests.support.services import PATIENCE, start_worker, wait_for
from tests.support.small import TINY
from tests.support.tiers import FULL

#: Runs of seconds, two of them together: how long they train changes neither what is lost nor what
#: is proposed.
REQUEST = SearchRequest.checked(
    {
        "train_flops": 5e9, "trials": 2, "references": 3, "replicates": 2, "seed": 2,
        "overrides": {**TINY, "depth": 1},
    }
)  # fmt: skip

#: Long enough that a busy machine lets the heartbeat through.
LEASE_SECONDS = 15


def open_store(home: Path) -> Store:
    home.mkdir()
    url = f"sqlite:///{home / 'einsum-nas.db'}"
    upgrade(url)
    return Store(url)


def await_trials(store: Store, search_id: str, complete: int, running: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        counts = store.search(search_id).trial_counts
        if counts.get("complete", 0) >= complete and counts.get("running", 0) >= running:
            return
        time.sleep(0.1)
    raise AssertionError(store.search(search_id))


@FULL
def test_kill_nine_loses_no_trial_and_changes_no_proposal(
    tmp_path: Path, text_folder: Path
) -> None:
    whole, broken = (open_store(tmp_path / name) for name in ("whole", "broken"))
    expected_id, search_id = (
        s.create_search(REQUEST, data_path=str(text_folder))[0].id for s in (whole, broken)
    )
    undisturbed = start_worker(tmp_path / "whole", LEASE_SECONDS)

    victim = start_worker(tmp_path / "broken", LEASE_SECONDS)
    await_trials(broken, search_id, complete=4, running=1)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    finished = [t for t in broken.trials(search_id) if t.state == "complete"]
    curves = {t.id: broken.curve(t.id) for t in finished}
    interrupted = [t for t in broken.trials(search_id) if t.state == "running"]
    assert len(finished) >= 4
    assert interrupted

    time.sleep(LEASE_SECONDS + 1)  # an idle worker would end before the lease does
    heir = start_worker(tmp_path / "broken", LEASE_SECONDS)
    assert heir.wait(PATIENCE) == 0, (tmp_path / "broken" / "log").read_text()
    assert undisturbed.wait(PATIENCE) == 0, (tmp_path / "whole" / "log").read_text()

    ended = broken.search(search_id)
    assert (ended.state, ended.failures, ended.epoch) == ("succeeded", 1, 2)
    trials = broken.trials(search_id)
    assert [t.number for t in trials] == list(range(10))
    assert {t.state for t in trials} == {"complete"}
    for before in finished:
        assert broken.trial(before.id) == before
        assert broken.curve(before.id) == curves[before.id]
    assert {broken.trial(t.id).attempts for t in interrupted} == {2}

    def proposal(t: Trial) -> tuple[object, ...]:
        return (t.number, t.kind, t.sampler_params, t.theta, t.width, t.steps, t.seed, t.key)

    expected = whole.trials(expected_id)
    assert [proposal(t) for t in trials] == [proposal(t) for t in expected]
    # the same runs: equal to the bit, the interrupted one too
    assert [t.loss for t in trials] == [t.loss for t in expected]
    whole.close()
    broken.close()


def trial_processes(driver: int) -> list[int]:
    """Ray's processes that train, of the cluster that this driver started."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace")
            status = (entry / "stat").read_text()
        except (OSError, ValueError):
            continue
        # while it works Ray titles it after the wrapper that carries the trial's resources
        titles = ("ray::ResourceTrainable", "ray::ProxyTrainable")
        if command.startswith(titles) and driver in ancestors(status):
            found.append(int(entry.name))
    return found


def ancestors(status: str) -> list[int]:
    """The process ids above a process, from its /proc stat line."""
    found = []
    while (parent := int(status.rsplit(")", 1)[1].split()[1])) > 1:
        found.append(parent)
        status = Path(f"/proc/{parent}/stat").read_text()
    return found


@FULL
def test_a_killed_trial_process_is_replaced_and_its_run_is_the_same(
    tmp_path: Path, text_folder: Path
) -> None:
    store = open_store(tmp_path / "home")
    search_id = store.create_search(
        REQUEST.model_copy(update={"trials": 1, "train_flops": 5e10}), data_path=str(text_folder)
    )[0].id
    worker = start_worker(tmp_path / "home", LEASE_SECONDS)
    await_trials(store, search_id, complete=1, running=1)

    def trains() -> bool:  # its process has begun it, and not only been given it
        return any(store.curve(t.id) for t in store.trials(search_id) if t.state == "running")

    wait_for(trains, "a point of the running trial")
    victims = trial_processes(worker.pid)
    assert victims
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    assert worker.wait(PATIENCE) == 0, (tmp_path / "home" / "log").read_text()
    ended = store.search(search_id)
    assert (ended.state, ended.failures, ended.epoch) == ("succeeded", 0, 1)
    assert "trial started anew" in (tmp_path / "home" / "log").read_text()
    for trial in store.trials(search_id):
        assert trial.state == "complete", trial.error
        steps = [p.step for p in store.curve(trial.id)]
        assert steps == sorted(set(steps))
        assert steps[-1] == trial.steps
    store.close()


@FULL
def test_a_search_that_is_paused_within_a_pack_goes_on_with_it(
    tmp_path: Path, text_folder: Path
) -> None:
    store = open_store(tmp_path / "home")
    search_id = store.create_search(REQUEST, data_path=str(text_folder))[0].id
    worker = start_worker(tmp_path / "home", LEASE_SECONDS)
    await_trials(store, search_id, complete=2, running=2)
    store.pause(search_id)
    assert worker.wait(PATIENCE) == 0, (tmp_path / "home" / "log").read_text()
    paused = store.search(search_id)
    assert (paused.state, paused.failures) == ("paused", 0)
    assert "running" not in paused.trial_counts
    finished = [t for t in store.trials(search_id) if t.state == "complete"]
    store.resume(search_id)
    assert start_worker(tmp_path / "home", LEASE_SECONDS).wait(PATIENCE) == 0
    assert store.search(search_id).trial_counts == {"complete": 10}
    for before in finished:
        assert store.trial(before.id) == before
    store.close()


@pytest.mark.full
def test_a_worker_that_is_told_to_stop_hands_its_search_back_at_any_moment(
    tmp_path: Path, text_folder: Path
) -> None:
    store = open_store(tmp_path / "home")
    search_id = store.create_search(REQUEST, data_path=str(text_folder))[0].id

    def stop_once(ready: Callable[[], bool]) -> None:
        worker = start_worker(tmp_path / "home", LEASE_SECONDS)
        deadline = time.monotonic() + PATIENCE
        while not ready():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        worker.terminate()
        assert worker.wait(PATIENCE) == 0, (tmp_path / "home" / "log").read_text()
        found = store.search(search_id)
        assert (found.state, found.failures) == ("queued", 0)
        assert store.events(search_id)[-1].kind == "handed_back"
        assert "running" not in found.trial_counts

    # while Ray starts, which takes seconds; and while a trial runs
    stop_once(lambda: store.search(search_id).state == "running")
    stop_once(lambda: store.search(search_id).trial_counts.get("running", 0) > 0)
    assert store.search(search_id).epoch == 2
    store.close()
