"""Questions to the store and their answers as plain JSON values, the same for REST and CLI."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nas.analysis import best_for_budget, frontier
from nas.analysis.best import INTERVAL_MEANS, Multiplier, Rival
from nas.cost import (
    MIN_REFERENCES,
    accepted_budget,
    minimum_train_flops,
    plans,
    references,
)
from nas.errors import InvalidInput, NotFound
from nas.recipe import LOSS_UNITS, RECIPES, TASKS, Recipe
from nas.request import SearchRequest
from nas.store import CurvePoint, Search, Store
from nas.taxonomy import name_of
from nas.theta import DENSE, Theta

FLOPS_UNIT = "train FLOPs: 1 MAC = 2 FLOPs, training = 3 × forward, all matrix products"


def resolve_task(store: Store, task: str) -> tuple[str, str]:
    """(name, fingerprint) of `name` or `name@fingerprint`.

    A bare name means its default data and recipe.

    Raises
    ------
    InvalidInput
        Unknown task.
    NotFound
        No search on the task's default data has begun on this store.
    """
    name, _, fingerprint = task.partition("@")
    if name not in TASKS:
        raise InvalidInput("task", task, f"{' | '.join(TASKS)}, or one of them with @fingerprint")
    if not fingerprint:
        found = store.default_fingerprint(name)
        if found is None:
            others = ", ".join(f"{name}@{f[0]}" for f in store.task_fingerprints(name)[:8])
            raise NotFound(
                f"no search on the default data and recipe of task {name!r} has begun here"
                + (f"; on others: {others}" if others else "")
            )
        fingerprint = found
    return name, fingerprint


def checked_flops(value: float, field: str = "train_flops") -> float:
    """`value` if it is a positive finite number of FLOPs."""
    if not (math.isfinite(value) and value > 0):
        raise InvalidInput(field, value, "a finite number above 0")
    return value


def search_dict(search: Search) -> dict[str, Any]:
    """A search for users; `runs_total` is None until its dense references are planned."""
    shown = (
        "id", "state", "task", "task_fingerprint", "created_at", "started_at", "finished_at",
        "cancel_requested", "error", "worker", "epoch",
    )  # fmt: skip
    return {
        **{name: getattr(search, name) for name in shown},
        "request": search.request.model_dump(),
        "trial_counts": dict(search.trial_counts),
        "runs_total": search.references + search.request.trials if search.references else None,
    }


def get_frontier(
    store: Store, *, task: str | None = None, search_id: str | None = None
) -> dict[str, Any]:
    """Pareto fronts of one task or one search.

    Raises
    ------
    InvalidInput
        Not exactly one of `task` and `search_id` is given, or the task is unknown.
    NotFound
        No such search, or nothing measured on the task.
    """
    if (task is None) == (search_id is None):
        raise InvalidInput("task, search", f"{task}, {search_id}", "exactly one of the two")
    points = _points(store, task, search_id)
    if task is not None and not points:
        raise NotFound(f"nothing is measured on task {task!r}")
    front = frontier(points)
    return {
        "x": "train_flops",
        "x_unit": FLOPS_UNIT,
        "y": "loss",
        "y_unit": loss_unit(store, task, search_id, points),
        "frontier": [point_dict(p) for p in front.overall],
        "structured": [point_dict(p) for p in front.structured],
        "dense": [point_dict(p) for p in front.dense],
        "points": len(points),
        "trials": len({p.trial_id for p in points}),
    }


def _points(store: Store, task: str | None, search_id: str | None) -> list[CurvePoint]:
    if search_id is not None:
        return store.curve_points(search_id=search_id)
    name, fingerprint = resolve_task(store, task or "")
    return store.curve_points(task=name, fingerprint=fingerprint)


def loss_unit(
    store: Store, task: str | None, search_id: str | None, points: Sequence[CurvePoint]
) -> str:
    """What a loss is measured in; a mean over the task's fixed validation samples."""
    if search_id is None and not points:
        return LOSS_UNITS[(task or "").partition("@")[0]]
    return store.search(search_id or points[0].search_id).request.settings.loss_unit


def point_dict(point: CurvePoint) -> dict[str, Any]:
    """A curve point for users."""
    return {
        "search_id": point.search_id,
        "trial_id": point.trial_id,
        "number": point.number,
        "kind": point.kind,
        "name": point.name,
        "theta": list(point.theta),
        "width": point.width,
        "seed": point.seed,
        "steps": point.step,
        "train_flops": point.train_flops,
        "loss": point.loss,
        "loss_stderr": point.loss_stderr,
        "train_seconds": point.seconds,
    }


