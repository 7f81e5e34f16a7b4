"""The MLP of the papers' regression: pre-norm residual feed-forward blocks on plain vectors.

Source: arXiv:2410.02117, appendix.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nas.planning.recipe import Recipe
from nas.tasks.task import LinearFactory
from nas.training.models.ops import OWN, Ops
from nas.training.models.parts import (
    NumberEmbedding,
    branch_scale,
    feed_forward,
    structured_linears,
    zero_head,
)


class Block(nn.Module):
    """One feed-forward residual branch."""

    def __init__(self, recipe: Recipe, width: int, linear: LinearFactory) -> None:
        super().__init__()
        self.branch_scale = branch_scale(recipe)
        self.norm = nn.LayerNorm(width)
        self.linears = structured_linears(recipe, width, linear)

    def run(self, ops: Ops, x: Tensor) -> Tensor:
        """(..., width) → the same."""
        fed = feed_forward(ops, self.linears, ops.norm(self.norm, x))
        return torch.add(x, fed, alpha=self.branch_scale)


class MLP(nn.Module):
    """Numbers (batch, features) → (batch, outputs)."""

    def __init__(self, recipe: Recipe, width: int, linear: LinearFactory) -> None:
        super().__init__()
        self.embedding = NumberEmbedding(recipe.features, width)
        self.blocks = nn.ModuleList(Block(recipe, width, linear) for _ in range(recipe.depth))
        self.norm = nn.LayerNorm(width)
        self.head = zero_head(recipe, width)

    def run(self, ops: Ops, x: Tensor) -> Tensor:
        """Numbers (..., features) → (..., outputs)."""
        x = ops.linear(self.embedding, x)
        for block in self.blocks:
            x = block.run(ops, x)  # type: ignore[operator]
        return ops.linear(self.head, ops.norm(self.norm, x))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(OWN, x)
