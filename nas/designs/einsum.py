"""Integer structures: the axis sizes of θ for one layer d_in → d_out, and what follows exactly.

Flattened order: the input index runs over (γ, β, α) with α innermost, the output index over
(φ, ε, δ) with δ innermost.  Where a dimension cannot be factored near θ, the product of its axes
is the next that can: the input is zero-padded at its end, surplus outputs at the end are cut, and
the surplus is charged.  `sizing="paper"` rounds as the papers' public code does instead, for
comparison with it.  1 MAC = 2 FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cached_property, lru_cache
from typing import Literal, Protocol, get_args

from nas.designs.taxonomy import Taxonomy, name_of, taxonomy
from nas.designs.theta import Theta
from nas.errors import InvalidInput

#: Largest dimension of a layer; indices of its padded product stay far inside 64 bits.
MAX_DIMENSION = 1 << 24
#: An axis may leave d^θ by this factor when that wastes less.
_NEAR = 4 / 3
#: The same where there are more than three axes: a power of two is then factored exactly into up
#: to five equal ones.
_NEAR_OF_MANY = 7 / 4
#: Steps after which a search over four axes and more keeps the best it has found.
_MOST_STEPS = 20_000
_FULL_EINSUM = "agdfr,bgefr,...abg->...def"
Factor = Literal["A", "B"]
#: How d^θ becomes integers: axes whose product covers the dimension, or each rounded on its own.
Sizing = Literal["least-waste", "paper"]


class LinearStructure(Protocol):
    """What the integers of any structured linear layer tell, of whatever family."""

    @property
    def d_in(self) -> int: ...
    @property
    def d_out(self) -> int: ...
    @property
    def macs(self) -> int:
        """Multiply-accumulates per token, padding included."""

    @property
    def params(self) -> int:
        """Learned numbers, bias not counted."""

    @property
    def is_dense(self) -> bool:
        """Whether it is one d_out × d_in matrix."""

    @property
    def is_degenerate(self) -> bool:
        """Whether it costs more than the dense layer, which can express the same operators."""

    @property
    def fingerprint(self) -> str:
        """Equal for equal integer operators."""

    @property
    def factors(self) -> tuple[str, ...]:
        """Names of the factors, in the order they are contracted; a gate is none of them."""

    def fans(self, factor: str) -> tuple[int, int]:
        """(fan in, fan out) of a factor (or gate)."""

    def init_std(self, factor: str) -> float:
        """Standard deviation of a factor at initialisation."""

    def adam_lr_multiplier(self, factor: str, d_in_base: int | None = None) -> float:
        """Adam learning rate of a factor (or gate) over that of the dense base layer."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Integer axis sizes of one structure, of any magnitude, and what follows for two factors."""

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

    @property
    def params(self) -> int:
        """Parameters of both factors, γφρ(αδ+βε), bias not counted."""
        return (
            self.gamma * self.phi * self.rho * (self.alpha * self.delta + self.beta * self.epsilon)
        )

    @property
    def rank(self) -> int:
        """Generic rank of the uncut operator αβγ → δεφ: min{αβγ, δεφ, βγδφρ, αγεφρ}.

        That is the narrowest of the input, the output, and what stands between the two contractions
        with A first and with B first.  Exact for β=δ=1 (BTT and all inside it: the least cut of the
        network of blocks, a flow that unit vectors attain) and for γ=φ=ρ=1 (Kronecker); elsewhere
        an upper bound that few shapes miss: at (6,2,2,9,3,1,1) the rank is 21, the bound 24,
        because two Kronecker products side by side share (6+6−9)·(2+2−3) directions.
        """
        s = self
        return min(
            s.alpha * s.beta * s.gamma,
            s.delta * s.epsilon * s.phi,
            s.beta * s.gamma * s.delta * s.phi * s.rho,
            s.alpha * s.gamma * s.epsilon * s.phi * s.rho,
        )


