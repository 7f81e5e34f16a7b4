"""What all models share: structured layers of a block, embeddings, heads and learning rates."""

from __future__ import annotations

import math

import torch
from torch import nn

from nas.cost import linears
from nas.layers import EinsumLinear, param_groups
from nas.recipe import Recipe
from nas.theta import Theta

EMBEDDING_STD = 1.0
#: Depth at which branches enter unscaled.
BASE_DEPTH = 3
_ZERO_INIT = ("attention_out", "mlp_out")
_WITHOUT_GAIN = ("query", "key")  # their norms have one


def structured_linears(recipe: Recipe, theta: Theta, width: int) -> nn.ModuleDict:
    """The structured layers of one block; the last of each branch starts as the zero map."""
    return nn.ModuleDict(
        {
            role.name: EinsumLinear(
                theta,
                role.d_in,
                role.d_out,
                bias=recipe.bias,
                zero_init=role.name in _ZERO_INIT,
                normalize=recipe.normalize,
                gain=recipe.normalize and role.name not in _WITHOUT_GAIN,
                d_in_base=role.d_in_base,
            )
            for role in linears(recipe, width)
        }
    )


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


def build_optimizer(model: nn.Module, recipe: Recipe, width: int) -> torch.optim.AdamW:
    """AdamW with structure-aware learning rates; the head counts as a dense layer."""
    head = model.get_parameter("head.weight")
    groups = param_groups(model, recipe.lr, extra={head: recipe.base_width / width})
    return torch.optim.AdamW(
        groups, betas=(recipe.beta1, recipe.beta2), weight_decay=recipe.weight_decay, fused=True
    )
