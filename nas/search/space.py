"""The search space: a box of plain numbers and choices, and its map to design, width and budget.

The box covers canonical, non-degenerate θ.  An axis that half of the box maps to exactly 0 gives
the faces of the simplices (low-rank, Monarch, Kronecker, BTT …) a positive share of proposals;
uniform exponents would almost never hit them.

Where a search may choose among families, numbers of factors, experts or heads, the box has a
choice for each, and the coordinates of all of them: those that a family has no use for are drawn
and ignored, so that the box is one and the same for every trial, whichever the sampler.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from nas.designs.chain import ChainTheta, intervals
from nas.designs.convolution import Convolution
from nas.designs.design import Design, aligned
from nas.designs.mixture import Mixture
from nas.designs.theta import DENSE, Theta
from nas.planning.cost import RunPlan, least_budget, plan_at
from nas.planning.recipe import Recipe
from nas.planning.request import SearchRequest, Space

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
    if "einsum" in designs.families:
        for factors in designs.factors:
            if factors > 2:
                space.update(dict.fromkeys(_chain_coordinates(factors), _UNIT))
    if "convolution" in designs.families:
        space["kernel"] = _UNIT
    if request.objective == "pareto":
        smallest = least_budget(recipe, designs.dearest()) / request.train_flops
        least = min(1.0, max(LEAST_BUDGET_SHARE, smallest))
        space["budget_share"] = FloatDistribution(least, 1.0, log=True)
    return space


def _choices(designs: Space) -> dict[str, Sequence[Any]]:
    """Every choice that some allowed family takes."""
    found: dict[str, Sequence[Any]] = {"family": designs.families, "heads": designs.heads}
    if "einsum" in designs.families:
        found["factors"] = designs.factors
    if designs.mixtures:
        found |= {"experts": designs.experts, "active": designs.active}
    return found


def _with_zero(share: float) -> float:
    """[0, 1] → [0, 1] with the lower half at exactly 0."""
    return max(0.0, 2.0 * share - 1.0)


def theta_of(params: Mapping[str, Any]) -> Theta:
    """The canonical θ of a point of the box; compute at most dense's in exponents."""
    alpha, epsilon = params["alpha"], params["epsilon"]
    beta = (1.0 - alpha) * _with_zero(params["beta_share"])
    delta = (1.0 - epsilon) * _with_zero(params["delta_share"])
    rho = min(alpha, epsilon) * _with_zero(params["rho_share"])
    gamma, phi = max(0.0, 1.0 - alpha - beta), max(0.0, 1.0 - epsilon - delta)
    return Theta(alpha, beta, gamma, delta, epsilon, phi, rho).canonical()


def _chain_coordinates(factors: int) -> list[str]:
    """Coordinates of a chain: a weight for each axis of the input and of the output, and ranks.

    An axis is named by the first and the last of the factors that share it.
    """
    axes = [f"{first}{last}" for first, last in intervals(factors)]
    names = [f"chain{factors}_{side}{axis}" for side in ("in", "out") for axis in axes]
    return names + [f"chain{factors}_rank{i}" for i in range(1, factors)]


#: Greatest rank exponent of a chain that is proposed: with cube-root axes, any matrix of two of its
#: factors has no higher rank.
_MOST_CHAIN_RANK = 0.5


def chain_of(params: Mapping[str, Any], factors: int) -> ChainTheta | Theta:
    """The chain of a point of the box.

    The axes of a Block Tensor-Train (inputs of factors 1…i, outputs of factors i…N) are always
    there, as α and ε are with two factors; each of the others, which share parameters or cost
    more, is there in a quarter of the box.
    """
    shares = [params[name] for name in _chain_coordinates(factors)]
    shared = intervals(factors)
    count = len(shared)
    inputs = _simplex(shares[:count], [first == 1 for first, _ in shared])
    outputs = _simplex(shares[count : 2 * count], [last == factors for _, last in shared])
    ranks = [_MOST_CHAIN_RANK * _with_zero(share) for share in shares[2 * count :]]
    return ChainTheta.of((*inputs, *outputs, *ranks)).canonical()


def _simplex(shares: Sequence[float], always: Sequence[bool]) -> list[float]:
    """Weights in [0, 1] → exponents that sum to 1."""
    kept = [
        max(share, _LEAST_WEIGHT) if needed else _with_zero(_with_zero(share))
        for share, needed in zip(shares, always, strict=True)
    ]
    # -log(1 - u) of uniform u, normalised, is uniform on the simplex
    weights = [-math.log1p(-min(k, 1 - 1e-9)) for k in kept]
    whole = sum(weights)
    return [w / whole for w in weights]


_LEAST_WEIGHT = 0.1


def design_of(designs: Space, params: Mapping[str, Any]) -> Design:
    """The design of a point of the box."""
    chosen = {name: params.get(name, choices[0]) for name, choices in _choices(designs).items()}
    family = chosen["family"]
    if family == "convolution":
        return Convolution(params["kernel"])
    if family == "ffn-moe":
        return Mixture(None, chosen["experts"], chosen["active"])
    if family == "dense-moe":
        return Mixture(DENSE, chosen["experts"], chosen["active"])
    if family == "einsum" and chosen["factors"] > 2:
        return chain_of(params, chosen["factors"])
    found: Theta | Mixture = theta_of(params)
    if family == "low-rank-moe":
        # at least one slice for each expert; `nas.planning.cost.fit` makes it whole ones
        theta = Theta(1, 0, 0, 0, 1, 0, _with_zero(params["rho_share"]))
        found = Mixture(theta, chosen["experts"], chosen["active"])
    elif family == "btt-moe":
        free = {**params, "beta_share": 0.0, "delta_share": 0.0}
        found = Mixture(theta_of(free), chosen["experts"], chosen["active"])
    if chosen["heads"] == "aligned" and _has_blocks(found):
        return aligned(found)
    return found


def _has_blocks(design: Theta | Mixture) -> bool:
    theta = design.theta if isinstance(design, Mixture) else design
    return theta is not None and not theta.is_dense


def plan_of(recipe: Recipe, request: SearchRequest, params: Mapping[str, Any]) -> RunPlan:
    """The run that a point of the box stands for."""
    own = request.train_flops * params.get("budget_share", 1.0)
    return plan_at(recipe, design_of(request.designs, params), params["width_position"], own)
