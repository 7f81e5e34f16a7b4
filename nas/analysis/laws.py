"""Scaling laws fitted to several runs at once, with intervals that hold for few runs.

The runs share the exponent and the offset; each has a level of its own.  The fit is an
MM-estimate on logs: a robust line gives the start and the scale of the residuals, and Tukey's
biweight, which gives points far from the curve no weight at all, gives the law.

Intervals are at 95%, from the delete-one-run jackknife with Student's t on n - 1 degrees of
freedom.  A percentile bootstrap over runs covers 73% at 3 runs and 83% at 5 where it says 95%, so
it is not used.

Sources: Yohai, "High breakdown-point and high efficiency robust estimates for regression" (1987);
Tukey, "Bias and confidence in not quite large samples" (1958), for the jackknife.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nas.analysis.intervals import Interval, t_quantile

Floats = NDArray[np.float64]
#: Train FLOPs and losses of a run, (n,) each.
Curve = tuple[Floats, Floats]

#: Fewest budgets that a law is fitted to, without an offset and with one: fewer fit any.
MIN_BUDGETS = 3
MIN_BUDGETS_WITH_OFFSET = 4

#: Residuals beyond this many scales have no weight; 95% efficient on normal residuals.
_BIWEIGHT = 4.685
#: Standard deviation of normal residuals over the median of their absolute values.
_NORMAL = 1.4826
#: Least scale of residuals of log losses: below it lies the rounding of the curve itself.
_LEAST_SCALE = 1e-8
#: Offsets at which the search begins, as shares of the least loss. What curves upward less than a
#: power law has an offset below 0 in the free fit.
_SHARES = np.concatenate([[-4.0, -2.0, -1.0, -0.5, -0.25], np.arange(0.0, 0.96, 0.05), [0.98]])
#: Least and greatest loss of the reducible part over the measured range, as logs, with an offset.
_LEAST_DROP, _MOST_DROP = 0.01, 50.0
#: Longest runs of which all pairs of points go into the start: of n points there are n²/2.
_ALL_PAIRS = 32
#: Scale of the first descent over that of the start's residuals, and how fast it shrinks.
_FIRST_SCALE, _SHRINK = 10.0, 4.0
#: How often it is taken anew once it no longer shrinks so fast: at first, outliers are still in it.
_SETTLED = 3
_STEPS = 200
#: How often an offset may be chosen where there is none.
_SIGNIFICANCE = 0.01


@dataclass(frozen=True, slots=True)
class _Fit:
    """One law, of all runs or of all but one."""

    #: at 1 FLOP
    log_a: float
    b: float
    offset: float

    def loss(self, train_flops: float) -> float:
        return self.offset + _exp(self.log_a - self.b * math.log(train_flops))


@dataclass(frozen=True, slots=True)
class ScalingLaw:
    """loss = offset + a · (train FLOPs)^(-b).  Intervals are at 95%, over runs."""

    #: in the unit of the loss, geometric mean over runs; what the law gives above the offset at
    #: 1 FLOP, far outside of anything measured
    a: float
    b: float
    #: in the unit of the loss; 0.0 where none is fitted
    offset: float
    #: None: one run shows no spread, so that it is unknown
    b_interval: Interval | None
    #: None too where no offset is fitted
    offset_interval: Interval | None
    #: how many points and runs it was fitted to
    points: int
    runs: int
    #: least and greatest train FLOPs fitted
    measured: tuple[float, float]
    #: Fits of all runs (first) and of all but each; the first set's first is the law itself. The
    #: second set, where there is one, is that of offsets free to be negative.
    _fits: tuple[tuple[_Fit, ...], ...] = field(repr=False)

    def loss(self, train_flops: float) -> float:
        """The loss on the law, of the mean run."""
        return self._fits[0][0].loss(train_flops)

    def predict(self, train_flops: float) -> tuple[float, Interval | None]:
        """The loss on the law and the 95% interval of the loss on the law of all such runs.

        It holds for the mean over runs, not for one more run, and only where the law does: far
        outside of `measured` it knows nothing of what else may set in.  None for one run.

        Raises
        ------
        ValueError
            `train_flops` is not finite or not above 0.
        """
        if not (math.isfinite(train_flops) and train_flops > 0):
            raise ValueError(f"train FLOPs must be finite and above 0, not {train_flops!r}")
        intervals = [_loss_interval(fits, train_flops) for fits in self._fits]
        return self.loss(train_flops), _hull(intervals)


def compute_ratio(
    law: ScalingLaw, reference: ScalingLaw, train_flops: float
) -> tuple[float | None, Interval | None]:
    """`train_flops` over the train FLOPs with which `law` reaches what `reference` reaches by them.

    The 95% interval is over runs: the jackknife of either law, whose errors are taken as
    independent, on logarithms.  Its lower end is 0 where a law without one of the runs never comes
    down to that loss.  (None, None) where `law` itself never does; None for one run of either.
    """
    ratios, intervals = [], []
    for own in law._fits:
        for others in reference._fits:
            of_law = [_log_ratio(f, others[0], train_flops) for f in own]
            of_reference = [_log_ratio(own[0], f, train_flops) for f in others]
            ratios.append(of_law[0])
            intervals.append(_of_both(of_law, of_reference))
    if ratios[0] == -math.inf:
        return None, None
    interval = _hull(intervals)
    return _exp(ratios[0]), interval and (
        0.0 if interval[0] == -math.inf else _exp(interval[0]),
        _exp(interval[1]),
    )


def theil_sen(x: Floats, y: Floats, starts: Sequence[int] = (0,)) -> tuple[float, Floats]:
    """Median slope of the pairs within runs, and every run's median level at x = 0.

    Parameters
    ----------
    x, y
        Points (n,), those of a run together; some run has two different x.
    starts
        Index of the first point of every run.

    Returns
    -------
    (slope, levels)
        levels has one entry a run.

    Source: Sen, "Estimates of the regression coefficient based on Kendall's tau" (1968).
    """
    slopes, levels = _lines(x, y[None], np.asarray(starts, dtype=np.intp), len(x))
    return float(slopes[0]), levels[0]


def fit_scaling_law(runs: Sequence[Curve], *, offset: bool) -> ScalingLaw | None:
    """Fit loss = L∞ + a_run · C^(-b) to all runs together, whatever order they come in.

    b, and L∞ if `offset`, are shared by all runs; the reported a is the geometric mean over runs.
    A few points far from the curve do not bend it.  L∞ is not below 0: where the best one is, the
    law is the one without an offset, and its intervals span those of both fits.

    The interval of b without an offset is symmetric.  With one, b and the reducible loss at the
    largest compute have theirs on logs, for both are above 0 and each is skewed.

    Parameters
    ----------
    runs
        Train FLOPs and losses of each run, (n,) each, finite and above 0.  A run is what is
        replicated: one curve, or all compute-optimal points of one seed's family of widths.
    offset
        Whether L∞ is fitted.

    Returns
    -------
    ScalingLaw | None
        None below 3 distinct budgets, or 4 with an offset, counted over all runs and also as those
        of every run beyond its first, plus 1; with an offset, also where losses do not fall.

    Raises
    ------
    ValueError
        A value is not finite or not above 0, a run is empty, or its arrays differ in length.
    """
    data = _gather(runs)
    if data is None or not data.determined(offset):
        return None
    line = _estimate(data, offset=False)
    if not offset:
        return _law(data, line, [line], False)
    if line.b[0] <= 0.0:
        return None
    free = _estimate(data, offset=True)
    if free.offset[0] < 0.0:
        return _law(data, line, [line, free], True)
    return _law(data, free, [free], True)


def choose_law(runs: Sequence[Curve]) -> ScalingLaw | None:
    """The law with an offset where the points show one, otherwise without.

    The rule: the offset must be above 0 and lower the biweight loss of the residuals by more than
    the 99% quantile of F(1, points - parameters); parameters are a level a run, b and the offset.
    It takes residuals as independent, which those of one curve are not quite, hence not 95%.
    The intervals do not know that there was a choice.

    Parameters, None and errors are those of `fit_scaling_law`.
    """
    data = _gather(runs)
    if data is None or not data.determined(False):
        return None
    line = _estimate(data, offset=False)
    spare = len(data.x) - len(data.starts) - 2
    if spare > 0 and line.b[0] > 0.0 and data.determined(True):
        from scipy.special import fdtri  # which takes long to import

        free = _estimate(data, offset=True)
        gain = 2.0 * (line.cost(data, free.scale) - free.cost(data, free.scale))
        if free.offset[0] > 0.0 and gain > fdtri(1, spare, 1 - _SIGNIFICANCE):
            return _law(data, free, [free], True)
    return _law(data, line, [line], False)


@dataclass(frozen=True, slots=True)
class _Data:
    """Points of all runs in an order of their own, as logs that are 0 in the middle."""

    #: logs of FLOPs and of losses (points,), minus `x0` and `y0`
    x: Floats
    y: Floats
    #: index of every run's first point, and the run of every point
    starts: NDArray[np.intp]
    run: NDArray[np.intp]
    x0: float
    y0: float
    measured: tuple[float, float]

    def determined(self, offset: bool, without: int | None = None) -> bool:
        """Whether there are budgets enough, of all runs or of all but one."""
        kept = self.run != (-1 if without is None else without)
        least = MIN_BUDGETS_WITH_OFFSET if offset else MIN_BUDGETS
        within = sum(
            len(np.unique(self.x[self.run == i])) - 1
            for i in range(len(self.starts))
            if i != without
        )
        return len(np.unique(self.x[kept])) >= least and within >= least - 1


def _gather(runs: Sequence[Curve]) -> _Data | None:
    """The points, checked and sorted; None for no run."""
    sorted_runs: list[tuple[list[float], list[float]]] = []
    for i, (flops, losses) in enumerate(runs):
        c, v = np.asarray(flops, dtype=np.float64), np.asarray(losses, dtype=np.float64)
        if c.ndim != 1 or c.shape != v.shape:
            raise ValueError(f"run {i}: FLOPs and losses have shapes {c.shape} and {v.shape}")
        if len(c) == 0:
            raise ValueError(f"run {i} has no points")
        for name, values in (("train FLOPs", c), ("loss", v)):
            wrong = values[~(np.isfinite(values) & (values > 0))]
            if len(wrong):
                raise ValueError(f"run {i}: {name} must be finite and above 0, not {wrong[0]!s}")
        order = np.lexsort((v, c))
        sorted_runs.append((c[order].tolist(), v[order].tolist()))
    if not sorted_runs:
        return None
    sorted_runs.sort()
    lengths = [len(c) for c, _ in sorted_runs]
    flops = np.concatenate([c for c, _ in sorted_runs])
    x = np.log(flops)
    y = np.log(np.concatenate([v for _, v in sorted_runs]))
    x0, y0 = float(x.min() + x.max()) / 2, float(np.median(y))
    return _Data(
        x=x - x0,
        y=y - y0,
        starts=np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.intp),
        run=np.repeat(np.arange(len(lengths)), lengths),
        x0=x0,
        y0=y0,
        measured=(float(flops.min()), float(flops.max())),
    )


@dataclass(frozen=True, slots=True)
class _Estimates:
    """Laws of all runs (first) and, where there are several, of all but each, in units of `_Data`.

    Shapes: b, offset (fits,); levels (fits, runs), the logs of a; kept (fits, runs).
    """

    b: Floats
    offset: Floats
    levels: Floats
    kept: NDArray[np.bool_]
    #: of the residuals of the first, as logs
    scale: float

    def cost(self, data: _Data, scale: float) -> float:
        """Biweight loss of the first; half the sum of squares over scale² for small residuals."""
        state = _State(self.b[:1], self.offset[:1], self.levels[:1])
        return float(_rho(_residuals(data, state) / scale).sum())


def _estimate(data: _Data, *, offset: bool) -> _Estimates:
    state = _start(data, offset)
    everything = np.ones((1, len(data.starts)), dtype=np.bool_)
    parameters = len(data.starts) + 1 + offset
    # The scale shrinks by steps: from the start, whose offset is one of a grid, the biweight would
    # take the ends of the curve for outliers.
    scale = _FIRST_SCALE * _scale(_residuals(data, state)[0], parameters)
    settled = 0
    while settled < _SETTLED:
        state = _descend(data, state, everything, scale, offset, 1e-5)
        aim = _scale(_residuals(data, state)[0], parameters)
        settled += aim >= scale / _SHRINK
        scale = max(aim, scale / _SHRINK)
    state = _descend(data, state, everything, scale, offset, 1e-10)
    runs = len(data.starts)
    if runs == 1 or not all(data.determined(offset, without=i) for i in range(runs)):
        return _Estimates(state.b, state.offset, state.levels, everything, scale)
    # The scale is that of all runs: what matters to the jackknife is how the law itself moves.
    kept = ~np.eye(runs, dtype=np.bool_)
    repeated = _State(*(np.repeat(v, runs, axis=0) for v in (state.b, state.offset, state.levels)))
    rest = _descend(data, repeated, kept, scale, offset, 1e-8)
    return _Estimates(
        np.concatenate([state.b, rest.b]),
        np.concatenate([state.offset, rest.offset]),
        np.concatenate([state.levels, rest.levels]),
        np.concatenate([everything, kept]),
        scale,
    )


def _lines(x: Floats, y: Floats, starts: NDArray[np.intp], all_pairs: int) -> tuple[Floats, Floats]:
    """Theil-Sen lines of several y (sets, n): slopes (sets,) and levels (sets, runs).

    Runs of more than `all_pairs` points give only the pairs half a run apart.
    """
    ends = [*starts[1:].tolist(), len(x)]
    slopes = []
    for start, end in zip(starts.tolist(), ends, strict=True):
        length = end - start
        if length <= all_pairs:
            i, j = np.triu_indices(length, 1)
        else:
            i = np.arange(length - length // 2)
            j = i + length // 2
        i, j = i + start, j + start
        differ = x[i] != x[j]
        i, j = i[differ], j[differ]
        slopes.append((y[:, j] - y[:, i]) / (x[j] - x[i]))
    slope = np.median(np.concatenate(slopes, axis=1), axis=1)
    above = y - slope[:, None] * x
    levels = [
        np.median(above[:, start:end], axis=1)
        for start, end in zip(starts.tolist(), ends, strict=True)
    ]
    return slope, np.stack(levels, axis=1)


@dataclass(frozen=True, slots=True)
class _State:
    """Laws being fitted: b, offset (fits,), levels (fits, runs)."""

    b: Floats
    offset: Floats
    levels: Floats

    def where(self, better: NDArray[np.bool_], other: _State) -> _State:
        return _State(
            np.where(better, other.b, self.b),
            np.where(better, other.offset, self.offset),
            np.where(better[:, None], other.levels, self.levels),
        )


def _start(data: _Data, offset: bool) -> _State:
    """Theil-Sen lines on log(loss - offset), the one whose residuals are least on average."""
    offsets = (_SHARES if offset else np.zeros(1)) * math.exp(data.y.min())
    reducible = np.log(np.exp(data.y) - offsets[:, None])
    slopes, levels = _lines(data.x, reducible, data.starts, _ALL_PAIRS)
    b = np.clip(-slopes, *_exponents(data)) if offset else -slopes
    state = _State(b, offsets, levels)
    size = np.abs(_residuals(data, state)).sum(axis=1)
    best = int(np.where(np.isnan(size), np.inf, size).argmin())  # offset 0 is always sound
    return _State(b[[best]], offsets[[best]], levels[[best]])


def _exponents(data: _Data) -> tuple[float, float]:
    """Exponents between which a law with an offset can be told from none and from a step."""
    span = float(data.x.max() - data.x.min())
    return _LEAST_DROP / span, _MOST_DROP / span


def _scale(residuals: Floats, parameters: int) -> float:
    """Robust standard deviation of residuals (points,), of which the fit made `parameters` small.

    Source: Maronna, Martin, Yohai, "Robust Statistics" (2006), section 5.5, for leaving those out.
    """
    left = np.sort(np.abs(residuals))[min(parameters, len(residuals) - 1) :]
    return max(_NORMAL * float(np.median(left)), _LEAST_SCALE)


def _reducible(data: _Data, state: _State) -> Floats:
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(state.levels[:, data.run] - state.b[:, None] * data.x))


def _residuals(data: _Data, state: _State) -> Floats:
    """log(loss) - log(law) (fits, points); NaN where the law is not above 0."""
    law = state.offset[:, None] + _reducible(data, state)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(data.y - np.log(np.where((law > 0) & (law < np.inf), law, np.nan)))


def _rho(u: Floats) -> Floats:
    """Tukey's biweight: u² / 2 near 0, constant far off."""
    inside = np.maximum(1.0 - (u / _BIWEIGHT) ** 2, 0.0)
    return np.asarray(_BIWEIGHT**2 / 6 * (1.0 - inside**3))


