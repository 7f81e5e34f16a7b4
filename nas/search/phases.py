"""Up to where each phase of a search may spend, and what the moves of a round cost.

A budget for the whole search is divided by `nas.planning.division`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nas.planning.division import LEAST_SEEDS, arms_and_seeds, divide
from nas.planning.request import MAX_CONFIRM_SEEDS, SearchRequest
from nas.planning.runs import RunPlan
from nas.search.scheduling import Confirm, Curve, Move, SearchView


@dataclass(frozen=True, slots=True)
class Phases:
    """Up to where each phase may spend, in the unit of the budget; infinite without one."""

    exploring: float
    racing: float
    #: the whole budget: confirming has what is left
    confirming: float
    #: candidates that are trained to their end before any is confirmed
    raced: int

    @classmethod
    def of(cls, view: SearchView, request: SearchRequest) -> Phases:
        """The division of a search's budget.

        It depends on the budget and the cost of runs alone, so that it is the same in every round;
        where the budget is one of seconds, it follows what a train FLOP has cost so far.
        """
        if view.total is None:
            return cls(math.inf, math.inf, math.inf, 0)
        dense = sum(c.plan.train_flops for c in view.curves if c.reference)
        parts = divide(
            view.total, dense * request.replicates * view.cost_of_flop,
            request.train_flops * view.cost_of_flop, request.replicates,
        )  # fmt: skip
        racing = view.total - parts.confirming
        return cls(racing - parts.racing, racing, view.total, parts.candidates)


class Purse:
    """What the moves of a round cost, on top of what is spent."""

    def __init__(self, view: SearchView, replicates: int) -> None:
        self._spent, self._each = view.spent, replicates * view.cost_of_flop

    def left(self, limit: float) -> float:
        """What may still be spent up to a limit."""
        return limit - self._spent

    def pay(self, plan: RunPlan, steps: int, limit: float) -> bool:
        """Whether so many steps of each replicate stay within the limit; they are paid then."""
        cost = steps * plan.train_flops_per_step * self._each
        if self._spent + cost > limit:
            return False
        self._spent += cost
        return True


def confirm(
    view: SearchView, run_flops: float, candidates: Sequence[Curve], dense: Sequence[Curve]
) -> list[Move]:
    """Fresh seeds for the best that are complete, by what is left of the budget; once.

    Parameters
    ----------
    run_flops
        Most train FLOPs of one run.
    candidates, dense
        Complete runs to confirm, the first ones first; at most one of `dense`.
    """
    if view.total is None or any(c.confirmed for c in view.curves):
        return []
    runs = int((view.total - view.spent) / (run_flops * view.cost_of_flop))
    arms, seeds = arms_and_seeds(runs, len(candidates) + len(dense[:1]))
    if seeds < LEAST_SEEDS:
        return []
    chosen = [*candidates[: arms - len(dense[:1])], *dense[:1]]
    return [Confirm(c.place, min(seeds, MAX_CONFIRM_SEEDS)) for c in chosen]
