"""Scaling laws over several widths and seeds, with intervals that hold for few seeds.

A *curve* is the train FLOPs and losses of one run, in the order of its steps.  The run has a
constant learning rate, so that every point is the result of a smaller budget.  A *family* is the
curves of one structure at several widths with one seed.

Intervals are t intervals over seeds.  A percentile bootstrap over 3 runs covers 73% where it says
95%, so it is not used here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nas.analysis.frontier import least_to_reach
from nas.analysis.intervals import Interval, t_interval
from nas.analysis.laws import Curve as Curve
from nas.analysis.laws import Floats, theil_sen

#: A point this close to the hull, as a share of the loss, counts as compute-optimal.
HULL_TOLERANCE = 0.02
#: Fewest points that a power law is fitted to: two fit any.
MIN_POINTS = 3


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """loss = a · (train FLOPs)^(-b)."""

    #: in the unit of the loss; what the line gives at 1 FLOP, far outside of anything measured
    a: float
    b: float
    #: how many points it was fitted to
    points: int

    def loss(self, train_flops: float) -> float:
        """The loss on the line."""
        return math.exp(math.log(self.a) - self.b * math.log(train_flops))


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds."""

    value: float
    #: 95% t interval; None: one seed shows no spread, so that it is unknown
    interval: Interval | None
    by_seed: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Bound:
    """A compute multiplier of one seed."""

    value: float
    #: exact | at_least (the structure's curves begin below that loss) | less_than (they never
    #: come down to it)
    kind: str


@dataclass(frozen=True, slots=True)
class Multiplier:
    """A compute multiplier over seeds; of censored ones no mean is taken."""

    #: geometric mean; None where a seed is censored
    value: float | None
    interval: Interval | None
    #: lies below every seed's value; None where a seed has only an upper bound
    least: float | None
    #: lies above every seed's value; None where a seed has only a lower bound
    most: float | None
    by_seed: Mapping[int, Bound]

    @property
    def censored(self) -> int:
        """Seeds of which only a bound is known."""
        return sum(b.kind != "exact" for b in self.by_seed.values())


def mean_over_seeds(by_seed: Mapping[int, float]) -> Estimate:
    """Mean with its interval; at least one seed."""
    values = [by_seed[k] for k in sorted(by_seed)]
    return Estimate(math.fsum(values) / len(values), t_interval(values), dict(by_seed))


def geometric_over_seeds(logs: Mapping[int, float]) -> Estimate:
    """Geometric mean with its interval, both taken on logs; at least one seed."""
    mean = mean_over_seeds(logs)
    interval = mean.interval and (_exp(mean.interval[0]), _exp(mean.interval[1]))
    return Estimate(_exp(mean.value), interval, {k: _exp(v) for k, v in logs.items()})


def _exp(value: float) -> float:
    """exp, kept finite: two seeds far apart have an interval beyond any float."""
    return math.exp(min(max(value, -700.0), 700.0))


def compute_optimal(
    flops: Floats, losses: Floats, tolerance: float = HULL_TOLERANCE
) -> NDArray[np.intp]:
    """Which points of a family are compute-optimal, as indices in the order of their FLOPs.

    The lower convex hull of all points in log-log, plus the points at most `tolerance` above it
    (as a share of the loss), minus those that are no lower than one of less compute.  Points that
    one of up to `tolerance` more compute beats are left out first: runs stop at whole steps of
    their own, and the cheapest of nearly equal compute is a corner of the hull whatever its loss.

    Parameters
    ----------
    flops, losses
        Points of all curves (n,), in any order, above 0.

    Source: arXiv:2410.02117, section 4.
    """
    if len(flops) == 0:
        return np.array([], dtype=np.intp)
    order = np.lexsort((losses, flops))
    x, y = np.log(flops[order]), np.log(losses[order])
    reach = np.searchsorted(x, x + math.log1p(tolerance), side="right")
    unbeaten = np.minimum.accumulate(y)[reach - 1] >= y
    order, x, y = order[unbeaten], x[unbeaten], y[unbeaten]
    hull: list[int] = []
    for i in range(len(x)):
        if hull and x[i] == x[hull[-1]]:
            continue  # the lower one of equal compute came first
        while len(hull) > 1 and _turns_up(x, y, hull[-2], hull[-1], i) <= 0:
            hull.pop()
        hull.append(i)
    near = y <= np.interp(x, x[hull], y[hull]) + math.log1p(tolerance)
    near[hull] = True  # whatever the interpolation rounds to
    kept: list[int] = []
    for j in np.flatnonzero(near).tolist():
        if not kept or y[j] < y[kept[-1]]:
            kept.append(j)
    return order[kept]


def _turns_up(x: Floats, y: Floats, a: int, b: int, c: int) -> float:
    """Above 0 where the path a → b → c turns to the left, as a lower hull does."""
    return float((x[b] - x[a]) * (y[c] - y[a]) - (y[b] - y[a]) * (x[c] - x[a]))


