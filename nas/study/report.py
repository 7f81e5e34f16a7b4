"""What a study shows, as numbers with their intervals and as one page that needs no network.

Of every structure and seed, the least loss over its widths within a budget is compared on logs with
that of the same seed of others.  Intervals are 95% t intervals over seeds.
"""

from __future__ import annotations

import html
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
    Estimate,
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
from nas.errors import InvalidInput
from nas.taxonomy import taxonomy
from nas.theta import DENSE, SUM_TOLERANCE, Theta

Json = dict[str, Any]

REFERENCE = "ω = 0, ψ = 1"
GROUPS = (REFERENCE, "ω = 0, ψ < 1", "ω > 0")
#: Shares of the full budget at which structures are compared.
SHARES = {"C": 1.0, "C/2": 0.5, "C/4": 0.25}
#: Two losses this close, as a share, are "about as good": what counts as on the frontier too.
EQUIVALENCE = HULL_TOLERANCE
_FEWEST_SEEDS = 3
#: A run that ended below this share of the budget is not one of the same length.
_FULL = 0.95

#: Task → start of a structure's name → exponent b in the papers.  regression: arXiv:2410.02117,
#: the slope from loss .0142 to .00295 over 8e12 to 8e15 forward MACs × tokens; images: CIFAR-10
#: train error of MLPs, arXiv:2406.06248, read off a bar chart.
PAPER_EXPONENTS: Mapping[str, Mapping[str, float]] = {
    "regression": {"dense": 0.23, "kronecker": 0.17},
    "images": {
        "dense": 0.104, "btt": 0.119, "monarch": 0.095, "low-rank": 0.095, "kronecker": 0.037,
        "tensor-train": 0.050,
    },
}  # fmt: skip
#: Most forward MACs per sample of the models whose order on regression is compared.
ORDER_MACS = 173_312
#: The papers' layers at up to `ORDER_MACS`, each trained once (1,500 steps of 1,024, cosine):
#: θ → test MSE.
_ORDER: Mapping[tuple[float, ...], float] = {
    (1 / 2, 0, 1 / 2, 0, 1 / 2, 1 / 2, 0): 0.0375,
    (2 / 3, 0, 1 / 3, 0, 1 / 3, 2 / 3, 0): 0.0400,
    (1 / 2, 1 / 4, 1 / 4, 1 / 4, 1 / 2, 1 / 4, 0): 0.0428,
    DENSE.values: 0.0460,
    (1 / 2, 1 / 2, 0, 1 / 2, 1 / 2, 0, 0): 0.0572,
    (1, 0, 0, 0, 1, 0, 1 / 2): 0.0739,
}

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
    analysed = {task: _Task(task, rows) for task, rows in tasks.items()}
    environments = {_environment(r["environment"]) for r in records}
    return {
        "scale": scale,
        "confidence": 0.95,
        "runs": len(records),
        "failed": sum(len(t.failures) for t in analysed.values()),
        "environments": sorted(environments),
        "notes": list(NOTES),
        "tasks": [t.as_json() for t in analysed.values()],
        "findings": _findings(analysed),
    }


def _environment(environment: Mapping[str, Any]) -> str:
    plain = {k: v for k, v in environment.items() if isinstance(v, str | int | float | bool)}
    return ", ".join(f"{k} {v}" for k, v in sorted(plain.items()))


