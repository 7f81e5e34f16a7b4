"""Integer structures: the axis sizes of θ for one layer d_in → d_out, and what follows exactly.

Flattened order: the input index runs over (γ, β, α) with α innermost, the output index over
(φ, ε, δ) with δ innermost.  Where a dimension cannot be factored near θ, the product of its axes
is the next that can: the input is zero-padded at its end, surplus outputs at the end are cut, and
the surplus is charged.  1 MAC = 2 FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

from nas.errors import InvalidInput
from nas.taxonomy import name_of, taxonomy
from nas.theta import Theta

#: Largest dimension of a layer; indices of its padded product stay far inside 64 bits.
MAX_DIMENSION = 1 << 24
#: An axis may leave d^θ by this factor when that wastes less.
_NEAR = 4 / 3
_FULL_EINSUM = "agdfr,bgefr,...abg->...def"
Factor = Literal["A", "B"]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Integer axis sizes of one structure."""

    alpha: int
    beta: int
    gamma: int
    delta: int
    epsilon: int
    phi: int
    rho: int

    def swapped(self) -> Sizes:
        """The sizes with the two factors exchanged."""
        return Sizes(
            self.beta, self.alpha, self.gamma, self.epsilon, self.delta, self.phi, self.rho
        )

    @property
    def macs_a_first(self) -> int:
        """Multiply-accumulates per token, A contracted first: βγδφρ(α+ε)."""
        return (
            self.beta * self.gamma * self.delta * self.phi * self.rho * (self.alpha + self.epsilon)
        )

    @property
    def macs_b_first(self) -> int:
        """Multiply-accumulates per token, B contracted first: αγεφρ(β+δ)."""
        return self.swapped().macs_a_first


