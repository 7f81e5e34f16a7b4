"""Integer structures: the axis sizes of θ for one layer d_in → d_out, and what follows exactly.

Flattened order: the input index runs over (γ, β, α) with α innermost, the output index over
(φ, ε, δ) with δ innermost.  Where a dimension cannot be factored near θ, the product of its axes
is the next that can: the input is zero-padded at its end, surplus outputs at the end are cut, and
the surplus is charged.  `sizing="paper"` rounds as the papers' public code does instead, for
comparison with it.  1 MAC = 2 FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal, get_args

from nas.designs.axes import cover_axes
from nas.designs.design import BlockOf, Family
from nas.designs.structure import LinearStructure, Sizing, check_dimensions
from nas.designs.taxonomy import NAMED_FORMS, Taxonomy, is_named, parse_theta, taxonomy
from nas.designs.theta import DENSE, Theta
from nas.errors import InvalidInput

_FULL_EINSUM = "agdfr,bgefr,...abg->...def"
Factor = Literal["A", "B"]


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
    def inputs(self) -> int:
        """αβγ."""
        return self.alpha * self.beta * self.gamma

    @property
    def outputs(self) -> int:
        """δεφ."""
        return self.delta * self.epsilon * self.phi

    def fans(self, factor: str) -> tuple[int, int]:
        """(fan in, fan out) as a batched matrix, A contracted first.  A: α → δφρ;  B: βγρ → ε."""
        if factor == "A":
            return self.alpha, self.delta * self.phi * self.rho
        return self.beta * self.gamma * self.rho, self.epsilon

    def uses(self, factor: str) -> int:
        """How many vectors of one token each matrix of a factor multiplies: β of A, δ of B."""
        return self.beta if factor == "A" else self.delta

    def waste(self, d_in: int, d_out: int) -> float:
        """MACs spent on zero-padded inputs and cut outputs, as a share of the other MACs.

        Contracting A first, w = (αβγ − d_in)·δφρ + (δεφ − d_out)·βγρ of the F_A MACs are spent so,
        and the waste is w / (F_A − w).  A product that falls short of its dimension, which only
        paper sizing leaves, counts as no surplus.
        """
        wasted = (
            max(0, self.inputs - d_in) * self.delta * self.phi * self.rho
            + max(0, self.outputs - d_out) * self.beta * self.gamma * self.rho
        )
        return wasted / (self.macs_a_first - wasted)

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
            s.inputs,
            s.outputs,
            s.beta * s.gamma * s.delta * s.phi * s.rho,
            s.alpha * s.gamma * s.epsilon * s.phi * s.rho,
        )


@dataclass(frozen=True)
class Structure(LinearStructure):
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
        check_dimensions(d_in, d_out)
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
        block = head_size(self.d_out, count)
        s = self.sizes
        return self._resized(Sizes(s.alpha, s.beta, s.gamma, 1, block, count, s.rho))

    def with_input_blocks(self, count: int) -> Structure:
        """The mirror image: γ = `count`, α = d_in / `count`, β = 1, so that block γ = h reads the
        inputs of attention head h alone.  See `with_output_blocks`."""
        if self.is_dense:
            return self
        block = head_size(self.d_in, count)
        s = self.sizes
        return self._resized(Sizes(block, 1, count, s.delta, s.epsilon, s.phi, s.rho))

    def _resized(self, sizes: Sizes) -> Structure:
        """Other sizes, labelled so that A first is not dearer, with the θ that they amount to."""
        sizes = max(sizes, sizes.swapped(), key=_label_order)
        s = sizes
        alpha, beta, gamma = exponents_of((s.alpha, s.beta, s.gamma))
        delta, epsilon, phi = exponents_of((s.delta, s.epsilon, s.phi))
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
    def params(self) -> int:
        """Parameters of both factors, γφρ(αδ+βε), bias not counted."""
        return self.d_in * self.d_out if self.is_dense else self.sizes.params

    @property
    def padded_in(self) -> int:
        """Inputs after zero-padding: αβγ (d_in if dense); under paper sizing maybe below d_in."""
        return self.d_in if self.is_dense else self.sizes.inputs

    @property
    def padded_out(self) -> int:
        """Outputs before the cut: δεφ (d_out if dense); under paper sizing maybe below d_out."""
        return self.d_out if self.is_dense else self.sizes.outputs

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
        """As `Sizes.waste`; 0 if dense."""
        return 0.0 if self.is_dense else self.sizes.waste(self.d_in, self.d_out)

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
        """As `Sizes.fans`; a dense layer has the one factor A: d_in → d_out."""
        if self.is_dense:
            return self.d_in, self.d_out
        return self.sizes.fans(factor)

    def uses(self, factor: str) -> int:
        """As `Sizes.uses`; 1 of a dense layer."""
        self.check_factor(factor)
        return 1 if self.is_dense else self.sizes.uses(factor)

    def adam_lr_multiplier(self, factor: str, d_in_base: int | None = None) -> float:
        """Adam learning rate of a factor, relative to a dense base layer with `d_in_base` inputs.

        d_in_base / (2 f_in) for a factor, d_in_base / d_in for a dense layer; `d_in_base` is this
        layer's own d_in unless given.  Source: arXiv:2406.06248, section 3.2.
        """
        base = self.d_in if d_in_base is None else d_in_base
        if self.is_dense:
            return base / self.d_in
        return base / (2 * self.fans(factor)[0])


def fingerprint(d_in: int, d_out: int, sizes: Sizes | None) -> str:
    """`Structure.fingerprint` from its parts; without sizes, of one dense matrix."""
    return f"{d_in}x{d_out}:{'dense' if sizes is None else '.'.join(map(str, astuple(sizes)))}"


def head_size(dimension: int, count: int) -> int:
    """Size of each of `count` equal blocks of a dimension; `InvalidInput` if there is none."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1 or dimension % count:
        raise InvalidInput("heads", count, f"a divisor of the dimension, {dimension}")
    return dimension // count


