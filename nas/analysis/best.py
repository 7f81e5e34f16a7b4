"""The best structure for a budget, against dense, with what is known of its error.

A *model* is a structure at one width.  Its runs differ in their seeds and lengths.  Where models
were run with several seeds, their spread about their models' means, in logarithms and pooled over
all models, is what a run varies by; comparisons and intervals rest on it.  Where every model has
one run, that is not known, no interval over runs is claimed, and models are compared over the
samples of the validation data alone, on which all runs are judged alike.

Runs that were chosen because they came out low are biased low (the winner's curse).  So a model
that was confirmed with fresh seeds is judged by these alone, and a model with a single run comes
before one with several only if it is better beyond the noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nas.analysis.intervals import Interval, around, half_width, t_quantile
from nas.analysis.scaling import Curve, multiplier_over_dense, summarise_multiplier
from nas.errors import NotFound
from nas.records.answers import Candidate, Multiplier, Rival
from nas.records.run import OfRun
from nas.store import Run

#: (trial, step) of points → the loss of each validation sample at each.
Windows = Callable[[Sequence[tuple[int, int]]], list[tuple[float, ...]]]

#: Models that were read this far below the budget say nothing of the noise at it.
_NOISE_RANGE = 4.0

OVER_SEEDS = (
    "95% over runs with other seeds: Student's t on the spread of runs about their models' means, "
    "pooled over all models that were run more than once"
)
OVER_SAMPLES = (
    "95% over the sampling of the validation data only; run-to-run variation is not included, "
    "for each model was run once"
)


@dataclass(frozen=True, slots=True)
class Reading:
    """A run at a budget, on its curve taken as straight in log-log between evaluations."""

    run: Run
    loss: float
    #: steps of the evaluations on either side, and how far between them
    steps: tuple[int, int]
    share: float


class Shown:
    """What is compared with others, and stands in answers."""

    def shown(self) -> dict[str, Any]:
        """The fields of its `Candidate`."""
        raise NotImplementedError

    @property
    def candidate(self) -> Candidate:
        """What users see of it."""
        return Candidate(**self.shown())

    def rival(self, difference: float, interval: Interval | None) -> Rival:
        """The same, with its loss minus another's and the interval of that."""
        return Rival(**self.shown(), difference=difference, difference_interval=interval)


#: Fields of a `Candidate` that are not those of its run.
_OF_CANDIDATE = Candidate.model_fields.keys() - OfRun.model_fields.keys()


@dataclass(frozen=True)
class Contender(Shown):
    """A model at a budget: one reading a seed."""

    readings: tuple[Reading, ...]
    #: where it was read; below the budget where its runs end before
    train_flops: float
    steps: int

    @property
    def run(self) -> Run:
        """The first of its runs."""
        return self.readings[0].run

    @cached_property
    def log_loss(self) -> float:
        """Mean of the logarithms of its losses."""
        return math.fsum(math.log(r.loss) for r in self.readings) / len(self.readings)

    @property
    def loss(self) -> float:
        """Geometric mean of its losses, in the unit of the task."""
        return math.exp(self.log_loss) if len(self.readings) > 1 else self.readings[0].loss

    @property
    def seeds(self) -> int:
        return len(self.readings)

    @property
    def confirmed(self) -> bool:
        """Whether it is judged by confirmations."""
        return self.run.kind == "confirmation"

    def shown(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in _OF_CANDIDATE}
        return {**self.run.shared(), **own}


@dataclass(frozen=True, slots=True)
class Noise:
    """What a run varies by with its seed."""

    #: standard deviation of the logarithm of a loss
    sd: float
    degrees: int

    def half_width(self, variance: float, tests: int = 1) -> float:
        """Half an interval on logarithms, for `variance` in units of a run's own.

        `tests` intervals hold together (Bonferroni).
        """
        return t_quantile(self.degrees, tests) * self.sd * math.sqrt(variance)


