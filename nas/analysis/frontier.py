"""Pareto fronts of (train FLOPs, validation loss), both minimised."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nas.store import AXES, CurvePoint


@dataclass(frozen=True, slots=True)
class Frontier:
    """Non-dominated points in the order of their FLOPs; losses strictly decrease."""

    #: over every structure, dense included
    overall: tuple[CurvePoint, ...]
    #: over structured layers only
    structured: tuple[CurvePoint, ...]
    #: over dense layers only
    dense: tuple[CurvePoint, ...]


def axis_value(point: CurvePoint, axis: str) -> float:
    """What a point, or its run, has of an axis of `nas.store.AXES`."""
    return float(getattr(point if AXES[axis].along_curve else point.run, axis))


def has_axis(point: CurvePoint, axis: str) -> bool:
    """Whether that was measured."""
    return getattr(point if AXES[axis].along_curve else point.run, axis) is not None


def non_dominated(
    points: Iterable[CurvePoint], axis: str = "train_flops"
) -> tuple[CurvePoint, ...]:
    """The points that no other point equals or beats in both the axis and the loss."""
    front: list[CurvePoint] = []
    order = sorted(points, key=lambda p: (axis_value(p, axis), p.loss, p.run.trial_id, p.step))
    for point in order:
        if not front or point.loss < front[-1].loss:
            front.append(point)
    return tuple(front)


def frontier(points: Sequence[CurvePoint], axis: str = "train_flops") -> Frontier:
    """The fronts of all, structured and dense points of completed runs.

    At a constant learning rate every point of such a run's curve is the result of a shorter run.
    """
    ended = [p for p in points if p.run.complete]
    return Frontier(
        overall=non_dominated(ended, axis),
        structured=non_dominated((p for p in ended if not p.run.dense), axis),
        dense=non_dominated((p for p in ended if p.run.dense), axis),
    )


def hypervolume(
    x: Sequence[float], losses: Sequence[float], reference: tuple[float, float]
) -> float:
    """Area that a front dominates up to a reference point, over log10 of the axis and the loss.

    Parameters
    ----------
    x, losses
        Points (n,) in any order; those not below the reference add nothing.
    reference
        (axis, loss), neither better than what is to count.
    """
    area, level = 0.0, reference[1]
    for at, loss in sorted(zip(x, losses, strict=True)):
        if at < reference[0] and loss < level:
            area += (level - loss) * math.log10(reference[0] / at)
            level = loss
    return area


def least_to_reach(
    x: NDArray[np.float64], losses: NDArray[np.float64], target: float
) -> tuple[float, str]:
    """Least of an axis at which a curve comes down to `target`, and how sure that is.

    Between points the curve is taken as straight in log-log.

    Parameters
    ----------
    x, losses
        Points (n,) in the order of the axis, such as train FLOPs or seconds; at least one.

    Returns
    -------
    (least, kind)
        kind is ``exact``; ``at_most`` where the curve begins below the target, so that the true
        value lies left of its first point; ``more_than`` where it never comes down to it.
    """
    lowest = np.minimum.accumulate(losses)
    reached = np.flatnonzero(lowest <= target)
    if len(reached) == 0:
        return float(x[-1]), "more_than"
    first = int(reached[0])
    if first == 0:
        return float(x[0]), "at_most" if lowest[0] < target else "exact"
    if target <= 0.0:  # a loss of exactly 0 has no logarithm
        return float(x[first]), "exact"
    x0, x1 = np.log(x[first - 1 : first + 1])
    y0, y1 = np.log(np.maximum(lowest[first - 1 : first + 1], np.finfo(float).tiny))
    share = (y0 - np.log(target)) / (y0 - y1)
    return float(np.exp(x0 + share * (x1 - x0))), "exact"
