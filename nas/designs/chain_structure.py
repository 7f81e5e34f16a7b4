"""The integers of a chain of N factors for one layer d_in → d_out, and what follows exactly.

Axes are those of `nas.designs.chain`.  Flattened order: input and output run over their axes with
the longest interval outermost, and among equally long ones the last outermost, so that {1} is
innermost: (γ, β, α) and (φ, ε, δ) for N = 2.  Padding and cutting are those of
`nas.designs.einsum`.
1 MAC = 2 FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import islice, permutations, product
from typing import Any

import numpy as np

from nas.designs.axes import cover_axes, divide_axes
from nas.designs.chain import (
    MAX_FACTORS,
    ChainTheta,
    axis_names,
    count_of_exponents,
    intervals,
    is_chain,
    parse_chain,
    rank_of_direction,
    reversed_axes,
    split_axes,
    without_first,
)
from nas.designs.design import BlockOf, Choices, Design, Family, Proposals
from nas.designs.einsum import (
    Structure,
    check_side,
    exponents_of,
    fingerprint,
    fit_theta,
    head_size,
    theta_of,
    with_heads,
    with_zero,
)
from nas.designs.structure import LinearStructure, check_dimensions
from nas.designs.theta import DENSE, Theta
from nas.errors import InvalidInput

#: Smaller and larger dimension up to which `inspect_chain` finds the rank numerically, and the
#: MACs that building the matrix may take: a wide bond alone can fill the memory.
NUMERIC_RANK_LIMIT = (512, 2048)
_NUMERIC_RANK_MACS = 1 << 25
#: Pairs of positions to contract; each product goes to the end, as in opt_einsum.
Path = tuple[tuple[int, int], ...]
#: Orders of the sizes of equally large axes that are tried, of each side and of both.
_MOST_ORDERS, _MOST_ARRANGEMENTS = 120, 200
#: Tokens above which the cheapest path no longer changes.
_MANY_TOKENS = 1 << 24


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
    parts = zip(letters, values, axis_names(factors), owners, strict=True)
    return tuple(Axis(*part) for part in parts)


def _open(axes: Sequence[Axis], merged: int) -> tuple[Axis, ...]:
    """The axes that the product of the tensors `merged` (a set of bits) still has."""
    return tuple(a for a in axes if a.owners & merged and a.owners & ~merged)


@lru_cache(maxsize=65536)
def _best_path(values: tuple[int, ...], factors: int, tokens: int) -> Path:
    """The order of pairwise products with the least MACs for `tokens` tokens; operands are F1 … FN
    and x.  Of equal costs, x through F1, F2, … one after another."""
    from opt_einsum import DynamicProgramming  # without which all but chains works

    axes = _axes(values, factors)
    operands = [frozenset(a.letter for a in axes if a.owners >> k & 1) for k in range(factors + 1)]
    operands[factors] |= {_TOKENS}
    output = frozenset(a.letter for a in axes if a.owners >> (factors + 1) & 1) | {_TOKENS}
    sizes = {a.letter: a.size for a in axes} | {_TOKENS: tokens}
    # counts one operation for each combination of a product's indices, whether or not it sums one,
    # where opt_einsum's other optimisers count half of one that sums none
    found = DynamicProgramming(minimize="flops", search_outer=True)(operands, output, sizes)
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
class ChainStructure(LinearStructure):
    """A linear operator d_in → d_out of a chain of factors, as integers.

    The chain is read in the direction in which contracting x with F1, then F2 and so on is not
    dearer.  An idle end factor (`ChainTheta.absorbed`; on integers: its own input and output axes
    have size 1) is absorbed; where one factor is left, that is a dense matrix.  Build one with
    `ChainStructure.of`.

    >>> from nas.designs.chain import parse_chain
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
        check_dimensions(d_in, d_out)
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
        dense = self.d_in * self.d_out
        return self.chain_macs > dense and self.macs > dense  # the latter is never more

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
        self.check_factor(factor)
        _, summed, made = self._roles[int(factor[1:]) - 1]
        return math.prod(a.size for a in summed), math.prod(a.size for a in made)

    def uses(self, factor: str) -> int:
        """How many vectors of one token each matrix of a factor multiplies, in chain order: the
        product of the axes at its step that it does not have."""
        self.check_factor(factor)
        k = int(factor[1:])
        spans = intervals(self.n_factors)
        after = [a.size for a, (i, _) in zip(self.axes, spans, strict=False) if i > k]
        made = self.axes[len(spans) : 2 * len(spans)]
        before = [a.size for a, (_, j) in zip(made, spans, strict=True) if j < k]
        return math.prod((*after, *before))

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
_SIZED = {count_of_exponents(n): n for n in range(1, MAX_FACTORS + 1)}


def _letters(axes: Iterable[Axis]) -> str:
    return "".join(a.letter for a in axes)


