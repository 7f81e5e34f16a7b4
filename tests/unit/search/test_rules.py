from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nas.errors import InvalidInput
from nas.planning.request import SearchRequest
from nas.planning.runs import RunPlan, evaluation_steps, references
from nas.search.propose import Proposal
from nas.search.proposing import proposing
from nas.search.rules import MedianRule, MoAshaRule, _Rule, ranked
from nas.search.scheduling import (
    Advance,
    Begin,
    Confirm,
    Curve,
    End,
    Propose,
    SearchView,
    Stop,
)

RULES: dict[str, Callable[..., _Rule]] = {
    "median": MedianRule,
    "mo-asha-2": MoAshaRule,
    "mo-asha-4": partial(MoAshaRule, ratio=4),
}
BUDGET = 4e11


def request(**fields: Any) -> SearchRequest:
    values = {"train_flops": BUDGET, "trials": 40, "sampler": "random", "references": 3, **fields}
    return SearchRequest.checked(values)


class Replay:
    """Trains nothing: the loss of a run at a step is a function of its plan."""

    def __init__(
        self, req: SearchRequest, loss: Callable[[RunPlan, int], float], total: float | None = None
    ) -> None:
        self.req, self.recipe, self.loss = req, req.settings, loss
        dense = references(self.recipe, req.train_flops, req.references)
        self.curves = [self.trained(Curve(i, p, True, "paused", (), 0), p.steps)
                       for i, p in enumerate(dense)]  # fmt: skip
        self.spent = float(sum(c.train_flops for c in self.curves) * req.replicates)
        self.total, self.begun, self.rounds = total, 0, 0

    def view(self) -> SearchView:
        return SearchView(
            tuple(self.curves), self.spent, self.total, self.req.trials - self.begun, slots=2
        )

    def trained(self, c: Curve, until: int) -> Curve:
        at = [s for s in evaluation_steps(c.plan, self.recipe) if s <= until]
        points = tuple((float(s * c.plan.train_flops_per_step), self.loss(c.plan, s)) for s in at)
        if any(math.isinf(loss) for _, loss in points):
            kept = tuple(p for p in points if math.isfinite(p[1]))
            return replace(c, state="failed", points=kept, step=until)
        state: Any = "complete" if until == c.plan.steps else "paused"
        return replace(c, state=state, points=points, step=until)

    def spend(self, c: Curve, steps: int, runs: int) -> None:
        self.spent += steps * c.plan.train_flops_per_step * runs

    def run(self, rule: _Rule) -> list[list[Any]]:
        """All rounds, until the rule says that the search has ended."""
        told: list[list[Any]] = []
        while moves := rule.next_round(self.view()):
            assert len(told) < 300, "the search does not end"
            assert len({getattr(m, "place", id(m)) for m in moves}) == len(moves)
            told.append(list(moves))
            for move in moves:
                self.make(move)
            assert self.total is None or self.spent <= self.total
        return told

    def make(self, move: Any) -> None:
        if isinstance(move, Begin):
            self.begun += 1
            p = move.proposal
            c = Curve(
                len(self.curves),
                p.plan,
                False,
                "paused",
                (),
                0,
                p.params,
                sampler_state=p.sampler_state,
            )
            self.curves.append(self.trained(c, move.until))
            self.spend(c, move.until, self.req.replicates)
            return
        c = self.curves[move.place]
        if isinstance(move, Confirm):
            assert c.state == "complete"
            seeds = range(100, 100 + move.seeds)
            self.curves[c.place] = replace(c, confirmed=dict.fromkeys(seeds, c.points[-1][1]))
            self.spend(c, c.step, move.seeds)
            return
        assert c.state == "paused"
        if isinstance(move, Advance):
            assert c.step < move.until <= c.plan.steps
            self.spend(c, move.until - c.step, self.req.replicates)
            self.curves[c.place] = self.trained(c, move.until)
        else:
            state: Any = "stopped" if isinstance(move, Stop) else "complete"
            self.curves[c.place] = replace(c, state=state)


def falling(quality: Callable[[RunPlan], float]) -> Callable[[RunPlan, int], float]:
    """Power laws that do not cross."""
    return lambda plan, step: quality(plan) * (step * plan.train_flops_per_step / 1e9) ** -0.2


def by_hash(salt: int) -> Callable[[RunPlan], float]:
    def quality(plan: RunPlan) -> float:
        drawn = zlib.crc32(f"{salt}/{plan.structures}/{plan.width}".encode()) % 1000
        return math.inf if drawn < 30 and not plan.dense else 2.0 + drawn / 1000

    return quality


@cache
def pooled(objective: str) -> tuple[Proposal, ...]:
    """Candidates that are proposed once for all examples."""
    req = request(objective=objective)
    return tuple(proposing(req, req.settings)(40, 3, ()))


def of_pool(objective: str) -> Propose:
    def propose(count: int, first: int, curves: Sequence[Curve]) -> Sequence[Proposal]:
        return pooled(objective)[first - 3 : first - 3 + count]

    return propose


def rule_of(name: str, req: SearchRequest) -> _Rule:
    return RULES[name](req, req.settings, of_pool(req.objective))


