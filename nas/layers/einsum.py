"""`EinsumLinear`: a linear layer whose matrix is a two-factor einsum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nas.designs.einsum import Sizes, Structure
from nas.designs.structure import Sizing
from nas.designs.taxonomy import parse_theta
from nas.designs.theta import Theta
from nas.layers.base import APART_OPERATIONS, StructuredLinear
from nas.layers.fitting import Fit, check_weight, fit_factors
from nas.layers.kernels import measuring
from nas.layers.kernels.contraction import contract, matrices, plain
from nas.layers.kernels.einsum import matrix, workspace_elements
from nas.layers.kernels.plan import Plan, checked_plan, cost
from nas.rates import current_rates


class EinsumLinear(StructuredLinear):
    """y = x Wᵀ + bias with W (d_out, d_in) of the structure θ; shape (..., d_in) → (..., d_out).

    Parameters
    ----------
    theta
        A `Theta`, seven exponents, a name such as ``"btt:rho=1/4"``, or the integer `Structure`
        of a layer d_in → d_out.
    d_in, d_out
        Any dimensions.  Where they cannot be factored near θ the input is zero-padded at its end
        and surplus outputs are cut; no input is dropped and no output is constant.
    bias
        Whether to add a learned bias (d_out,), zero at initialisation.
    zero_init
        Start as the zero map, as the last layer of a residual branch does: only the factor that
        is contracted last is zero, so that gradients flow.
    normalize
        Cap the RMS of each factor at its initial standard deviation σ: W / max(1, RMS(W)/σ),
        differentiated through.  Source: arXiv:2410.02117, appendix.
    gain
        With `normalize`, a learned scalar per factor.
    d_in_base
        Input dimension of this layer in the base model at which the learning rate was tuned;
        see `nas.layers.param_groups`.  Default: d_in.
    sizing
        How exponents become integers; ``"paper"`` rounds as the papers' code does, which may drop
        inputs and leave outputs constant; see `nas.designs.einsum.Structure.of`.
    plan
        The execution plan, fixed; see `plan`.

    Raises
    ------
    InvalidInput
        θ, a dimension, the sizing or the plan is not one that can be built.

    The factors are the parameters ``A`` (γ, ρ, φ, δ, α) and ``B`` (φ, γ, ρ, β, ε); a dense layer
    has ``weight`` (d_out, d_in) instead, as `torch.nn.Linear`.

    >>> layer = EinsumLinear("monarch", 64, 256)
    >>> layer(torch.zeros(5, 64)).shape
    torch.Size([5, 256])
    """

    structure: Structure
    A: nn.Parameter
    B: nn.Parameter
    weight: nn.Parameter

    def __init__(
        self,
        theta: Theta | str | Sequence[float] | Structure,
        d_in: int,
        d_out: int,
        bias: bool = True,
        *,
        zero_init: bool = False,
        normalize: bool = False,
        gain: bool = False,
        d_in_base: int | None = None,
        sizing: Sizing = "least-waste",
        plan: Plan | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            _structure(theta, d_in, d_out, sizing), d_in, d_out, bias,
            zero_init, normalize, gain, d_in_base, plan, device, dtype,
        )  # fmt: skip

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        structure = self.structure
        if structure.is_dense:
            return {"weight": (structure.d_out, structure.d_in)}
        return factor_shapes(structure.sizes)

    def product(self, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
        return contract(x, *pair(factors), self.out_features, self._plan)

    def plain(self, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
        return plain(x, *pair(factors), self.structure)

    def matrices(self, factors: Sequence[Tensor]) -> Tensor:
        return matrices(*pair(factors), self.structure)

    def _checked_plan(self, value: object) -> Plan:
        return checked_plan(Plan, value, self.structure)

    def _chosen_plan(self, tokens: int, device: torch.device, dtype: torch.dtype) -> Plan:
        return measuring.resolve(self.structure, tokens, device, dtype)

    def measure_plan(self, tokens: int, dtype: torch.dtype | None = None) -> Plan:
        """Time the candidate plans on inputs of `tokens` tokens, remember and return the fastest.

        See `StructuredLinear.measure_plan`.
        """
        factor = self._any_factor()
        return measuring.measure(
            self.structure, tokens, factor.device, factor.dtype if dtype is None else dtype
        )

    def expected_seconds(self, tokens: int) -> float:
        device, dtype = torch.device("cpu"), torch.float32
        chosen = cost(self.plan_for(tokens, device, dtype), self.structure, tokens)
        return APART_OPERATIONS * current_rates().operation + chosen

    def workspace_bytes(self, tokens: int) -> int:
        """Memory that forward and backward of `tokens` tokens hold at once, at most.

        Besides input, output, parameters and all gradients; between forward and backward nothing
        but the input is held.  Under a tiled plan it does not grow with the tokens.
        """
        elements = workspace_elements(self.structure, self.plan_for(tokens), tokens)
        return elements * self._any_factor().element_size()

    def to_matrix(self) -> Tensor:
        """The matrix W (d_out, d_in) that the layer applies, without the bias."""
        return matrix(*pair(self.effective_factors()), self.out_features, self.in_features)

    def nearest(self, weight: Tensor, start: Sequence[Tensor] | None = None) -> Fit:
        if self.structure.is_dense:
            check_weight(weight, self.structure)
            return Fit((weight.detach(),), 0.0)
        return fit_factors(weight, self.structure)


def factor_shapes(s: Sizes) -> dict[str, tuple[int, ...]]:
    """The shapes of A and B."""
    return {
        "A": (s.gamma, s.rho, s.phi, s.delta, s.alpha),
        "B": (s.phi, s.gamma, s.rho, s.beta, s.epsilon),
    }


def pair(factors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Factors A and B; of a dense layer its matrix and None."""
    return factors[0], factors[1] if len(factors) == 2 else None


def _structure(
    theta: Theta | str | Sequence[float] | Structure, d_in: int, d_out: int, sizing: Sizing
) -> Structure:
    if isinstance(theta, Structure):
        return theta
    return Structure.of(
        parse_theta(theta) if isinstance(theta, str) else Theta.of(theta), d_in, d_out, sizing
    )
