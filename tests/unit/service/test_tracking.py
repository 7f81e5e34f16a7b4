"""Trials as runs of MLflow and Weights & Biases: what is written of each."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nas.errors import InvalidInput
from nas.service import tracking
from nas.service.export import export
from nas.store.dump import StoredRun, iterate_runs
from tests.support.filling import Filling, fill


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filling]:
    opened = Filling(f"sqlite:///{tmp_path_factory.mktemp('ready') / 'ready.db'}")
    fill(opened)
    yield opened
    opened.store.close()


def ended(ready: Filling) -> list[StoredRun]:
    return [
        run
        for run in iterate_runs(ready.store, task="text")
        if run.trial.state in ("complete", "failed", "stopped")
    ]


def test_a_run_has_every_evaluation_and_what_was_trained(ready: Filling) -> None:
    runs = ended(ready)
    assert {run.trial.state for run in runs} >= {"complete", "failed"}
    for run in runs:
        *curve, (last, final) = tracking.metrics_of(run.trial, run.points)
        assert [(s, m["loss"], m["train_flops"]) for s, m in curve] == [
            (p.step, p.loss, p.train_flops) for p in run.points
        ]
        assert last == run.trial.steps
        assert final.get("final_loss") == run.trial.loss
        assert all(math.isfinite(v) for _, found in [*curve, (last, final)] for v in found.values())
        params, tags = tracking.params_of(run), tracking.tags_of(run)
        assert (params["design"], params["width"]) == (run.trial.design, run.trial.width)
        assert tags["einsum_nas.trial"] == f"{run.trial.search_id}-{run.trial.number}"
        assert tags.get("einsum_nas.error") == run.trial.error


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_library_that_is_not_installed_is_named(
    ready: Filling, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InvalidInput, match=f"pip install {name}"):
        export(ready.store, name, str(tmp_path / "runs"))


def test_mlflow_gets_each_trial_once(ready: Filling, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    runs = ended(ready)
    assert tracking.to_mlflow(runs[:1], uri, "mine", {"task": "text"}) == 1
    assert tracking.to_mlflow(runs, uri, "mine", {}) == len(runs) - 1
    assert tracking.to_mlflow(runs, uri, "mine", {}) == 0
    client = mlflow.MlflowClient(tracking_uri=uri)
    place = client.get_experiment_by_name("mine")
    found = {r.data.tags["einsum_nas.trial"]: r for r in client.search_runs([place.experiment_id])}
    assert set(found) == {tracking.tags_of(run)["einsum_nas.trial"] for run in runs}
    for run in runs:
        made = found[tracking.tags_of(run)["einsum_nas.trial"]]
        history = client.get_metric_history(made.info.run_id, "loss") if run.points else []
        assert [(m.step, m.value) for m in history] == [(p.step, p.loss) for p in run.points]


def test_what_an_export_that_broke_off_has_left_is_written_anew(
    ready: Filling, tmp_path: Path
) -> None:
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = mlflow.MlflowClient(tracking_uri=uri)
    run = ended(ready)[0]
    client.create_run(client.create_experiment("mine"), tags=tracking.tags_of(run))
    assert tracking.to_mlflow([run], uri, "mine", {}) == 1
    assert tracking.to_mlflow([run], uri, "mine", {}) == 0


def test_wandb_is_written_offline(ready: Filling, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    runs = ended(ready)[:2]
    assert tracking.to_wandb(runs, str(tmp_path), "einsum-nas", "text") == 2
    assert len(list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))) == 2
