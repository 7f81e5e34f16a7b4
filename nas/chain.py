"""Einsums of N factors in a chain: their exponents, and the integers of one layer d_in → d_out.

Factors F1 … FN stand in a row.  Every interval {i..j} of neighbours has one input axis and one
output axis, which exactly those factors share (the input axis with x, the output axis with y), and
every two neighbours share a rank axis, the bond.  So for N = 2

    y[δ,ε,φ] = Σ_{α,β,γ,ρ}  F2[β,γ,ε,φ,ρ] · F1[α,γ,δ,φ,ρ] · x[α,β,γ]

is the two-factor einsum of `nas.theta`, with α, β, γ the input axes of {1}, {2}, {12}, likewise
δ, ε, φ of the output, and ρ the bond.  An axis has size d_in^θ, d_out^θ or, for a bond,
min(d_in, d_out)^θ.  Two factors are the space of arXiv:2410.02117, section 3; that the axes of more
belong to intervals of a chain is our generalisation, which Tensor-Trains and BTT of N cores lie in.

Flattened order: input and output run over their axes with the longest interval outermost, and
among equally long ones the last outermost, so that {1} is innermost: (γ, β, α) and (φ, ε, δ) for
N = 2.  Padding and cutting are those of `nas.structure`.  1 MAC = 2 FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import islice, permutations, product
from typing import Any, TypeVar

import numpy as np
from opt_einsum import DynamicProgramming

from nas.errors import InvalidInput
from nas.structure import MAX_DIMENSION, cover_axes, fingerprint
from nas.taxonomy import name_of, parse_theta
from nas.theta import (
    DENSE,
    SUM_TOLERANCE,
    VANISHING,
    Theta,
    exact_exponent,
    format_exponent,
    parse_exponent,
)

#: Most factors of a chain.
MAX_FACTORS = 5
#: Smaller and larger dimension up to which `inspect_chain` finds the rank numerically.
NUMERIC_RANK_LIMIT = (512, 2048)
CHAIN_FORMS = (
    "tensor-train:cores=3,rho=1/4 or btt:cores=3,rho=1/8 (2 to 5 cores; inputs=, outputs= and rho= "
    "also take one exponent for each, such as 1/2+1/4+1/4), or 7, 14, 23 or 34 exponents for 2, 3, "
    "4 or 5 factors: inputs of {1},{2},{3},{12},{23},{123}, outputs of the same, bonds"
)
#: Pairs of positions to contract; each product goes to the end, as in opt_einsum.
Path = tuple[tuple[int, int], ...]
Interval = tuple[int, int]
_Exponent = TypeVar("_Exponent", bound=float)
_LONGEST_TEXT = 2000  # characters
#: Orders of the sizes of equally large axes that are tried, of each side and of both.
_MOST_ORDERS, _MOST_ARRANGEMENTS = 720, 4000
#: Tokens above which the cheapest path no longer changes.
_MANY_TOKENS = 1 << 24


@lru_cache(maxsize=MAX_FACTORS)
def intervals(factors: int) -> tuple[Interval, ...]:
    """The intervals (first, last) of a chain by length, then by start.

    >>> intervals(2)
    ((1, 1), (2, 2), (1, 2))
    """
    return tuple(
        (first, first + length - 1)
        for length in range(1, factors + 1)
        for first in range(1, factors - length + 2)
    )


def _numbers_of(factors: int) -> int:
    return factors * (factors + 1) + factors - 1


#: How many numbers θ has → how many factors.
_FACTORS = {_numbers_of(n): n for n in range(2, MAX_FACTORS + 1)}


def _axis_names(factors: int) -> tuple[str, ...]:
    """in_1 in_2 in_12 out_1 out_2 out_12 bond_1 and so on, in the order of θ."""
    spans = ["".join(map(str, range(i, j + 1))) for i, j in intervals(factors)]
    return (
        *(f"in_{s}" for s in spans),
        *(f"out_{s}" for s in spans),
        *(f"bond_{k}" for k in range(1, factors)),
    )


def _split(
    values: Sequence[_Exponent], factors: int
) -> tuple[dict[Interval, _Exponent], dict[Interval, _Exponent], list[_Exponent]]:
    spans = intervals(factors)
    inputs = dict(zip(spans, values[: len(spans)], strict=True))
    outputs = dict(zip(spans, values[len(spans) : 2 * len(spans)], strict=True))
    return inputs, outputs, list(values[2 * len(spans) :])


def _reversed(values: Sequence[_Exponent], factors: int) -> tuple[_Exponent, ...]:
    """The same chain read backwards: {i..j} becomes {N+1-j..N+1-i}."""
    inputs, outputs, bonds = _split(values, factors)
    mirrored = [(factors + 1 - j, factors + 1 - i) for i, j in intervals(factors)]
    return (*(inputs[s] for s in mirrored), *(outputs[s] for s in mirrored), *bonds[::-1])


def _without_first(
    values: Sequence[_Exponent],
    factors: int,
    combine: Callable[[_Exponent, _Exponent], _Exponent],
) -> tuple[_Exponent, ...]:
    """The chain whose F1, without axes of its own, is absorbed by F2.

    What {1..j} and {2..j} had is one axis of the new first factors; the bond between is summed.
    """
    inputs, outputs, bonds = _split(values, factors)

    def merged(group: dict[Interval, _Exponent]) -> Iterator[_Exponent]:
        for i, j in intervals(factors - 1):
            own = group[i + 1, j + 1]
            yield combine(own, group[1, j + 1]) if i == 1 else own

    return (*merged(inputs), *merged(outputs), *bonds[1:])


@dataclass(frozen=True, slots=True)
class ChainTheta:
    """Exponents of N = 2 to 5 factors, flat: inputs by interval, outputs by interval, bonds.

    Intervals go by length, then start: {1},{2},{3},{12},{23},{123} for N = 3; for N = 2 the seven
    numbers are those of `Theta`.  Inputs sum to 1, and so do outputs, within 0.01.

    >>> ChainTheta.parse("1/2,0,1/2,0,1/2,1/2,1/4").factors
    2

    Raises
    ------
    InvalidInput
        Another count than 7, 14, 23 or 34, an exponent outside [0, 1], or a group that does not
        sum to 1.
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        given = tuple(self.values)
        if len(given) not in _FACTORS:
            raise InvalidInput("theta", list(given), f"{CHAIN_FORMS}; got {len(given)} numbers")
        names = _axis_names(_FACTORS[len(given)])
        for name, value in zip(names, given, strict=True):
            if isinstance(value, bool) or not isinstance(value, int | float | Fraction):
                raise InvalidInput(f"theta.{name}", value, "a number from 0 to 1")
            if not (math.isfinite(value) and 0.0 <= value <= 1.0):
                raise InvalidInput(f"theta.{name}", value, "a number from 0 to 1")
        object.__setattr__(self, "values", tuple(0.0 if v < VANISHING else float(v) for v in given))
        for group, exponents in (("in_", self.inputs), ("out_", self.outputs)):
            total = sum(exponents)
            # 1e-9: .33 + .66 must not fail by a rounding of the last bit
            if abs(total - 1.0) > SUM_TOLERANCE + 1e-9:
                members = [name for name in names if name.startswith(group)]
                listed = ", ".join(
                    f"{n}={v:g}" for n, v in zip(members, exponents, strict=True) if v
                )
                raise InvalidInput(
                    "theta",
                    f"{listed or f'{group}* all 0'} (sum {total:g})",
                    f"{' + '.join(members)} = 1 within {SUM_TOLERANCE}",
                )

    @classmethod
    def of(cls, values: Any) -> ChainTheta:
        """A `ChainTheta` from itself, from a `Theta`, or from its numbers in order."""
        if isinstance(values, ChainTheta):
            return values
        if isinstance(values, Theta):
            return cls(values.values)
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise InvalidInput("theta", values, CHAIN_FORMS)
        return cls(tuple(values))

    @classmethod
    def parse(cls, text: str) -> ChainTheta:
        """Read comma-separated decimals or fractions; their number decides the factors."""
        if not isinstance(text, str) or len(text) > _LONGEST_TEXT:
            raise InvalidInput("theta", text, CHAIN_FORMS)
        parts = text.split(",")
        if len(parts) not in _FACTORS:
            raise InvalidInput("theta", text, f"{CHAIN_FORMS}; got {len(parts)} parts")
        names = _axis_names(_FACTORS[len(parts)])
        return cls(
            tuple(parse_exponent(p, f"theta.{n}") for p, n in zip(parts, names, strict=True))
        )

    @property
    def factors(self) -> int:
        """How many factors, N."""
        return _FACTORS[len(self.values)]

    @property
    def inputs(self) -> tuple[float, ...]:
        """Exponents of the input axes, in the order of `intervals`."""
        return self.values[: len(intervals(self.factors))]

    @property
    def outputs(self) -> tuple[float, ...]:
        """Exponents of the output axes, in the order of `intervals`."""
        count = len(intervals(self.factors))
        return self.values[count : 2 * count]

    @property
    def bonds(self) -> tuple[float, ...]:
        """Exponents of the rank axes between neighbours."""
        return self.values[2 * len(intervals(self.factors)) :]

    def reversed(self) -> ChainTheta:
        """The same operators with the chain read backwards."""
        return ChainTheta(_reversed(self.values, self.factors))

    def _has_idle_first(self) -> bool:
        """Whether the first factor has no axis but those of its neighbour and their bond."""
        return self.inputs[0] == 0 and self.outputs[0] == 0

    def absorbed(self) -> ChainTheta:
        """The chain without idle end factors, though of two factors at least.

        An end factor all of whose axes are also its neighbour's adds no operators: their product
        is any tensor of the neighbour's remaining axes.
        """
        theta = self
        while theta.factors > 2:
            if not theta._has_idle_first():
                theta = theta.reversed()
                if not theta._has_idle_first():
                    return theta.reversed()
            values = _without_first(theta.values, theta.factors, lambda a, b: min(1.0, a + b))
            theta = ChainTheta(values)
        # what bond is left of one matrix depends on the end that was begun with
        return ChainTheta(DENSE.values) if Theta(*theta.values).is_dense else theta

    def canonical(self) -> ChainTheta | Theta:
        """The representative of all θ that differ by direction or by idle end factors.

        Of the two directions the one whose min(in_1, out_N) − min(in_N, out_1) is larger; a tie
        goes by (in_1, out_N, in_1…N, out_1…N), then by all exponents.  Two factors are a `Theta`.
        """
        theta = self.absorbed()
        if theta.factors == 2:
            return Theta(*theta.values).canonical()
        return max(theta, theta.reversed(), key=_rank_of_direction)

    @property
    def name(self) -> str:
        """A short name, rounded: a family with its exponents, else ``einsum3`` and the exponents.

        >>> ChainTheta.parse("1/2,1/4,1/4,0,0,0,1/3,1/3,1/3,0,0,0,1/4,1/4").name
        'tensor-train:cores=3,inputs=1/2+1/4+1/4,rho=1/4'
        """
        found = self.canonical()
        if isinstance(found, Theta):
            name = name_of(found)
            if name != "einsum":
                return name
            return "einsum " + ",".join(f"{v:.3g}" for v in found.values)
        for theta in (found, found.reversed()):
            for family, (of_inputs, of_outputs) in _families(theta.factors).items():
                rest = set(intervals(theta.factors))
                inputs, outputs, bonds = _split(theta.values, theta.factors)
                if any(inputs[s] for s in rest - set(of_inputs)) or any(
                    outputs[s] for s in rest - set(of_outputs)
                ):
                    continue
                n = theta.factors
                options = [
                    f"cores={n}",
                    *_option("inputs", [inputs[s] for s in of_inputs], [1 / n] * n),
                    *_option("outputs", [outputs[s] for s in of_outputs], [1 / n] * n),
                    *_option("rho", bonds, []),
                ]
                return f"{family}:{','.join(options)}"
        return f"einsum{found.factors} " + ",".join(f"{v:.3g}" for v in found.values)

    @property
    def text(self) -> str:
        """The exponents in full: ``ChainTheta.parse(theta.text) == theta``."""
        return ",".join(exact_exponent(v) for v in self.values)

    def __str__(self) -> str:
        return ",".join(format_exponent(v) for v in self.values)


