"""MO-ASHA over random candidates, as it is published and as users get it.

Asynchronous successive halving: a free worker promotes a run that is among the best 1/η of its rung
and was not promoted yet, from the highest rung down, or begins a random candidate.  Runs of a rung
are ranked by non-dominated sorting in (log loss, log train FLOPs), and within a front by an epsilon
net: each next one is the farthest from those before.  Source: Schmucker et al., "Multi-objective
Asynchronous Successive Halving", arXiv:2106.12639, which calls this NSGA-II sorting with EpsNet.
"""

from __future__ import annotations

import numpy as np

from benchmarks.search.simulation import Clock, Method, Setting, Trace
from benchmarks.search.table import Array


def mo_asha(reduction: int) -> Method:
    """Rungs at every factor `reduction`, 2 or 4, of compute; as many go on to the next."""

    def search(setting: Setting) -> Trace:
        return _Asha(setting, reduction).run()

    return search


def fronts(points: Array) -> list[list[int]]:
    """Rows of (n, k) points by non-dominated sorting, all minimised; the first front first."""
    left = list(range(len(points)))
    found = []
    while left:
        own = points[left]
        no_worse = np.all(own[:, None, :] <= own[None, :, :], axis=2)
        better = np.any(own[:, None, :] < own[None, :, :], axis=2)
        dominated = np.flatnonzero(np.any(no_worse & better, axis=0)).tolist()
        found.append([row for i, row in enumerate(left) if i not in dominated])
        left = [left[i] for i in dominated]
    return found


def epsilon_net(points: Array) -> list[int]:
    """Rows of (n, k) points, the lowest in the first column first, then always the farthest."""
    span = np.ptp(points, axis=0)
    scaled = (points - points.min(0)) / np.where(span > 0, span, 1.0)
    order = [int(np.argmin(points[:, 0]))]
    away = np.linalg.norm(scaled - scaled[order[0]], axis=1)
    while len(order) < len(points):
        away[order] = -1.0
        order.append(int(np.argmax(away)))
        away = np.minimum(away, np.linalg.norm(scaled - scaled[order[-1]], axis=1))
    return order


def ranked(points: Array) -> list[int]:
    """Rows of (n, k) points, the most worth going on first."""
    return [front[row] for front in fronts(points) for row in epsilon_net(points[front])]


class _Asha:
    def __init__(self, setting: Setting, reduction: int) -> None:
        self.setting, self.reduction = setting, reduction
        self.clock = Clock(setting)
        last, apart = setting.table.levels - 1, 2 * (reduction.bit_length() - 1)
        #: levels of the rungs; the last is the whole run, where nothing is promoted
        self.rungs = list(range(last, -1, -apart))[::-1]
        #: of each rung, the entries that reached it, and those of them that went on
        self.reached: list[list[int]] = [[] for _ in self.rungs]
        self.promoted: list[set[int]] = [set() for _ in self.rungs]
        rng = np.random.default_rng(setting.seed)
        self.fresh = rng.permutation(len(setting.table)).tolist()[::-1]
        #: entry → the rung that it is trained up to
        self.towards: dict[int, int] = {}

    def run(self) -> Trace:
        spent_up = False
        while True:
            while self.clock.free and not spent_up:
                move = self._next()
                if move is None:
                    break
                entry, rung = move
                spent_up = not self._begin(entry, rung)
            if not self.towards:
                return self.clock.trace()
            ended = self.clock.wait()
            assert ended is not None
            self.reached[self.towards.pop(ended)].append(ended)

    def _level(self, entry: int, rung: int) -> int:
        """Of a rung that comes before an entry's first evaluation, that evaluation."""
        return max(self.rungs[rung], int(self.setting.table.first[entry]))

    def _begin(self, entry: int, rung: int) -> bool:
        """Whether the compute is enough; a rung that an entry has passed is reached at once."""
        level = self._level(entry, rung)
        if level <= self.clock.reached.get(entry, -1):
            self.reached[rung].append(entry)
            return True
        if not self.clock.affords(entry, level):
            return False
        self.clock.begin(entry, level)
        self.towards[entry] = rung
        return True

    def _next(self) -> tuple[int, int] | None:
        for rung in range(len(self.rungs) - 2, -1, -1):
            entries = self.reached[rung]
            count = len(entries) // self.reduction
            if count <= len(self.promoted[rung]):
                continue
            for row in ranked(self._points(rung))[:count]:
                if entries[row] not in self.promoted[rung]:
                    self.promoted[rung].add(entries[row])
                    return entries[row], rung + 1
        return (self.fresh.pop(), 0) if self.fresh else None

    def _points(self, rung: int) -> Array:
        """(n, 2) log loss and log train FLOPs of the entries of a rung."""
        at = [(entry, self._level(entry, rung)) for entry in self.reached[rung]]
        loss = [self.clock.loss(*place) for place in at]
        flops = [float(self.setting.table.flops[place]) for place in at]
        found: Array = np.log(np.column_stack([loss, flops]))
        return found
