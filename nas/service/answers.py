"""Computes the answers of REST and CLI from the store: fronts, and the best within a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from nas.analysis import best_for_budget, predict_for_budget
from nas.analysis.best import OVER_SEEDS, judge
from nas.analysis.best import Answer as BestFound
from nas.analysis.confirmation import rank_correlation
from nas.analysis.frontier import axis_value, hypervolume, non_dominated
from nas.analysis.laws import Curve, choose_law
from nas.analysis.predict import (
    MOST_BEYOND,
    NO_DENSE,
    PredictedAnswer,
    formula,
    greatest_runnable,
    predicted_rival,
)
from nas.analysis.scaling import compute_optimal
from nas.designs.design import parse_design
from nas.designs.theta import DENSE
from nas.errors import InvalidInput, NotFound
from nas.planning.cost import FLOPS_PER_MAC, TRAIN_OVER_FORWARD, train_flops_per_step
from nas.planning.recipe import Recipe
from nas.planning.runs import MAX_TRAIN_FLOPS, plans
from nas.planning.tasks import task_names
from nas.records.answers import (
    Answer,
    Evidence,
    Extrapolation,
    FrontierAnswer,
    Hypervolume,
    Law,
    Point,
    RealisedMultiplier,
)
from nas.records.device import DeviceRuns
from nas.store import (
    AXES,
    CurvePoint,
    DeviceState,
    Run,
    ScopeState,
    Standings,
    Store,
    StoredPoint,
    task_scope,
)
from nas.store.weights import weights_of_model

FLOPS_UNIT = AXES["train_flops"].unit
UNKNOWN = "unknown: every model was run with one seed; `einsum-nas confirm` runs the best ones anew"
PREDICTED = "the losses are extrapolated; no run was made at this budget"
NOT_REALISED = RealisedMultiplier(
    value=None, kind="undetermined", interval=None, seeds=0,
    reason="no run was made at this budget, so no seconds were measured",
)  # fmt: skip
OF_LAW = (
    "95% over runs with other seeds, by the jackknife, spanned over laws with and without an "
    "offset and of the last factor of 64 and of 8 in compute; that one of them goes on to hold "
    "outside of what was measured is assumed"
)


class NothingMeasured(NotFound):
    """No run of a task or a search has completed, or none within the budget."""


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
    if name not in task_names():
        accepted = f"{' | '.join(task_names())}, or one of them with @fingerprint"
        raise InvalidInput("task", task, accepted)
    if not fingerprint:
        found = store.default_fingerprint(name)
        if found is None:
            others = ", ".join(f"{name}@{f[0]}" for f in store.task_fingerprints(name)[:8])
            raise NothingMeasured(
                f"no search on the default data and recipe of task {name!r} has begun here"
                + (f"; there are results for {others}" if others else "")
                + f"; run `einsum-nas search --task {name} --train-flops 2e11 --wait`"
            )
        fingerprint = found
    return name, fingerprint


def checked_flops(value: float, field: str = "train_flops") -> float:
    """`value` if it is a positive finite number of FLOPs."""
    if not (math.isfinite(value) and value > 0):
        raise InvalidInput(field, value, "a finite number above 0")
    return value


@dataclass(frozen=True, slots=True)
class Scope:
    """What an answer is about: a task's data and recipe, or one search on it."""

    #: of `nas.store.scopes`
    name: str
    task: str
    #: None for a search whose data no worker has loaded yet
    fingerprint: str | None
    #: as it was asked for: what the data of a user completes is not in it, see `_completed`
    recipe: Recipe

    @property
    def loss_unit(self) -> str:
        return self.recipe.loss_unit

    @property
    def label(self) -> str:
        """name@fingerprint of the task."""
        return f"{self.task}@{self.fingerprint}"


