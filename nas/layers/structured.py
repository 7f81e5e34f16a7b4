"""What every structured linear layer has, whatever its family."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nas.errors import InvalidInput
from nas.layers.modes import autocast_dtype
from nas.structure import LinearStructure

_Structure = TypeVar("_Structure", bound=LinearStructure)


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

    def _any_factor(self) -> Tensor:
        """A factor, for the layer's dtype and device."""
        return self.factors()[self.structure.factors[0]]

    def _check(self, x: Tensor) -> None:
        """Raise `ValueError` or `TypeError` for an input of another dimension or dtype."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"{self._described()} got an input of shape {tuple(x.shape)}; "
                f"its last dimension must be {self.in_features}"
            )
        dtype = self._any_factor().dtype
        if x.dtype == dtype:
            return
        alike = autocast_dtype(x.device, x.dtype) == autocast_dtype(x.device, dtype)
        if not (x.is_floating_point() and alike):
            raise TypeError(
                f"{self._described()} got an input of dtype {x.dtype}; "
                f"it must be {dtype}, the dtype of the layer, or floating point under autocast"
            )

    def _described(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

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


def sized(structure: _Structure, d_in: int, d_out: int) -> _Structure:
    """The structure itself; `InvalidInput` unless it is of a layer d_in → d_out."""
    if (structure.d_in, structure.d_out) != (d_in, d_out):
        accepted = f"{structure.d_in}, {structure.d_out}, the dimensions of the structure"
        raise InvalidInput("d_in, d_out", f"{d_in}, {d_out}", accepted)
    return structure
