"""The model families whose linear layers take any structure."""

from __future__ import annotations

from torch import nn

from nas.design import Design
from nas.models.mlp import MLP
from nas.models.parts import build_optimizer
from nas.models.transformer import TokenTransformer, ViT
from nas.recipe import Recipe

__all__ = ["MLP", "TokenTransformer", "ViT", "build_model", "build_optimizer"]

_FAMILIES: dict[str, type[MLP | TokenTransformer | ViT]] = {
    "gpt": TokenTransformer,
    "pixels": TokenTransformer,
    "vit": ViT,
    "mlp": MLP,
}


def build_model(recipe: Recipe, design: Design, width: int) -> nn.Module:
    """A freshly initialised model of the recipe's family, depth and dimensions."""
    return _FAMILIES[recipe.model](recipe, design, width)