class _Task:
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
                f"{len(self.seeds)} seed(s): {_FEWEST_SEEDS} are the fewest that give a useful "
                "interval" + ("; here it is unknown" if len(self.seeds) == 1 else "")
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
            name: _estimate(
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
            "loss": _estimate(geometric_over_seeds(losses) if losses else None),
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
            "ratio": _estimate(ratio),
            "multiplier": _multiplier(summarise_multiplier(bounds)) if bounds else None,
            "verdict": verdict_of(_estimate(ratio)),
            "text": verdict_text(_estimate(ratio), "dense"),
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
            "b": _estimate(mean_over_seeds(exponents) if exponents else None),
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


def _estimate(e: Estimate | None) -> Json | None:
    if e is None:
        return None
    return {
        "value": e.value,
        "interval": list(e.interval) if e.interval else None,
        "by_seed": {str(k): v for k, v in sorted(e.by_seed.items())},
    }


def _multiplier(m: Multiplier) -> Json:
    return {
        "value": m.value,
        "interval": list(m.interval) if m.interval else None,
        "least": m.least,
        "most": m.most,
        "censored": m.censored,
        "by_seed": {str(k): {"value": b.value, "kind": b.kind} for k, b in m.by_seed.items()},
        "text": _multiplier_text(m),
    }


def _multiplier_text(m: Multiplier) -> str:
    n = len(m.by_seed)
    if m.value is not None:
        interval = list(m.interval) if m.interval else None
        return _number({"value": m.value, "interval": interval, "by_seed": m.by_seed}, digits=2)
    censored = f"{m.censored} of {_seeds(n)} censored"
    if m.least is not None:
        return f"≥ {m.least:.2f} ({censored})"
    if m.most is not None:
        return f"{'<' if m.censored == n else '≤'} {m.most:.2f} ({censored})"
    signs = {"exact": "", "at_least": "≥ ", "less_than": "< "}
    return ", ".join(f"{signs[b.kind]}{b.value:.2f}" for b in m.by_seed.values()) + f" ({censored})"


def verdict_of(ratio: Mapping[str, Any] | None) -> str:
    """worse | better | undecided (the interval has 1 inside, or is unknown) | unknown."""
    if ratio is None:
        return "unknown"
    if ratio["interval"] is None or ratio["interval"][0] <= 1 <= ratio["interval"][1]:
        return "undecided"
    return "worse" if ratio["interval"][0] > 1 else "better"


def verdict_text(ratio: Mapping[str, Any] | None, than: str) -> str:
    """The verdict as a sentence with its numbers."""
    if ratio is None:
        return f"not compared with {than}: no seed has both"
    start = {
        "worse": f"worse than {than}",
        "better": f"better than {than}",
        "undecided": f"cannot be told apart from {than}",
    }[verdict_of(ratio)]
    return f"{start}: loss × {_number(ratio)}"


def _seeds(n: int) -> str:
    return f"{n} seed{'s' if n != 1 else ''}"


def _number(e: Mapping[str, Any] | None, digits: int = 3) -> str:
    """A ratio and its interval: `1.230 (95% 1.180–1.290, 3 seeds)`."""
    if e is None:
        return "—"
    value, n = f"{e['value']:.{digits}f}", _seeds(len(e["by_seed"]))
    if e["interval"] is None:
        return f"{value} ({n}, interval unknown)"
    low, high = e["interval"]
    return f"{value} (95% {low:.{digits}f}–{high:.{digits}f}, {n})"


def _plain(e: Mapping[str, Any] | None) -> str:
    """A loss or an exponent: four significant digits, and the interval."""
    if e is None:
        return "—"
    if e["interval"] is None:
        return f"{e['value']:.4g} (1 seed, interval unknown)"
    low, high = e["interval"]
    return f"{e['value']:.4g} (95% {low:.4g}–{high:.4g}, {_seeds(len(e['by_seed']))})"


# What the papers found, beside what is found here


def _findings(tasks: Mapping[str, _Task]) -> list[Json]:
    rows = []
    for group, cites in (("ω > 0", "2410.02117"), ("ω = 0, ψ < 1", "2410.02117")):
        for name, task in tasks.items():
            if task.budget is None:
                continue
            ratio = task.compared(lambda b, t=task, g=group: t.mean_of(g, b)[0])["C"]
            agreement = {"worse": "agrees", "better": "contradicts"}
            rows.append(
                _finding(
                    f"{group} is worse than {REFERENCE}", cites, name,
                    verdict_text(ratio, REFERENCE), agreement.get(verdict_of(ratio), "undecided"),
                )
            )  # fmt: skip
    rows += [row for name, task in tasks.items() for row in _against_dense(name, task)]
    rows += _slopes(tasks.get("regression"))
    rows += _order(tasks.get("regression"))
    return rows


def _finding(paper: str, cites: str, task: str, here: str, agreement: str) -> Json:
    """agreement: agrees | partly | differs | contradicts | undecided | not run."""
    return {"paper": paper, "cites": f"arXiv:{cites}", "task": task, "here": here,
            "agreement": agreement}  # fmt: skip


def _against_dense(name: str, task: _Task) -> Iterator[Json]:
    """The structured members of the reference group together, against dense."""
    if name not in ("text", "regression", "images"):
        return
    paper = f"structures of {REFERENCE} are {{}} dense per FLOP"
    paper = paper.format("about as good as" if name == "text" else "better than")
    cites = "2410.02117" if name != "images" else "2406.06248"
    ratio = None
    if task.dense is not None and task.budget is not None:
        budget = task.budget
        others = [s for s in task.members(REFERENCE) if s is not task.dense]
        mean, _ = common_mean([s.log_losses(budget) for s in others])
        ratio = _estimate(ratio_over_seeds(mean, task.dense.log_losses(budget)))
    if name == "text":
        agreement = _equivalent(ratio)
        paper += f" (here: loss within {EQUIVALENCE:.0%})"
    else:
        agreement = {"better": "agrees", "worse": "contradicts"}.get(verdict_of(ratio), "undecided")
    yield _finding(paper, cites, name, verdict_text(ratio, "dense"), agreement)


def _equivalent(ratio: Mapping[str, Any] | None) -> str:
    """Whether the whole interval lies within the margin of 1, or outside of it."""
    if ratio is None or ratio["interval"] is None:
        return "undecided"
    low, high = ratio["interval"]
    if low >= 1 / (1 + EQUIVALENCE) and high <= 1 + EQUIVALENCE:
        return "agrees"
    return "differs" if low > 1 + EQUIVALENCE or high < 1 / (1 + EQUIVALENCE) else "undecided"


def _slopes(task: _Task | None) -> Iterator[Json]:
    paper = "loss falls faster with compute for dense (b ≈ .23) than for Kronecker (b ≈ .17)"
    if task is None:
        yield _finding(paper, "2410.02117", "regression", "—", "not run")
        return
    dense, kronecker = (
        next((task.exponents(s)[0] for s in task.structures if s.name.startswith(name)), {})
        for name in ("dense", "kronecker")
    )
    common = sorted(dense.keys() & kronecker.keys())
    if not common:
        yield _finding(paper, "2410.02117", "regression", "no seed has both exponents", "undecided")
        return
    less = _estimate(mean_over_seeds({k: dense[k] - kronecker[k] for k in common}))
    assert less is not None
    both = [_estimate(mean_over_seeds(b)) for b in (dense, kronecker)]
    here = (
        f"dense b = {_plain(both[0])}, Kronecker b = {_plain(both[1])}, difference {_plain(less)}; "
        "the papers' runs have 5e13 to 5e16 train FLOPs, so only the order is compared"
    )
    low, high = less["interval"] or (0.0, 0.0)
    yield _finding(
        paper, "2410.02117", "regression", here,
        "agrees" if low > 0 else "contradicts" if high < 0 else "undecided",
    )  # fmt: skip


def _order(task: _Task | None) -> Iterator[Json]:
    """The order of structures among models of at most `ORDER_MACS` forward MACs per sample."""
    cites = "2410.02117, layers of its public code, each trained once"
    paper = f"order of losses at {ORDER_MACS // 1000}k forward MACs: "
    if task is None or task.budget is None:
        yield _finding(paper, cites, "regression", "—", "not run")
        return
    found: list[tuple[float, float, str, dict[int, float]]] = []
    for s in task.structures:
        known = next((mse for t, mse in _ORDER.items() if _close(s.theta, t)), None)
        logs = s.log_losses(task.budget, ORDER_MACS)
        if known is not None and logs:
            found.append((mean_over_seeds(logs).value, known, s.name, logs))
    found.sort(key=lambda row: row[1])
    paper += " < ".join(f"{name} {known:.4f}" for _, known, name, _ in found)
    if len(found) < 2:
        here, agreement = "fewer than two of these structures have such models", "not run"
    else:
        here = " < ".join(f"{name} {math.exp(mean):.4f}" for mean, _, name, _ in sorted(found))
        verdicts = [
            verdict_of(_estimate(ratio_over_seeds(b[3], a[3])))
            for i, a in enumerate(found)
            for b in found[i + 1 :]
        ]
        count = Counter(verdicts)
        here += (
            f"; of {len(verdicts)} pairs {count['worse']} are in this order at 95%, "
            f"{count['better']} in the opposite one"
        )
        agreement = _order_agreement(count["worse"], count["better"], len(verdicts))
    yield _finding(paper, cites, "regression", here, agreement)


def _order_agreement(kept: int, turned: int, pairs: int) -> str:
    """From the pairs that are in the papers' order, and in the opposite one, at 95%."""
    if kept == pairs:
        return "agrees"
    if turned and not kept:
        return "contradicts"
    return "partly" if turned or 2 * kept >= pairs else "undecided"


def _close(theta: Theta, values: Sequence[float]) -> bool:
    return np.allclose(theta.values, Theta.of(values).canonical().values, atol=SUM_TOLERANCE)


def summary_lines(result: Mapping[str, Any]) -> list[str]:
    """The result in a few lines for a terminal."""
    lines = []
    for task in result["tasks"]:
        budget = "no finished run" if task["train_flops"] is None else _flops(task["train_flops"])
        lines.append(
            f"{task['task']}: {task['runs']} runs to {budget}, {_seeds(len(task['seeds']))}"
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


def _flops(value: float) -> str:
    return f"{value:.3g} train FLOPs"


# The page

_COLOURS = {REFERENCE: "#2563eb", "ω = 0, ψ < 1": "#a855f7", "ω > 0": "#e11d48"}
_DENSE, _PAPER = "#d97706", "#94a3b8"
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "pentagon")


def _colour(s: Mapping[str, Any]) -> str:
    return _DENSE if s["dense"] else _COLOURS[s["group"]]


def _layout(title: str, x: Json, y: Json, **more: Any) -> Json:
    axis = {"gridcolor": "rgba(128,128,128,.18)", "zeroline": False}
    return {
        "title": {"text": title, "font": {"size": 15}, "x": 0.01, "xanchor": "left"},
        "xaxis": {**axis, **x},
        "yaxis": {**axis, **y},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "color": "#64748b", "size": 12},
        "margin": {"l": 64, "r": 16, "t": 48, "b": 48},
        "legend": {"orientation": "h", "y": -0.16, "yanchor": "top", "itemwidth": 30},
        "hovermode": "closest",
        "template": {},
        **more,
    }


