"""What the curves say of budgets past everything measured: extrapolation, and labelled as such.

A prediction is of a run that the service itself would make at that budget: its width and its steps
lie within the recipe's.  It rests on runs of widths of which that holds too, so that nothing is
read from a model that would have to be trained past the recipe's steps.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nas.analysis.best import Shown
from nas.analysis.intervals import Interval, around
from nas.analysis.laws import (
    Curve,
    Floats,
    ScalingLaw,
    choose_law,
    compute_ratio,
    fit_scaling_law,
)
from nas.analysis.scaling import compute_optimal
from nas.designs.design import parse_design
from nas.planning.recipe import Recipe
from nas.planning.runs import RunPlan, admissible, plans
from nas.records.answers import Multiplier, Rival
from nas.store import Run

#: A law is fitted to what was measured within this factor of the greatest budget: what a run
#: learns first follows none.
FITTED_RANGE = 64.0
#: The range of the laws that are fitted beside, for what the choice of the range makes of it.
SHORT_RANGE = 8.0
#: A structure whose runs end further than this below the greatest budget is left out: it would be
#: extrapolated further than the others.
REACH = 2.0
#: No answer is given further out than this beyond the greatest budget measured.
MOST_BEYOND = 1000.0
#: The planned width lies within this factor of the one that the law of widths gives: measured
#: widths tell the best one no closer.
NEAR_WIDTH = math.sqrt(2.0)


@dataclass(frozen=True, slots=True)
class Prediction(Shown):
    """A structure's law at a budget."""

    law: ScalingLaw
    #: (range, offset) → the other laws that the data admit
    others: Mapping[tuple[float, bool], ScalingLaw]
    #: the run of its widths with the least measured loss
    run: Run
    #: the run that the service would make at the budget
    plan: RunPlan
    loss: float
    #: 95% interval of the law's loss over seeds; None where one seed was run
    interval: Interval | None
    #: distinct widths and seeds that the law was fitted to
    widths: int
    seeds: int

    def shown(self) -> dict[str, Any]:
        """The planned run's, named as the run with the least measured loss."""
        plan = self.plan
        return {
            **self.run.shared(),
            "name": plan.name,
            "theta": list(plan.design.exponents),
            "design": plan.design.text,
            "width": plan.width,
            "steps": plan.steps,
            "train_flops": float(plan.train_flops),
            "inference_flops": plan.forward_flops_per_token,
            "params": plan.params,
            # measured of another width
            "step_seconds": None,
            "peak_memory": None,
            "seeds": self.seeds,
            "loss": self.loss,
            "confirmed": False,
        }


@dataclass(frozen=True, slots=True)
class PredictedAnswer:
    """The structure with the least predicted loss."""

    best: Prediction
    best_structured: Prediction | None
    best_dense: Prediction | None
    #: of the best one and of the best structured one
    multiplier: Multiplier | None
    structured_multiplier: Multiplier | None
    indistinguishable: tuple[Rival, ...]
    compared: int
    #: structures of which no law can be fitted to widths that would be run at the budget
    left_out: int


def predict_for_budget(
    runs: Iterable[Run], budget: float, greatest: float, recipe: Recipe
) -> PredictedAnswer | None:
    """Extrapolate every structure's law to a budget; None where that is possible for none.

    Parameters
    ----------
    runs
        Completed runs of one task with their curves.
    budget, greatest
        In train FLOPs: the budget, and the greatest measured one below it.
    recipe
        That of the runs, which says what widths and steps a run at the budget may have.
    """
    structures: dict[str, list[Run]] = {}
    for run in runs:
        structures.setdefault(run.structure, []).append(run)
    predicted = [_predict(group, budget, greatest, recipe) for group in structures.values()]
    found = sorted((p for p in predicted if p), key=lambda p: (p.loss, p.run.trial_id))
    if not found:
        return None
    best, others = found[0], found[1:]
    structured = next((p for p in found if not p.run.dense), None)
    dense = next((p for p in found if p.run.dense), None)
    rivals = [predicted_rival(best, p) for p in others]
    return PredictedAnswer(
        best=best,
        best_structured=structured,
        best_dense=dense,
        multiplier=_multiplier(best, dense, budget),
        structured_multiplier=_multiplier(structured, dense, budget),
        indistinguishable=tuple(
            r for r in rivals if (i := r.difference_interval) is None or i[0] <= 0 <= i[1]
        ),
        compared=len(rivals),
        left_out=len(predicted) - len(found),
    )


