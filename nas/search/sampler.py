"""The sampler ``surrogate`` behind Optuna's interface: a model of the results, a pool of points.

`suggest` decides; it sees the past as arrays, so that it can be replaced without Optuna.  The first
candidates are a scrambled Sobol sequence.  After that a Gaussian process of the loss over the box
scores a pool, by the improvement that is expected of each point: of the loss at the budget, or of
the area that the front of loss over log FLOPs dominates.  Many are proposed at once by believing
the model about those before: their variance is gone, and with it most of the reason to try their
neighbours.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from scipy.linalg import solve_triangular
from scipy.optimize import minimize
from scipy.stats import qmc
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

from nas.planning.recipe import Recipe
from nas.planning.request import SearchRequest
from nas.search import space
from nas.search.frontier import expected_improvement

Array = NDArray[np.float64]
#: Candidates of the Sobol sequence with which a search begins, and results the model needs.
SOBOL_FIRST = 8
_POOL = 2048
#: Results that the hyperparameters are fitted to, and that the model is conditioned on.
_FITTED, _CONDITIONED = 150, 512
_ITERATIONS = 20
#: Points of the pool that are chosen among after a first look, and steps of the front.
_CHOSEN_FROM, _STEPS = 256, 64
#: Losses further above the median than so many interquartile ranges are all equally bad.
_CLIP = 3.0


class Box:
    """The space of a search as a unit cube, a dimension a parameter."""

    def __init__(self, space_: Mapping[str, BaseDistribution]) -> None:
        self._space: dict[str, Any] = dict(space_)

    def __len__(self) -> int:
        return len(self._space)

    def cube(self, params: Sequence[Mapping[str, Any]]) -> Array:
        """Points (n, d) of the cube."""
        columns = [self._shares(d, [p[name] for p in params]) for name, d in self._space.items()]
        return np.array(columns, dtype=np.float64).T.reshape(len(params), len(self))

    @staticmethod
    def _shares(of: Any, values: Sequence[Any]) -> Any:
        if isinstance(of, CategoricalDistribution):
            return [(of.choices.index(v) + 0.5) / len(of.choices) for v in values]
        low, high, at = of.low, of.high, np.asarray(values, dtype=np.float64)
        if of.log:
            low, high, at = math.log(low), math.log(high), np.log(at)
        return (at - low) / (high - low) if high > low else np.zeros(len(values))

    def params(self, cube: Array) -> list[dict[str, Any]]:
        """The parameters at points (n, d) of the cube."""
        columns = {n: self._values(d, cube[:, i]) for i, (n, d) in enumerate(self._space.items())}
        return [{n: values[k] for n, values in columns.items()} for k in range(len(cube))]

    @staticmethod
    def _values(of: Any, shares: Array) -> list[Any]:
        if isinstance(of, CategoricalDistribution):
            last = len(of.choices) - 1
            return [of.choices[min(int(u * (last + 1)), last)] for u in shares]
        if of.log:
            at = np.exp(math.log(of.low) + shares * math.log(of.high / of.low))
        else:
            at = of.low + shares * (of.high - of.low)
        values: list[Any] = np.clip(at, of.low, of.high).tolist()
        return values

    def coordinates(self, cube: Array) -> Array:
        """What the model sees (n, m): a choice is as many coordinates as it has values."""
        columns = []
        for shares, of in zip(cube.T, self._space.values(), strict=True):
            if isinstance(of, CategoricalDistribution):
                index = np.minimum((shares * len(of.choices)).astype(int), len(of.choices) - 1)
                columns += list(np.eye(len(of.choices))[index].T)
            else:
                columns.append(shares)
        return np.array(columns).T


@dataclass(frozen=True, slots=True)
class Past:
    """The candidates so far, in the order of their places."""

    #: (n, d), in the unit cube
    cube: Array
    #: (n,) whether a candidate has its result
    done: NDArray[np.bool_]
    #: (n,) whether it is still running
    running: NDArray[np.bool_]
    #: (number done, objectives): loss, and for ``pareto`` the logarithm of train FLOPs
    values: Array

    @classmethod
    def of(cls, box: Box, trials: Sequence[FrozenTrial], objectives: int) -> Past:
        """What a study knows."""
        state = np.array([t.state.value for t in trials], dtype=np.int64)
        done = state == TrialState.COMPLETE.value
        values = [t.values for t in trials if t.state == TrialState.COMPLETE]
        return cls(
            box.cube([t.params for t in trials]),
            done,
            state == TrialState.RUNNING.value,
            np.array(values, dtype=np.float64).reshape(len(values), objectives),
        )


def suggest(
    request: SearchRequest, recipe: Recipe, past: Past, count: int, seed: int, wanted: int
) -> list[dict[str, Any]]:
    """The points to try next, the best first.

    Parameters
    ----------
    count
        Points that are chosen with regard to one another.
    wanted
        Points to return, at most `_POOL`: those after the first `count` stand in for any that turn
        out to be known.
    seed
        Of the pool.
    """
    box = Box(space.distributions(request, recipe))
    if past.done.sum() < SOBOL_FIRST:
        drawn = _sobol(len(box), request.seed, len(past.done) + wanted)
        return box.params(drawn[len(past.done) :])
    pool = _sobol(len(box), seed, _POOL)
    model = _Model(box.coordinates(past.cube[past.done]), past.values[:, 0])
    pending = box.coordinates(np.concatenate([pool, past.cube[past.running]]))
    score = _improvement(request, box, past, pool, model)
    return box.params(pool[model.choose(pending, score, len(pool), count, wanted)])


def _sobol(dimensions: int, seed: int, count: int) -> Array:
    """The first `count` points of a scrambled Sobol sequence."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The balance properties", UserWarning)
        drawn: Array = qmc.Sobol(dimensions, seed=seed).random(count)
    return drawn