def _flops_axis() -> Json:
    return {"title": {"text": "train FLOPs"}, "type": "log", "exponentformat": "power"}


def _loss_axis() -> Json:
    # the unit stands in the text above: the longest would not fit beside a small figure
    return {"title": {"text": "validation loss"}, "type": "log", "nticks": 8, "tickformat": ".3~g"}


def _figures(task: Mapping[str, Any]) -> dict[str, Json]:
    """Figures of a task by the id of their place in the page."""
    drawn = {
        "ratios": _draw_ratios(task),
        "exponents": _draw_exponents(task),
        "curves": _draw_curves(task),
        "frontiers": _draw_frontiers(task),
    }
    for key, sign in (("omega", "ω"), ("psi", "ψ"), ("nu", "ν")):
        drawn[key] = _draw_against(task, key, sign)
    return {f"{html.escape(task['task'])}-{name}": figure for name, figure in drawn.items()}


def _draw_curves(task: Mapping[str, Any]) -> Json:
    traces, seen = [], set()
    # dense last, on top of the others
    for s in sorted(task["structures"], key=lambda s: s["dense"]):
        kind = "dense" if s["dense"] else s["group"]
        for c in s["curves"]:
            label = f"{s['name']}, width {c['width']}, seed {c['seed']}"
            traces.append({
                "x": c["train_flops"], "y": c["loss"], "mode": "lines", "name": html.escape(kind),
                "legendgroup": kind, "showlegend": kind not in seen, "text": html.escape(label),
                "hovertemplate": "%{text}<br>%{x:.3g} FLOPs: %{y:.4g}<extra></extra>",
                "opacity": 0.9 if s["dense"] else 0.45,
                "line": {"color": _colour(s), "width": 2 if s["dense"] else 1.3},
            })  # fmt: skip
            seen.add(kind)
    return {"data": traces, "layout": _layout("Every run", _flops_axis(), _loss_axis())}


