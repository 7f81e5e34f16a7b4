"""The search space: a box of plain numbers and its map to θ, width and budget.

The box covers canonical, non-degenerate θ.  An axis that half of the box maps to exactly 0 gives
the faces of the simplices (low-rank, Monarch, Kronecker, BTT …) a positive share of proposals;
uniform exponents would almost never hit them.
"""

from __future__ import annotations

from collections.abc import Mapping

from optuna.distributions import BaseDistribution, FloatDistribution

from nas.cost import RunPlan, minimum_train_flops, plan_at
from nas.recipe import Recipe
from nas.request import SearchRequest
from nas.theta import Theta

#: Least share of the budget that a run of the `pareto` objective spends, where the smallest
#: model admits it.
LEAST_BUDGET_SHARE = 1 / 32
_UNIT = FloatDistribution(0.0, 1.0)
#: Below 0.1 a private axis rounds to 1 at every width that a proxy run can afford.
_PRIVATE = FloatDistribution(0.1, 1.0)


def distributions(request: SearchRequest, recipe: Recipe) -> dict[str, BaseDistribution]:
    """Parameter name → distribution."""
    space: dict[str, BaseDistribution] = {
        "alpha": _PRIVATE,
        "epsilon": _PRIVATE,
        "beta_share": _UNIT,
        "delta_share": _UNIT,
        "rho_share": _UNIT,
        "width_position": _UNIT,
    }
    if request.objective == "pareto":
        smallest = minimum_train_flops(recipe) / request.train_flops
        least = min(1.0, max(LEAST_BUDGET_SHARE, smallest))
        space["budget_share"] = FloatDistribution(least, 1.0, log=True)
    return space


def _with_zero(share: float) -> float:
    """[0, 1] → [0, 1] with the lower half at exactly 0."""
    return max(0.0, 2.0 * share - 1.0)


def theta_of(params: Mapping[str, float]) -> Theta:
    """The canonical θ of a point of the box; compute at most dense's in exponents."""
    alpha, epsilon = params["alpha"], params["epsilon"]
    beta = (1.0 - alpha) * _with_zero(params["beta_share"])
    delta = (1.0 - epsilon) * _with_zero(params["delta_share"])
    rho = min(alpha, epsilon) * _with_zero(params["rho_share"])
    gamma, phi = max(0.0, 1.0 - alpha - beta), max(0.0, 1.0 - epsilon - delta)
    return Theta(alpha, beta, gamma, delta, epsilon, phi, rho).canonical()


def plan_of(recipe: Recipe, budget: float, params: Mapping[str, float]) -> RunPlan:
    """The run that a point of the box stands for."""
    own = budget * params.get("budget_share", 1.0)
    return plan_at(recipe, theta_of(params), params["width_position"], own)
