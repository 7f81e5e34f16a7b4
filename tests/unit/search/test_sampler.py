from __future__ import annotations

import math
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution
from scipy.integrate import quad
from scipy.stats import norm, qmc

from nas.analysis.frontier import hypervolume
from nas.planning.request import SearchRequest
from nas.search import Proposer
from nas.search.frontier import expected_improvement
from nas.search.propose import PastTrial
from nas.search.sampler import (
    Box,
    SurrogateSampler,
    _best_and_spread,
    _Improvement,
    front_segments,
    staircase_widths,
)
from nas.search.space import distributions

BOX = Box(
    {
        "share": FloatDistribution(0.1, 1.0),
        "budget": FloatDistribution(1 / 32, 1.0, log=True),
        "family": CategoricalDistribution(("einsum", "chain", "mixture")),
    }
)

shares = st.floats(0, 1)
#: the first draws of a process are slow
not_timed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=40)


def request(**fields: Any) -> SearchRequest:
    values = {"train_flops": 4e11, "trials": 60, "sampler": "surrogate", **fields}
    return SearchRequest.checked(values)


@not_timed
@given(st.lists(st.tuples(shares, shares, shares), min_size=1, max_size=5))
def test_points_of_the_cube_and_parameters_are_the_same(points: list[tuple[float, ...]]) -> None:
    params = BOX.params(np.array(points))
    again = BOX.params(BOX.cube(params))
    assert [p["family"] for p in params] == [p["family"] for p in again]
    for before, after in zip(params, again, strict=True):
        assert after["share"] == pytest.approx(before["share"])
        assert after["budget"] == pytest.approx(before["budget"])
        assert 1 / 32 <= before["budget"] <= 1
    assert BOX.coordinates(np.array(points)).sum(axis=1) == pytest.approx(
        [1 + p[0] + p[1] for p in points]
    )


@not_timed
@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(0.05, 3))
def test_expected_improvement_is_its_integral(below: float, mean: float, deviation: float) -> None:
    least = mean - 10 * deviation
    whole, _ = quad(
        lambda x: (below - x) * norm.pdf(x, mean, deviation), min(least, below), below,
        points=[mean] if least < mean < below else None,
    )  # fmt: skip
    found = expected_improvement(np.array(below), np.array(mean), np.array(deviation))
    assert float(found) == pytest.approx(whole, abs=1e-6)


points = st.lists(st.tuples(st.floats(-3, 0), st.floats(-2, 1)), min_size=1, max_size=8)


@not_timed
@given(points, st.floats(-3, 0), st.floats(-3, 1.5))
def test_what_a_sure_point_adds_is_the_area_it_adds(
    earlier: list[tuple[float, float]], cost: float, loss: float
) -> None:
    """Against the hypervolume of fronts, which is over log10 of plain FLOPs."""
    costs, losses = np.array(earlier).T
    edges, heights = front_segments(losses, costs, 2.0, 0.0)
    score = _Improvement(heights, staircase_widths(edges, np.array([cost])))
    found = score(np.array([loss]), np.array([1e-9]))[0] / math.log(10)

    def area(all_of: list[tuple[float, float]]) -> float:
        return hypervolume([math.exp(c) for c, _ in all_of], [y for _, y in all_of], (1.0, 2.0))

    assert found == pytest.approx(area([*earlier, (cost, loss)]) - area(earlier), abs=1e-6)


@not_timed
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=60), st.integers(4, 20))
def test_the_best_and_a_spread(values: list[float], most: int) -> None:
    kept = _best_and_spread(np.array(values), most)
    assert len(set(kept.tolist())) == len(kept) == min(len(values), most)
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    assert set(order[: most // 2]) <= set(kept.tolist())
    assert order[-1] in kept.tolist()


def test_a_search_begins_with_a_sobol_sequence() -> None:
    req = request(seed=5)
    proposer = Proposer(req, req.settings)
    space = distributions(req, req.settings)
    expected = qmc.Sobol(len(space), seed=5, scramble=True).random(8)
    found = proposer.propose(8, 3, lambda _: False)
    assert Box(space).cube([p.params for p in found]) == pytest.approx(expected)


@pytest.mark.parametrize("objective", ["budget", "pareto"])
def test_it_learns(objective: str) -> None:
    req = request(objective=objective)
    proposer, place, rounds = Proposer(req, req.settings), 0, list[list[float]]()
    for _ in range(3):
        rounds.append([])
        for p in proposer.propose(16, place, lambda _: False):
            params: Any = p.params
            loss = (params["beta_share"] - 0.2) ** 2 + (params["alpha"] - 0.6) ** 2
            cost = params.get("budget_share", 1.0)
            values = (loss - 0.1 * math.log(cost), math.log(p.plan.train_flops))
            past = PastTrial(p.params, "complete", values[: 1 + (objective == "pareto")], {})
            proposer.observe(place, past)
            rounds[-1].append(loss)
            place += 1
    assert np.mean(rounds[2]) < 0.5 * np.mean(rounds[0])


def test_optuna_can_use_it() -> None:
    req = request()
    space = distributions(req, req.settings)
    study = optuna.create_study(sampler=SurrogateSampler(req, req.settings, 0))
    for _ in range(10):
        trial = study.ask(fixed_distributions=space)
        study.tell(trial, abs(trial.params["alpha"] - 0.6))
    assert len({t.params["alpha"] for t in study.trials}) == 10