def _draw_frontiers(task: Mapping[str, Any]) -> Json:
    """Compute-optimal points of all seeds, and the line of each seed through them."""
    traces = []
    for i, s in enumerate(task["structures"]):
        name, marker = html.escape(s["name"]), _SYMBOLS[i % len(_SYMBOLS)]
        for j, f in enumerate(s["exponent"]["frontiers"]):
            shared = {"name": name, "legendgroup": name, "x": f["train_flops"]}
            traces.append({
                **shared, "y": f["loss"], "mode": "markers", "showlegend": j == 0,
                "text": [f"{name}, seed {f['seed']}, width {w:g}" for w in f["width"]],
                "hovertemplate": "%{text}<br>%{x:.3g} FLOPs: %{y:.4g}<extra></extra>",
                "marker": {"color": _colour(s), "size": 6, "symbol": marker, "opacity": 0.65},
            })  # fmt: skip
            if f["b"] is not None:
                line = [math.exp(math.log(f["a"]) - f["b"] * math.log(x)) for x in f["train_flops"]]
                traces.append({
                    **shared, "y": line, "mode": "lines", "showlegend": False,
                    "hoverinfo": "skip", "line": {"color": _colour(s), "width": 1}, "opacity": 0.6,
                })  # fmt: skip
    title = "Compute-optimal frontier of each structure and seed, with its power law"
    layout = _layout(title, _flops_axis(), _loss_axis(), legend={"font": {"size": 11}})
    return {"data": traces, "layout": layout}


