"""Seeded training runs of a plan as streams of points."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nas.errors import RunFailed
from nas.planning.recipe import Recipe
from nas.planning.runs import RunPlan, evaluation_steps
from nas.tasks.data import Arrays
from nas.training.checkpoint import Checkpoint
from nas.training.engine import CPU, Engine, Execution, execution_plans
from nas.training.metering import CostMeter, Optimized
from nas.training.tasks import task_of
from nas.training.weights import Keeping

__all__ = [
    "CPU",
    "Execution",
    "Point",
    "evaluation_steps",
    "execution_plans",
    "train",
    "train_replicates",
]

_log = logging.getLogger(__name__)
#: Steps between looks at the training loss on a GPU, each of which waits for it.
LOOK_EVERY = 100


@dataclass(frozen=True, slots=True)
class Point:
    """One evaluation of a run."""

    #: optimiser steps taken
    step: int
    #: exact training FLOPs spent
    train_flops: int
    #: mean validation loss in the recipe's unit, over the fixed validation samples
    loss: float
    #: standard error of `loss` over the samples: the error of sampling the data, not of the run
    loss_stderr: float
    #: seconds of training, evaluation left out; of runs that train together, the share of one
    seconds: float
    #: loss of each validation sample, in the fixed order of the samples
    window_losses: tuple[float, ...]


def train(
    plan: RunPlan,
    recipe: Recipe,
    train_data: Arrays,
    validation_data: Arrays,
    seed: int,
    execution: Execution = CPU,
    layer_plans: Mapping[str, str] | None = None,
    checkpoint: Checkpoint | None = None,
    meter: CostMeter | None = None,
) -> Generator[Point, None, dict[str, Any] | None]:
    """Train `plan` with one seed and yield a point at each evaluation.

    As `train_replicates`; returns the statistics of the run's routers.

    Raises
    ------
    RunFailed
        The loss is no longer finite.
    """
    several = train_replicates(
        plan, recipe, train_data, validation_data, (seed,), execution, layer_plans, checkpoint,
        meter,
    )  # fmt: skip
    return (yield from alone(several, seed))


#: What runs give that train together, see `train_replicates`.
Evaluations = Generator[dict[int, Point | RunFailed], None, dict[int, dict[str, Any] | None]]


def alone(several: Evaluations, seed: int) -> Generator[Point, None, dict[str, Any] | None]:
    """The points of the one run of `several`, and its statistics; its failure is raised."""
    while True:
        try:
            found = next(several)[seed]
        except StopIteration as end:
            routers: dict[str, Any] | None = end.value[seed]
            return routers
        if isinstance(found, RunFailed):
            raise found
        yield found


def train_replicates(
    plan: RunPlan,
    recipe: Recipe,
    train_data: Arrays,
    validation_data: Arrays,
    seeds: Sequence[int],
    execution: Execution = CPU,
    layer_plans: Mapping[str, str] | None = None,
    checkpoint: Checkpoint | None = None,
    meter: CostMeter | None = None,
    until: int | None = None,
    keeping: Keeping | None = None,
) -> Evaluations:
    """Train `plan` with several seeds together; at each evaluation yield what is new, by seed.

    That is the next point of a run or, once, why it has failed; a failed run is in no later one,
    and changes no other.  Return the statistics of the routers of each run that reached its end,
    over the last validation samples, see `_routing`; None without mixtures.  The training loss of a
    mixture has its auxiliary loss added; no point has.

    The random streams of initialisation, training batches and validation samples are separate; the
    same plan, seeds, execution, thread count and execution plans (`layer_plans`, by default those
    of `execution_plans`) give the same points, and those of a seed alone to rounding.

    Parameters
    ----------
    train_data, validation_data
        Arrays of the two splits; see `nas.tasks.data.TaskData`.
    checkpoint
        Where the state of the runs is kept while they go on.  Runs that find their own yield the
        points they had again, and go on to the same curves as ones that were never interrupted;
        so do some of the runs of a checkpoint.
    meter
        Measures what the steps cost.
    until
        The last step that is trained, one at which the runs are evaluated; their state is then in
        the checkpoint, from which they go on.  By default all steps are.
    keeping
        Given the weights of the runs that reach their last step, as far as it wants them.

    Raises
    ------
    ValueError
        `until` is no step of an evaluation.
    """
    if layer_plans is None:
        layer_plans = execution_plans(plan, recipe, execution)
    engine = partial(Engine, plan, recipe, seeds, execution, layer_plans)
    return train_with(
        engine, plan, recipe, train_data, validation_data, seeds, execution, checkpoint, meter,
        until, keeping,
    )  # fmt: skip


class Trainer(Protocol):
    """What takes the steps of runs; see `nas.training.engine.Engine`."""

    @property
    def optimizer(self) -> Optimized: ...

    def set_rate(self, factor: float) -> None: ...

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor: ...

    def evaluate(self, x: Tensor, y: Tensor) -> Tensor: ...

    def routers(self) -> list[list[dict[str, Any]]]: ...

    def model_of(self, run: int) -> nn.Module | None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, saved: Mapping[str, Any], runs: Sequence[int]) -> None: ...


def train_with(
    begin: Callable[[], Trainer],
    plan: RunPlan,
    recipe: Recipe,
    train_data: Arrays,
    validation_data: Arrays,
    seeds: Sequence[int],
    execution: Execution,
    checkpoint: Checkpoint | None = None,
    meter: CostMeter | None = None,
    until: int | None = None,
    keeping: Keeping | None = None,
) -> Evaluations:
    """As `train_replicates`, by what `begin` gives."""
    evaluations = set(evaluation_steps(plan, recipe))
    last = plan.steps if until is None else until
    if last not in evaluations:
        raise ValueError(f"until: got {until}; accepted: one of {sorted(evaluations)}")
    engine = begin()
    state = _State.begin(seeds)
    saved = checkpoint.load() if checkpoint else None
    if saved is not None:
        try:
            state = _State.resumed(saved, seeds)
            engine.load_state_dict(saved, [saved["seeds"].index(s) for s in seeds])
        except (KeyError, TypeError, ValueError) as error:
            _log.warning("a checkpoint does not fit, the runs begin anew: %r", error)
            engine = begin()
            state = _State.begin(seeds)
    device = torch.device(execution.device)
    task = task_of(recipe)
    draw = task.batches(recipe, train_data, None if device.type == "cpu" else device)
    x, y = (t.to(device) for t in task.validation(recipe, train_data, validation_data))
    yield from state.past(last)
    if state.step >= last:  # its checkpoint is as far, or farther
        return dict.fromkeys(state.alive)
    started = time.perf_counter()
    for step in range(state.step + 1, last + 1):
        if not state.alive:
            return {}
        engine.set_rate(recipe.learning_rate_factor(step, plan.steps))
        batches = [draw(generator) for generator in state.batches]
        inputs, targets = (torch.stack(part) for part in zip(*batches, strict=True))
        with meter.step(engine.optimizer, len(seeds)) if meter else nullcontext():
            losses = engine.step(inputs, targets)
        news: dict[int, Point | RunFailed] = {}
        if device.type == "cpu" or step % LOOK_EVERY == 0:
            told = f"at step {step} of {plan.steps}"
            news |= state.fail(losses.tolist(), f"training loss is %s {told}")
        if step in evaluations:
            if device.type == "cuda":
                torch.cuda.synchronize()
            state.seconds += (time.perf_counter() - started) / len(seeds)
            news |= state.add(plan, step, engine.evaluate(x, y))
            started = time.perf_counter()
        if news:
            yield news
        state.step = step
        if checkpoint and step < plan.steps and (step == last or checkpoint.is_due):
            state.seconds += (time.perf_counter() - started) / len(seeds)
            checkpoint.save({**state.as_dict(), **engine.state_dict()})
            started = time.perf_counter()
    if keeping is not None and last == plan.steps:
        for i, seed in enumerate(seeds):
            if seed in state.alive and keeping.wants(loss := state.points[seed][-1].loss):
                keeping.take(seed, loss, engine.model_of(i))
    gates = engine.routers()
    return {seed: _routing(gates[i]) for i, seed in enumerate(seeds) if seed in state.alive}


@dataclass
class _State:
    """Where runs stand, besides their parameters."""

    seeds: list[int]
    #: seeds of runs that have not failed
    alive: set[int]
    batches: list[torch.Generator]
    points: dict[int, list[Point]]
    failures: dict[int, str]
    step: int = 0
    #: seconds of training so far, the share of one run
    seconds: float = 0.0

    @classmethod
    def begin(cls, seeds: Sequence[int]) -> _State:
        batches = [torch.Generator().manual_seed(seed + (1 << 32)) for seed in seeds]
        return cls(list(seeds), set(seeds), batches, {seed: [] for seed in seeds}, {})

    @classmethod
    def resumed(cls, saved: Mapping[str, Any], seeds: Sequence[int]) -> _State:
        """The given runs of a saved state; ValueError if it lacks one."""
        state = cls.begin(seeds)
        for seed, generator in zip(seeds, state.batches, strict=True):
            i = saved["seeds"].index(seed)
            generator.set_state(saved["batches"][i])
            state.points[seed] = [Point(**p) for p in saved["points"][i]]
            if saved["failures"][i] is not None:
                state.failures[seed] = saved["failures"][i]
        state.alive -= state.failures.keys()
        state.step, state.seconds = saved["step"], saved["seconds"]
        return state

    def as_dict(self) -> dict[str, Any]:
        return {
            "seeds": self.seeds,
            "step": self.step,
            "seconds": self.seconds,
            "batches": [generator.get_state() for generator in self.batches],
            "points": [[asdict(p) for p in self.points[seed]] for seed in self.seeds],
            "failures": [self.failures.get(seed) for seed in self.seeds],
        }

    def past(self, last: int) -> Generator[dict[int, Point | RunFailed], None, None]:
        """What the runs had yielded when they were saved, up to step `last`."""
        steps = {p.step for points in self.points.values() for p in points}
        for step in sorted(s for s in steps if s <= last):
            yield {s: p for s in self.seeds for p in self.points[s] if p.step == step}
        if self.failures:
            yield {seed: RunFailed(why) for seed, why in self.failures.items()}

    def fail(self, losses: Sequence[float], why: str) -> dict[int, Point | RunFailed]:
        """End the runs whose loss is not finite."""
        found: dict[int, Point | RunFailed] = {}
        for seed, loss in zip(self.seeds, losses, strict=True):
            if seed in self.alive and not math.isfinite(loss):
                self.failures[seed] = why % loss
                self.alive.remove(seed)
                found[seed] = RunFailed(self.failures[seed])
        return found

    def add(self, plan: RunPlan, step: int, each: Tensor) -> dict[int, Point | RunFailed]:
        """The points of an evaluation, from the loss of each sample (R, samples)."""
        found = self.fail(
            each.mean(1).tolist(), f"validation loss is %s at step {step} of {plan.steps}"
        )
        for seed, own in zip(self.seeds, each, strict=True):
            if seed not in self.alive:
                continue
            point = Point(
                step=step,
                train_flops=step * plan.train_flops_per_step,
                loss=own.mean().item(),
                loss_stderr=own.std().item() / math.sqrt(len(own)),
                seconds=self.seconds,
                window_losses=tuple(own.tolist()),
            )
            self.points[seed].append(point)
            found[seed] = point
        return found


def _routing(gates: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What the routers did with the last batch, over all gates; None without gates."""
    if not gates:
        return None
    return {
        "gates": len(gates),
        "dropped": sum(g["dropped"] for g in gates),
        "assignments": sum(g["assignments"] for g in gates),
        # largest load of an expert over a balanced one
        "max_load": max(g["max_load"] for g in gates),
        "mean_max_load": fmean(g["max_load"] for g in gates),
        # nats; log(experts) where every expert is used alike
        "load_entropy": fmean(g["load_entropy"] for g in gates),
        "gate_entropy": fmean(g["gate_entropy"] for g in gates),
    }
