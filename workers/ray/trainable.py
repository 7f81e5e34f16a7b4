"""The Ray Tune trainable: the runs of a pack, one evaluation a step, in a reused actor."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import resource
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.exceptions import RayError

from nas import tracing
from nas.errors import InvalidInput, RunFailed, one_line
from nas.layers.kernels.machine import machine_rates
from nas.planning.recipe import Recipe, stored_recipe
from nas.planning.runs import RunPlan
from nas.rates import current_rates
from nas.records.device import processor_name
from nas.remote import RemoteFolder
from nas.tasks.data import Arrays
from nas.training.checkpoint import Checkpoint, checkpoint_of
from nas.training.metering import CostMeter
from nas.training.run import Evaluations, Execution, Point, execution_plans, train_replicates
from nas.training.weights import Keeping
from workers.ray.cluster import handed, leave, taken
from workers.traces import OpenSpans

_log = logging.getLogger(__name__)


class ProcessLost(Exception):
    """What only fresh processes may cure; see `workers.ray.spread`."""


class ProxyTrainable(tune.Trainable):
    """Trains the plan in its config with every seed there, to its end or to a step at which the
    runs pause; reports the points of each evaluation, then where the runs were trained and what
    their steps cost.

    What it reports is under the one key `report` as JSON text, because Tune flattens nested
    results: {"begun": …}; at each evaluation {"runs": {seed: {"point": …} or {"failure": …}}}, of
    which the latter is the run's own error; at last {"ended": {"environments": {seed: …},
    "cost": …, "resumed_at": step of the checkpoint or None,
    "weights": {seed: {"key": …} or {"left": …}}}}, or {"failure": …} of all runs.
    Several of these that follow one another soon are {"batch": [...]}.  Only what a fresh process
    may cure (memory) is raised, so that Ray starts the trial anew.

    Where the config names a `next` run, the actor then asks for that, which takes Tune a tenth of a
    second, and goes on with it as the same trial of Tune; an empty one ends the trial.
    """

    _evaluations: Evaluations
    #: whether its runs have ended, and the name of the next
    _over: bool
    _next: str | None
    #: reports that follow one another sooner are sent together
    _report_seconds = 0.0
    _owner: Any = None
    #: execution plan of each structure, by fingerprint; stored with the trial
    _plans: dict[str, str]
    #: of the runs, by seed
    _spans: OpenSpans[int]

    def setup(
        self,
        config: dict[str, Any],
        *,
        data: Any,
        threads: int,
        checkpoints: str,
        rates: str,
        memory: int | None = None,
        report_seconds: float = 0.0,
        checkpoints_url: str | None = None,
    ) -> None:
        """Prepare a process for one trial after another.

        Parameters
        ----------
        data
            Owner of training and validation data; see `workers.ray.cluster.Shared`.
        checkpoints
            Folder of the runs' own checkpoints, on the node.
        rates
            Home of the rates of machines; see `nas.rates`.
        memory
            Bytes that a trial may add to the process; None for any number.
        report_seconds
            Evaluations that follow one another sooner are reported together.
        checkpoints_url
            Where checkpoints are copied to, for other nodes; see `nas.remote`.
        """
        self._owner, self._report_seconds = data, report_seconds
        self._data: tuple[Arrays, Arrays] = tuple(taken(data))
        self._threads, self._checkpoints = threads, Path(checkpoints)
        self._memory = memory
        self._remote = None if checkpoints_url is None else RemoteFolder(checkpoints_url)
        torch.set_num_threads(threads)
        gpu = ray.get_gpu_ids() and torch.cuda.is_available()
        self._execution = Execution.on("cuda" if gpu else "cpu")
        if not gpu:
            machine_rates(Path(rates), threads)
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._begin(new_config)
        return True

    def _begin(self, config: Mapping[str, Any]) -> None:
        self._begin_run(json.loads(config["run"]))

    def _begin_run(self, run: dict[str, Any]) -> None:
        self._over, self._next = not run, run.get("next")
        self._begin_spans(run.get("traces", {}))
        self._waiting = [] if self._over else [{"begun": f"{socket.gethostname()}:{os.getpid()}"}]
        #: of all runs, known before they begin
        self._failure: dict[str, Any] | None = run.get("failure")
        if self._over:
            return
        #: after so many the process ends, whatever it is doing
        self._seconds: float = run["seconds"]
        self._start_clock()
        limit_memory(self._memory)
        try:
            self._prepare(run)
        except InvalidInput as error:  # such as a plug-in that is another one here
            self._failure = {"reason": one_line(error), "kind": "run"}

    def _begin_spans(self, traces: Mapping[str, str]) -> None:
        """Spans of the runs within those of their trials, if this process has a collector, too."""
        self._spans = OpenSpans()
        if not traces:
            return
        tracing.start()
        about = {"einsum_nas.device": self._execution.device, "einsum_nas.threads": self._threads}
        for seed, parent in traces.items():
            self._spans.begin(int(seed), "train", {**about, "einsum_nas.seed": int(seed)}, parent)

    def _prepare(self, run: dict[str, Any]) -> None:
        plan = RunPlan.from_dict(run["plan"])
        recipe = stored_recipe(run["recipe"])
        self._seeds: list[int] = run["seeds"]
        self._pauses = run.get("until") is not None
        self._execution = Execution.on(self._execution.device, plan.train_flops)
        self._plans = execution_plans(plan, recipe, self._execution)
        self._checkpoint = self._checkpoint_of(run["key"])
        self._meter = CostMeter(self._execution.device)
        keep = run.get("keep")
        self._keeping = None if keep is None else Keeping(**keep)
        #: under which the weights of each run are left for the driver
        self._weights_key: str = run["key"]
        self._evaluations = self._training(plan, recipe, run)

    def _training(self, plan: RunPlan, recipe: Recipe, run: dict[str, Any]) -> Evaluations:
        return train_replicates(
            plan, recipe, *self._data, self._seeds, self._execution, self._plans,
            self._checkpoint, self._meter, run.get("until"), self._keeping,
        )  # fmt: skip

    def _checkpoint_of(self, run_key: str) -> Checkpoint:
        versions = [version("einsum-nas"), torch.__version__]
        how = [asdict(self._execution), self._threads, self._plans, versions]
        return checkpoint_of(self._checkpoints, run_key, how, self._remote)

    def step(self) -> dict[str, Any]:
        if self._over and self._next is not None:
            self._begin_run(json.loads(handed(self._owner, self._next)))
        if self._over:
            return _report([{}], done=True)
        if self._waiting:
            self._start_clock()  # anew, for the driver's begins with what is told now
            return _report([self._waiting.pop()], done=False)
        parts, started = [self._advance()], time.monotonic()
        while "runs" in parts[-1] and time.monotonic() - started < self._report_seconds:
            parts.append(self._advance())
        self._over = "runs" not in parts[-1]
        if self._over:
            faulthandler.cancel_dump_traceback_later()
        return _report(parts, done=self._over and self._next is None)

    def _start_clock(self) -> None:
        """End this process after the time of an attempt.

        By a thread of the interpreter's own, which no endless loop can hold up; it says on stderr
        where the process stood.
        """
        faulthandler.dump_traceback_later(self._seconds, exit=True)

    def cleanup(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._spans.end_all()
        tracing.stop()

    def _advance(self) -> dict[str, Any]:
        """The next evaluation, or the end of the runs."""
        if self._failure is not None:
            self._spans.end_all(self._failure["kind"])
            return {"failure": self._failure}
        try:
            found = next(self._evaluations)
        except StopIteration as end:
            if self._pauses:
                self._checkpoint.flush()
            else:
                self._checkpoint.remove()
            environments = {seed: self._environment(router) for seed, router in end.value.items()}
            weights = {} if self._keeping is None else self._leave(self._keeping)
            cost = asdict(self._meter.result())
            self._spans.end_all()
            resumed_at = self._checkpoint.resumed_at
            ended = {"environments": environments, "cost": cost, "weights": weights}
            return {"ended": {**ended, "resumed_at": resumed_at}}
        except Exception as error:
            fresh = out_of_memory(error) or isinstance(error, ProcessLost)
            self._spans.end_all("memory" if out_of_memory(error) else type(error).__name__)
            if fresh:
                raise
            self._checkpoint.remove()
            _log.exception("the run failed")
            return {"failure": {"reason": f"{type(error).__name__}: {error}", "kind": "run"}}
        for seed, each in found.items():
            if isinstance(each, RunFailed):
                self._spans.end(seed, failure="run")
            else:
                self._spans.event(seed, "evaluation", {"einsum_nas.step": each.step})
        return {"runs": {seed: _told(each) for seed, each in found.items()}}

    def _leave(self, keeping: Keeping) -> dict[int, dict[str, str]]:
        """Leave the kept weights for the driver; under which key, or why they are not kept."""
        told = {seed: {"left": why} for seed, why in keeping.left.items()}
        for seed, file in keeping.found.items():
            key = f"{self._weights_key}/{seed}"
            try:
                leave(self._owner, key, file)
                told[seed] = {"key": key}
            except RayError as error:
                told[seed] = {"left": one_line(error)}
        keeping.found.clear()
        return told

    def _environment(self, router: dict[str, Any] | None) -> dict[str, Any]:
        cuda = self._execution.device == "cuda"
        return {
            # runs that were trained together, this one included
            "replicates": len(self._seeds),
            **({"router": router} if router else {}),
            **asdict(self._execution),
            "device_name": torch.cuda.get_device_name() if cuda else processor_name(),
            "threads": self._threads,
            "execution_plans": self._plans,
            # by which these plans were chosen, seconds a unit of work; see `nas.rates`
            "rates": None if cuda else current_rates().as_dict(),
            "torch": torch.__version__,
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: a run keeps its own state, see `nas.training.checkpoint`."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing; see `save_checkpoint`."""


def out_of_memory(error: Exception) -> bool:
    """Whether an error is one of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # torch's allocator for the CPU raises a plain RuntimeError
    signs = ("not enough memory", "can't allocate memory")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def limit_memory(allowance: int | None) -> None:
    """Let this process take so many bytes more than it has now; None lifts the limit.

    Counted is what it allocates on the host (RLIMIT_DATA): not shared memory, where Ray keeps the
    data, and not the memory of a GPU.
    """
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    soft = most
    if allowance is not None:
        status = Path("/proc/self/status").read_text()
        held = int(status.split("VmData:")[1].split()[0]) * 1024
        soft = held + allowance if most == resource.RLIM_INFINITY else min(held + allowance, most)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, most))


def _told(each: Point | RunFailed) -> dict[str, Any]:
    return {"failure": str(each)} if isinstance(each, RunFailed) else {"point": asdict(each)}


def _report(parts: list[dict[str, Any]], *, done: bool) -> dict[str, Any]:
    content = parts[0] if len(parts) == 1 else {"batch": parts}
    return {"report": json.dumps(content, allow_nan=False), "done": done}
