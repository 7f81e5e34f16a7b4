"""Runs over several ranks, on a real Ray."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from nas.errors import ClusterUnavailable, RunFailed
from nas.planning.recipe import Recipe
from nas.planning.request import SearchRequest
from nas.planning.runs import RunPlan
from nas.settings import Settings
from nas.store import Store, upgrade
from nas.training.run import Point, alone, train
from tests.support.commands import execute
from tests.support.ranks import TINY, TRAIN, VALIDATION, plan
from tests.support.small import SMALL_SEARCH
from tests.support.small import TINY as SMALL
from tests.support.tiers import FULL
from workers.ray import cluster
from workers.ray.spread import _Told, spread
from workers.ray.trainable import ProcessLost

# Ray Train makes settings of Ray Data, which is not used here, with fields that it has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`use_.*deprecated:DeprecationWarning")
SEED, HALF = 3, {"CPU": 0.5}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The owner of the data, on a cluster of this process's own."""
    cluster.connect(Settings(home=tmp_path_factory.mktemp("home")))
    shared = cluster.Shared(TRAIN, VALIDATION)
    yield shared.owner
    shared.free()
    cluster.disconnect()


def points(
    data: Any, folder: Path, p: RunPlan, recipe: Recipe, told: _Told, ranks: int = 2
) -> Iterator[Point]:
    run = {"plan": p.as_dict(), "recipe": recipe.as_dict(), "seed": SEED, "key": "k"}
    config = {
        "data": data, "threads": 1, "checkpoints": str(folder), "memory": None,
        "run": json.dumps(run),
    }  # fmt: skip
    return alone(spread(ranks, HALF, config, told), SEED)


@FULL
def test_ranks_of_a_cluster_give_the_curve_of_one_device(data: Any, tmp_path: Path) -> None:
    told, p = _Told("cpu"), plan("monarch")
    recipe = replace(TINY, ranks=2, sharding="full")
    found = list(points(data, tmp_path, p, recipe, told))
    torch.set_num_threads(1)
    expected = list(train(p, TINY, TRAIN, VALIDATION, SEED))
    assert [f.step for f in found] == [e.step for e in expected]
    assert [f.loss for f in found] == pytest.approx([e.loss for e in expected], rel=1e-4)
    assert (told.environment["ranks"], told.environment["sharding"]) == (2, "full")
    assert set(told.environment["execution_plans"]) == set(p.structures)
    assert told.result().peak_memory_bytes is not None
    assert list(tmp_path.iterdir()) == []


@FULL
def test_the_death_of_a_rank_ends_them_all(data: Any, tmp_path: Path) -> None:
    recipe = replace(TINY, ranks=2, evaluations=32)
    long = replace(plan("dense"), steps=1 << 20)  # would take hours
    run = points(data, tmp_path, long, recipe, _Told("cpu"))
    assert next(run).step < 100
    ranks = [p for p in psutil.Process().children(recursive=True) if "TrainWorker" in _title(p)]
    assert len(ranks) == 2
    ranks[1].kill()
    with pytest.raises(ProcessLost, match="rank 1: "):
        for _ in run:
            pass
    psutil.wait_procs(ranks, timeout=60)
    assert not any(p.is_running() for p in ranks)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""


@FULL
def test_an_error_of_the_run_is_told(data: Any, tmp_path: Path) -> None:
    recipe = replace(TINY, ranks=2)
    odd = replace(plan("dense"), width=40)  # no whole number of heads
    with pytest.raises(RunFailed, match="RuntimeError: shape "):
        list(points(data, tmp_path, odd, recipe, _Told("cpu")))


@FULL
def test_more_ranks_than_the_cluster_holds_are_not_waited_for(data: Any, tmp_path: Path) -> None:
    run = points(data, tmp_path, plan("dense"), TINY, _Told("cpu"), ranks=1 << 16)
    with pytest.raises(ProcessLost, match=r"65536 ranks that need .* have room for"):
        next(run)
    with pytest.raises(ClusterUnavailable, match="2 ranks that need"):
        cluster.trial_capacity({"CPU": 1e6}, 2)
    whole = cluster.trial_capacity(HALF)
    assert cluster.trial_capacity(HALF, 2) == whole // 2


@FULL
def test_a_search_of_runs_over_two_ranks(tmp_path: Path, text_folder: Path) -> None:
    url = f"sqlite:///{tmp_path / 'einsum-nas.db'}"
    upgrade(url)
    store = Store(url)
    overrides = {**SMALL, "depth": 1, "max_steps": 60, "ranks": 2, "sharding": "full"}
    request = SearchRequest.checked(
        {**SMALL_SEARCH, "data": None, "trials": 1, "sampler": "random", "overrides": overrides}
    )
    search = store.create_search(request, data_path=str(text_folder))[0]
    done = execute(tmp_path, "worker", "--until-idle", concurrency="1")
    assert done.returncode == 0, done.stderr
    ended = store.search(search.id)
    assert (ended.state, ended.failures) == ("succeeded", 0), done.stderr
    for trial in store.trials(search.id):
        assert trial.state == "complete", trial.error
        assert trial.environment is not None
        assert trial.environment["ranks"] == 2
        assert store.curve(trial.id)[-1].loss == trial.loss
    store.close()