@dataclass(frozen=True)
class Structure:
    """A linear operator d_in → d_out of structure θ, as integers.

    Factors are labelled so that contracting A first is not dearer.  Build one with `Structure.of`.

    >>> s = Structure.of(Theta(0.5, 0, 0.5, 0, 0.5, 0.5, 0), 1024, 1024)
    >>> s.macs, s.params, s.rank
    (65536, 65536, 1024)
    """

    #: canonical θ
    theta: Theta
    d_in: int
    d_out: int
    sizes: Sizes

    @staticmethod
    def of(theta: Theta, d_in: int, d_out: int) -> Structure:
        """The structure of θ for a layer with `d_in` inputs and `d_out` outputs.

        Raises
        ------
        InvalidInput
            A dimension that is not a whole number from 1 to 2^24.
        """
        for field, value in (("d_in", d_in), ("d_out", d_out)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise InvalidInput(field, value, f"a whole number from 1 to {MAX_DIMENSION}")
            if not 1 <= value <= MAX_DIMENSION:
                raise InvalidInput(field, value, f"a whole number from 1 to {MAX_DIMENSION}")
        return _structure(theta.canonical(), d_in, d_out)

    @property
    def is_dense(self) -> bool:
        """Whether a factor has no private axis: absorbed, it leaves one d_out × d_in matrix."""
        s = self.sizes
        return (s.alpha == 1 and s.delta == 1) or (s.beta == 1 and s.epsilon == 1)

    @property
    def macs_a_first(self) -> int:
        """Multiply-accumulates per token with A contracted first (one matrix if dense)."""
        return self.d_in * self.d_out if self.is_dense else self.sizes.macs_a_first

    @property
    def macs_b_first(self) -> int:
        """Multiply-accumulates per token with B contracted first (one matrix if dense)."""
        return self.d_in * self.d_out if self.is_dense else self.sizes.macs_b_first

    @property
    def macs(self) -> int:
        """Multiply-accumulates per token in the cheaper order; padding included."""
        return min(self.macs_a_first, self.macs_b_first)

    @property
    def flops(self) -> int:
        """Forward FLOPs per token: 2 × MACs."""
        return 2 * self.macs

    @property
    def params(self) -> int:
        """Parameters of both factors, γφρ(αδ+βε), bias not counted."""
        if self.is_dense:
            return self.d_in * self.d_out
        s = self.sizes
        return s.gamma * s.phi * s.rho * (s.alpha * s.delta + s.beta * s.epsilon)

    @property
    def is_degenerate(self) -> bool:
        """Whether it costs more than the dense layer, which can express the same operators."""
        return self.macs > self.d_in * self.d_out

    @property
    def padded_in(self) -> int:
        """Inputs after zero-padding: αβγ (d_in if dense)."""
        s = self.sizes
        return self.d_in if self.is_dense else s.alpha * s.beta * s.gamma

    @property
    def padded_out(self) -> int:
        """Outputs before the surplus is cut: δεφ (d_out if dense)."""
        s = self.sizes
        return self.d_out if self.is_dense else s.delta * s.epsilon * s.phi

    @property
    def rank(self) -> int:
        """Generic rank of the uncut operator, never above d_in or d_out.

        Exact where nothing is padded; an upper bound where surplus inputs or outputs were cut.
        """
        if self.is_dense:
            return min(self.d_in, self.d_out)
        s = self.sizes
        return min(
            self.d_in,
            self.d_out,
            s.beta * s.gamma * min(s.alpha, s.delta * s.phi * s.rho),
            s.delta * s.phi * min(s.epsilon, s.beta * s.gamma * s.rho),
            s.alpha * s.gamma * min(s.beta, s.epsilon * s.phi * s.rho),
            s.epsilon * s.phi * min(s.delta, s.alpha * s.gamma * s.rho),
        )

    @property
    def einsum(self) -> str:
        """The operator as one einsum; letters a b g d e f r stand for α β γ δ ε φ ρ."""
        return "oi,...i->...o" if self.is_dense else _FULL_EINSUM

    @property
    def contraction(self) -> tuple[str, ...]:
        """The einsum as the products that are run, in order."""
        if self.is_dense:
            return ("oi,...i->...o",)
        return ("agdfr,...abg->...bgdfr", "bgefr,...bgdfr->...def")

    @cached_property
    def fingerprint(self) -> str:
        """Equal for equal integer operators: dimensions and sizes, nothing of θ."""
        s = self.sizes
        axes = (s.alpha, s.beta, s.gamma, s.delta, s.epsilon, s.phi, s.rho)
        body = "dense" if self.is_dense else ".".join(map(str, axes))
        return f"{self.d_in}x{self.d_out}:{body}"

    def fans(self, factor: Factor) -> tuple[int, int]:
        """(fan in, fan out) of a factor as a batched matrix, A contracted first.

        A: α → δφρ;  B: βγρ → ε.  A dense layer has the one factor A: d_in → d_out.
        """
        if self.is_dense:
            return self.d_in, self.d_out
        s = self.sizes
        if factor == "A":
            return s.alpha, s.delta * s.phi * s.rho
        return s.beta * s.gamma * s.rho, s.epsilon

    def init_std(self, factor: Factor) -> float:
        """Standard deviation of a factor at initialisation: sqrt(min(f_in, f_out)) / f_in.

        Source: arXiv:2406.06248, section 3.2.
        """
        fan_in, fan_out = self.fans(factor)
        return math.sqrt(min(fan_in, fan_out)) / fan_in

    def adam_lr_multiplier(self, factor: Factor, d_in_base: int | None = None) -> float:
        """Adam learning rate of a factor, relative to a dense base layer with `d_in_base` inputs.

        d_in_base / (2 f_in) for a factor, d_in_base / d_in for a dense layer; `d_in_base` is this
        layer's own d_in unless given.  Source: arXiv:2406.06248, section 3.2.
        """
        base = self.d_in if d_in_base is None else d_in_base
        if self.is_dense:
            return base / self.d_in
        return base / (2 * self.fans(factor)[0])


@lru_cache(maxsize=65536)
def _structure(theta: Theta, d_in: int, d_out: int) -> Structure:
    alpha, beta, gamma = _axes(d_in, (theta.alpha, theta.beta, theta.gamma))
    delta, epsilon, phi = _axes(d_out, (theta.delta, theta.epsilon, theta.phi))
    rho = max(1, round(min(d_in, d_out) ** theta.rho))
    sizes = Sizes(alpha, beta, gamma, delta, epsilon, phi, rho)
    return Structure(theta, d_in, d_out, max(sizes, sizes.swapped(), key=_label_order))


def _label_order(s: Sizes) -> tuple[int, ...]:
    """Largest for the labels with A first not dearer; a tie goes by (α, ε, γ, φ)."""
    return (s.macs_b_first - s.macs_a_first, s.alpha, s.epsilon, s.gamma, s.phi)


def _axes(dimension: int, exponents: tuple[float, ...]) -> tuple[int, ...]:
    """Axis sizes near dimension^exponent whose product covers `dimension` with the least waste.

    An exponent of 0 is an axis of size 1.  Of equal products, the one nearest in the sum of
    squared logarithms is taken.
    """
    order = sorted(range(3), key=lambda i: exponents[i])
    targets = [dimension ** exponents[i] for i in order]
    windows = [
        (1, 1)
        if exponents[i] == 0
        else (
            max(1, min(math.floor(t), math.ceil(t / _NEAR))),
            max(math.ceil(t), math.floor(t * _NEAR)),
        )
        for i, t in zip(order, targets, strict=True)
    ]
    best = _least_waste(dimension, targets, windows)
    if best is None:  # exponents that sum to a little less than 1 leave too narrow windows
        widened = [*windows[:2], (windows[2][0], dimension)]
        best = _least_waste(dimension, targets, widened)
    assert best is not None  # the largest axis takes whatever the two others leave
    by_axis = dict(zip(order, best, strict=True))
    return tuple(by_axis[i] for i in range(3))


def _least_waste(
    dimension: int, targets: Sequence[float], windows: Sequence[tuple[int, int]]
) -> tuple[int, int, int] | None:
    """The triple inside `windows` whose product covers `dimension` best; None if none does."""
    (low0, high0), (low1, high1), (low2, high2) = windows
    best: tuple[int, float, tuple[int, int, int]] | None = None
    for first in range(low0, high0 + 1):
        for second in range(low1, high1 + 1):
            third = max(low2, -(-dimension // (first * second)))
            product = first * second * third
            if third > high2 or (best is not None and product > best[0]):
                continue
            triple = (first, second, third)
            distance = sum(math.log(n / t) ** 2 for n, t in zip(triple, targets, strict=True))
            if best is None or (product, distance, triple) < best:
                best = (product, distance, triple)
    return None if best is None else best[2]


def inspect_structure(theta: Theta, d_in: int, d_out: int) -> dict[str, object]:
    """Everything exact about θ at d_in → d_out, as plain JSON values.

    `macs` and `flops` are per token and forward; `rank` is the generic rank; `waste` is the share
    of charged MACs that padding adds over the same axes filled exactly.
    """
    structure = Structure.of(theta, d_in, d_out)
    s, tax = structure.sizes, taxonomy(theta)
    factors: tuple[Factor, ...] = ("A",) if structure.is_dense else ("A", "B")
    return {
        "theta": list(theta.values),
        "canonical_theta": list(structure.theta.values),
        "name": name_of(theta),
        "d_in": d_in,
        "d_out": d_out,
        "sizes": {
            "alpha": s.alpha, "beta": s.beta, "gamma": s.gamma,
            "delta": s.delta, "epsilon": s.epsilon, "phi": s.phi, "rho": s.rho,
        },
        "einsum": structure.einsum,
        "contraction": list(structure.contraction),
        "macs": structure.macs,
        "macs_a_first": structure.macs_a_first,
        "macs_b_first": structure.macs_b_first,
        "flops": structure.flops,
        "params": structure.params,
        "rank": structure.rank,
        "omega": tax.omega,
        "psi": tax.psi,
        "nu": tax.nu,
        "padded_in": structure.padded_in,
        "padded_out": structure.padded_out,
        "dense_macs": d_in * d_out,
        "degenerate": structure.is_degenerate,
        "factors": [
            {
                "name": f,
                "fan_in": structure.fans(f)[0],
                "fan_out": structure.fans(f)[1],
                "init_std": structure.init_std(f),
                "adam_lr_multiplier": structure.adam_lr_multiplier(f),
            }
            for f in factors
        ],
    }  # fmt: skip
