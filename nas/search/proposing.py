"""New candidates of a search, from its curves: how a scheduler asks the kept study."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nas.planning.recipe import Recipe
from nas.planning.request import SearchRequest
from nas.search.propose import PastTrial, Proposal, Proposer, what_runs
from nas.search.scheduling import Curve, Propose


def proposing(request: SearchRequest, recipe: Recipe) -> Propose:
    """What proposes the candidates of a search.

    It keeps the Optuna study from one call to the next, and makes it anew where a call has other
    curves than those before, so what it proposes depends on the curves alone.
    """
    kept = Proposer(request, recipe)

    def propose(count: int, first_place: int, curves: Sequence[Curve]) -> Sequence[Proposal]:
        nonlocal kept
        candidates = {c.place: c for c in curves if c.params is not None}
        if not kept.places <= candidates.keys():
            kept = Proposer(request, recipe)
        for place in sorted(candidates):
            kept.observe(place, past_of(candidates[place], request))
        known = {what_runs(c.plan) for c in curves}
        return kept.propose(count, first_place, lambda plan: what_runs(plan) in known)

    return propose


def past_of(curve: Curve, request: SearchRequest) -> PastTrial:
    """A candidate as the sampler sees it: with its last loss, at what it has cost, if complete."""
    assert curve.params is not None
    state = "running" if curve.state == "paused" else curve.state
    values: tuple[float, ...] | None = None
    if state == "complete":
        flops, loss = curve.points[-1]
        # logarithm, because the most expensive runs would dominate a hypervolume in plain FLOPs
        values = (loss,) if request.objective == "budget" else (loss, math.log(flops))
    return PastTrial(curve.params, state, values, curve.sampler_state)