def greatest_runnable(runs: Iterable[Run], recipe: Recipe) -> float:
    """The greatest budget at which a run of one of the measured widths is not too long."""
    return float(max(recipe.max_steps * r.train_flops_per_step for r in runs))


def _predict(
    runs: Sequence[Run], budget: float, greatest: float, recipe: Recipe
) -> Prediction | None:
    models: dict[str, list[Run]] = {}
    for run in runs:
        if recipe.min_steps <= budget // run.train_flops_per_step <= recipe.max_steps:
            models.setdefault(run.model, []).append(run)
    used = [r for of_model in models.values() for r in _longest(of_model)]
    if not used or max(r.points[-1].train_flops for r in used) * REACH < greatest:
        return None
    families = _families(used, greatest / FITTED_RANGE)
    law = choose_law([f.curve for f in families]) if families else None
    if law is None or law.b <= 0:
        return None
    lowest = min(used, key=lambda r: (min(p.loss for p in r.points), r.trial_id))
    plan = _plan(lowest, families, budget, recipe)
    if plan is None or (plan.dense and not _is_best_width(plan, used, budget, recipe)):
        return None
    loss, interval = law.predict(budget)
    others = dict(_other_laws(used, greatest))
    for other in others.values():
        interval = _spanned(interval, *other.predict(budget))
    widths = len(np.unique(np.concatenate([f.widths for f in families])))
    return Prediction(law, others, lowest, plan, loss, interval, widths, len(families))


def _plan(run: Run, families: Sequence[_Family], budget: float, recipe: Recipe) -> RunPlan | None:
    """The run that the service would make of a structure at the width that is best for a budget.

    That width grows with compute as it does from one compute-optimal point to the next.
    """
    flops = np.log(np.concatenate([f.curve[0] for f in families]))
    widths = np.log(np.concatenate([f.widths for f in families]))
    growth = 0.0
    if len(np.unique(widths)) > 1 and np.ptp(flops) > 0:
        growth = max(0.0, float(np.polyfit(flops, widths, 1)[0]))
    target = float(widths.mean()) + growth * (math.log(budget) - float(flops.mean()))
    slack = math.log(NEAR_WIDTH) if growth else 1e-9
    near = [w for w in recipe.widths if abs(math.log(w) - target) <= slack]
    found = [
        plan
        for plan in admissible(recipe, parse_design(run.design), budget, near)
        if plan.steps <= recipe.max_steps and plan.dense == run.dense
    ]
    return min(found, key=lambda p: (abs(math.log(p.width) - target), p.width), default=None)


def _is_best_width(plan: RunPlan, used: Sequence[Run], budget: float, recipe: Recipe) -> bool:
    """Whether no width that was not measured may be far better than the planned one.

    It is not if widths on both sides were measured, or none that would be run lies far beyond.
    Asked of dense alone: a worse width of it would make structures look better than they are.
    """
    measured = [r.width for r in used]
    runnable = [p.width for p in plans(recipe, plan.design, budget)]
    narrower = plan.width > min(measured) or plan.width <= runnable[0] * NEAR_WIDTH
    wider = plan.width < max(measured) or plan.width * NEAR_WIDTH >= runnable[-1]
    return narrower and wider


def _longest(runs: Sequence[Run]) -> list[Run]:
    """The longest run of every seed; where as long ones are confirmations, these alone."""
    end = max(r.steps for r in runs)
    fresh = [r for r in runs if r.kind == "confirmation" and r.steps == end]
    seeds: dict[int, Run] = {}
    for run in sorted(fresh or runs, key=lambda r: (-r.steps, r.trial_id)):
        seeds.setdefault(run.seed, run)
    return [seeds[s] for s in sorted(seeds)]


@dataclass(frozen=True, slots=True)
class _Family:
    """The compute-optimal points of a structure's runs with one seed, and their widths (n,)."""

    curve: Curve
    widths: Floats


