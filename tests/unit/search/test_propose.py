from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import qmc

from nas.designs.einsum import theta_of
from nas.planning.request import OBJECTIVES, SAMPLERS, SearchRequest
from nas.planning.runs import RunPlan
from nas.search import PastTrial, Proposal, propose
from nas.search.propose import MAX_ATTEMPTS
from nas.search.space import distributions, plan_of
from tests.support.tiers import only

shares = st.floats(0, 1)


def request(**fields: Any) -> SearchRequest:
    return SearchRequest.checked({"train_flops": 4e11, "trials": 60, **fields})


def outcome(req: SearchRequest, p: Proposal) -> PastTrial:
    """A made-up result that depends on the structure, so that samplers have something to learn."""
    share = p.params["beta_share"]
    assert isinstance(share, float)
    loss = 2.0 + abs(math.log(p.plan.width / 64)) + (share - 0.2) ** 2
    values = (loss,) if req.objective == "budget" else (loss, math.log(p.plan.train_flops))
    # through JSON, as the store keeps it
    state = json.loads(json.dumps(p.sampler_state))
    return PastTrial(json.loads(json.dumps(p.params)), "complete", values, state)


def known_in(req: SearchRequest, past: list[PastTrial]) -> Callable[[RunPlan], bool]:
    plans = [plan_of(req.settings, req, t.params) for t in past]
    seen = {(p.structures, p.steps) for p in plans}
    return lambda plan: (plan.structures, plan.steps) in seen


def run(req: SearchRequest, count: int, past: list[PastTrial] | None = None) -> list[Proposal]:
    history = list(past or [])
    proposals: list[Proposal] = []
    for number in range(len(history), count):
        p = propose(req, req.settings, number, history, known_in(req, history))
        proposals.append(p)
        history.append(outcome(req, p))
    return proposals


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("sampler", only(["tpe", "nsga2"], SAMPLERS))
def test_a_resumed_search_proposes_what_the_uninterrupted_one_would(
    sampler: str, objective: str
) -> None:
    count = 14 if sampler == "gp" else 24
    req = request(sampler=sampler, objective=objective)
    whole = run(req, count)
    past = [outcome(req, p) for p in whole[: count - 4]]
    resumed = run(req, count, past)
    assert [p.params for p in resumed] == [p.params for p in whole[count - 4 :]]


@pytest.mark.parametrize("sampler", only(["tpe"], ["tpe", "nsga2", "random", "qmc"]))
def test_structures_are_not_repeated(sampler: str) -> None:
    plans = [p.plan for p in run(request(sampler=sampler), 30)]
    assert len({(p.structures, p.steps) for p in plans}) == len(plans)


@pytest.mark.parametrize("objective", OBJECTIVES)
@settings(max_examples=40)
@given(st.data())
def test_every_point_of_the_box_is_a_run_within_the_budget(
    objective: str, data: st.DataObject
) -> None:
    req = request(objective=objective)
    params = {
        name: data.draw(st.floats(d.low, d.high))  # type: ignore[attr-defined]
        for name, d in distributions(req, req.settings).items()
    }
    plan = plan_of(req.settings, req, params)
    own = req.train_flops * params.get("budget_share", 1.0)
    assert own - plan.train_flops_per_step < plan.train_flops <= own
    theta = theta_of(params)
    assert theta.is_canonical
    assert theta.rho <= min(theta.alpha, theta.epsilon) + 1e-12


def test_qmc_is_one_scrambled_sobol_sequence() -> None:
    req = request(sampler="qmc", seed=5)
    proposals = run(req, 9)[1:]  # Optuna draws the first at random, having no space to go by
    space = distributions(req, req.settings)
    names = list(proposals[0].params)
    expected = qmc.Sobol(len(space), seed=5, scramble=True).random(8)
    for p, row in zip(proposals, expected, strict=True):
        for name, share in zip(names, row, strict=True):
            d: Any = space[name]
            assert p.params[name] == pytest.approx(d.low + share * (d.high - d.low))


def test_tpe_learns() -> None:
    req = request(sampler="tpe", trials=60)
    past = [outcome(req, p) for p in run(req, 50)]
    losses = [t.values[0] for t in past if t.values]
    assert sum(losses[-15:]) / 15 < sum(losses[:10]) / 10 - 0.2


def test_nsga2_remembers_generations() -> None:
    req = request(sampler="nsga2", objective="pareto", trials=60)
    proposals = run(req, 30)
    generations = [p.sampler_state["trial"]["NSGAIISampler:generation"] for p in proposals]
    assert generations == sorted(generations)
    assert generations[-1] >= 1


def test_running_and_failed_trials_are_no_obstacle() -> None:
    req = request()
    past = [outcome(req, p) for p in run(req, 12)]
    past[3] = PastTrial(past[3].params, "failed", None, past[3].sampler_state)
    past[-1] = PastTrial(past[-1].params, "running", None, past[-1].sampler_state)
    assert propose(req, req.settings, 12, past, lambda _: False).attempts == 1


def test_a_space_that_is_used_up_is_asked_only_so_often() -> None:
    assert propose(request(), request().settings, 0, [], lambda _: True).attempts == MAX_ATTEMPTS


def test_seeds_matter() -> None:
    one, other = (run(request(seed=s), 2) for s in (0, 1))
    assert one[0].params != other[0].params
    assert one[0].params != one[1].params
