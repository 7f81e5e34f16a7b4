"""Runs of a study: each trained once, in a pool of processes, and kept as one file.

Runs that differ only in their seed train together where that takes less time.  A study that was
interrupted goes on where it stood: finished runs are read from their files, and the runs that were
cut off from their last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from nas.planning.recipe import Recipe
from nas.planning.runs import RunPlan
from nas.processes import end_with
from nas.tasks import TaskData
from nas.training.checkpoint import Checkpoint
from nas.training.replicates import pay
from nas.training.run import Execution, Point, execution_plans, train_replicates

_CHECKPOINT_SECONDS = 20.0
_data: Mapping[str, TaskData] = {}


@dataclass(frozen=True)
class StudyRun:
    """One run of a study."""

    recipe: Recipe
    plan: RunPlan
    seed: int
    #: fingerprint of its task
    task: str
    #: what the structure is called in the report
    name: str

    @classmethod
    def of(cls, data: TaskData, plan: RunPlan, seed: int, name: str | None = None) -> StudyRun:
        """A run on loaded data."""
        return cls(data.recipe, plan, seed, data.fingerprint, name or plan.name)

    @property
    def key(self) -> str:
        """Digest of everything that decides the curve on one machine, 32 hex digits."""
        return self._digest(self.seed)

    @property
    def replicates_key(self) -> str:
        """The same of all runs that differ from this one in their seed at most."""
        return self._digest("replicates")

    def _digest(self, seed: int | str) -> str:
        versions = [version("einsum-nas"), torch.__version__]
        decides = [self.task, self.plan.as_dict(), seed, versions]
        text = json.dumps(decides, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def run_all(
    runs: Sequence[StudyRun],
    data: Iterable[TaskData],
    folder: Path,
    *,
    processes: int,
    execution: Execution,
) -> Iterator[dict[str, Any]]:
    """Yield the record of every run, finished ones first, the others as they end.

    Parameters
    ----------
    data
        The data of the runs' tasks.
    folder
        Where records and checkpoints are kept; what is there already is not run again.
    processes
        Processes that train at once, one thread each.

    A record is a plain JSON object; a run that failed by its own fault has its reason in
    ``failure`` and the points it had.
    """
    waiting = []
    for run in runs:
        path = _record_path(folder, run)
        if path.is_file():
            yield json.loads(path.read_text())
        else:
            waiting.append(run)
    if not waiting:
        return
    by_fingerprint = {d.fingerprint: d for d in data}
    # a forked child would inherit torch's threads in whatever state they are
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        processes,
        mp_context=context,
        initializer=_begin_process,
        initargs=(by_fingerprint, os.getpid()),
    )
    with pool:
        try:
            jobs = [pool.submit(_run, r, folder, execution) for r in _together(waiting, execution)]
            for future in as_completed(jobs):
                yield from future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            # what they train is in their checkpoints; leaving the pool would wait for its end
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
            raise


def _begin_process(data: Mapping[str, TaskData], parent: int) -> None:
    global _data
    end_with(parent)
    _data = data
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING)


def _together(runs: Sequence[StudyRun], execution: Execution) -> list[list[StudyRun]]:
    """Runs by what trains them at once, in the order of the first of each."""
    groups: dict[str, list[StudyRun]] = {}
    for run in runs:
        shared = pay(run.plan, torch.device(execution.device).type)
        groups.setdefault(run.replicates_key if shared else run.key, []).append(run)
    return list(groups.values())


def _record_path(folder: Path, run: StudyRun) -> Path:
    return folder / "runs" / f"{run.key}.json"


def _run(runs: Sequence[StudyRun], folder: Path, execution: Execution) -> list[dict[str, Any]]:
    """Train runs of one plan to their ends and keep their records."""
    first = runs[0]
    data, plan = _data[first.task], first.plan
    key = first.key if len(runs) == 1 else first.replicates_key
    checkpoint = Checkpoint(
        folder / "checkpoints" / f"{key}.pt", key, every_seconds=_CHECKPOINT_SECONDS
    )
    layer_plans = execution_plans(plan, first.recipe, execution)
    points: dict[int, list[dict[str, Any]]] = {run.seed: [] for run in runs}
    failures: dict[int, str] = {}
    for news in train_replicates(
        plan, first.recipe, data.train, data.validation, list(points), execution, layer_plans,
        checkpoint,
    ):  # fmt: skip
        for seed, found in news.items():
            if isinstance(found, Point):
                kept = asdict(found)
                del kept["window_losses"]
                points[seed].append(kept)
            else:
                failures[seed] = str(found)
    environment = {
        **asdict(execution),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "execution_plans": layer_plans,
        "replicates": len(runs),
    }
    records = []
    for run in runs:
        record = {
            "key": run.key,
            "task": run.recipe.task,
            "task_fingerprint": run.task,
            "recipe": run.recipe.as_dict(),
            "loss_unit": run.recipe.loss_unit,
            "name": run.name,
            "theta": list(plan.design.exponents),
            "design": plan.design.text,
            "width": plan.width,
            "depth": plan.depth,
            "steps": plan.steps,
            "params": plan.params,
            "forward_flops_per_token": plan.forward_flops_per_token,
            "train_flops_per_step": plan.train_flops_per_step,
            "seed": run.seed,
            "points": points[run.seed],
            "failure": failures.get(run.seed),
            "environment": environment,
        }
        _write(_record_path(folder, run), record)
        records.append(record)
    checkpoint.remove()
    return records


def _write(path: Path, record: Mapping[str, Any]) -> None:
    """The file as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(f".{os.getpid()}")
    half.write_text(json.dumps(record, allow_nan=False))
    half.replace(path)
