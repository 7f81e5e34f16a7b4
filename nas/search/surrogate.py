"""A Gaussian process over learning curves: log loss of a run at a compute, with its uncertainty.

    y_i(c) = φ(x_i, c)·β + g(x_i, c) + h_i(c) + noise

c is the logarithm of train FLOPs over the budget, x_i the features of a run, of
`nas.search.features`.  φ is a short basis (c, c², width, ω, ψ, ν and products with c), whose
coefficients β have a normal prior: broad, but centred on what arXiv:2410.02117 found, that ω > 0
and ψ < 1 raise the loss.  g is common to runs that are alike (Matérn 5/2 with a length scale a
feature), h_i a run's own deviation.
With evidence of earlier searches φ has one more column, what a model of that evidence predicts; the
data decide how much of it holds.

Length scales and variances maximise the posterior of a sample of the points (`_FITTED`), by L-BFGS
on torch's gradients; g is conditioned on at most `_CONDITIONED` points, h_i on all of its run's.
Gaussian processes of scikit-learn and BoTorch were looked at: the one has no kernel of a run's own
beside a common one, the other's structured kernels cost seconds a fit; both are of single points,
where here one factorisation serves all runs and the rest are matrices of a curve's length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nas.search.features import NAMES

Array = NDArray[np.float64]
#: Points that hyperparameters are fitted to, and points that the common part is conditioned on.
_FITTED, _CONDITIONED = 192, 512
_ITERATIONS = 30
#: Of logarithms of hyperparameters, from where they begin; their prior has a deviation of 1.
_FARTHEST = 12.0
_WIDTH, _OMEGA, _PSI, _NU = (NAMES.index(n) for n in ("log_width", "omega", "psi", "nu"))
#: Prior of β: mean of ω and ψ, in log loss a unit of exponent; every other mean is 0.
_MEAN_OMEGA, _MEAN_PSI = 0.1, -0.1
#: Variances of β: c, c², width, ω, ψ, ν, and width and ν times c.
_VARIANCES = (1.0, 0.05, 0.05, 0.1, 0.1, 0.1, 0.01, 0.01)
#: Of what earlier evidence predicts: mean and variance of its coefficient.
_TRUST, _TRUST_VARIANCE = 0.7, 0.25


@dataclass(frozen=True, slots=True)
class Observed:
    """Points of curves: shape (n,) each."""

    #: row of the features that a point's run has
    run: NDArray[np.int64]
    #: log of train FLOPs over the budget
    c: Array
    #: log of the loss
    y: Array


class CurveModel:
    """The posterior of learning curves given points of some of them.

    Parameters
    ----------
    x
        Features of the runs that were observed, shape (runs, features).
    observed
        Points of their curves.
    priors
        Models of earlier evidence; see the module.
    seed
        Of the sample of points.
    """

    def __init__(
        self, x: Array, observed: Observed, priors: Sequence[CurveModel] = (), seed: int = 0
    ) -> None:
        self._priors = tuple(priors)
        self._x, self._observed = x, observed
        spread = np.maximum(self._x.std(0), 0.05)
        self._scale = torch.from_numpy(spread)
        self._level = float(observed.y.mean())
        self._sd = max(float(observed.y.std()), 1e-3)
        drawn = np.random.default_rng(seed)
        self._kernel = _Kernel(self._scale)
        self._fit(sample(observed, _FITTED, drawn))
        self._condition(sample(observed, _CONDITIONED, drawn))

    def _basis(
        self, x: Array, c: Array, alike: Sequence[Tensor | None] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(φ scaled so that β has unit variance, φ·mean of β), shapes (n, columns) and (n,)."""
        omega, psi, nu, width = (x[:, i] for i in (_OMEGA, _PSI, _NU, _WIDTH))
        columns = [c, c * c, width, omega, psi - 1.0, nu, width * c, nu * c]
        scales = [math.sqrt(v) for v in _VARIANCES]
        mean = _MEAN_OMEGA * omega + _MEAN_PSI * (psi - 1.0)
        for prior, near in zip(self._priors, alike or [None] * len(self._priors), strict=True):
            believed = prior.common(x, c, near)
            columns.append(believed / self._sd)
            scales.append(math.sqrt(_TRUST_VARIANCE))
            mean = mean + _TRUST / len(self._priors) * believed / self._sd
        return torch.from_numpy(np.stack(columns, 1) * scales), torch.from_numpy(mean)

    def common(self, x: Array, c: Array, alike: Tensor | None = None) -> Array:
        """Mean of runs of these features, about that of all points."""
        mean, _ = self._predict(x, c, variance=False, spread=alike)
        return (mean * self._sd).numpy()

    def _points(self, which: NDArray[np.int64]) -> tuple[Tensor, ...]:
        run, c, y = self._observed.run[which], self._observed.c[which], self._observed.y[which]
        phi, mean = self._basis(self._x[run], c)
        residual = torch.from_numpy((y - self._level) / self._sd) - mean
        return torch.from_numpy(self._x[run]), torch.from_numpy(c), phi, residual

    def _fit(self, which: NDArray[np.int64]) -> None:
        x, c, phi, residual = self._points(which)
        run = torch.from_numpy(self._observed.run[which])
        same, lag = run[:, None] == run[None, :], (c[:, None] - c[None, :]).abs()
        linear, gap = phi @ phi.T + 1.0, (x[:, None, :] - x[None, :, :]).square()
        eye = torch.eye(len(c), dtype=torch.float64)
        optimizer = torch.optim.LBFGS(
            self._kernel.free, max_iter=_ITERATIONS, line_search_fn="strong_wolfe"
        )

        best, reached = math.inf, self._kernel.values()

        def loss() -> Tensor:
            nonlocal best, reached
            optimizer.zero_grad()
            k = linear + self._kernel.common(gap, lag) + same * self._kernel.own(lag)
            factor = torch.linalg.cholesky(k + (self._kernel.noise + 1e-6) * eye)
            white = torch.linalg.solve_triangular(factor, residual[:, None], upper=False)
            value: Tensor = white.square().sum() / 2 + factor.diagonal().log().sum()
            value = value + self._kernel.penalty()
            value.backward()  # type: ignore[no-untyped-call]
            if value.item() < best:
                best, reached = value.item(), self._kernel.values()
            return value

        try:
            optimizer.step(loss)  # type: ignore[no-untyped-call]
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            # it stands where a line search tried a step that was far too long
            self._kernel.freeze(reached)
        else:
            self._kernel.freeze(self._kernel.values(), reached)

    def _condition(self, which: NDArray[np.int64]) -> None:
        x, c, phi, residual = self._points(which)
        kernel = self._kernel
        run = torch.from_numpy(self._observed.run[which])
        lag = (c[:, None] - c[None, :]).abs()
        k = phi @ phi.T + 1.0 + kernel.alike(x, x) * kernel.along(lag)
        k = k + (run[:, None] == run[None, :]) * kernel.own(lag)
        k.diagonal().add_(kernel.noise + 1e-6)
        self._factor = torch.linalg.cholesky(k)
        self._at = (x, c, phi)
        self._weights = torch.cholesky_solve(residual[:, None], self._factor)[:, 0]

    def _predict(
        self, x: Array, c: Array, *, variance: bool, spread: Tensor | None = None,
        priors: Sequence[Tensor | None] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Mean and variance of φ·β + g, standardised; shape (n,).

        `spread` (n, conditioned) is the part of g's covariance that features alone decide, and
        `priors` that of each model of earlier evidence.
        """
        phi, mean = self._basis(x, c, priors)
        at_x, at_c, at_phi = self._at
        levels = torch.from_numpy(c)
        if spread is None:
            spread = self._kernel.alike(torch.from_numpy(x), at_x)
        k = spread * self._kernel.along(levels[:, None] - at_c[None, :]) + phi @ at_phi.T + 1.0
        found = mean + k @ self._weights
        if not variance:
            return found, found
        white = torch.linalg.solve_triangular(self._factor, k.T, upper=False)
        before = phi.square().sum(1) + 1.0 + self._kernel.signal
        return found, (before - white.square().sum(0)).clamp_min(1e-9)

    @property
    def noise_sd(self) -> float:
        """Standard deviation of a log loss about its curve."""
        return self._sd * math.sqrt(float(self._kernel.noise))

    def curves(
        self, x: Array, grid: Array, observed: Sequence[tuple[Array, Array]] | None = None
    ) -> tuple[Array, Array]:
        """Mean and standard deviation of log losses, noise left out, each (runs, len(grid)).

        Parameters
        ----------
        x
            Features of the runs, shape (runs, features).
        grid
            Values of c.
        observed
            For each run its own points (c, y), which may be none.
        """
        runs, size = len(x), len(grid)
        means, variances = np.empty((runs, size)), np.empty((runs, size))
        alike, *priors = (
            m._kernel.alike(torch.from_numpy(x), m._at[0]) for m in (self, *self._priors)
        )
        for level, c in enumerate(grid):
            mean, variance = self._predict(
                x, np.full(runs, c), variance=True, spread=alike, priors=priors
            )
            means[:, level], variances[:, level] = mean.numpy(), variance.numpy()
        own = self._kernel.own_at(grid[:, None] - grid[None, :])
        deviations = np.sqrt(variances + own.diagonal())
        if observed is not None:
            self._follow(x, grid, observed, means, variances, deviations)
        return self._level + self._sd * means, self._sd * deviations

    def _follow(
        self, x: Array, grid: Array, observed: Sequence[tuple[Array, Array]],
        means: Array, variances: Array, deviations: Array,
    ) -> None:  # fmt: skip
        """Condition each run on its own points; their number differs, so by groups of equal c."""
        begun = [i for i, (c, _) in enumerate(observed) if len(c)]
        if not begun:
            return
        lengths = [len(observed[i][0]) for i in begun]
        c = np.concatenate([observed[i][0] for i in begun])
        y = (np.concatenate([observed[i][1] for i in begun]) - self._level) / self._sd
        at, spread = self._predict(np.repeat(x[begun], lengths, 0), c, variance=True)
        ends = np.cumsum(lengths)
        for i, end, length in zip(begun, ends, lengths, strict=True):
            piece = slice(end - length, end)
            own_c, sd = c[piece], np.sqrt(spread[piece].numpy())
            grid_sd = np.sqrt(variances[i])
            near = self._kernel.along_at(own_c[:, None] - own_c[None, :])
            k = sd[:, None] * sd[None, :] * near
            k = k + self._kernel.own_at(own_c[:, None] - own_c[None, :])
            k[np.diag_indices(length)] += float(self._kernel.noise) + 1e-6
            lag = grid[:, None] - own_c[None, :]
            cross = grid_sd[:, None] * sd[None, :] * self._kernel.along_at(lag)
            cross = cross + self._kernel.own_at(lag)
            solved = np.linalg.solve(k, np.column_stack([y[piece] - at[piece].numpy(), cross.T]))
            means[i] += cross @ solved[:, 0]
            left = deviations[i] ** 2 - np.einsum("gi,ig->g", cross, solved[:, 1:])
            deviations[i] = np.sqrt(np.maximum(left, 1e-9))


class _Kernel:
    """The kernels of g and h and their hyperparameters, in logarithms; see `CurveModel`."""

    def __init__(self, scale: Tensor) -> None:
        features = len(scale)
        #: of features, of c for g and for h
        self.lengths = torch.full((features,), 1.0, dtype=torch.float64)
        self.rest = torch.tensor([1.5, 0.7, -1.0, -2.5, -5.0], dtype=torch.float64)
        self._start = (self.lengths.clone(), self.rest.clone())
        self._scale = scale
        self.free = [self.lengths.requires_grad_(), self.rest.requires_grad_()]

    def values(self) -> list[Tensor]:
        """Copies of the hyperparameters as they are."""
        return [p.detach().clone() for p in self.free]

    def freeze(self, *fitted: Sequence[Tensor]) -> None:
        """Hyperparameters from now on: the first of these near where they began, else as they
        began; far away their exponentials overflow."""
        for found in (*fitted, self._start):
            pairs = zip(found, self._start, strict=True)
            if all(bool(((p - s).abs() <= _FARTHEST).all()) for p, s in pairs):
                self.lengths, self.rest = found
                return

    def penalty(self) -> Tensor:
        """Minus the logarithm of the prior of the hyperparameters."""
        away = ((self.lengths - self._start[0]) / 1.0).square().sum()
        return (away + ((self.rest - self._start[1]) / 1.0).square().sum()) / 2

    @property
    def signal(self) -> Tensor:
        return self.rest[2].exp()

    @property
    def noise(self) -> Tensor:
        return self.rest[4].exp()

    def along(self, lag: Tensor) -> Tensor:
        """Correlation of g along c."""
        return torch.exp(-(lag / self.rest[0].exp()).square() / 2)

    def own(self, lag: Tensor) -> Tensor:
        """Covariance of h along c: exponential, for noisy curves wander."""
        return self.rest[3].exp() * torch.exp(-lag.abs() / self.rest[1].exp())

    def common(self, gap: Tensor, lag: Tensor) -> Tensor:
        """Covariance of g from squared differences of features (n, m, features) and |Δc|."""
        weights = (-2 * self.lengths).exp() / self._scale.square()
        r = ((gap @ weights) * 5.0 + 1e-12).sqrt()
        return self.signal * (1 + r + r.square() / 3) * (-r).exp() * self.along(lag)

    def alike(self, x: Tensor, at_x: Tensor) -> Tensor:
        """What features alone decide of the covariance of g, (n, m)."""
        weights = (-self.lengths).exp() / self._scale
        r = torch.cdist(x * weights, at_x * weights) * math.sqrt(5.0)
        return self.signal * (1 + r + r.square() / 3) * (-r).exp()

    def along_at(self, lag: Array) -> Array:
        found: Array = self.along(torch.from_numpy(lag)).numpy()
        return found

    def own_at(self, lag: Array) -> Array:
        found: Array = self.own(torch.from_numpy(lag)).numpy()
        return found


def sample(observed: Observed, most: int, drawn: np.random.Generator) -> NDArray[np.int64]:
    """Rows of at most `most` points: the last of as many runs as there is room for, the lowest
    first, then earlier ones at random."""
    count = len(observed.y)
    if count <= most:
        return np.arange(count)
    last: dict[int, int] = {}
    for row in np.argsort(observed.c, kind="stable"):
        last[int(observed.run[row])] = int(row)
    ends = np.array(sorted(last.values()))
    if len(ends) > most // 2:
        # half of the room: those low for their compute, and the rest by chance
        trend = np.polyfit(observed.c[ends], observed.y[ends], 1)
        order = np.argsort(observed.y[ends] - np.polyval(trend, observed.c[ends]), kind="stable")
        low, rest = ends[order[: most // 4]], ends[order[most // 4 :]]
        ends = np.concatenate([low, drawn.choice(rest, most // 2 - len(low), replace=False)])
    others = np.setdiff1d(np.arange(count), ends)
    more = drawn.choice(others, most - len(ends), replace=False)
    return np.sort(np.concatenate([ends, more]))