def _bars(estimates: Sequence[Mapping[str, Any]]) -> Json:
    """Error bars; of length 0 where the interval is unknown, which the tooltip tells."""
    above = [e["interval"][1] - e["value"] if e["interval"] else 0 for e in estimates]
    below = [e["value"] - e["interval"][0] if e["interval"] else 0 for e in estimates]
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below,
            "thickness": 1.3, "width": 4}  # fmt: skip


def _forest(
    task: Mapping[str, Any], title: str, x: Json, value: Any, number: Any, extra: Sequence[Json]
) -> Json:
    """One line a structure with its interval, in the order of the table."""
    rows = [(s, value(s)) for s in reversed(task["structures"]) if value(s) is not None]
    traces = [
        {
            "x": [e["value"]], "y": [html.escape(s["name"])], "mode": "markers",
            "showlegend": False, "error_x": {**_bars([e]), "color": _colour(s)},
            "marker": {"color": _colour(s), "size": 9},
            "text": html.escape(f"{s['name']}: {number(e)}"), "hoverinfo": "text",
        }
        for s, e in rows
    ]  # fmt: skip
    layout = _layout(title, x, {"automargin": True, "type": "category"})
    return {"data": [*traces, *extra], "layout": layout}


def _draw_ratios(task: Mapping[str, Any]) -> Json:
    x = {"title": {"text": f"loss ÷ mean of {REFERENCE}, same seed"}, "type": "log",
         "tickformat": ".3~g", "nticks": 8}  # fmt: skip
    figure = _forest(
        task, "Loss at the full budget, against the reference", x,
        lambda s: s["ratios"]["C"], _number, [],
    )  # fmt: skip
    figure["layout"]["shapes"] = [{
        "type": "line", "x0": 1, "x1": 1, "yref": "paper", "y0": 0, "y1": 1,
        "line": {"dash": "dot", "color": _PAPER, "width": 1},
    }]  # fmt: skip
    return figure


def _draw_exponents(task: Mapping[str, Any]) -> Json:
    known = [s for s in task["structures"] if s["exponent"]["paper"] is not None]
    papers = {
        "x": [s["exponent"]["paper"] for s in known], "mode": "markers", "name": "papers",
        "y": [html.escape(s["name"]) for s in known],
        "marker": {"color": _PAPER, "size": 11, "symbol": "diamond-open", "line": {"width": 2}},
        "hovertemplate": "papers: b = %{x}<extra></extra>",
    }  # fmt: skip
    return _forest(
        task, "Exponent b of loss = a · C^(-b)", {"title": {"text": "b"}},
        lambda s: s["exponent"]["b"], _plain, [papers] if known else [],
    )  # fmt: skip


def _draw_against(task: Mapping[str, Any], key: str, sign: str) -> Json:
    shown = [s for s in task["structures"] if s["loss"] is not None]
    traces = []
    for s in shown:
        label = html.escape(f"{s['name']}: {_plain(s['loss'])}")
        traces.append({
            "x": [s[key]], "y": [s["loss"]["value"]], "mode": "markers", "showlegend": False,
            "marker": {"color": _colour(s), "size": 8}, "text": label, "hoverinfo": "text",
            "error_y": {**_bars([s["loss"]]), "color": _colour(s)},
        })  # fmt: skip
    x = {"title": {"text": sign}, "range": [-0.06, 1.06]}
    return {"data": traces, "layout": _layout(f"Loss against {sign}", x, _loss_axis())}