def exponents_of(sizes: Sequence[int]) -> tuple[float, ...]:
    """Logarithms of sizes over that of their product, which sum to 1."""
    whole = math.log(math.prod(sizes))
    return tuple(math.log(n) / whole for n in sizes) if whole else (1.0, *(0.0 for _ in sizes[1:]))


@lru_cache(maxsize=65536)
def _structure(theta: Theta, d_in: int, d_out: int, sizing: Sizing) -> Structure:
    if sizing == "paper":
        dimensions = (d_in, d_in, d_in, d_out, d_out, d_out, min(d_in, d_out))
        rounded = (max(1, round(d**t)) for d, t in zip(dimensions, theta.values, strict=True))
        return Structure(theta, d_in, d_out, Sizes(*rounded), sizing)
    sizes = sizes_of(theta, d_in, d_out)
    return Structure(theta, d_in, d_out, max(sizes, sizes.swapped(), key=_label_order))


def sizes_of(theta: Theta, d_in: int, d_out: int) -> Sizes:
    """The axes of θ as it is labelled, covering d_in and d_out with the least waste."""
    alpha, beta, gamma = cover_axes(d_in, (theta.alpha, theta.beta, theta.gamma))
    delta, epsilon, phi = cover_axes(d_out, (theta.delta, theta.epsilon, theta.phi))
    rho = max(1, round(min(d_in, d_out) ** theta.rho))
    return Sizes(alpha, beta, gamma, delta, epsilon, phi, rho)


def _label_order(s: Sizes) -> tuple[int, ...]:
    """Largest for the labels with A first not dearer; a tie goes by (α, ε, γ, φ)."""
    return (s.macs_b_first - s.macs_a_first, s.alpha, s.epsilon, s.gamma, s.phi)


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
        **structure.counts(),
        "theta": list(theta.values),
        "canonical_theta": list(theta.canonical().values),
        "name": theta.name,
        "sizing": sizing,
        "sizes": asdict(s),
        "einsum": structure.einsum,
        "contraction": list(structure.contraction),
        "macs_a_first": structure.macs_a_first,
        "macs_b_first": structure.macs_b_first,
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
    }


