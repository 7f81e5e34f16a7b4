"""One proposal: the Optuna study is rebuilt from stored trials, asked once, and thrown away.

Each ask is seeded from (search seed, trial number, attempt), so a resumed search proposes what an
uninterrupted one would have.  What a sampler keeps outside parameters and values (the generation
of a trial, the position in a Sobol sequence) travels in `sampler_state`.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import optuna
from optuna.samplers import (
    BaseSampler,
    GPSampler,
    NSGAIISampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState, create_trial

from nas.planning.recipe import Recipe
from nas.planning.request import SearchRequest
from nas.planning.runs import RunPlan
from nas.search import space

#: Asks after which a proposal that equals an earlier one is accepted.
MAX_ATTEMPTS = 24
_STATES = {
    "running": TrialState.RUNNING,
    "complete": TrialState.COMPLETE,
    "failed": TrialState.FAIL,
}

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True, slots=True)
class PastTrial:
    """An earlier candidate of the search, as a sampler sees it."""

    params: Mapping[str, float | str]
    state: Literal["running", "complete", "failed"]
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


def build_sampler(request: SearchRequest, seed: int) -> BaseSampler:
    """The Optuna sampler of a request; `seed` seeds the samplers that draw anew at each ask."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
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


def _ask(
    request: SearchRequest,
    recipe: Recipe,
    past: Sequence[PastTrial],
    study_attrs: Mapping[str, Any],
    seed: int,
) -> tuple[dict[str, float | str], dict[str, Any], dict[str, Any]]:
    """(parameters, system attributes of the trial, system attributes of the study)."""
    space_ = space.distributions(request, recipe)
    storage = InMemoryStorage()
    directions: list[Literal["minimize"] | Any] = ["minimize"] * (
        2 if request.objective == "pareto" else 1
    )
    study = optuna.create_study(
        storage=storage, sampler=build_sampler(request, seed), directions=directions
    )
    study_id = storage.get_study_id_from_name(study.study_name)
    for trial in past:
        study.add_trial(
            create_trial(
                state=_STATES[trial.state],
                params=dict(trial.params),
                distributions=space_,
                values=trial.values,
                system_attrs=dict(trial.sampler_state.get("trial", {})),
            )
        )
    for key, value in study_attrs.items():
        storage.set_study_system_attr(study_id, key, value)
    asked = study.ask(fixed_distributions=space_)
    attrs = storage.get_study_system_attrs(study_id)
    frozen = storage.get_trial(storage.get_trial_id_from_study_id_trial_number(study_id, len(past)))
    kept = {k: v for k, v in attrs.items() if not k.startswith("study:")}
    return dict(asked.params), dict(frozen.system_attrs), kept


def propose(
    request: SearchRequest,
    recipe: Recipe,
    number: int,
    past: Sequence[PastTrial],
    is_known: Callable[[RunPlan], bool],
) -> Proposal:
    """The next candidate of a search.

    Parameters
    ----------
    request
        The search.
    recipe
        Its recipe, as its data completes it.
    number
        The candidate's place in the search, the references before it counted.
    past
        Every earlier candidate, in the order of their numbers.
    is_known
        Whether an integer structure was proposed before in this search; such a proposal is asked
        again, up to `MAX_ATTEMPTS` times.
    """
    study_attrs: Mapping[str, Any] = past[-1].sampler_state.get("study", {}) if past else {}
    for attempt in range(1, MAX_ATTEMPTS + 1):
        seed = ask_seed(request.seed, number, attempt)
        params, trial_attrs, study_attrs = _ask(request, recipe, past, study_attrs, seed)
        plan = space.plan_of(recipe, request, params)
        if attempt == MAX_ATTEMPTS or not is_known(plan):
            break
    state = {"trial": trial_attrs, "study": dict(study_attrs)}
    return Proposal(params, plan, state, attempt)