def front_segments(loss: Array, cost: Array, reference: float, end: float) -> tuple[Array, Array]:
    """The staircase of least losses over cost: where its steps begin, and how high each is.

    The first has the height `reference`, where nothing has been reached; a last edge is `end`.
    """
    edges, heights = [-math.inf], [reference]
    for at, reached in sorted(zip(cost.tolist(), loss.tolist(), strict=True)):
        if reached < heights[-1]:
            edges.append(at)
            heights.append(reached)
    return np.array([*edges, end]), np.array(heights)


def staircase_widths(edges: Array, own: Array) -> Array:
    """How much of each step (s,) of a staircase lies at the costs (n,) of points or beyond."""
    found: Array = np.maximum(edges[1:] - np.maximum(edges[:-1], own[:, None]), 0.0)
    return found


class _Improvement:
    """How much a point of the pool is expected to improve, by mean and deviation of its loss."""

    def __init__(self, heights: Array, widths: Array) -> None:
        #: (s,) losses to improve upon, and (n, s) how much each counts for a point
        self._heights, self._widths = heights, widths

    def of(self, rows: NDArray[np.intp]) -> _Improvement:
        """The same for some of the points."""
        widths = self._widths if len(self._widths) == 1 else self._widths[rows]
        return _Improvement(self._heights, widths)

    def __call__(self, mean: Array, deviation: Array) -> Array:
        each = expected_improvement(self._heights, mean[:, None], deviation[:, None])
        found: Array = (each * self._widths).sum(axis=1)
        return found


def _improvement(
    request: SearchRequest, box: Box, past: Past, pool: Array, model: _Model
) -> _Improvement:
    loss = model.standard(past.values[:, 0])
    if request.objective == "budget":
        return _Improvement(np.array([loss.min()]), np.ones((len(pool), 1)))
    # the cost of a point is known before it runs: the area that it adds is an integral, over the
    # costs from its own on, of its improvement upon what is reached there
    shares = np.array([p["budget_share"] for p in box.params(pool)])
    own = math.log(request.train_flops) + np.log(shares)
    end = math.log(request.train_flops)
    edges, heights = front_segments(loss, past.values[:, 1], float(loss.max()), end)
    if len(heights) > _STEPS:  # a coarser front is a little worse, everywhere alike
        kept = np.linspace(0, len(heights) - 1, _STEPS).round().astype(int)
        edges, heights = np.array([*edges[kept], end]), heights[kept]
    return _Improvement(heights, staircase_widths(edges, own))


class _Model:
    """A Gaussian process of the loss over the box.

    Parameters
    ----------
    x, loss
        Coordinates (n, m) and losses (n,) of all results.
    """

    def __init__(self, x: Array, loss: Array) -> None:
        low, middle, high = np.quantile(loss, [0.25, 0.5, 0.75])
        self._most = high + _CLIP * (high - low)
        kept = np.minimum(loss, self._most)
        self._mean, self._scale = float(middle), float(kept.std()) or 1.0
        y = self.standard(loss)
        few, many = (_best_and_spread(y, most) for most in (_FITTED, _CONDITIONED))
        kernel = ConstantKernel(1.0, (1e-2, 1e2)) * Matern(
            np.ones(x.shape[1]), (5e-2, 1e2), nu=2.5
        ) + WhiteKernel(1e-2, (1e-5, 1.0))
        with warnings.catch_warnings():  # of lengths at their bounds: unimportant coordinates
            warnings.simplefilter("ignore", ConvergenceWarning)
            fitted = GaussianProcessRegressor(kernel, optimizer=_few_iterations)
            fitted.fit(x[few], y[few])
        found = fitted.kernel_
        self._signal, self._noise = found.k1, found.k2.noise_level
        self._x = x[many]
        own = self._signal(self._x) + self._noise * np.eye(len(many))
        self._factor = np.linalg.cholesky(own)
        self._solved = solve_triangular(self._factor, y[many], lower=True)

    def standard(self, loss: Array) -> Array:
        """Losses as the model has them."""
        found: Array = (np.minimum(loss, self._most) - self._mean) / self._scale
        return found

    def choose(
        self, x: Array, score: _Improvement, pool: int, count: int, wanted: int
    ) -> list[int]:
        """Indices of the first `pool` rows of `x`, best first; the other rows are running."""
        belief = _Belief(self, x)
        for running in range(pool, len(x)):
            belief.has_result(running)
        # a result lowers the deviation, and with it the score, of every point: what scores least
        # now will not be chosen
        first = score(belief.mean[:pool], belief.deviation[:pool])
        kept = np.argsort(-first, kind="stable")[: max(_CHOSEN_FROM, wanted)]
        belief, score = belief.of(kept), score.of(kept)
        chosen: list[int] = []
        for turn in range(min(count, len(kept)) + 1):
            found = score(belief.mean, belief.deviation)
            found[chosen] = -math.inf
            if turn < min(count, len(kept)):
                chosen.append(int(np.argmax(found)))
                belief.has_result(chosen[-1])
        rest = np.argsort(-found, kind="stable")[: max(wanted - len(chosen), 0)]
        return [int(kept[i]) for i in dict.fromkeys([*chosen, *rest.tolist()])][:wanted]

    def signal(self, x: Array, at: Array | None = None) -> Array:
        """Covariances (n, m) of the loss at points; their variances (n,) without other points."""
        found: Array = self._signal.diag(x) if at is None else self._signal(x, at)
        return found

    def solve(self, x: Array) -> tuple[Array, Array]:
        """Covariances (c, n) with the results, made uncorrelated, and the means (n,) at points."""
        cross: Array = solve_triangular(self._factor, self._signal(self._x, x), lower=True)
        return cross, cross.T @ self._solved

    @property
    def noise(self) -> float:
        """Variance of a result at one point."""
        return float(self._noise)


