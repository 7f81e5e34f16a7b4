"""Weight normalisation: a factor whose RMS may fall but not rise above its initial value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nas.layers.modes import is_recorded, transforms_active


def cap_rms(weight: Tensor, cap: float, gain: Tensor | None = None) -> Tensor:
    """gain · W / max(1, RMS(W)/cap), differentiated through; W's shape.  `gain` has shape (1,).

    In eager code one function with a written-out gradient: as separate operations its many small
    tensors would cost a narrow layer more time than its products.

    Source: arXiv:2410.02117, appendix.
    """
    if is_recorded(weight) or torch.compiler.is_compiling() or transforms_active():
        _, scale, _ = _norm_and_scale(weight, cap)
        return weight * (scale if gain is None else scale * gain)
    capped: Tensor = _CapRms.apply(weight, gain, cap)  # type: ignore[no-untyped-call]
    return capped


def cap_rms_each(weights: Sequence[Tensor], limits: Tensor, gains: Tensor) -> list[Tensor]:
    """`cap_rms` of many weights at once, in a few operations.

    Parameters
    ----------
    weights
        Each (R, L, n): R times L weights of n numbers.
    limits
        Largest norm of each weight, σ·sqrt(n), (ΣL,): those of the first, then of the second, ….
    gains
        (R, ΣL).
    """
    if torch.compiler.is_compiling():  # which makes few operations of many by itself
        norms = torch.cat([torch.linalg.vector_norm(w, dim=2) for w in weights], dim=1)
        whole = limits / torch.maximum(norms, limits) * gains
        return [w * f for w, f in zip(weights, _beside(whole, weights), strict=True)]
    return list(_CapRmsEach.apply(limits, gains, *weights))  # type: ignore[no-untyped-call]


def _norm_and_scale(weight: Tensor, cap: float) -> tuple[Tensor, Tensor, float]:
    limit = cap * weight.numel() ** 0.5
    norm = torch.linalg.vector_norm(weight)
    return norm, limit / norm.clamp(min=limit), limit


class _CapRms(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, gain: Tensor | None, cap: float) -> Tensor:
        _, scale, _ = _norm_and_scale(weight, cap)
        return weight * (scale if gain is None else scale * gain)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor | None, float], output: Tensor
    ) -> None:
        weight, gain, ctx.cap = inputs
        ctx.save_for_backward(*((weight,) if gain is None else (weight, gain)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        weight, *rest = ctx.saved_tensors
        norm, scale, limit = _norm_and_scale(weight, ctx.cap)
        along = torch.sum(grad * weight)
        # above the cap d(scale·W) loses its part along W; below it the scale is constant
        above = norm.clamp(min=limit)
        inward = torch.where(norm > limit, along / above / above, 0.0)  # squares may overflow
        d_weight = (grad - inward * weight) * (scale * rest[0] if rest else scale)
        return d_weight, ((along * scale).view(1) if rest else None), None


class _CapRmsEach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, limits: Tensor, gains: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        norms = torch.cat([torch.linalg.vector_norm(w, dim=2) for w in weights], dim=1)
        above = torch.maximum(norms, limits)
        scales = limits / above
        whole = scales * gains
        ctx.save_for_backward(norms > limits, above, scales, whole, *weights)
        return tuple(w * f for w, f in zip(weights, _beside(whole, weights), strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        capped, above, scales, whole, *weights = ctx.saved_tensors
        pairs = list(zip(grads, weights, strict=True))
        along = torch.cat([torch.linalg.vecdot(g, w) for g, w in pairs], dim=1)
        inward = torch.where(capped, along / above / above, 0.0)
        each = zip(pairs, _beside(inward, weights), _beside(whole, weights), strict=True)
        found = [torch.addcmul(g, w, i, value=-1).mul_(f) for (g, w), i, f in each]
        return None, along * scales, *found


def _beside(values: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """Values (R, ΣL) as (R, L, 1) for each of the weights (R, L, n)."""
    return torch.split(values.unsqueeze(2), [w.shape[1] for w in weights], dim=1)
