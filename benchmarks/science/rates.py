"""Learning-rate transfer: is the best rate of a narrow model that of a wide one?

An MLP learns the papers' regression at two widths with learning rates a factor of two apart, under
each rule of `benchmarks.science.coordinates`.  The best rate is the least point of the parabola
through the best rate of the grid and its neighbours, log loss over log rate; where the best of the
grid is its first or last one, a better one may lie beyond, and the table says so.

    python -m benchmarks.science.rates [--widths 128 1024] [--seeds 2] [--processes 2]
        [--structures monarch blast] [--rules published spectral muon sgd] [--folder FOLDER]
"""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.reporting import report
from benchmarks.science.coordinates import RULES
from benchmarks.science.studies import options_of_runs, parsed
from nas.designs.design import parse_design
from nas.planning.recipe import REGRESSION, Recipe, with_overrides
from nas.planning.runs import plan_of_steps
from nas.study.runs import StudyRun, run_all
from nas.tasks import load_data
from nas.training.run import Execution

STRUCTURES = (
    "dense", "monarch", "btt:rho=1/4", "low-rank:rho=1/2", "kronecker", "tensor-train:rho=1/4",
    "blast",
)  # fmt: skip
#: Rates of the grid over that of the rule.  Muon's best are an order of magnitude above AdamW's.
_GRID = tuple(2.0**k for k in range(-2, 5))
_GRID_OF_MUON = tuple(2.0**k for k in range(2, 9))
_STEPS = 200
_RECIPE = replace(
    REGRESSION, batch=64, schedule="cosine", warmup_steps=20, min_steps=100, evaluations=1,
    pool=16_384, validation_samples=1024,
)  # fmt: skip


def _grid(rule: str) -> dict[float, Recipe]:
    """Learning rate → recipe."""
    chosen = {name: getattr(RULES[rule], name) for name in ("parametrization", "optimizer")}
    tuned = "sgd_lr" if rule == "sgd" else "lr"
    grid = _GRID_OF_MUON if rule == "muon" else _GRID
    rates = [getattr(RULES[rule], tuned) * factor for factor in grid]
    return {rate: with_overrides(_RECIPE, chosen | {tuned: rate}) for rate in rates}


def best_rate(losses: dict[float, float]) -> tuple[float, bool]:
    """(the best rate, whether it lies between two of the grid)."""
    rates = sorted(losses)
    k = min(range(len(rates)), key=lambda i: losses[rates[i]])
    if k in (0, len(rates) - 1):
        return rates[k], False
    x = [math.log(r) for r in rates[k - 1 : k + 2]]
    y = [losses[r] for r in rates[k - 1 : k + 2]]
    if not all(map(math.isfinite, y)):
        return rates[k], False
    a, b, _ = np.polyfit(x, np.log(y), 2)
    return math.exp(-b / (2 * a)), True


def main() -> None:
    parser = options_of_runs(__doc__, seeds=2)
    parser.add_argument("--widths", type=int, nargs=2, default=[128, 1024])
    parser.add_argument("--structures", nargs="+", default=list(STRUCTURES))
    rules = [rule for rule in RULES if rule != "blind"]
    parser.add_argument("--rules", nargs="+", choices=rules, default=rules)
    options = parsed(parser)
    grids = {rule: _grid(rule) for rule in options.rules}
    data = {rule: {lr: load_data(r) for lr, r in grid.items()} for rule, grid in grids.items()}
    jobs: dict[tuple[str, str, int, float], list[StudyRun]] = {}
    for structure in options.structures:
        for rule, of_rule in data.items():
            for width in options.widths:
                for lr, d in of_rule.items():
                    plan = plan_of_steps(d.recipe, parse_design(structure), width, _STEPS)
                    jobs[structure, rule, width, lr] = [
                        StudyRun.of(d, plan, seed) for seed in range(options.seeds)
                    ]
    flat = [run for runs in jobs.values() for run in runs]
    every = [d for of_rule in data.values() for d in of_rule.values()]
    records = {
        r["key"]: r
        for r in run_all(
            flat, every, options.folder, processes=options.processes, execution=Execution()
        )
    }

    def loss(runs: list[StudyRun]) -> float:
        """Mean over seeds; infinite where one failed, for such a rate is no choice."""
        found = [records[r.key] for r in runs]
        return mean(math.inf if r["failure"] else r["points"][-1]["loss"] for r in found)

    rows: list[dict[str, Any]] = []
    details: list[dict[str, Any]] = []
    for structure in options.structures:
        for rule in options.rules:
            best = {}
            for width in options.widths:
                losses = {lr: loss(jobs[structure, rule, width, lr]) for lr in grids[rule]}
                best[width] = best_rate(losses)
                details += [
                    {"structure": structure, "rates": rule, "width": width, "lr": lr, "loss": found}
                    for lr, found in losses.items()
                ]
            (narrow, inside), (wide, inside_too) = best.values()
            row = {"structure": structure, "rates": rule}
            for width, (lr, within) in best.items():
                row[f"best at {width}"] = f"{lr:.2g}{'' if within else '*'}"
            apart = f"{max(narrow, wide) / min(narrow, wide):.2f}"
            rows.append(row | {"apart": apart if inside and inside_too else "an end of the grid"})
    report("Best learning rate; * at an end of the grid", rows, details)


if __name__ == "__main__":
    main()
