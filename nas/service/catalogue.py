"""Lists tasks, recipes and searches, and previews what a search would run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, get_args

from nas.designs.design import Design, family_of, parse_design, proposals
from nas.designs.theta import DENSE
from nas.errors import InvalidInput
from nas.planning.recipe import Recipe
from nas.planning.request import SearchRequest, Space
from nas.planning.runs import (
    MIN_REFERENCES,
    RunPlan,
    accepted_budget,
    admissible,
    least_budget,
    minimum_train_flops,
    plans,
    references,
)
from nas.planning.tasks import TaskCard, task_cards, task_names
from nas.records.search import SearchFailure, SearchState
from nas.service.dividing import parts_of
from nas.store import AXES, Search, Store
from nas.store.course import overviews, progress_of, seconds_per_flop


def search_dict(search: Search) -> dict[str, Any]:
    """A search for users, as plain values."""
    return search.model_dump()


def search_detail(store: Store, search: Search) -> dict[str, Any]:
    """The same with how far it has come: at a glance, and its rounds."""
    progress, overview = progress_of(store, search), overviews(store, [search])[search.id]
    return {
        **search_dict(search),
        "progress": progress and progress.model_dump(),
        "overview": overview.model_dump(),
    }


def checked_filters(**given: Any) -> dict[str, Any]:
    """Filters of a list of searches, see `Store.searches`; `InvalidInput` for unknown ones."""
    accepted = {
        "state": get_args(SearchState),
        "failure": get_args(SearchFailure),
        "task": task_names(),
    }
    for name, known in accepted.items():
        if given.get(name) is not None and given[name] not in known:
            raise InvalidInput(name, given[name], " | ".join(known))
    return given


def get_preview(
    request: SearchRequest, recipe: Recipe | None = None, store: Store | None = None
) -> dict[str, Any]:
    """What a search would run, without running it: dense references and the range of widths.

    `recipe` is the request's as its data completes it; by default as it is named.  Runs of `store`
    tell how long it would take.
    """
    recipe, budget = recipe or request.settings, request.train_flops
    dense = references(recipe, budget, request.references)
    runs = (request.trials + len(dense)) * request.replicates
    ruled = request.stopping_rule != "none"
    parts = parts_of(request, recipe, dense, store)
    most = min(budget * runs, request.total_train_flops or math.inf)
    rate = None if store is None else seconds_per_flop(store, request.task)
    shown = {"dense": DENSE, **_examples(request.designs)}
    return {
        "request": request.model_dump(),
        "recipe": _settings(recipe),
        "loss_unit": recipe.loss_unit,
        "trials": request.trials,
        "references": [{name: getattr(p, name) for name in _OF_REFERENCE} for p in dense],
        "replicates": request.replicates,
        "total_runs": None if ruled else runs,
        "total_train_flops_at_most": most,
        "train_seconds_at_most": None if rate is None else most * rate,
        "stopping_rule": request.stopping_rule,
        "parts": parts and parts.model_dump(),
        "train_flops_unit": AXES["train_flops"].unit,
        "minimum_train_flops": least_budget(recipe, request.designs.dearest()),
        "widths": {
            name: [[p.width, p.steps] for p in _plans_shown(recipe, design, budget)]
            for name, design in shown.items()
        },
        "widths_unit": "[width of the model, training steps that fill the budget]; of three and "
        f"more factors at most {_WIDTHS_SHOWN}, evenly spread",
    }


_OF_REFERENCE = ("width", "steps", "train_flops", "params", "forward_flops_per_token")
#: Widths of a slow family that a preview looks at: there may be a thousand.
_WIDTHS_SHOWN = 32


def _plans_shown(recipe: Recipe, design: Design, budget: float) -> Sequence[RunPlan]:
    """The plans of a design, of a chain only some where the recipe has many widths."""
    widths = recipe.widths
    if not family_of(design).slow or len(widths) <= _WIDTHS_SHOWN:
        return plans(recipe, design, budget)
    ratio = len(widths) ** (1 / (_WIDTHS_SHOWN - 1))
    spread = sorted({widths[round(ratio**i) - 1] for i in range(_WIDTHS_SHOWN)})
    found = list(admissible(recipe, design, budget, spread))
    return [p for p in found if p.steps <= recipe.max_steps] or found[-MIN_REFERENCES:]


def _examples(space: Space) -> dict[str, Design]:
    """Named designs of every family that may be proposed: of mixtures the least and the most."""
    texts = (
        text
        for name in space.families
        for found in (proposals()[name],)
        for text in (found.examples(space) if found.examples else (name,))
    )
    return {text: parse_design(text) for text in texts}


def get_tasks(store: Store) -> list[dict[str, Any]]:
    """Every task, with its recipes, their budgets and the data that searches here have used."""
    return [
        {
            "name": task,
            "loss_unit": card.loss_unit,
            # why a plug-in's cannot be used, or null
            "refusal": card.refusal,
            "recipes": [
                {
                    "name": recipe.name,
                    # every one, also those that are stored where they are not these
                    "settings": _settings(recipe),
                    "loss_unit": recipe.loss_unit,
                    "accepted_train_flops": accepted_budget(recipe),
                    "minimum_train_flops": minimum_train_flops(recipe),
                }
                for recipe in card.recipes
            ],
            "minimum_references": MIN_REFERENCES,
            "default_fingerprint": store.default_fingerprint(task),
            "fingerprints": _fingerprints(store, card),
        }
        for task, card in task_cards().items()
    ]


def _fingerprints(store: Store, card: TaskCard) -> list[dict[str, Any]]:
    """The data of a task that searches here have used."""
    found = []
    for fingerprint, searches, newest in store.task_fingerprints(card.name):
        name, unit = newest.recipe or "", card.loss_unit
        with suppress(InvalidInput):  # a plug-in that is another one by now
            name, unit = newest.settings.name, newest.settings.loss_unit
        found.append(
            {
                "fingerprint": fingerprint,
                "searches": searches,
                "recipe": name,
                "overrides": newest.overrides,
                "data": newest.data,
                "trainer": newest.trainer,
                "loss_unit": unit,
            }
        )
    return found


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Every setting of a recipe, those too that are not stored where they have their defaults."""
    later = {"ranks": recipe.ranks, "sharding": recipe.sharding, "optimizer": recipe.optimizer}
    return recipe.as_dict() | later
