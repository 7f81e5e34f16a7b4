"""A search that spends a total budget by the rule `frontier`: its rounds from first to last.

Exploring: begun runs and new candidates take slices where these are expected to move the front
most; see `nas.search.frontier`.  Racing: the runs most likely to be best at the budget are trained
to their end.  Confirming: the best of them and the best dense run are repeated with fresh seeds.
What is left of the budget then goes to exploring again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from nas.planning.recipe import Recipe
from nas.planning.request import SearchRequest
from nas.planning.runs import RunPlan, evaluation_steps
from nas.records.evidence import Evidence
from nas.search.features import NAMES, features
from nas.search.frontier import Arms, choose, front_on
from nas.search.phases import Phases, Purse, confirm
from nas.search.propose import Proposal
from nas.search.scheduling import Advance, Begin, Curve, End, Move, SearchView, Stop
from nas.search.surrogate import Array, CurveModel, Observed, sample

#: (how many, curves so far, seed) → candidates that are none of the curves.
Pool = Callable[[int, Sequence[Curve], int], Sequence[Proposal]]
#: Candidates that a round chooses from.
_POOL = 400
#: Points of curves that are looked at, at most.
_OBSERVED = 1024
#: Candidates of the first round, and moves of a later one, at least; and as many for each run that
#: trains at once.
_FIRST, _MOVES, _MOVES_EACH = 24, 8, 2
#: A run is stopped where it enters the front at no level with a greater probability than this.
_HOPELESS = 1e-6
#: Quantile of the first losses that hypervolumes are measured from.
_REFERENCE = 0.75


def believed(evidence: Evidence, recipe: Recipe, budget: float) -> CurveModel:
    """A model of earlier evidence, for a search of a recipe with a budget of a run.

    Compute is that of the search where the recipes are the same, else relative to the dearest of
    the evidence's runs.
    """
    if evidence.recipe != recipe:
        budget = max(p.train_flops for p in evidence.plans)
    x = features(evidence.recipe, evidence.plans)
    return CurveModel(x, observed(evidence.curves, budget))


def observed(curves: Sequence[Sequence[tuple[float, float]]], budget: float) -> Observed:
    """All points of curves."""
    points = [(i, c / budget, loss) for i, curve in enumerate(curves) for c, loss in curve]
    run, c, loss = zip(*points, strict=True)
    return Observed(np.array(run), np.log(np.array(c)), np.log(np.array(loss)))


class FrontierScheduler:
    """The rounds of a search; see the module.

    Parameters
    ----------
    pool
        Gives new candidates, whose plans all have the budget of a run.
    evidence
        Of earlier searches; each source is trusted as far as the search's own curves agree.
    """

    def __init__(
        self,
        request: SearchRequest,
        recipe: Recipe,
        pool: Pool,
        evidence: Sequence[Evidence] = (),
    ) -> None:
        self._request, self._recipe, self._pool = request, recipe, pool
        self.budget = request.train_flops
        levels = recipe.evaluations
        self.grid: Array = math.log(2) / 2 * np.arange(1 - levels, 1, dtype=float)
        self.priors = tuple(believed(e, recipe, self.budget) for e in evidence)
        self._rows: dict[tuple[int, str], Array] = {}

    def next_round(self, view: SearchView) -> list[Move]:
        """The moves of the next round; none where the search has ended."""
        # in the order of their places: nothing may depend on when a run ended
        view = replace(view, curves=sorted(view.curves, key=lambda c: c.place))
        curves = [c for c in view.curves if c.state != "failed"]
        seed = _seed(self._request.seed, view.curves)
        if not any(c.points and not c.reference for c in curves):
            return self._first(view, seed)
        state = _State(self, curves, seed)
        return (
            self._explore(view, state, seed)
            or self._race(view, state)
            or self._confirm(view, state)
            or self._end(state)
        )

    def _limit(self, view: SearchView) -> float:
        """Up to where exploring may spend."""
        request = self._request
        if view.total is not None:
            return Phases.of(view, request).exploring
        # without a budget for the whole search it is that of all its candidates' runs
        own = sum(not c.reference for c in view.curves) + view.left
        references = sum(c.train_flops for c in view.curves if c.reference)
        return (own * request.train_flops + references) * request.replicates

    def _first(self, view: SearchView, seed: int) -> list[Move]:
        count = min(max(_FIRST, _MOVES_EACH * view.slots), view.left)
        found = list(self._pool(_POOL if self.priors else count, view.curves, seed))
        chosen = found[:count]
        if self.priors and len(found) > count:
            # half by what is believed, half by chance, for what is believed may mislead
            arms, front = self._believed(found)
            best = [arm for arm, _ in choose(arms, front, count // 2)]
            rest = [i for i in range(len(found)) if i not in best][: count - len(best)]
            chosen = [found[i] for i in (*best, *rest)]
        return self._affordable(view, [Begin(p, self.steps(p.plan)[0]) for p in chosen])

    def _affordable(self, view: SearchView, moves: Sequence[Begin | Advance]) -> list[Move]:
        """Those of the moves that exploring can pay for, in their order."""
        purse, limit = Purse(view, self._request.replicates), self._limit(view)
        curves = {c.place: c for c in view.curves}
        found: list[Move] = []
        for move in moves:
            if isinstance(move, Begin):
                plan, steps = move.proposal.plan, move.until
            else:
                plan = curves[move.place].plan
                steps = move.until - curves[move.place].step
            if purse.pay(plan, steps, limit):
                found.append(move)
        return found

    def _race(self, view: SearchView, state: _State) -> list[Move]:
        """Train the candidates to their end that may be the best, more than will be confirmed."""
        if view.total is None or any(c.confirmed for c in view.curves):
            return []
        request = self._request
        phases = Phases.of(view, request)
        purse = Purse(view, request.replicates)
        top = state.likely_best()[: phases.raced]
        return [
            Advance(c.place, c.plan.steps)
            for c in top
            if c.state == "paused" and purse.pay(c.plan, c.plan.steps - c.step, phases.racing)
        ]

    def _confirm(self, view: SearchView, state: _State) -> list[Move]:
        done = state.complete_by_loss()
        candidates = [c for c in done if not c.reference and not c.plan.dense]
        dense = [c for c in done if c.plan.dense]
        return confirm(view, self._request.train_flops, candidates, dense)

    def _believed(self, found: Sequence[Proposal]) -> tuple[Arms, Array]:
        """Candidates as earlier evidence alone sees them, and a front that half of them pass."""
        x = self.features([p.plan for p in found])
        each = [prior.curves(x, self.grid) for prior in self.priors]
        mean = np.mean([m - m.mean() for m, _ in each], axis=0)
        sd = np.mean([s for _, s in each], axis=0)
        return self.arms([p.plan for p in found], [0] * len(found), mean, sd), np.median(mean, 0)

    def _explore(self, view: SearchView, state: _State, seed: int) -> list[Move]:
        if any(c.confirmed for c in view.curves):
            return []
        hopeless = state.stop_hopeless()
        fresh = list(self._pool(_POOL, view.curves, seed)) if view.left else []
        arms, paused = state.arms(fresh), [state.paused[i] for i in state.going]
        count = max(_MOVES, _MOVES_EACH * view.slots)
        moves: list[Begin | Advance] = []
        begun = 0
        for arm, level in choose(arms, state.front, count):
            if arm < len(paused):
                curve = paused[arm]
                moves.append(Advance(curve.place, self.step_at(curve.plan, level)))
            elif begun < view.left:
                begun += 1
                proposal = fresh[arm - len(paused)]
                moves.append(Begin(proposal, self.step_at(proposal.plan, level)))
        going = self._affordable(view, moves)
        return [*hopeless, *going] if going else []

    def _end(self, state: _State) -> list[Move]:
        """Nothing goes on: runs on the front have ended there, the others are stopped."""
        on_front = state.on_front()
        why = "the search ended before it reached the front"
        return [End(c.place) if c.place in on_front else Stop(c.place, why) for c in state.paused]

    def features(self, plans: Sequence[RunPlan]) -> Array:
        """The features of runs, each computed once."""
        # by design: equal structures may have different exponents
        keys = [(p.width, p.design.text) for p in plans]
        new = {k: p for k, p in zip(keys, plans, strict=True) if k not in self._rows}
        self._rows.update(zip(new, features(self._recipe, list(new.values())), strict=True))
        return np.array([self._rows[k] for k in keys]).reshape(len(keys), len(NAMES))

    def steps(self, plan: RunPlan) -> list[int]:
        """The evaluations of a run."""
        return evaluation_steps(plan, self._recipe)

    def levels(self, plan: RunPlan) -> NDArray[np.int64]:
        """The level of each evaluation of a run; the last one is that of the budget."""
        steps = self.steps(plan)
        c = np.log(np.array(steps) * plan.train_flops_per_step / self.budget)
        found = np.searchsorted(self.grid, c - math.log(2) / 4)
        return np.minimum(found, len(self.grid) - 1)

    def step_at(self, plan: RunPlan, level: int) -> int:
        """The last evaluation up to a level."""
        upto = np.flatnonzero(self.levels(plan) <= level)
        return self.steps(plan)[int(upto[-1]) if len(upto) else 0]

    def arms(self, plans: Sequence[RunPlan], steps: Sequence[int], mean: Array, sd: Array) -> Arms:
        """Runs on the grid of levels that have trained so many steps."""
        flops = np.tile(np.exp(self.grid) * self.budget, (len(plans), 1))
        first = np.zeros(len(plans), dtype=np.int64)
        level = np.full(len(plans), -1, dtype=np.int64)
        for i, (plan, step) in enumerate(zip(plans, steps, strict=True)):
            at, own = self.levels(plan), np.array(self.steps(plan))
            flops[i, at] = own * plan.train_flops_per_step
            first[i] = at[0]
            if step:
                level[i] = at[np.searchsorted(own, step, side="right") - 1]
        return Arms(mean, sd, level, first, flops)


class _State:
    """What is believed of the curves of a search; of `curves` none has failed."""

    def __init__(self, scheduler: FrontierScheduler, curves: Sequence[Curve], seed: int) -> None:
        self._of, grid = scheduler, scheduler.grid
        curves = [c for c in curves if c.points]
        self.own = [c for c in curves if not c.reference]
        every = observed([c.points for c in curves], scheduler.budget)
        # features of the runs that the model is made of alone: others may be thousands
        rows = sample(every, _OBSERVED, np.random.default_rng(seed))
        runs, run = np.unique(every.run[rows], return_inverse=True)
        self._model = CurveModel(
            scheduler.features([curves[i].plan for i in runs]),
            Observed(run, every.c[rows], every.y[rows]), scheduler.priors, seed,
        )  # fmt: skip
        ends = np.cumsum([len(c.points) for c in curves])
        pieces = [slice(end - len(c.points), end) for c, end in zip(curves, ends, strict=True)]
        logs = {c.place: (every.c[p], every.y[p]) for c, p in zip(curves, pieces, strict=True)}
        firsts = [logs[c.place][1][0] for c in self.own]
        reference = float(np.quantile(firsts, _REFERENCE))
        self.front = front_on(grid, [logs[c.place] for c in self.own], reference)
        #: runs that may go on, then runs that have reached their end
        self._alive = [c for c in curves if c.state == "paused"]
        self.paused = list(self._alive)
        self._alive += [c for c in curves if c.state == "complete" and c.step == c.plan.steps]
        self._mean, self._sd = self._model.curves(
            scheduler.features([c.plan for c in self._alive]), grid,
            [logs[c.place] for c in self._alive],
        )  # fmt: skip
        self._arms = scheduler.arms(
            [c.plan for c in self.paused], [c.step for c in self.paused],
            self._mean[: len(self.paused)], self._sd[: len(self.paused)],
        )  # fmt: skip

    def stop_hopeless(self) -> list[Move]:
        """Stop the runs that enter the front at no level ahead of them, with some confidence."""
        ahead = np.arange(len(self.front))[None, :] > self._arms.level[:, None]
        # as it would be measured, noise included
        sd = np.hypot(self._arms.sd, self._model.noise_sd)
        chances = ndtr((self.front - self._arms.mean) / sd)
        chance = np.where(ahead, chances, 0.0).max(1, initial=0.0)
        hopeless = np.flatnonzero(chance < _HOPELESS)
        moves: list[Move] = [
            Stop(self.paused[i].place, f"enters the front with probability {chance[i]:.1g} at most")
            for i in hopeless
        ]
        self.going = np.flatnonzero(chance >= _HOPELESS)
        return moves

    def arms(self, fresh: Sequence[Proposal]) -> Arms:
        """Paused runs that are not stopped, then new candidates."""
        paused = self._arms.only(self.going)
        if not fresh:
            return paused
        plans = [p.plan for p in fresh]
        mean, sd = self._model.curves(self._of.features(plans), self._of.grid)
        return paused.joined(self._of.arms(plans, [0] * len(plans), mean, sd))

    def complete_by_loss(self) -> list[Curve]:
        """Runs that have reached the budget, by their expected loss there."""
        return [c for c in self._ranked(self._mean[:, -1]) if c.state == "complete"]

    def likely_best(self) -> list[Curve]:
        """Paused and complete candidates by how low their loss at the budget may be."""
        return [c for c in self._ranked(self._mean[:, -1] - self._sd[:, -1]) if not c.reference]

    def _ranked(self, losses: Array) -> list[Curve]:
        return [self._alive[i] for i in np.argsort(losses, kind="stable")]

    def on_front(self) -> set[int]:
        """Places of runs with a point that no other run's equals or undercuts in both."""
        points = sorted((flops, loss, c.place) for c in self.own for flops, loss in c.points)
        lowest, found = math.inf, set()
        for _, loss, place in points:
            if loss < lowest:
                lowest = loss
                found.add(place)
        return found


def _seed(seed: int, curves: Sequence[Curve]) -> int:
    """Of a round, from curves in order: equal for equal views, different from round to round."""
    told = ",".join(f"{c.place}:{c.step}" for c in curves)
    digest = hashlib.sha256(f"round/{seed}/{told}".encode()).digest()
    return int.from_bytes(digest[:4], "little")
