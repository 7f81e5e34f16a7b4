"""Hypervolume, regret, and compute to reach a share of the best, with intervals over searches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

from benchmarks.search.simulation import Trace
from benchmarks.search.table import Array, Table


@dataclass(frozen=True)
class Yardstick:
    """What simulated searches that observe one seed of a table are measured by.

    The hypervolume is the area over log train FLOPs × log loss that evaluations dominate, as a
    share of the area of all evaluations of all entries at that seed.  An evaluation stands at the
    compute of its level: that of entries differs by less than a step, which is nobody's merit.  The
    reference point has √2 times the compute of whole runs, so that these count as much as each
    level before, and the third quartile of the losses at the lowest level.
    """

    table: Table
    seed_index: int
    #: log loss of the reference point
    reference: float
    #: hypervolume of the whole table
    whole: float
    #: least loss of a whole run
    least: float

    @classmethod
    def of(cls, table: Table, seed_index: int) -> Yardstick:
        losses = np.log(table.loss[:, seed_index])
        reference = float(np.nanquantile(losses[:, 0], 0.75))
        area = _area(np.nanmin(losses, axis=0), reference)
        return cls(table, seed_index, reference, area, float(table.loss[:, seed_index, -1].min()))

    def share(self, lowest: Array) -> float:
        """The hypervolume of the least log losses at each level, (L,), over that of the table."""
        return _area(lowest, self.reference) / self.whole

    def hypervolume(self, trace: Trace) -> Array:
        """(m,) share of the whole table's hypervolume after each evaluation."""
        lowest = np.full(self.table.levels, np.inf)
        losses = np.log(self.table.loss[:, self.seed_index])
        found, last = np.zeros(len(trace.spent)), 0.0
        for i, (entry, level) in enumerate(zip(trace.entries, trace.levels, strict=True)):
            if entry >= 0 and losses[entry, level] < lowest[: level + 1].min():
                lowest[level] = losses[entry, level]
                last = self.share(lowest)
            found[i] = last
        return found

    def full(self, entries: Sequence[int]) -> float:
        """The share of entries that are all trained to their ends."""
        losses = self.table.loss[list(entries), self.seed_index]
        return self.share(np.log(np.nanmin(np.where(np.isnan(losses), np.inf, losses), axis=0)))

    def regret(self, trace: Trace) -> Array:
        """(m,) log of the least loss of whole runs so far over that of the table; ∞ before one."""
        whole = (trace.levels == self.table.levels - 1) & (trace.entries >= 0)
        losses = np.where(whole, self.table.loss[trace.entries, self.seed_index, -1], np.inf)
        return np.log(np.minimum.accumulate(losses) / self.least)


def _area(lowest: Array, reference: float) -> float:
    """In levels × log loss: each level dominates up to the next."""
    return float((reference - np.minimum(np.minimum.accumulate(lowest), reference)).sum())


def compute_to(trace: Trace, shares: Array, target: float) -> float:
    """Train FLOPs at which a search reached a share of the hypervolume; ∞ where it did not."""
    reached = np.flatnonzero(shares >= target)
    return float(trace.spent[reached[0]]) if len(reached) else math.inf


@dataclass(frozen=True)
class Middle:
    """A median over searches and its interval; ∞ where it lies beyond what was simulated."""

    value: float
    low: float
    high: float


def middle(values: Sequence[float], confidence: float = 0.95) -> Middle:
    """The median and the interval of order statistics, which holds for any distribution.

    The number of values below the true median is binomial with share 1/2; ∞ orders as any number,
    so searches that did not reach a target are counted, not left out.
    """
    ordered = sorted(values)
    n = len(ordered)
    # the greatest k with P(fewer than k below the median) at most half of what is left
    k = int(binom.ppf((1 - confidence) / 2, n, 0.5))
    low, high = (ordered[k - 1], ordered[n - k]) if k >= 1 else (-math.inf, math.inf)
    left, right = ordered[(n - 1) // 2], ordered[n // 2]
    return Middle(left if left == right else (left + right) / 2, low, high)


def ratio(own: Sequence[float], other: Sequence[float], most: float) -> Middle:
    """The median of own/other over paired seeds.

    Where the other did not reach the target, it counts with `most`, what it was given: the true
    ratio is lower.  Where our own did not, the ratio is ∞.
    """
    return middle([a / min(b, most) for a, b in zip(own, other, strict=True)])


def share_interval(hits: int, of: int, confidence: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's interval of a share, exact for any number."""
    from scipy.stats import binomtest

    found = binomtest(hits, of).proportion_ci(confidence, method="exact")
    return float(found.low), float(found.high)
