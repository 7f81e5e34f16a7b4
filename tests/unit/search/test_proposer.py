"""The kept study against one that is rebuilt for each ask: the definition of a proposal."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState, create_trial

from nas.planning.request import OBJECTIVES, SearchRequest
from nas.planning.runs import RunPlan
from nas.search import PastTrial, Proposal, Proposer
from nas.search.propose import MAX_ATTEMPTS, ask_seed, build_sampler, what_runs
from nas.search.space import distributions, plan_of
from tests.support.tiers import only

STATES = {
    "running": TrialState.RUNNING,
    "complete": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
FIRST = 5  # place of the first candidate
ASKED = ["tpe", "nsga2", "random", "qmc", "gp"]


def request(**fields: Any) -> SearchRequest:
    return SearchRequest.checked({"train_flops": 4e11, "trials": 60, **fields})


def rebuilt(
    req: SearchRequest, place: int, past: Sequence[PastTrial], known: Callable[[RunPlan], bool]
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """(parameters, sampler state, attempts), with a new study for each attempt."""
    kept: Mapping[str, Any] = past[-1].sampler_state.get("study", {}) if past else {}
    space = distributions(req, req.settings)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        storage = InMemoryStorage()
        study = optuna.create_study(
            storage=storage,
            sampler=build_sampler(req, req.settings, ask_seed(req.seed, place, attempt)),
            directions=["minimize"] * (2 if req.objective == "pareto" else 1),
        )
        for t in past:
            study.add_trial(
                create_trial(
                    state=STATES[t.state], params=dict(t.params), distributions=space,
                    values=t.values, system_attrs=dict(t.sampler_state.get("trial", {})),
                )
            )  # fmt: skip
        for key, value in kept.items():
            storage.set_study_system_attr(0, key, value)
        asked = study.ask(fixed_distributions=space)
        kept = storage.get_study_system_attrs(0)
        if attempt == MAX_ATTEMPTS or not known(plan_of(req.settings, req, asked.params)):
            break
    state = {"trial": storage.get_trial(len(past)).system_attrs, "study": kept}
    return dict(asked.params), state, attempt


def stored(proposal: Proposal) -> PastTrial:
    """As the store gives it back: through JSON."""
    params, state = json.loads(json.dumps([proposal.params, proposal.sampler_state]))
    return PastTrial(params, "running", None, state)


def ended(past: PastTrial, state: Any, loss: float, req: SearchRequest) -> PastTrial:
    values = (loss,) if req.objective == "budget" else (loss, math.log(1 + loss))
    return replace(past, state=state, values=values if state == "complete" else None)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("sampler", only(["tpe", "nsga2", "qmc"], ASKED))
def test_a_kept_study_proposes_what_a_rebuilt_one_would(sampler: str, objective: str) -> None:
    """Running, failed, stopped and repeated candidates among them, in any order of ending."""
    req = request(sampler=sampler, objective=objective, trials=40)
    drawn = random.Random(f"{sampler}/{objective}")
    proposer, past = Proposer(req, req.settings), dict[int, PastTrial]()
    attempts, plans = 0, set[Any]()
    while len(past) < (16 if sampler == "gp" else 40):

        def known(plan: RunPlan) -> bool:
            # some widths are refused, so that there are second and third attempts
            return what_runs(plan) in plans or plan.width % 3 == 1

        place = FIRST + len(past)
        [found] = proposer.propose(1, place, known)
        params, kept, asks = rebuilt(req, place, list(past.values()), known)
        assert (found.params, found.attempts) == (params, asks)
        assert found.sampler_state["trial"] == kept["trial"]
        attempts += found.attempts
        plans.add(what_runs(found.plan))
        past[place] = stored(found)
        proposer.observe(place, past[place])
        running = [p for p, t in past.items() if t.state == "running"]
        for p in drawn.sample(running, drawn.randint(0, len(running))):
            state = drawn.choices(["complete", "failed", "stopped"], [6, 1, 1])[0]
            past[p] = ended(past[p], state, drawn.random(), req)
            proposer.observe(p, past[p])
        if drawn.random() < 0.1:  # the search is interrupted
            proposer = Proposer(req, req.settings)
            for p, t in past.items():
                proposer.observe(p, t)
    assert attempts > len(past)


@pytest.mark.parametrize(
    "sampler", only(["tpe", "surrogate"], ["surrogate", "tpe", "nsga2", "qmc"])
)
def test_many_at_once(sampler: str) -> None:
    """Each counts as running for the next; a resumed search gives the same ones."""
    req = request(sampler=sampler, objective="pareto")
    proposer = Proposer(req, req.settings)
    past: list[PastTrial] = []
    for _ in range(3):
        found = proposer.propose(9, FIRST + len(past), lambda _: False)
        assert len({what_runs(p.plan) for p in found}) == 9
        again = Proposer(req, req.settings)
        for place, t in enumerate(past, FIRST):
            again.observe(place, t)
        assert again.propose(9, FIRST + len(past), lambda _: False) == found
        if sampler != "surrogate":
            assert [p.params for p in found] == _one_by_one(req, past, len(found))
        for p in found:
            past.append(ended(stored(p), "complete", 2 + math.sin(p.plan.params), req))
            proposer.observe(FIRST + len(past) - 1, past[-1])


def _one_by_one(req: SearchRequest, past: list[PastTrial], count: int) -> list[dict[str, Any]]:
    """Rebuilt asks, each of which sees those before it as running."""
    alone, seen, found = list(past), set[Any](), list[dict[str, Any]]()
    for _ in range(count):
        params, state, _ = rebuilt(
            req, FIRST + len(alone), alone, lambda plan: what_runs(plan) in seen
        )
        seen.add(what_runs(plan_of(req.settings, req, params)))
        found.append(params)
        alone.append(PastTrial(params, "running", None, state))
    return found


def test_proposals_that_came_to_nothing_leave_no_trace() -> None:
    req = request(sampler="nsga2")
    once, twice = Proposer(req, req.settings), Proposer(req, req.settings)
    twice.propose(7, FIRST, lambda _: False)
    for proposer in (once, twice):
        [first] = proposer.propose(1, FIRST, lambda _: False)
        proposer.observe(FIRST, ended(stored(first), "complete", 1.0, req))
    twice.propose(3, FIRST + 1, lambda _: False)
    assert once.propose(2, FIRST + 1, lambda _: False) == twice.propose(
        2, FIRST + 1, lambda _: False
    )


def test_places_are_in_order() -> None:
    req = request(sampler="random")
    proposer = Proposer(req, req.settings)
    [found] = proposer.propose(1, FIRST, lambda _: False)
    proposer.observe(FIRST, stored(found))
    with pytest.raises(ValueError, match="asked for after 5 was observed"):
        proposer.propose(1, FIRST, lambda _: False)
    with pytest.raises(ValueError, match="place 4 comes before 5"):
        proposer.observe(FIRST - 1, stored(found))


def test_what_nsga2_keeps_does_not_grow() -> None:
    req = request(sampler="nsga2", trials=40)  # generations of 8
    proposer, sizes = Proposer(req, req.settings), []
    for place in range(FIRST, FIRST + 64):
        [found] = proposer.propose(1, place, lambda _: False)
        proposer.observe(place, ended(stored(found), "complete", 1 / place, req))
        sizes.append(len(found.sampler_state["study"]))
    assert max(sizes) == 2