@dataclass(frozen=True, slots=True)
class Answer:
    """The best measured structure within a budget."""

    best: Contender
    best_structured: Contender | None
    best_dense: Contender | None
    #: 95% interval of the best one's loss over runs; None where no model was run twice
    interval: Interval | None
    #: the same over the sampling of the validation data
    validation_interval: Interval | None
    #: the best dense model compared with the best structured one
    dense_difference: Rival | None
    multiplier: Multiplier | None
    structured_multiplier: Multiplier | None
    #: structures whose difference from the best may be 0, among the `compared` others
    indistinguishable: tuple[Rival, ...]
    compared: int
    noise: Noise | None

    @property
    def basis(self) -> str:
        """What the comparisons hold over."""
        return OVER_SEEDS if self.noise else OVER_SAMPLES


def best_for_budget(
    runs: Sequence[Run],
    budget: float,
    windows: Windows,
    axis: str = "train_flops",
) -> Answer:
    """The structure with the least expected loss within a budget.

    Parameters
    ----------
    runs
        Completed runs of one task: those near the front and every run of their models.
    budget
        In the unit of `axis`.
    windows
        Loss of each validation sample at given points.
    axis
        `train_flops`, or a field of a run that is one of `nas.store.AXES`.  Of such a field a run
        has one value, or None where it is not known; runs are then judged at their ends.

    Raises
    ------
    NotFound
        No completed run lies within the budget.
    """
    along_curve = axis == "train_flops"
    found = contenders(runs, budget) if along_curve else _at_ends(runs, budget, axis)
    if not found:
        raise NotFound(f"no completed run within {budget:.4g}")
    near = [c for c in found if not along_curve or c.train_flops * _NOISE_RANGE >= budget]
    noise = pooled_noise(near)
    leaders = _one_a_structure(found, noise)
    best = _choose(leaders, noise)
    others = sorted((c for c in leaders if c is not best), key=_order)
    structured = [c for c in leaders if not c.run.dense]
    dense = [c for c in leaders if c.run.dense]
    best_structured = _choose(structured, noise) if structured else None
    best_dense = _choose(dense, noise) if dense else None
    rivals = compare(best, others, noise, windows)
    difference = None
    if best_structured and best_dense:
        # the structured one was chosen among many too
        (difference,) = compare(best_structured, [best_dense], noise, windows, len(others))

    def multiplier(of: Contender | None) -> Multiplier | None:
        if of is None or best_dense is None or not along_curve:
            return None
        return _multiplier(of, best_dense, runs, budget)

    return Answer(
        best=best,
        best_structured=best_structured,
        best_dense=best_dense,
        interval=_interval(best, noise),
        validation_interval=_validation_interval(best, windows),
        dense_difference=difference,
        multiplier=multiplier(best),
        structured_multiplier=multiplier(best_structured),
        indistinguishable=tuple(
            r for r in rivals if r.difference_interval is None or r.difference_interval[0] <= 0.0
        ),
        compared=len(rivals),
        noise=noise,
    )


def _order(c: Contender) -> tuple[float, float, int]:
    return c.log_loss, c.train_flops, c.run.trial_id


# --- readings


def contenders(runs: Iterable[Run], budget: float) -> list[Contender]:
    """Every model that has a run within the budget, read at the budget or at its runs' ends."""
    models: dict[str, list[Run]] = {}
    for run in runs:
        if run.points and run.points[0].train_flops <= budget:
            models.setdefault(run.model, []).append(run)
    return [_read_model(of_model, budget) for of_model in models.values()]


def _read_model(runs: Sequence[Run], budget: float) -> Contender:
    at = min(budget, max(r.points[-1].train_flops for r in runs))
    step = runs[0].train_flops_per_step
    reach = [r for r in runs if r.points[0].train_flops <= at <= r.points[-1].train_flops + step]
    readings = tuple(_read(r, at) for r in one_a_seed(reach))
    # where no run lies at the budget itself, the lowest evaluation before it is meant
    ends = all(r.share == 0.0 for r in readings)
    steps = readings[0].steps[0] if ends else int(at / step + 1e-6)  # division may fall just short
    flops = next(p.train_flops for p in readings[0].run.points if p.step == steps) if ends else at
    return Contender(readings, flops, steps)


def one_a_seed(runs: Iterable[Run]) -> list[Run]:
    """The first run of every seed; where there are confirmations, these alone.

    Runs of one model with one seed are one run, read at different lengths.
    """
    listed = sorted(runs, key=lambda r: r.trial_id)
    fresh = [r for r in listed if r.kind == "confirmation"]
    seeds: dict[int, Run] = {}
    for run in fresh or listed:
        seeds.setdefault(run.seed, run)
    return [seeds[s] for s in sorted(seeds)]