def resolve_scope(store: Store, task: str | None, search_id: str | None) -> Scope:
    """The scope that exactly one of a task and a search names.

    Raises
    ------
    InvalidInput
        Not exactly one of the two is given, or the task is unknown.
    NotFound
        No such search, or nothing has begun on the task.
    """
    if (task is None) == (search_id is None):
        raise InvalidInput("task, search", f"{task}, {search_id}", "exactly one of the two")
    if search_id is not None:
        search = store.search(search_id)
        return Scope(search.id, search.task, search.task_fingerprint, search.request.settings)
    name, fingerprint = resolve_task(store, task or "")
    newest = next((r for f, _, r in store.task_fingerprints(name) if f == fingerprint), None)
    if newest is None:
        raise _nothing_yet(f"task {name}@{fingerprint}", name)
    scope = task_scope(name, fingerprint, store.tenant)
    return Scope(scope, name, fingerprint, newest.settings)


def _nothing_yet(where: str, task: str) -> NothingMeasured:
    return NothingMeasured(
        f"nothing is measured on {where} yet: no run has completed; "
        f"run `einsum-nas search --task {task} --train-flops 2e11 --wait`"
    )


def _state_of(store: Standings, scope: Scope, where: str) -> ScopeState:
    state = store.state(scope.name)
    if state is None or not state.trials:
        raise _nothing_yet(where, scope.task)
    return state


def checked_axis(axis: str) -> str:
    """`axis` if fronts can be drawn against it."""
    if axis not in AXES:
        raise InvalidInput("x", axis, " | ".join(AXES))
    return axis


@dataclass(frozen=True, slots=True)
class Measured:
    """Whose runs an answer reads: those of one device where the axis is measured, else all."""

    #: of the standings; see `nas.store.scopes`
    scope: str
    device: str | None = None
    others: Sequence[DeviceState] = ()
    not_timed: int = 0

    @property
    def shown(self) -> dict[str, Any]:
        """The fields of a `nas.records.device.OnDevice`."""
        others = [DeviceRuns(name=d.name, runs=d.trials) for d in self.others]
        return {"device": self.device, "other_devices": others, "not_timed": self.not_timed}


def measured_on(standings: Standings, scope: str, axis: str, device: str | None = None) -> Measured:
    """Whose runs an answer about an axis reads.

    Parameters
    ----------
    device
        Its name, or a part of it that no other device's has; by default that with the most runs.

    Raises
    ------
    InvalidInput
        A device is named that no run ran on, or several, or the axis is not measured.
    """
    if not AXES[axis].measured:
        if device is not None:
            measured = ", ".join(name for name, a in AXES.items() if a.measured)
            raise InvalidInput("device", device, f"no device but on a measured axis: {measured}")
        return Measured(scope)
    found = standings.devices(scope)
    chosen = found[:1]
    if device is not None:
        part = device.casefold()
        chosen = [d for d in found if d.name == device]
        chosen = chosen or [d for d in found if part in d.name.casefold()]
        if len(chosen) != 1:
            names = " | ".join(d.name for d in found) or "none, for nothing was measured here"
            raise InvalidInput("device", device, f"one device, or a part of its name: {names}")
    state = standings.state(scope)
    not_timed = (state.trials if state else 0) - sum(d.trials for d in found)
    if not chosen:
        return Measured(scope, not_timed=not_timed)
    (one,) = chosen
    return Measured(one.scope, one.name, [d for d in found if d is not one], not_timed)