def _weights(u: Floats) -> Floats:
    """Its derivative over u."""
    return np.asarray(np.maximum(1.0 - (u / _BIWEIGHT) ** 2, 0.0) ** 2)


def _descend(
    data: _Data,
    state: _State,
    kept: NDArray[np.bool_],
    scale: float,
    offset: bool,
    tolerance: float,
) -> _State:
    """Levenberg-Marquardt on the biweight loss of many fits at once, at a fixed scale.

    The levels of runs are eliminated: they meet only the shared parameters, so that a step costs
    a 2×2 system a fit.

    Parameters
    ----------
    state
        Where each fit begins.
    kept
        The runs of each fit (fits, runs).
    tolerance
        A fit ends with a step that moves no parameter by more: log b, logs of levels, and the
        offset as a share of the median loss.
    """
    points = kept[:, data.run]
    low, high = _exponents(data)
    damping = np.full(len(kept), 1e-3)
    active = np.ones(len(kept), dtype=np.bool_)
    residuals = np.where(points, _residuals(data, state), 0.0)
    cost = _rho(residuals / scale).sum(axis=1)
    for _ in range(_STEPS):
        weights = np.where(points, _weights(residuals / scale), 0.0)
        step, levels = _step(data, state, residuals, weights, damping, offset)
        if offset:
            b = np.clip(state.b * np.exp(np.clip(step[:, 0], -1.0, 1.0)), low, high)
            trial = _State(b, state.offset + step[:, 1], state.levels + levels)
        else:
            trial = _State(state.b + step[:, 0], state.offset, state.levels + levels)
        tried = np.where(points, _residuals(data, trial), 0.0)
        after = _rho(tried / scale).sum(axis=1)
        better = active & (after <= cost)  # not where it is NaN, and the law not above 0
        moved = np.maximum(np.abs(step).max(axis=1), np.abs(levels).max(axis=1))
        state = state.where(better, trial)
        residuals = np.where(better[:, None], tried, residuals)
        cost = np.where(better, after, cost)
        damping = np.clip(np.where(better, damping / 10, damping * 10), 1e-12, 1e12)
        active &= ~(better & (moved < tolerance)) & (damping < 1e9)
        if not active.any():
            break
    return state


