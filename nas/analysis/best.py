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
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nas.analysis.intervals import Interval, around, half_width, t_quantile
from nas.analysis.scaling import Bound, Curve, Match, match_dense, summarise_multiplier
from nas.errors import NotFound
from nas.records.answers import Candidate, Multiplier, RealisedMultiplier, Rival
from nas.records.run import OfRun
from nas.store import AXES, Run, StoredPoint

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
    #: done up to there; between evaluations no whole number
    step: float
    train_flops: float
    train_seconds: float

    @classmethod
    def of(cls, run: Run, point: StoredPoint) -> Reading:
        """An evaluation of a run."""
        done = (float(point.step), point.train_flops, point.train_seconds)
        return cls(run, point.loss, (point.step, point.step), 0.0, *done)


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
    #: of the axis, where it was read; below the budget where its runs end before
    at: float
    #: up to there; of a budget in seconds the mean over its runs
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

    @property
    def device(self) -> str | None:
        """The one device that all of its runs ran on."""
        devices = {r.run.device for r in self.readings}
        return self.run.device if len(devices) == 1 else None

    @property
    def train_seconds(self) -> float | None:
        """Mean over its runs; None where these were not all timed, and on one device."""
        if self.device is None or not all(r.run.timed for r in self.readings):
            return None
        return _mean(r.train_seconds for r in self.readings)

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
    #: the same in measured seconds
    realised: RealisedMultiplier | None
    structured_realised: RealisedMultiplier | None
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
        Completed runs of one task: those near the front and every run of their models.  On an axis
        that is measured, they are runs of one device, and timed.
    budget
        In the unit of `axis`.
    windows
        Loss of each validation sample at given points.
    axis
        One of `nas.store.AXES`.  Runs are read along their curves, or, where a run has one value
        of it, or None where that is not known, at their ends.

    Raises
    ------
    NotFound
        No completed run lies within the budget.
    """
    along_curve = AXES[axis].along_curve
    found = contenders(runs, budget, axis) if along_curve else _at_ends(runs, budget, axis)
    if not found:
        raise NotFound(f"no completed run within {budget:.4g}")
    near = [c for c in found if not along_curve or c.at * _NOISE_RANGE >= budget]
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

    def multipliers(of: Contender | None) -> _Multipliers:
        if of is None or best_dense is None or not along_curve:
            return None, None
        return _multipliers(of, best_dense, runs, budget, axis)

    multiplier, realised = multipliers(best)
    structured_multiplier, structured_realised = multipliers(best_structured)
    return Answer(
        best=best,
        best_structured=best_structured,
        best_dense=best_dense,
        interval=_interval(best, noise),
        validation_interval=_validation_interval(best, windows),
        dense_difference=difference,
        multiplier=multiplier,
        structured_multiplier=structured_multiplier,
        realised=realised,
        structured_realised=structured_realised,
        indistinguishable=tuple(
            r for r in rivals if r.difference_interval is None or r.difference_interval[0] <= 0.0
        ),
        compared=len(rivals),
        noise=noise,
    )


def _order(c: Contender) -> tuple[float, float, int]:
    return c.log_loss, c.train_flops, c.run.trial_id


# --- readings


def contenders(runs: Iterable[Run], budget: float, axis: str = "train_flops") -> list[Contender]:
    """Every model that has a run within the budget, read at the budget or at its runs' ends.

    Parameters
    ----------
    axis
        One of `nas.store.AXES` along curves.
    """
    models: dict[str, list[Run]] = {}
    for run in runs:
        if run.points and getattr(run.points[0], axis) <= budget:
            models.setdefault(run.model, []).append(run)
    return [_read_model(of_model, budget, axis) for of_model in models.values()]


def _read_model(runs: Sequence[Run], budget: float, axis: str) -> Contender:
    at = min(budget, max(_end(r, axis) for r in runs))
    # runs of one length stand together, for the fast ones end before a budget of seconds; and a
    # run may end a step before its budget
    long = {r.steps for r in runs if (end := _end(r, axis)) + end / r.points[-1].step >= at}
    reach = [r for r in runs if r.steps in long and getattr(r.points[0], axis) <= at]
    readings = tuple(_read(r, at, axis) for r in one_a_seed(reach))
    first = readings[0]
    if axis != "train_flops":
        steps = int(_mean(r.step for r in readings) + 1e-6)
        return Contender(readings, at, _mean(r.train_flops for r in readings), steps)
    # where no run lies at the budget itself, the lowest evaluation before it is meant
    if all(r.share == 0.0 for r in readings):
        return Contender(readings, at, first.train_flops, first.steps[0])
    step = first.run.train_flops_per_step
    return Contender(readings, at, at, int(at / step + 1e-6))  # division may fall just short


def _end(run: Run, axis: str) -> float:
    return float(getattr(run.points[-1], axis))


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed)


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


def _read(run: Run, at: float, axis: str) -> Reading:
    """The lowest loss that the run has come down to by `at` on its curve, or by its end."""
    x, losses = curve_of(run, axis)
    lowest = np.minimum.accumulate(losses)
    below = int(np.searchsorted(x, at, side="right")) - 1
    best = min(run.points[: below + 1], key=lambda p: (p.loss, p.step))
    if below == len(x) - 1 or lowest[below + 1] == lowest[below]:
        return Reading.of(run, best)
    share = math.log(at / x[below]) / math.log(x[below + 1] / x[below])
    if share <= 0.0 or lowest[below + 1] <= 0.0:
        return Reading.of(run, best)

    def between(a: float, b: float) -> float:
        return math.exp((1 - share) * math.log(a) + share * math.log(b)) if a > 0 else b

    here, there = run.points[below], run.points[below + 1]
    return Reading(
        run, between(lowest[below], lowest[below + 1]), (best.step, there.step), share,
        *(between(*(getattr(p, name) for p in (here, there))) for name in _DONE),
    )  # fmt: skip


_DONE = ("step", "train_flops", "train_seconds")


def _at_ends(runs: Iterable[Run], budget: float, axis: str) -> list[Contender]:
    """Models at the ends of their runs, of equal length each, whose value is within the budget."""
    groups: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        value = getattr(run, axis)
        if run.points and value is not None and value <= budget:
            groups.setdefault((run.model, run.steps), []).append(run)
    found = []
    for group in groups.values():
        readings = tuple(Reading.of(r, r.points[-1]) for r in one_a_seed(group))
        run, last = readings[0].run, readings[0].run.points[-1]
        found.append(Contender(readings, getattr(run, axis), last.train_flops, last.step))
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


# --- multipliers

_Multipliers = tuple[Multiplier | None, RealisedMultiplier | None]
_NOT_TIMED = "the compared runs have no measured seconds, or where they ran is not recorded"
_APART = "the compared runs ran on different devices"


@dataclass(frozen=True, slots=True)
class _Matched:
    """The runs of a structure and of dense that are compared at one seed."""

    match: Match
    own: Sequence[Run]
    dense: Sequence[Run]

    def bound(self, axis: str) -> Bound:
        """The ratio of what the two runs have of an axis along curves."""
        own, dense = ([curve_of(r, axis) for r in runs] for runs in (self.own, self.dense))
        return self.match.bound(own, dense)

    @property
    def compared(self) -> list[Run]:
        """The dense run first; where no run of the structure comes down so far, all of them."""
        at = self.match.structure
        return [self.dense[self.match.dense], *(self.own if at is None else [self.own[at]])]

    @property
    def why_not_timed(self) -> str | None:
        """Why the compared runs say nothing in seconds; None where they do."""
        if not all(r.timed for r in self.compared):
            return _NOT_TIMED
        devices = sorted({str(r.device) for r in self.compared})
        return None if len(devices) == 1 else f"{_APART}: {' | '.join(devices)}"


def _multipliers(
    of: Contender, dense: Contender, runs: Sequence[Run], budget: float, axis: str
) -> _Multipliers:
    """In FLOPs and in seconds, of the runs that the budget's own axis has found.

    At every seed that the readings have in common, or else that any of the runs have; None where
    dense and the structure share no seed: then nothing is paired.
    """
    if of.run.dense:
        same: dict[str, Any] = {
            "value": 1.0,
            "kind": "exact",
            "interval": (1.0, 1.0),
            "seeds": of.seeds,
        }
        together = sorted({r.run.together for r in of.readings})
        timed = of.train_seconds is not None
        in_seconds = {**same, "device": of.device, "together": together if timed else []}
        return Multiplier(**same), RealisedMultiplier(**in_seconds)
    own = _by_seed(r for r in runs if r.structure == of.run.structure)
    references = _by_seed(r for r in runs if r.dense)
    read = {r.run.seed for r in of.readings} & {r.run.seed for r in dense.readings}
    found: dict[int, _Matched] = {}
    for seed in sorted(read or own.keys() & references.keys()):
        curves, dense_curves = (
            [curve_of(r, axis) for r in of_seed[seed]] for of_seed in (own, references)
        )
        if match := match_dense(curves, dense_curves, budget):
            found[seed] = _Matched(match, own[seed], references[seed])
    if not found:
        return None, None
    in_flops = {seed: matched.bound("train_flops") for seed, matched in found.items()}
    return Multiplier(**_summary(in_flops)), _realised(found)


def _realised(found: Mapping[int, _Matched]) -> RealisedMultiplier:
    """In seconds, over the seeds whose runs were timed, on the device that most of them ran on."""
    devices: dict[str, dict[int, _Matched]] = {}
    for seed, matched in found.items():
        if matched.why_not_timed is None:
            devices.setdefault(str(matched.compared[0].device), {})[seed] = matched
    if not devices:
        reasons = [matched.why_not_timed for matched in found.values()]
        reason = next((r for r in reasons if r != _NOT_TIMED), _NOT_TIMED)
        return RealisedMultiplier(
            value=None, kind="undetermined", interval=None, seeds=0, reason=reason
        )
    device, timed = min(devices.items(), key=lambda item: (-len(item[1]), item[0]))
    return RealisedMultiplier(
        **_summary({seed: matched.bound("train_seconds") for seed, matched in timed.items()}),
        device=device,
        together=sorted({r.together for matched in timed.values() for r in matched.compared}),
    )


def _summary(bounds: Mapping[int, Bound]) -> dict[str, Any]:
    """The fields of a `Multiplier` over seeds."""
    summary = summarise_multiplier(bounds)
    kinds = {b.kind for b in bounds.values()}
    value, kind, reason = summary.value, "exact", None
    if value is None and "less_than" not in kinds:
        value, kind = summary.least, "at_least"
    elif value is None and "at_least" not in kinds:
        value, kind = summary.most, "less_than"
    elif value is None:
        kind = "undetermined"
        reason = "with some seeds only a lower bound is known, with others only an upper one"
    return {
        "value": value, "kind": kind, "interval": summary.interval, "seeds": len(bounds),
        "reason": reason,
    }  # fmt: skip


def _by_seed(runs: Iterable[Run]) -> dict[int, list[Run]]:
    found: dict[int, list[Run]] = {}
    for run in runs:
        found.setdefault(run.seed, []).append(run)
    return found


def curve_of(run: Run, axis: str) -> Curve:
    """A run's losses (n,) against an axis along its curve."""
    points = run.points
    return np.array([getattr(p, axis) for p in points]), np.array([p.loss for p in points])