def get_frontier(
    store: Store,
    *,
    task: str | None = None,
    search_id: str | None = None,
    x: str = "train_flops",
    device: str | None = None,
) -> FrontierAnswer:
    """Pareto fronts of one task or one search over completed runs, against one axis.

    Parameters
    ----------
    device
        On a measured axis, the device whose runs are read; see `measured_on`.

    Raises
    ------
    InvalidInput
        Not exactly one of `task` and `search_id` is given, or one of the values is unknown.
    NotFound
        No such search, or nothing measured on the task.
    """
    axis = AXES[checked_axis(x)]
    scope = resolve_scope(store, task, search_id)
    standings = Standings(store)
    state = standings.state(scope.name)
    if search_id is None:
        state = _state_of(standings, scope, f"task {scope.label}")
    place = measured_on(standings, scope.name, x, device)
    structured = standings.front(place.scope, x, dense=False)
    dense = standings.front(place.scope, x, dense=True)
    overall = non_dominated([*structured, *dense], x)
    return FrontierAnswer(
        x=x,
        x_unit=axis.unit,
        x_measured=axis.measured,
        y_unit=scope.loss_unit,
        frontier=[Point.of(p) for p in overall],
        structured=[Point.of(p) for p in structured],
        dense=[Point.of(p) for p in dense],
        compute_optimal=_optimal(overall) if x == "train_flops" else None,
        structured_law=_law(structured) if x == "train_flops" else None,
        dense_law=_law(dense) if x == "train_flops" else None,
        hypervolume=_hypervolume(x, overall, structured, dense, scope.loss_unit),
        points=state.points if state else 0,
        trials=state.trials if state else 0,
        **place.shown,
    )


def _optimal(points: Sequence[CurvePoint]) -> list[int]:
    """Which points of a front are compute-optimal; a loss of 0 has no logarithm."""
    if not points or any(p.loss <= 0 for p in points):
        return []
    flops, losses = _columns(points)
    return [int(i) for i in compute_optimal(flops, losses)]


def _law(points: Sequence[CurvePoint]) -> Law | None:
    optimal = [points[i] for i in _optimal(points)]
    return _fitted(tuple((p.train_flops, p.loss) for p in optimal))


@lru_cache(maxsize=256)
def _fitted(optimal: tuple[tuple[float, float], ...]) -> Law | None:
    """Kept, because a fit takes a second, and a front stays while most runs end."""
    if not optimal:
        return None
    flops, losses = zip(*optimal, strict=True)
    law = choose_law([(np.array(flops), np.array(losses))])
    if law is None:
        return None
    return Law(a=law.a, b=law.b, offset=law.offset, points=law.points, fitted=law.measured)


def _columns(points: Sequence[CurvePoint]) -> Curve:
    return np.array([p.train_flops for p in points]), np.array([p.loss for p in points])


def _hypervolume(
    x: str,
    overall: Sequence[CurvePoint],
    structured: Sequence[CurvePoint],
    dense: Sequence[CurvePoint],
    unit: str,
) -> Hypervolume | None:
    every = [*structured, *dense]
    if not every:
        return None
    reference = (max(axis_value(p, x) for p in every), max(p.loss for p in every))

    def area(points: Sequence[CurvePoint]) -> float:
        return hypervolume([axis_value(p, x) for p in points], [p.loss for p in points], reference)

    return Hypervolume(
        overall=area(overall), structured=area(structured), dense=area(dense),
        reference=reference, unit=f"decades of {x} × {unit}",
    )  # fmt: skip


#: A budget up to this factor above the greatest measured train FLOPs counts as measured, or one
#: step of the shortest run, because a run may end one step short of its budget.
_SAME_BUDGET = 1.02
#: Evaluations lie this far apart: what is best at a budget may have its next one after it.
_NEXT_EVALUATION = 2.0


def checked_budget(budgets: Mapping[str, float | None]) -> tuple[str, float]:
    """(axis, value) of the one budget that is given.

    Raises
    ------
    InvalidInput
        None or several are given, or one that is no positive finite number.
    """
    given = {axis: value for axis, value in budgets.items() if value is not None}
    accepted = ", ".join(AXES)
    for axis in given:
        if axis not in AXES:
            raise InvalidInput("budget", axis, f"one of {accepted}")
    if len(given) != 1:
        shown = ", ".join(f"{axis}={value}" for axis, value in given.items()) or "none"
        raise InvalidInput("budget", shown, f"exactly one of {accepted}")
    ((axis, value),) = given.items()
    return axis, checked_flops(value, axis)


