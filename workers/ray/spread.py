"""One run over several devices of the cluster, as a trial of Tune that starts Ray Train's workers.

The trial itself needs no device: each rank is a worker of Ray Train, with the resources of a trial.
"""

from __future__ import annotations

import json
import logging
import tempfile
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from queue import Empty
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError, get_context
from ray.train.torch import TorchTrainer, get_device
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import distributed

from nas.errors import ClusterUnavailable, RunFailed, one_line
from nas.planning.recipe import Recipe, stored_recipe
from nas.planning.runs import RunPlan
from nas.records.device import processor_name
from nas.records.trial import MeasuredCost
from nas.remote import RemoteFolder
from nas.training.checkpoint import Checkpoint, checkpoint_of
from nas.training.distributed import rank_execution, rank_plans, train_on_rank
from nas.training.metering import CostMeter
from nas.training.run import Evaluations, Execution
from nas.training.weights import Keeping
from workers.ray.cluster import taken, trial_capacity
from workers.ray.trainable import ProcessLost, ProxyTrainable, limit_memory, out_of_memory

_log = logging.getLogger(__name__)
#: What the trial itself reserves, because Tune wants something: a byte, of which every node has
#: enough.
OF_TRIAL = {"memory": 1}
#: Seconds between checks of the ranks while they tell nothing.
_LOOK_SECONDS = 5.0
#: Characters of what is told of lost ranks.
_LONGEST = 250


class SpreadTrainable(ProxyTrainable):
    """Trains the plan in its config over `recipe.ranks` devices; see `ProxyTrainable`."""

    def setup(  # type: ignore[override]  # Tune gives what the runner has named
        self, config: dict[str, Any], *, resources: dict[str, float], **given: Any
    ) -> None:
        """Prepare a process for one trial after another.

        Parameters
        ----------
        resources
            Of each rank.
        given
            As of `ProxyTrainable.setup`; threads and memory are those of each rank.
        """
        self._of_ranks = {
            "data": given["data"],
            "threads": given["threads"],
            "checkpoints": given["checkpoints"],
            "checkpoints_url": given.get("checkpoints_url"),
            "memory": given.get("memory"),
        }
        self._resources = resources
        super().setup(config, **given)

    def _training(self, plan: RunPlan, recipe: Recipe, run: dict[str, Any]) -> Evaluations:
        self._meter = self._told = _Told(self._execution.device)
        (seed,) = run["seeds"]  # runs over several devices are never packed
        config = {**self._of_ranks, "run": json.dumps({**run, "seed": seed})}
        found = yield from spread(recipe.ranks, self._resources, config, self._told)
        self._keeping = self._told.keeping
        return found

    def _environment(self, router: dict[str, Any] | None) -> dict[str, Any]:
        return super()._environment(router) | self._told.environment


class _Told(CostMeter):
    """What the first rank told of the run at its end."""

    environment: dict[str, Any]
    cost: MeasuredCost
    keeping: Keeping | None

    def result(self) -> MeasuredCost:
        return self.cost


def spread(
    ranks: int, resources: dict[str, float], config: dict[str, Any], ended: _Told
) -> Evaluations:
    """Train one run with Ray Train; yield and return as `nas.training.run.train_replicates`.

    Parameters
    ----------
    resources
        Of each rank; with a GPU, ranks talk through NCCL, else through gloo.
    config
        ``data`` (owner, see `workers.ray.cluster.Shared`), ``threads``, ``checkpoints`` (folder on
        each node), ``checkpoints_url`` (where they are copied to, if so), ``memory`` (bytes or
        None), and ``run``, JSON of the plan, recipe, seed and key.
    ended
        Set to where the run was trained and what its steps cost.

    Raises
    ------
    ProcessLost
        A rank has died or has no memory left, or the cluster cannot hold so many.
    RunFailed
        A rank had an error of the run's own.
    """
    _check_room(resources, ranks)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    channel = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    with tempfile.TemporaryDirectory(prefix="einsum-nas-train-") as folder:
        trainer = TorchTrainer(
            _rank,
            train_loop_config={**config, "channel": channel},
            scaling_config=ScalingConfig(
                num_workers=ranks, use_gpu="GPU" in resources, resources_per_worker=resources
            ),
            run_config=RunConfig(
                name=uuid.uuid4().hex,
                storage_path=folder,
                # it is our runner that starts a trial anew
                failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),
            ),
        )
        try:
            return (yield from _relayed(channel, _beside(trainer.fit), resources, ranks, ended))
        except RayError as error:
            raise ProcessLost(one_line(error)[:_LONGEST]) from error
        finally:
            # ranks that still train end when they tell their next point
            channel.shutdown(force=True)


