"""The search space: a box of plain numbers and choices, and its map to design, width and budget.

The box covers canonical, non-degenerate θ.  An axis that half of the box maps to exactly 0 gives
the faces of the simplices (low-rank, Monarch, Kronecker, BTT …) a positive share of proposals;
uniform exponents would almost never hit them.

Where a search may choose among families, numbers of factors, experts or heads, the box has a
choice for each, and the coordinates of all of them: those that a family has no use for are drawn
and ignored, so that the box is one and the same for every trial, whichever the sampler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from nas.designs.aligned import aligned
from nas.designs.design import Design, Proposals, family_of, proposals
from nas.planning.recipe import Recipe
from nas.planning.request import SearchRequest, Space
from nas.planning.runs import RunPlan, least_budget, plan_at

#: Least share of the budget that a run of the `pareto` objective spends, where the smallest
#: model admits it.
LEAST_BUDGET_SHARE = 1 / 32
_UNIT = FloatDistribution(0.0, 1.0)
#: Below 0.1 a private axis rounds to 1 at every width that a proxy run can afford.
_PRIVATE = FloatDistribution(0.1, 1.0)


def distributions(request: SearchRequest, recipe: Recipe) -> dict[str, BaseDistribution]:
    """Parameter name → distribution."""
    designs = request.designs
    space: dict[str, BaseDistribution] = {
        "alpha": _PRIVATE,
        "epsilon": _PRIVATE,
        "beta_share": _UNIT,
        "delta_share": _UNIT,
        "rho_share": _UNIT,
        "width_position": _UNIT,
    }
    for name, choices in _choices(designs).items():
        if len(choices) > 1:
            space[name] = CategoricalDistribution(choices)
    for proposed in _proposed(designs):
        for name, (low, high) in proposed.coordinates(designs).items():
            space[name] = FloatDistribution(low, high)
    if request.objective == "pareto":
        smallest = least_budget(recipe, designs.dearest()) / request.train_flops
        least = min(1.0, max(LEAST_BUDGET_SHARE, smallest))
        space["budget_share"] = FloatDistribution(least, 1.0, log=True)
    return space


def _proposed(designs: Space) -> list[Proposals]:
    """How each of the allowed families is proposed, in the order of the registry."""
    return [found for name, found in proposals().items() if name in designs.families]


def _choices(designs: Space) -> dict[str, Sequence[Any]]:
    """Every choice that some allowed family takes."""
    taken = {name for proposed in _proposed(designs) for name in proposed.choices}
    found: dict[str, Sequence[Any]] = {"family": designs.families, "heads": designs.heads}
    others = ("factors", "experts", "active", "shared", "granularity", "activation")
    return found | {n: getattr(designs, n) for n in others if n in taken}


def design_of(designs: Space, params: Mapping[str, Any]) -> Design:
    """The design of a point of the box."""
    chosen = {name: params.get(name, choices[0]) for name, choices in _choices(designs).items()}
    found = proposals()[chosen["family"]].design({**params, **chosen})
    aligns = chosen["heads"] == "aligned" and family_of(found).has_blocks(found)
    return aligned(found) if aligns else found


def plan_of(recipe: Recipe, request: SearchRequest, params: Mapping[str, Any]) -> RunPlan:
    """The run that a point of the box stands for."""
    own = request.train_flops * params.get("budget_share", 1.0)
    return plan_at(recipe, design_of(request.designs, params), params["width_position"], own)
