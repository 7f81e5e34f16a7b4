"""`SumLinear`: a linear layer that is the sum of two structures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nas.designs.sum import Sum, SumStructure, parse_sum
from nas.errors import InvalidInput
from nas.layers.alternating import MAX_SWEEPS, TOLERANCE
from nas.layers.building import build_layer
from nas.layers.fitting import Fit, check_weight
from nas.layers.of_design import DesignLinear

_BETWEEN = " + "


class SumLinear(DesignLinear[Sum, SumStructure]):
    """y = x (W1 + W2)ᵀ + bias with W1, W2 of two structures; shape (..., d_in) → (..., d_out).

    Parameters
    ----------
    design
        A `Sum`, its text, or the `SumStructure` of a layer d_in → d_out.
    d_in, d_out
        Any dimensions at which neither part is dense; `nas.layers.layer_of` builds the dense layer
        that the sum is where one is.
    bias, normalize, gain, d_in_base
        As in `nas.layers.EinsumLinear`, for every factor of both parts.
    zero_init
        Start as the zero map: the last factor of each part is zero, so that gradients flow.
    plan
        The plans of both parts with `` + `` between them, or None where each chooses its own.

    Raises
    ------
    InvalidInput
        The design, a dimension or the plan is not one that can be built.

    The parameters are those of the layers of both parts, with ``first_`` and ``second_`` before
    their names; `SumStructure` says which is which.

    >>> layer = SumLinear("pixelfly:rank=1/2,blocks=1/2", 64, 256)
    >>> layer(torch.zeros(5, 64)).shape
    torch.Size([5, 256])
    >>> [name for name, _ in layer.named_parameters()]
    ['first_A', 'second_A', 'second_B', 'bias']
    """

    structure: SumStructure
    family = "sum"
    design_class = Sum
    structure_class = SumStructure
    parse = staticmethod(parse_sum)

    def _structure_of(self, design: Sum | str | SumStructure, *sides: int) -> SumStructure:
        structure = super()._structure_of(design, *sides)
        # how each part multiplies; without numbers, and in a tuple so as to be no submodules
        self._parts = tuple(
            build_layer(part, bias=False, device="meta") for part in structure.parts
        )
        return structure

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            f"{which}_{name}": tuple(parameter.shape)
            for which, part in zip(("first", "second"), self._parts, strict=True)
            for name, parameter in part.named_parameters()
        }

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the factors anew: each part as on its own, over √2."""
        super().reset_parameters(generator)
        if self.zero_init:  # that of the second part is zero by now
            _, last, _ = self._factors[len(self.structure.first.factors) - 1]
            getattr(self, last).zero_()

    def blocks(self, factor: str, t: Tensor) -> Tensor:
        """As the layer of the part that the factor is of."""
        which, _, name = factor.partition("_")
        return self._parts[which == "second"].blocks(name, t)

    def product(self, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
        (one, other), (first, second) = self._parts, self._divided(factors)
        return one.product(x, first) + other.product(x, second)

    def plain(self, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
        (one, other), (first, second) = self._parts, self._divided(factors)
        return one.plain(x, first) + other.plain(x, second)

    def matrices(self, factors: Sequence[Tensor]) -> Tensor:
        (one, other), (first, second) = self._parts, self._divided(factors)
        return one.matrices(first) + other.matrices(second)

    @torch.no_grad()
    def nearest(self, weight: Tensor, start: Sequence[Tensor] | None = None) -> Fit:
        """Each part in turn is fitted to what the other leaves; a fit that is no better is dropped.

        The part that alone leaves less comes first, so that the sum leaves no more than either.
        """
        check_weight(weight, self.structure)
        w = (weight.cpu() if weight.device.type == "mps" else weight).double()  # mps has no float64
        scale = w.abs().max().item() or 1.0  # squares of the scaled entries stay in range

        def made(i: int, factors: Sequence[Tensor]) -> Tensor:
            return self._parts[i].matrices([f.to(w).unsqueeze(0) for f in factors])[0]

        def size(t: Tensor) -> float:
            return float((t / scale).norm())

        alone = [part.nearest(w) for part in self._parts]
        best = min((0, 1), key=lambda i: alone[i].relative_error)
        found = [fit.factors for fit in alone]
        found[1 - best] = self._parts[1 - best].nearest(torch.zeros_like(w)).factors
        matrices = [made(i, found[i]) for i in (0, 1)]
        error = size(w - sum(matrices))
        for sweep in range(MAX_SWEEPS):
            before = error
            for i in (1 - best, best):
                goal, own = w - matrices[1 - i], None if sweep == 0 and i != best else found[i]
                factors = self._parts[i].nearest(goal, own).factors
                matrix = made(i, factors)
                if size(goal - matrix) < error:
                    found[i], matrices[i], error = factors, matrix, size(goal - matrix)
            if not before - error > TOLERANCE * before:
                break
        rounded = [[f.to(weight) for f in factors] for factors in found]
        left = size(w - made(0, rounded[0]) - made(1, rounded[1]))
        return Fit((*rounded[0], *rounded[1]), left / size(w) if size(w) else 0.0)

    def _divided(self, factors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The factors of the first part and of the second."""
        count = len(self.structure.first.factors)
        return factors[:count], factors[count:]

    @property
    def plan(self) -> str | None:
        """The plans that were fixed, or None where each input chooses its own.

        >>> layer = SumLinear("pixelfly:rank=1/2,blocks=1/2", 64, 64)
        >>> layer.plan = "gathered + a-first tile=128 first=batched second=batched gemm=blas"
        """
        plan: str | None = self._plan
        return plan

    @plan.setter
    def plan(self, value: str | None) -> None:
        plans = (None, None) if value is None else self._plans(value)
        for part, plan in zip(self._parts, plans, strict=True):
            part.plan = plan
        self._plan = None if value is None else self._told([part.plan for part in self._parts])

    def _plans(self, value: object) -> list[str]:
        plans = value.split(_BETWEEN) if isinstance(value, str) else []
        if len(plans) != 2:
            accepted = f"None or the plans of both parts with {_BETWEEN!r} between them"
            raise InvalidInput("plan", value, accepted)
        return plans

    def _told(self, plans: Sequence[Any]) -> str:
        return _BETWEEN.join(map(str, plans))

    def _chosen_plan(self, tokens: int, device: torch.device, dtype: torch.dtype) -> str:
        return self._told([part.plan_for(tokens, device, dtype) for part in self._parts])

    def measure_plan(self, tokens: int, dtype: torch.dtype | None = None) -> str:
        """As of every layer, with each part measured by itself."""
        factor = self._any_factor()
        dtype = factor.dtype if dtype is None else dtype
        parts = [
            build_layer(part, bias=False, device=factor.device, dtype=dtype)
            for part in self.structure.parts
        ]
        return self._told([part.measure_plan(tokens) for part in parts])

    def expected_seconds(self, tokens: int) -> float:
        return sum(part.expected_seconds(tokens) for part in self._parts)

    def _design_repr(self) -> str:
        return _BETWEEN.join(part._design_repr() for part in self._parts)
