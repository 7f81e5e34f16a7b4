"""What makes the linear layers of a model: structured ones, or ones that only say what they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from nas.designs.design import Design, LinearRole
from nas.errors import InvalidInput
from nas.layers import build_layer
from nas.planning.cost import sheet_of, structures_by_role
from nas.planning.recipe import Recipe
from nas.planning.sheets import SheetLayer
from nas.tasks.task import Task


class StructuredFactory:
    """Makes the layers of one model in the structures of a design.

    The sheet of the recipe says which layers the model has, in the order in which it makes them:
    budgets are counted by it, so a model that makes others is refused.
    """

    def __init__(self, recipe: Recipe, design: Design, width: int) -> None:
        self._recipe, self._width = recipe, width
        self._structures = structures_by_role(recipe, design, width)
        layers = sheet_of(recipe, width).layers
        self._expected = [layer for _ in range(layers[0].count) for layer in layers]
        self._next: Iterator[SheetLayer] = iter(self._expected)
        self._made = 0

    def __call__(
        self,
        d_in: int,
        d_out: int,
        *,
        bias: bool = True,
        zero_init: bool = False,
        heads: int | None = None,
        side: Literal["in", "out"] = "out",
    ) -> nn.Module:
        """See `nas.tasks.task.LinearFactory`."""
        layer = next(self._next, None)
        self._made += 1
        asked = (d_in, d_out, bias, heads, side)
        role = layer.role if layer else None
        if (
            layer is None or role is None
            or asked != (role.d_in, role.d_out, layer.bias, role.heads, role.side)
        ):  # fmt: skip
            self._refuse(f"{d_in}→{d_out} as layer {self._made} of the model")
        assert layer is not None
        normalize = self._recipe.normalize
        return build_layer(
            self._structures[layer.role], bias=bias, zero_init=zero_init,
            normalize=normalize, gain=normalize and layer.gained, d_in_base=layer.role.d_in_base,
            parametrization=self._recipe.parametrization,
        )  # fmt: skip

    def check_complete(self) -> None:
        """Raise `InvalidInput` unless the model has made every layer."""
        if self._made != len(self._expected):
            self._refuse(f"a model of {self._made} layers")

    def _refuse(self, got: str) -> None:
        accepted = (
            f"the {len(self._expected)} layers that task {self._recipe.task} was counted with at "
            f"width {self._width}, in their order"
        )
        raise InvalidInput("model", got, accepted)


class CountedLinear(nn.Module):
    """Stands in for a linear layer of a model that is only counted."""

    def __init__(self, role: LinearRole, *, bias: bool) -> None:
        super().__init__()
        self.role, self.has_bias = role, bias
        self.in_features, self.out_features = role.d_in, role.d_out
        #: over all calls
        self.positions = 0

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) → (..., d_out), without values."""
        if x.shape[-1] != self.in_features:
            got = f"an input whose last dimension is {x.shape[-1]}"
            raise InvalidInput("model", got, f"{self.in_features}, as the layer was made for")
        self.positions += x.numel() // self.in_features
        return x.new_empty(*x.shape[:-1], self.out_features)


class CountingFactory:
    """Makes stand-ins, and remembers them in their order."""

    def __init__(self) -> None:
        self.layers: list[CountedLinear] = []

    def __call__(
        self,
        d_in: int,
        d_out: int,
        *,
        bias: bool = True,
        zero_init: bool = False,
        heads: int | None = None,
        side: Literal["in", "out"] = "out",
    ) -> nn.Module:
        """See `nas.tasks.task.LinearFactory`."""
        sides = {"d_in": d_in, "d_out": d_out} | ({} if heads is None else {"heads": heads})
        for name, given in sides.items():
            if not isinstance(given, int) or isinstance(given, bool) or given < 1:
                raise InvalidInput(name, given, "a whole number above 0")
        if side not in ("in", "out"):
            raise InvalidInput("side", side, "in | out")
        role = LinearRole("", d_in, d_out, d_in, heads, side)
        self.layers.append(CountedLinear(role, bias=bool(bias)))
        return self.layers[-1]


def counted_model(task: Task, recipe: Recipe, width: int) -> tuple[nn.Module, list[CountedLinear]]:
    """A task's model with stand-ins for its layers, without memory for any values."""
    linear = CountingFactory()
    with torch.device("meta"):
        model = task.model(recipe, width, linear)
    if not isinstance(model, nn.Module):
        raise InvalidInput("model", type(model).__name__, "a torch.nn.Module")
    return model, linear.layers
