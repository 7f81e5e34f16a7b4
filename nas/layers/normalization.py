"""Weight normalisation: a factor whose RMS may fall but not rise above its initial value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nas.layers.modes import is_recorded, transforms_active


def cap_rms(weight: Tensor, cap: float, gain: Tensor | None = None, stacked: int = 0) -> Tensor:
    """gain · W / max(1, RMS(W)/cap), differentiated through; W's shape.  `gain` has shape (1,).

    The first `stacked` axes tell weights apart, each of which has its own RMS and its own gain, of
    shape weight.shape[:stacked].

    In eager code one function with a written-out gradient: as separate operations its many small
    tensors would cost a narrow layer more time than its products.

    Source: arXiv:2410.02117, appendix.
    """
    if is_recorded(weight) or torch.compiler.is_compiling() or transforms_active():
        scale, _ = _scale(weight, cap, stacked)
        return weight * (scale if gain is None else scale * _beside(gain, weight, stacked))
    capped: Tensor = _CapRms.apply(weight, gain, cap, stacked)  # type: ignore[no-untyped-call]
    return capped


def _scale(weight: Tensor, cap: float, stacked: int) -> tuple[Tensor, Tensor]:
    """1 / max(1, RMS(W)/cap), and ‖W‖ where it is above the cap, else 0; beside the weight."""
    limit = cap * weight[(0,) * stacked].numel() ** 0.5
    norm = torch.linalg.vector_norm(weight.flatten(stacked), dim=-1)
    norm = _beside(norm, weight, stacked)
    above = norm.clamp(min=limit)
    return limit / above, torch.where(norm > limit, above, torch.inf)


def _beside(values: Tensor, weight: Tensor, stacked: int) -> Tensor:
    """One value a weight, with as many axes as the weights; without `stacked`, as it is."""
    if not stacked:
        return values
    return values.reshape(*weight.shape[:stacked], *(1 for _ in weight.shape[stacked:]))


class _CapRms(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, gain: Tensor | None, cap: float, stacked: int) -> Tensor:
        scale, _ = _scale(weight, cap, stacked)
        return weight * (scale if gain is None else scale * _beside(gain, weight, stacked))

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor | None, float, int], output: Tensor
    ) -> None:
        weight, gain, ctx.cap, ctx.stacked = inputs
        ctx.save_for_backward(*((weight,) if gain is None else (weight, gain)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        weight, *gain = ctx.saved_tensors
        stacked = ctx.stacked
        scale, above = _scale(weight, ctx.cap, stacked)
        along = (grad * weight).flatten(stacked).sum(-1)
        d_gain = (along * scale.view_as(along)).view_as(gain[0]) if gain else None
        # above the cap d(scale·W) loses its part along W; below it the scale is constant
        inward = _beside(along, weight, stacked) / above / above  # squares may overflow
        whole = scale * _beside(gain[0], weight, stacked) if gain else scale
        return (grad - inward * weight) * whole, d_gain, None, None
