"""What all models share: structured layers of a block, embeddings and heads."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional

from nas.layers.mixture import MixtureFFN, MixtureLinear
from nas.planning.cost import linears
from nas.planning.recipe import Recipe
from nas.tasks.task import LinearFactory
from nas.training.models.ops import Ops

EMBEDDING_STD = 1.0
#: Depth at which branches enter unscaled.
BASE_DEPTH = 3
_ZERO_INIT = ("attention_out", "mlp_out")


def structured_linears(recipe: Recipe, width: int, linear: LinearFactory) -> nn.ModuleDict:
    """The structured layers of one block; the last of each branch starts as the zero map.

    By the names of their roles; experts that are feed-forward blocks are the one layer ``mlp``.
    """
    layers = {
        role.name: linear(
            role.d_in,
            role.d_out,
            bias=recipe.bias,
            zero_init=role.name in _ZERO_INIT,
            heads=role.heads,
            side=role.side,
        )
        for role in linears(recipe, width)
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
    """sqrt(3/depth), with which the sum of all branches does not grow with depth at the start; or
    3/depth, with which neither what all branches learn together does (arXiv:2505.01618)."""
    share = BASE_DEPTH / recipe.depth
    return share if recipe.depth_rule == "completep" else math.sqrt(share)


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
