"""Block-sparse matrices: of a matrix of blocks a fixed pattern is stored, whatever the input.

``butterfly`` is the flat block butterfly of Pixelated Butterfly (arXiv:2112.00029): n × n blocks, n
a power of two near L^blocks with L = min(d_in, d_out), of which block (i, j) is stored where i = j
or where i and j differ in one bit alone, i xor j < k.  The stride limit k is a power of two near
n^stride, so that a row has 1 + log2 k blocks, n (1 + log2 n) in all at stride = 1.  On a rectangle
the blocks are rectangles, ⌈d_out/n⌉ × ⌈d_in/n⌉.  Where n does not divide a dimension, its last
blocks have one index less than the first; they are zero-padded to the same size, which is charged.

``channels`` keeps every s-th input channel, s = round(d_in^(1 - channels)), with a dense map from
these to all outputs; nothing is padded.  This is the sparse part of LOST (arXiv:2508.02668) but for
which channels are kept: there, for each matrix, those of largest norm in what an SVD of its initial
weights leaves; here the same evenly spaced ones in every layer, before anything is drawn.

1 MAC = 2 FLOPs.  The stored blocks are one factor, with what an output sums as fan in f_in and what
an input reaches as fan out f_out.  Of random entries with standard deviation
sqrt(min(f_in, f_out)) / f_in the matrix has the spectral norm sqrt(f_out / f_in), up to a constant;
an update of size 1 / f_in moves an output as far as one of 1 / d_in does in a dense layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from nas.designs.design import BlockOf, Design, Family, Proposals, fit_by_lowering
from nas.designs.einsum import Structure
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

BLOCK_SPARSE_FORMS = (
    "block-sparse:pattern=butterfly,blocks=1/2,stride=1 or "
    "block-sparse:pattern=channels,channels=1/2, with exponents from 0 to 1"
)
#: Pattern → its exponents with their defaults.
_PATTERNS = {"butterfly": {"blocks": 0.5, "stride": 1.0}, "channels": {"channels": 0.5}}
#: Least exponent of blocks that is proposed: below it the widths of proxy runs have one block.
_LEAST_BLOCKS = 0.25


@dataclass(frozen=True, slots=True)
class Butterfly:
    """About L^blocks blocks on each side, of which those of strides below n^stride are stored.

    Raises
    ------
    InvalidInput
        An exponent that is not a number from 0 to 1.
    """

    blocks: float
    stride: float

    def __post_init__(self) -> None:
        for name in ("blocks", "stride"):
            checked = checked_exponent(getattr(self, name), f"block_sparse.{name}")
            object.__setattr__(self, name, checked)


@dataclass(frozen=True, slots=True)
class Channels:
    """About d_in^channels input channels, evenly spaced.

    Raises
    ------
    InvalidInput
        An exponent that is not a number from 0 to 1.
    """

    channels: float

    def __post_init__(self) -> None:
        checked = checked_exponent(self.channels, "block_sparse.channels")
        object.__setattr__(self, "channels", checked)


@dataclass(frozen=True, slots=True)
class BlockSparse(Design):
    """A matrix that is zero outside a pattern of blocks; see the module.

    >>> BlockSparse(Butterfly(0.5, 1)).name
    'block-sparse:pattern=butterfly,blocks=1/2,stride=1'

    Raises
    ------
    InvalidInput
        A pattern that is neither a `Butterfly` nor `Channels`.
    """

    pattern: Butterfly | Channels

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, Butterfly | Channels):
            raise InvalidInput("block_sparse", self.pattern, "a Butterfly or Channels")

    @property
    def options(self) -> dict[str, float]:
        """The exponents of the pattern by name."""
        return {name: getattr(self.pattern, name) for name in self.pattern.__slots__}

    @property
    def name(self) -> str:
        """A short name, rounded."""
        return self._told({key: format_exponent(v) for key, v in self.options.items()})

    @property
    def text(self) -> str:
        """In full precision, as `parse_block_sparse` reads it."""
        return self._told({key: exact_exponent(v) for key, v in self.options.items()})

    def _told(self, options: dict[str, str]) -> str:
        pattern = type(self.pattern).__name__.lower()
        told = [f"{key}={value}" for key, value in {"pattern": pattern, **options}.items()]
        return f"block-sparse:{','.join(told)}"

    @property
    def family(self) -> str:
        return "block-sparse"

    def canonical(self) -> Design:
        """Itself, or dense where one block or all channels are stored at every dimension."""
        p = self.pattern
        whole = p.blocks == 0 if isinstance(p, Butterfly) else p.channels == 1
        return DENSE if whole else self


def parse_block_sparse(text: str) -> BlockSparse:
    """Read ``block-sparse`` with a pattern and its exponents; the butterfly unless one is given.

    >>> parse_block_sparse("block-sparse:pattern=channels,channels=1/4").pattern
    Channels(channels=0.25)

    Raises
    ------
    InvalidInput
        Another name, pattern or option, or an exponent off its range.
    """
    if not isinstance(text, str) or text.strip().partition(":")[0] != "block-sparse":
        raise InvalidInput("block_sparse", text, BLOCK_SPARSE_FORMS)
    every = ("pattern", *(key for options in _PATTERNS.values() for key in options))
    given = read_options(text.strip(), every, "block_sparse")
    pattern = given.pop("pattern", "butterfly")
    if pattern not in _PATTERNS or not given.keys() <= _PATTERNS[pattern].keys():
        raise InvalidInput("block_sparse", text, BLOCK_SPARSE_FORMS)
    read = {key: parse_exponent(value, f"block_sparse.{key}") for key, value in given.items()}
    exponents = _PATTERNS[pattern] | read
    return BlockSparse(Butterfly(**exponents) if pattern == "butterfly" else Channels(**exponents))


@dataclass(frozen=True)
class BlockSparseStructure(LinearStructure):
    """A block-sparse layer d_in → d_out, as integers.  Build one with `BlockSparseStructure.of`.

    >>> s = BlockSparseStructure.of(BlockSparse(Butterfly(0.5, 1)), 256, 1024)
    >>> s.blocks, s.strides, s.block_in, s.block_out, s.macs  # 16 · (1 + log2 16) blocks
    (16, (1, 2, 4, 8), 16, 64, 81920)
    """

    design: BlockSparse
    d_in: int
    d_out: int

    def __post_init__(self) -> None:
        check_dimensions(self.d_in, self.d_out)

    @staticmethod
    def of(design: BlockSparse, d_in: int, d_out: int) -> BlockSparseStructure:
        """The structure of a design for a layer with `d_in` inputs and `d_out` outputs.

        Raises
        ------
        InvalidInput
            A dimension that is not a whole number from 1 to 2^24.
        """
        return BlockSparseStructure(design, d_in, d_out)

    @cached_property
    def _powers(self) -> tuple[int, int]:
        """log2 of n and of the stride limit of a butterfly."""
        pattern, length = self.design.pattern, min(self.d_in, self.d_out)
        if isinstance(pattern, Channels):
            return 0, 0
        blocks = min(length.bit_length() - 1, round(pattern.blocks * math.log2(length)))
        limit = round(pattern.stride * blocks)
        # two blocks that both reach each other are one
        return (0, 0) if 1 + limit == 1 << blocks else (blocks, limit)

    @property
    def blocks(self) -> int:
        """n, the number of blocks on each side; 1 of channels."""
        return 1 << self._powers[0]

    @property
    def strides(self) -> tuple[int, ...]:
        """The values of i xor j, beside 0, of the blocks (i, j) that are stored."""
        return tuple(1 << power for power in range(self._powers[1]))

    @property
    def every(self) -> int:
        """s: each s-th input channel is read; 1 of a butterfly."""
        pattern = self.design.pattern
        if isinstance(pattern, Butterfly):
            return 1
        spacing: int = round(math.pow(self.d_in, 1 - pattern.channels))
        return spacing

    @property
    def kept(self) -> int:
        """Input channels that are read, ⌈d_in / s⌉."""
        return -(-self.d_in // self.every)

    @property
    def block_in(self) -> int:
        """Inputs of a block, ⌈kept / n⌉."""
        return -(-self.kept // self.blocks)

    @property
    def block_out(self) -> int:
        """Outputs of a block, ⌈d_out / n⌉."""
        return -(-self.d_out // self.blocks)

    @property
    def in_a_row(self) -> int:
        """Blocks that are stored in each row, and in each column."""
        return 1 + len(self.strides)

    @property
    def padded_in(self) -> int:
        """Inputs that are read, after zero-padding."""
        return self.blocks * self.block_in

    @property
    def padded_out(self) -> int:
        """Outputs before the cut."""
        return self.blocks * self.block_out

    @property
    def params(self) -> int:
        """Entries of all stored blocks, bias not counted."""
        return self.blocks * self.in_a_row * self.block_in * self.block_out

    @property
    def macs(self) -> int:
        """Multiply-accumulates per token, one per stored entry; padding included."""
        return self.params

    @property
    def waste(self) -> float:
        """MACs spent on padding, as a share of the other MACs."""
        useful = sum(self._useful(stride) for stride in (0, *self.strides))
        return (self.macs - useful) / useful

    def _useful(self, stride: int) -> int:
        """Real entries of the blocks (i, i xor stride)."""
        n = self.blocks
        (low_in, more_in), (low_out, more_out) = divmod(self.kept, n), divmod(self.d_out, n)
        # blocks i below `more` have one index more than `low`
        both = _below(more_out, more_in, stride)
        return n * low_in * low_out + low_out * more_in + low_in * more_out + both

    @property
    def is_dense(self) -> bool:
        """Whether every entry is stored."""
        return self.blocks == 1 and self.every == 1

    @property
    def rank(self) -> int:
        """Generic rank, exact for random entries: min(kept, d_out).

        Of a butterfly that is full: each block of the diagonal has the smaller dimension's share
        of it, which is never above its share of the other.
        """
        return min(self.kept, self.d_out)

    @cached_property
    def fingerprint(self) -> str:
        """Equal for equal integer operators: dimensions, and n and k or s."""
        if self.is_dense:
            return f"{self.d_in}x{self.d_out}:dense"
        if self.every > 1:
            return f"{self.d_in}x{self.d_out}:channels:{self.every}"
        return f"{self.d_in}x{self.d_out}:butterfly:{self.blocks}.{1 << len(self.strides)}"

    @property
    def factors(self) -> tuple[str, ...]:
        """The one factor, A: the stored blocks."""
        return ("A",)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of A: (n, outputs of a block, inputs of the blocks of a row); of channels (d_out, kept).

        The blocks of row i are (i, i), (i, i xor 1), (i, i xor 2), (i, i xor 4) and so on.
        """
        if isinstance(self.design.pattern, Channels):
            return self.d_out, self.kept
        return self.blocks, self.block_out, self.in_a_row * self.block_in

    def fans(self, factor: str) -> tuple[int, int]:
        """(fan in, fan out) of A: what one output sums and what one input reaches."""
        self.check_factor(factor)
        return self.in_a_row * self.block_in, self.in_a_row * self.block_out

    def adam_lr_multiplier(self, factor: str, d_in_base: int | None = None) -> float:
        """Adam learning rate of A, relative to a dense base layer with `d_in_base` inputs:
        d_in_base / f_in; `d_in_base` is this layer's own d_in unless given."""
        base = self.d_in if d_in_base is None else d_in_base
        return base / self.fans(factor)[0]


