"""What a model of learning curves knows of a run before it begins: numbers, of every family alike.

ω, ψ and ν are read from the integers of a block at the run's width, where they are exact and hold
for chains, mixtures and rectangles too: of MACs M, parameters P and generic ranks against the
dense block's D = Σ d_in · d_out,

    ν = 1 + log(M / D) / log w,   ω = log(M / P) / log w,   ψ = 1 + mean log(rank / min d) / log w

which are the exponents of arXiv:2410.02117, section 4, where M, P and ranks are powers of w.  The
width itself is told in doublings of the recipe's base width, so that runs of other scales compare.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from nas.designs.structure import LinearStructure
from nas.designs.theta import AXES, Theta
from nas.planning.cost import structures_of
from nas.planning.recipe import Recipe
from nas.planning.runs import RunPlan

Array = NDArray[np.float64]
#: Names of the features, in order.
NAMES = ("log_width", "omega", "psi", "nu", *AXES, "factors", "mixture", "other")


def features(recipe: Recipe, plans: Sequence[RunPlan]) -> Array:
    """One row a plan, shape (plans, len(NAMES)); every column is of the order of 1."""
    return np.array([_row(recipe, plan) for plan in plans]).reshape(len(plans), len(NAMES))


def _row(recipe: Recipe, plan: RunPlan) -> list[float]:
    block = structures_of(recipe, plan.design, plan.width)
    log_width = math.log(plan.width)
    macs, params = sum(s.macs for s in block), sum(s.params for s in block)
    dense = sum(s.d_in * s.d_out for s in block)
    rank = fmean(math.log(_rank(s) / min(s.d_in, s.d_out)) for s in block)
    family = plan.design.family
    exponents, factors = [0.0] * len(AXES), 2.0
    if len(plan.design.exponents) == len(AXES):
        exponents = list(Theta.of(plan.design.exponents).canonical().values)
    elif family.startswith("einsum"):
        factors = float(family.removeprefix("einsum"))
    mixture = family.endswith("-moe")
    known = mixture or family.startswith("einsum")
    return [
        math.log2(plan.width / recipe.base_width),
        math.log(macs / params) / log_width,
        1.0 + rank / log_width,
        1.0 + math.log(macs / dense) / log_width,
        *exponents,
        factors - 2.0,
        float(mixture),
        float(not known),
    ]


def _rank(structure: LinearStructure) -> float:
    """Generic rank; full where a family has none: mixtures add up experts, or it is not linear."""
    return max(1.0, float(getattr(structure, "rank", min(structure.d_in, structure.d_out))))
