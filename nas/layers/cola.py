"""`ActivatedLinear`: two factors with a nonlinearity between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional

from nas.designs.cola import Activated, ActivatedStructure, parse_cola
from nas.errors import InvalidInput
from nas.layers.einsum import factor_shapes
from nas.layers.modes import autocast_dtype
from nas.layers.of_design import DesignLinear

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu, "gelu": functional.gelu, "relu": functional.relu,
}  # fmt: skip


class ActivatedLinear(DesignLinear[Activated, ActivatedStructure]):
    """y = B act(A x) + bias, for two factors A and B; shape (..., d_in) → (..., d_out).

    Not linear in x: `to_matrix`, `to_linear` and `as_operator` refuse.  See `nas.designs.cola`.
    Source: arXiv:2502.10940, section 3.2.

    Parameters
    ----------
    design
        An `Activated`, its text, or the `ActivatedStructure` of a layer d_in → d_out.
    d_in, d_out
        Any dimensions; inputs are zero-padded, outputs cut, at their end.
    bias, zero_init, normalize, gain, d_in_base
        As in `nas.layers.EinsumLinear`.
    plan
        None or ``"a-first"``, the only way it is run: A first, one product for each factor.

    Raises
    ------
    InvalidInput
        The design, a dimension or the plan is not one that can be built.

    The factors are the parameters ``A`` (γ, ρ, φ, δ, α) and ``B`` (φ, γ, ρ, β, ε).

    >>> layer = ActivatedLinear("cola-mlp:rank=1/2", 64, 256)
    >>> layer(torch.zeros(5, 64)).shape
    torch.Size([5, 256])
    """

    is_matrix = False
    structure: ActivatedStructure
    A: nn.Parameter
    B: nn.Parameter
    family = "cola"
    design_class = Activated
    structure_class = ActivatedStructure
    parse = staticmethod(parse_cola)
    only_plan = "a-first"

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return factor_shapes(self.structure.sizes)

    def product(self, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
        a, b = factors
        dtype = autocast_dtype(x.device, a.dtype)
        return self._applied(x.to(dtype), a.to(dtype), b.to(dtype)).contiguous()

    def plain(self, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
        return self._applied(x, *factors)

    def _applied(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """(n, d_in) → (n, d_out)."""
        structure, s = self.structure, self.structure.sizes
        if s.inputs > structure.d_in:
            x = functional.pad(x, (0, s.inputs - structure.d_in))
        x = x.reshape(-1, s.gamma, s.beta, s.alpha).transpose(0, 1).reshape(s.gamma, -1, s.alpha)
        # products of matrices, since einsum multiplies by elements where it sums one
        z = torch.bmm(x, a.reshape(s.gamma, -1, s.alpha).mT)
        z = _ACTIVATIONS[structure.design.activation](z)
        z = z.reshape(s.gamma, -1, s.beta, s.rho, s.phi, s.delta).permute(4, 1, 5, 0, 3, 2)
        y = torch.bmm(z.reshape(s.phi, -1, s.gamma * s.rho * s.beta), b.flatten(1, 3))
        y = y.reshape(s.phi, -1, s.delta, s.epsilon).permute(1, 0, 3, 2).flatten(1)
        return y[:, : structure.d_out] if s.outputs > structure.d_out else y

    def matrices(self, factors: Sequence[Tensor]) -> NoReturn:
        """Raises InvalidInput, as `to_matrix`."""
        self.to_matrix()

    def to_matrix(self) -> NoReturn:
        """Raises InvalidInput: y = B act(A x) is no matrix times x."""
        accepted = (
            f"a linear layer; this one has {self.structure.design.activation} between its factors "
            "and is no matrix"
        )
        raise InvalidInput("layer", self._described(), accepted)

    def as_operator(self) -> NoReturn:
        """Raises InvalidInput, as `to_matrix`."""
        self.to_matrix()
