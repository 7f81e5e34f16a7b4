"""Where new candidates of the rule `frontier` come from: a Sobol sequence of the box."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution, FloatDistribution
from scipy.stats import qmc

from nas.planning.recipe import Recipe
from nas.planning.request import SearchRequest
from nas.planning.runs import RunPlan
from nas.search import space
from nas.search.propose import Proposal
from nas.search.scheduling import Curve

#: Points of the sequence that are looked at before the first candidate, and one more for each.
_POINTS = 256
#: Points are drawn in blocks, which keep the sequence balanced.
_BLOCK = 256
#: Fresh candidates below which more points are looked at.
_FEWEST = 16


class SobolPool:
    """Candidates at the points of a scrambled Sobol sequence, each with the whole budget.

    The points are those of the search's seed, and are kept once they have been planned.
    """

    def __init__(self, request: SearchRequest, recipe: Recipe) -> None:
        # a curve holds every budget, so that none is proposed
        self._request = request.model_copy(update={"objective": "budget"})
        self._recipe = recipe
        self._box = space.distributions(self._request, recipe)
        self._sequence = qmc.Sobol(len(self._box), scramble=True, rng=request.seed)
        self._drawn: list[dict[str, Any]] = []
        #: different plans, in the order of the sequence, with their first points
        self._planned: dict[tuple[int, tuple[str, ...]], tuple[int, Proposal]] = {}
        self._looked_at = 0
        self._known: dict[tuple[tuple[str, Any], ...], RunPlan] = {}

    def __call__(self, count: int, curves: Sequence[Curve], seed: int) -> list[Proposal]:
        """At most `count` candidates that equal none of the curves, some of them by `seed`."""
        begun = {_key(c.plan) for c in curves if not c.reference}
        # what has begun is planned already, also in a process that has not seen it begin
        self._known = {_point(c.params): c.plan for c in curves if c.params}
        fresh: list[Proposal] = []
        for scale in (1, 2, 4):  # a small space has few different plans
            points = scale * (_POINTS + len(begun))
            self._plan(points)
            upto = (f for f in self._planned.items() if f[1][0] < points)
            fresh = [proposal for key, (_, proposal) in upto if key not in begun]
            if len(fresh) >= _FEWEST:
                break
        if len(fresh) <= count:
            return fresh
        chosen = np.random.default_rng(seed).choice(len(fresh), count, replace=False)
        return [fresh[i] for i in sorted(chosen.tolist())]

    def _plan(self, points: int) -> None:
        """Plan the candidates of the first points of the sequence."""
        while len(self._drawn) < points:
            self._drawn.extend(map(self._params, self._sequence.random(_BLOCK)))
        for point in range(self._looked_at, points):
            params = self._drawn[point]
            plan = self._known.get(_point(params)) or space.plan_of(
                self._recipe, self._request, params
            )
            self._planned.setdefault(_key(plan), (point, Proposal(params, plan)))
        self._looked_at = max(self._looked_at, points)

    def _params(self, row: np.ndarray[Any, Any]) -> dict[str, Any]:
        """A point of the box from one of the unit cube."""
        found: dict[str, Any] = {}
        for (name, of), share in zip(self._box.items(), row.tolist(), strict=True):
            if isinstance(of, CategoricalDistribution):
                found[name] = of.choices[min(int(share * len(of.choices)), len(of.choices) - 1)]
            else:
                assert isinstance(of, FloatDistribution)
                found[name] = of.low + share * (of.high - of.low)
        return found


def _point(params: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(params.items()))


def _key(plan: RunPlan) -> tuple[int, tuple[str, ...]]:
    return plan.width, plan.structures
