"""The rule `frontier` from first round to last, in worlds whose truth is known."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.designs.theta import Theta
from nas.planning.request import SearchRequest
from nas.planning.runs import plan_at
from nas.records.evidence import Evidence
from nas.search.features import features
from nas.search.freeze_thaw import FrontierScheduler
from nas.search.pool import SobolPool
from nas.search.scheduling import Begin, Confirm, Curve, Stop
from tests.support.worlds import played, power_laws, spent_on

BUDGET = 3e10


def wanted(total: float | None = 25 * BUDGET, **fields: object) -> SearchRequest:
    return SearchRequest.checked(
        {
            "task": "regression", "train_flops": BUDGET, "references": 3,
            "total_train_flops": total, **fields,
        }
    )  # fmt: skip


@cache
def pool_of(request_json: str) -> SobolPool:
    request = SearchRequest.model_validate_json(request_json)
    return SobolPool(request, request.settings)


def scheduler(request: SearchRequest, evidence: tuple[Evidence, ...] = ()) -> FrontierScheduler:
    pool = pool_of(request.model_dump_json())
    return FrontierScheduler(request, request.settings, pool, evidence)


def test_a_search_ends_within_its_budget_with_confirmed_runs_and_nothing_left_paused() -> None:
    request = wanted()
    world = power_laws(request.settings)
    curves, rounds, spent = played(scheduler(request), request, request.settings, world)
    assert spent <= request.total_train_flops  # type: ignore[operator]
    assert spent >= 0.8 * request.total_train_flops  # type: ignore[operator]
    assert not [c for c in curves if c.state == "paused"]
    confirmed = [c for c in curves if c.confirmed]
    assert sum(not c.plan.dense for c in confirmed) >= 2
    assert sum(c.plan.dense for c in confirmed) == 1
    assert all(len(c.confirmed) >= 2 for c in confirmed)
    # more candidates than budgets: most are seen on a part of their curve only
    assert sum(not c.reference for c in curves) > 40
    assert any(isinstance(m, Confirm) for m in [*rounds[-2], *rounds[-1]])


def test_the_truly_best_of_its_candidates_is_among_the_confirmed() -> None:
    request = wanted()
    world = power_laws(request.settings, noise=0.0)
    curves, _, _ = played(scheduler(request), request, request.settings, world)
    own = [c for c in curves if not c.reference and not c.plan.dense]
    best = min(own, key=lambda c: world(c.plan, c.plan.train_flops, 0))
    assert best.confirmed
    assert best.state == "complete"


def test_an_interrupted_search_decides_what_it_would_have_decided() -> None:
    request = wanted(12 * BUDGET)
    world, recipe = power_laws(request.settings), request.settings
    whole, rounds, _ = played(scheduler(request), request, recipe, world)
    for stop in (1, len(rounds) // 2, len(rounds) - 1):
        half, before, _ = played(scheduler(request), request, recipe, world, stop_after=stop)
        # another process: nothing but the curves is left
        again = FrontierScheduler(request, recipe, SobolPool(request, recipe))
        both, after, _ = played(again, request, recipe, world, curves=half)
        assert [*before, *after] == rounds
        assert both == whole


def test_features_of_a_run_do_not_depend_on_which_runs_were_looked_at_before() -> None:
    request = wanted()
    named = request.settings
    btt = plan_at(named, Theta(0.5, 0, 0.5, 0, 0.5, 0.5, 0), 0.5, BUDGET)
    # as it rounds at this width it has the same structures
    near = replace(btt, design=Theta(0.501, 0, 0.499, 0, 0.5, 0.5, 0))
    expected = features(named, [btt, near])
    assert not np.array_equal(expected[0], expected[1])
    for first in (btt, near):
        own = scheduler(request)
        own.features([first])
        assert np.array_equal(own.features([btt, near]), expected)


def test_the_order_in_which_runs_ended_changes_nothing() -> None:
    request = wanted(12 * BUDGET)
    world, recipe = power_laws(request.settings), request.settings
    _, rounds, _ = played(scheduler(request), request, recipe, world)
    for seed in (1, 2):
        _, other, _ = played(scheduler(request), request, recipe, world, shuffled=seed)
        assert other == rounds


@settings(max_examples=6, deadline=None)
@given(
    total=st.floats(12.0, 25.0), replicates=st.integers(1, 3), slots=st.sampled_from([1, 2, 16]),
    trials=st.sampled_from([1, 3, 40, 2000]),
)  # fmt: skip
def test_no_budget_is_exceeded_whatever_it_is(
    total: float, replicates: int, slots: int, trials: int
) -> None:
    least = (3 + 3) * replicates + 6
    request = wanted(
        BUDGET * max(total, least), replicates=replicates, trials=trials, space={"factors": [2]}
    )
    world = power_laws(request.settings)
    curves, _, spent = played(scheduler(request), request, request.settings, world, slots=slots)
    own = [c for c in curves if not c.reference]
    assert spent <= request.total_train_flops  # type: ignore[operator]
    assert 1 <= len(own) <= trials
    assert any(c.state == "complete" for c in own)
    assert not [c for c in curves if c.state == "paused"]
    assert any(c.confirmed for c in curves)


def test_what_is_stopped_in_a_round_is_dominated_with_confidence() -> None:
    request = wanted()
    world = power_laws(request.settings)
    curves, rounds, _ = played(scheduler(request), request, request.settings, world)
    on_the_way = {m.place for moves in rounds[:-1] for m in moves if isinstance(m, Stop)}
    assert on_the_way
    own = [c for c in curves if not c.reference]
    for c in own:
        if c.place in on_the_way:
            # at no compute ahead of it would it have been on the front of the complete runs
            true = world(c.plan, float(c.plan.train_flops), 0)
            assert min(o.points[-1][1] for o in own if o.state == "complete") < true


def test_failed_candidates_are_left_alone() -> None:
    request = wanted(15 * BUDGET)
    recipe = request.settings
    world = power_laws(recipe)
    half, _, _ = played(scheduler(request), request, recipe, world, stop_after=2)
    failed = [
        Curve(c.place, c.plan, False, "failed", (), 0, c.params)
        if not c.reference and c.place % 2 else c
        for c in half
    ]  # fmt: skip
    curves, rounds, _ = played(scheduler(request), request, recipe, world, curves=failed)
    touched = {getattr(m, "place", None) for moves in rounds for m in moves}
    assert not touched & {c.place for c in failed if c.state == "failed"}
    assert any(c.confirmed for c in curves)


def test_evidence_that_misleads_costs_little_and_one_that_is_right_helps() -> None:
    request = wanted(14 * BUDGET)
    recipe = request.settings
    world = power_laws(recipe)
    sample = SobolPool(wanted(seed=5), recipe)(150, [], 0)
    plans = [p.plan for p in sample]

    def evidence(sign: float) -> tuple[Evidence, ...]:
        budgets = [[p.train_flops / d for d in (8, 2, 1)] for p in plans]
        curves = [
            [(f, float(np.exp(sign * np.log(world(p, f, 3))))) for f in own]
            for p, own in zip(plans, budgets, strict=True)
        ]
        return (Evidence(plans, curves, recipe, "earlier"),)

    def outcome(sources: tuple[Evidence, ...]) -> float:
        curves, _, _ = played(scheduler(request, sources), request, recipe, world)
        done = [c for c in curves if c.state == "complete" and not c.reference]
        return min(c.points[-1][1] for c in done if c.step == c.plan.steps)

    plain, right, wrong = outcome(()), outcome(evidence(1.0)), outcome(evidence(-1.0))
    assert right <= plain * 1.002
    assert wrong <= plain * 1.01


def test_a_space_of_one_structure_is_searched_over_its_widths() -> None:
    request = wanted(12 * BUDGET, space={"families": ["dense-moe"], "experts": [4]})
    curves, _, spent = played(
        scheduler(request), request, request.settings, power_laws(request.settings)
    )
    own = [c for c in curves if not c.reference]
    assert len({c.plan.width for c in own}) == len(own)
    assert spent <= request.total_train_flops  # type: ignore[operator]


@pytest.mark.parametrize("objective", ["budget", "pareto"])
def test_begun_candidates_start_with_a_slice(objective: str) -> None:
    request = wanted(objective=objective)
    _, rounds, _ = played(
        scheduler(request), request, request.settings, power_laws(request.settings), stop_after=1
    )
    begun = [m for m in rounds[0] if isinstance(m, Begin)]
    assert len(begun) == len(rounds[0]) == 24
    assert all(m.until < m.proposal.plan.steps / 4 for m in begun)


def test_what_is_spent_is_counted_with_confirmations() -> None:
    request = wanted(15 * BUDGET)
    curves, _, spent = played(
        scheduler(request), request, request.settings, power_laws(request.settings)
    )
    without = [c for c in curves if not c.confirmed]
    assert spent_on(without, 1) < spent
