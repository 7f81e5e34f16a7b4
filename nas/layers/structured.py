"""What every structured linear layer has, whatever its family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nas.structure import LinearStructure


class StructuredLinear(nn.Module):
    """A linear map (..., d_in) → (..., d_out) of some structure; base of all such layers."""

    structure: LinearStructure
    in_features: int
    out_features: int
    #: input dimension of this layer in the base model at which the learning rate was tuned
    d_in_base: int
    bias: Tensor | None

    def factors(self) -> dict[str, nn.Parameter]:
        """The learned tensors with a learning rate of their own, by the names that
        `structure.adam_lr_multiplier` knows: factors, and a gate."""
        raise NotImplementedError

    @property
    def plan(self) -> Any:
        """The execution plan that was fixed, or None where each input chooses its own."""
        raise NotImplementedError

    @plan.setter
    def plan(self, value: Any) -> None:
        raise NotImplementedError

    def plan_for(
        self, tokens: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """The plan that runs an input of `tokens` tokens; `device` and `dtype` are those of the
        product, the layer's by default."""
        raise NotImplementedError

    def to_matrix(self) -> Tensor:
        """The matrix W (d_out, d_in) that the layer applies, without the bias."""
        raise NotImplementedError

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """A dense `torch.nn.Linear` that computes the same, with parameters of its own."""
        w = self.to_matrix()
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, w.device, w.dtype
        )
        linear.weight.copy_(w)
        if self.bias is not None:
            linear.bias.copy_(self.bias)
        return linear