def _rank_of_direction(theta: ChainTheta) -> tuple[float, ...]:
    n = theta.factors
    inputs, outputs, _ = _split(theta.values, n)
    order = (
        min(inputs[1, 1], outputs[n, n]) - min(inputs[n, n], outputs[1, 1]),
        inputs[1, 1],
        outputs[n, n],
        inputs[1, n],
        outputs[1, n],
        *theta.values,
    )
    # 1 - 2/3 and 1/3 differ in their last bit, which may decide only where nothing else does
    return (*(round(v, 12) for v in order), *theta.values)


def _families(factors: int) -> dict[str, tuple[list[Interval], list[Interval]]]:
    """Family → the intervals of the input axes and of the output axes that it has, in order."""
    singles = [(i, i) for i in range(1, factors + 1)]
    begun = [(1, i) for i in range(1, factors + 1)]
    pending = [(i, factors) for i in range(1, factors + 1)]
    return {"tensor-train": (singles, singles), "btt": (begun, pending)}


def _option(name: str, values: Sequence[float], default: Sequence[float]) -> Iterator[str]:
    """``name=…`` unless it is the default; one number where all are equal and so may be said."""
    texts = [format_exponent(v) for v in values]
    if texts == [format_exponent(v) for v in default]:
        return
    yield f"{name}={texts[0] if not default and len(set(texts)) == 1 else '+'.join(texts)}"