objectives = st.sampled_from(["budget", "pareto"])
names = st.sampled_from(sorted(RULES))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    names, objectives, st.integers(0, 99), st.sampled_from([1, 2]), st.floats(14, 90) | st.none()
)
def test_every_run_ends_and_no_more_is_spent_than_there_is(
    name: str, objective: str, salt: int, replicates: int, runs: float | None
) -> None:
    req = request(objective=objective, replicates=replicates)
    total = None if runs is None else runs * replicates * BUDGET
    replay = Replay(req, falling(by_hash(salt)), total)
    rounds = replay.run(rule_of(name, req))  # asserts the spending after each round
    assert {c.state for c in replay.curves} <= {"complete", "stopped", "failed"}
    assert all(c.state == "complete" for c in replay.curves if c.reference)
    confirmed = [c for c in replay.curves if c.confirmed]
    assert bool(confirmed) == (runs is not None)
    if runs is None:
        assert replay.begun == 40
    else:
        assert replay.begun > 0
        assert sum(c.plan.dense for c in confirmed) == 1
        assert len(confirmed) >= 3 or replay.begun < 3
        assert min(len(c.confirmed) for c in confirmed) >= 2
        assert all(isinstance(m, Confirm) for m in rounds[-1])
    for move in (m for moves in rounds for m in moves):
        if isinstance(move, Stop):
            assert any(ch.isdigit() for ch in move.reason)
        if isinstance(move, End):
            assert replay.curves[move.place].state == "complete"


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), names, objectives, st.integers(0, 99))
def test_the_order_of_curves_decides_nothing(
    data: st.DataObject, name: str, objective: str, salt: int
) -> None:
    req = request(objective=objective)
    replay = Replay(req, falling(by_hash(salt)), data.draw(st.floats(14, 60)) * BUDGET)
    rule = rule_of(name, req)
    for _ in range(data.draw(st.integers(0, 6))):
        for move in rule.next_round(replay.view()):
            replay.make(move)
    view = replay.view()
    shuffled = replace(view, curves=data.draw(st.permutations(view.curves)))
    assert rule.next_round(shuffled) == rule.next_round(view) == rule_of(name, req).next_round(view)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(objectives, st.integers(0, 39), st.integers(0, 99))
def test_the_median_rule_never_stops_what_is_best_at_every_level(
    objective: str, best: int, salt: int
) -> None:
    req = request(objective=objective)
    favoured = pooled(objective)[best].plan
    others = by_hash(salt)
    replay = Replay(req, falling(lambda plan: 1.5 if plan == favoured else others(plan)))
    replay.run(rule_of("median", req))
    [found] = [c for c in replay.curves if c.plan == favoured]
    assert found.state == "complete"
    assert found.step == favoured.steps


def test_a_run_above_the_median_is_stopped_and_told_why() -> None:
    req = request()
    quality = {p.plan: 2.0 + i / 100 for i, p in enumerate(pooled("budget"))}
    replay = Replay(req, falling(lambda plan: quality.get(plan, 3.0)))
    rule = rule_of("median", req)
    for move in rule.next_round(replay.view()):
        replay.make(move)
    moves = rule.next_round(replay.view())
    stopped = [m for m in moves if isinstance(m, Stop)]
    # 16 candidates and 3 worse references: the tenth is the median
    assert [m.place for m in stopped] == list(range(3 + 10, 3 + 16))
    assert "is above" in stopped[0].reason
    assert re.search(r"the median of 1\d runs there", stopped[0].reason)


def test_mo_asha_lets_the_best_half_of_a_rung_go_on() -> None:
    req = request()
    quality = {p.plan: 2.0 + (i * 7 % 40) / 100 for i, p in enumerate(pooled("budget"))}
    replay = Replay(req, falling(lambda plan: quality.get(plan, 3.0)))
    rule = rule_of("mo-asha-2", req)
    for move in rule.next_round(replay.view()):
        replay.make(move)
    moves = rule.next_round(replay.view())
    # a run whose warm-up is a larger share of it begins at a later rung, and those go on first
    begun: dict[int, list[int]] = {}
    for c in replay.curves[3:]:
        begun.setdefault(len(rule.levels(c.plan)), []).append(c.place)
    expected = [
        place
        for _, places in sorted(begun.items())
        for place in sorted(places, key=lambda p: quality[replay.curves[p].plan])[
            : math.ceil(len(places) / 2)
        ]
    ]
    assert [m.place for m in moves if isinstance(m, Advance)] == expected
    assert sum(isinstance(m, Begin) for m in moves) == 16 - len(expected)
    told = replay.run(rule)
    stopped = [m for m in told[-1] if isinstance(m, Stop)]
    assert all(re.search(r"rank \d+ of \d+ at 1/\d+ of its run", m.reason) for m in stopped)
    least = min((c for c in replay.curves if not c.reference), key=lambda c: quality[c.plan])
    assert least.state == "complete"


def test_references_are_never_stopped() -> None:
    req = request()
    replay = Replay(req, falling(lambda plan: 9.0 if plan.dense else 2.0))
    replay.curves = [replay.trained(replace(c, points=()), c.plan.steps // 8)
                     for c in replay.curves]  # fmt: skip
    assert {c.state for c in replay.curves} == {"paused"}
    moves = rule_of("median", req).next_round(replay.view())
    assert moves[:3] == [Advance(c.place, c.plan.steps) for c in replay.curves]


def test_fronts_in_turn_and_spread() -> None:
    front = [(1.0, 9.0, 1), (2.0, 8.0, 2), (3.0, 7.0, 3), (4.0, 1.0, 4)]
    behind = [(2.5, 8.5, 5), (9.0, 2.0, 6)]
    assert ranked(behind + front) == [1, 4, 2, 3, 5, 6]


def test_a_ratio_between_evaluations_is_refused() -> None:
    req = request()
    with pytest.raises(InvalidInput, match="ratio"):
        MoAshaRule(req, req.settings, of_pool("budget"), 3)  # type: ignore[arg-type]


def test_levels_are_evaluations() -> None:
    req = request()
    rule = rule_of("median", req)
    plan = pooled("budget")[0].plan
    levels = rule.levels(plan)
    assert set(levels) <= set(evaluation_steps(plan, req.settings))
    assert levels[-1] == plan.steps
    assert all(b / a == pytest.approx(2, rel=0.1) for a, b in pairwise(levels))