def fit_power_law(flops: Floats, losses: Floats) -> PowerLaw | None:
    """The Theil-Sen line on logs, which no single point can bend; None below `MIN_POINTS` budgets.

    Parameters
    ----------
    flops, losses
        Points (n,) above 0, in any order.
    """
    if len(np.unique(flops)) < MIN_POINTS:
        return None
    x, y = np.log(flops), np.log(losses)
    slope, (level,) = theil_sen(x, y)
    return PowerLaw(_exp(level), -slope, len(x))


def loss_at(flops: Floats, losses: Floats, budget: float) -> float | None:
    """Least loss that a run reached within `budget`; None where its first point lies after it.

    Between points the curve is taken as straight in log-log; after the last one the run has
    nothing more to show.
    """
    if len(flops) == 0 or budget < flops[0]:
        return None
    lowest = np.log(np.minimum.accumulate(losses))
    return float(np.exp(np.interp(math.log(budget), np.log(flops), lowest)))


@dataclass(frozen=True, slots=True)
class Match:
    """The runs of one seed that first come down to the least loss of dense within a budget."""

    #: that loss
    target: float
    #: position of the dense run, and of the structure's; None where none of its runs does
    dense: int
    structure: int | None
    #: as of a `Bound`
    kind: str

    def bound(self, structure: Sequence[Curve], dense: Sequence[Curve]) -> Bound:
        """What the dense run spends for the loss over what the structure's run needs for it.

        Parameters
        ----------
        structure, dense
            The curves that were matched, or the same losses against another axis.
        """
        spent, _ = least_to_reach(*dense[self.dense], self.target)
        if self.structure is None:
            return Bound(spent / min(float(x[-1]) for x, _ in structure), self.kind)
        needed, _ = least_to_reach(*structure[self.structure], self.target)
        return Bound(spent / needed, self.kind)


def match_dense(structure: Sequence[Curve], dense: Sequence[Curve], budget: float) -> Match | None:
    """Find where a structure does what dense does within `budget`, of one seed; None where there
    is nothing to compare.

    Source: arXiv:2410.02117, section 5, turned round so that no dense run past the budget is
    needed.
    """
    reached = [v for x, y in dense if (v := loss_at(x, y, budget)) is not None]
    if not reached or not structure:
        return None
    target = min(reached) * (1 + 1e-12)  # interpolation must find again what it gave
    first, _ = _first_to_reach(dense, target)
    assert first is not None
    own, sure = _first_to_reach(structure, target)
    kind = "less_than" if own is None else "exact" if sure else "at_least"
    return Match(target, first, own, kind)


def multiplier_over_dense(
    structure: Sequence[Curve], dense: Sequence[Curve], budget: float
) -> Bound | None:
    """Compute multiplier of one seed: what dense spends on its least loss within `budget`, over
    what the structure needs for that loss; None where there is nothing to compare."""
    match = match_dense(structure, dense, budget)
    return None if match is None else match.bound(structure, dense)


def _first_to_reach(curves: Sequence[Curve], target: float) -> tuple[int | None, bool]:
    """(the curve that comes down to a loss first, whether that is sure); None if none does."""
    found = [least_to_reach(x, y, target) for x, y in curves]
    there = [i for i, (_, kind) in enumerate(found) if kind != "more_than"]
    # one curve that begins below the loss is enough: it may have been there before the others
    sure = all(kind != "at_most" for _, kind in found)
    return min(there, key=lambda i: found[i][0], default=None), sure


def summarise_multiplier(by_seed: Mapping[int, Bound]) -> Multiplier:
    """The multiplier over seeds; at least one.  Bounds stay bounds."""
    bounds = list(by_seed.values())
    kinds = {b.kind for b in bounds}
    if kinds == {"exact"}:
        mean = geometric_over_seeds({k: math.log(b.value) for k, b in by_seed.items()})
        value, interval = mean.value, mean.interval
    else:
        value, interval = None, None
    values = [b.value for b in bounds]
    return Multiplier(
        value=value,
        interval=interval,
        least=None if "less_than" in kinds else min(values),
        most=None if "at_least" in kinds else max(values),
        by_seed=dict(by_seed),
    )


def common_mean(members: Sequence[Mapping[int, float]]) -> tuple[dict[int, float], list[int]]:
    """Mean over members at each seed, and the members it is taken over.

    These are the members with the most seeds, at the seeds that all of them have: a mean over
    other members at every seed would move by who is missing.
    """
    most = max((len(m) for m in members), default=0)
    used = [i for i, m in enumerate(members) if len(m) == most > 0]
    if not used:
        return {}, []
    seeds = set.intersection(*(set(members[i]) for i in used))
    return {k: math.fsum(members[i][k] for i in used) / len(used) for k in sorted(seeds)}, used


def ratio_over_seeds(logs: Mapping[int, float], reference: Mapping[int, float]) -> Estimate | None:
    """Ratio of two losses given as logs, paired by seed; None without a common seed."""
    common = sorted(logs.keys() & reference.keys())
    if not common:
        return None
    return geometric_over_seeds({k: logs[k] - reference[k] for k in common})
