"""Searches by a scheduler in a world whose learning curves are a formula, without training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from nas.planning.recipe import Recipe
from nas.planning.request import SearchRequest
from nas.planning.runs import RunPlan, references
from nas.search.features import NAMES, features
from nas.search.scheduling import (
    Advance,
    Begin,
    Confirm,
    Curve,
    End,
    Move,
    Scheduler,
    SearchView,
    Stop,
)
from nas.training.run import evaluation_steps

#: (plan, train FLOPs, seed) → loss.
World = Callable[[RunPlan, float, int], float]


def power_laws(recipe: Recipe, noise: float = 0.01) -> World:
    """Losses that fall with compute; ω > 0 and ψ < 1 are worse, and small widths end higher."""
    omega, psi, width = (NAMES.index(n) for n in ("omega", "psi", "log_width"))

    def loss(plan: RunPlan, train_flops: float, seed: int) -> float:
        row = features(recipe, [plan])[0]
        drawn = np.random.default_rng([seed, *map(ord, plan.structures[0]), plan.width])
        scale = 0.5 * row[omega] + 0.4 * (1 - row[psi]) + noise * drawn.standard_normal()
        return float(2.0 ** (-0.3 * row[width]) + math.exp(scale) * (train_flops / 1e8) ** -0.15)

    return loss


def played(
    scheduler: Scheduler,
    request: SearchRequest,
    recipe: Recipe,
    world: World,
    *,
    slots: int = 2,
    rounds: int = 1000,
    stop_after: int | None = None,
    curves: Sequence[Curve] = (),
    shuffled: int | None = None,
) -> tuple[list[Curve], list[Sequence[Move]], float]:
    """Play a search to its end: (curves, rounds, train FLOPs spent).

    Parameters
    ----------
    stop_after
        Rounds after which to stop, as an interrupted search would; `curves` goes on from there.
    shuffled
        Seed of an order of the curves in every view, which must change nothing.
    """
    each = request.replicates
    found = {c.place: c for c in curves}
    if not found:
        for place, plan in enumerate(references(recipe, request.train_flops, request.references)):
            start = Curve(place, plan, True, "paused", (), 0)
            found[place] = _trained(start, plan.steps, recipe, world)
    made: list[Sequence[Move]] = []
    for _ in range(rounds if stop_after is None else stop_after):
        view = SearchView(
            _ordered(list(found.values()), shuffled),
            spent_on(found.values(), each),
            request.total_train_flops,
            request.trials - sum(not c.reference for c in found.values()),
            slots,
        )
        moves = scheduler.next_round(view)
        if not moves:
            break
        made.append(moves)
        for move in moves:
            _take(move, found, recipe, world)
    else:
        assert stop_after is not None, "the search does not end"
    return list(found.values()), made, spent_on(found.values(), each)


def spent_on(curves: object, replicates: int) -> float:
    """Train FLOPs of all runs, confirmations included."""
    total = 0.0
    for c in curves:  # type: ignore[attr-defined]
        total += c.train_flops * replicates + len(c.confirmed) * c.plan.train_flops
    return total


def _ordered(curves: list[Curve], seed: int | None) -> list[Curve]:
    if seed is None:
        return curves
    return [curves[i] for i in np.random.default_rng(seed).permutation(len(curves))]


def _take(move: Move, found: dict[int, Curve], recipe: Recipe, world: World) -> None:
    if isinstance(move, Begin):
        place = len(found)
        start = Curve(place, move.proposal.plan, False, "paused", (), 0, move.proposal.params)
        found[place] = _trained(start, move.until, recipe, world)
        return
    curve = found[move.place]
    if isinstance(move, Confirm):
        assert curve.state == "complete"
        flops = float(curve.plan.train_flops)
        fresh = {seed: world(curve.plan, flops, seed) for seed in range(100, 100 + move.seeds)}
        found[move.place] = replace(curve, confirmed=fresh)
        return
    assert curve.state == "paused"
    if isinstance(move, Advance):
        assert move.until > curve.step
        found[move.place] = _trained(curve, move.until, recipe, world)
    elif isinstance(move, Stop):
        found[move.place] = replace(curve, state="stopped")
    else:
        assert isinstance(move, End)
        found[move.place] = replace(curve, state="complete")


def _trained(curve: Curve, until: int, recipe: Recipe, world: World) -> Curve:
    assert until in evaluation_steps(curve.plan, recipe)
    done = [s for s in evaluation_steps(curve.plan, recipe) if s <= until]
    flops = [float(s * curve.plan.train_flops_per_step) for s in done]
    points = tuple((f, world(curve.plan, f, 0)) for f in flops)
    state = "complete" if until == curve.plan.steps else "paused"
    return replace(curve, step=until, points=points, state=state)  # type: ignore[arg-type]
