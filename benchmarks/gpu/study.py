"""A study on the default text: designs × widths at equal train FLOPs, and their Pareto fronts.

Each run spends the whole budget.  Where the time does not suffice, first the number of seeds and
then that of designs is cut, which the notes and the skipped runs say; the budget never is.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.gpu.part import Part
from benchmarks.gpu.steps import executions, text_data
from benchmarks.gpu.timing import gemm_peak
from benchmarks.gpu.writing import table
from nas.designs.design import parse_design
from nas.errors import RunFailed
from nas.planning.recipe import TextRecipe
from nas.planning.runs import RunPlan, admissible
from nas.tasks import TaskData
from nas.training.replicates import pay
from nas.training.run import Execution, Point, execution_plans, train_replicates

#: In the order of their interest, for the last ones are the first to be left out.
_DESIGNS = (
    "dense", "monarch", "btt:rho=1/4", "btt-moe", "low-rank:rho=1/2", "tensor-train:rho=1/4",
    "btt:alpha=1/3,epsilon=2/3,rho=1/8", "btt:cores=3,rho=1/8", "ffn-moe", "kronecker",
    "convolution:kernel=1/2", "1/2,1/4,1/4,1/4,1/2,1/4,1/4",
)  # fmt: skip
_WIDTHS, _BUDGET, _SEEDS = (256, 512), 1e15, 3
_TOY_DESIGNS, _TOY_WIDTHS, _TOY_BUDGET = ("dense", "monarch"), (16, 32), 1e8
_AXES = ("train_flops", "seconds")
#: Time of a run over that of the slowest so far of its width, as a guess.
_CAUTION = 1.3
#: Time of all seeds together, where that pays, over that of one, as a guess.
_TOGETHER = 1.5


def run(part: Part) -> None:
    dtype = torch.bfloat16 if part.on_gpu else torch.float32
    part.set("gemm", gemm_peak(part.device, dtype, part.toy))
    recipe, data = text_data(part, warmup_steps=100, min_steps=150)
    execution = list(executions(part).values())[-1]
    designs: Sequence[str] = _TOY_DESIGNS if part.toy else _DESIGNS
    widths = _TOY_WIDTHS if part.toy else _WIDTHS
    budget = _TOY_BUDGET if part.toy else _BUDGET
    part.set("recipe", recipe.as_dict())
    part.set("budget", budget)
    part.set("execution", str(execution))
    plans: list[RunPlan] = []
    for text, width in itertools.product(designs, widths):
        found = list(admissible(recipe, parse_design(text), budget, [width]))
        plans += found
        if not found:
            part.skip(f"{text}, width {width}", f"{budget:g} FLOPs are too few steps")
    seeds = 0
    pace: dict[int, float] = {}  # seconds of one seed, the slowest of each width
    for plan in plans:
        what = f"{plan.name}, width {plan.width}"
        expected = _CAUTION * pace.get(plan.width, max(pace.values(), default=0.0))
        if not part.has_time(what, expected):
            continue
        row = _row(plan)
        part.add(row)
        started = time.monotonic()
        try:
            row["plans"] = execution_plans(plan, recipe, execution)
            # the first run, of one seed, says how many the others can have
            ended = _train(part, row, recipe, data, plan, [*range(max(seeds, 1))], execution)
            spent = (time.monotonic() - started) / max(seeds, 1)
            pace[plan.width] = max(spent, pace.get(plan.width, 0.0))
            if ended and not seeds:
                seeds = _affordable_seeds(part, spent, plans)
                if seeds > 1:
                    _train(part, row, recipe, data, plan, [*range(1, seeds)], execution)
        except Exception:
            part.error(what)
    part.set("fronts", {axis: front(part.rows, axis) for axis in _AXES})


def _affordable_seeds(part: Part, spent: float, plans: Sequence[RunPlan]) -> int:
    """All seeds if every plan is likely to have them in time; `spent` are the seconds of one."""
    kind = part.device.type
    ahead = _CAUTION * spent * sum(_TOGETHER if pay(p, kind) else _SEEDS for p in plans)
    if ahead < part.left:
        return _SEEDS
    part.note(f"One seed a run: {_SEEDS} would take about {ahead:.0f} s.")
    return 1


def _row(plan: RunPlan) -> dict[str, Any]:
    """The row of a plan before it has run."""
    return {
        "design": plan.design.text,
        "name": plan.name,
        "width": plan.width,
        "steps": plan.steps,
        "train_flops": plan.train_flops,
        "params": plan.params,
        "together": False,
        "failed": {},
        "curves": {},
    }


def _train(
    part: Part,
    row: dict[str, Any],
    recipe: TextRecipe,
    data: TaskData,
    plan: RunPlan,
    seeds: Sequence[int],
    execution: Execution,
) -> bool:
    """Train some seeds, together where that pays, and put their curves into the row as they grow.

    False if the time of the part was used up before their end.
    """
    row["together"] = len(seeds) > 1 and pay(plan, part.device.type)
    for group in [list(seeds)] if row["together"] else [[seed] for seed in seeds]:
        runs = train_replicates(plan, recipe, data.train, data.validation, group, execution)
        for found in runs:
            for seed, outcome in found.items():
                if isinstance(outcome, RunFailed):
                    row["failed"][str(seed)] = str(outcome)
                else:
                    row["curves"].setdefault(str(seed), []).append(_kept(outcome))
            part.set("rows", part.rows)
            unended = [s for s in group if str(s) not in row["failed"] and not _ended(row, s)]
            if unended and part.left < 0:
                runs.close()
                part.has_time(f"the rest of {plan.name}, width {plan.width}, seeds {unended}")
                return False
    return True


def _ended(row: Mapping[str, Any], seed: int) -> bool:
    """Whether the run of a seed came to its last step."""
    curve = row["curves"].get(str(seed))
    return bool(curve) and curve[-1]["step"] == row["steps"]


def _kept(point: Point) -> dict[str, float]:
    """A point without the losses of its samples."""
    return {
        "step": point.step,
        "train_flops": point.train_flops,
        "seconds": point.seconds,
        "loss": point.loss,
        "loss_stderr": point.loss_stderr,
    }


def front(rows: Iterable[Mapping[str, Any]], axis: str) -> list[dict[str, Any]]:
    """The points that none equals or beats in both the axis and the loss, by the axis.

    A point is the mean over the seeds, where all of them came to it; runs of which one failed have
    none.
    """
    points = sorted(
        (
            {
                "design": row["name"],
                "width": row["width"],
                axis: statistics.mean(p[axis] for p in found),
                "loss": statistics.mean(p["loss"] for p in found),
                "seeds": len(found),
            }
            for row in rows
            if not row["failed"]
            for found in zip(*row["curves"].values(), strict=False)
        ),
        key=lambda point: (point[axis], point["loss"]),
    )
    kept: list[dict[str, Any]] = []
    for point in points:
        if not kept or point["loss"] < kept[-1]["loss"]:
            kept.append(point)
    return kept


def tables(result: Mapping[str, Any]) -> list[str]:
    """The last loss of each run, and both fronts."""
    peak = result["gemm"]["flops_per_second"]
    lines = []
    for row in result["rows"]:
        last = [c[-1] for c in row["curves"].values() if c[-1]["step"] == row["steps"]]
        losses = [point["loss"] for point in last]
        seconds = statistics.mean(p["seconds"] for p in last) if last else None
        lines.append(
            {
                "design": row["name"],
                "width": row["width"],
                "steps": row["steps"],
                "seeds": len(last),
                "failed": len(row["failed"]),
                "loss": f"{statistics.mean(losses):.4f}" if losses else None,
                "least": f"{min(losses):.4f}" if losses else None,
                "most": f"{max(losses):.4f}" if losses else None,
                "s a run": seconds,
                "of peak": row["train_flops"] / peak / seconds if seconds else None,
                "together": "yes" if row["together"] else "no",
            }
        )
    unit = "nats per character"
    shown = [table(f"Runs of {result['budget']:g} train FLOPs on text, {unit}", lines)]
    for axis in _AXES:
        points = front(result["rows"], axis)
        rows = [{**point, "loss": f"{point['loss']:.4f}"} for point in points]
        shown.append(table(f"Pareto front of {axis} and loss", rows))
    return shown
