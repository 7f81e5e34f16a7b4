"""The stopping rule `frontier`: runs go on where their curves are expected to move the front most.

Runs are frozen after each slice and thawed where it pays.  With a constant learning rate every
point of a curve is a result, so what a run is worth is what its whole curve adds to the front.  On
a grid of compute levels spaced by √2, the hypervolume between a front F and a reference is a sum
over the levels, and what a run adds to it by going on to level j is

    Σ_{k ≤ j} max(0, F_k - L_k) + Σ_{k > j} max(0, F_k - L_j)

for curves that fall, so that its expectation under `CurveModel` is a sum of expected improvements
of one variable, in closed form.  A round takes the moves with the largest expectation per train
FLOP, begun runs and new candidates alike, one after another, each as if the moves before it had
turned out as expected.  The same serves where only the loss at the budget counts: what the front
at less compute shows is what tells the curves apart at the least cost, and on EinBench the answers
at the budget are better than by the expected improvement there alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from nas.search.surrogate import Array

#: Slices are at most so many levels long: a factor 2 in compute.
_LONGEST_SLICE = 2
#: Arms whose expectation is looked at again after each pick.
_LOOKED_AT = 96


def expected_improvement(front: Array, mean: Array, sd: Array) -> Array:
    """E[max(0, front - L)] of a normal L, elementwise."""
    gap = front - mean
    z = gap / sd
    found: Array = gap * ndtr(z) + sd * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return found


@dataclass(frozen=True, slots=True)
class Arms:
    """Runs that may go on and candidates that may begin, on the grid of levels.

    `mean`, `sd` (arms, levels) are of log losses; `level` (arms,) is the last level reached, -1 for
    a candidate; `first` (arms,) the first level at which a run is evaluated; `flops` (arms, levels)
    the train FLOPs up to a level.
    """

    mean: Array
    sd: Array
    level: NDArray[np.int64]
    first: NDArray[np.int64]
    flops: Array

    def __len__(self) -> int:
        return len(self.level)

    def only(self, which: NDArray[np.int64]) -> Arms:
        """Some of them."""
        return Arms(*(getattr(self, f.name)[which] for f in fields(self)))

    def joined(self, others: Arms) -> Arms:
        """These, then others."""
        parts = ((getattr(self, f.name), getattr(others, f.name)) for f in fields(self))
        return Arms(*(np.concatenate(pair) for pair in parts))


def gains(arms: Arms, front: Array) -> Array:
    """Expected gain of each arm by going on to each level, (arms, levels); -inf where it cannot."""
    levels = len(front)
    at = np.arange(levels)
    ahead = (at[None, :] > arms.level[:, None]) & (at[None, :] >= arms.first[:, None])
    own = np.where(ahead, expected_improvement(front, arms.mean, arms.sd), 0.0)
    # a level's loss stands on the front at all later levels until a lower one comes
    carried = expected_improvement(front[None, None, :], arms.mean[:, :, None], arms.sd[:, :, None])
    later = (carried * (at[None, None, :] > at[None, :, None])).sum(2)
    return np.where(ahead, np.cumsum(own, 1) + later, -np.inf)


def costs(arms: Arms) -> Array:
    """Train FLOPs of going on to each level, (arms, levels)."""
    begun = np.maximum(arms.level, 0)
    spent = np.where(arms.level >= 0, arms.flops[np.arange(len(arms)), begun], 0.0)
    return arms.flops - spent[:, None]


def choose(arms: Arms, front: Array, count: int) -> list[tuple[int, int]]:
    """(arm, level to go on to) of the next moves, at most `count`, each arm once."""
    if not len(arms):
        return []
    every = np.arange(len(arms))
    ratio = _ratios(arms, front)
    if len(arms) > _LOOKED_AT + count:
        every = np.sort(np.argsort(-ratio.max(1), kind="stable")[: _LOOKED_AT + count])
    looked, front, chosen = arms.only(every), front.copy(), []
    free = np.ones(len(every), dtype=bool)
    for _ in range(min(count, len(every))):
        ratio = np.where(free[:, None], _ratios(looked, front), -np.inf)
        arm = int(np.argmax(ratio.max(1)))
        if not ratio[arm].max() > 0.0:
            break
        begin = max(int(looked.level[arm]) + 1, int(looked.first[arm]))
        level = min(int(np.argmax(ratio[arm])), begin + _LONGEST_SLICE - 1)
        chosen.append((int(every[arm]), level))
        free[arm] = False
        believed = np.minimum.accumulate(
            np.where(np.arange(len(front)) < begin, np.inf, looked.mean[arm])
        )
        front = np.minimum(front, believed)
    return chosen


def _ratios(arms: Arms, front: Array) -> Array:
    return gains(arms, front) / np.maximum(costs(arms), 1.0)


def front_on(grid: Array, curves: Sequence[tuple[Array, Array]], reference: float) -> Array:
    """The lowest log loss up to each level, `reference` where there is none.

    Parameters
    ----------
    curves
        (c, log loss) of each; an evaluation counts at its level although it ends within a step of
        it.
    """
    front = np.full(len(grid), reference)
    for c, y in curves:
        at = np.searchsorted(grid, c - 0.17)  # half a level
        np.minimum.at(front, np.minimum(at, len(grid) - 1), y)
    return np.minimum.accumulate(front)
