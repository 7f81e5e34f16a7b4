"""What a study shows, as numbers with their intervals and as one page that needs no network.

Of every structure and seed, the least loss over its widths within a budget is compared on logs with
that of the same seed of others.  Intervals are 95% t intervals over seeds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nas.analysis.scaling import (
    HULL_TOLERANCE,
    MIN_POINTS,
    Curve,
    Multiplier,
    common_mean,
    compute_optimal,
    fit_power_law,
    geometric_over_seeds,
    loss_at,
    mean_over_seeds,
    multiplier_over_dense,
    ratio_over_seeds,
    summarise_multiplier,
)
from nas.designs.taxonomy import taxonomy
from nas.designs.theta import DENSE, SUM_TOLERANCE, Theta
from nas.errors import InvalidInput, counted
from nas.study.findings import PAPER_EXPONENTS, findings_of
from nas.study.wording import (
    REFERENCE,
    estimate,
    flops,
    multiplier_text,
    seeds,
    verdict_of,
    verdict_text,
)

Json = dict[str, Any]

GROUPS = (REFERENCE, "ω = 0, ψ < 1", "ω > 0")
#: Shares of the full budget at which structures are compared.
SHARES = {"C": 1.0, "C/2": 0.5, "C/4": 0.25}
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


@dataclass
class _Structure:
    """One structure of a task: its finished runs by seed and width."""

    name: str
    theta: Theta
    group: str
    runs: dict[int, dict[int, Curve]] = field(default_factory=dict)
    widths: set[int] = field(default_factory=set)
    macs: dict[int, float] = field(default_factory=dict)

    def log_losses(self, budget: float, most_macs: float = math.inf) -> dict[int, float]:
        """Log of the least loss within `budget` by seed."""
        return {k: math.log(loss) for k, (loss, _) in self.best(budget, most_macs).items()}

    def best(self, budget: float, most_macs: float = math.inf) -> dict[int, tuple[float, int]]:
        """(least loss within `budget`, its width) by seed."""
        found = {}
        for seed, widths in sorted(self.runs.items()):
            losses = [
                (loss, width)
                for width, (f, y) in sorted(widths.items())
                if self.macs[width] <= most_macs and (loss := loss_at(f, y, budget)) is not None
            ]
            if losses:
                found[seed] = min(losses)
        return found


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
    environments = {_environment(r["environment"]) for r in records}
    return {
        "scale": scale,
        "confidence": 0.95,
        "runs": len(records),
        "failed": sum(len(t.failures) for t in analysed.values()),
        "environments": sorted(environments),
        "notes": list(NOTES),
        "tasks": [t.as_json() for t in analysed.values()],
        "findings": findings_of(analysed),
    }


def _environment(environment: Mapping[str, Any]) -> str:
    plain = {k: v for k, v in environment.items() if isinstance(v, str | int | float | bool)}
    return ", ".join(f"{k} {v}" for k, v in sorted(plain.items()))


class Task:
    """The runs of one task and what is computed from them."""

    def __init__(self, task: str, records: Sequence[Mapping[str, Any]]) -> None:
        first = records[0]
        for r in records:
            for key in ("recipe", "loss_unit", "task_fingerprint"):
                if r.get(key) != first.get(key):
                    accepted = f"records of task {task} with one {key}"
                    raise InvalidInput("records", f"{r.get(key)} beside {first.get(key)}", accepted)
        self.task = task
        self.recipe: Mapping[str, Any] = first["recipe"]
        self.unit: str = first["loss_unit"]
        self.seeds = sorted({int(r["seed"]) for r in records})
        self.runs = len(records)
        self.failures: list[Json] = []
        by_theta: dict[Theta, _Structure] = {}
        for r in sorted(records, key=lambda r: (r["width"], r["seed"])):
            self._add(r, by_theta)
        order = {Theta.of(r["theta"]).canonical(): i for i, r in reversed([*enumerate(records)])}
        self.structures = sorted(
            by_theta.values(), key=lambda s: (GROUPS.index(s.group), order[s.theta])
        )
        _tell_apart(self.structures)
        names = {s.theta: s.name for s in self.structures}
        for failure in self.failures:
            failure["name"] = names[failure.pop("theta")]
        self.ends = [
            float(f[-1]) for s in self.structures for w in s.runs.values() for f, _ in w.values()
        ]
        #: train FLOPs of the longest run; the others are at most one step shorter
        self.budget = max(self.ends, default=None)
        self.dense = by_theta.get(DENSE)

    def _add(self, r: Mapping[str, Any], by_theta: dict[Theta, _Structure]) -> None:
        theta = Theta.of(r["theta"]).canonical()
        if theta not in by_theta:
            by_theta[theta] = _Structure(str(r["name"]), theta, group_of(theta))
        structure, width, seed = by_theta[theta], int(r["width"]), int(r["seed"])
        structure.widths.add(width)
        structure.macs[width] = r["forward_flops_per_token"] / 2
        if reason := _failure(r):
            self.failures.append({"theta": theta, "width": width, "seed": seed, "reason": reason})
            return
        widths = structure.runs.setdefault(seed, {})
        if width in widths:
            twice = f"{structure.name}, width {width}, seed {seed}"
            raise InvalidInput("records", twice, "each run once")
        points = sorted(r["points"], key=lambda p: p["train_flops"])
        widths[width] = (
            np.array([p["train_flops"] for p in points], dtype=np.float64),
            np.array([p["loss"] for p in points], dtype=np.float64),
        )

    def as_json(self) -> Json:
        return {
            "task": self.task,
            "recipe": dict(self.recipe),
            "loss_unit": self.unit,
            "train_flops": self.budget,
            "seeds": self.seeds,
            "runs": self.runs,
            "warnings": list(self._warnings()),
            "groups": [self._group(g) for g in GROUPS if self.members(g)],
            "structures": [self._structure(s) for s in self.structures],
            "failures": self.failures,
        }

    def members(self, group: str) -> list[_Structure]:
        return [s for s in self.structures if s.group == group]

    def _warnings(self) -> Iterator[str]:
        if len(self.seeds) < _FEWEST_SEEDS:
            yield (
                f"{counted(len(self.seeds), 'seed')}: {_FEWEST_SEEDS} are the fewest that give a "
                "useful interval" + ("; here it is unknown" if len(self.seeds) == 1 else "")
            )
        if self.failures:
            yield f"{len(self.failures)} of {self.runs} runs failed; they are listed below"
        missing = [s.name for s in self.structures if self._missing(s)]
        if missing:
            yield f"not every seed and width of: {', '.join(missing)}"
        if early := sum(end < _FULL * (self.budget or 0.0) for end in self.ends):
            yield f"ended before {_FULL:.0%} of C, and compared as they were then: {early} runs"
        if self.dense is None:
            yield "no dense runs: nothing can be said about dense"
        if not self.members(REFERENCE):
            yield f"no runs of {REFERENCE}: groups cannot be compared"

    def mean_of(self, group: str, budget: float) -> tuple[dict[int, float], list[_Structure]]:
        """Mean log loss of a group by seed, and the structures it is taken over."""
        members = self.members(group)
        mean, used = common_mean([s.log_losses(budget) for s in members])
        return mean, [members[i] for i in used]

    def compared(self, logs_at: Any) -> Json:
        """Ratio to the reference group at each share of the budget."""
        if self.budget is None:
            return dict.fromkeys(SHARES)
        return {
            name: estimate(
                ratio_over_seeds(
                    logs_at(self.budget * share), self.mean_of(REFERENCE, self.budget * share)[0]
                )
            )
            for name, share in SHARES.items()
        }

    def _group(self, group: str) -> Json:
        members = self.members(group)
        used = self.mean_of(group, self.budget)[1] if self.budget else []
        ratios = self.compared(lambda budget: self.mean_of(group, budget)[0])
        reference = group == REFERENCE
        return {
            "group": group,
            "members": [s.name for s in members],
            "left_out": [s.name for s in members if s not in used],
            "ratios": ratios,
            "verdict": "reference" if reference else verdict_of(ratios["C"]),
            "text": "the reference" if reference else verdict_text(ratios["C"], REFERENCE),
        }

    def _structure(self, s: _Structure) -> Json:
        t = taxonomy(s.theta)
        best = s.best(self.budget) if self.budget else {}
        ratios = self.compared(s.log_losses)
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
            "missing": self._missing(s),
            "loss": estimate(geometric_over_seeds(losses) if losses else None),
            "best_widths": {str(k): width for k, (_, width) in best.items()},
            "width_note": _width_note(s, Counter(width for _, width in best.values())),
            "ratios": ratios,
            "verdict": verdict_of(ratios["C"]),
            "text": verdict_text(ratios["C"], REFERENCE + of),
            "over_dense": self._over_dense(s, losses),
            "exponent": self._exponent(s),
            "curves": [
                {"seed": k, "width": w, "train_flops": f.tolist(), "loss": y.tolist()}
                for k, widths in sorted(s.runs.items())
                for w, (f, y) in sorted(widths.items())
            ],
        }

    def _missing(self, s: _Structure) -> list[Json]:
        return [
            {"seed": k, "width": w}
            for k in self.seeds
            for w in sorted(s.widths)
            if w not in s.runs.get(k, {})
        ]

    def _over_dense(self, s: _Structure, losses: Mapping[int, float]) -> Json | None:
        """Ratio of losses and compute multiplier at the full budget; None for dense itself."""
        if self.dense is None or self.budget is None or s is self.dense:
            return None
        ratio = ratio_over_seeds(losses, self.dense.log_losses(self.budget))
        bounds = {}
        for k in sorted(s.runs.keys() & self.dense.runs.keys()):
            runs, dense = list(s.runs[k].values()), list(self.dense.runs[k].values())
            if (bound := multiplier_over_dense(runs, dense, self.budget)) is not None:
                bounds[k] = bound
        return {
            "ratio": estimate(ratio),
            "multiplier": _multiplier(summarise_multiplier(bounds)) if bounds else None,
            "verdict": verdict_of(estimate(ratio)),
            "text": verdict_text(estimate(ratio), "dense"),
        }

    def exponents(self, s: _Structure) -> tuple[dict[int, float], list[str], list[Json]]:
        """Exponent by seed, why others have none, and the frontier of every seed."""
        exponents, reasons, frontiers = {}, [], []
        for k, widths in sorted(s.runs.items()):
            flops = np.concatenate([f for f, _ in widths.values()])
            losses = np.concatenate([y for _, y in widths.values()])
            of = np.concatenate([np.full(len(f), w) for w, (f, _) in widths.items()])
            at = compute_optimal(flops, losses)
            law = fit_power_law(flops[at], losses[at])
            if law is None:
                few = f"{len(at)} compute-optimal points, {MIN_POINTS} are needed"
                reasons.append(f"seed {k}: {few}")
            else:
                exponents[k] = law.b
            frontiers.append({
                "seed": k, "train_flops": flops[at].tolist(), "loss": losses[at].tolist(),
                "width": of[at].tolist(), "a": law and law.a, "b": law and law.b,
            })  # fmt: skip
        return exponents, reasons, frontiers

    def _exponent(self, s: _Structure) -> Json:
        exponents, reasons, frontiers = self.exponents(s)
        known = PAPER_EXPONENTS.get(self.task, {})
        widths = {w for f in frontiers for w in f["width"]}
        if len(widths) == 1 and exponents:
            reasons.append("a single width is on the frontier: the slope of its learning curve")
        return {
            "b": estimate(mean_over_seeds(exponents) if exponents else None),
            "paper": next((b for n, b in known.items() if s.name.startswith(n)), None),
            "reasons": reasons,
            "frontiers": frontiers,
        }


def group_of(theta: Theta) -> str:
    """The group of a θ by ω and ψ; what sums may be off by counts as nothing.

    >>> group_of(DENSE)
    'ω = 0, ψ = 1'
    """
    t = taxonomy(theta)
    if t.omega > SUM_TOLERANCE:
        return "ω > 0"
    return REFERENCE if t.psi >= 1 - SUM_TOLERANCE else "ω = 0, ψ < 1"


def _failure(r: Mapping[str, Any]) -> str | None:
    """Why a run cannot be used: its points alone would make it look like a shorter one."""
    if r["failure"] is not None:
        return str(r["failure"])
    if not r["points"]:
        return "no point was measured"
    for p in r["points"]:
        if not (p["train_flops"] > 0 and p["loss"] > 0 and math.isfinite(p["loss"])):
            return f"loss {p['loss']} at step {p['step']} has no logarithm"
    return None


def _tell_apart(structures: Sequence[_Structure]) -> None:
    """Add θ to names that several structures share, and to those without a family."""
    count = Counter(s.name for s in structures)
    for s in structures:
        if count[s.name] > 1 or s.name == "einsum":
            s.name = f"{s.name} {s.theta}"


def _width_note(s: _Structure, best: Counter[int]) -> str | None:
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
        lines.append(
            f"{task['task']}: {task['runs']} runs to {budget}, {seeds(len(task['seeds']))}"
        )
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
