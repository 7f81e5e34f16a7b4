"""The best structure for a budget, against dense, with what is known of its error.

Every run is judged on the same validation windows, so that differences between runs are paired
over windows.  The intervals here hold for that sampling of the data alone: each run has one seed,
and how much another seed would move it is not in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from nas.analysis.frontier import flops_to_reach
from nas.errors import NotFound
from nas.store import CurvePoint

Windows = Callable[[Sequence[CurvePoint]], list[tuple[float, ...]]]
Interval = tuple[float, float]

CONFIDENCE = 0.95
_RESAMPLES = 400
_RESAMPLING_SEED = 7
#: Most rivals that are compared with the best.
_MOST_RIVALS = 50
INTERVAL_MEANS = (
    "95%, over the sampling of the validation data only; run-to-run variation is not included, "
    "for each run has one seed"
)


@dataclass(frozen=True, slots=True)
class Rival:
    """A run compared with the best one, window by window."""

    point: CurvePoint
    #: its loss minus the best one's, in the unit of the task
    difference: float
    interval: Interval


@dataclass(frozen=True, slots=True)
class Multiplier:
    """Compute multiplier over dense: what the best dense run within the budget has spent, over
    what structured layers need for its loss (arXiv:2410.02117, section 5)."""

    value: float
    #: exact | at_least (structured curves begin below that loss) | less_than (they never reach it)
    kind: str
    #: of an exact value only: a bound has no interval of its own
    interval: Interval | None


@dataclass(frozen=True, slots=True)
class Answer:
    """The best measured run within a budget."""

    budget: float
    best: CurvePoint
    best_structured: CurvePoint | None
    best_dense: CurvePoint | None
    #: 95% interval of the best one's loss
    interval: Interval
    #: the best dense run compared with the best structured one
    dense_difference: Rival | None
    multiplier: Multiplier | None
    #: runs whose difference from the best may be 0 at 95%, among the `compared` next best
    indistinguishable: tuple[Rival, ...]
    compared: int
    trials: int
    seeds: int
    searches: int


def best_for_budget(points: Sequence[CurvePoint], train_flops: float, windows: Windows) -> Answer:
    """The least validation loss that a completed run reached within `train_flops`.

    Parameters
    ----------
    points
        Curve points of one task; those of unfinished runs and above the budget are not used.
    train_flops
        The budget.
    windows
        Loss of each validation window at given points.

    Raises
    ------
    NotFound
        No completed run has a point within the budget.
    """
    within = [p for p in points if p.complete and p.train_flops <= train_flops]
    if not within:
        least = min((p.train_flops for p in points if p.complete), default=None)
        reach = "none has completed" if least is None else f"the least measured is {least:.4g}"
        raise NotFound(f"no completed run within {train_flops:.4g} train FLOPs: {reach}")
    runs = _best_of_each_run(within)
    best = runs[0]
    structured = next((p for p in runs if not p.dense), None)
    dense = next((p for p in runs if p.dense), None)
    rivals = _compare(best, runs[1 : 1 + _MOST_RIVALS], windows)
    both = structured is not None and dense is not None
    return Answer(
        budget=train_flops,
        best=best,
        best_structured=structured,
        best_dense=dense,
        interval=_loss_interval(best, windows),
        dense_difference=_compare(structured, [dense], windows)[0]
        if structured is not None and dense is not None
        else None,
        multiplier=_multiplier(within, windows) if both else None,
        indistinguishable=tuple(r for r in rivals if r.interval[0] <= 0.0),
        compared=len(rivals),
        trials=len({p.trial_id for p in within}),
        seeds=len({p.seed for p in within}),
        searches=len({p.search_id for p in within}),
    )


def _best_of_each_run(points: Sequence[CurvePoint]) -> list[CurvePoint]:
    """One point a run, its lowest, ordered by loss."""
    lowest: dict[int, CurvePoint] = {}
    for p in points:
        held = lowest.get(p.trial_id)
        if held is None or (p.loss, p.train_flops) < (held.loss, held.train_flops):
            lowest[p.trial_id] = p
    return sorted(lowest.values(), key=lambda p: (p.loss, p.train_flops, p.trial_id))


def _loss_interval(point: CurvePoint, windows: Windows) -> Interval:
    (losses,) = windows([point])
    half = _half_width(np.asarray(losses))
    return point.loss - half, point.loss + half


def _half_width(values: NDArray[np.float64]) -> float:
    """Half the t interval of a mean; infinite for a single value, which shows no spread."""
    if len(values) < 2:
        return math.inf
    quantile = stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)
    return float(quantile * values.std(ddof=1) / math.sqrt(len(values)))


def _compare(best: CurvePoint, others: Sequence[CurvePoint], windows: Windows) -> list[Rival]:
    if not others:
        return []
    base, *rest = (np.asarray(w) for w in windows([best, *others]))
    rivals = []
    for point, losses in zip(others, rest, strict=True):
        half = _half_width(losses - base)
        difference = point.loss - best.loss
        rivals.append(Rival(point, difference, (difference - half, difference + half)))
    return rivals


def _multiplier(within: Sequence[CurvePoint], windows: Windows) -> Multiplier:
    """The multiplier of all structured layers together, resampled over validation windows.

    The compute of structured layers is the least at which one of their own curves, taken as
    straight in log-log between its points, comes down to the loss of the best dense run.
    """
    dense = min((p for p in within if p.dense), key=lambda p: p.loss)
    runs: dict[int, list[CurvePoint]] = {}
    for p in sorted(within, key=lambda p: p.step):
        if not p.dense:
            runs.setdefault(p.trial_id, []).append(p)
    curves = sorted(runs.values(), key=lambda run: min(p.loss for p in run))[:_MOST_RIVALS]
    flops = [np.array([p.train_flops for p in run]) for run in curves]
    flat = [p for run in curves for p in run]
    ends = np.cumsum([len(run) for run in curves])[:-1]

    def at(losses: NDArray[np.float64], target: float) -> tuple[float, str]:
        spent, kind = _least_to_reach(flops, np.split(losses, ends), target)
        return dense.train_flops / spent, kind

    value, kind = at(np.array([p.loss for p in flat]), dense.loss)
    if kind != "exact":
        return Multiplier(value, kind, None)
    losses = np.array(windows([*flat, dense]))  # (points, windows)
    count = losses.shape[1]
    draws = np.random.default_rng(_RESAMPLING_SEED).multinomial(
        count, np.full(count, 1 / count), size=_RESAMPLES
    )
    means = draws @ losses.T / count  # (resamples, points)
    resampled = [at(m[:-1], m[-1])[0] for m in means]
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Multiplier(value, kind, (float(low), float(high)))


def _least_to_reach(
    flops: Sequence[NDArray[np.float64]], losses: Sequence[NDArray[np.float64]], target: float
) -> tuple[float, str]:
    """(FLOPs, kind of the multiplier) of the curve that comes down to `target` first."""
    reached = [flops_to_reach(f, y, target) for f, y in zip(flops, losses, strict=True)]
    sure = [r for r in reached if r[1] != "more_than"]
    if not sure:
        return max(r[0] for r in reached), "less_than"
    spent, kind = min(sure)
    return spent, "exact" if kind == "exact" else "at_least"
