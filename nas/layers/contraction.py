"""The product of a token batch with both factors, A first, and its gradient.

Shapes: n tokens, x (n, γβα), A (γ, ρ, φ, δ, α), B (φ, γ, ρ, β, ε), y (n, φεδ).  Each factor is
one batched matrix product.  With β = δ = 1 the intermediate is handed on as a strided view that
BLAS accepts; otherwise it is copied once.  The gradient is written out so that every product
reads and writes rows of tokens that lie together; automatic differentiation of the same two
products leaves permuted gradients behind, which slow the element-wise work around the layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def two_factor_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y (n, φεδ) = both factors applied to x (n, γβα); differentiable once in all three."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, a, b = x.to(dtype), a.to(dtype), b.to(dtype)
    y: Tensor = _TwoFactorProduct.apply(x, a, b)  # type: ignore[no-untyped-call]
    return y


def _input_view(x: Tensor, a: Tensor) -> Tensor:
    """x as (γ, nβ, α)."""
    gamma, alpha = a.shape[0], a.shape[-1]
    n, beta = x.shape[0], x.shape[1] // (gamma * alpha)
    return x.view(n, gamma, beta, alpha).transpose(0, 1).reshape(gamma, n * beta, alpha)


def _intermediate(xs: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """z = A x, laid out for the product with B: (φ, nδ, γρβ)."""
    gamma, rho, phi, delta, alpha = a.shape
    beta = b.shape[3]
    z = torch.bmm(a.view(gamma, rho * phi * delta, alpha), xs.transpose(1, 2))
    z = z.view(gamma, rho, phi, delta, -1, beta).permute(2, 4, 3, 0, 1, 5)
    return z.reshape(phi, -1, gamma * rho * beta)


class _TwoFactorProduct(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        x, a, b = x.contiguous(), a.contiguous(), b.contiguous()
        phi, delta, epsilon = b.shape[0], a.shape[3], b.shape[4]
        z = _intermediate(_input_view(x, a), a, b)
        y = torch.bmm(z, b.view(phi, -1, epsilon))  # (φ, nδ, ε)
        y = y.view(phi, -1, delta, epsilon).permute(1, 0, 3, 2)
        return y.reshape(x.shape[0], phi * epsilon * delta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, a, b = (t.contiguous() for t in ctx.saved_tensors)
        gamma, rho, phi, delta, alpha = a.shape
        beta, epsilon = b.shape[3], b.shape[4]
        n = x.shape[0]
        xs = _input_view(x, a)
        z = _intermediate(xs, a, b)  # again, so that only the input is kept from forward
        dys = dy.reshape(n, phi, epsilon, delta).permute(1, 0, 3, 2).reshape(phi, -1, epsilon)
        db = torch.bmm(z.transpose(1, 2), dys)
        dz = torch.bmm(b.view(phi, -1, epsilon), dys.transpose(1, 2))  # (φ, γρβ, nδ)
        dz = dz.view(phi, gamma, rho, beta, n, delta).permute(1, 2, 0, 5, 4, 3)
        dz = dz.reshape(gamma, rho * phi * delta, n * beta)
        da = torch.bmm(dz, xs)
        dx = torch.bmm(dz.transpose(1, 2), a.view(gamma, rho * phi * delta, alpha))
        dx = dx.view(gamma, n, beta * alpha).transpose(0, 1).reshape(n, -1)
        return dx, da.view_as(a), db.view_as(b)