def parse_chain(text: str) -> ChainTheta | Theta:
    """A θ from a name with ``cores=``, or from 7, 14, 23 or 34 numbers; also as `parse_theta`.

    ``tensor-train:cores=N`` has input and output axes of each factor alone; in ``btt:cores=N``
    input axis i is shared by the first i factors, output axis i by all from the i-th on.  Either
    splits both sides evenly unless ``inputs=`` or ``outputs=`` say how; ``rho=`` is the exponent
    of every bond, 1/4 unless given.  Two factors are a `Theta`.

    >>> parse_chain("btt:cores=2,rho=1/4") == parse_theta("btt:rho=1/4")
    True

    Raises
    ------
    InvalidInput
        Unknown name, option, or count of cores or numbers, or an exponent off its range.
    """
    if not isinstance(text, str) or len(text) > _LONGEST_TEXT:
        raise InvalidInput("theta", text, CHAIN_FORMS)
    name, _, options = text.strip().partition(":")
    if not any(o.partition("=")[0] == "cores" for o in options.split(",")):
        numbers = name[:1].isdigit() or name[:1] in ("-", ".", "+")
        if not numbers and name not in _TWO_FACTORS:
            raise InvalidInput("theta", text, CHAIN_FORMS)
        theta = ChainTheta.parse(text) if numbers else ChainTheta.of(parse_theta(text))
    else:
        theta = _named(text, name, options)
    return Theta(*theta.values) if theta.factors == 2 else theta