def render(result: Mapping[str, Any]) -> str:
    """The result as one HTML page with plotly.js inside."""
    # both take a while to import, and only this function needs them
    from jinja2 import Environment
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=_number, plain=_plain, flops=_flops)
    return environment.from_string(_PAGE).render(
        result=result,
        figures={k: v for task in result["tasks"] for k, v in _figures(task).items()},
        plotly=Markup(get_plotlyjs()),
        style=Markup(_STYLE),
        dense=_DENSE,
        colours=_COLOURS,
    )


_STYLE = """
:root { color-scheme: light dark; --bg: #f8fafc; --card: #fff; --text: #0f172a; --soft: #64748b; --line: #e2e8f0; --accent: #2563eb; }
@media (prefers-color-scheme: dark) {
  :root { --bg: #0b1120; --card: #131c31; --text: #e2e8f0; --soft: #94a3b8; --line: #24304a; --accent: #60a5fa; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1280px; margin: 0 auto; padding: 1.2rem 1.5rem 3rem; }
h1 { font-size: 1.5rem; margin: .4rem 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .3rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .5rem; }
.soft, small { color: var(--soft); font-size: .88rem; }
small { display: block; font-size: .8rem; font-weight: 400; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow-x: auto; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); gap: 1rem; margin-top: 1rem; }
.plots.three { grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); }
.plots .card { padding: .5rem; min-width: 0; }
.curves, .frontiers { grid-column: 1 / -1; }
.plot { height: 420px; }
.three .plot { height: 300px; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; }
th, td { padding: .45rem .65rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 550; color: var(--soft); vertical-align: bottom; }
tbody tr:last-child td { border-bottom: 0; }
td.n { font-variant-numeric: tabular-nums; white-space: nowrap; }
td.n small { white-space: normal; }
td.text { min-width: 13rem; }
.dot { display: inline-block; width: .65rem; height: .65rem; border-radius: 50%; margin-right: .45rem; }
.tag { padding: .05rem .55rem; border-radius: 1rem; font-size: .8rem; white-space: nowrap; background: var(--line); color: var(--text); }
a { color: var(--accent); }
.agrees { background: #dcfce7; color: #15803d; }
.partly, .differs { background: #fef3c7; color: #b45309; }
.contradicts { background: #fee2e2; color: #b91c1c; }
.warning { border-left: 3px solid #d97706; padding: .2rem .8rem; margin: .5rem 0; }
ul { padding-left: 1.2rem; }
"""  # noqa: E501

