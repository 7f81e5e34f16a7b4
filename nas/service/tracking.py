"""Trials as runs of MLflow or Weights & Biases, with their curves.

A trial becomes one run, under the experiment or group of its task's data or its search.  Exporting
again adds the trials that are not there yet, and no other twice.  Weights & Biases is written
offline, into a folder that `wandb sync` uploads; an account is not needed here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.errors import EinsumNasError, InvalidInput, one_line
from nas.records.trial import StoredPoint, Trial
from nas.store.dump import StoredRun

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Fields of a trial that say what was trained, and those that say what came of it.
_PARAMS = (
    "name", "design", "kind", "width", "depth", "steps", "seed", "dense", "params", "train_flops",
    "forward_flops_per_token",
)  # fmt: skip
_RESULTS = ("loss", "trained_steps", "seconds_per_step", "peak_memory_bytes")
_OF_POINT = ("loss", "loss_stderr", "train_flops", "train_seconds")
#: State of a trial → status of a run of MLflow.
_STATUS = {"complete": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
_TAG = "einsum_nas.trial"
_LONGEST = 500  # characters of a parameter that MLflow takes


def params_of(run: StoredRun) -> dict[str, Any]:
    """What was trained: task, design, width and so on."""
    trial = run.trial
    return {"task": run.task, "fingerprint": run.fingerprint} | {
        name: getattr(trial, name) for name in _PARAMS
    }


def tags_of(run: StoredRun) -> dict[str, str]:
    """Where a run comes from, and why it has no result."""
    trial = run.trial
    tags = {
        _TAG: _name_of(trial), "einsum_nas.search": trial.search_id,
        "einsum_nas.number": str(trial.number), "einsum_nas.state": trial.state,
    }  # fmt: skip
    if trial.error is not None:
        tags["einsum_nas.error"] = trial.error
    return tags


def metrics_of(
    trial: Trial, points: Sequence[StoredPoint]
) -> Iterator[tuple[int, dict[str, float]]]:
    """(step, metrics) of each evaluation, and of the end; what is not known is left out."""
    for point in points:
        yield point.step, {name: float(getattr(point, name)) for name in _OF_POINT}
    found = {name: getattr(trial, name) for name in _RESULTS}
    yield trial.steps, {f"final_{n}": float(v) for n, v in found.items() if v is not None}


def _name_of(trial: Trial) -> str:
    """Tells a trial from those of every other store."""
    return f"{trial.search_id}-{trial.number}"


def _ended(runs: Iterable[StoredRun]) -> Iterator[StoredRun]:
    return (run for run in runs if run.trial.state in _STATUS)


def _missing(name: str) -> InvalidInput:
    accepted = f"formats whose library is installed; `pip install {name}` beside einsum-nas"
    return InvalidInput("format", name, accepted)


def to_mlflow(runs: Iterable[StoredRun], uri: str, experiment: str, about: dict[str, str]) -> int:
    """Write ended trials to a tracking server or a folder of MLflow; return how many are new.

    Parameters
    ----------
    uri
        As of `mlflow.set_tracking_uri`.
    experiment
        Name of the experiment, made if it is not there; `about` are its tags then.

    Raises
    ------
    InvalidInput
        MLflow is not installed.
    EinsumNasError
        The server refused, or did not answer.
    """
    try:
        import mlflow
        from mlflow import entities
    except ImportError:
        raise _missing("mlflow") from None
    client = mlflow.MlflowClient(tracking_uri=uri)
    with _of_library("MLflow", uri, mlflow.exceptions.MlflowException):
        known = client.get_experiment_by_name(experiment)
        place = known.experiment_id if known else client.create_experiment(experiment, tags=about)
        there = _there(client, place)
        count = 0
        for run in _ended(runs):
            trial = run.trial
            if _name_of(trial) in there:
                continue
            begun = _milliseconds(trial.started_at or trial.created_at)
            made = client.create_run(
                place, start_time=begun, run_name=f"{trial.number} {trial.name}", tags=tags_of(run)
            )
            metrics = [
                entities.Metric(name, value, begun, step)
                for step, found in metrics_of(trial, run.points)
                for name, value in found.items()
            ]
            params = [
                entities.Param(name, str(value)[:_LONGEST])
                for name, value in params_of(run).items()
            ]
            client.log_batch(made.info.run_id, metrics=metrics, params=params)
            client.set_terminated(
                made.info.run_id, _STATUS[trial.state],
                _milliseconds(trial.finished_at or trial.created_at),
            )  # fmt: skip
            count += 1
    return count


def _there(client: Any, experiment: str) -> set[str]:
    """Trials that an experiment has; what an export that broke off has left of one is deleted."""
    found: set[str] = set()
    token = None
    while True:
        page = client.search_runs([experiment], max_results=1000, page_token=token)
        for run in page:
            name = run.data.tags.get(_TAG)
            if name is not None and run.info.status not in _STATUS.values():
                client.delete_run(run.info.run_id)
            elif name is not None:
                found.add(name)
        token = page.token
        if not token:
            return found


def to_wandb(runs: Iterable[StoredRun], folder: str, project: str, group: str) -> int:
    """Write ended trials as offline runs of Weights & Biases; return how many.

    Parameters
    ----------
    folder
        Where the runs are written, in ``wandb``; made if it is not there.

    Raises
    ------
    InvalidInput
        Its library is not installed.
    EinsumNasError
        The library failed.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb
    except ImportError:
        raise _missing("wandb") from None
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    count = 0
    with _of_library("wandb", folder, wandb.Error):
        for run in _ended(runs):
            trial = run.trial
            # an id of its own, by which an upload that is repeated finds the run
            written = wandb.init(
                mode="offline", dir=str(place), project=project, group=group,
                id=f"{trial.search_id[:12]}-{trial.number}", name=f"{trial.number} {trial.name}",
                config=params_of(run) | tags_of(run), job_type=trial.kind,
                settings=wandb.Settings(console="off", x_disable_stats=True, silent=True),
            )  # fmt: skip
            for step, found in metrics_of(trial, run.points):
                last = {n: v for n, v in found.items() if n.startswith("final_")}
                if last or not found:
                    written.summary.update(last)
                else:
                    written.log(found, step=step)
            written.finish(exit_code=0 if trial.state == "complete" else 1)
            count += 1
    return count


@contextmanager
def _of_library(name: str, place: str, error: type[Exception]) -> Iterator[None]:
    try:
        yield
    except error as failed:
        raise EinsumNasError(f"{name} at {place}: {one_line(failed)}") from None


def _milliseconds(seconds: float) -> int:
    return round(1000 * seconds)