@lru_cache(maxsize=65536)
def _structure(theta: ChainTheta, d_in: int, d_out: int) -> ChainStructure:
    theta = theta.absorbed()
    theta = max(theta, theta.reversed(), key=rank_of_direction)
    narrow = min(d_in, d_out)
    sizes: tuple[int, ...] = (
        *cover_axes(d_in, theta.inputs),
        *cover_axes(d_out, theta.outputs),
        *(max(1, round(narrow**t)) for t in theta.bonds),
    )
    n = theta.factors
    if n > 2:
        sizes = _cheapest(sizes, theta)
    return _without_idle(theta, d_in, d_out, sizes)


def _without_idle(
    theta: ChainTheta, d_in: int, d_out: int, sizes: tuple[int, ...]
) -> ChainStructure:
    """The structure of these sizes without idle end factors, in the cheaper direction."""
    n = _SIZED[len(sizes)]
    while n > 1:
        own_in, own_out = sizes[0], sizes[len(intervals(n))]
        if own_in > 1 or own_out > 1:
            sizes = reversed_axes(sizes, n)
            own_in, own_out = sizes[0], sizes[len(intervals(n))]
            if own_in > 1 or own_out > 1:
                sizes = reversed_axes(sizes, n)
                break
        sizes = without_first(sizes, n, lambda a, b: a * b)
        n -= 1
    if n == 1:
        return ChainStructure(theta, d_in, d_out, (d_in, d_out))
    one = ChainStructure(theta, d_in, d_out, sizes)
    other = ChainStructure(theta, d_in, d_out, reversed_axes(sizes, n))
    return max(one, other, key=_label_order)


def _with_heads(
    structure: ChainStructure | Structure, heads: int, side: str
) -> ChainStructure | Structure:
    """The structure of a projection whose heads are the axis of that side that all factors share.

    It is the outermost axis, so that its place h makes, or reads, head h alone.  The other axes of
    that side divide the head among themselves exactly, near the proportions that they had; ranks
    and the other side stay.

    Raises
    ------
    InvalidInput
        `heads` does not divide the dimension.
    """
    check_side(side)
    if isinstance(structure, Structure):
        return with_heads(structure, heads, side)
    s = structure
    size = head_size(s.d_out if side == "out" else s.d_in, heads)
    if s.is_dense:
        return s
    n = s.n_factors
    inputs, outputs, bonds = split_axes(s.sizes, n)
    changed, other = (outputs, inputs) if side == "out" else (inputs, outputs)
    # an end factor whose only axis this is would else be idle
    ends = [(k, k) for k in (1, n) if other[k, k] == 1]
    order = [*ends, *(span for span in changed if span not in ends and span != (1, n))]
    shares = [math.log(changed[span]) for span in order]
    if not any(shares):
        order, shares = [(n, n)], [1.0]
    sizes = divide_axes(size, shares, len(ends))
    changed.update(dict.fromkeys(changed, 1) | dict(zip(order, sizes, strict=True)))
    changed[1, n] = heads
    found = _without_idle(s.theta, s.d_in, s.d_out, (*inputs.values(), *outputs.values(), *bonds))
    if found.is_dense:
        return found
    inputs, outputs, bonds = split_axes(found.sizes, found.n_factors)
    narrow = math.log(min(s.d_in, s.d_out))
    ranks = (min(1.0, math.log(b) / narrow) if narrow else 0.0 for b in bonds)
    exponents = (*exponents_of(tuple(inputs.values())), *exponents_of(tuple(outputs.values())))
    return replace(found, theta=ChainTheta((*exponents, *ranks)))


def _has_blocks(theta: ChainTheta) -> bool:
    found = theta.canonical()
    return not (isinstance(found, Theta) and found.is_dense)


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
    the sizes of `nas.designs.einsum`, which does not ask this.
    """
    count, n = len(theta.inputs), theta.factors
    ways = [
        _arrangements(sizes[start : start + count], [round(v, 12) for v in exponents])
        for start, exponents in ((0, theta.inputs), (count, theta.outputs))
    ]
    found = [(*i, *o, *sizes[2 * count :]) for i, o in islice(product(*ways), _MOST_ARRANGEMENTS)]
    return min(found, key=lambda s: min(_chain_macs(s, n), _chain_macs(reversed_axes(s, n), n)))


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
    inputs, outputs, _ = split_axes(s.sizes, s.n_factors)
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

    `macs` and `flops` are per token and forward.  `rank` is numeric, of random factors, where that
    is cheap (`NUMERIC_RANK_LIMIT`), else the bound; `rank_is` says which.  `waste` is a
    fraction as in `ChainStructure.waste`; `contraction` the products of one token at least cost.

    Raises
    ------
    InvalidInput
        As `ChainStructure.of`.
    """
    theta = ChainTheta.of(theta)
    structure = ChainStructure.of(theta, d_in, d_out)
    smaller, larger = NUMERIC_RANK_LIMIT
    numeric = (
        min(d_in, d_out) <= smaller
        and max(d_in, d_out) <= larger
        and structure.params <= _NUMERIC_RANK_MACS
        and structure.chain_macs * min(d_in, d_out) <= _NUMERIC_RANK_MACS
    )
    return {
        **structure.counts(),
        "theta": list(theta.values),
        "canonical_theta": list(theta.canonical().values),
        "name": theta.full_name,
        "n_factors": structure.n_factors,
        "sizes": {a.name: a.size for a in structure.axes},
        "einsum": structure.einsum,
        "contraction": list(structure.contraction(structure.path)),
        "chain_macs": structure.chain_macs,
        "rank": structure.numeric_rank() if numeric else structure.rank,
        "rank_is": "numeric" if numeric else "upper bound",
        "rank_bound": structure.rank,
        "padded_in": structure.padded_in,
        "padded_out": structure.padded_out,
        "waste": structure.waste,
        "factors": [
            {
                **structure.factor_row(f),
                "axes": [a.name for a in axes],
                "shape": list(shape),
            }
            for f, axes, shape in zip(
                structure.factors, structure.factor_axes, structure.shapes, strict=True
            )
        ],
    }