def _step(
    data: _Data,
    state: _State,
    residuals: Floats,
    weights: Floats,
    damping: Floats,
    offset: bool,
) -> tuple[Floats, Floats]:
    """Steps of (log b, offset), or of (b,), (fits, 1 or 2), and of levels (fits, runs).

    Residuals and weights are (fits, points), damping (fits,).
    """
    reducible = _reducible(data, state)
    law = state.offset[:, None] + reducible
    sound = law > 0  # not of runs left out, whose weights are 0
    of_level = np.where(sound, reducible / np.where(sound, law, 1.0), 0.0)
    of_b = -data.x * of_level
    columns = [of_b]
    if offset:
        columns = [of_b * state.b[:, None], np.where(sound, 1.0 / np.where(sound, law, 1.0), 0.0)]
    weighted = weights * of_level
    # normal equations: l is for levels, s for what the runs share
    hll = np.add.reduceat(weighted * of_level, data.starts, axis=1)
    gl = np.add.reduceat(weighted * residuals, data.starts, axis=1)
    hsl = np.stack([np.add.reduceat(weighted * c, data.starts, axis=1) for c in columns], axis=1)
    hss = np.array([[(weights * c * d).sum(axis=1) for c in columns] for d in columns])
    gs = np.stack([(weights * c * residuals).sum(axis=1) for c in columns], axis=1)
    hss = hss.transpose(2, 0, 1) * (1.0 + np.eye(len(columns)) * damping[:, None, None])
    hll = np.where(hll > 0, hll, 1.0) * (1.0 + damping[:, None])
    ratio = hsl / hll[:, None]
    step = _solve(hss - ratio @ hsl.transpose(0, 2, 1), gs - (ratio * gl[:, None]).sum(axis=2))
    return step, gl / hll - (ratio * step[:, :, None]).sum(axis=1)