def _below(first: int, second: int, stride: int) -> int:
    """How many i < `first` have i xor stride < `second`; `stride` is 0 or a power of two."""
    if stride == 0:
        return min(first, second)

    def without_the_bit(count: int) -> int:
        pairs, rest = divmod(max(0, count), 2 * stride)
        return pairs * stride + min(rest, stride)

    # i without the bit of the stride has the partner i + stride, with it i - stride
    return without_the_bit(min(first, second - stride)) + without_the_bit(
        min(second, first - stride)
    )


def inspect_block_sparse(design: BlockSparse, d_in: int, d_out: int) -> dict[str, object]:
    """Everything exact about a block-sparse layer d_in → d_out, as plain JSON values.

    `macs` and `flops` are per token and forward, `waste` is a fraction.

    Raises
    ------
    InvalidInput
        As `BlockSparseStructure.of`.
    """
    structure = BlockSparseStructure.of(design, d_in, d_out)
    return {
        **structure.counts(),
        "name": design.name,
        "text": design.text,
        "family": design.family,
        "pattern": type(design.pattern).__name__.lower(),
        "exponents": design.options,
        "blocks": structure.blocks,
        "blocks_in_a_row": structure.in_a_row,
        "strides": list(structure.strides),
        "block_in": structure.block_in,
        "block_out": structure.block_out,
        "channel_spacing": structure.every,
        "rank": structure.rank,
        "padded_in": structure.padded_in,
        "padded_out": structure.padded_out,
        "waste": structure.waste,
        "factors": [
            {**structure.factor_row(f), "shape": list(structure.shape)} for f in structure.factors
        ],
    }


