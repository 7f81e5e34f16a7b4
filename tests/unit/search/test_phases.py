from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.analysis.intervals import t_quantile
from nas.planning.division import LEAST_RUNS, arms_and_seeds, confirming_share
from nas.planning.request import SearchRequest
from nas.search.phases import Phases
from nas.search.scheduling import SearchView

RUN = 2e11


def view(total: float | None, cost: float = 1.0) -> SearchView:
    return SearchView((), 0.0, total, left=100, slots=1, cost_of_flop=cost)


def wanted(replicates: int, objective: str = "budget") -> SearchRequest:
    return SearchRequest.checked(
        {"task": "text", "train_flops": RUN, "replicates": replicates, "objective": objective}
    )


@given(
    st.floats(13, 1e4), st.integers(1, 5), st.sampled_from([1.0, 1e-10]),
    st.sampled_from(["budget", "pareto"]),
)  # fmt: skip
def test_phases_follow_one_another_and_each_can_pay_for_its_least(
    runs: float, replicates: int, cost: float, objective: str
) -> None:
    run = RUN * cost
    total = runs * run * replicates
    found = Phases.of(view(total, cost), wanted(replicates, objective))
    assert 0 < found.exploring < found.racing < found.confirming == total
    fresh = int((total - found.racing) / run * (1 + 1e-12))
    assert fresh >= LEAST_RUNS
    arms, _ = arms_and_seeds(fresh, 1000)
    raced = found.racing - found.exploring
    assert raced >= found.raced * run * replicates * (1 - 1e-9)
    assert found.raced >= 1
    assert found.raced <= arms - 1


def test_without_a_budget_nothing_ends_a_phase() -> None:
    assert Phases.of(view(None), wanted(1)) == Phases(math.inf, math.inf, math.inf, 0)


@given(st.integers(0, 500), st.integers(0, 50))
def test_arms_and_seeds_fit(runs: int, most: int) -> None:
    arms, seeds = arms_and_seeds(runs, most)
    assert arms * seeds <= runs
    assert arms <= most
    assert (arms == 0) == (most == 0 or runs < 2 * min(most, 2))
    assert seeds == 0 or seeds >= 2


def test_arms_and_seeds() -> None:
    assert arms_and_seeds(6, 9) == (3, 2)
    assert arms_and_seeds(9, 9) == (3, 3)
    assert arms_and_seeds(25, 9) == (5, 5)
    assert arms_and_seeds(25, 2) == (2, 12)


@pytest.mark.parametrize("runs", [50, 200, 2000])
def test_the_share_is_the_best_of_its_trade(runs: int) -> None:
    """Against a search over shares of what confirming and exploring give, from the definitions."""
    spread, noise, explored = 1.0, 0.1, 90

    def regret(share: float) -> float:
        half_width = t_quantile(12) * math.sqrt(2 * 3 / (share * runs)) * noise
        best = spread * math.sqrt(2 * math.log(explored * (1 - share)))
        return half_width - best

    best = min((i / 1000 for i in range(1, 600)), key=regret)
    assert confirming_share(runs) == pytest.approx(best, rel=0.2)
