"""What a study shows, as numbers with their intervals and as one page that needs no network.

Of every structure and seed, the least loss over its widths within a budget is compared on logs with
that of the same seed of others.  Intervals are 95% t intervals over seeds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nas.analysis.scaling import (
    HULL_TOLERANCE,
    Multiplier,
    geometric_over_seeds,
    mean_over_seeds,
    multiplier_over_dense,
    ratio_over_seeds,
    summarise_multiplier,
)
from nas.designs.taxonomy import taxonomy
from nas.designs.theta import DENSE
from nas.errors import counted
from nas.study.findings import PAPER_EXPONENTS, findings_of
from nas.study.task import GROUPS, Structure, Task
from nas.study.wording import (
    REFERENCE,
    estimate,
    flops,
    multiplier_text,
    verdict_of,
    verdict_text,
)

Json = dict[str, Any]

_FEWEST_SEEDS = 3
#: A run that ended below this share of the budget is not one of the same length.
_FULL = 0.95

NOTES = (
    "Intervals are 95% t intervals over seeds (n - 1 degrees of freedom), paired by seed where "
    "losses are compared. They cover run-to-run variation, that of initial weights and of the "
    "order of data, at this scale. The validation sample is the same for every run, and its "
    "sampling is not in them; nor is the choice of the structures.",
    "Each interval is at 95% on its own: of twenty comparisons without any effect, about one is "
    "expected to look like one.",
    "Loss within a budget: the least validation loss of a structure's runs of one seed, over all "
    "its widths, up to that many train FLOPs; between two evaluations the curve is straight in "
    "log-log. Ratios below 1 are better.",
    "Train FLOPs: 1 MAC = 2 FLOPs, training = 3 × forward. The papers' compute axis is forward "
    "MACs × tokens, that is train FLOPs / 6; exponents and ratios do not depend on it.",
    "Exponent b: loss = a · C^(-b), a Theil-Sen line on the logs of each seed's compute-optimal "
    f"points (lower convex hull in log-log over all widths, points within {HULL_TOLERANCE:.0%} of "
    "it, less those that do not decrease); then the mean over seeds. Widths were chosen for the "
    "full budget: below it narrower models might do better, which would make exponents smaller.",
    "Compute multiplier over dense: train FLOPs of the best dense run at its least loss, over what "
    "the structure needs for that loss, with the same seed. ≥, < or ≤: some seed's curves begin "
    "below that loss, or never reach it; such bounds are not averaged.",
    "ω: compute per parameter is d^ω. ψ: rank is d^ψ. ν: compute is d^(1+ν). All for the canonical "
    "θ and a square layer of dimension d (arXiv:2410.02117, section 4).",
    "A budget this small is evidence about this scale, not proof about another.",
)


def analyse(records: Sequence[Mapping[str, Any]], *, scale: str) -> Json:
    """What the runs of a study show, as JSON.

    Parameters
    ----------
    records
        One a run, as `nas.study.runs` keeps them, in any order.
    scale
        Name of the scale, shown only.

    Raises
    ------
    InvalidInput
        Runs of one task that differ in recipe or data, or the same run twice.
    """
    tasks: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        tasks.setdefault(record["task"], []).append(record)
    analysed = {task: Task(task, rows) for task, rows in tasks.items()}
    environments = {environment_text(r["environment"]) for r in records}
    return {
        "scale": scale,
        "confidence": 0.95,
        "runs": len(records),
        "failed": sum(len(t.failures) for t in analysed.values()),
        "environments": sorted(environments),
        "notes": list(NOTES),
        "tasks": [_task(t) for t in analysed.values()],
        "findings": findings_of(analysed),
    }


def environment_text(environment: Mapping[str, Any]) -> str:
    """Where a run ran, as text: what of it is a single value."""
    plain = {k: v for k, v in environment.items() if isinstance(v, str | int | float | bool)}
    return ", ".join(f"{k} {v}" for k, v in sorted(plain.items()))


def _task(task: Task) -> Json:
    return {
        "task": task.task,
        "recipe": dict(task.recipe),
        "loss_unit": task.unit,
        "train_flops": task.budget,
        "seeds": task.seeds,
        "runs": task.runs,
        "warnings": list(_warnings(task)),
        "groups": [_group(task, g) for g in GROUPS if task.members(g)],
        "structures": [_structure(task, s) for s in task.structures],
        "failures": task.failures,
    }


def _warnings(task: Task) -> Iterator[str]:
    if len(task.seeds) < _FEWEST_SEEDS:
        yield (
            f"{counted(len(task.seeds), 'seed')}: {_FEWEST_SEEDS} are the fewest that give a "
            "useful interval" + ("; here it is unknown" if len(task.seeds) == 1 else "")
        )
    if task.failures:
        yield f"{len(task.failures)} of {task.runs} runs failed; they are listed below"
    missing = [s.name for s in task.structures if task.missing(s)]
    if missing:
        yield f"not every seed and width of: {', '.join(missing)}"
    if early := sum(end < _FULL * (task.budget or 0.0) for end in task.ends):
        yield f"ended before {_FULL:.0%} of C, and compared as they were then: {early} runs"
    if task.dense is None:
        yield "no dense runs: nothing can be said about dense"
    if not task.members(REFERENCE):
        yield f"no runs of {REFERENCE}: groups cannot be compared"


def _group(task: Task, group: str) -> Json:
    members = task.members(group)
    used = task.mean_of(group, task.budget)[1] if task.budget else []
    ratios = task.compared_group(group)
    reference = group == REFERENCE
    return {
        "group": group,
        "members": [s.name for s in members],
        "left_out": [s.name for s in members if s not in used],
        "ratios": ratios,
        "verdict": "reference" if reference else verdict_of(ratios["C"]),
        "text": "the reference" if reference else verdict_text(ratios["C"], REFERENCE),
    }


def _structure(task: Task, s: Structure) -> Json:
    t = taxonomy(s.theta)
    best = s.best(task.budget) if task.budget else {}
    ratios = task.compared(s.log_losses)
    losses = {k: math.log(loss) for k, (loss, _) in best.items()}
    of = " on average, of which it is part" if s.group == REFERENCE else ""
    return {
        "name": s.name,
        "theta": list(s.theta.values),
        "group": s.group,
        "dense": s.theta == DENSE,
        "omega": t.omega,
        "psi": t.psi,
        "nu": t.nu,
        "widths": sorted(s.widths),
        "seeds": sorted(s.runs),
        "missing": task.missing(s),
        "loss": estimate(geometric_over_seeds(losses) if losses else None),
        "best_widths": {str(k): width for k, (_, width) in best.items()},
        "width_note": _width_note(s, Counter(width for _, width in best.values())),
        "ratios": ratios,
        "verdict": verdict_of(ratios["C"]),
        "text": verdict_text(ratios["C"], REFERENCE + of),
        "over_dense": _over_dense(task, s, losses),
        "exponent": _exponent(task, s),
        "curves": [
            {"seed": k, "width": w, "train_flops": f.tolist(), "loss": y.tolist()}
            for k, widths in sorted(s.runs.items())
            for w, (f, y) in sorted(widths.items())
        ],
    }


def _over_dense(task: Task, s: Structure, losses: Mapping[int, float]) -> Json | None:
    """Ratio of losses and compute multiplier at the full budget; None for dense ittask."""
    if task.dense is None or task.budget is None or s is task.dense:
        return None
    ratio = ratio_over_seeds(losses, task.dense.log_losses(task.budget))
    bounds = {}
    for k in sorted(s.runs.keys() & task.dense.runs.keys()):
        runs, dense = list(s.runs[k].values()), list(task.dense.runs[k].values())
        if (bound := multiplier_over_dense(runs, dense, task.budget)) is not None:
            bounds[k] = bound
    return {
        "ratio": estimate(ratio),
        "multiplier": _multiplier(summarise_multiplier(bounds)) if bounds else None,
        "verdict": verdict_of(estimate(ratio)),
        "text": verdict_text(estimate(ratio), "dense"),
    }


def _exponent(task: Task, s: Structure) -> Json:
    exponents, reasons, frontiers = task.exponents(s)
    known = PAPER_EXPONENTS.get(task.task, {})
    widths = {w for f in frontiers for w in f["width"]}
    if len(widths) == 1 and exponents:
        reasons.append("a single width is on the frontier: the slope of its learning curve")
    return {
        "b": estimate(mean_over_seeds(exponents) if exponents else None),
        "paper": next((b for n, b in known.items() if s.name.startswith(n)), None),
        "reasons": reasons,
        "frontiers": frontiers,
    }


def _width_note(s: Structure, best: Counter[int]) -> str | None:
    widths = sorted(s.widths)
    if not best:
        return None
    if len(widths) == 1:
        return "the only width tried: the best may be another"
    ends = [("narrowest", widths[0]), ("widest", widths[-1])]
    at = [
        f"the {end} tried ({w}) in {best[w]} of {best.total()} seeds" for end, w in ends if best[w]
    ]
    return f"best width is {' and '.join(at)}: the optimum may lie outside" if at else None


def _multiplier(m: Multiplier) -> Json:
    return {
        "value": m.value,
        "interval": list(m.interval) if m.interval else None,
        "least": m.least,
        "most": m.most,
        "censored": m.censored,
        "by_seed": {str(k): {"value": b.value, "kind": b.kind} for k, b in m.by_seed.items()},
        "text": multiplier_text(m),
    }


def summary_lines(result: Mapping[str, Any]) -> list[str]:
    """The result in a few lines for a terminal."""
    lines = []
    for task in result["tasks"]:
        budget = "no finished run" if task["train_flops"] is None else flops(task["train_flops"])
        tried = counted(len(task["seeds"]), "seed")
        lines.append(f"{task['task']}: {task['runs']} runs to {budget}, {tried}")
        lines += [
            f"  {g['group']}: {g['text']}" for g in task["groups"] if g["text"] != "the reference"
        ]
        for s in task["structures"]:
            if s["group"] == REFERENCE and s["over_dense"]:
                m = s["over_dense"]["multiplier"]
                lines.append(f"  {s['name']}: {s['over_dense']['text']}")
                lines.append(f"    compute multiplier over dense {m['text'] if m else '—'}")
        lines += [f"  note: {w}" for w in task["warnings"]]
    count = Counter(f["agreement"] for f in result["findings"])
    told = ", ".join(f"{what} {n}" for what, n in count.items())
    lines.append(f"{len(result['findings'])} findings of the papers: {told}")
    return lines
