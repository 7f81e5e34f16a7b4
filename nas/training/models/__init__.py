"""The model families whose linear layers take any structure."""

from __future__ import annotations

from torch import nn

from nas.designs.design import Design
from nas.planning.recipe import Recipe
from nas.training.models.mlp import MLP
from nas.training.models.parts import learning_rates
from nas.training.models.transformer import TokenTransformer, ViT

__all__ = ["MLP", "TokenTransformer", "ViT", "build_model", "learning_rates"]

_FAMILIES: dict[str, type[MLP | TokenTransformer | ViT]] = {
    "gpt": TokenTransformer,
    "pixels": TokenTransformer,
    "vit": ViT,
    "mlp": MLP,
}


def build_model(recipe: Recipe, design: Design, width: int) -> nn.Module:
    """A freshly initialised model of the recipe's family, depth and dimensions."""
    return _FAMILIES[recipe.model](recipe, design, width)