class _Belief:
    """Mean and deviation of the loss at some points, as results are believed to come in."""

    def __init__(self, model: _Model, x: Array) -> None:
        self._model, self._x = model, x
        self._cross, self.mean = model.solve(x)
        #: rows of `_cross` in use: it grows by doubling, for copying it at each result would take
        #: longest
        self._known = len(self._cross)
        self._variance = model.signal(x) - (self._cross * self._cross).sum(axis=0)

    @property
    def deviation(self) -> Array:
        """Standard deviations (n,)."""
        found: Array = np.sqrt(np.maximum(self._variance, 1e-12))
        return found

    def of(self, rows: NDArray[np.intp]) -> _Belief:
        """The same of some of the points."""
        found = object.__new__(_Belief)
        found._model, found._x = self._model, self._x[rows]
        found._cross, found.mean = self._cross[: self._known, rows], self.mean[rows]
        found._known, found._variance = self._known, self._variance[rows]
        return found

    def has_result(self, at: int) -> None:
        """Believe that point `at` has the mean as its result: its variance is gone."""
        known = self._cross[: self._known]
        shared = self._model.signal(self._x, self._x[at : at + 1])[:, 0]
        shared = shared - known.T @ known[:, at]
        learned = shared / math.sqrt(max(float(shared[at]), 0.0) + self._model.noise)
        if self._known == len(self._cross):
            self._cross = np.concatenate([self._cross, np.empty_like(self._cross)])
        self._cross[self._known] = learned
        self._known += 1
        self._variance = self._variance - learned * learned


def _few_iterations(objective: Any, start: Array, bounds: Array) -> tuple[Array, float]:
    """Optimiser of a likelihood; the exact optimum is not worth the time."""
    found = minimize(
        objective, start, jac=True, bounds=bounds, method="L-BFGS-B",
        options={"maxiter": _ITERATIONS},
    )  # fmt: skip
    return found.x, found.fun


def _best_and_spread(y: Array, most: int) -> NDArray[np.intp]:
    """Indices of at most `most`: the best half of that, and the others evenly over their ranks."""
    order = np.argsort(y, kind="stable")
    if len(order) <= most:
        return order
    best, rest = order[: most // 2], order[most // 2 :]
    spread = np.linspace(0, len(rest) - 1, most - len(best)).round().astype(int)
    return np.concatenate([best, rest[spread]])


class SurrogateSampler(BaseSampler):
    """Optuna's interface to `suggest`.

    Parameters
    ----------
    request, recipe
        The search, and its recipe as its data completes it.
    seed
        Of one ask.
    """

    def __init__(self, request: SearchRequest, recipe: Recipe, seed: int) -> None:
        self._request, self._recipe, self._seed = request, recipe, seed
        self._random = RandomSampler(seed=seed)

    def ranked(
        self, trials: Sequence[FrozenTrial], count: int, wanted: int
    ) -> list[dict[str, Any]]:
        """Many points at once, see `suggest`."""
        box = Box(space.distributions(self._request, self._recipe))
        past = Past.of(box, trials, 2 if self._request.objective == "pareto" else 1)
        return suggest(self._request, self._recipe, past, count, self._seed, wanted)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return space.distributions(self._request, self._recipe)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        trials = study.get_trials(deepcopy=False)
        earlier = [t for t in trials if t.number != trial.number and t.params]
        return self.ranked(earlier, 1, 1)[0]

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        return self._random.sample_independent(study, trial, param_name, param_distribution)
