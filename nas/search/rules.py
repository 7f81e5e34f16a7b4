"""The stopping rules that go with any sampler: the median at equal compute, and MO-ASHA.

Both decide a round from the curves alone, whatever their order: which paused runs go on to their
next level, which are stopped, and how many candidates begin.  Where nothing begins and nothing
goes on, paused runs end: as complete, shorter runs where a point of theirs is on the front of all
curves, else stopped.  What is left of a budget for the whole search confirms the best.
"""

from __future__ import annotations

import bisect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nas.errors import InvalidInput
from nas.planning.recipe import Recipe
from nas.planning.request import SearchRequest
from nas.planning.runs import RunPlan, evaluation_steps
from nas.search.phases import Phases, Purse, confirm
from nas.search.scheduling import (
    Advance,
    Begin,
    Curve,
    End,
    Move,
    Propose,
    SearchView,
    Stop,
)

#: Runs and slots: moves that train in a round.
_LEAST_ROUND, _ROUND_PER_SLOT = 16, 4
#: Losses, its own among them, that a run is compared with before the median rule may stop it.
_LEAST_COMPARED = 5
#: Runs at the same level differ by rounding to whole steps, in log train FLOPs by less than this.
_SAME_COMPUTE = math.log(2) / 8


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a rule says of the paused candidates; those it does not name wait."""

    #: those that may go on, the most promising first
    go_on: Sequence[Curve]
    stop: Sequence[Stop] = ()
    #: place → why a run is not among those that go on
    why: Mapping[int, str] = field(default_factory=dict)


class _Rule(ABC):
    """A scheduler whose rule decides on paused candidates; see `nas.search.scheduling`.

    Parameters
    ----------
    request, recipe
        The search, and its recipe as its data completes it.
    propose
        Proposes new candidates.
    ratio
        Compute at a level over that at the one before.
    """

    def __init__(
        self, request: SearchRequest, recipe: Recipe, propose: Propose, ratio: Literal[2, 4] = 2
    ) -> None:
        if ratio not in (2, 4):
            raise InvalidInput("ratio", ratio, "2 or 4, whole numbers of evaluations")
        self._request, self._recipe, self._propose = request, recipe, propose
        self._ratio = ratio

    def levels(self, plan: RunPlan) -> list[int]:
        """The steps at which a run may be paused, ascending, and its last one."""
        stride = round(2 * math.log2(self._ratio))
        return evaluation_steps(plan, self._recipe)[::-stride][::-1]

    def next_level(self, curve: Curve) -> int:
        """The level that a run reaches next."""
        return next((s for s in self.levels(curve.plan) if s > curve.step), curve.plan.steps)

    @abstractmethod
    def judge(self, curves: Sequence[Curve]) -> Judgement:
        """Judge the paused candidates among `curves`, which are in the order of their places."""

    def next_round(self, view: SearchView) -> list[Move]:
        """See `Scheduler`."""
        curves = sorted(view.curves, key=lambda c: c.place)
        phases = Phases.of(view, self._request)
        judged = self.judge(curves)
        purse = Purse(view, self._request.replicates)
        size = max(_LEAST_ROUND, _ROUND_PER_SLOT * view.slots)
        going = [c for c in curves if c.reference and c.state == "paused"]
        training: list[Move] = []
        for c in (*going, *judged.go_on):
            until = c.plan.steps if c.reference else self.next_level(c)
            if len(training) < size and purse.pay(c.plan, until - c.step, phases.racing):
                training.append(Advance(c.place, until))
        training += self._begin(view, curves, purse, phases, size - len(training))
        if training:
            return [*judged.stop, *training]
        ended = [*judged.stop, *self._close(curves, judged, purse.left(phases.racing))]
        return ended or self._confirm(view, curves)

    def _begin(
        self, view: SearchView, curves: Sequence[Curve], purse: Purse, phases: Phases, room: int
    ) -> list[Move]:
        """New candidates, as long as exploring can pay for one whole run more.

        The condition is one of what is spent, so that exploring, once over, is over for good.
        """
        run = self._request.train_flops * self._request.replicates * view.cost_of_flop
        count = min(view.left, room)
        if count <= 0 or purse.left(phases.exploring) < run:
            return []
        place = curves[-1].place + 1 if curves else 0
        begun: list[Move] = []
        for proposal in self._propose(count, place, curves):
            until = self.levels(proposal.plan)[0]
            if not purse.pay(proposal.plan, until, phases.exploring):
                break
            begun.append(Begin(proposal, until))
        return begun

    def _close(self, curves: Sequence[Curve], judged: Judgement, left: float) -> list[Move]:
        """The last moves of all paused runs that are not stopped already."""
        front = _places_on_front(curves)
        stopped = {stop.place for stop in judged.stop}
        moves: list[Move] = []
        for c in curves:
            if c.state != "paused" or c.place in stopped:
                continue
            if c.place in front or c.reference:
                moves.append(End(c.place))
                continue
            short = f"the budget for the whole search has {left:.4g} left, too little to go on"
            why = judged.why.get(c.place, short)
            moves.append(Stop(c.place, f"no point on the front of all curves; {why}"))
        return moves

    def _confirm(self, view: SearchView, curves: Sequence[Curve]) -> list[Move]:
        """Fresh seeds for the best."""
        ended = [c for c in curves if c.state == "complete" and c.points]
        dense = sorted((c for c in ended if c.plan.dense), key=_by_loss)
        others = [c for c in ended if not c.plan.dense and not c.reference]
        best = self._best(others, len(others))
        return confirm(view, self._request.train_flops, best, dense)

    def _best(self, ended: Sequence[Curve], count: int) -> list[Curve]:
        """The candidates to confirm: of least loss, or evenly spread over the front."""
        order = sorted(ended, key=_by_loss)
        if self._request.objective == "budget":
            return order[:count]
        front: list[Curve] = []
        for c in sorted(ended, key=lambda c: (c.train_flops, *_by_loss(c))):
            if not front or c.points[-1][1] < front[-1].points[-1][1]:
                front.append(c)
        least_first = front[::-1]
        take = min(count, len(front))
        spread = [least_first[round(i * (len(front) - 1) / max(take - 1, 1))] for i in range(take)]
        return [*spread, *(c for c in order if c not in spread)][:count]


def _by_loss(curve: Curve) -> tuple[float, int]:
    return curve.points[-1][1], curve.place


def _places_on_front(curves: Sequence[Curve]) -> set[int]:
    """Runs with a point that no other point equals or beats in both train FLOPs and loss."""
    points = sorted((flops, loss, c.place) for c in curves for flops, loss in c.points)
    found, least = set(), math.inf
    for _, loss, place in points:
        if loss < least:
            least = loss
            found.add(place)
    return found


class MedianRule(_Rule):
    """Stops a run whose loss is above the median of all runs at equal compute.

    The rule of Google Vizier, at compute instead of steps: runs of any width and budget are
    compared, each at the least loss that it had reached by then.
    """

    def judge(self, curves: Sequence[Curve]) -> Judgement:
        """See `_Rule`."""
        measured = [c for c in curves if c.points]
        read = _Reached(measured)
        going: list[tuple[float, int, Curve]] = []
        going += [(0.0, c.place, c) for c in curves if not c.points and _may_stop(c)]
        stop: list[Stop] = []
        for row, c in enumerate(measured):
            if not _may_stop(c):
                continue
            losses = read.by(c.points[-1][0])
            own, there = losses[row], losses[np.isfinite(losses)]
            middle = float(np.median(there))
            if own > middle and len(there) >= _LEAST_COMPARED:
                told = f"loss {math.exp(own):.5g} at {c.points[-1][0]:.4g} train FLOPs is above"
                of = f"the median of {len(there)} runs there"
                stop.append(Stop(c.place, f"{told} {math.exp(middle):.5g}, {of}"))
            else:
                going.append((float((there < own).mean()), c.place, c))
        return Judgement([c for *_, c in sorted(going, key=lambda g: g[:2])], stop)


def _may_stop(curve: Curve) -> bool:
    return curve.state == "paused" and not curve.reference


class _Reached:
    """The least losses of many runs within a compute; straight in log-log between their points.

    As `nas.analysis.scaling.loss_at`, of all runs at once: a search may have 10,000.
    """

    def __init__(self, curves: Sequence[Curve]) -> None:
        longest = max((len(c.points) for c in curves), default=1)
        self._last = np.array([len(c.points) - 1 for c in curves], dtype=np.int64)
        self._x = np.full((len(curves), longest), np.inf)
        self._y = np.full((len(curves), longest), np.inf)
        for row, c in enumerate(curves):
            flops, losses = np.log(np.array(c.points, dtype=np.float64)).T
            self._x[row, : len(flops)] = flops
            self._y[row, : len(losses)] = np.minimum.accumulate(losses)

    def by(self, train_flops: float) -> NDArray[np.float64]:
        """Logarithms (runs,) of the losses; nan for a run whose curve does not cover that."""
        x, rows = math.log(train_flops), np.arange(len(self._x))
        before = (self._x <= x).sum(axis=1)
        left, right = np.maximum(before - 1, 0), np.minimum(before, self._last)
        x0, x1 = self._x[rows, left], self._x[rows, right]
        y0, y1 = self._y[rows, left], self._y[rows, right]
        share = np.where(right > left, (x - x0) / np.where(right > left, x1 - x0, 1.0), 0.0)
        ends = self._x[rows, self._last]
        covered = (self._x[:, 0] - _SAME_COMPUTE <= x) & (x <= ends + _SAME_COMPUTE)
        return np.where(covered, y0 + share * (y1 - y0), np.nan)


class MoAshaRule(_Rule):
    """Successive halving by non-dominated sorting (MO-ASHA, Schmucker et al., arXiv:2106.12639).

    A rung is a share of a run's own length.  Of those that have reached it, the best 1/η go on:
    fronts of (loss there, cost of the whole run) in turn, of a front as many as there is room for,
    spread over it.  Others wait: they go on if their share comes to include them.

    Parameters
    ----------
    ratio
        η.
    cost
        What a whole run costs, the second objective; by default its train FLOPs for the objective
        ``pareto``, and none for ``budget``, where all runs cost the same but for a step.
    """

    def __init__(
        self,
        request: SearchRequest,
        recipe: Recipe,
        propose: Propose,
        ratio: Literal[2, 4] = 2,
        cost: Callable[[RunPlan], float] | None = None,
    ) -> None:
        super().__init__(request, recipe, propose, ratio)
        by_flops = request.objective == "pareto"
        self._cost = cost or (lambda plan: float(plan.train_flops) if by_flops else 0.0)

    def judge(self, curves: Sequence[Curve]) -> Judgement:
        """See `_Rule`."""
        candidates = [c for c in curves if not c.reference]
        rungs: dict[int, list[tuple[float, float, int]]] = {}
        waiting: list[tuple[int, Curve]] = []
        for c in candidates:
            losses = {round(f / c.plan.train_flops_per_step): loss for f, loss in c.points}
            levels = self.levels(c.plan)[::-1]  # a rung is counted from a run's end
            reached = [k for k, step in enumerate(levels) if step <= c.step and step in losses]
            for k in reached:
                rungs.setdefault(k, []).append((losses[levels[k]], self._cost(c.plan), c.place))
            if c.state == "paused":
                waiting.append((min(reached, default=len(levels)), c))
        ranks = {k: {p: r for r, p in enumerate(ranked(rungs[k]))} for k in rungs}
        going: list[tuple[int, int, Curve]] = []
        why: dict[int, str] = {}
        for k, c in waiting:
            members = ranks.get(k, {})
            rank, kept = members.get(c.place, 0), math.ceil(len(members) / self._ratio)
            if rank < kept or not members:
                going.append((k, rank, c))
            else:
                where = f"1/{self._ratio**k} of its run" if k else "its end"
                why[c.place] = f"rank {rank + 1} of {len(members)} at {where}, where {kept} go on"
        return Judgement([c for *_, c in sorted(going, key=lambda g: g[:2])], why=why)


def ranked(members: Sequence[tuple[float, float, int]]) -> list[int]:
    """The places of (loss, cost, place), best first: front by front, each from its least loss on,
    then always the member that is farthest, in ranks, from those before it in its front."""
    fronts: list[list[tuple[float, float, int]]] = []
    cheapest: list[float] = []
    for member in sorted(members):
        # fronts are in the order of their least costs: the first that does not dominate it
        at = bisect.bisect_right(cheapest, member[1])
        if at == len(fronts):
            fronts.append([])
            cheapest.append(member[1])
        fronts[at].append(member)
        cheapest[at] = member[1]
    return [place for front in fronts for place in _spread(front)]


def _spread(front: Sequence[tuple[float, float, int]]) -> list[int]:
    """Members of a front in the order in which they cover it; `front` is sorted by loss."""
    order = [0]
    # along a front the rank in loss is the rank in cost, reversed: one coordinate says both
    gaps = np.arange(len(front), dtype=np.float64)
    while len(order) < len(front):
        farthest = int(np.argmax(gaps))
        order.append(farthest)
        gaps = np.minimum(gaps, np.abs(np.arange(len(front)) - farthest))
    return [front[i][2] for i in order]
