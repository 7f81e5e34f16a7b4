"""Which of many points a figure shows: fronts, outliers, and one of those that coincide."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nas.store.searches import Cloud

#: Points up to which all are shown.
MOST = 2000
#: Columns and rows of the grid beyond that: a cell is about as large as a marker.
_GRID = (128, 64)


def shown(cloud: Cloud) -> NDArray[np.bool_]:
    """(n,) which points to draw, on logarithmic axes.

    Every cell of a grid that holds a point shows one: of structured and of dense ones that with the
    lowest loss.  So a point that lies apart from the others is always there.
    """
    if len(cloud) <= MOST:
        return np.ones(len(cloud), dtype=bool)
    drawable = np.isfinite(cloud["x"]) & np.isfinite(cloud["loss"])
    drawable &= (cloud["x"] > 0) & (cloud["loss"] > 0)
    found = fronts(cloud)
    rows = np.flatnonzero(drawable)
    columns, lines = _GRID
    column, line = _cells(cloud["x"][rows], columns), _cells(cloud["loss"][rows], lines)
    cell = (column * lines + line) * 2 + cloud["dense"][rows]
    order = np.lexsort((cloud["step"][rows], cloud["trial_id"][rows], cloud["loss"][rows], cell))
    _, first = np.unique(cell[order], return_index=True)
    found[rows[order[first]]] = True
    return found


def _cells(values: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    at = np.log(values)
    spread = max(float(np.ptp(at)), 1e-12) if len(at) else 1.0
    low = at.min() if len(at) else 0.0
    return np.minimum((at - low) / spread * count, count - 1).astype(np.int64)


def fronts(cloud: Cloud) -> NDArray[np.bool_]:
    """(n,) which points of completed runs no other one of the structured, or of the dense ones,
    equals or beats in both x and loss."""
    found = np.zeros(len(cloud), dtype=bool)
    for dense in (False, True):
        rows = np.flatnonzero(cloud["complete"] & (cloud["dense"] == dense))
        of = cloud[rows]
        rows = rows[np.lexsort((of["step"], of["trial_id"], of["loss"], of["x"]))]
        losses = cloud["loss"][rows]
        before = np.minimum.accumulate(np.concatenate([[np.inf], losses[:-1]]))[: len(rows)]
        found[rows[losses < before]] = True
    return found


def lowest_runs(cloud: Cloud, count: int) -> NDArray[np.bool_]:
    """(n,) the points of the `count` runs whose curves come lowest."""
    runs, run = np.unique(cloud["trial_id"], return_inverse=True)
    least = np.full(len(runs), np.inf)
    np.minimum.at(least, run, cloud["loss"])
    chosen = np.zeros(len(runs), dtype=bool)
    chosen[np.argsort(least, kind="stable")[:count]] = True
    found: NDArray[np.bool_] = chosen[run]
    return found