def get_best(
    store: Store,
    *,
    task: str | None = None,
    search_id: str | None = None,
    device: str | None = None,
    published: bool = True,
    **budgets: float | None,
) -> Answer:
    """The best structure within a budget, against dense.

    Parameters
    ----------
    task, search_id
        Exactly one of the two: over all searches on a task's data and recipe, or one search.
    device
        Of a budget that is measured, the device whose runs are read; see `measured_on`.
    published
        Whether the table of `nas.service.published` answers about a task, by its bare name, that
        has no completed run within the budget here; such an answer is marked.
    budgets
        Exactly one: train_flops, train_seconds (of training, evaluation left out), inference_flops
        (per token), params, step_seconds or peak_memory (bytes).

    Raises
    ------
    InvalidInput
        A budget that is no positive number, none or several, or an unknown task; a budget so far
        beyond all measured ones that no run of a measured width would be made at it.
    NotFound
        Nothing is measured within the budget, or it is beyond all measured budgets and no law can
        be fitted.
    """
    axis, budget = checked_budget(budgets)
    try:
        found = _own_best(store, task, search_id, device, axis, budget)
        return found.model_copy(update={"weights": _weights(store, found)})
    except NothingMeasured as error:
        if task is None or not published or device is not None:
            raise
        try:
            return published_answer(task, axis, budget)
        except NotFound as refused:
            raise NothingMeasured(f"{error}; {refused}") from None


def _weights(store: Store, found: Answer) -> int | None:
    """The trial of a measured answer's model whose weights are kept."""
    if found.kind != "measured":
        return None
    best = next(
        c for c in (found.best_structured, found.best_dense)
        if c is not None and (c.design, c.width) == (found.design, found.width)
    )  # fmt: skip
    kept = weights_of_model(store, best.trial_id)
    return None if kept is None else kept.trial_id


def _own_best(
    store: Store, task: str | None, search_id: str | None, device: str | None, axis: str,
    budget: float,
) -> Answer:  # fmt: skip
    """The best by the runs of this service; raises `NothingMeasured` where there are none."""
    scope = resolve_scope(store, task, search_id)
    standings = Standings(store)
    where = f"search {search_id}" if search_id else f"task {scope.label}"
    state = _state_of(standings, scope, where)
    greatest = state.greatest_flops or 0.0
    place = measured_on(standings, scope.name, axis, device)
    same = max(_SAME_BUDGET, 1 + 1 / scope.recipe.min_steps)
    if axis == "train_flops" and budget > greatest * same:
        return _predicted(standings, scope, state, budget)
    runs, left_out = _evidence(standings, scope, place, axis, budget)
    try:
        found = best_for_budget(runs, budget, store.window_losses, axis)
    except NotFound:
        least = standings.least(place.scope, axis)
        there = f" on {place.device}" if place.device else ""
        raise NothingMeasured(
            f"no completed run on {where} within {axis}={budget:.4g}{there}: "
            + (f"the least measured is {least:.6g}" if least else "none was measured")
        ) from None
    return _measured(found, standings, scope, state, place, axis, budget, left_out)


def _evidence(
    standings: Standings, scope: Scope, place: Measured, axis: str, budget: float
) -> tuple[list[Run], int]:
    """(runs near the front at a budget with every run of their models, runs that are unusable)."""
    limits = [budget, budget * _NEXT_EVALUATION] if AXES[axis].along_curve else [budget]
    near = {
        trial
        for dense in (False, True)
        for limit in limits
        for trial in standings.lowest(place.scope, axis, limit, dense=dense)
    }
    runs = standings.runs(scope.name, trials=near, models=standings.models(near))
    if AXES[axis].measured:
        of_device = [r for r in runs if r.device == place.device]
        runs = [r for r in of_device if r.timed or not AXES[axis].along_curve]
    usable = [r for r in runs if r.points and all(_is_usable(p) for p in r.points)]
    return usable, len(runs) - len(usable)


