"""How far a few steps of training move the features of a model, as it widens and deepens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from nas.designs.design import parse_design
from nas.layers import StructuredLinear
from nas.planning.recipe import REGRESSION, Recipe
from nas.tasks import load_data
from nas.tasks.batches import sample_losses, training_batches, validation_set
from nas.training.muon import BatchedMuon, factors_of, split_groups
from nas.training.tasks import build_model, learning_rates

#: Updates are compared once features are learned: at the first steps those of a layer of low rank
#: are still small, for a random factor passes on only d^ρ of d directions.
STEPS = 30


RECIPE = replace(REGRESSION, pool=4096, batch=64, validation_samples=256, warmup_steps=0)


def feature_updates(
    recipe: Recipe,
    structure: str,
    width: int,
    *,
    aware: bool = True,
    seed: int = 0,
    muon: bool = False,
) -> tuple[float, ...]:
    """RMS change, after `STEPS` steps, of the output of each structured layer of the last block.

    Parameters
    ----------
    aware
        Whether factors get the rates of `nas.layers.param_groups`; else every factor gets the rate
        of a dense layer of the same dimensions, lr · d_in_base / d_in.
    muon
        Whether Muon trains the factors, at its rates of the product.
    """
    torch.manual_seed(seed)
    model = build_model(recipe, parse_design(structure), width)
    trained = _WithMuon if muon else _aware if aware else _blind
    optimizer = trained(model, recipe, width)
    data = load_data(recipe)
    draw = training_batches(recipe, data.train)
    probe, _ = validation_set(recipe, data.train, data.validation)
    batches = torch.Generator().manual_seed(seed)
    before = _features(model, probe)
    for _ in range(STEPS):
        x, y = draw(batches)
        optimizer.zero_grad()
        torch.autograd.backward(sample_losses(recipe, model(x), y).mean())
        optimizer.step()
    after = _features(model, probe)
    return tuple((b - a).pow(2).mean().sqrt().item() for a, b in zip(before, after, strict=True))


def _aware(model: nn.Module, recipe: Recipe, width: int) -> torch.optim.Optimizer:
    """AdamW with the learning rates of the product."""
    groups = learning_rates(model, recipe, width)
    return torch.optim.AdamW(groups, betas=(recipe.beta1, recipe.beta2), weight_decay=0.0)


class _WithMuon:
    """Muon on the factors, AdamW on all else."""

    def __init__(self, model: nn.Module, recipe: Recipe, width: int) -> None:
        others, own = split_groups(model, learning_rates(model, recipe, width), recipe.lr)
        places = {
            model.get_parameter(name): (layer, factor)
            for name, (layer, factor) in factors_of(model).items()
        }
        self._adamw = torch.optim.AdamW(
            others, betas=(recipe.beta1, recipe.beta2), weight_decay=0.0
        )
        #: parameter, its blocks, and how they come from it
        self._blocks = [
            (p, places[p][0].blocks(places[p][1], p.detach()), places[p])
            for group in own
            for p in group["params"]
        ]
        rates = [group["lr"] for group in own for _ in group["params"]]
        self._muon = BatchedMuon(
            [{"params": [b], "lr": r} for (_, b, _), r in zip(self._blocks, rates, strict=True)]
        )

    def zero_grad(self) -> None:
        self._adamw.zero_grad()
        for parameter, _, _ in self._blocks:
            parameter.grad = None

    def step(self) -> None:
        for parameter, block, (layer, factor) in self._blocks:
            assert parameter.grad is not None
            block.grad = layer.blocks(factor, parameter.grad.contiguous())
        self._adamw.step()
        self._muon.step()


def _blind(model: nn.Module, recipe: Recipe, width: int) -> torch.optim.Optimizer:
    """The optimiser of `_aware` with the rates of dense layers for all factors."""
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
