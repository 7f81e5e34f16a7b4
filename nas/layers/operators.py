"""Structured matrices as operators of CoLA; imports cola, which layers do not need."""

from __future__ import annotations

from collections.abc import Sequence

import cola
import torch
from cola.linalg import Algorithm, Auto
from cola.ops import BlockDiag, Dense, Kronecker, LinearOperator, Permutation, Product
from torch import Tensor

from nas.layers.base import StructuredLinear
from nas.layers.einsum import EinsumLinear


def operator_of(layer: StructuredLinear) -> LinearOperator:
    """See `StructuredLinear.as_operator`."""
    factors = layer.effective_factors()
    if not isinstance(layer, EinsumLinear):
        return LayerOperator(layer, factors)
    structure, s = layer.structure, layer.structure.sizes
    if structure.is_dense:
        return Dense(factors[0])
    whole = (s.gamma * s.beta * s.alpha, s.phi * s.epsilon * s.delta)
    square_blocks = (s.rho * s.phi * s.delta, s.gamma * s.rho * s.beta) == (s.alpha, s.epsilon)
    if whole != (structure.d_in, structure.d_out) or not square_blocks:
        return LayerOperator(layer, factors)
    if s.gamma == s.phi == s.rho == 1:
        a, b = (factor[0, 0, 0] for factor in factors)  # (δ, α), (β, ε)
        return _on(a.device, Kronecker(Dense(b.t().contiguous()), Dense(a)))
    return SquareBlocksOperator(layer, factors)


class LayerOperator(LinearOperator):  # type: ignore[misc]  # of cola, which is not typed
    """W (d_out, d_in) of a layer, by its own product; cola takes transposes from its gradient.

    `factors` are an attribute, for cola differentiates what it finds in those.
    """

    def __init__(self, layer: StructuredLinear, factors: Sequence[Tensor]) -> None:
        self.layer, self.factors = layer, list(factors)
        super().__init__(factors[0].dtype, (layer.out_features, layer.in_features))

    def _matmat(self, X: Tensor) -> Tensor:
        """(d_in, k) → (d_out, k); cola's eigenvectors are complex."""
        if X.is_complex():
            return torch.complex(self._matmat(X.real), self._matmat(X.imag))
        x = X.t()
        self.layer._check(x)
        return self.layer.product(x, self.factors).t()


class SquareBlocksOperator(LayerOperator):
    """The same where both factors are batches of square matrices, which cola can take apart."""

    def in_parts(self) -> LinearOperator:
        """W as permutations and block-diagonal matrices: one by one invertible, but slower to
        apply, since cola multiplies blocks one after another."""
        assert isinstance(self.layer, EinsumLinear)
        s = self.layer.structure.sizes
        a, b = self.factors  # (γ, ρ, φ, δ, α), (φ, γ, ρ, β, ε)
        first = [Dense(block.flatten(0, 2)) for block in a]
        second = [Dense(block.flatten(0, 2).t()) for block in b]
        place = torch.arange(self.shape[0], device=a.device)
        # (γ, β, ρ, φ, δ), as the first factor leaves it, to (φ, δ, γ, ρ, β)
        between = place.view(s.gamma, s.beta, s.rho, s.phi, s.delta).permute(3, 4, 0, 2, 1)
        last = place.view(s.phi, s.delta, s.epsilon).transpose(1, 2)
        return Product(
            Permutation(last.flatten(), a.dtype),
            _on(a.device, BlockDiag(*second, multiplicities=[s.delta] * s.phi)),
            Permutation(between.flatten(), a.dtype),
            _on(a.device, BlockDiag(*first, multiplicities=[s.beta] * s.gamma)),
        )


def _on(device: torch.device, operator: LinearOperator) -> LinearOperator:
    """cola 0.0.7 takes an operator of several others to be on the CPU."""
    operator.device = device
    return operator


# cola finds rules by the names of these functions


@cola.dispatch  # type: ignore[untyped-decorator]
def inv(A: SquareBlocksOperator, alg: Auto) -> LinearOperator:
    return cola.linalg.inv(A.in_parts(), alg)


@cola.dispatch  # type: ignore[untyped-decorator]
def slogdet(A: SquareBlocksOperator, log_alg: Auto, trace_alg: Algorithm) -> tuple[Tensor, Tensor]:
    return cola.linalg.slogdet(A.in_parts(), log_alg, trace_alg)  # type: ignore[no-any-return]
