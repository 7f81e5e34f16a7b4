"""Dense, Monarch and every mixture of experts on `text`, at equal train FLOPs.

Each design trains at several widths and with several seeds, every run for the same train FLOPs
(within one of its steps).  A design's loss is that of its best width; its compute multiplier is
what dense spends over what the design spends for the same loss, from the learning curves of all
widths, paired by seed: at the loss that the best dense run ends with, or, for a design that does
not come down to it, at the design's own least loss.  Intervals are 95% t intervals over seeds.

    python -m benchmarks.science.families [--train-flops 1e11] [--seeds 3] [--processes 2]
        [--folder FOLDER]

A folder keeps finished runs, and a study that was cut short goes on where it stood.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.reporting import report
from benchmarks.science.studies import options_of_runs, parsed
from nas.analysis.scaling import (
    Bound,
    Curve,
    mean_over_seeds,
    multiplier_over_dense,
    summarise_multiplier,
)
from nas.designs.design import Design, parse_design
from nas.planning.recipe import TEXT, Recipe
from nas.planning.runs import RunPlan, plan_at, plans
from nas.study.runs import StudyRun, run_all
from nas.tasks import load_data
from nas.training.run import Execution

#: The experts of low-rank-moe have as many slices as the width allows.
DESIGNS = (
    "dense",
    "monarch",
    "monarch@heads",
    "ffn-moe:experts=8,active=2",
    "dense-moe:experts=8,active=2",
    "low-rank-moe:rho=1,experts=8,active=2",
    "btt-moe:experts=8,active=2",
    "btt-moe:experts=8,active=2@heads",
)


def main() -> None:
    parser = options_of_runs(__doc__, seeds=3)
    parser.add_argument("--train-flops", type=float, default=1e11)
    parser.add_argument("--positions", type=float, nargs="+", default=[0.15, 0.4])
    parser.add_argument("--designs", nargs="+", default=list(DESIGNS))
    options = parsed(parser)
    data = load_data(TEXT)
    chosen = {
        name: _plans(data.recipe, parse_design(name), options.positions, options.train_flops)
        for name in dict.fromkeys(["dense", *options.designs])
    }
    runs = [
        StudyRun.of(data, plan, seed, name)
        for seed in range(options.seeds)
        for name, found in chosen.items()
        for plan in found
    ]
    records = list(
        run_all(runs, [data], options.folder, processes=options.processes, execution=Execution())
    )
    found = summary(records, options.train_flops)
    columns = [
        "design", "width", "params", "steps", "loss", "loss_interval", "multiplier",
        "multiplier_interval", "multiplier_is", "milliseconds_per_step",
    ]  # fmt: skip
    title = (
        f"text, {options.train_flops:.3g} train FLOPs a run, {options.seeds} seeds, "
        f"widths {min(r['width'] for r in records)} to {max(r['width'] for r in records)}"
    )
    report(title, [{c: _shown(row[c]) for c in columns} for row in found], found)


def _plans(
    recipe: Recipe, design: Design, positions: Sequence[float], budget: float
) -> list[RunPlan]:
    """One run a position, at distinct widths: the next wider where two positions meet."""
    admitted, chosen = plans(recipe, design, budget), []
    for position in positions:
        plan = plan_at(recipe, design, position, budget)
        wider = [p for p in admitted if p.width >= plan.width and p not in chosen]
        chosen += wider[:1]
    return chosen


def summary(records: Sequence[Mapping[str, Any]], budget: float) -> list[dict[str, Any]]:
    """A row for each design, from the least loss to the greatest."""
    curves: dict[str, dict[int, list[Curve]]] = {}
    ends: dict[str, dict[int, dict[int, Mapping[str, Any]]]] = {}
    failures: dict[str, int] = {}
    for r in records:
        if r["failure"]:
            failures[r["name"]] = failures.get(r["name"], 0) + 1
            continue
        x = np.array([p["train_flops"] for p in r["points"]], dtype=np.float64)
        y = np.array([p["loss"] for p in r["points"]], dtype=np.float64)
        curves.setdefault(r["name"], {}).setdefault(r["seed"], []).append((x, y))
        ends.setdefault(r["name"], {}).setdefault(r["width"], {})[r["seed"]] = r
    rows = []
    for name, by_width in ends.items():
        losses = {
            width: mean_over_seeds({s: r["points"][-1]["loss"] for s, r in by_seed.items()})
            for width, by_seed in by_width.items()
        }
        width = min(losses, key=lambda w: losses[w].value)
        best = list(by_width[width].values())
        by_seed = {
            seed: _multiplier(own, curves["dense"][seed], budget)
            for seed, own in curves[name].items()
            if seed in curves["dense"]
        }
        multiplier = summarise_multiplier(by_seed)
        kinds = sorted({b.kind for b in by_seed.values()})
        rows.append(
            {
                "design": name,
                "width": width,
                "params": best[0]["params"],
                "steps": best[0]["steps"],
                "train_flops": best[0]["points"][-1]["train_flops"],
                "loss": losses[width].value,
                "loss_interval": losses[width].interval,
                "losses_by_width": {str(w): found.value for w, found in sorted(losses.items())},
                "multiplier": multiplier.value,
                "multiplier_interval": multiplier.interval,
                "multiplier_is": " and ".join(kinds),
                "multiplier_by_seed": {str(s): [b.value, b.kind] for s, b in by_seed.items()},
                "milliseconds_per_step": float(
                    np.median([1e3 * r["points"][-1]["seconds"] / r["steps"] for r in best])
                ),
                "seeds": len(best),
                "failed_runs": failures.get(name, 0),
            }
        )
    return sorted(rows, key=lambda row: row["loss"])


def _multiplier(own: Sequence[Curve], dense: Sequence[Curve], budget: float) -> Bound:
    """At the best dense loss; where the design does not reach it, at its own."""
    bound = multiplier_over_dense(own, dense, budget)
    assert bound is not None
    if bound.kind != "less_than":
        return bound
    turned = multiplier_over_dense(dense, own, budget)
    assert turned is not None
    return Bound(1 / turned.value, {"at_least": "less_than"}.get(turned.kind, turned.kind))


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{value[0]:.4f} to {value[1]:.4f}"
    if isinstance(value, float):
        return f"{value:.4f}"
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    main()
