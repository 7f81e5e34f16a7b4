"""Proposing candidates, and deciding what a search does next.  The only place that imports
optuna."""

from __future__ import annotations

from collections.abc import Sequence

from nas.planning.recipe import Recipe
from nas.planning.request import SearchRequest
from nas.records.evidence import Evidence
from nas.search.propose import PastTrial, Proposal, Proposer, propose
from nas.search.scheduling import Scheduler

__all__ = ["PastTrial", "Proposal", "Proposer", "propose", "scheduler_of"]


def scheduler_of(
    request: SearchRequest, recipe: Recipe, evidence: Sequence[Evidence] = ()
) -> Scheduler | None:
    """What decides the rounds of a search; None where every run trains to its end.

    Parameters
    ----------
    recipe
        The search's, as its data completes it.
    evidence
        Curves of earlier searches, for the rule ``frontier``.
    """
    # imported where a search needs them: the first loads torch
    if request.stopping_rule == "frontier":
        from nas.search.freeze_thaw import FrontierScheduler
        from nas.search.pool import SobolPool

        return FrontierScheduler(request, recipe, SobolPool(request, recipe), evidence)
    if request.stopping_rule == "none":
        return None
    from nas.search.proposing import proposing
    from nas.search.rules import MedianRule, MoAshaRule

    rule = MedianRule if request.stopping_rule == "median" else MoAshaRule
    return rule(request, recipe, proposing(request, recipe))
