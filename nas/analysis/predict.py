"""What the curves say of budgets past everything measured: extrapolation, and labelled as such."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nas.analysis.intervals import Interval, around
from nas.analysis.laws import Curve, ScalingLaw, choose_law, fit_scaling_law
from nas.analysis.scaling import compute_optimal
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


@dataclass(frozen=True, slots=True)
class Prediction:
    """A structure's law at a budget."""

    law: ScalingLaw
    #: the run of its widths with the least measured loss: its width is not extrapolated
    run: Run
    loss: float
    #: 95% interval of the law's loss over seeds; None where one seed was run
    interval: Interval | None
    #: distinct widths and seeds that the law was fitted to
    widths: int
    seeds: int


@dataclass(frozen=True, slots=True)
class PredictedRival:
    """A structure whose prediction cannot be told apart from the best one."""

    prediction: Prediction
    difference: float
    interval: Interval | None


@dataclass(frozen=True, slots=True)
class PredictedAnswer:
    """The structure with the least predicted loss."""

    best: Prediction
    best_structured: Prediction | None
    best_dense: Prediction | None
    #: what dense would spend for the best one's loss over the budget; None without a dense law
    multiplier: float | None
    indistinguishable: tuple[PredictedRival, ...]
    compared: int


def predict_for_budget(
    runs: Iterable[Run], budget: float, greatest: float
) -> PredictedAnswer | None:
    """Extrapolate every structure's law to a budget; None where no law can be fitted.

    Parameters
    ----------
    runs
        Completed runs of one task with their curves.
    budget, greatest
        In train FLOPs: the budget, and the greatest measured one below it.
    """
    structures: dict[str, list[Run]] = {}
    for run in runs:
        structures.setdefault(run.structure, []).append(run)
    found = [p for group in structures.values() if (p := _predict(group, budget, greatest))]
    if not found:
        return None
    found.sort(key=lambda p: (p.loss, p.run.trial_id))
    best, others = found[0], found[1:]
    dense = next((p for p in found if p.run.dense), None)
    rivals = [predicted_rival(best, p) for p in others]
    return PredictedAnswer(
        best=best,
        best_structured=next((p for p in found if not p.run.dense), None),
        best_dense=dense,
        multiplier=None if dense is None else _multiplier(best, dense, budget),
        indistinguishable=tuple(
            r for r in rivals if r.interval is None or r.interval[0] <= 0 <= r.interval[1]
        ),
        compared=len(rivals),
    )


def _predict(runs: Sequence[Run], budget: float, greatest: float) -> Prediction | None:
    models: dict[str, list[Run]] = {}
    for run in runs:
        models.setdefault(run.model, []).append(run)
    used = [r for of_model in models.values() for r in _longest(of_model)]
    if max(r.points[-1].train_flops for r in used) * REACH < greatest:
        return None
    curves = _families(used, greatest / FITTED_RANGE)
    law = choose_law(curves) if curves else None
    if law is None or law.b <= 0:
        return None
    loss, interval = law.predict(budget)
    for other in _other_laws(used, greatest):
        interval = _spanned(interval, *other.predict(budget))
    lowest = min(used, key=lambda r: (min(p.loss for p in r.points), r.trial_id))
    widths = len({r.width for r in used})
    return Prediction(law, lowest, loss, interval, widths, len(curves))


def _longest(runs: Sequence[Run]) -> list[Run]:
    """The longest run of every seed; where as long ones are confirmations, these alone."""
    end = max(r.steps for r in runs)
    fresh = [r for r in runs if r.kind == "confirmation" and r.steps == end]
    seeds: dict[int, Run] = {}
    for run in sorted(fresh or runs, key=lambda r: (-r.steps, r.trial_id)):
        seeds.setdefault(run.seed, run)
    return [seeds[s] for s in sorted(seeds)]


def _families(runs: Sequence[Run], least: float) -> list[Curve]:
    """The compute-optimal points of every seed, from a budget on."""
    families: dict[int, list[tuple[float, float]]] = {}
    for run in runs:
        points = [(p.train_flops, p.loss) for p in run.points]
        families.setdefault(run.seed, []).extend(p for p in points if p[0] >= least and p[1] > 0)
    return [_frontier_of(family) for _, family in sorted(families.items()) if family]


def _other_laws(runs: Sequence[Run], greatest: float) -> Iterator[ScalingLaw]:
    """Laws that the data admit as well: with an offset and without, of a shorter range too."""
    for reach in (FITTED_RANGE, SHORT_RANGE):
        curves = _families(runs, greatest / reach)
        for offset in (False, True):
            law = fit_scaling_law(curves, offset=offset) if curves else None
            if law is not None and law.b > 0:
                yield law


def _spanned(interval: Interval | None, loss: float, other: Interval | None) -> Interval | None:
    """The least interval that holds both, and the other's own loss."""
    if interval is None:
        return None
    low, high = other or (loss, loss)
    return min(interval[0], low), max(interval[1], high)


def _frontier_of(family: Sequence[tuple[float, float]]) -> Curve:
    flops, losses = (np.array(column) for column in zip(*family, strict=True))
    optimal = compute_optimal(flops, losses)
    return flops[optimal], losses[optimal]


def predicted_rival(best: Prediction, other: Prediction) -> PredictedRival:
    """Another prediction compared with one; errors of the two laws are taken as independent, on
    logarithms.  Each interval holds on its own."""
    difference = other.loss - best.loss
    if best.interval is None or other.interval is None:
        return PredictedRival(other, difference, None)
    ratio = math.log(other.loss / best.loss)
    below = math.hypot(_spread(other.loss, other.interval[0]), _spread(best.loss, best.interval[1]))
    above = math.hypot(_spread(other.loss, other.interval[1]), _spread(best.loss, best.interval[0]))
    return PredictedRival(other, difference, around(best.loss, ratio, below, above))


def _spread(loss: float, end: float) -> float:
    # an interval may begin at 0, which has no logarithm
    return abs(math.log(max(end, sys.float_info.min)) - math.log(loss))


def _multiplier(best: Prediction, dense: Prediction, budget: float) -> float | None:
    """The budget over what the structure needs for what dense reaches with it, both on their laws;
    None where the structure's law never comes down to that."""
    above = dense.loss - best.law.offset
    if above <= 0:
        return None
    needed = (best.law.a / above) ** (1 / best.law.b)
    return budget / needed if needed > 0 and math.isfinite(needed) else None


def formula(law: ScalingLaw) -> str:
    """The law in figures, with C for train FLOPs."""
    offset = f"{law.offset:.4g} + " if law.offset else ""
    return f"loss = {offset}{law.a:.4g} · C^(-{law.b:.4g})"
