"""One seeded training run as a stream of points."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from nas.errors import RunFailed
from nas.layers import StructuredLinear, auxiliary_loss, router_statistics
from nas.layers.building import plan_text
from nas.planning.cost import structures_of
from nas.planning.recipe import Recipe
from nas.planning.runs import RunPlan
from nas.tasks.batches import sample_losses, training_batches, validation_set
from nas.tasks.data import Arrays
from nas.training.checkpoint import Checkpoint
from nas.training.metering import CostMeter
from nas.training.models import build_model, build_optimizer

_log = logging.getLogger(__name__)
_EVALUATION_TOKENS = 4096  # positions that are evaluated at once
#: Weight of the auxiliary loss, averaged over gates.  Source: arXiv:2410.02117, section 5.
ROUTER_WEIGHT = 0.01
_LOOK_EVERY = 100  # steps between looks at the training loss on a GPU, each of which waits for it


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
    #: seconds of training, evaluation left out
    seconds: float
    #: loss of each validation sample, in the fixed order of the samples
    window_losses: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Execution:
    """Where and in what precision a run computes."""

    device: str = "cpu"
    #: products in bfloat16 under autocast, weights and optimiser in float32
    bf16: bool = False
    #: forward and backward through torch.compile
    compile: bool = False

    @classmethod
    def on(cls, device: str) -> Execution:
        """What suits the device: bfloat16 and compiled steps on a GPU, plain float32 elsewhere."""
        gpu = device.startswith("cuda")
        return cls(device, bf16=gpu, compile=gpu)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the products."""
        return torch.bfloat16 if self.bf16 else torch.float32

    def autocast(self) -> AbstractContextManager[object]:
        """The context of a forward pass."""
        kind = torch.device(self.device).type
        return torch.autocast(kind, torch.bfloat16) if self.bf16 else nullcontext()


CPU = Execution()


def evaluation_steps(plan: RunPlan, recipe: Recipe) -> list[int]:
    """The steps at which a run is evaluated: spaced by √2, the last one included.

    None comes before the warm-up has ended.  Under a cosine schedule it is the last one alone: an
    earlier point has a learning rate that a run of that length would no longer have.
    """
    if recipe.schedule == "cosine":
        return [plan.steps]
    steps = {round(plan.steps / math.sqrt(2) ** i) for i in range(recipe.evaluations)}
    return sorted(s for s in steps if s >= min(max(1, recipe.warmup_steps), plan.steps))


def execution_plans(plan: RunPlan, recipe: Recipe, execution: Execution = CPU) -> dict[str, str]:
    """The execution plan of each structure of a run, by fingerprint, from the cost model."""
    structures = structures_of(recipe, plan.design, plan.width)
    where = torch.device(execution.device)
    return {
        s.fingerprint: plan_text(s, recipe.tokens_per_step, where, execution.dtype)
        for s in structures
    }


