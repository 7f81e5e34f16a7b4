"""A small scheduler of its own: successive halving, with every kind of move."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nas.planning.recipe import Recipe
from nas.planning.request import SearchRequest
from nas.planning.runs import RunPlan
from nas.search import propose
from nas.search.propose import PastTrial, Proposal
from nas.search.scheduling import (
    Advance,
    Begin,
    Confirm,
    Curve,
    End,
    Move,
    SearchView,
    Stop,
)
from nas.store import Search, Store

#: Factors of √2 below the whole run at which its rungs lie.
_BELOW = (6, 3, 0)


def rung(plan: RunPlan, number: int) -> int:
    """Last step of a rung; evaluations are spaced by √2."""
    return round(plan.steps / math.sqrt(2) ** _BELOW[number])


class Halving:
    """Begins `count` candidates in two batches; of each rung the better half goes on, the next is
    ended where it is, and the others are stopped.  The best and the best dense are confirmed."""

    def __init__(self, request: SearchRequest, recipe: Recipe, count: int = 8) -> None:
        self._request, self._recipe, self._count = request, recipe, count
        #: spent so far at each call, for tests that look at it
        self.spent: list[float] = []

    def next_round(self, view: SearchView) -> Sequence[Move]:
        self.spent.append(view.spent)
        begun = [c for c in view.curves if not c.reference]
        wanted = min(view.left, self._count - len(begun), self._count // 2)
        paused = [c for c in begun if c.state == "paused"]
        if wanted > 0:
            return [Begin(p, rung(p.plan, 0)) for p in self._proposals(view, wanted)]
        if paused:
            return self._race(paused)
        return self._confirmations(view)

    def _proposals(self, view: SearchView, count: int) -> list[Proposal]:
        begun = [c for c in view.curves if not c.reference]
        past = [PastTrial(c.params or {}, "running", None, {}) for c in begun]
        known = {(c.plan.width, c.plan.structures) for c in begun}
        found: list[Proposal] = []
        for i in range(count):
            number = len(view.curves) + i
            proposal = propose(
                self._request, self._recipe, number, past,
                lambda plan: (plan.width, plan.structures) in known,
            )  # fmt: skip
            known.add((proposal.plan.width, proposal.plan.structures))
            past.append(PastTrial(proposal.params, "running", None, proposal.sampler_state))
            found.append(proposal)
        return found

    def _race(self, paused: Sequence[Curve]) -> list[Move]:
        moves: list[Move] = []
        for number in range(len(_BELOW) - 1):
            here = [c for c in paused if c.step == rung(c.plan, number)]
            here.sort(key=lambda c: (c.points[-1][1], c.place))
            kept = math.ceil(len(here) / 2)
            moves += [Advance(c.place, rung(c.plan, number + 1)) for c in here[:kept]]
            moves += [End(c.place) for c in here[kept : kept + 1]]
            moves += [Stop(c.place, f"not among the best {kept}") for c in here[kept + 1 :]]
        return moves

    def _confirmations(self, view: SearchView) -> list[Move]:
        best: list[Curve] = []
        for dense in (False, True):
            ended = [c for c in view.curves if c.state == "complete" and c.reference == dense]
            best += sorted(ended, key=lambda c: (c.points[-1][1], c.place))[:1]
        return [Confirm(c.place, 2) for c in best if not c.confirmed]


def decisions(store: Store, search: Search) -> list[tuple[Any, ...]]:
    """What was decided, and what came of it."""
    trials = store.trials(search.id)
    number = {t.id: t.number for t in trials}
    return [
        (t.number, t.kind, t.state, t.sampler_params, t.seed, t.steps, t.until_step,
         t.trained_steps, t.loss, t.error, t.confirms and number[t.confirms],
         [p.step for p in store.curve(t.id)])
        for t in trials
    ]  # fmt: skip
