"""Pareto fronts of (train FLOPs, validation loss), both minimised."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nas.store import CurvePoint


@dataclass(frozen=True, slots=True)
class Frontier:
    """Non-dominated points in the order of their FLOPs; losses strictly decrease."""

    #: over every structure, dense included
    overall: tuple[CurvePoint, ...]
    #: over structured layers only
    structured: tuple[CurvePoint, ...]
    #: over dense layers only
    dense: tuple[CurvePoint, ...]


def non_dominated(points: Iterable[CurvePoint]) -> tuple[CurvePoint, ...]:
    """The points that no other point equals or beats in both FLOPs and loss."""
    front: list[CurvePoint] = []
    for point in sorted(points, key=lambda p: (p.train_flops, p.loss, p.trial_id, p.step)):
        if not front or point.loss < front[-1].loss:
            front.append(point)
    return tuple(front)


def frontier(points: Sequence[CurvePoint]) -> Frontier:
    """The fronts of all, structured and dense points.

    Runs still going count: at a constant learning rate every point of a curve is the result of a
    shorter run.
    """
    return Frontier(
        overall=non_dominated(points),
        structured=non_dominated(p for p in points if not p.dense),
        dense=non_dominated(p for p in points if p.dense),
    )


def flops_to_reach(
    train_flops: NDArray[np.float64], losses: NDArray[np.float64], target: float
) -> tuple[float, str]:
    """Least FLOPs at which a curve comes down to `target`, and how sure that is.

    Between points the curve is taken as straight in log-log.

    Parameters
    ----------
    train_flops, losses
        Points (n,) in the order of their FLOPs, at least one.

    Returns
    -------
    (flops, kind)
        kind is ``exact``; ``at_most`` where the curve begins below the target, so that the true
        value lies left of its first point; ``more_than`` where it never comes down to it.
    """
    lowest = np.minimum.accumulate(losses)
    reached = np.flatnonzero(lowest <= target)
    if len(reached) == 0:
        return float(train_flops[-1]), "more_than"
    first = int(reached[0])
    if first == 0:
        return float(train_flops[0]), "at_most" if lowest[0] < target else "exact"
    if target <= 0.0:  # a loss of exactly 0 has no logarithm
        return float(train_flops[first]), "exact"
    x0, x1 = np.log(train_flops[first - 1 : first + 1])
    y0, y1 = np.log(np.maximum(lowest[first - 1 : first + 1], np.finfo(float).tiny))
    share = (y0 - np.log(target)) / (y0 - y1)
    return float(np.exp(x0 + share * (x1 - x0))), "exact"