@torch.no_grad()
def _evaluate(
    forward: Callable[[Tensor], Tensor], recipe: Recipe, execution: Execution, x: Tensor, y: Tensor
) -> Tensor:
    """Loss of each validation sample (samples,), float64."""
    piece = max(1, _EVALUATION_TOKENS // recipe.tokens)
    losses = []
    for inputs, targets in zip(torch.split(x, piece), torch.split(y, piece), strict=True):
        with execution.autocast():
            outputs = forward(inputs)
        losses.append(sample_losses(recipe, outputs, targets))
    return torch.cat(losses).double().cpu()


def _begin(
    plan: RunPlan, recipe: Recipe, seed: int, device: str, layer_plans: Mapping[str, str]
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The freshly initialised model with its execution plans, and its optimiser."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(recipe, plan.design, plan.width).to(device)
    for layer in model.modules():
        if isinstance(layer, StructuredLinear):
            layer.plan = layer_plans[layer.structure.fingerprint]
    return model, build_optimizer(model, recipe, plan.width)


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
    """Train `plan` and yield a point at each evaluation; return the statistics of its routers.

    Those are over the last validation samples, see `_routing`; None without mixtures.  The training
    loss of a mixture has its auxiliary loss added; no point has.

    The random streams of initialisation, training batches and validation samples are separate;
    the same plan, seed, execution, thread count and execution plans (`layer_plans`, by default
    those of `execution_plans`) give the same points.

    Parameters
    ----------
    train_data, validation_data
        Arrays of the two splits; see `nas.tasks.data.TaskData`.
    checkpoint
        Where the state of the run is kept while it goes on.  A run that finds its own yields the
        points it had again, and goes on to the same curve as one that was never interrupted.
    meter
        Measures what the steps cost.

    Raises
    ------
    RunFailed
        The loss is no longer finite.
    """
    device = execution.device
    layer_plans = execution_plans(plan, recipe, execution) if layer_plans is None else layer_plans
    model, optimizer = _begin(plan, recipe, seed, device, layer_plans)
    peaks = [group["lr"] for group in optimizer.param_groups]
    saved = checkpoint.load() if checkpoint else None
    if saved is not None:
        try:
            if any("gain_" in name and not t.dim() for name, t in saved["model"].items()):
                raise ValueError("its gains are scalars, as an earlier version had them")
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        except (KeyError, RuntimeError, ValueError) as error:
            _log.warning("a checkpoint does not fit, the run begins anew: %s", error)
            saved = None
            model, optimizer = _begin(plan, recipe, seed, device, layer_plans)
    forward = torch.compile(model) if execution.compile else model
    draw = training_batches(recipe, train_data)
    batches = torch.Generator().manual_seed(seed + (1 << 32))
    x, y = (t.to(device) for t in validation_set(recipe, train_data, validation_data))
    evaluations = set(evaluation_steps(plan, recipe))
    points: list[Point] = []
    done, seconds = 0, 0.0
    if saved is not None:
        batches.set_state(saved["batches"])
        done, seconds = saved["step"], saved["seconds"]
        points = [Point(**p) for p in saved["points"]]
    yield from points
    started = time.perf_counter()
    for step in range(done + 1, plan.steps + 1):
        factor = recipe.learning_rate_factor(step, plan.steps)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        inputs, targets = (t.to(device) for t in draw(batches))
        with meter.step(optimizer) if meter else nullcontext():
            with execution.autocast():
                outputs = forward(inputs)
            loss = sample_losses(recipe, outputs, targets).mean()
            routing = auxiliary_loss(model)
            trained = loss if routing is None else loss + ROUTER_WEIGHT * routing
            optimizer.zero_grad(set_to_none=True)
            trained.backward()  # type: ignore[no-untyped-call]
            if recipe.clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
        looks = device == "cpu" or step % _LOOK_EVERY == 0
        if looks and not math.isfinite(loss.item()):
            raise RunFailed(f"training loss is {loss.item()} at step {step} of {plan.steps}")
        if step in evaluations:
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            seconds += time.perf_counter() - started
            points.append(
                _measured(plan, step, seconds, _evaluate(forward, recipe, execution, x, y))
            )
            yield points[-1]
            started = time.perf_counter()
        if checkpoint and step < plan.steps and checkpoint.is_due:
            seconds += time.perf_counter() - started
            checkpoint.save(
                {
                    "step": step,
                    "seconds": seconds,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "batches": batches.get_state(),
                    "points": [asdict(p) for p in points],
                }
            )
            started = time.perf_counter()
    return _routing(model)


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
) -> Generator[dict[int, Point | RunFailed], None, dict[int, dict[str, Any] | None]]:
    """Train `plan` with several seeds together; at each evaluation yield what is new, by seed.

    That is the next point of a run or, once, why it has failed; a failed run is in no later one.
    Return the statistics of the routers of each run that reached its end, by seed.
    """
    runs = {
        seed: train(plan, recipe, train_data, validation_data, seed, execution, layer_plans)
        for seed in seeds
    }
    ended: dict[int, dict[str, Any] | None] = {}
    while runs:
        found: dict[int, Point | RunFailed] = {}
        for seed, run in list(runs.items()):
            try:
                found[seed] = next(run)
            except StopIteration as end:
                ended[seed] = end.value
                del runs[seed]
            except RunFailed as error:
                found[seed] = error
                del runs[seed]
        if found:
            yield found
    return ended


def _routing(model: nn.Module) -> dict[str, Any] | None:
    """What the routers did with the last batch, over all gates; None without gates."""
    gates = router_statistics(model).values()
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


def _measured(plan: RunPlan, step: int, seconds: float, each: Tensor) -> Point:
    value = each.mean().item()
    if not math.isfinite(value):
        raise RunFailed(f"validation loss is {value} at step {step} of {plan.steps}")
    return Point(
        step=step,
        train_flops=step * plan.train_flops_per_step,
        loss=value,
        loss_stderr=each.std().item() / math.sqrt(len(each)),
        seconds=seconds,
        window_losses=tuple(each.tolist()),
    )
