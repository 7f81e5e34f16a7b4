"""The runs of one task of a study, by structure, and what is compared of them.

Of every structure and seed, the least loss over its widths within a budget is compared on logs with
that of the same seed of others.  Intervals are 95% t intervals over seeds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nas.analysis.scaling import (
    MIN_POINTS,
    Curve,
    common_mean,
    compute_optimal,
    fit_power_law,
    loss_at,
    ratio_over_seeds,
)
from nas.designs.taxonomy import taxonomy
from nas.designs.theta import DENSE, SUM_TOLERANCE, Theta
from nas.errors import InvalidInput
from nas.study.wording import REFERENCE, estimate

Json = dict[str, Any]

GROUPS = (REFERENCE, "ω = 0, ψ < 1", "ω > 0")
#: Shares of the full budget at which structures are compared.
SHARES = {"C": 1.0, "C/2": 0.5, "C/4": 0.25}


@dataclass
class Structure:
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
        by_theta: dict[Theta, Structure] = {}
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

    def _add(self, r: Mapping[str, Any], by_theta: dict[Theta, Structure]) -> None:
        theta = Theta.of(r["theta"]).canonical()
        if theta not in by_theta:
            by_theta[theta] = Structure(str(r["name"]), theta, group_of(theta))
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

    def members(self, group: str) -> list[Structure]:
        return [s for s in self.structures if s.group == group]

    def mean_of(self, group: str, budget: float) -> tuple[dict[int, float], list[Structure]]:
        """Mean log loss of a group by seed, and the structures it is taken over."""
        members = self.members(group)
        mean, used = common_mean([s.log_losses(budget) for s in members])
        return mean, [members[i] for i in used]

    def compared(self, logs_at: Callable[[float], Mapping[int, float]]) -> Json:
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

    def compared_group(self, group: str) -> Json:
        """`compared` of a group's mean."""
        return self.compared(lambda budget: self.mean_of(group, budget)[0])

    def missing(self, s: Structure) -> list[Json]:
        return [
            {"seed": k, "width": w}
            for k in self.seeds
            for w in sorted(s.widths)
            if w not in s.runs.get(k, {})
        ]

    def exponents(self, s: Structure) -> tuple[dict[int, float], list[str], list[Json]]:
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


def _tell_apart(structures: Sequence[Structure]) -> None:
    """Add θ to names that several structures share, and to those without a family."""
    count = Counter(s.name for s in structures)
    for s in structures:
        if count[s.name] > 1 or s.name == "einsum":
            s.name = f"{s.name} {s.theta}"