#: What `parse_theta` reads.
_TWO_FACTORS = ("dense", "low-rank", "kronecker", "tensor-train", "monarch", "btt")


def _named(text: str, family: str, options: str) -> ChainTheta:
    if family not in _families(2):
        raise InvalidInput("theta", text, CHAIN_FORMS)
    given: dict[str, str] = {}
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        if key not in ("cores", "inputs", "outputs", "rho"):
            raise InvalidInput("theta", text, f"{family} takes cores=, inputs=, outputs=, rho=")
        given[key] = value
    try:
        cores = int(given["cores"]) if len(given["cores"]) <= 4 else 0
    except ValueError:
        cores = 0
    if not 2 <= cores <= MAX_FACTORS:
        accepted = f"a whole number from 2 to {MAX_FACTORS}"
        raise InvalidInput("theta.cores", given["cores"], accepted)

    def each(key: str, count: int, default: float, *, one_for_all: bool = False) -> list[float]:
        if key not in given:
            return [default] * count
        parts = given[key].split("+")
        if len(parts) == 1 and one_for_all:
            parts *= count
        if len(parts) != count:
            raise InvalidInput(f"theta.{key}", given[key], f"{count} exponents joined by +")
        return [parse_exponent(p, f"theta.{key}") for p in parts]

    of_inputs, of_outputs = _families(cores)[family]
    inputs = dict(zip(of_inputs, each("inputs", cores, 1 / cores), strict=True))
    outputs = dict(zip(of_outputs, each("outputs", cores, 1 / cores), strict=True))
    spans = intervals(cores)
    return ChainTheta(
        (
            *(inputs.get(s, 0.0) for s in spans),
            *(outputs.get(s, 0.0) for s in spans),
            *each("rho", cores - 1, 0.25, one_for_all=True),
        )
    )


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a chain: its letter, its size and who has it."""

    letter: str
    size: int
    name: str
    #: bit k-1 is factor k, bit N is the input x, bit N+1 the output y
    owners: int


# letters of input axes, output axes and bonds, each in the order of θ
_INPUTS, _OUTPUTS, _BONDS = "abcdefghijklmno", "ABCDEFGHIJKLMNO", "pqrs"
_TOKENS = "t"


@lru_cache(maxsize=65536)
def _axes(values: tuple[int, ...], factors: int) -> tuple[Axis, ...]:
    """Every axis of the chain with these sizes, in the order of θ."""
    spans = intervals(factors)
    letters = (*_INPUTS[: len(spans)], *_OUTPUTS[: len(spans)], *_BONDS[: factors - 1])
    inside = [sum(1 << (k - 1) for k in range(i, j + 1)) for i, j in spans]
    owners = (
        *(m | 1 << factors for m in inside),
        *(m | 2 << factors for m in inside),
        *(3 << k for k in range(factors - 1)),
    )
    parts = zip(letters, values, _axis_names(factors), owners, strict=True)
    return tuple(Axis(*part) for part in parts)


def _open(axes: Sequence[Axis], merged: int) -> tuple[Axis, ...]:
    """The axes that the product of the tensors `merged` (a set of bits) still has."""
    return tuple(a for a in axes if a.owners & merged and a.owners & ~merged)


#: Counts one operation for each combination of a product's indices, whether or not it sums one,
#: where opt_einsum's other optimisers count half of one that sums none.
_OPTIMIZER = DynamicProgramming(minimize="flops", search_outer=True)


@lru_cache(maxsize=65536)
def _best_path(values: tuple[int, ...], factors: int, tokens: int) -> Path:
    """The order of pairwise products with the least MACs for `tokens` tokens; operands are F1 … FN
    and x.  Of equal costs, x through F1, F2, … one after another."""
    axes = _axes(values, factors)
    operands = [frozenset(a.letter for a in axes if a.owners >> k & 1) for k in range(factors + 1)]
    operands[factors] |= {_TOKENS}
    output = frozenset(a.letter for a in axes if a.owners >> (factors + 1) & 1) | {_TOKENS}
    sizes = {a.letter: a.size for a in axes} | {_TOKENS: tokens}
    found = _OPTIMIZER(operands, output, sizes)
    best: Path = tuple((min(pair), max(pair)) for pair in found)
    chain = _chain_path(factors)
    cheapest = _macs_along(axes, factors, best, tokens)
    return chain if _macs_along(axes, factors, chain, tokens) <= cheapest else best


def _chain_path(factors: int) -> Path:
    return tuple((0, factors - k) for k in range(factors))


def _steps(factors: int, path: Path) -> Iterator[tuple[int, int, int]]:
    """Both operands and the result of each product, as sets of bits as in `Axis`."""
    operands = [1 << i for i in range(factors + 1)]
    for first, second in path:
        one, other = operands[first], operands[second]
        del operands[second], operands[first]
        operands.append(one | other)
        yield one, other, one | other


def _macs_along(axes: Sequence[Axis], factors: int, path: Path, tokens: int) -> int:
    x, total = 1 << factors, 0
    for one, other, result in _steps(factors, path):
        volume = {a.letter: a.size for s in (one, other) for a in _open(axes, s)}
        total += math.prod(volume.values()) * (tokens if result & x else 1)
    return total


@dataclass(frozen=True)
class ChainStructure:
    """A linear operator d_in → d_out of a chain of factors, as integers.

    The chain is read in the direction in which contracting x with F1, then F2 and so on is not
    dearer.  An idle end factor (`ChainTheta.absorbed`; on integers: its own input and output axes
    have size 1) is absorbed; where one factor is left, that is a dense matrix.  Build one with
    `ChainStructure.of`.

    >>> theta = parse_chain("btt:cores=3,rho=0")
    >>> s = ChainStructure.of(theta, 512, 512)
    >>> s.macs, s.params, s.rank
    (12288, 12288, 512)

    Raises
    ------
    InvalidInput
        Sizes that are not whole numbers from 1, of another count than a chain has, or whose
        product does not cover its dimension.
    """

    #: θ without idle end factors, in canonical direction; sizes may be read the other way
    theta: ChainTheta
    d_in: int
    d_out: int
    #: axis sizes in the order of θ, of as many factors as are left
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.sizes) not in _SIZED:
            accepted = f"{', '.join(map(str, _SIZED))} sizes for 1 to {MAX_FACTORS} factors"
            raise InvalidInput("sizes", list(self.sizes), accepted)
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in self.sizes):
            raise InvalidInput("sizes", list(self.sizes), "whole numbers from 1")
        for field, covered, dimension in (
            ("d_in", self.padded_in, self.d_in),
            ("d_out", self.padded_out, self.d_out),
        ):
            if covered < dimension:
                side = "input" if field == "d_in" else "output"
                raise InvalidInput(
                    "sizes",
                    f"{side} axes of product {covered}",
                    f"{side} axes that cover {field} = {dimension}, so that none is dropped",
                )

    @staticmethod
    def of(theta: ChainTheta | Theta, d_in: int, d_out: int) -> ChainStructure:
        """The structure of θ for a layer with `d_in` inputs and `d_out` outputs.

        Raises
        ------
        InvalidInput
            A dimension that is not a whole number from 1 to 2^24, or a θ of another kind.
        """
        for field, value in (("d_in", d_in), ("d_out", d_out)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise InvalidInput(field, value, f"a whole number from 1 to {MAX_DIMENSION}")
            if not 1 <= value <= MAX_DIMENSION:
                raise InvalidInput(field, value, f"a whole number from 1 to {MAX_DIMENSION}")
        return _structure(ChainTheta.of(theta), d_in, d_out)

    @property
    def n_factors(self) -> int:
        """How many factors, N; 1 where all but one were absorbed."""
        return _SIZED[len(self.sizes)]

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Every axis, in the order of θ."""
        return _axes(self.sizes, self.n_factors)

    @cached_property
    def input_axes(self) -> tuple[Axis, ...]:
        """The axes of the flattened input, outermost first."""
        return self.axes[: len(intervals(self.n_factors))][::-1]

    @cached_property
    def output_axes(self) -> tuple[Axis, ...]:
        """The axes of the flattened output, outermost first."""
        count = len(intervals(self.n_factors))
        return self.axes[count : 2 * count][::-1]

    @cached_property
    def factor_axes(self) -> tuple[tuple[Axis, ...], ...]:
        """The axes of each factor, in the order in which it is stored.

        In chain order factor k passes a batch of matrices: its batch axes come first, then those
        it sums, then those it makes; F1 makes before it sums, with which N = 2 has the layout of
        `nas.layers.EinsumLinear`.  Batch: input axes that later factors share, then output axes
        that earlier ones share.  Summed: input axes that end with k, the bond before k, and its
        own input axis.  Made: the bond after k, output axes that begin with k.  Longest first.
        """
        return tuple(
            (*batch, *made, *summed) if k == 1 else (*batch, *summed, *made)
            for k, (batch, summed, made) in enumerate(self._roles, start=1)
        )

    @cached_property
    def _roles(self) -> tuple[tuple[tuple[Axis, ...], ...], ...]:
        """(batch, summed, made) axes of each factor, contracted in chain order."""
        n = self.n_factors
        spans = intervals(n)
        by_length = range(len(spans) - 1, -1, -1)
        count, roles = len(spans), []
        for k in range(1, n + 1):
            inside = [(s, spans[s]) for s in by_length if spans[s][0] <= k <= spans[s][1]]
            batch = [self.axes[s] for s, (_, j) in inside if j > k]
            batch += [self.axes[count + s] for s, (i, _) in inside if i < k]
            summed = [self.axes[s] for s, (i, j) in inside if j == k and i < k]
            summed += [self.axes[2 * count + k - 2]] if k > 1 else []
            summed += [self.axes[s] for s, (i, j) in inside if i == j == k]
            made = [self.axes[2 * count + k - 1]] if k < n else []
            made += [self.axes[count + s] for s, (i, _) in inside if i == k]
            roles.append((tuple(batch), tuple(summed), tuple(made)))
        return tuple(roles)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each factor, axes as in `factor_axes`."""
        return tuple(tuple(a.size for a in axes) for axes in self.factor_axes)

    @property
    def einsum(self) -> str:
        """The operator as one einsum of F1, …, FN and x, with axes as stored.

        Letters in the order of θ: a b c … are input axes, A B C … output axes, p q r s bonds.
        """
        operands = [*map(_letters, self.factor_axes), "..." + _letters(self.input_axes)]
        return f"{','.join(operands)}->...{_letters(self.output_axes)}"

    def path_for(self, tokens: int) -> Path:
        """The cheapest order of pairwise products for so many tokens, next power of two.

        Operands are F1, …, FN and x; for many tokens factors may be multiplied together first.
        """
        bucket = 1 << max(0, min(tokens, _MANY_TOKENS) - 1).bit_length()
        return _best_path(self.sizes, self.n_factors, bucket)

    @property
    def path(self) -> Path:
        """The cheapest order of pairwise products for one token; its cost is `macs`."""
        return _best_path(self.sizes, self.n_factors, 1)

    @property
    def chain_path(self) -> Path:
        """x through F1, then F2, and so on."""
        return _chain_path(self.n_factors)

    def steps(self, path: Path) -> Iterator[tuple[int, int, int]]:
        """The products of a path: both operands and the result as sets of bits as in `Axis`."""
        return _steps(self.n_factors, path)

    def macs_along(self, path: Path, tokens: int = 1) -> int:
        """Multiply-accumulates of all tokens when the products are run in this order."""
        return _macs_along(self.axes, self.n_factors, path, tokens)

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates of one token in the cheapest order of pairwise products.

        Padding included.  The least over all orders, products of factors among themselves
        included, with one MAC for each combination of a product's indices, as `opt_einsum` finds
        it.  It is half of what `opt_einsum.contract_path` reports, which charges two FLOPs where an
        index is summed: one always is (letters of size 1 are kept), unless factors that are no
        neighbours are multiplied, which it charges half.
        """
        return self.macs_along(self.path)

    @property
    def flops(self) -> int:
        """Forward FLOPs per token: 2 × MACs."""
        return 2 * self.macs

    @cached_property
    def chain_macs(self) -> int:
        """Multiply-accumulates per token in chain order, x through F1, F2, and so on."""
        return _chain_macs(self.sizes, self.n_factors)

    @property
    def params(self) -> int:
        """Parameters of all factors, bias not counted."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def is_dense(self) -> bool:
        """Whether one matrix is left."""
        return self.n_factors == 1

    @property
    def is_degenerate(self) -> bool:
        """Whether it costs more than the dense layer, which can express the same operators."""
        return self.macs > self.d_in * self.d_out

    @property
    def padded_in(self) -> int:
        """Inputs after zero-padding."""
        return math.prod(a.size for a in self.input_axes)

    @property
    def padded_out(self) -> int:
        """Outputs before the cut."""
        return math.prod(a.size for a in self.output_axes)

    @property
    def waste(self) -> float:
        """MACs spent on zero-padded inputs and cut outputs, as a share of the other MACs.

        In chain order the first product spends f_out(F1) on each surplus input and the last
        f_in(FN) on each surplus output; with w their sum, w / (chain_macs − w).
        """
        first, last = self.factors[0], self.factors[-1]
        wasted = (self.padded_in - self.d_in) * self.fans(first)[1]
        wasted += (self.padded_out - self.d_out) * self.fans(last)[0]
        return wasted / (self.chain_macs - wasted) if wasted else 0.0

    @cached_property
    def rank(self) -> int:
        """Upper bound of the rank: the narrowest cut that has x on one side and y on the other.

        The least, over all sets of factors taken to the side of x, of the product of the axes that
        join the sides; never above d_in or d_out.  For two factors `Sizes.rank`.  Tensor-Trains and
        BTT attain it; of small random chains about one in sixteen falls short, most by few.
        """
        x = 1 << self.n_factors
        cuts = (
            math.prod(a.size for a in _open(self.axes, x | side))
            for side in range(1 << self.n_factors)
        )
        return min(self.d_in, self.d_out, *cuts)

    def numeric_rank(self, seed: int = 0) -> int:
        """Rank of the matrix (d_out, d_in) that random normal factors make, in float64.

        Takes a singular value decomposition, so time as min(d_in, d_out)² · max(d_in, d_out).
        """
        return _numeric_rank(self, seed)

    @cached_property
    def fingerprint(self) -> str:
        """Equal for equal integer operators; of more than one factor, unlike any of `Structure`."""
        if self.is_dense:
            return fingerprint(self.d_in, self.d_out, None)
        sizes = ".".join(map(str, self.sizes))
        return f"{self.d_in}x{self.d_out}:chain{self.n_factors}:{sizes}"

    @property
    def factors(self) -> tuple[str, ...]:
        """F1, F2, …: the factors, in the order they are contracted."""
        return tuple(f"F{k}" for k in range(1, self.n_factors + 1))

    def fans(self, factor: str) -> tuple[int, int]:
        """(fan in, fan out) of a factor as a batched matrix, contracted in chain order.

        The product of the axes summed at its step, and of those that it makes.
        """
        if factor not in self.factors:
            raise InvalidInput("factor", factor, " | ".join(self.factors))
        _, summed, made = self._roles[int(factor[1:]) - 1]
        return math.prod(a.size for a in summed), math.prod(a.size for a in made)

    def init_std(self, factor: str) -> float:
        """Standard deviation of a factor at initialisation: sqrt(min(f_in, f_out)) / f_in.

        Source: arXiv:2406.06248, section 3.2.
        """
        fan_in, fan_out = self.fans(factor)
        return math.sqrt(min(fan_in, fan_out)) / fan_in

    def adam_lr_multiplier(self, factor: str, d_in_base: int | None = None) -> float:
        """Adam learning rate of a factor, relative to a dense base layer with `d_in_base` inputs.

        d_in_base / (N f_in); `d_in_base` is this layer's own d_in unless given.  For two factors
        that is arXiv:2406.06248, section 3.2, where the 1/2 shares one update among both factors;
        that N factors share it alike is our generalisation.
        """
        base = self.d_in if d_in_base is None else d_in_base
        return base / (self.n_factors * self.fans(factor)[0])

    def contraction(self, path: Path) -> tuple[str, ...]:
        """The products of a path as einsums of two operands, in order; ... stands for tokens."""
        n = self.n_factors
        stored = {1 << k: _letters(axes) for k, axes in enumerate(self.factor_axes)}
        stored[1 << n] = "..." + _letters(self.input_axes)
        found = []
        for one, other, result in self.steps(path):
            letters = _letters(
                self.output_axes if result == (2 << n) - 1 else _open(self.axes, result)
            )
            stored[result] = ("..." if result >> n else "") + letters
            found.append(f"{stored[one]},{stored[other]}->{stored[result]}")
        return tuple(found)


#: How many sizes a structure has → how many factors.
_SIZED = {_numbers_of(n): n for n in range(1, MAX_FACTORS + 1)}


def _letters(axes: Iterable[Axis]) -> str:
    return "".join(a.letter for a in axes)


@lru_cache(maxsize=65536)
def _structure(theta: ChainTheta, d_in: int, d_out: int) -> ChainStructure:
    theta = theta.absorbed()
    theta = max(theta, theta.reversed(), key=_rank_of_direction)
    narrow = min(d_in, d_out)
    sizes: tuple[int, ...] = (
        *cover_axes(d_in, theta.inputs),
        *cover_axes(d_out, theta.outputs),
        *(max(1, round(narrow**t)) for t in theta.bonds),
    )
    n = theta.factors
    if n > 2:
        sizes = _cheapest(sizes, theta)
    while n > 1:
        own_in, own_out = sizes[0], sizes[len(intervals(n))]
        if own_in > 1 or own_out > 1:
            sizes = _reversed(sizes, n)
            own_in, own_out = sizes[0], sizes[len(intervals(n))]
            if own_in > 1 or own_out > 1:
                sizes = _reversed(sizes, n)
                break
        sizes = _without_first(sizes, n, lambda a, b: a * b)
        n -= 1
    if n == 1:
        return ChainStructure(theta, d_in, d_out, (d_in, d_out))
    one = ChainStructure(theta, d_in, d_out, sizes)
    other = ChainStructure(theta, d_in, d_out, _reversed(sizes, n))
    return max(one, other, key=_label_order)


@lru_cache(maxsize=MAX_FACTORS)
def _met(factors: int) -> tuple[tuple[int, ...], ...]:
    """For each product in chain order the places in θ of the axes that it runs over."""
    spans = intervals(factors)
    count = len(spans)
    return tuple(
        (
            *(s for s, (_, j) in enumerate(spans) if j >= k),
            *(count + s for s, (i, _) in enumerate(spans) if i <= k),
            *(2 * count + b - 1 for b in (k - 1, k) if 1 <= b < factors),
        )
        for k in range(1, factors + 1)
    )


def _chain_macs(sizes: Sequence[int], factors: int) -> int:
    return sum(math.prod([sizes[i] for i in places]) for places in _met(factors))


def _cheapest(sizes: tuple[int, ...], theta: ChainTheta) -> tuple[int, ...]:
    """The sizes with those of axes of equal exponents exchanged to the least cost in chain order.

    1024 is 8·8·16 to three equal axes, and whose the 16 is may double the cost.  Two factors have
    the sizes of `nas.structure`, which does not ask this.
    """
    count, n = len(theta.inputs), theta.factors
    ways = [
        _arrangements(sizes[start : start + count], [round(v, 12) for v in exponents])
        for start, exponents in ((0, theta.inputs), (count, theta.outputs))
    ]
    found = [(*i, *o, *sizes[2 * count :]) for i, o in islice(product(*ways), _MOST_ARRANGEMENTS)]
    return min(found, key=lambda s: min(_chain_macs(s, n), _chain_macs(_reversed(s, n), n)))


def _arrangements(sizes: Sequence[int], exponents: Sequence[float]) -> list[tuple[int, ...]]:
    """The sizes with those of equal exponents in every order, as given first."""
    found = [tuple(sizes)]
    for value in dict.fromkeys(exponents):
        places = [i for i, e in enumerate(exponents) if e == value]
        orders = dict.fromkeys(islice(permutations([sizes[i] for i in places]), _MOST_ORDERS))
        found = [
            tuple(dict(zip(places, order, strict=True)).get(i, n) for i, n in enumerate(way))
            for way in found
            for order in orders
        ][:_MOST_ORDERS]
    return found


def _label_order(s: ChainStructure) -> tuple[int, ...]:
    """Largest for the direction that is not dearer; a tie goes by (in_1, out_N, in_1…N, out_1…N),
    as two factors' does, then by all sizes."""
    inputs, outputs, _ = _split(s.sizes, s.n_factors)
    n = s.n_factors
    tie = inputs[1, 1], outputs[n, n], inputs[1, n], outputs[1, n]
    return (-s.chain_macs, *tie, *s.sizes)