def _is_usable(point: StoredPoint) -> bool:
    return math.isfinite(point.loss) and math.isfinite(point.train_flops) and point.loss > 0


def published_answer(task: str, axis: str, budget: float) -> Answer:
    """The answer of the published table of a task, by its bare name or the table's own data.

    Raises
    ------
    NotFound
        There is no such table, or the budget is below all of it.
    """
    name, _, fingerprint = task.partition("@")
    # which read Parquet, and take long to import where no table answers
    from nas.service.published import best_published, table_of

    bench = table_of(name)
    if bench is None or fingerprint not in ("", bench.about["task_fingerprint"]):
        raise NotFound(f"no published table has runs on {task}")
    got = best_published(bench, axis, budget)
    scope = Scope("", name, got.about.fingerprint, bench.recipe)
    state = ScopeState(0, got.runs, got.points, 0, *got.about.budgets)
    return Answer(
        kind="published",
        **_common(got.found, scope, axis, budget),
        **_of_runs(got.found),
        confirmation=None,
        device=got.found.best.device if AXES[axis].measured else None,
        evidence=_to_evidence(state, got.found, 0),
        published=got.about,
    )


def _measured(
    found: BestFound,
    standings: Standings,
    scope: Scope,
    state: ScopeState,
    place: Measured,
    axis: str,
    budget: float,
    left_out: int,
) -> Answer:
    return Answer(
        kind="measured",
        **_common(found, scope, axis, budget),
        **_of_runs(found),
        confirmation=rank_correlation(standings.confirmed(scope.name)),
        **place.shown,
        evidence=_to_evidence(state, found, left_out),
    )


def _of_runs(found: BestFound) -> dict[str, Any]:
    """The fields of an answer that rests on runs at the budget."""
    verdict, reason = judge(found)
    return {
        "realised_multiplier_over_dense": found.realised,
        "structured_realised_multiplier": found.structured_realised,
        "interval": found.interval,
        "interval_means": OVER_SEEDS if found.noise else UNKNOWN,
        "validation_interval": found.validation_interval,
        "verdict": verdict,
        "verdict_reason": reason,
        "comparisons_mean": found.basis,
        "dense_minus_structured": found.dense_difference,
        "extrapolation": None,
    }


def _common(
    found: BestFound | PredictedAnswer, scope: Scope, axis: str, budget: float
) -> dict[str, Any]:
    """The fields that answers of every kind have from the same place."""
    best, structured, dense = found.best.candidate, found.best_structured, found.best_dense
    of_best = ("name", "theta", "design", "width", "steps", "train_flops", "confirmed")
    return {
        "budget": budget,
        "budget_axis": axis,
        "budget_unit": AXES[axis].unit,
        "task": scope.label,
        "train_flops_unit": FLOPS_UNIT,
        "loss_unit": scope.loss_unit,
        "base_width": scope.recipe.base_width,
        "base_lr": scope.recipe.lr,
        **{name: getattr(best, name) for name in of_best},
        "canonical_theta": list(parse_design(best.design).canonical().exponents),
        "expected_loss": best.loss,
        "multiplier_over_dense": found.multiplier,
        "structured_multiplier": found.structured_multiplier,
        "indistinguishable": found.indistinguishable,
        "best_structured": structured and structured.candidate,
        "best_dense": dense and dense.candidate,
    }


def _to_evidence(state: ScopeState, found: BestFound | PredictedAnswer, left_out: int) -> Evidence:
    noise = found.noise.sd if isinstance(found, BestFound) and found.noise else None
    return Evidence(
        trials=state.trials, points=state.points, searches=state.searches,
        seeds=found.best.seeds, compared=found.compared, noise=noise, not_finite=left_out,
    )  # fmt: skip


