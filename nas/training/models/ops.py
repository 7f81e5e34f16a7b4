"""What the models compute with: their own modules, or R models of equal shape at once.

A model's forward pass is written once, over these operations.  Leading axes are the caller's: of
one model (batch, …), of stacked ones (R, …).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from nas.layers.mixture import MixtureFFN


class Ops(Protocol):
    """The operations of models that have parameters."""

    def structured(self, layers: Sequence[nn.Module], x: Tensor) -> Tensor:
        """Layers of equal dimensions on the same input: (..., d_in) → (..., layers, d_out)."""
        ...

    def mixture_block(self, block: MixtureFFN, x: Tensor) -> Tensor:
        """(..., width) → (..., width)."""
        ...

    def linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """(..., d_in) → (..., d_out)."""
        ...

    def norms(self, layers: Sequence[nn.LayerNorm], x: Tensor) -> Sequence[Tensor]:
        """Each norm on its part of (..., layers, heads, n) → (..., heads, n) each."""
        ...

    def norm(self, layer: nn.LayerNorm, x: Tensor) -> Tensor:
        """(..., n) → the same."""
        ...

    def embedded(self, table: nn.Embedding, tokens: Tensor) -> Tensor:
        """Token ids (...) → (..., width)."""
        ...

    def positions(self, table: nn.Embedding, count: int) -> Tensor:
        """The first rows of a table, which broadcast over (..., count, width)."""
        ...


class Own:
    """Of one model, by the modules themselves."""

    def structured(self, layers: Sequence[nn.Module], x: Tensor) -> Tensor:
        if len(layers) == 1:
            one: Tensor = layers[0](x)
            return one.unsqueeze(-2)
        return torch.stack([layer(x) for layer in layers], dim=-2)

    def mixture_block(self, block: MixtureFFN, x: Tensor) -> Tensor:
        y: Tensor = block(x)
        return y

    def linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        y: Tensor = layer(x)
        return y

    def norms(self, layers: Sequence[nn.LayerNorm], x: Tensor) -> Sequence[Tensor]:
        return [layer(part) for layer, part in zip(layers, x.unbind(-3), strict=True)]

    def norm(self, layer: nn.LayerNorm, x: Tensor) -> Tensor:
        y: Tensor = layer(x)
        return y

    def embedded(self, table: nn.Embedding, tokens: Tensor) -> Tensor:
        return functional.embedding(tokens, table.weight)

    def positions(self, table: nn.Embedding, count: int) -> Tensor:
        return table.weight[:count]


OWN = Own()
