"""The factors of any structure whose matrix is near to a given dense one, by alternating steps.

W of a structure is linear in each factor while the others are fixed.  Alternating least squares
solves for one factor after another, each by conjugate gradients on the normal equations, for which
W as a function of the factors is enough.  A step that does not lower the error is left out, so that
no sweep raises it.  The end is the global optimum where there is one factor, else a local one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from nas.layers.fitting import Fit

#: Sweeps at most, and the relative fall of the error below which a sweep is the last.
MAX_SWEEPS, TOLERANCE = 100, 1e-3
#: Conjugate gradients of one least-squares problem: iterations at most, and the fall of the
#: gradient at which they end.  Later sweeps go on from what was reached.
_ITERATIONS, _SOLVED = 5, 1e-10

Product = Callable[[Sequence[Tensor]], Tensor]


def drawn(shapes: Sequence[Sequence[int]], stds: Sequence[float]) -> list[Tensor]:
    """Normal factors in float64, the same at each call."""
    draw = torch.Generator().manual_seed(0)
    return [
        std * torch.randn(*shape, dtype=torch.float64, generator=draw)
        for shape, std in zip(shapes, stds, strict=True)
    ]


@torch.no_grad()
def nearest_factors(
    weight: Tensor,
    product: Product,
    start: Sequence[Tensor],
    stds: Sequence[float],
    *,
    max_sweeps: int = MAX_SWEEPS,
    tolerance: float = TOLERANCE,
) -> Fit:
    """Factors whose `product` is near to `weight` (d_out, d_in): no farther than at the start.

    At the end one scalar for each factor makes RMS / std the same for all.  Where the product is
    zero the last factor is, and the others are drawn, so that they can learn.

    Parameters
    ----------
    weight
        Real floating point and finite.
    product
        W (d_out, d_in) of factors in float64, linear in each of them.
    start
        The factors to begin with.
    stds
        Standard deviation of each factor at initialisation.
    max_sweeps, tolerance
        The end comes after `max_sweeps` sweeps over all factors, or with the first that lowers the
        error by no more than `tolerance` of it.
    """
    w = (weight.cpu() if weight.device.type == "mps" else weight).double()  # mps has no float64
    scale = w.abs().max().item() or 1.0  # squares of the scaled entries stay in range
    w = w / scale
    factors = _balanced([factor.to(w) for factor in start], stds, 1 / scale)
    residual = w - product(factors)
    error = residual.norm()
    for _ in range(max_sweeps):
        before = error
        for k in range(len(factors)):
            trial = list(factors)
            trial[k] = factors[k] + _step(product, factors, k, residual)
            left = w - product(trial)
            if left.norm() < error:
                factors, residual, error = trial, left, left.norm()
        if not before - error > tolerance * before:
            break
    factors = [factor.to(weight) for factor in _balanced(factors, stds, scale)]
    wide = [factor.to(w) for factor in factors]
    made = product([*wide[:-1], wide[-1] / scale])
    norm = w.norm().item()
    return Fit(tuple(factors), (w - made).norm().item() / norm if norm else 0.0)


def _step(product: Product, factors: Sequence[Tensor], k: int, residual: Tensor) -> Tensor:
    """What to add to factor k so that the product gains most of `residual`."""
    from scipy.sparse.linalg import LinearOperator, cg  # which takes long to import

    def change(own: Tensor) -> Tensor:
        return product([*factors[:k], own, *factors[k + 1 :]])

    def tensor(vector: object) -> Tensor:
        return torch.as_tensor(vector).to(residual).view_as(factors[k])

    _, adjoint, *_ = torch.func.vjp(change, factors[k])
    target = adjoint(residual)[0].flatten().cpu().numpy()
    normal = LinearOperator(
        (target.size, target.size),
        matvec=lambda vector: adjoint(change(tensor(vector)))[0].flatten().cpu().numpy(),
        dtype=target.dtype,
    )
    with np.errstate(divide="ignore", invalid="ignore"):  # at its end; then no step is taken
        found, _ = cg(normal, target, rtol=_SOLVED, maxiter=_ITERATIONS)
    return tensor(found)


def _balanced(factors: Sequence[Tensor], stds: Sequence[float], scale: float) -> list[Tensor]:
    """Factors of `scale` times the product, with RMS / std equal among them."""
    sizes = [_rms(factor) / std for factor, std in zip(factors, stds, strict=True)]
    if min(sizes) == 0.0:
        each = drawn([f.shape for f in factors], stds)
        return [*(f.to(factors[-1]) for f in each[:-1]), torch.zeros_like(factors[-1])]
    shared = math.exp((sum(map(math.log, sizes)) + math.log(scale)) / len(sizes))
    return [factor * (shared / size) for factor, size in zip(factors, sizes, strict=True)]


def _rms(factor: Tensor) -> float:
    most = factor.abs().max().item()
    return most * (factor / most).square().mean().sqrt().item() if most else 0.0
