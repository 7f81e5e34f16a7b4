"""One seeded training run as a stream of points."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from nas.cost import RunPlan, structures_of
from nas.errors import RunFailed
from nas.layers import EinsumLinear
from nas.layers.plan import choose
from nas.models.gpt import GPT
from nas.recipe import GptRecipe

_VALIDATION_SEED = 20241002  # the same validation windows for every run of a task
_EVALUATION_BATCH = 32  # sequences


@dataclass(frozen=True, slots=True)
class Point:
    """One evaluation of a run."""

    #: optimiser steps taken
    step: int
    #: exact training FLOPs spent
    train_flops: int
    #: mean validation loss, nats per token, over the fixed validation windows
    loss: float
    #: standard error of `loss` over the windows: the error of sampling the text, not of the run
    loss_stderr: float
    #: seconds of training, evaluation left out
    seconds: float
    #: loss of each validation window, nats per token, in the fixed order of the windows
    window_losses: tuple[float, ...]


def evaluation_steps(plan: RunPlan, recipe: GptRecipe) -> list[int]:
    """The steps at which a run is evaluated: spaced by √2, the last one included.

    None comes before the warm-up has ended.
    """
    steps = {round(plan.steps / math.sqrt(2) ** i) for i in range(recipe.evaluations)}
    return sorted(s for s in steps if s >= min(recipe.warmup_steps, plan.steps))


def execution_plans(plan: RunPlan, recipe: GptRecipe, device: str = "cpu") -> dict[str, str]:
    """The execution plan of each structure of a run, by fingerprint, from the cost model."""
    tokens = recipe.batch * recipe.context
    structures = structures_of(recipe, plan.theta, plan.width)
    where = torch.device(device)
    return {s.fingerprint: str(choose(s, tokens, where, torch.float32)) for s in structures}


def _random_windows(
    text: NDArray[np.uint8], count: int, context: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Windows anywhere in the text, for training."""
    return _windows(
        text, torch.randint(len(text) - context, (count,), generator=generator), context
    )


def _validation_windows(text: NDArray[np.uint8], recipe: GptRecipe) -> tuple[Tensor, Tensor]:
    """The fixed validation windows: distinct and without overlap, so that each counts once."""
    generator = torch.Generator().manual_seed(_VALIDATION_SEED)
    places = torch.randperm(len(text) // (recipe.context + 1), generator=generator)
    starts = places[: recipe.validation_sequences] * (recipe.context + 1)
    return _windows(text, starts, recipe.context)


def _windows(text: NDArray[np.uint8], starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Windows and the same shifted by one: two int64 tensors (windows, context)."""
    index = starts.numpy()[:, None] + np.arange(context + 1)
    windows = torch.from_numpy(text[index].astype(np.int64))
    return windows[:, :-1], windows[:, 1:]


@torch.no_grad()
def _evaluate(model: GPT, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean loss of each window (windows,), nats per token."""
    losses = []
    pieces = (torch.split(part, _EVALUATION_BATCH) for part in (inputs, targets))
    for x, y in zip(*pieces, strict=True):
        logits = model(x)
        per_token = functional.cross_entropy(logits.float().transpose(1, 2), y, reduction="none")
        losses.append(per_token.mean(dim=1))
    return torch.cat(losses).double().cpu()


def train(
    plan: RunPlan,
    recipe: GptRecipe,
    train_text: NDArray[np.uint8],
    validation_text: NDArray[np.uint8],
    seed: int,
    device: str = "cpu",
    layer_plans: Mapping[str, str] | None = None,
) -> Iterator[Point]:
    """Train `plan` and yield a point at each evaluation.

    The random streams of initialisation, training batches and validation windows are separate;
    the same plan, seed, device, thread count and execution plans (`layer_plans`, by default those
    of `execution_plans`) give the same points.

    Raises
    ------
    RunFailed
        The loss is no longer finite.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT(recipe, plan.theta, plan.width).to(device)
    layer_plans = execution_plans(plan, recipe, device) if layer_plans is None else layer_plans
    for layer in model.modules():
        if isinstance(layer, EinsumLinear):
            layer.plan = layer_plans[layer.structure.fingerprint]
    optimizer = model.optimizer()
    peak_rates = [group["lr"] for group in optimizer.param_groups]
    batches = torch.Generator().manual_seed(seed + (1 << 32))
    inputs, targets = (part.to(device) for part in _validation_windows(validation_text, recipe))
    evaluations = set(evaluation_steps(plan, recipe))
    seconds, started = 0.0, time.perf_counter()
    for step in range(1, plan.steps + 1):
        for group, peak in zip(optimizer.param_groups, peak_rates, strict=True):
            group["lr"] = peak * min(1.0, step / recipe.warmup_steps)
        x, y = _random_windows(train_text, recipe.batch, recipe.context, batches)
        logits = model(x.to(device))
        loss = functional.cross_entropy(logits.float().flatten(0, 1), y.to(device).flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        if step in evaluations:
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            seconds += time.perf_counter() - started
            each = _evaluate(model, inputs, targets)
            value = each.mean().item()
            if not math.isfinite(value):
                raise RunFailed(f"validation loss is {value} at step {step} of {plan.steps}")
            yield Point(
                step=step,
                train_flops=step * plan.train_flops_per_step,
                loss=value,
                loss_stderr=each.std().item() / math.sqrt(len(each)),
                seconds=seconds,
                window_losses=tuple(each.tolist()),
            )
            started = time.perf_counter()
