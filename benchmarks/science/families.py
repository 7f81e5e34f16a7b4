"""Dense, Monarch and every mixture of experts, at equal train FLOPs.

Each design trains at several widths and with several seeds.  A design's compute multiplier is what
dense spends over what the design spends for the same loss, from the learning curves of all widths,
paired by seed: at the loss that the best dense run ends with, or, for a design that does not come
down to it, at the design's own least loss.  Intervals are 95% t intervals over seeds.

With --train-flops every run has that budget (within one of its steps), and a design's loss is that
of its best width.  With --widths every width is a scale of its own: all designs of that width have
the train FLOPs of --dense-steps dense steps, and a second table tells how the loss over that of
dense changes each time the width doubles.

    python -m benchmarks.science.families [--task text] [--train-flops 1e11] [--seeds 3]
        [--widths 64 128 192 256 --dense-steps 400] [--processes 2] [--folder FOLDER]

A folder keeps finished runs, and a study that was cut short goes on where it stood.
"""

from __future__ import annotations

import argparse
import math
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
from nas.planning.recipe import PIXELS, REGRESSION, TEXT, Recipe
from nas.planning.runs import RunPlan, given_plan, plan_at, plan_of_steps, plans
from nas.study.runs import StudyRun, run_all
from nas.tasks import TaskData, load_data
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


RECIPES = {"text": TEXT, "regression": REGRESSION, "pixels": PIXELS}
_COLUMNS = (
    "design", "width", "params", "steps", "loss", "loss_interval", "multiplier",
    "multiplier_interval", "multiplier_is", "milliseconds_per_step",
)  # fmt: skip


def main() -> None:
    parser = options_of_runs(__doc__, seeds=3)
    parser.add_argument("--task", choices=list(RECIPES), default="text")
    parser.add_argument("--train-flops", type=float, default=1e11)
    parser.add_argument("--positions", type=float, nargs="+", default=[0.15, 0.4])
    parser.add_argument("--widths", type=int, nargs="+")
    parser.add_argument("--dense-steps", type=int, default=400)
    parser.add_argument("--designs", nargs="+", default=list(DESIGNS))
    options = parsed(parser)
    data = load_data(RECIPES[options.task])
    names = list(dict.fromkeys(["dense", *options.designs]))
    if options.widths:
        _over_widths(options, data, names)
        return
    chosen = {
        name: _plans(data.recipe, parse_design(name), options.positions, options.train_flops)
        for name in names
    }
    records = _trained(options, data, chosen)
    found = summary(records, options.train_flops)
    title = (
        f"{options.task}, {options.train_flops:.3g} train FLOPs a run, {options.seeds} seeds, "
        f"widths {min(r['width'] for r in records)} to {max(r['width'] for r in records)}"
    )
    report(title, [{c: _shown(row[c]) for c in _COLUMNS} for row in found], found)


def _trained(
    options: argparse.Namespace, data: TaskData, chosen: Mapping[str, Sequence[RunPlan]]
) -> list[dict[str, Any]]:
    """The records of every plan and seed; narrow plans first."""
    planned = [(plan, name) for name, found in chosen.items() for plan in found]
    runs = [
        StudyRun.of(data, plan, seed, name)
        for plan, name in sorted(planned, key=lambda item: item[0].width)
        for seed in range(options.seeds)
    ]
    execution, processes = Execution(), options.processes
    return list(run_all(runs, [data], options.folder, processes=processes, execution=execution))


def _over_widths(options: argparse.Namespace, data: TaskData, names: Sequence[str]) -> None:
    """Every design at every width, each width with a budget of its own."""
    budgets = {
        width: plan_of_steps(
            data.recipe, parse_design("dense"), width, options.dense_steps
        ).train_flops
        for width in sorted(options.widths)
    }
    chosen = {
        name: [given_plan(data.recipe, parse_design(name), w, b) for w, b in budgets.items()]
        for name in names
    }
    records = _trained(options, data, chosen)
    rows = []
    for width, budget in budgets.items():
        # what a smaller budget trained is a run of this one that ended early
        admitted = [r for r in records if r["width"] <= width]
        for row in summary(admitted, budget, width):
            rows.append({"dense_steps_train_flops": budget} | row)
    title = (
        f"{options.task}, {options.dense_steps} dense steps at each width, {options.seeds} seeds"
    )
    report(title, [{c: _shown(row[c]) for c in _COLUMNS} for row in rows], rows)
    trends = trend(records)
    report("change of log(loss / dense loss) each time the width doubles", trends)


def trend(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By design: the least-squares slope of log(loss / dense loss) over log2(width), with its
    interval over seeds; of seeds whose runs all ended well."""
    ends = {(r["name"], r["seed"], r["width"]): r for r in records if not r["failure"]}
    widths = sorted({width for _, _, width in ends})
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(name for name, _, _ in ends):
        slopes, ratios = {}, {}
        for seed in sorted({seed for _, seed, _ in ends}):
            pairs = [(ends.get((name, seed, w)), ends.get(("dense", seed, w))) for w in widths]
            if name == "dense" or any(own is None or dense is None for own, dense in pairs):
                continue
            logs = [
                math.log(own["points"][-1]["loss"] / dense["points"][-1]["loss"])
                for own, dense in pairs
                if own is not None and dense is not None
            ]
            slopes[seed] = float(np.polyfit(np.log2(widths), logs, 1)[0])
            ratios[seed] = logs
        if slopes:
            found = mean_over_seeds(slopes)
            means = np.exp(np.mean(list(ratios.values()), axis=0))
            shown = {f"width {w}": f"{m:.4f}" for w, m in zip(widths, means, strict=True)}
            rows.append(
                {"design": name} | shown
                | {"slope": f"{found.value:+.4f}", "interval": _shown(found.interval)}
            )  # fmt: skip
    return rows


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


def summary(
    records: Sequence[Mapping[str, Any]], budget: float, at_width: int | None = None
) -> list[dict[str, Any]]:
    """A row for each design, from the least loss to the greatest; its loss is that of the given
    width, by default of its best."""
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
        width = at_width or min(losses, key=lambda w: losses[w].value)
        if width not in losses:
            continue
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