_PAGE = """\
{% macro split(t) %}{{ t.split(" (")[0] }}{% if " (" in t %}<small>({{ t.split(" (")[1] }}</small>{% endif %}{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Structured layers per FLOP: {{ result.scale }}</title>
<style>{{ style }}</style>
<script>{{ plotly }}</script>
</head>
<body><main>
<h1>Structured layers per FLOP</h1>
<p class="soft">Scale {{ result.scale }}: {{ result.runs }} runs, {{ result.failed }} failed. \
After <a href="https://arxiv.org/abs/2410.02117">arXiv:2410.02117</a> and \
<a href="https://arxiv.org/abs/2406.06248">arXiv:2406.06248</a>. \
{% for e in result.environments %}{{ e }}{% if not loop.last %}; {% endif %}{% endfor %}</p>

<h2>The papers' findings, and what is seen here</h2>
<div class="card"><table>
<thead><tr><th>papers' finding</th><th>task</th><th>here</th><th></th></tr></thead>
<tbody>
{% for f in result.findings %}
<tr><td>{{ f.paper }}<small>{{ f.cites }}</small></td><td>{{ f.task }}</td><td>{{ f.here }}</td>
<td><span class="tag {{ f.agreement }}">{{ f.agreement }}</span></td></tr>
{% endfor %}
</tbody></table></div>

{% for task in result.tasks %}
<h2>Task {{ task.task }}</h2>
<p class="soft">{{ task.recipe.name }}: {{ task.runs }} runs, seeds {{ task.seeds|join(", ") }}. \
{% if task.train_flops %}Full budget C = {{ task.train_flops|flops }} a run. {% endif %}\
Loss: {{ task.loss_unit }}, on validation data.</p>
{% for w in task.warnings %}<p class="warning">{{ w }}</p>{% endfor %}

<h3>Groups of structures</h3>
<div class="card"><table>
<thead><tr><th>group</th><th>structures</th>
{% for b in ["C", "C/2", "C/4"] %}<th>loss ÷ reference<small>within {{ b }}</small></th>{% endfor %}<th>at C</th></tr></thead>
<tbody>
{% for g in task.groups %}
<tr><td class="n"><span class="dot" style="background:{{ colours[g.group] }}"></span>{{ g.group }}</td>
<td>{{ g.members|join("; ") }}{% if g.left_out %}<small>not in the mean, for seeds are missing: {{ g.left_out|join("; ") }}</small>{% endif %}</td>
{% for b in ["C", "C/2", "C/4"] %}<td class="n">{% if g.verdict == "reference" %}1{% else %}{{ split(g.ratios[b]|number) }}{% endif %}</td>{% endfor %}
<td class="text">{{ g.text }}</td></tr>
{% endfor %}
</tbody></table></div>

<div class="plots">
{% for name in ["ratios", "exponents", "curves", "frontiers"] %}<div class="card {{ name }}"><div class="plot" id="{{ task.task }}-{{ name }}"></div></div>
{% endfor %}
</div>
<div class="plots three">
{% for name in ["omega", "psi", "nu"] %}<div class="card"><div class="plot" id="{{ task.task }}-{{ name }}"></div></div>
{% endfor %}
</div>
<p class="soft">Dense is <span class="dot" style="background:{{ dense }};margin:0 .2rem"></span>, a member of the reference group. \
Bars are 95% t intervals over seeds; a point without a bar has one seed.</p>

<h3>Structures at the full budget</h3>
<div class="card"><table>
<thead><tr><th>structure</th><th>loss<small>{{ task.loss_unit }}</small></th>
<th>loss ÷ reference<small>mean of ω = 0, ψ = 1</small></th><th>loss ÷ dense</th><th>compute multiplier<small>over dense</small></th>
<th>exponent b<small>papers' beside it</small></th><th>widths<small>best by seed</small></th></tr></thead>
<tbody>
{% for s in task.structures %}
<tr><td><span class="dot" style="background:{{ dense if s.dense else colours[s.group] }}"></span>{{ s.name }}
<small>ω {{ "%.3g"|format(s.omega) }}, ψ {{ "%.3g"|format(s.psi) }}, ν {{ "%.3g"|format(s.nu) }}</small>
{% if s.missing %}<small>incomplete: {% for m in s.missing %}width {{ m.width }} seed {{ m.seed }}{% if not loop.last %}, {% endif %}{% endfor %} missing</small>{% endif %}</td>
<td class="n">{{ split(s.loss|plain) }}</td><td class="n">{{ split(s.ratios["C"]|number) }}<small>{{ s.verdict }}</small></td>
<td class="n">{% if s.over_dense %}{{ split(s.over_dense.ratio|number) }}<small>{{ s.over_dense.verdict }}</small>{% elif s.dense %}1{% else %}—{% endif %}</td>
<td class="n">{% if s.over_dense and s.over_dense.multiplier %}{{ split(s.over_dense.multiplier.text) }}{% elif s.dense %}1{% else %}—{% endif %}</td>
<td class="n">{{ split(s.exponent.b|plain) }}{% if s.exponent.paper %}<small>papers: {{ s.exponent.paper }}</small>{% endif %}
{% for r in s.exponent.reasons %}<small>{{ r }}</small>{% endfor %}</td>
<td class="text">{{ s.widths|join(", ") }}<small>{% for k, w in s.best_widths.items() %}seed {{ k }}: {{ w }}{% if not loop.last %}, {% endif %}{% endfor %}</small>
{% if s.width_note %}<small>{{ s.width_note }}</small>{% endif %}</td></tr>
{% endfor %}
</tbody></table></div>

{% if task.failures %}
<h3>Failed runs</h3>
<p class="soft">In no figure and no number above.</p>
<div class="card"><table><thead><tr><th>structure</th><th>width</th><th>seed</th><th>reason</th></tr></thead><tbody>
{% for f in task.failures %}<tr><td>{{ f.name }}</td><td>{{ f.width }}</td><td>{{ f.seed }}</td><td>{{ f.reason }}</td></tr>
{% endfor %}</tbody></table></div>
{% endif %}
{% endfor %}

<h2>What the numbers mean</h2>
<ul class="soft">{% for n in result.notes %}<li>{{ n }}</li>{% endfor %}</ul>
</main>
<script>
const figures = {{ figures|tojson }};
for (const [id, figure] of Object.entries(figures))
  Plotly.newPlot(document.getElementById(id), figure.data, figure.layout, {responsive: true, displayModeBar: false});
</script>
</body></html>
"""  # noqa: E501
