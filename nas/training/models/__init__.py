"""The model families whose linear layers take any structure."""

from __future__ import annotations

from nas.training.models.mlp import MLP
from nas.training.models.transformer import TokenTransformer, ViT

__all__ = ["FAMILIES", "MLP", "TokenTransformer", "ViT"]

#: `Recipe.model` → its class
FAMILIES: dict[str, type[MLP | TokenTransformer | ViT]] = {
    "gpt": TokenTransformer,
    "pixels": TokenTransformer,
    "vit": ViT,
    "mlp": MLP,
}