def get_best(
    store: Store,
    *,
    train_flops: float,
    task: str | None = None,
    search_id: str | None = None,
) -> dict[str, Any]:
    """The best measured structure within a budget, against dense.

    Raises
    ------
    InvalidInput
        A budget that is no positive number, or an unknown task.
    NotFound
        Nothing is measured within the budget.
    """
    checked_flops(train_flops)
    if (task is None) == (search_id is None):
        raise InvalidInput("task, search", f"{task}, {search_id}", "exactly one of the two")
    answer = best_for_budget(_points(store, task, search_id), train_flops, store.window_losses)
    best = answer.best
    return {
        "theta": list(best.theta),
        "canonical_theta": list(Theta(*best.theta).canonical().values),
        "name": best.name,
        "width": best.width,
        "steps": best.step,
        "train_flops": best.train_flops,
        "train_flops_unit": FLOPS_UNIT,
        "expected_loss": best.loss,
        "loss_unit": loss_unit(store, task, search_id, [best]),
        "interval": list(answer.interval),
        "interval_means": INTERVAL_MEANS,
        "multiplier_over_dense": _multiplier_dict(answer.multiplier),
        "indistinguishable": [_rival_dict(r) for r in answer.indistinguishable],
        "best_structured": point_dict(answer.best_structured) if answer.best_structured else None,
        "best_dense": point_dict(answer.best_dense) if answer.best_dense else None,
        "dense_minus_structured": _rival_dict(answer.dense_difference)
        if answer.dense_difference
        else None,
        "evidence": {
            "trials": answer.trials,
            "seeds": answer.seeds,
            "searches": answer.searches,
            "compared": answer.compared,
        },
        "kind": "measured",
        "budget": train_flops,
    }


def _rival_dict(rival: Rival) -> dict[str, Any]:
    return {
        **point_dict(rival.point),
        "difference": rival.difference,
        "difference_interval": list(rival.interval),
    }


def _multiplier_dict(multiplier: Multiplier | None) -> dict[str, Any] | None:
    if multiplier is None:
        return None
    return {
        "value": multiplier.value,
        "kind": multiplier.kind,
        "interval": None if multiplier.interval is None else list(multiplier.interval),
    }


def get_preview(request: SearchRequest, recipe: Recipe | None = None) -> dict[str, Any]:
    """What a search would run, without running it: dense references and the range of widths.

    `recipe` is the request's as its data completes it; by default as it is named.
    """
    recipe, budget = recipe or request.settings, request.train_flops
    dense = references(recipe, budget, request.references)
    shown = {"dense": DENSE, **_EXAMPLES}
    return {
        "request": request.model_dump(),
        "recipe": recipe.as_dict(),
        "loss_unit": recipe.loss_unit,
        "trials": request.trials,
        "references": [
            {
                "width": p.width,
                "steps": p.steps,
                "train_flops": p.train_flops,
                "params": p.params,
                "forward_flops_per_token": p.forward_flops_per_token,
            }
            for p in dense
        ],
        "total_runs": request.trials + len(dense),
        "total_train_flops_at_most": budget * (request.trials + len(dense)),
        "train_flops_unit": FLOPS_UNIT,
        "minimum_train_flops": minimum_train_flops(recipe),
        "widths": {
            name: [[p.width, p.steps] for p in plans(recipe, theta, budget)]
            for name, theta in shown.items()
        },
        "widths_unit": "[width of the model, training steps that fill the budget]",
    }


def _examples() -> dict[str, Theta]:
    thetas = (Theta(0.5, 0, 0.5, 0, 0.5, 0.5, 0), Theta(1, 0, 0, 0, 1, 0, 0.5))
    return {name_of(t): t for t in thetas}


_EXAMPLES = _examples()


def get_tasks(store: Store) -> list[dict[str, Any]]:
    """Every task, with its recipes, their budgets and the data that searches here have used."""
    return [
        {
            "name": task,
            "loss_unit": LOSS_UNITS[task],
            "recipes": [
                {
                    "name": recipe.name,
                    "settings": recipe.as_dict(),
                    "loss_unit": recipe.loss_unit,
                    "accepted_train_flops": accepted_budget(recipe),
                    "minimum_train_flops": minimum_train_flops(recipe),
                }
                for recipe in RECIPES.values()
                if recipe.task == task
            ],
            "minimum_references": MIN_REFERENCES,
            "default_fingerprint": store.default_fingerprint(task),
            "fingerprints": [
                {
                    "fingerprint": fingerprint,
                    "searches": searches,
                    "recipe": newest.settings.name,
                    "overrides": newest.overrides,
                    "data": newest.data,
                }
                for fingerprint, searches, newest in store.task_fingerprints(task)
            ],
        }
        for task in TASKS
    ]
