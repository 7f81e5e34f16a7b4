"""What all models share: structured layers of a block, embeddings, heads and learning rates."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from nas.designs.design import Design
from nas.layers import build_layer, param_groups
from nas.layers.mixture import MixtureFFN, MixtureLinear
from nas.planning.cost import linears, structures_of
from nas.planning.recipe import Recipe
from nas.training.models.ops import Ops

EMBEDDING_STD = 1.0
#: Depth at which branches enter unscaled.
BASE_DEPTH = 3
_ZERO_INIT = ("attention_out", "mlp_out")
_WITHOUT_GAIN = ("query", "key")  # their norms have one


def structured_linears(recipe: Recipe, design: Design, width: int) -> nn.ModuleDict:
    """The structured layers of one block; the last of each branch starts as the zero map.

    By the names of their roles; experts that are feed-forward blocks are the one layer ``mlp``.
    """
    layers: dict[str, nn.Module] = {
        role.name: build_layer(
            structure,
            bias=recipe.bias,
            zero_init=role.name in _ZERO_INIT,
            normalize=recipe.normalize,
            gain=recipe.normalize and role.name not in _WITHOUT_GAIN,
            d_in_base=role.d_in_base,
        )
        for role, structure in zip(
            linears(recipe, width), structures_of(recipe, design, width), strict=True
        )
    }
    first, second = layers["mlp_in"], layers["mlp_out"]
    match first, second:
        case MixtureLinear(), MixtureLinear() if not second.structure.gated:
            del layers["mlp_in"], layers["mlp_out"]  # the gate of the first chooses for both
            layers["mlp"] = MixtureFFN(first, second)
    return nn.ModuleDict(layers)


def feed_forward(ops: Ops, layers: nn.ModuleDict, x: Tensor) -> Tensor:
    """The feed-forward branch of a block."""
    if "mlp" in layers:
        block = layers["mlp"]
        assert isinstance(block, MixtureFFN)
        return ops.mixture_block(block, x)
    hidden = functional.gelu(ops.structured([layers["mlp_in"]], x).squeeze(-2))
    return ops.structured([layers["mlp_out"]], hidden).squeeze(-2)


def branch_scale(recipe: Recipe) -> float:
    """sqrt(3/depth): the sum of all branches does not grow with depth."""
    return math.sqrt(BASE_DEPTH / recipe.depth)


class NumberEmbedding(nn.Linear):
    """Linear map of a fixed number of inputs of variance 1, whatever the width of the model."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.in_features))
        nn.init.zeros_(self.bias)


def zero_head(recipe: Recipe, width: int) -> nn.Linear:
    """The output head, dense and zero at initialisation."""
    head = nn.Linear(width, recipe.outputs, bias=not recipe.is_token_model)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return head


def learning_rates(model: nn.Module, recipe: Recipe, width: int) -> list[dict[str, Any]]:
    """Parameter groups with structure-aware learning rates; the head counts as a dense layer."""
    head = model.get_parameter("head.weight")
    return param_groups(model, recipe.lr, extra={head: recipe.base_width / width})
