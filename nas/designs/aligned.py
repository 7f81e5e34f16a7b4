"""Designs whose attention heads are blocks of their projections."""

from __future__ import annotations

from dataclasses import dataclass

from nas.designs.design import (
    AT_HEADS,
    BlockOf,
    Design,
    Family,
    LinearRole,
    family_of,
    inspect_design,
    parse_design,
    shortened,
    structure_of,
)
from nas.designs.structure import LinearStructure
from nas.errors import InvalidInput

_ACCEPTED = (
    "two factors, a mixture of them, a chain, blast, or a sum that has one of these, not dense"
)
_ALONE = (
    f"a design without {AT_HEADS}, for nothing here says which layers make heads: for those, "
    "`heads` of `nas.layers.replace_linears`, or of `nas.layers.layer_of`"
)


@dataclass(frozen=True, slots=True)
class Aligned(Design):
    """A design whose attention heads are blocks of its projections.

    Query, key and value have φ = heads and ε = head size, so that block φ = h makes head h alone;
    the output projection is the mirror image, γ = heads and α = head size.  The other layers, and
    the other sides of these, are as `of` says.  Source: arXiv:2410.02117, section 5 and figure 10.

    Beyond the paper: in a chain the axis that all factors share is the heads; in BLAST block row h
    makes head h, or block column h reads it; in a sum this holds for the parts that have blocks.

    Raises
    ------
    InvalidInput
        A design without blocks: dense, a convolution, block-sparse (whose blocks are powers of two
        in number), a sum of these, experts that are dense or whole feed-forward blocks.
    """

    of: Design

    def __post_init__(self) -> None:
        if not family_of(self.of).has_blocks(self.of):
            raise InvalidInput("heads", self.of.name, _ACCEPTED)
        object.__setattr__(self, "of", self.of.canonical())

    @property
    def text(self) -> str:
        """That of `of`, and @heads."""
        return self.of.text + AT_HEADS

    @property
    def name(self) -> str:
        """That of `of`, and @heads."""
        return shortened(self.of.name) + AT_HEADS

    @property
    def described(self) -> str:
        """That of `of`, and @heads."""
        return shortened(self.of.described) + AT_HEADS

    @property
    def family(self) -> str:
        """That of `of`."""
        return self.of.family

    @property
    def kind(self) -> str:
        """That of `of`."""
        return self.of.kind

    @property
    def exponents(self) -> tuple[float, ...]:
        """Those of `of`."""
        return self.of.exponents


def aligned(design: Design) -> Aligned:
    """The design with its attention projections aligned with the heads; see `Aligned`."""
    return design if isinstance(design, Aligned) else Aligned(design)


def _parse(text: str) -> Aligned:
    plain, at, rest = text.partition("@")
    if at + rest != AT_HEADS:
        raise InvalidInput("theta", text, f"nothing or {AT_HEADS} after {plain}")
    return aligned(parse_design(plain))


def _in_role(design: Aligned, role: LinearRole) -> LinearStructure:
    found = structure_of(design.of, role.d_in, role.d_out)
    if role.heads is None:
        return found
    return family_of(design.of).with_heads(found, role.heads, role.side)


def _fit(design: Aligned, width: int, block: BlockOf) -> Design:
    fitted = family_of(design.of).fit(design.of, width, lambda inner: block(aligned(inner)))
    # which may be dense, of another family
    return Aligned(fitted) if family_of(fitted).has_blocks(fitted) else fitted


FAMILY = Family(
    design=Aligned,
    structure=lambda design, d_in, d_out: structure_of(design.of, d_in, d_out),
    layer=None,
    structures=None,
    forms="",
    # one inside parentheses is that of a part, which a sum refuses
    reads=lambda text: "@" in text.rpartition(")")[2],
    parse=_parse,
    inspect=lambda design, d_in, d_out, sizing: inspect_design(design.of, d_in, d_out, sizing),
    in_role=_in_role,
    fit=_fit,
    alone=lambda design: _ALONE,
    sized=True,
)