def _structure_of(design: BlockSparse, d_in: int, d_out: int) -> LinearStructure:
    """One dense matrix where every entry is stored."""
    found = BlockSparseStructure.of(design, d_in, d_out)
    return Structure.of(DENSE, d_in, d_out) if found.is_dense else found


def _lowered(design: BlockSparse, share: float) -> BlockSparse:
    p = design.pattern
    if isinstance(p, Butterfly):
        return BlockSparse(Butterfly(p.blocks, p.stride * share))
    return BlockSparse(Channels(p.channels * share))


def _fit(design: BlockSparse, width: int, block: BlockOf) -> Design:
    """With a lower stride limit until no layer is degenerate, which only padding makes one."""
    return fit_by_lowering(design, block)


FAMILY = Family(
    design=BlockSparse,
    structure=_structure_of,
    layer="nas.layers.block_sparse:BlockSparseLinear",
    structures=BlockSparseStructure,
    forms=BLOCK_SPARSE_FORMS,
    reads=lambda text: text.partition(":")[0] == "block-sparse",
    parse=parse_block_sparse,
    inspect=inspect_block_sparse,
    fit=_fit,
    lowered=_lowered,
    # channels alone would leave most inputs unread in every layer
    proposals={
        "block-sparse": Proposals(
            lambda point: BlockSparse(Butterfly(point["blocks"], point["stride"])),
            coordinates=lambda choices: {"blocks": (_LEAST_BLOCKS, 1.0), "stride": (0.0, 1.0)},
        )
    },
)