def _structure_of(theta: ChainTheta, d_in: int, d_out: int) -> LinearStructure:
    found = theta.canonical()
    if isinstance(found, Theta):
        return Structure.of(found, d_in, d_out)
    return ChainStructure.of(found, d_in, d_out)


def _fit(theta: ChainTheta, width: int, block: BlockOf) -> Design:
    """The chain with its ranks lowered together until no layer is degenerate; else dense."""
    found = theta.canonical()
    if isinstance(found, Theta):
        return fit_theta(found, width, block)
    for share in _RANK_SHARES:
        lowered = _lowered(found, share)
        if not any(s.is_degenerate for s in block(lowered)):
            return lowered
    return DENSE


#: Shares of its rank exponents that a chain is tried with.
_RANK_SHARES = (1.0, 0.85, 0.7, 0.55, 0.4, 0.25, 0.1, 0.0)


def _lowered(theta: ChainTheta, share: float) -> ChainTheta:
    bonds = theta.factors - 1
    ranks = (v * share for v in theta.values[-bonds:])
    return ChainTheta.of((*theta.values[:-bonds], *ranks))


def coordinate_names(factors: int) -> list[str]:
    """Coordinates of a chain: a weight for each axis of the input and of the output, and ranks.

    An axis is named by the first and the last of the factors that share it.
    """
    axes = [f"{first}{last}" for first, last in intervals(factors)]
    names = [f"chain{factors}_{side}{axis}" for side in ("in", "out") for axis in axes]
    return names + [f"chain{factors}_rank{i}" for i in range(1, factors)]


#: Greatest rank exponent of a chain that is proposed: with cube-root axes, any matrix of two of its
#: factors has no higher rank.
_MOST_CHAIN_RANK = 0.5


def chain_of(params: Mapping[str, Any], factors: int) -> ChainTheta | Theta:
    """The chain of a point of the search's box.

    The axes of a Block Tensor-Train (inputs of factors 1…i, outputs of factors i…N) are always
    there, as α and ε are with two factors; each of the others, which share parameters or cost
    more, is there in a quarter of the box.
    """
    shares = [params[name] for name in coordinate_names(factors)]
    shared = intervals(factors)
    count = len(shared)
    inputs = _simplex(shares[:count], [first == 1 for first, _ in shared])
    outputs = _simplex(shares[count : 2 * count], [last == factors for _, last in shared])
    ranks = [_MOST_CHAIN_RANK * with_zero(share) for share in shares[2 * count :]]
    return ChainTheta.of((*inputs, *outputs, *ranks)).canonical()


def _simplex(shares: Sequence[float], always: Sequence[bool]) -> list[float]:
    """Weights in [0, 1] → exponents that sum to 1."""
    kept = [
        max(share, _LEAST_WEIGHT) if needed else with_zero(with_zero(share))
        for share, needed in zip(shares, always, strict=True)
    ]
    # -log(1 - u) of uniform u, normalised, is uniform on the simplex
    weights = [-math.log1p(-min(k, 1 - 1e-9)) for k in kept]
    whole = sum(weights)
    return [w / whole for w in weights]


_LEAST_WEIGHT = 0.1


def _coordinates(choices: Choices) -> dict[str, tuple[float, float]]:
    longer = (n for n in choices.factors if n > 2)
    return {name: (0.0, 1.0) for n in longer for name in coordinate_names(n)}


def _examples(choices: Choices) -> Iterator[str]:
    if 2 in choices.factors:
        yield from ("monarch", "low-rank:rho=1/2")
    yield from (f"btt:cores={n},rho=1/8" for n in choices.factors if n > 2)


def _proposed(point: Mapping[str, Any]) -> Design:
    factors = point["factors"]
    return chain_of(point, factors) if factors > 2 else theta_of(point)


FAMILY = Family(
    design=ChainTheta,
    structure=_structure_of,
    layer="nas.layers.chain:ChainLinear",
    structures=ChainStructure,
    forms="tensor-train:cores=3,rho=1/4, btt:cores=3,rho=1/8, or 14, 23 or 34 numbers of 3, 4 or 5 "
    "factors",
    reads=is_chain,
    parse=parse_chain,
    inspect=inspect_chain,
    with_heads=_with_heads,
    has_blocks=_has_blocks,
    fit=_fit,
    lowered=_lowered,
    slow=True,
    proposals={"einsum": Proposals(_proposed, ("factors",), _coordinates, _examples)},
)