@dataclass(frozen=True)
class Structure:
    """A linear operator d_in → d_out of structure θ, as integers.

    Factors are labelled so that contracting A first is not dearer; under paper sizing they keep
    the labels they were given.  Build one with `Structure.of`.

    >>> s = Structure.of(Theta(0.5, 0, 0.5, 0, 0.5, 0.5, 0), 1024, 1024)
    >>> s.macs, s.params, s.rank
    (65536, 65536, 1024)
    """

    #: canonical θ; under paper sizing θ as given
    theta: Theta
    d_in: int
    d_out: int
    sizes: Sizes
    sizing: Sizing = "least-waste"

    @staticmethod
    def of(theta: Theta, d_in: int, d_out: int, sizing: Sizing = "least-waste") -> Structure:
        """The structure of θ for a layer with `d_in` inputs and `d_out` outputs.

        `sizing="paper"` gives what the public code of arXiv:2410.02117 builds: every axis is
        max(1, round(d^θ)), θ and labels stay as given, and no factor is absorbed, so that dense is
        two factors.  Where αβγ < d_in the last inputs are dropped, where δεφ < d_out the last
        outputs are constant zero.

        Raises
        ------
        InvalidInput
            A dimension that is not a whole number from 1 to 2^24, or an unknown sizing.
        """
        for field, value in (("d_in", d_in), ("d_out", d_out)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise InvalidInput(field, value, f"a whole number from 1 to {MAX_DIMENSION}")
            if not 1 <= value <= MAX_DIMENSION:
                raise InvalidInput(field, value, f"a whole number from 1 to {MAX_DIMENSION}")
        if sizing not in get_args(Sizing):
            raise InvalidInput("sizing", sizing, " | ".join(get_args(Sizing)))
        return _structure(theta if sizing == "paper" else theta.canonical(), d_in, d_out, sizing)

    def with_output_blocks(self, count: int) -> Structure:
        """The structure with φ = `count`, ε = d_out / `count` and δ = 1: block φ = h makes the
        outputs from h·d_out/count alone, as the projections of attention head h need.

        Dense stays dense, for it makes each output alone.

        Raises
        ------
        InvalidInput
            `count` does not divide d_out.
        """
        if self.is_dense:
            return self
        block = _block(self.d_out, count)
        s = self.sizes
        return self._resized(Sizes(s.alpha, s.beta, s.gamma, 1, block, count, s.rho))

    def with_input_blocks(self, count: int) -> Structure:
        """The mirror image: γ = `count`, α = d_in / `count`, β = 1, so that block γ = h reads the
        inputs of attention head h alone.  See `with_output_blocks`."""
        if self.is_dense:
            return self
        block = _block(self.d_in, count)
        s = self.sizes
        return self._resized(Sizes(block, 1, count, s.delta, s.epsilon, s.phi, s.rho))

    def _resized(self, sizes: Sizes) -> Structure:
        """Other sizes, labelled so that A first is not dearer, with the θ that they amount to."""
        sizes = max(sizes, sizes.swapped(), key=_label_order)
        s = sizes
        alpha, beta, gamma = _exponents((s.alpha, s.beta, s.gamma))
        delta, epsilon, phi = _exponents((s.delta, s.epsilon, s.phi))
        narrow = min(self.d_in, self.d_out)
        rho = min(1.0, math.log(s.rho) / math.log(narrow)) if narrow > 1 else 0.0
        theta = Theta(alpha, beta, gamma, delta, epsilon, phi, rho)
        return Structure(theta, self.d_in, self.d_out, sizes)

    @property
    def is_dense(self) -> bool:
        """Whether a factor has no private axis: absorbed, it leaves one d_out × d_in matrix.

        Never under paper sizing, which runs both factors.
        """
        if self.sizing == "paper":
            return False
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
        return self.d_in * self.d_out if self.is_dense else self.sizes.params

    @property
    def is_degenerate(self) -> bool:
        """Whether it costs more than the dense layer, which can express the same operators."""
        return self.macs > self.d_in * self.d_out

    @property
    def padded_in(self) -> int:
        """Inputs after zero-padding: αβγ (d_in if dense); under paper sizing maybe below d_in."""
        s = self.sizes
        return self.d_in if self.is_dense else s.alpha * s.beta * s.gamma

    @property
    def padded_out(self) -> int:
        """Outputs before the cut: δεφ (d_out if dense); under paper sizing maybe below d_out."""
        s = self.sizes
        return self.d_out if self.is_dense else s.delta * s.epsilon * s.phi

    @property
    def dropped_inputs(self) -> int:
        """Inputs at the end that no output depends on; 0 but under paper sizing."""
        return max(0, self.d_in - self.padded_in)

    @property
    def constant_outputs(self) -> int:
        """Outputs at the end that are always zero; 0 but under paper sizing."""
        return max(0, self.d_out - self.padded_out)

    @property
    def waste(self) -> float:
        """MACs spent on zero-padded inputs and cut outputs, as a share of the other MACs.

        Contracting A first, w = (αβγ − d_in)·δφρ + (δεφ − d_out)·βγρ of the F_A MACs are spent so,
        and the waste is w / (F_A − w); 0 if dense.  A product that falls short of its dimension,
        which only paper sizing leaves, counts as no surplus.
        """
        if self.is_dense:
            return 0.0
        s = self.sizes
        wasted = (
            max(0, self.padded_in - self.d_in) * s.delta * s.phi * s.rho
            + max(0, self.padded_out - self.d_out) * s.beta * s.gamma * s.rho
        )
        return wasted / (self.macs_a_first - wasted)

    @property
    def rank(self) -> int:
        """Generic rank of the operator, never above d_in or d_out; see `Sizes.rank`.

        An upper bound, too, where surplus inputs or outputs were cut.
        """
        if self.is_dense:
            return min(self.d_in, self.d_out)
        return min(self.d_in, self.d_out, self.sizes.rank)

    @property
    def integer_taxonomy(self) -> Taxonomy:
        """ω, ψ and ν of the integers: the exponents that MACs, parameters and rank amount to here.

        With d = sqrt(d_in·d_out): d^(1+ν) = MACs and d^ω = MACs / parameters; and
        min(d_in, d_out)^ψ = rank, so that full rank is ψ = 1 on every rectangle.  Constants, such
        as the 2 in Monarch's 2·d^1.5, are included, so these approach the exponents of θ only as
        d grows.  Where a base is 1 and has no logarithm, its exponents are those of dense.
        """
        log_d = math.log(self.d_in * self.d_out) / 2
        log_full = math.log(min(self.d_in, self.d_out))
        return Taxonomy(
            omega=math.log(self.macs / self.params) / log_d if log_d else 0.0,
            psi=math.log(self.rank) / log_full if log_full else 1.0,
            nu=math.log(self.macs) / log_d - 1.0 if log_d else 1.0,
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
        """Equal for equal integer operators: dimensions and sizes, nothing of θ or of the sizing.

        Dimensions and sizes say alone what is padded, cut, dropped or constant.
        """
        return fingerprint(self.d_in, self.d_out, None if self.is_dense else self.sizes)

    @property
    def factors(self) -> tuple[Factor, ...]:
        """Names of the factors, in the order they are contracted; dense is the one factor A."""
        return ("A",) if self.is_dense else ("A", "B")

    def fans(self, factor: str) -> tuple[int, int]:
        """(fan in, fan out) of a factor as a batched matrix, A contracted first.

        A: α → δφρ;  B: βγρ → ε.  A dense layer has the one factor A: d_in → d_out.
        """
        if self.is_dense:
            return self.d_in, self.d_out
        s = self.sizes
        if factor == "A":
            return s.alpha, s.delta * s.phi * s.rho
        return s.beta * s.gamma * s.rho, s.epsilon

    def init_std(self, factor: str) -> float:
        """Standard deviation of a factor at initialisation: sqrt(min(f_in, f_out)) / f_in.

        Source: arXiv:2406.06248, section 3.2.
        """
        fan_in, fan_out = self.fans(factor)
        return math.sqrt(min(fan_in, fan_out)) / fan_in

    def adam_lr_multiplier(self, factor: str, d_in_base: int | None = None) -> float:
        """Adam learning rate of a factor, relative to a dense base layer with `d_in_base` inputs.

        d_in_base / (2 f_in) for a factor, d_in_base / d_in for a dense layer; `d_in_base` is this
        layer's own d_in unless given.  Source: arXiv:2406.06248, section 3.2.
        """
        base = self.d_in if d_in_base is None else d_in_base
        if self.is_dense:
            return base / self.d_in
        return base / (2 * self.fans(factor)[0])


def factor_row(structure: LinearStructure, factor: str) -> dict[str, object]:
    """What is told of a factor (or gate): its fans, initialisation and learning rate."""
    fan_in, fan_out = structure.fans(factor)
    return {
        "name": factor,
        "fan_in": fan_in,
        "fan_out": fan_out,
        "init_std": structure.init_std(factor),
        "adam_lr_multiplier": structure.adam_lr_multiplier(factor),
    }


def fingerprint(d_in: int, d_out: int, sizes: Sizes | None) -> str:
    """`Structure.fingerprint` from its parts; without sizes, of one dense matrix."""
    return f"{d_in}x{d_out}:{'dense' if sizes is None else '.'.join(map(str, astuple(sizes)))}"


def _block(dimension: int, count: int) -> int:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1 or dimension % count:
        raise InvalidInput("heads", count, f"a divisor of the dimension, {dimension}")
    return dimension // count


def _exponents(sizes: Sequence[int]) -> tuple[float, ...]:
    """Logarithms of sizes over that of their product, which sum to 1."""
    whole = math.log(math.prod(sizes))
    return tuple(math.log(n) / whole for n in sizes) if whole else (1.0, *(0.0 for _ in sizes[1:]))


@lru_cache(maxsize=65536)
def _structure(theta: Theta, d_in: int, d_out: int, sizing: Sizing) -> Structure:
    if sizing == "paper":
        dimensions = (d_in, d_in, d_in, d_out, d_out, d_out, min(d_in, d_out))
        rounded = (max(1, round(d**t)) for d, t in zip(dimensions, theta.values, strict=True))
        return Structure(theta, d_in, d_out, Sizes(*rounded), sizing)
    alpha, beta, gamma = cover_axes(d_in, (theta.alpha, theta.beta, theta.gamma))
    delta, epsilon, phi = cover_axes(d_out, (theta.delta, theta.epsilon, theta.phi))
    rho = max(1, round(min(d_in, d_out) ** theta.rho))
    sizes = Sizes(alpha, beta, gamma, delta, epsilon, phi, rho)
    return Structure(theta, d_in, d_out, max(sizes, sizes.swapped(), key=_label_order))


def _label_order(s: Sizes) -> tuple[int, ...]:
    """Largest for the labels with A first not dearer; a tie goes by (α, ε, γ, φ)."""
    return (s.macs_b_first - s.macs_a_first, s.alpha, s.epsilon, s.gamma, s.phi)


@lru_cache(maxsize=65536)
def cover_axes(dimension: int, exponents: tuple[float, ...]) -> tuple[int, ...]:
    """Axis sizes near dimension^exponent whose product covers `dimension` with the least waste.

    An exponent of 0 is an axis of size 1.  Of equal products, the one nearest in the sum of
    squared logarithms is taken.  Exact for three exponents; for more, the search ends after a
    bounded number of steps with the best it has found.
    """
    count = len(exponents)
    near = _NEAR if count <= 3 else _NEAR_OF_MANY
    order = sorted(range(count), key=lambda i: exponents[i])
    targets = [dimension ** exponents[i] for i in order]
    windows = [
        (1, 1)
        if exponents[i] == 0
        else (
            max(1, min(math.floor(t), math.ceil(t / near))),
            max(math.ceil(t), math.floor(t * near)),
        )
        for i, t in zip(order, targets, strict=True)
    ]
    best = _least_waste(dimension, targets, windows)
    if best is None:  # exponents that sum to a little less than 1 leave too narrow windows
        best = _least_waste(dimension, targets, [*windows[:-1], (windows[-1][0], dimension)])
    assert best is not None  # the largest axis takes whatever the others leave
    by_axis = dict(zip(order, best, strict=True))
    return tuple(by_axis[i] for i in range(count))


def _least_waste(
    dimension: int, targets: Sequence[float], windows: Sequence[tuple[int, int]]
) -> tuple[int, ...] | None:
    """The sizes inside `windows` whose product covers `dimension` best; None if none do.

    The last size follows from the others.  Branches are left that cannot reach `dimension`, or
    cannot beat the best so far.
    """
    last = len(windows) - 1
    low_after, high_after = [1] * (last + 1), [1] * (last + 1)  # least, most the later axes can be
    for i in range(last - 1, -1, -1):
        low_after[i] = low_after[i + 1] * windows[i + 1][0]
        high_after[i] = high_after[i + 1] * windows[i + 1][1]
    candidates = [_outwards(*pair) for pair in zip(windows[:-1], targets[:-1], strict=True)]
    best: tuple[int, float, tuple[int, ...]] | None = None
    steps = 0

    def extend(sizes: tuple[int, ...], product: int, distance: float) -> None:
        nonlocal best, steps
        steps += 1
        if steps > _MOST_STEPS and last > 2 and best is not None:
            return
        i = len(sizes)
        if i == last:
            size = max(windows[i][0], -(-dimension // product))
            whole = product * size
            if size > windows[i][1] or (best is not None and whole > best[0]):
                return
            found = (whole, distance + math.log(size / targets[i]) ** 2, (*sizes, size))
            if best is None or found < best:
                best = found
            return
        for size in candidates[i]:
            partial = product * size
            if partial * high_after[i] < dimension:
                continue
            reached = distance + math.log(size / targets[i]) ** 2
            if best is not None:
                if partial * low_after[i] > best[0]:
                    continue
                exact = best[0] == dimension
                if exact and (dimension % partial or reached > best[1]):
                    continue
            extend((*sizes, size), partial, reached)

    extend((), 1, 0.0)
    return None if best is None else best[2]


def _outwards(window: tuple[int, int], target: float) -> list[int]:
    """The sizes in a window from the target on, so that what is found first is good."""
    return sorted(range(window[0], window[1] + 1), key=lambda n: abs(math.log(n / target)))


def inspect_structure(
    theta: Theta, d_in: int, d_out: int, sizing: Sizing = "least-waste"
) -> dict[str, object]:
    """Everything exact about θ at d_in → d_out, as plain JSON values.

    `macs` and `flops` are per token and forward; `rank` is as in `Sizes.rank`, `waste` a fraction
    as in `Structure.waste`; `omega`, `psi` and `nu` belong to θ, `*_integer` to the integers.

    Raises
    ------
    InvalidInput
        As `Structure.of`.
    """
    structure = Structure.of(theta, d_in, d_out, sizing)
    s, tax, integer = structure.sizes, taxonomy(theta), structure.integer_taxonomy
    return {
        "theta": list(theta.values),
        "canonical_theta": list(theta.canonical().values),
        "name": name_of(theta),
        "d_in": d_in,
        "d_out": d_out,
        "sizing": sizing,
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
        "omega_integer": integer.omega,
        "psi_integer": integer.psi,
        "nu_integer": integer.nu,
        "padded_in": structure.padded_in,
        "padded_out": structure.padded_out,
        "dropped_inputs": structure.dropped_inputs,
        "constant_outputs": structure.constant_outputs,
        "waste": structure.waste,
        "dense_macs": d_in * d_out,
        "degenerate": structure.is_degenerate,
        "fingerprint": structure.fingerprint,
        "factors": [factor_row(structure, f) for f in structure.factors],
    }  # fmt: skip