def _read(run: Run, at: float) -> Reading:
    """The lowest loss that the run has come down to by `at`, which lies on its curve."""
    flops = np.array([p.train_flops for p in run.points])
    losses = np.array([p.loss for p in run.points])
    lowest = np.minimum.accumulate(losses)
    below = int(np.searchsorted(flops, at, side="right")) - 1
    first = _step_of_lowest(run, below)
    if below == len(flops) - 1 or lowest[below + 1] == lowest[below]:
        return Reading(run, float(lowest[below]), (first, first), 0.0)
    share = math.log(at / flops[below]) / math.log(flops[below + 1] / flops[below])
    if share <= 0.0 or lowest[below + 1] <= 0.0:
        return Reading(run, float(lowest[below]), (first, first), 0.0)
    log_loss = (1 - share) * math.log(lowest[below]) + share * math.log(lowest[below + 1])
    return Reading(run, math.exp(log_loss), (first, run.points[below + 1].step), share)


def _step_of_lowest(run: Run, last: int) -> int:
    return min(run.points[: last + 1], key=lambda p: (p.loss, p.step)).step


def _at_ends(runs: Iterable[Run], budget: float, axis: str) -> list[Contender]:
    """Models at the ends of their runs, of equal length each, whose value is within the budget."""
    groups: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        value = getattr(run, axis)
        if run.points and value is not None and value <= budget:
            groups.setdefault((run.model, run.steps), []).append(run)
    found = []
    for group in groups.values():
        last = [(r, r.points[-1]) for r in one_a_seed(group)]
        readings = tuple(Reading(r, p.loss, (p.step, p.step), 0.0) for r, p in last)
        found.append(Contender(readings, last[0][1].train_flops, last[0][1].step))
    return found


# --- noise and comparisons


def pooled_noise(found: Iterable[Contender]) -> Noise | None:
    """Spread of runs about their models' means, on logarithms; None without a repeated model."""
    repeated = [c for c in found if c.seeds > 1]
    degrees = sum(c.seeds - 1 for c in repeated)
    if not degrees:
        return None
    total = math.fsum((math.log(r.loss) - c.log_loss) ** 2 for c in repeated for r in c.readings)
    return Noise(math.sqrt(total / degrees), degrees)


def _one_a_structure(found: Iterable[Contender], noise: Noise | None) -> list[Contender]:
    """The best model of every structure."""
    structures: dict[str, list[Contender]] = {}
    for c in found:
        structures.setdefault(c.run.structure, []).append(c)
    return [_choose(of_structure, noise) for of_structure in structures.values()]


def _choose(found: Sequence[Contender], noise: Noise | None) -> Contender:
    """The lowest; a run that nothing has confirmed comes before what was run more than once, or
    with a fresh seed, only if it is lower beyond the noise."""
    sure = min((c for c in found if c.seeds > 1 or c.confirmed), key=_order, default=None)
    chosen = [c for c in found if c.seeds == 1 and not c.confirmed]
    single = min(chosen, key=_order, default=None)
    if sure is None or single is None:
        either = single or sure
        assert either is not None
        return either
    if noise is None:
        return sure
    margin = noise.half_width(1 + 1 / sure.seeds, len(chosen))
    return single if single.log_loss < sure.log_loss - margin else sure


def compare(
    best: Contender,
    others: Sequence[Contender],
    noise: Noise | None,
    windows: Windows,
    tests: int = 0,
) -> list[Rival]:
    """Differences from the best, whose intervals hold together for all of them, or for `tests`."""
    tests = max(tests, len(others))
    if noise is not None:
        rivals = []
        for c in others:
            ratio = c.log_loss - best.log_loss
            half = noise.half_width(1 / c.seeds + 1 / best.seeds, tests)
            difference = c.loss - best.loss
            rivals.append(c.rival(difference, around(best.loss, ratio, half, half)))
        return rivals
    base, *rest = _sample_losses([best, *others], windows)
    rivals = []
    for c, losses in zip(others, rest, strict=True):
        half = half_width(losses - base, tests)
        difference = c.loss - best.loss
        known = math.isfinite(half)
        interval = (difference - half, difference + half) if known else None
        rivals.append(c.rival(difference, interval))
    return rivals


