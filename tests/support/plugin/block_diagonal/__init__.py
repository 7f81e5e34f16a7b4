"""A family of designs that the product does not have; the entry point beside it makes it known.

W is B blocks along the diagonal, of ⌈d_out/B⌉ × ⌈d_in/B⌉, with B = min(d_in, d_out)^blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

from nas.designs.design import Design, Family, Proposals
from nas.designs.structure import LinearStructure, check_dimensions
from nas.designs.theta import exact_exponent, format_exponent, parse_exponent
from nas.errors import InvalidInput

_FORM = "block-diagonal:blocks=1/2"


@dataclass(frozen=True, slots=True)
class BlockDiagonal(Design):
    """As many blocks as min(d_in, d_out)^blocks."""

    blocks: float = 0.5

    @property
    def family(self) -> str:
        return "block-diagonal"

    @property
    def text(self) -> str:
        return f"block-diagonal:blocks={exact_exponent(self.blocks)}"

    @property
    def name(self) -> str:
        return f"block-diagonal:blocks={format_exponent(self.blocks)}"


@dataclass(frozen=True)
class BlockDiagonalStructure(LinearStructure):
    """The integers of a layer."""

    blocks: int
    d_in: int
    d_out: int

    @staticmethod
    def of(design: BlockDiagonal, d_in: int, d_out: int) -> BlockDiagonalStructure:
        check_dimensions(d_in, d_out)
        return BlockDiagonalStructure(max(1, round(min(d_in, d_out) ** design.blocks)), d_in, d_out)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Blocks, outputs of one and inputs of one."""
        return self.blocks, -(-self.d_out // self.blocks), -(-self.d_in // self.blocks)

    @property
    def params(self) -> int:
        blocks, rows, columns = self.shape
        return blocks * rows * columns

    macs = params

    @property
    def is_dense(self) -> bool:
        return self.blocks == 1

    @property
    def fingerprint(self) -> str:
        return f"{self.d_in}x{self.d_out}:block-diagonal:{self.blocks}"

    @property
    def factors(self) -> tuple[str, ...]:
        return ("A",)

    def fans(self, factor: str) -> tuple[int, int]:
        self.check_factor(factor)
        return self.shape[2], self.shape[1]

    def adam_lr_multiplier(self, factor: str, d_in_base: int | None = None) -> float:
        return (self.d_in if d_in_base is None else d_in_base) / self.fans(factor)[0]


def parse(text: str) -> BlockDiagonal:
    _, colon, option = text.partition(":")
    key, _, value = option.partition("=")
    if colon and key != "blocks":
        raise InvalidInput("theta", text, _FORM)
    return BlockDiagonal(parse_exponent(value, "theta.blocks")) if colon else BlockDiagonal()


def inspect(design: BlockDiagonal, d_in: int, d_out: int) -> dict[str, object]:
    s = BlockDiagonalStructure.of(design, d_in, d_out)
    return {**s.counts(), "name": design.name, "blocks": s.blocks}


FAMILY = Family(
    design=BlockDiagonal,
    structure=BlockDiagonalStructure.of,
    layer="block_diagonal.layer:BlockDiagonalLinear",
    structures=BlockDiagonalStructure,
    forms=_FORM,
    reads=lambda text: text.partition(":")[0] == "block-diagonal",
    parse=parse,
    inspect=inspect,
    proposals={
        "block-diagonal": Proposals(
            lambda point: BlockDiagonal(point["blocks"]),
            coordinates=lambda choices: {"blocks": (0.0, 1.0)},
        )
    },
)
