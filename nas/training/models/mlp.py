"""The MLP of the papers' regression: pre-norm residual feed-forward blocks on plain vectors.

Source: arXiv:2410.02117, appendix.
"""

from __future__ import annotations

from torch import Tensor, nn

from nas.designs.design import Design
from nas.planning.recipe import Recipe
from nas.training.models.parts import (
    NumberEmbedding,
    branch_scale,
    feed_forward,
    structured_linears,
    zero_head,
)


class Block(nn.Module):
    """One feed-forward residual branch."""

    def __init__(self, recipe: Recipe, design: Design, width: int) -> None:
        super().__init__()
        self.branch_scale = branch_scale(recipe)
        self.norm = nn.LayerNorm(width)
        self.linears = structured_linears(recipe, design, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch_scale * feed_forward(self.linears, self.norm(x))


class MLP(nn.Module):
    """Numbers (batch, features) → (batch, outputs)."""

    def __init__(self, recipe: Recipe, design: Design, width: int) -> None:
        super().__init__()
        self.embedding = NumberEmbedding(recipe.features, width)
        self.blocks = nn.ModuleList(Block(recipe, design, width) for _ in range(recipe.depth))
        self.norm = nn.LayerNorm(width)
        self.head = zero_head(recipe, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out
