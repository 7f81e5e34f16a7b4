"""SGD with momentum for the factors of structured layers, AdamW for all else.

The rate.  Features keep their size as a model widens where the spectral norm of each update is
proportional to sqrt(f_out / f_in) (arXiv:2310.17813, condition 1).  A step of that size lowers the
loss by what does not depend on the width; the n matrices of a factor share it, and the gradient of
one that is used for s vectors of a token has about s equal singular values.  So the gradient of one
matrix has the spectral norm sqrt(f_in / f_out) / (n s), and its rate must be

    sgd_lr · n · s · (f_out / f_in) / N

with N factors that share one update.  A square dense layer has the rate `sgd_lr` at every width,
which is μP's for SGD (arXiv:2203.03466, table 3).  CompleteP's branches, divided by the depth, make
the gradient smaller in the same ratio, and what a layer's update does to the output smaller again;
the rate then grows with depth / 3 (arXiv:2505.01618).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nas.layers import StructuredLinear
from nas.planning.recipe import Recipe
from nas.training.models.parts import BASE_DEPTH
from nas.training.muon import share_of

_MOMENTUM = 0.9


def sgd_rate(layer: StructuredLinear, factor: str) -> float:
    """Learning rate of a factor over that of a square dense layer."""
    blocks, f_out, f_in = layer.blocks(factor, layer.factors()[factor]).shape[-3:]
    directions = min(layer.structure.uses(factor), f_in, f_out)
    return blocks * directions * f_out / f_in * share_of(layer, factor)


def sgd_lr(recipe: Recipe) -> float:
    """Learning rate of a square dense layer at the depth of the recipe."""
    deeper = recipe.depth / BASE_DEPTH if recipe.depth_rule == "completep" else 1.0
    return recipe.sgd_lr * deeper


class WithSgd:
    """AdamW for some of the tensors that runs train, SGD for the others, used as one optimiser."""

    def __init__(
        self,
        adamw: torch.optim.AdamW,
        others: Sequence[Tensor],
        rates: Sequence[float],
        weight_decay: float,
    ) -> None:
        self._adamw = adamw
        self._sgd = torch.optim.SGD(
            [{"params": [p], "lr": rate} for p, rate in zip(others, rates, strict=True)],
            lr=0.0, momentum=_MOMENTUM, weight_decay=weight_decay,
        )  # fmt: skip
        self._others = set(others)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [*self._adamw.param_groups, *self._sgd.param_groups]

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """Of each tensor that runs train; of SGD's the momentum."""
        return {
            **{p: self._adamw.state[p] for g in self._adamw.param_groups for p in g["params"]},
            **{p: self._sgd.state[p] for p in self._others},
        }

    def load(self, parameter: Tensor, state: dict[str, Tensor]) -> None:
        """Take over the state of a tensor."""
        own = self._sgd if parameter in self._others else self._adamw
        own.state[parameter] = state

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        self._adamw.zero_grad(set_to_none=set_to_none)
        self._sgd.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        self._adamw.step()
        self._sgd.step()
