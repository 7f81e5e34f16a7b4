"""Muon against AdamW on the factors of structured layers, at equal train FLOPs.

Each structure is trained on `text` at one width with both optimisers.  The learning rate of each is
the best of one grid on a seed of its own; where that is the first or last of the grid, the table
marks it, for a better one may lie beyond.  The other seeds give the mean validation loss at the
budget with its 95% t interval, the difference of Muon's to AdamW's paired by seed, and the compute
multiplier over dense under the same optimiser.  What Muon itself computes is no train FLOPs, as
with Adam; seconds of a step tell it.

    python -m benchmarks.science.optimisers [--train-flops 1e11] [--width 64] [--seeds 3]
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

from benchmarks.reporting import report
from nas.analysis.scaling import (
    Curve,
    mean_over_seeds,
    multiplier_over_dense,
    summarise_multiplier,
)
from nas.designs.design import parse_design
from nas.planning.recipe import TEXT, with_overrides
from nas.planning.runs import given_plan
from nas.tasks import load_data
from nas.tasks.data import TaskData
from nas.training.metering import CostMeter
from nas.training.run import Point, train_replicates

DESIGNS = (
    "dense", "monarch", "btt:rho=1/4", "low-rank:rho=1/2", "tensor-train:rho=1/4", "blast"
)  # fmt: skip
OPTIMISERS = ("adamw", "muon")
RATES = tuple(TEXT.lr * 3.0**k for k in (-1, 0, 1, 2))
#: The seed on which learning rates are chosen.
_TUNING = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train-flops", type=float, default=1e11)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--designs", nargs="+", default=list(DESIGNS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    data, seeds = load_data(TEXT), tuple(range(options.seeds))
    found: dict[tuple[str, str], dict[str, Any]] = {}
    details = []
    for design in options.designs:
        for optimiser in OPTIMISERS:
            tried = {
                lr: train(design, optimiser, lr, options, data, (_TUNING,))["curves"][_TUNING]
                for lr in RATES
            }
            lr = min(tried, key=lambda r: float(tried[r][1][-1]))
            ran = train(design, optimiser, lr, options, data, seeds)
            found[design, optimiser] = ran | {"lr": lr}
            details += [
                {"design": design, "optimiser": optimiser, "lr": r, "seed": _TUNING,
                 "tuning": True, "loss": float(curve[1][-1])}
                for r, curve in tried.items()
            ]  # fmt: skip
            details += [
                {"design": design, "optimiser": optimiser, "lr": lr, "seed": seed,
                 "tuning": False, "loss": float(curve[1][-1]), "seconds_per_step": ran["seconds"]}
                for seed, curve in ran["curves"].items()
            ]  # fmt: skip
    rows = [row(design, optimiser, found) for design, optimiser in found]
    title = f"text, width {options.width}, {options.train_flops:.3g} train FLOPs, "
    report(f"{title}{options.seeds} seeds; * the rate is at an end of the grid", rows, details)


def train(
    design: str, optimiser: str, lr: float, options: argparse.Namespace, data: TaskData,
    seeds: tuple[int, ...],
) -> dict[str, Any]:  # fmt: skip
    """The curve of each seed, (train FLOPs, losses), and the median seconds of a step of one.

    A run that diverges has no curve but an infinite loss at the budget.
    """
    recipe = with_overrides(data.recipe, {"optimizer": optimiser, "lr": lr})
    plan = given_plan(recipe, parse_design(design), options.width, options.train_flops)
    points: dict[int, list[Point]] = {seed: [] for seed in seeds}
    meter = CostMeter("cpu")
    for news in train_replicates(plan, recipe, data.train, data.validation, seeds, meter=meter):
        for seed, point in news.items():
            if isinstance(point, Point):
                points[seed].append(point)
    curves: dict[int, Curve] = {}
    for seed, own in points.items():
        whole = own and own[-1].step == plan.steps
        flops = [p.train_flops for p in own] if whole else [plan.train_flops]
        losses = [p.loss for p in own] if whole else [float("inf")]
        curves[seed] = np.array(flops, dtype=float), np.array(losses)
    return {"curves": curves, "seconds": meter.result().seconds_per_step, "steps": plan.steps}


def row(
    design: str, optimiser: str, found: dict[tuple[str, str], dict[str, Any]]
) -> dict[str, Any]:
    """One line of the table."""
    own, adamw, dense = (
        found[key] for key in ((design, optimiser), (design, "adamw"), ("dense", optimiser))
    )
    losses = {seed: float(y[-1]) for seed, (_, y) in own["curves"].items()}
    apart = {seed: loss - float(adamw["curves"][seed][1][-1]) for seed, loss in losses.items()}
    budget = max(float(x[-1]) for x, _ in dense["curves"].values())
    bounds = {
        seed: bound for seed, curve in own["curves"].items()
        if (bound := multiplier_over_dense([curve], [dense["curves"][seed]], budget)) is not None
    }  # fmt: skip
    multiplier = summarise_multiplier(bounds)
    kinds = sorted({b.kind for b in bounds.values()})
    return {
        "design": design,
        "optimiser": optimiser,
        "lr": f"{own['lr']:.2g}{'*' if own['lr'] in (RATES[0], RATES[-1]) else ''}",
        "steps": own["steps"],
        "loss": _shown(mean_over_seeds(losses)),
        "over_adamw": "–" if optimiser == "adamw" else _shown(mean_over_seeds(apart), sign="+"),
        "multiplier": _shown(multiplier) if multiplier.value else ", ".join(kinds),
        "ms_per_step": f"{1e3 * own['seconds']:.1f}",
    }


def _shown(value: Any, sign: str = "") -> str:
    """A value with its interval."""
    number = f"{value.value:{sign}.3f}"
    interval = value.interval
    return number + (f" ({interval[0]:{sign}.3f} to {interval[1]:{sign}.3f})" if interval else "")


if __name__ == "__main__":
    main()
