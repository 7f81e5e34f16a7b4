from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nas.designs.taxonomy import parse_theta
from nas.designs.theta import DENSE, Theta
from nas.errors import InvalidInput
from nas.layers import EinsumLinear, Plan
from nas.planning import cost, runs
from nas.planning.recipe import IMAGES, IMAGES_VIT, PIXELS, REGRESSION, TEXT, Recipe
from nas.training.tasks import build_model
from tests.support.strategies import thetas

budgets = st.floats(runs.minimum_train_flops(TEXT), 1e14)
MODELS = [
    ("dense", 32), ("dense", 80), ("monarch", 64), ("monarch", 112), ("btt:rho=1/4", 96),
    ("low-rank:rho=1/2", 64), ("kronecker", 64), ("tensor-train:rho=1/4", 48),
    ("1/2,1/4,1/4,1/4,1/2,1/4,0", 80), ("1/2,1/4,1/4,1/4,1/2,1/4,1/4", 64),
    ("0.94,0.04,0.02,0.10,0.63,0.27,0.01", 160), ("1/3,1/3,1/3,1/3,1/3,1/3,1/3", 144),
]  # fmt: skip


OTHERS: list[tuple[str, int, Recipe]] = [
    (text, 64, recipe)
    for recipe in (PIXELS, IMAGES, IMAGES_VIT, REGRESSION)
    for text in ("dense", "btt:rho=1/4")
]


@pytest.mark.parametrize(("text", "width", "recipe"), [*((*m, TEXT) for m in MODELS), *OTHERS])
def test_flops_and_parameters_are_those_of_the_built_model(
    text: str, width: int, recipe: Recipe
) -> None:
    theta = parse_theta(text)
    model = build_model(recipe, theta, width)
    for layer in model.modules():
        if isinstance(layer, EinsumLinear):  # the order that is charged, in counted products
            layer.plan = Plan("materialised" if layer.structure.is_dense else "a-first")
    if recipe.is_token_model:
        samples = torch.zeros(2, recipe.tokens, dtype=torch.long)
    elif recipe.model == "vit":
        samples = torch.zeros(2, recipe.tokens, recipe.features)
    else:
        samples = torch.zeros(2, recipe.features)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model(samples)
    assert out.shape[-1] == recipe.outputs
    assert counter.get_total_flops() == 2 * cost.forward_flops_per_sample(recipe, theta, width)
    assert sum(p.numel() for p in model.parameters()) == cost.parameters(recipe, theta, width)


@settings(max_examples=40)
@given(thetas(), st.floats(0, 1), budgets)
def test_a_run_fills_its_budget_to_within_one_step(
    theta: Theta, position: float, budget: float
) -> None:
    plan = runs.plan_at(TEXT, theta, position, budget)
    assert budget - plan.train_flops_per_step < plan.train_flops <= budget
    assert plan.steps >= TEXT.min_steps
    assert plan.train_flops_per_step == cost.train_flops_per_step(TEXT, plan.design, plan.width)


@given(thetas(), st.sampled_from([16, 48, 64, 80, 144, 272]))
def test_fitted_structures_never_cost_more_than_dense(theta: Theta, width: int) -> None:
    fitted = runs.fit(TEXT, theta, width)
    assert not any(s.is_degenerate for s in cost.structures_of(TEXT, fitted, width))
    if not any(s.is_degenerate for s in cost.structures_of(TEXT, theta, width)):
        assert fitted == theta.canonical()


def test_positions_span_the_widths_that_the_budget_admits() -> None:
    found = runs.plans(TEXT, DENSE, 2e11)
    assert runs.plan_at(TEXT, DENSE, 0.0, 2e11) == found[0]
    assert runs.plan_at(TEXT, DENSE, 1.0, 2e11) == found[-1]
    chosen = [runs.plan_at(TEXT, DENSE, i / 50, 2e11).width for i in range(51)]
    assert chosen == sorted(chosen)
    assert all(TEXT.min_steps <= p.steps <= TEXT.max_steps for p in found)


@pytest.mark.parametrize("count", [3, 4, 5, 12])
@settings(max_examples=30)
@given(budget=budgets)
def test_references_are_dense_at_distinct_widths(budget: float, count: int) -> None:
    plans = runs.references(TEXT, budget, count)
    available = len(runs.plans(TEXT, DENSE, budget))
    assert len({p.width for p in plans}) == len(plans) == min(count, available) >= 3
    assert all(p.dense and p.design == DENSE for p in plans)


def test_a_larger_budget_never_narrows_the_widest_model() -> None:
    widest = [runs.plans(TEXT, DENSE, b)[-1].width for b in (5e10, 1e11, 1e12, 1e13, 1e15)]
    assert widest == sorted(widest)
    assert len(set(widest)) == len(widest)


def test_the_least_budget_is_exactly_enough() -> None:
    least = runs.minimum_train_flops(TEXT)
    assert len(runs.plans(TEXT, DENSE, least)) >= runs.MIN_REFERENCES
    with pytest.raises(InvalidInput, match="train_flops"):
        runs.plans(dataclasses.replace(TEXT, min_steps=10**9), DENSE, least)


def test_a_training_step_is_three_forward_passes() -> None:
    one = cost.forward_flops_per_sample(TEXT, DENSE, 64)
    assert cost.train_flops_per_step(TEXT, DENSE, 64) == 3 * TEXT.batch * one
    linears = 12 * 64 * 64 * TEXT.depth
    attention = 2 * TEXT.context * 64 * TEXT.depth
    assert one == 2 * TEXT.context * (linears + attention + 64 * 96)


@settings(max_examples=50)
@given(thetas(), st.sampled_from([16, 64, 144]))
def test_the_rank_is_lowered_no_further_than_needed(theta: Theta, width: int) -> None:
    fitted = runs.fit(TEXT, theta, width)
    assert isinstance(fitted, Theta)
    canonical = theta.canonical()
    if fitted in (canonical, DENSE) or fitted.values[:6] != canonical.values[:6]:
        return
    rank = round(width**fitted.rho)
    assert rank < round(width**canonical.rho)
    one_more = dataclasses.replace(fitted, rho=math.log(rank + 1) / math.log(width))
    assert any(s.is_degenerate for s in cost.structures_of(TEXT, one_more, width))
