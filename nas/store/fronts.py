"""The best points of every scope on every axis, from which fronts and comparisons are read.

For each scope and *axis* (train FLOPs, parameters, …) the table of standings holds every point (a
value of the axis and a loss) that fewer than `KEPT_MODELS` other models beat.  To beat a point is
to equal or undercut it in both the axis and the loss.  A model is a structure at a width; its runs
with different seeds count as one.  Structured and dense models have separate standings, and so has
each device on measured axes (see `nas.store.scopes`).  The points that no other model beats are the
Pareto front; the others belong to the models that the best one has to be compared with.

A point that `KEPT_MODELS` models beat is deleted.  It never has to come back, because completed
runs do not change.

A new run does not read the other standings.  Each sweep (see below) leaves a short list of *bars*.
A new point above a bar is certainly beaten and is dropped at once; all others are inserted.  When a
quarter of the standings is new, a sweep compares all of them, deletes those that are beaten, and
sets new bars.  Until then the table may hold points that are beaten.  They change no answer: every
query computes the front, or the lowest losses, from all points that are there.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, and_, delete, insert, select, tuple_
from sqlalchemy.orm import Session

from nas.store.engine import pieces
from nas.store.schema import BarRow, StandingRow

#: Number of models that are kept at every budget, for structured and for dense layers each.
KEPT_MODELS = 64
#: A sweep happens when more than `_SWEPT_AT_LEAST` points, and one in `_SWEPT_SHARE`, are new.
_SWEPT_AT_LEAST = 256
_SWEPT_SHARE = 4
_MOST_EDGES = 256
#: A point of a run: `model` is what `model_number` gives, and `x` is in the unit of the axis.
POINT = np.dtype(
    [("model", "i8"), ("trial_id", "i8"), ("step", "i8"), ("x", "f8"), ("loss", "f8")]
)  # fmt: skip
#: Points of runs on one axis, shape (n,) of `POINT`.
Points = NDArray[np.void]


@dataclass(frozen=True, slots=True)
class Axis:
    """A quantity that a Pareto front is drawn against."""

    meaning: str
    unit: str
    #: whether every point of a curve has a value; otherwise each run has one, at its end
    along_curve: bool
    #: whether it is a time or a size measured where the run ran
    measured: bool
    #: column that holds it: of points if `along_curve`, else of trials
    column: str


AXES: Mapping[str, Axis] = {
    "train_flops": Axis(
        "training compute", "train FLOPs: 1 MAC = 2 FLOPs, training = 3 × forward, all matrix "
        "products", True, False, "train_flops",
    ),
    "train_seconds": Axis("training time", "seconds of training", True, True, "seconds"),
    "inference_flops": Axis(
        "inference compute", "forward FLOPs per token of the whole model", False, False,
        "forward_flops_per_token",
    ),
    "params": Axis(
        "parameters", "trainable parameters of the whole model", False, False, "model_params"
    ),
    "step_seconds": Axis(
        "time of a training step", "seconds per step", False, True, "seconds_per_step"
    ),
    "peak_memory": Axis("peak memory of training", "bytes", False, True, "peak_memory_bytes"),
}  # fmt: skip
_HEXADECIMAL = re.compile(r"[0-9a-f]{15}")


def model_number(model: str | None, trial_id: int) -> int:
    """60 bits of a model's digest, enough to distinguish a billion models."""
    return int(model[:15], 16) if model and _HEXADECIMAL.match(model) else -trial_id


def as_points(rows: Sequence[tuple[Any, ...]]) -> Points:
    """Points from tuples in the order of `POINT`."""
    return np.array(rows, dtype=POINT)


