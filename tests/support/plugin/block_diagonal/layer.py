"""The layer of the family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nas.layers.base import StructuredLinear

from . import BlockDiagonalStructure


class BlockDiagonalLinear(StructuredLinear):
    """y = x Wᵀ + bias with W blocks along the diagonal."""

    structure: BlockDiagonalStructure

    def __init__(
        self,
        structure: BlockDiagonalStructure,
        d_in: int,
        d_out: int,
        bias: bool = True,
        *,
        zero_init: bool = False,
        normalize: bool = False,
        gain: bool = False,
        d_in_base: int | None = None,
        plan: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            structure, d_in, d_out, bias,
            zero_init, normalize, gain, d_in_base, plan, device, dtype,
        )  # fmt: skip

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {"A": self.structure.shape}

    def plain(self, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
        (factor,) = factors
        blocks, _, columns = factor.shape
        x = functional.pad(x, (0, blocks * columns - self.in_features))
        y = torch.einsum("brc,nbc->nbr", factor, x.reshape(-1, blocks, columns))
        return y.flatten(1)[:, : self.out_features]

    def product(self, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
        return self.plain(x, factors).contiguous()

    def _checked_plan(self, value: object) -> str:
        return str(value)

    def _chosen_plan(self, tokens: int, device: torch.device, dtype: torch.dtype) -> str:
        return "einsum"
