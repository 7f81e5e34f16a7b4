"""BLAST outside the space of θ: block matrices whose factors are shared by block rows and columns.

W is a grid of blocks, about b × b with b = L^blocks and L = min(d_in, d_out).  Block (i, j) is

    U_i diag(s_ij) V_jᵀ,    y_i = U_i Σ_j s_ij ∘ (V_jᵀ x_j)

with U_i (m, r) shared by a block row, V_j (n, r) by a block column, and s_ij of r = L^rho numbers.
It is a chain of three factors V, S, U (`nas.designs.chain`), except that one rank axis joins all
three.  One block is low-rank with a diagonal between its factors.  The default, b = r = √L, has
full rank up to the rounding of b and r, in a square layer at one and a half times Monarch's
compute.
Source: Lee, Kwon, Qu and Kim, arXiv:2410.21262, section 2.

Sizes: of the whole numbers near L^blocks the one that pads least decides the sides
m = ⌈d_out/b⌉ and n = ⌈d_in/b⌉ of a block, and there are ⌈d_out/m⌉ × ⌈d_in/n⌉ blocks: as many as are
not padding alone.  Inputs are zero-padded at their end, surplus outputs cut at theirs.

MACs charged are those of the three products, r (padded_in + rows · columns + padded_out), which are
also the parameters: none is used twice.  1 MAC = 2 FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from nas.designs.design import BlockOf, Design, Family, Proposals
from nas.designs.einsum import check_side, head_size
from nas.designs.structure import LinearStructure, check_dimensions
from nas.designs.theta import (
    DENSE,
    checked_exponent,
    exact_exponent,
    format_exponent,
    parse_exponent,
    read_options,
)
from nas.errors import InvalidInput

BLAST_FORM = "blast or blast:blocks=1/4,rho=1/2, with exponents from 0 to 1"
#: The number of blocks may leave L^blocks by this factor when that pads less.
_NEAR = 4 / 3
#: Numbers of blocks on each side of L^blocks that are tried at most.
_MOST_TRIED = 512
#: Shares of its exponent of blocks that a design is tried with where it costs more than dense.
_SHARES = (1.0, 0.85, 0.7, 0.55, 0.4, 0.25, 0.1, 0.0)


@dataclass(frozen=True, slots=True)
class Blast(Design):
    """A grid of about L^blocks × L^blocks blocks whose factors share a rank axis of size L^rho.

    >>> Blast(0.25, 0.5).name
    'blast:blocks=1/4,rho=1/2'

    Raises
    ------
    InvalidInput
        An exponent that is not a number from 0 to 1.
    """

    blocks: float = 0.5
    rho: float = 0.5

    def __post_init__(self) -> None:
        for axis in ("blocks", "rho"):
            checked = checked_exponent(getattr(self, axis), f"blast.{axis}")
            object.__setattr__(self, axis, checked)

    @property
    def name(self) -> str:
        """A short name, rounded."""
        return f"blast:blocks={format_exponent(self.blocks)},rho={format_exponent(self.rho)}"

    @property
    def family(self) -> str:
        return "blast"

    @property
    def text(self) -> str:
        """The design in full precision, which `parse_blast` reads."""
        return f"blast:blocks={exact_exponent(self.blocks)},rho={exact_exponent(self.rho)}"


def parse_blast(text: str) -> Blast:
    """Read ``blast`` or ``blast:blocks=1/4,rho=1/2``; either exponent is 1/2 unless given.

    Raises
    ------
    InvalidInput
        Another name or option, or an exponent off its range.
    """
    if not isinstance(text, str) or text.strip().partition(":")[0] != "blast":
        raise InvalidInput("blast", text, BLAST_FORM)
    given = read_options(text.strip(), ("blocks", "rho"), "blast")
    return Blast(**{axis: parse_exponent(v, f"blast.{axis}") for axis, v in given.items()})


@dataclass(frozen=True)
class BlastStructure(LinearStructure):
    """A BLAST matrix d_in → d_out, as integers.  Build one with `BlastStructure.of`.

    >>> s = BlastStructure.of(Blast(0.5, 0.5), 1024, 4096)
    >>> s.rows, s.columns, s.block_out, s.block_in, s.rho
    (32, 32, 128, 32, 32)
    >>> s.macs, s.rank
    (196608, 1024)
    """

    blast: Blast
    d_in: int
    d_out: int
    #: so many equal block rows or block columns, in place of what L^blocks gives: heads
    heads_out: int | None = None
    heads_in: int | None = None

    def __post_init__(self) -> None:
        check_dimensions(self.d_in, self.d_out)
        for dimension, heads in ((self.d_out, self.heads_out), (self.d_in, self.heads_in)):
            if heads is not None:
                head_size(dimension, heads)

    @staticmethod
    def of(blast: Blast, d_in: int, d_out: int) -> BlastStructure:
        """The structure of a design for a layer with `d_in` inputs and `d_out` outputs.

        Raises
        ------
        InvalidInput
            A dimension that is not a whole number from 1 to 2^24.
        """
        return BlastStructure(blast, d_in, d_out)

    @property
    def _count(self) -> int:
        """b, from which the blocks get their sides."""
        return _block_count(self.d_in, self.d_out, self.blast.blocks)

    @property
    def block_in(self) -> int:
        """n = ⌈d_in / b⌉, inputs of a block; of a projection that reads heads, those of one."""
        if self.heads_in is not None:
            return head_size(self.d_in, self.heads_in)
        return -(-self.d_in // self._count)

    @property
    def block_out(self) -> int:
        """m = ⌈d_out / b⌉, outputs of a block; of a projection that makes heads, those of one."""
        if self.heads_out is not None:
            return head_size(self.d_out, self.heads_out)
        return -(-self.d_out // self._count)

    @property
    def columns(self) -> int:
        """⌈d_in / n⌉, blocks side by side."""
        return -(-self.d_in // self.block_in)

    @property
    def rows(self) -> int:
        """⌈d_out / m⌉, blocks one above the other."""
        return -(-self.d_out // self.block_out)

    @property
    def rho(self) -> int:
        """r = round(L^rho), from 1 to L: the axis that all three factors have."""
        narrow = min(self.d_in, self.d_out)
        size: int = round(math.pow(narrow, self.blast.rho))
        return max(1, min(narrow, size))

    @property
    def padded_in(self) -> int:
        """Inputs after zero-padding."""
        return self.columns * self.block_in

    @property
    def padded_out(self) -> int:
        """Outputs before the cut."""
        return self.rows * self.block_out

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """The shape of each factor: a batch of matrices (fan out, fan in)."""
        return {
            "V": (self.columns, self.rho, self.block_in),
            "S": (self.rho, self.rows, self.columns),
            "U": (self.rows, self.block_out, self.rho),
        }

    @property
    def params(self) -> int:
        """Numbers in V, S and U, bias not counted."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def macs(self) -> int:
        """Multiply-accumulates per token, padding included: each number of a factor is used once,
        those of S as the rows × columns products of V's outputs with s_ij."""
        return self.params

    @property
    def waste(self) -> float:
        """MACs spent on padding and on cut outputs, as a share of the other MACs."""
        surplus = self.padded_in - self.d_in + self.padded_out - self.d_out
        wasted = self.rho * surplus
        return wasted / (self.macs - wasted)

    @property
    def is_dense(self) -> bool:
        """Never: of 1 × 1 blocks too, it is a product of three factors."""
        return False

    @property
    def rank(self) -> int:
        """Generic rank, exact for random factors: min(Σ_i min(m_i, r), Σ_j min(n_j, r)), with m_i
        outputs and n_j inputs of the blocks that are left after padding is cut.

        No more, for the sums are the ranks of the outer factors in W = diag(U_i) S diag(V_j)ᵀ.
        Attained by this choice.  In place k of the rank axis let column k of U_i and of V_j be a
        unit vector or zero, and S_k = (s_ij,k)_ij pair block rows with block columns one to one,
        so that each pair of unit vectors is one entry 1 of W.  Block row i has a unit vector of
        its own at min(m_i, r) places k, which are taken in turn, block after block and from the
        first again after the last.  Of their sum A each k then has ⌊A/r⌋ or, for the first k,
        ⌈A/r⌉; block columns likewise, with sum B.  The lesser of both, summed over k, is
        min(A, B): so many entries, no two in one row or column of W.
        """
        return min(
            _outer_rank(self.d_in, self.block_in, self.rho),
            _outer_rank(self.d_out, self.block_out, self.rho),
        )

    @cached_property
    def fingerprint(self) -> str:
        """Equal for equal integer operators: dimensions, sides of a block and r."""
        sizes = f"{self.block_out}.{self.block_in}.{self.rho}"
        return f"{self.d_in}x{self.d_out}:blast:{sizes}"

    @property
    def factors(self) -> tuple[str, ...]:
        """V, S, U, in the order they are contracted."""
        return ("V", "S", "U")

    def fans(self, factor: str) -> tuple[int, int]:
        """(fan in, fan out) as a batch of matrices: V_jᵀ n → r, S columns → rows for each of the
        r, U_i r → m."""
        self.check_factor(factor)
        _, fan_out, fan_in = self.shapes[factor]
        return fan_in, fan_out

    def adam_lr_multiplier(self, factor: str, d_in_base: int | None = None) -> float:
        """Adam learning rate of a factor, relative to a dense base layer with `d_in_base` inputs:
        d_in_base / (3 f_in); `d_in_base` is this layer's own d_in unless given.

        Adam moves every number by about its rate, in a direction that the factor's inputs share, so
        its outputs move by rate · f_in whatever the width.  Three factors share one update alike,
        as two do in arXiv:2406.06248, section 3.2.  Derivation: `nas.layers.blast`.
        """
        base = self.d_in if d_in_base is None else d_in_base
        return base / (3 * self.fans(factor)[0])