def _sample_losses(found: Sequence[Contender], windows: Windows) -> list[NDArray[np.float64]]:
    """Loss of each validation sample, of the first run of each contender."""
    keys = [(c.run.trial_id, step) for c in found for step in c.readings[0].steps]
    got = [np.asarray(w, dtype=np.float64) for w in windows(keys)]
    shares = [c.readings[0].share for c in found]
    return [(1 - share) * got[2 * i] + share * got[2 * i + 1] for i, share in enumerate(shares)]


def _interval(best: Contender, noise: Noise | None) -> Interval | None:
    if noise is None:
        return None
    half = noise.half_width(1 / best.seeds)
    return math.exp(best.log_loss - half), math.exp(best.log_loss + half)


def _validation_interval(best: Contender, windows: Windows) -> Interval | None:
    (losses,) = _sample_losses([best], windows)
    half = half_width(losses)
    return (best.loss - half, best.loss + half) if math.isfinite(half) else None


# --- verdict

Verdict = Literal["structured is lower", "dense is lower", "no clear difference", "unconfirmed"]


def judge(found: Answer) -> tuple[Verdict, str]:
    """What is established of the best structured against the best dense model, and why.

    An interval over the validation samples alone establishes nothing: the lowest of many single
    runs is partly low by luck, and by how much is unknown.
    """
    structured, dense, difference = found.best_structured, found.best_dense, found.dense_difference
    if structured is None or dense is None or difference is None:
        missing = "structured" if structured is None else "dense"
        return "unconfirmed", f"no {missing} model was run within this budget to compare with"
    # all dense models are one structure
    of_many = f", the lowest of {found.compared}," if found.compared > 1 else ""
    single = [
        name
        for name, c in ((f"structured model{of_many}", structured), ("dense model", dense))
        if c.seeds == 1 and not c.confirmed
    ]
    if single:
        were = "were each" if len(single) > 1 else "was"
        return "unconfirmed", (
            f"the best {' and the best '.join(single)} {were} run with one seed, and other seeds "
            "may turn the result; `einsum-nas confirm` runs the best ones anew"
        )
    if found.noise is None or difference.difference_interval is None:
        return "unconfirmed", "no model was run with two seeds, so what these change is unknown"
    low, high = difference.difference_interval
    if low > 0:
        return "structured is lower", "the 95% interval of the difference over seeds is above 0"
    if high < 0:
        return "dense is lower", "the 95% interval of the difference over seeds is below 0"
    return "no clear difference", "the 95% interval of the difference over seeds contains 0"


# --- multiplier


def _multiplier(
    of: Contender, dense: Contender, runs: Sequence[Run], budget: float
) -> Multiplier | None:
    """At every seed that the readings have in common, or else that any of the runs have; None
    where dense and the structure share no seed: then nothing is paired."""
    if of.run.dense:
        return Multiplier(value=1.0, kind="exact", interval=(1.0, 1.0), seeds=of.seeds)
    own = _curves(r for r in runs if r.structure == of.run.structure)
    references = _curves(r for r in runs if r.dense)
    read = {r.run.seed for r in of.readings} & {r.run.seed for r in dense.readings}
    bounds = {
        seed: bound
        for seed in sorted(read or own.keys() & references.keys())
        if (bound := multiplier_over_dense(own[seed], references[seed], budget))
    }
    if not bounds:
        return None
    summary = summarise_multiplier(bounds)
    kinds = {b.kind for b in bounds.values()}
    made = partial(Multiplier, seeds=len(bounds))
    if summary.value is not None:
        return made(value=summary.value, kind="exact", interval=summary.interval)
    if "less_than" not in kinds:
        return made(value=summary.least, kind="at_least", interval=None)
    if "at_least" not in kinds:
        return made(value=summary.most, kind="less_than", interval=None)
    reason = "with some seeds only a lower bound is known, with others only an upper one"
    return made(value=None, kind="undetermined", interval=None, reason=reason)


def _curves(runs: Iterable[Run]) -> Mapping[int, list[Curve]]:
    """The curves of every seed."""
    found: dict[int, list[Curve]] = {}
    for run in runs:
        flops = np.array([p.train_flops for p in run.points])
        found.setdefault(run.seed, []).append((flops, np.array([p.loss for p in run.points])))
    return found