def sweep(points: Points, models: int) -> tuple[NDArray[np.bool_], list[tuple[float, float]]]:
    """(which points stay, every (x, loss) from which on a point is beaten by `models` models).

    A point stays if it lowers its own model's loss and fewer than `models` others beat it.  A model
    beats a point if one of its own has no more of the axis and no higher loss; of equal points, the
    one with the lower trial id is first.
    """
    order = np.lexsort((points["step"], points["trial_id"], points["loss"], points["x"]))
    # points that are not finite cannot be compared; they take no part
    usable = np.isfinite(points["x"]) & np.isfinite(points["loss"])
    order = order[usable[order]]
    stays = np.zeros(len(points), dtype=bool)
    bars: list[tuple[float, float]] = []
    lowest: list[tuple[float, int]] = []  # the best loss so far of the `models` best, sorted
    own: dict[int, float] = {}
    bar = math.inf  # highest loss in `lowest` once it is full: points at or above it are beaten
    for i, (owner, _, _, x, loss) in zip(order.tolist(), points[order].tolist(), strict=True):
        before = own.get(owner, math.inf)
        if loss >= bar or loss >= before:
            continue
        stays[i] = True
        own[owner] = loss
        if before < math.inf:
            at = bisect.bisect_left(lowest, (before, owner))
            if at < len(lowest) and lowest[at] == (before, owner):
                del lowest[at]
        bisect.insort(lowest, (loss, owner))
        del lowest[models:]
        if len(lowest) == models and lowest[-1][0] < bar:
            bar = lowest[-1][0]
            bars.append((x, bar))
    return stays, bars


def standing_at(scope: str, axis: str, dense: bool) -> ColumnElement[bool]:
    """Selects the standings of a scope on an axis."""
    return and_(StandingRow.scope == scope, StandingRow.axis == axis, StandingRow.dense == dense)


def merge(session: Session, scope: str, new: Mapping[tuple[str, bool], Points]) -> None:
    """Add points of completed runs, by axis and density, to the standings of a locked scope."""
    query = select(BarRow).where(BarRow.scope == scope)
    bars = {(bar.axis, bar.dense): bar for bar in session.scalars(query)}
    for (axis, dense), points in new.items():
        bar = bars.get((axis, dense))
        if bar is None:
            bar = BarRow(scope=scope, axis=axis, dense=dense, size=0, added=0, edges=b"")
            session.add(bar)
        stays, _ = sweep(points, KEPT_MODELS)
        entering = points[stays & ~is_beaten(points, bar.edges)].tolist()
        for part in pieces(entering):
            key = {"scope": scope, "axis": axis, "dense": dense}
            rows = [{**key, **dict(zip(POINT.names or (), p, strict=True))} for p in part]
            session.execute(insert(StandingRow), rows)
        bar.size += len(entering)
        bar.added += len(entering)
        if bar.added > max(_SWEPT_AT_LEAST, bar.size // _SWEPT_SHARE):
            session.flush()
            sweep_out(session, bar)


def is_beaten(points: Points, edges: bytes) -> NDArray[np.bool_]:
    """Which points are certainly beaten by enough models, judging by the bars."""
    if not edges:
        return np.zeros(len(points), dtype=bool)
    x, loss = np.frombuffer(edges, dtype="<f8").reshape(-1, 2).T
    at = np.searchsorted(x, points["x"], side="right") - 1
    # only strictly above: of equal points the lower trial id is the better, and may come later
    beaten: NDArray[np.bool_] = (at >= 0) & (points["loss"] > loss[np.maximum(at, 0)])
    return beaten


def sweep_out(session: Session, bar: BarRow) -> None:
    """Delete the points that enough other models beat by now, and set new bars."""
    own = standing_at(bar.scope, bar.axis, bar.dense)
    query = select(*(getattr(StandingRow, name) for name in POINT.names or ())).where(own)
    points = as_points([tuple(row) for row in session.execute(query)])
    stays, bars = sweep(points, KEPT_MODELS)
    key = tuple_(StandingRow.trial_id, StandingRow.step)
    for part in pieces(points[~stays][["trial_id", "step"]].tolist()):
        session.execute(delete(StandingRow).where(own, key.in_(part)))
    # with fewer bars, more points stay until the next sweep
    every = max(1, math.ceil(len(bars) / _MOST_EDGES))
    edges = np.array(bars[::-1][::every][::-1], dtype="<f8").tobytes()
    bar.size, bar.added, bar.edges = int(stays.sum()), 0, edges
