"""The MLP of the papers' regression: pre-norm residual feed-forward blocks on plain vectors.

Source: arXiv:2410.02117, appendix.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from nas.models.parts import NumberEmbedding, branch_scale, structured_linears, zero_head
from nas.recipe import Recipe
from nas.theta import Theta


class Block(nn.Module):
    """One feed-forward residual branch."""

    def __init__(self, recipe: Recipe, theta: Theta, width: int) -> None:
        super().__init__()
        self.branch_scale = branch_scale(recipe)
        self.norm = nn.LayerNorm(width)
        self.linears = structured_linears(recipe, theta, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.gelu(self.linears["mlp_in"](self.norm(x)))
        out: Tensor = x + self.branch_scale * self.linears["mlp_out"](hidden)
        return out


class MLP(nn.Module):
    """Numbers (batch, features) → (batch, outputs)."""

    def __init__(self, recipe: Recipe, theta: Theta, width: int) -> None:
        super().__init__()
        self.embedding = NumberEmbedding(recipe.features, width)
        self.blocks = nn.ModuleList(Block(recipe, theta, width) for _ in range(recipe.depth))
        self.norm = nn.LayerNorm(width)
        self.head = zero_head(recipe, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out