def _predicted(standings: Standings, scope: Scope, state: ScopeState, budget: float) -> Answer:
    least, greatest = state.least_flops or 0.0, state.greatest_flops or 0.0
    most = min(greatest * MOST_BEYOND, MAX_TRAIN_FLOPS)
    if budget > most:
        raise InvalidInput(
            "train_flops", budget,
            f"at most {most:.4g} on {scope.label}: {MOST_BEYOND:g} times the greatest measured "
            f"there, {greatest:.4g}, and no more than the {MAX_TRAIN_FLOPS:g} of a search",
        )  # fmt: skip
    runs, left_out = _evidence(standings, scope, Measured(scope.name), "train_flops", greatest)
    recipe = _completed(scope.recipe, runs)
    found = predict_for_budget(runs, budget, greatest, recipe)
    if found is None:
        raise _not_predictable(scope, recipe, runs, budget, greatest)
    best, structured, dense = found.best, found.best_structured, found.best_dense
    return Answer(
        kind="predicted",
        realised_multiplier_over_dense=found.multiplier and NOT_REALISED,
        structured_realised_multiplier=found.structured_multiplier and NOT_REALISED,
        **_common(found, scope, "train_flops", budget),
        confirmation=rank_correlation(standings.confirmed(scope.name)),
        interval=best.interval,
        interval_means=OF_LAW,
        validation_interval=None,
        verdict="unconfirmed",
        verdict_reason=PREDICTED if dense else f"{PREDICTED}; {NO_DENSE}",
        comparisons_mean=OF_LAW,
        dense_minus_structured=predicted_rival(structured, dense) if structured and dense else None,
        evidence=_to_evidence(state, found, left_out),
        extrapolation=Extrapolation(
            measured=(least, greatest),
            beyond=budget / greatest,
            law=formula(best.law),
            widths=best.widths,
            left_out=found.left_out,
        ),
    )


#: Task → the setting of its recipes that data of a user completes and that FLOPs depend on.
_COMPLETED_BY_DATA = {"images": "classes", "regression": "input_dim"}


def _completed(recipe: Recipe, runs: Sequence[Run]) -> Recipe:
    """The recipe as the data completed it.

    It is not stored, but the exact FLOPs of every run are, and these determine what is missing: it
    enters them as a product with the width.
    """
    name = _COMPLETED_BY_DATA.get(recipe.task)
    if name is None or not runs:
        return recipe
    run = runs[0]
    own = train_flops_per_step(recipe, parse_design(run.design), run.width)
    a_number = TRAIN_OVER_FORWARD * FLOPS_PER_MAC * recipe.batch * run.width
    more = (run.train_flops_per_step - own) // a_number
    return replace(recipe, **{name: getattr(recipe, name) + more})


def _not_predictable(
    scope: Scope, recipe: Recipe, runs: Sequence[Run], budget: float, greatest: float
) -> InvalidInput | NotFound:
    """Why there is no answer past the measured budgets, and what would give one."""
    search = f"run `einsum-nas search --task {scope.task} --train-flops {budget:.4g} --wait`"
    most = greatest_runnable(runs, recipe) if runs else 0.0
    if budget <= most:
        return NotFound(
            f"train_flops={budget:.4g} is beyond all measured budgets on {scope.label} (at most "
            f"{greatest:.4g}), and of no structure there are enough points, of widths that would "
            f"be run at it, to fit a scaling law; {search}"
        )
    planned, measured = plans(recipe, DENSE, budget), {r.width for r in runs}
    accepted = (
        f"at most {most:.4g} on {scope.label}, what the dearest measured model spends in "
        f"{recipe.max_steps:,} steps, the most of recipe {recipe.name}: at this budget it runs "
        f"dense models of width {planned[0].width:,} to {planned[-1].width:,}, and measured "
        f"are {min(measured):,} to {max(measured):,}; {search}"
    )
    return InvalidInput("train_flops", budget, accepted)