def _families(runs: Sequence[Run], least: float) -> list[_Family]:
    """The compute-optimal points of every seed, from a budget on."""
    seeds: dict[int, list[tuple[float, float, float]]] = {}
    for run in runs:
        points = [(p.train_flops, p.loss, float(run.width)) for p in run.points]
        seeds.setdefault(run.seed, []).extend(p for p in points if p[0] >= least and p[1] > 0)
    return [_family_of(points) for _, points in sorted(seeds.items()) if points]


def _family_of(points: Sequence[tuple[float, float, float]]) -> _Family:
    flops, losses, widths = (np.array(column) for column in zip(*points, strict=True))
    optimal = compute_optimal(flops, losses)
    return _Family((flops[optimal], losses[optimal]), widths[optimal])


def _other_laws(
    runs: Sequence[Run], greatest: float
) -> Iterator[tuple[tuple[float, bool], ScalingLaw]]:
    """Laws that the data admit as well: with an offset and without, of a shorter range too."""
    for reach in (FITTED_RANGE, SHORT_RANGE):
        curves = [f.curve for f in _families(runs, greatest / reach)]
        for offset in (False, True):
            law = fit_scaling_law(curves, offset=offset) if curves else None
            if law is not None and law.b > 0:
                yield (reach, offset), law


def _spanned(interval: Interval | None, loss: float, other: Interval | None) -> Interval | None:
    """The least interval that holds both, and the other's own loss."""
    if interval is None:
        return None
    low, high = other or (loss, loss)
    return min(interval[0], low), max(interval[1], high)


def predicted_rival(best: Prediction, other: Prediction) -> Rival:
    """Another prediction compared with one; errors of the two laws are taken as independent, on
    logarithms.  Each interval holds on its own."""
    difference = other.loss - best.loss
    if best.interval is None or other.interval is None:
        return other.rival(difference, None)
    ratio = math.log(other.loss / best.loss)
    below = math.hypot(_spread(other.loss, other.interval[0]), _spread(best.loss, best.interval[1]))
    above = math.hypot(_spread(other.loss, other.interval[1]), _spread(best.loss, best.interval[0]))
    return other.rival(difference, around(best.loss, ratio, below, above))


def _spread(loss: float, end: float) -> float:
    # an interval may begin at 0, which has no logarithm
    return abs(math.log(max(end, sys.float_info.min)) - math.log(loss))


def _multiplier(
    of: Prediction | None, dense: Prediction | None, budget: float
) -> Multiplier | None:
    """What dense spends for the loss of its law at the budget over what a structure needs for it.

    There is no value without an interval: two laws known from one seed may cross anywhere.
    """
    if of is None:
        return None
    if dense is None:
        return _no_multiplier(NO_DENSE, of.seeds)
    seeds = min(of.seeds, dense.seeds)
    if of.run.dense:
        return Multiplier(value=1.0, kind="predicted", interval=(1.0, 1.0), seeds=seeds)
    value, interval = compute_ratio(of.law, dense.law, budget)
    for kind in of.others.keys() & dense.others.keys():
        other, theirs = compute_ratio(of.others[kind], dense.others[kind], budget)
        interval = _spanned(interval, 0.0 if other is None else other, theirs)
    if value is None:
        reason = "on its law the structure never comes down to the loss of dense"
        return _no_multiplier(reason, seeds)
    if interval is None:
        return _no_multiplier(_ONE_SEED if seeds == 1 else _FEW_POINTS, seeds)
    return Multiplier(value=value, kind="predicted", interval=interval, seeds=seeds)


def _no_multiplier(reason: str, seeds: int) -> Multiplier:
    return Multiplier(value=None, kind="undetermined", interval=None, seeds=seeds, reason=reason)


NO_DENSE = "dense is not extrapolated: its best width at this budget lies outside of those measured"
_ONE_SEED = (
    "with one seed, by how much other seeds would move it is unknown; `einsum-nas confirm` runs "
    "the best models anew"
)
_FEW_POINTS = "the points of each seed are too few for an interval over seeds"


def formula(law: ScalingLaw) -> str:
    """The law in figures, with C for train FLOPs."""
    offset = f"{law.offset:.4g} + " if law.offset else ""
    return f"loss = {offset}{law.a:.4g} · C^(-{law.b:.4g})"
