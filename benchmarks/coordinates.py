"""Coordinate check: do feature updates keep their size as models widen and deepen?

An MLP learns the papers' regression for a few steps at each width.  How far that has moved what
each structured layer of its last block gives, as RMS over fixed inputs, is compared across widths.
Under structure-aware learning rates it stays within a factor of two; under rates that know of the
width but not of the structure (every factor that of a dense layer) it does not.

    python -m benchmarks.coordinates [--widths 64 256 1024 4096] [--depths 3 6 12 24]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.interleaved import report
from nas.layers import EinsumLinear
from nas.models import build_model, build_optimizer
from nas.recipe import REGRESSION, Recipe
from nas.tasks import load_data
from nas.tasks.batches import sample_losses, training_batches, validation_set
from nas.taxonomy import parse_theta

#: dense, Monarch, four BTT, low-rank, Kronecker, Tensor-Train, and two without a name
STRUCTURES = (
    "dense",
    "monarch",
    "2/3,0,1/3,0,1/3,2/3,0",
    "1/3,0,2/3,0,2/3,1/3,0",
    "btt:rho=1/4",
    "3/4,0,1/4,0,3/4,1/4,0",
    "low-rank:rho=1/2",
    "kronecker",
    "tensor-train:rho=1/4",
    "1/2,0,1/2,1/4,1/2,1/4,0",
    "1/2,1/4,1/4,1/4,1/2,1/4,0",
)
#: Updates are compared once features are learned: at the first steps those of a layer of low rank
#: are still small, for a random factor passes on only d^ρ of d directions.
STEPS = 30
RECIPE = replace(REGRESSION, pool=4096, batch=64, validation_samples=256, warmup_steps=0)


def feature_updates(
    recipe: Recipe, structure: str, width: int, *, aware: bool = True, seed: int = 0
) -> tuple[float, ...]:
    """RMS change, after `STEPS` steps, of the output of each structured layer of the last block.

    Parameters
    ----------
    aware
        Whether factors get the rates of `nas.layers.param_groups`; else every factor gets the rate
        of a dense layer of the same dimensions, lr · d_in_base / d_in.
    """
    torch.manual_seed(seed)
    model = build_model(recipe, parse_theta(structure), width)
    optimizer = build_optimizer(model, recipe, width) if aware else _blind(model, recipe)
    data = load_data(recipe)
    draw = training_batches(recipe, data.train)
    probe, _ = validation_set(recipe, data.train, data.validation)
    batches = torch.Generator().manual_seed(seed)
    before = _features(model, probe)
    for _ in range(STEPS):
        x, y = draw(batches)
        optimizer.zero_grad()
        sample_losses(recipe, model(x), y).mean().backward()
        optimizer.step()
    after = _features(model, probe)
    return tuple((b - a).pow(2).mean().sqrt().item() for a, b in zip(before, after, strict=True))


def _blind(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The optimiser of `build_optimizer` with the rates of dense layers for all factors."""
    head = model.get_parameter("head.weight")
    rates = {head: recipe.base_width / head.shape[1]}
    for layer in model.modules():
        if isinstance(layer, EinsumLinear):
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
        if isinstance(layer, EinsumLinear)
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return kept


def spread(updates: Iterable[tuple[float, ...]]) -> float:
    """Greatest over least update across models; of the layer where this is largest."""
    return max(max(layer) / min(layer) for layer in zip(*updates, strict=True))


def _row(kind: str, updates: dict[str, tuple[float, ...]]) -> dict[str, Any]:
    """Geometric mean over the block's layers at each size, and the spread of its worst layer."""
    means = {k: math.prod(u) ** (1 / len(u)) for k, u in updates.items()}
    return {"rates": kind} | means | {"most_over_least": spread(updates.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--depths", type=int, nargs="+", default=[3, 6, 12, 24])
    options = parser.parse_args()
    rows = []
    for structure in STRUCTURES:
        for kind in ("aware", "blind"):
            found = {
                f"width {w}": feature_updates(RECIPE, structure, w, aware=kind == "aware")
                for w in options.widths
            }
            rows.append({"structure": structure} | _row(kind, found))
    report(f"RMS feature update after {STEPS} steps, over widths", rows)
    deep = []
    for structure in STRUCTURES:
        found = {
            f"depth {d}": feature_updates(replace(RECIPE, depth=d), structure, 64)
            for d in options.depths
        }
        deep.append({"structure": structure} | _row("aware", found))
    report(f"RMS feature update after {STEPS} steps, over depths at width 64", deep)


if __name__ == "__main__":
    main()
