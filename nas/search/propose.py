"""Proposals: one Optuna study a search, kept in memory and asked anew for each candidate.

Each ask has a sampler of its own, seeded from (search seed, place, attempt), so a resumed search
proposes what an uninterrupted one would have.  What a sampler keeps outside parameters and values
(the generation of a trial, the position in a Sobol sequence) travels in `sampler_state`.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count as counting_from
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import (
    BaseSampler,
    GPSampler,
    NSGAIISampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

from nas.planning.recipe import Recipe
from nas.planning.request import SearchRequest
from nas.planning.runs import RunPlan
from nas.search import space
from nas.search.sampler import SurrogateSampler
from nas.search.storage import StudyInMemory

#: Asks after which a proposal that equals an earlier one is accepted.
MAX_ATTEMPTS = 24
_STATES = {
    "running": TrialState.RUNNING,
    "complete": TrialState.COMPLETE,
    # of no value, but known to be bad: TPE counts it among the worst
    "stopped": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
_PARENTS = re.compile(r".*:parent:(\d+)")

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True, slots=True)
class PastTrial:
    """An earlier candidate of the search, as a sampler sees it."""

    params: Mapping[str, float | str]
    #: a paused run counts as running
    state: Literal["running", "complete", "stopped", "failed"]
    #: one value an objective, for complete trials only
    values: tuple[float, ...] | None
    sampler_state: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Proposal:
    """A candidate: the point of the box, the run it stands for, and what the sampler must keep."""

    params: dict[str, float | str]
    plan: RunPlan
    sampler_state: dict[str, Any] = field(default_factory=dict)
    #: asks it took, 1 unless earlier ones repeated a structure
    attempts: int = 1


def ask_seed(search_seed: int, number: int, attempt: int) -> int:
    """Seed of one ask, 32 bits."""
    digest = hashlib.sha256(f"ask/{search_seed}/{number}/{attempt}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def what_runs(plan: RunPlan) -> tuple[Any, ...]:
    """What tells the runs of a search apart, seeds aside."""
    return plan.depth, plan.width, plan.steps, plan.structures


def build_sampler(request: SearchRequest, recipe: Recipe, seed: int) -> BaseSampler:
    """The Optuna sampler of a request; `seed` seeds the samplers that draw anew at each ask."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if request.sampler == "surrogate":
            return SurrogateSampler(request, recipe, seed)
        if request.sampler == "tpe":
            # joint model of the parameters; also several times faster at 10^4 trials
            return TPESampler(seed=seed, multivariate=True)
        if request.sampler == "nsga2":
            return NSGAIISampler(seed=seed, population_size=min(50, max(8, request.trials // 5)))
        if request.sampler == "qmc":
            # one Sobol sequence a search: its seed is the search's, its position is stored
            return QMCSampler(
                seed=request.seed,
                scramble=True,
                independent_sampler=RandomSampler(seed=seed),
                warn_independent_sampling=False,
            )
        if request.sampler == "gp":
            return GPSampler(seed=seed)
        return RandomSampler(seed=seed)


class _OneSpace(BaseSampler):
    """A sampler whose trials all have one space, which it need not find anew at each ask.

    Optuna's samplers intersect the spaces of all earlier trials, once some trial has a result;
    from then on that is the same space for good.  What they found is kept in `found`.
    """

    def __init__(self, sampler: BaseSampler, found: dict[str, BaseDistribution]) -> None:
        self._sampler, self._found = sampler, found

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        if isinstance(self._sampler, QMCSampler):  # it looks at running trials too, at no cost
            return self._sampler.infer_relative_search_space(study, trial)
        if not self._found:
            self._found.update(self._sampler.infer_relative_search_space(study, trial))
        return dict(self._found)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._sampler.before_trial(study, trial)


class Proposer:
    """The candidates of one search so far, and what to try next.

    Parameters
    ----------
    request
        The search.
    recipe
        Its recipe, as its data completes it.
    """

    def __init__(self, request: SearchRequest, recipe: Recipe) -> None:
        self._request, self._recipe = request, recipe
        self._space = space.distributions(request, recipe)
        self._storage = StudyInMemory()
        self._study = optuna.create_study(
            storage=self._storage,
            directions=["minimize"] * (2 if request.objective == "pareto" else 1),
        )
        #: place → what is known of it; the number of its trial is its position
        self._past: dict[int, PastTrial] = {}
        self._numbers: dict[int, int] = {}
        #: places that were proposed and not observed yet
        self._unseen: set[int] = set()
        self._found_space: dict[str, BaseDistribution] = {}

    @property
    def places(self) -> frozenset[int]:
        """Places of the candidates that were observed."""
        return frozenset(self._past) - self._unseen

    def observe(self, place: int, past: PastTrial) -> None:
        """Add a candidate, or change what is known of it.

        Raises
        ------
        ValueError
            A new candidate whose place is not after all others.
        """
        self._unseen.discard(place)
        if self._past.get(place) != past:
            self._put(place, past)

    def _put(self, place: int, past: PastTrial) -> None:
        if place not in self._past and self._past and place < next(reversed(self._past)):
            raise ValueError(f"place {place} comes before {next(reversed(self._past))}")
        number = self._numbers.setdefault(place, len(self._numbers))
        trial = create_trial(
            state=_STATES[past.state],
            params=dict(past.params),
            distributions=self._space,
            values=past.values,
            system_attrs=dict(past.sampler_state.get("trial", {})),
        )
        self._past[place] = past
        self._storage.put(number, trial)

    def propose(
        self, count: int, first_place: int, is_known: Callable[[RunPlan], bool]
    ) -> list[Proposal]:
        """The next candidates; each counts as running for those after it.

        Proposals from `first_place` on that were never observed are forgotten first.

        Parameters
        ----------
        count
            Candidates wanted.
        first_place
            Place of the first in the search, the references before it counted.
        is_known
            Whether an integer structure was proposed before in this search; such a proposal is
            asked again, up to `MAX_ATTEMPTS` times, as is one that equals another of these.

        Raises
        ------
        ValueError
            A candidate at `first_place` or after it has been observed.
        """
        while self._past and (last := next(reversed(self._past))) >= first_place:
            if last not in self._unseen:
                raise ValueError(f"place {first_place} is asked for after {last} was observed")
            self._unseen.remove(last)
            self._storage.drop(self._numbers[last])
            del self._past[last], self._numbers[last]
        seen: set[tuple[Any, ...]] = set()

        def known(plan: RunPlan) -> bool:
            return what_runs(plan) in seen or is_known(plan)

        found: list[Proposal] = []
        ranked = self._ranked(count, first_place)
        for place in range(first_place, first_place + count):
            proposal = self._next(place, known, ranked)
            seen.add(what_runs(proposal.plan))
            self._put(place, PastTrial(proposal.params, "running", None, proposal.sampler_state))
            self._unseen.add(place)
            found.append(proposal)
        return found

    def _ranked(self, count: int, place: int) -> list[dict[str, Any]]:
        """Of a sampler that proposes many at once, its best, in order; empty for all others."""
        sampler = build_sampler(self._request, self._recipe, self._seed(place, 1))
        if not isinstance(sampler, SurrogateSampler):
            return []
        wanted = count * 2 + MAX_ATTEMPTS
        return sampler.ranked(self._storage.trials, count, wanted)

    def _seed(self, place: int, attempt: int) -> int:
        return ask_seed(self._request.seed, place, attempt)

    def _next(
        self, place: int, known: Callable[[RunPlan], bool], ranked: list[dict[str, Any]]
    ) -> Proposal:
        """The first of `ranked`, or else of the sampler's own, that is not known."""
        kept = self._kept()
        for attempt in counting_from(1):
            attrs: dict[str, Any] = {}
            if ranked:
                params = ranked.pop(0)
            else:
                params, attrs, kept = self._ask(self._seed(place, attempt), kept)
            plan = space.plan_of(self._recipe, self._request, params)
            if attempt == MAX_ATTEMPTS or not known(plan):
                break
        return Proposal(params, plan, {"trial": attrs, "study": kept}, attempt)

    def _kept(self) -> Mapping[str, Any]:
        """What the sampler kept of the whole study at its last ask."""
        last = self._past[next(reversed(self._past))] if self._past else None
        kept: Mapping[str, Any] = last.sampler_state.get("study", {}) if last else {}
        return kept

    def _ask(
        self, seed: int, kept: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """(parameters, system attributes of the trial, of the study) of one ask."""
        self._storage.system_attrs = dict(kept)
        sampler = build_sampler(self._request, self._recipe, seed)
        self._study.sampler = _OneSpace(sampler, self._found_space)
        try:
            asked = self._study.ask(fixed_distributions=self._space)
        finally:
            dropped = self._storage.drop(len(self._numbers))
        (trial,) = dropped
        return dict(asked.params), trial.system_attrs, _last_parents(self._storage.system_attrs)


def _last_parents(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Without the parents of generations that are over, of which NSGA-II keeps a list each.

    A generation is bred from the one before it, so two are enough; stored with every trial, all of
    them would be 250 MB at 10,000 trials.
    """
    generations = {key: int(m[1]) for key in attrs if (m := _PARENTS.fullmatch(key))}
    over = max(generations.values(), default=0) - 1
    return {k: v for k, v in attrs.items() if generations.get(k, over) >= over}


def propose(
    request: SearchRequest,
    recipe: Recipe,
    number: int,
    past: Sequence[PastTrial],
    is_known: Callable[[RunPlan], bool],
) -> Proposal:
    """The candidate of place `number` after those in `past`, in the order of their places.

    See `Proposer`, of which this makes one for a single proposal.
    """
    proposer = Proposer(request, recipe)
    for place, trial in enumerate(past, number - len(past)):
        proposer.observe(place, trial)
    return proposer.propose(1, number, is_known)[0]
