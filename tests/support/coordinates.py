"""How far a few steps of training move the features of a model, as it widens and deepens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from nas.designs.design import Design, parse_design
from nas.layers import StructuredLinear
from nas.planning.recipe import REGRESSION, Recipe
from nas.planning.runs import plan_of_steps
from nas.tasks import load_data
from nas.tasks.batches import sample_losses, training_batches, validation_set
from nas.training.engine import CPU, Engine, execution_plans
from nas.training.tasks import build_model

#: Updates are compared once features are learned: at the first steps those of a layer of low rank
#: are still small, for a random factor passes on only d^ρ of d directions.
STEPS = 30


RECIPE = replace(REGRESSION, pool=4096, batch=64, validation_samples=256, warmup_steps=0, clip=0.0)


def feature_updates(
    recipe: Recipe,
    structure: str,
    width: int,
    *,
    aware: bool = True,
    seed: int = 0,
) -> tuple[float, ...]:
    """RMS change, after `STEPS` steps, of the output of each structured layer of the last block.

    Parameters
    ----------
    aware
        Whether the recipe's optimiser trains the model at the rates of the product; else AdamW
        does, and every factor gets the rate of a dense layer of the same dimensions,
        lr · d_in_base / d_in.
    """
    data = load_data(recipe)
    draw = training_batches(recipe, data.train)
    probe, _ = validation_set(recipe, data.train, data.validation)
    batches = torch.Generator().manual_seed(seed)
    trained = _Aware if aware else _Blind
    model = trained(recipe, parse_design(structure), width, seed)
    before = _features(model.of(), probe)
    for _ in range(STEPS):
        model.step(*draw(batches))
    after = _features(model.of(), probe)
    return tuple((b - a).pow(2).mean().sqrt().item() for a, b in zip(before, after, strict=True))


class _Aware:
    """A model trained as the product trains it."""

    def __init__(self, recipe: Recipe, design: Design, width: int, seed: int) -> None:
        plan = plan_of_steps(recipe, design, width, STEPS)
        self._engine = Engine(plan, recipe, (seed,), CPU, execution_plans(plan, recipe))

    def of(self) -> nn.Module:
        return self._engine.model_of(0)

    def step(self, x: Tensor, y: Tensor) -> None:
        self._engine.step(x[None], y[None])


class _Blind:
    """A model whose factors all have the rate of a dense layer."""

    def __init__(self, recipe: Recipe, design: Design, width: int, seed: int) -> None:
        torch.manual_seed(seed)
        self._recipe, self._model = recipe, build_model(recipe, design, width)
        self._optimizer = _blind(self._model, recipe)

    def of(self) -> nn.Module:
        return self._model

    def step(self, x: Tensor, y: Tensor) -> None:
        self._optimizer.zero_grad()
        torch.autograd.backward(sample_losses(self._recipe, self._model(x), y).mean())
        self._optimizer.step()


def _blind(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW with the rates of dense layers for all factors."""
    head = model.get_parameter("head.weight")
    rates = {head: recipe.base_width / head.shape[1]}
    for layer in model.modules():
        if isinstance(layer, StructuredLinear):
            rates |= dict.fromkeys(layer.factors().values(), layer.d_in_base / layer.in_features)
    groups = [{"params": [p], "lr": recipe.lr * rates.get(p, 1.0)} for p in model.parameters()]
    return torch.optim.AdamW(groups, betas=(recipe.beta1, recipe.beta2), weight_decay=0.0)


@torch.no_grad()
def _features(model: nn.Module, x: Tensor) -> list[Tensor]:
    kept: list[Tensor] = []
    last = list(model.get_submodule("blocks").children())[-1]
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: kept.append(out.clone()))
        for layer in last.modules()
        if isinstance(layer, StructuredLinear)
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return kept


def spread(updates: Iterable[tuple[float, ...]]) -> float:
    """Greatest over least update across models; of the layer where this is largest."""
    widest: float = max(max(layer) / min(layer) for layer in zip(*updates, strict=True))
    return widest