def _solve(left: Floats, right: Floats) -> Floats:
    """Solutions (fits, k) of k×k systems, k = 1 or 2; no step where one is singular."""
    if right.shape[1] == 1:
        top = right
        bottom = left[:, 0]
    else:
        (a, b), (c, d) = left.transpose(1, 2, 0)
        top = np.stack([d * right[:, 0] - b * right[:, 1], a * right[:, 1] - c * right[:, 0]], 1)
        bottom = (a * d - b * c)[:, None]
    sound = bottom > 0
    return np.where(sound, top / np.where(sound, bottom, 1.0), 0.0)


def _law(data: _Data, shown: _Estimates, sets: Sequence[_Estimates], offset: bool) -> ScalingLaw:
    """The law `shown` with intervals that span those of every set."""
    fits = tuple(_fits(data, estimates) for estimates in sets)
    law = fits[0][0]
    return ScalingLaw(
        a=_exp(law.log_a),
        b=law.b,
        offset=law.offset,
        b_interval=_hull([_b_interval(f) for f in fits]),
        offset_interval=_offset_interval(fits[-1], data.measured[1]) if offset else None,
        points=len(data.x),
        runs=len(data.starts),
        measured=data.measured,
        _fits=fits,
    )


def _fits(data: _Data, estimates: _Estimates) -> tuple[_Fit, ...]:
    unit = math.exp(data.y0)
    rows = zip(estimates.b, estimates.offset, estimates.levels, estimates.kept, strict=True)
    return tuple(
        _Fit(float(levels[kept].mean() + b * data.x0 + data.y0), float(b), float(offset * unit))
        for b, offset, levels, kept in rows
    )