@lru_cache(maxsize=65536)
def _block_count(d_in: int, d_out: int, exponent: float) -> int:
    """The number near L^exponent that pads least, as `nas.designs.axes` sizes one axis; of equal
    ones the nearest."""
    narrow = min(d_in, d_out)
    target = math.pow(narrow, exponent)
    if exponent == 0.0:
        return 1
    near = round(target)
    low = max(1, min(math.floor(target), math.ceil(target / _NEAR)), near - _MOST_TRIED)
    high = min(narrow, max(math.ceil(target), math.floor(target * _NEAR)), near + _MOST_TRIED)

    def order(count: int) -> tuple[int, float, int]:
        padding = sum(-d % -(-d // count) for d in (d_in, d_out))
        return padding, abs(math.log(count / target)), count

    return min(range(low, high + 1), key=order)


def _outer_rank(dimension: int, side: int, rho: int) -> int:
    """Σ over blocks of min(side, rho), with the last block's side what is left of the dimension."""
    whole, rest = divmod(dimension, side)
    return whole * min(side, rho) + min(rest, rho)


def inspect_blast(blast: Blast, d_in: int, d_out: int) -> dict[str, object]:
    """Everything exact about a BLAST matrix at d_in → d_out, as plain JSON values.

    `macs` and `flops` are per token and forward, `waste` is a fraction.

    Raises
    ------
    InvalidInput
        As `BlastStructure.of`.
    """
    structure = BlastStructure.of(blast, d_in, d_out)
    return {
        **structure.counts(),
        "blast": blast.text,
        "name": blast.name,
        "rows": structure.rows,
        "columns": structure.columns,
        "block_out": structure.block_out,
        "block_in": structure.block_in,
        "rho": structure.rho,
        "rank": structure.rank,
        "padded_in": structure.padded_in,
        "padded_out": structure.padded_out,
        "waste": structure.waste,
        "factors": [
            {**structure.factor_row(f), "shape": list(structure.shapes[f])}
            for f in structure.factors
        ],
    }


def _fit(blast: Blast, width: int, block: BlockOf) -> Design:
    """The design with its rank lowered until no layer is degenerate; where rank 1 is still too
    dear, with fewer blocks; else dense."""
    for share in _SHARES:
        fitted = _lower_rank(replace(blast, blocks=share * blast.blocks), block)
        if fitted is not None:
            return fitted
    return DENSE


def _lower_rank(blast: Blast, block: BlockOf) -> Blast | None:
    """The design with the largest rho, not above its own, at which no layer is degenerate; None if
    one is at rank 1 already.  MACs are proportional to r."""
    if not any(s.is_degenerate for s in block(blast)):
        return blast
    limits = [blast.rho]
    for s in block(replace(blast, rho=0.0)):
        allowed = s.d_in * s.d_out // s.macs
        if allowed < 1:
            return None
        limits.append(math.log(allowed) / math.log(min(s.d_in, s.d_out)))  # vectors have allowed 0
    return replace(blast, rho=min(limits))


def _with_heads(structure: BlastStructure, heads: int, side: str) -> BlastStructure:
    """Block row h makes head h alone, or block column h reads it; the other side stays."""
    check_side(side)
    if side == "out":
        return replace(structure, heads_out=heads)
    return replace(structure, heads_in=heads)


def _proposed(point: Mapping[str, Any]) -> Blast:
    """Any number of blocks, and a rank with which compute is at most dense's in exponents:
    rho + max(1, 2 blocks) ≤ 2."""
    blocks = point["blast_blocks"]
    return Blast(blocks, point["blast_rho_share"] * min(1.0, 2.0 - 2.0 * blocks))


FAMILY = Family(
    design=Blast,
    structure=BlastStructure.of,
    layer="nas.layers.blast:BlastLinear",
    structures=BlastStructure,
    forms="blast:blocks=1/4,rho=1/2",
    reads=lambda text: text.partition(":")[0] == "blast",
    parse=parse_blast,
    inspect=inspect_blast,
    with_heads=_with_heads,
    has_blocks=lambda blast: True,
    fit=_fit,
    proposals={
        "blast": Proposals(
            _proposed,
            coordinates=lambda choices: {
                "blast_blocks": (0.0, 1.0),
                "blast_rho_share": (0.0, 1.0),
            },
        )
    },
)