def check_side(side: str) -> None:
    """Raises `InvalidInput` for what is no side of a projection."""
    if side not in ("in", "out"):
        raise InvalidInput("side", side, "in | out")


def with_heads(structure: Structure, heads: int, side: str) -> Structure:
    """The structure of a projection that makes (``out``) or reads (``in``) `heads` heads."""
    check_side(side)
    if side == "out":
        return structure.with_output_blocks(heads)
    return structure.with_input_blocks(heads)


def fit_theta(theta: Theta, width: int, block: BlockOf) -> Theta:
    """The θ nearest to `theta` of which no layer costs more than dense at this width.

    First the rank axis is lowered; where rank 1 is still too dear, the private axes α and ε are
    raised until each exceeds 1; what is left is dense, which expresses every operator at no
    higher cost.
    """
    return fit_labelled(theta.canonical(), width, block).canonical()


def fit_labelled(theta: Theta, width: int, block: BlockOf) -> Theta:
    """The same with the factors as they are labelled, A first; DENSE where nothing else is left."""
    fitted = _lower_rank(theta, width, block)
    for size in (2, 3, 4):
        if fitted is not None:
            return fitted
        least = math.log(size + 0.01) / math.log(width)
        fitted = _lower_rank(_raise_private(theta, least), width, block)
    return fitted or DENSE


def _lower_rank(theta: Theta, width: int, block: BlockOf) -> Theta | None:
    """θ with the largest rank axis, not above its own, at which no layer is degenerate.

    None if one is at rank 1 already.  MACs are proportional to the rank axis.
    """
    at_one = replace(theta, rho=0.0)
    if at_one.is_dense:
        return DENSE
    allowed = [s.d_in * s.d_out // s.macs for s in block(at_one) if not s.is_dense]
    own = max(1, round(width**theta.rho))
    rank = min([own, *allowed])
    if rank < 1:
        return None
    return theta if rank == own else replace(theta, rho=math.log(rank) / math.log(width))


def _raise_private(theta: Theta, least: float) -> Theta:
    """θ with alpha and epsilon at least `least`, the other axes of their groups scaled down."""

    def raised(own: float, *others: float) -> tuple[float, ...]:
        if own >= least or sum(others) == 0:
            return own, *others
        scale = (1 - least) / sum(others)
        return least, *(o * scale for o in others)

    alpha, beta, gamma = raised(theta.alpha, theta.beta, theta.gamma)
    epsilon, delta, phi = raised(theta.epsilon, theta.delta, theta.phi)
    return Theta(alpha, beta, gamma, delta, epsilon, phi, 0.0)


def with_zero(share: float) -> float:
    """[0, 1] → [0, 1] with the lower half at exactly 0."""
    return max(0.0, 2.0 * share - 1.0)


def theta_of(params: Mapping[str, Any]) -> Theta:
    """The canonical θ of a point of the search's box; compute at most dense's in exponents."""
    alpha, epsilon = params["alpha"], params["epsilon"]
    beta = (1.0 - alpha) * with_zero(params["beta_share"])
    delta = (1.0 - epsilon) * with_zero(params["delta_share"])
    rho = min(alpha, epsilon) * with_zero(params["rho_share"])
    gamma, phi = max(0.0, 1.0 - alpha - beta), max(0.0, 1.0 - epsilon - delta)
    return Theta(alpha, beta, gamma, delta, epsilon, phi, rho).canonical()


FAMILY = Family(
    design=Theta,
    structure=Structure.of,
    layer="nas.layers.einsum:EinsumLinear",
    structures=Structure,
    forms=NAMED_FORMS,
    reads=is_named,
    parse=parse_theta,
    inspect=inspect_structure,
    with_heads=with_heads,
    has_blocks=lambda theta: not theta.is_dense,
    fit=fit_theta,
    lowered=lambda theta, share: replace(theta, rho=theta.rho * share),
    exponents_suffice=True,
    sized=True,
)