def _relayed(
    channel: Queue, fitted: Future[Any], resources: dict[str, float], ranks: int, ended: _Told
) -> Evaluations:
    """What the ranks tell, until the last of it."""
    begun = False
    while True:
        over = fitted.done()
        try:
            told = channel.get(timeout=_LOOK_SECONDS)
        except Empty:
            if over:
                raise ProcessLost(_why(fitted.exception())) from fitted.exception()
            if not begun:
                _check_room(resources, ranks)
            continue
        begun = True
        match told:
            case {"points": found}:
                yield found
            case {"routers": routers, "environment": environment, "cost": cost, "kept": kept}:
                ended.environment, ended.cost, ended.keeping = environment, cost, kept
                fitted.exception()  # waits until what the ranks held is free for the next trial
                return dict(routers)
            case {"error": error}:
                fitted.exception()
                raise RunFailed(error)


def _check_room(resources: dict[str, float], ranks: int) -> None:
    """Raise `ProcessLost` if the cluster can never hold the ranks, for Ray would wait for ever."""
    try:
        trial_capacity(resources, ranks)
    except ClusterUnavailable as error:
        raise ProcessLost(str(error)) from error


def _beside(call: Callable[[], Any]) -> Future[Any]:
    """Call in a thread that does not hold up the end of the process."""
    done = Future[Any]()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="ranks", daemon=True).start()
    return done


def _why(error: BaseException | None) -> str:
    """Why ranks ended, in a line; what tells of memory comes first."""
    if not isinstance(error, WorkerGroupError):
        return one_line(error)[:_LONGEST] if error else "the ranks ended without a result"
    lines = [
        f"rank {rank}: {str(failure).strip().splitlines()[-1][:_LONGEST]}"
        for rank, failure in sorted(error.worker_failures.items())
    ]
    return "; ".join(sorted(lines, key=lambda line: "memory" not in line.lower()))


def _rank(config: dict[str, Any]) -> None:
    """What each worker of Ray Train does: take part in the run, and as the first tell of it."""
    run = json.loads(config["run"])
    plan, recipe = RunPlan.from_dict(run["plan"]), stored_recipe(run["recipe"])
    device = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(config["threads"])
    train_data, validation_data = taken(config["data"])
    limit_memory(config["memory"])
    execution = rank_execution(Execution.on(device.type))
    plans = rank_plans(plan, recipe, execution)
    checkpoint = _checkpoint_of(run["key"], config, execution, plans)
    first = get_context().get_world_rank() == 0
    tell = partial(config["channel"].put)
    meter = CostMeter(execution.device) if first else None
    keep = run.get("keep")
    keeping = None if keep is None else Keeping(**keep)
    points = train_on_rank(
        plan, recipe, train_data, validation_data, run["seed"], execution, checkpoint, meter,
        run.get("until"), keeping,
    )  # fmt: skip
    try:
        while True:
            found = next(points)
            if first:
                tell({"points": found})
    except StopIteration as end:
        if first and meter is not None:
            if run.get("until") is None:
                checkpoint.remove()
            else:
                checkpoint.flush()
            environment = {
                "ranks": recipe.ranks,
                "sharding": recipe.sharding,
                **asdict(execution),
                "device_name": (
                    torch.cuda.get_device_name() if device.type == "cuda" else processor_name()
                ),
                "threads": config["threads"],
                "execution_plans": plans,
                "torch": torch.__version__,
            }
            cost = meter.result()
            tell({"routers": end.value, "environment": environment, "cost": cost, "kept": keeping})
    except Exception as error:
        if not (out_of_memory(error) or _of_the_group(error)):
            checkpoint.remove()
            _log.exception("the run failed")
            tell({"error": f"{type(error).__name__}: {error}"})
        raise  # so that Ray Train ends the other ranks, which may wait for this one


def _of_the_group(error: Exception) -> bool:
    """Whether an error tells of other ranks only."""
    if isinstance(error, distributed.DistError | RayError):
        return True
    # gloo has no class of its own
    signs = ("gloo", "connection closed by peer", "connection reset by peer")
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)


def _checkpoint_of(
    run_key: str, config: dict[str, Any], execution: Execution, plans: dict[str, str]
) -> Checkpoint:
    """The key of the run has its ranks."""
    versions = [version("einsum-nas"), torch.__version__]
    how = ["ranks", asdict(execution), config["threads"], plans, versions]
    url = config.get("checkpoints_url")
    remote = None if url is None else RemoteFolder(url)
    return checkpoint_of(Path(config["checkpoints"]), run_key, how, remote)