def _jackknife(values: Sequence[float]) -> Interval | None:
    """95% interval from the value of all runs (first) and those of all but each of n runs."""
    runs = len(values) - 1
    if runs < 2:
        return None
    whole, rest = values[0], np.asarray(values[1:])
    error = math.sqrt((runs - 1) / runs * float(((rest - rest.mean()) ** 2).sum()))
    half = t_quantile(runs - 1) * error
    return whole - half, whole + half


def _b_interval(fits: Sequence[_Fit]) -> Interval | None:
    # a replicate that does not fall has no logarithm either
    if all(f.offset == 0.0 for f in fits) or any(f.b <= 0.0 for f in fits):
        return _jackknife([f.b for f in fits])
    return _mapped(_jackknife([math.log(f.b) for f in fits]), _exp)


def _offset_interval(fits: Sequence[_Fit], largest: float) -> Interval | None:
    top = max(f.loss(largest) for f in fits)  # above every offset
    if any(f.offset >= top for f in fits):
        return None  # a replicate that is all offset: what is left of it is below rounding
    found = _jackknife([math.log(top - f.offset) for f in fits])
    if found is None:
        return None
    return max(top - _exp(found[1]), 0.0), max(top - _exp(found[0]), 0.0)


def _loss_interval(fits: Sequence[_Fit], train_flops: float) -> Interval | None:
    if all(f.offset == 0.0 for f in fits):
        logs = [f.log_a - f.b * math.log(train_flops) for f in fits]
        return _mapped(_jackknife(logs), _exp)
    found = _jackknife([f.loss(train_flops) for f in fits])
    return found and (max(found[0], 0.0), found[1])