@lru_cache(maxsize=4096)
def _numeric_rank(s: ChainStructure, seed: int) -> int:
    rng = np.random.default_rng(seed)
    factors = [rng.standard_normal(shape) for shape in s.shapes]
    equation = ",".join(map(_letters, s.factor_axes))
    equation += f"->{_letters(s.output_axes)}{_letters(s.input_axes)}"
    whole = np.einsum(equation, *factors, optimize="optimal")
    matrix = np.reshape(whole, (s.padded_out, s.padded_in))[: s.d_out, : s.d_in]
    return int(np.linalg.matrix_rank(matrix))


def inspect_chain(theta: ChainTheta | Theta, d_in: int, d_out: int) -> dict[str, object]:
    """Everything exact about a chain θ at d_in → d_out, as plain JSON values.

    `macs` and `flops` are per token and forward.  `rank` is numeric, of random factors, where the
    dimensions are within `NUMERIC_RANK_LIMIT`, else the bound; `rank_is` says which.  `waste` is a
    fraction as in `ChainStructure.waste`; `contraction` the products of one token at least cost.

    Raises
    ------
    InvalidInput
        As `ChainStructure.of`.
    """
    theta = ChainTheta.of(theta)
    structure = ChainStructure.of(theta, d_in, d_out)
    smaller, larger = NUMERIC_RANK_LIMIT
    numeric = min(d_in, d_out) <= smaller and max(d_in, d_out) <= larger
    return {
        "theta": list(theta.values),
        "canonical_theta": list(theta.canonical().values),
        "name": theta.name,
        "d_in": d_in,
        "d_out": d_out,
        "n_factors": structure.n_factors,
        "sizes": {a.name: a.size for a in structure.axes},
        "einsum": structure.einsum,
        "contraction": list(structure.contraction(structure.path)),
        "macs": structure.macs,
        "chain_macs": structure.chain_macs,
        "flops": structure.flops,
        "params": structure.params,
        "rank": structure.numeric_rank() if numeric else structure.rank,
        "rank_is": "numeric" if numeric else "upper bound",
        "rank_bound": structure.rank,
        "padded_in": structure.padded_in,
        "padded_out": structure.padded_out,
        "waste": structure.waste,
        "dense_macs": d_in * d_out,
        "degenerate": structure.is_degenerate,
        "fingerprint": structure.fingerprint,
        "factors": [
            {
                "name": f,
                "axes": [a.name for a in axes],
                "shape": list(shape),
                "fan_in": structure.fans(f)[0],
                "fan_out": structure.fans(f)[1],
                "init_std": structure.init_std(f),
                "adam_lr_multiplier": structure.adam_lr_multiplier(f),
            }
            for f, axes, shape in zip(
                structure.factors, structure.factor_axes, structure.shapes, strict=True
            )
        ],
    }
