"""A search by rounds on a real worker and real Ray: killed, paused and resumed at every stage."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nas.planning.request import SearchRequest
from nas.store import Store, Trial, upgrade
from tests.support.halving import decisions
from tests.support.services import PATIENCE, start_worker, wait_for
from tests.support.small import TINY
from tests.support.tiers import FULL

ROOT = Path(__file__).parents[3]
REQUEST = SearchRequest.checked(
    {
        "train_flops": 2e10, "total_train_flops": 3.2e11, "trials": 8, "references": 3, "seed": 2,
        "overrides": TINY,
    }
)  # fmt: skip
LEASE_SECONDS = 15
#: Of a running trial, whether the search is at a stage.
STAGES: dict[str, Callable[[Trial], bool]] = {
    "exploring": lambda t: t.kind == "candidate" and t.trained_steps == 0,
    "racing": lambda t: t.kind == "candidate" and t.trained_steps > 0,
    "confirming": lambda t: t.kind == "confirmation",
}


def begun(home: Path, folder: Path) -> tuple[Store, str]:
    home.mkdir()
    url = f"sqlite:///{home / 'einsum-nas.db'}"
    upgrade(url)
    store = Store(url)
    return store, store.create_search(REQUEST, data_path=str(folder))[0].id


def await_stage(store: Store, search_id: str, stage: str) -> None:
    def reached() -> bool:
        return any(STAGES[stage](t) for t in store.trials(search_id, states=("running",)))

    wait_for(reached, f"a run while {stage}")


@pytest.fixture(scope="module")
def expected(
    tmp_path_factory: pytest.TempPathFactory, text_folder: Path
) -> list[tuple[object, ...]]:
    """What an undisturbed search decides."""
    home = tmp_path_factory.mktemp("rounds") / "whole"
    store, search_id = begun(home, text_folder)
    assert start_worker(home, LEASE_SECONDS).wait(PATIENCE) == 0, (home / "log").read_text()
    assert store.search(search_id).state == "succeeded"
    found = decisions(store, store.search(search_id))
    assert {t[1] for t in found} == {"reference", "candidate", "confirmation"}
    store.close()
    return found


@FULL
def test_a_worker_killed_at_every_stage_loses_nothing_and_decides_the_same(
    tmp_path: Path, text_folder: Path, expected: list[tuple[object, ...]]
) -> None:
    home = tmp_path / "broken"
    store, search_id = begun(home, text_folder)
    for stage in STAGES:
        victim = start_worker(home, LEASE_SECONDS)
        await_stage(store, search_id, stage)
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait()
        time.sleep(LEASE_SECONDS + 1)  # an idle worker would end before the lease does
    assert start_worker(home, LEASE_SECONDS).wait(PATIENCE) == 0, (home / "log").read_text()
    ended = store.search(search_id)
    assert (ended.state, ended.epoch) == ("succeeded", 4)
    assert decisions(store, ended) == expected
    store.close()


@FULL
@pytest.mark.parametrize("stage", STAGES)
def test_a_search_paused_at_a_stage_goes_on_as_if_it_had_not_been(
    tmp_path: Path, text_folder: Path, stage: str, expected: list[tuple[object, ...]]
) -> None:
    home = tmp_path / "paused"
    store, search_id = begun(home, text_folder)
    worker = start_worker(home, LEASE_SECONDS)
    await_stage(store, search_id, stage)
    store.pause(search_id)
    assert worker.wait(PATIENCE) == 0, (home / "log").read_text()
    assert store.search(search_id).state == "paused"
    assert not store.trials(search_id, states=("running",))
    store.resume(search_id)
    assert start_worker(home, LEASE_SECONDS).wait(PATIENCE) == 0, (home / "log").read_text()
    ended = store.search(search_id)
    assert (ended.state, ended.failures) == ("succeeded", 0)
    assert decisions(store, ended) == expected
    # no states of runs stay behind
    kept = list((home / "checkpoints").glob("*")) if (home / "checkpoints").is_dir() else []
    assert kept == []
    store.close()