def _log_ratio(fit: _Fit, reference: _Fit, train_flops: float) -> float:
    """Logarithm of the FLOPs over those that `fit` needs; -inf where it never comes down so far."""
    left = reference.loss(train_flops) - fit.offset
    if left <= 0.0 or fit.b <= 0.0:
        return -math.inf
    return math.log(train_flops) - (fit.log_a - math.log(left)) / fit.b


def _of_both(first: Sequence[float], second: Sequence[float]) -> Interval | None:
    """The interval of a value from two jackknives of it, whose errors are independent."""
    if len(first) < 3 or len(second) < 3:  # all runs and all but each of at least two
        return None
    finite = [v for v in (*first, *second) if v > -math.inf]
    if len(finite) < len(first) + len(second):
        return -math.inf, max(finite, default=-math.inf)
    one, other = _jackknife(first), _jackknife(second)
    assert one is not None
    assert other is not None
    half = math.hypot(one[1] - first[0], other[1] - second[0])
    return first[0] - half, first[0] + half


def _mapped(interval: Interval | None, back: Callable[[float], float]) -> Interval | None:
    return interval and (back(interval[0]), back(interval[1]))


def _hull(intervals: Sequence[Interval | None]) -> Interval | None:
    """The least interval that holds all; None where one is unknown."""
    known = [i for i in intervals if i is not None]
    if len(known) < len(intervals):
        return None
    return min(low for low, _ in known), max(high for _, high in known)


def _exp(value: float) -> float:
    """exp, kept finite: a far extrapolation lies beyond any float."""
    return math.exp(min(max(value, -700.0), 700.0))
