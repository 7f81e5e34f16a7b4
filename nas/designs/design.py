"""What a search chooses: how every structured layer of a model's blocks is built.

A `Design` is one of
    Theta        a two-factor einsum
    ChainTheta   an einsum of three or more factors
    Mixture      experts inside every linear layer, or whole feed-forward blocks as experts
    Convolution  the baseline outside the θ space
    Aligned      one of the first kind, or a mixture of it, whose attention projections have their
                 output blocks at the heads
Each is valid at every dimension; `structure_of` gives its integers for a layer.  The text of a
design, ``design_text``, is exact: `parse_design` reads it back to an equal design.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nas.designs.chain import ChainTheta, parse_chain
from nas.designs.chain_structure import ChainStructure, inspect_chain
from nas.designs.convolution import (
    Convolution,
    ConvolutionStructure,
    inspect_convolution,
    parse_convolution,
)
from nas.designs.einsum import LinearStructure, Sizing, Structure, inspect_structure
from nas.designs.mixture import (
    Mixture,
    MixtureStructure,
    ffn_structures,
    inspect_mixture,
    parse_mixture,
)
from nas.designs.taxonomy import NAMED_FORMS, name_of, parse_theta
from nas.designs.theta import Theta, exact_exponent
from nas.errors import InvalidInput

#: Follows the text of a design whose attention projections are aligned with the heads.
_AT_HEADS = "@heads"
_ACCEPTED_AT_HEADS = "two factors, or a mixture of them, that are not dense"
_LONGEST = 2000  # characters
_LONGEST_NAME = 96
DESIGN_FORMS = (
    f"{NAMED_FORMS}; tensor-train:cores=3,rho=1/4, btt:cores=3,rho=1/8, or 14, 23 or 34 numbers of "
    "3, 4 or 5 factors; btt-moe:experts=8,active=2, low-rank-moe, dense-moe, ffn-moe; "
    "convolution:kernel=1/2; and any of two factors, or a mixture of it, followed by @heads"
)


@dataclass(frozen=True, slots=True)
class Aligned:
    """A design whose attention heads are blocks of its projections.

    Query, key and value have φ = heads and ε = head size, so that block φ = h makes head h alone;
    the output projection is the mirror image, γ = heads and α = head size.  The other layers, and
    the other sides of these, are as `of` says.  Source: arXiv:2410.02117, section 5 and figure 10.

    Raises
    ------
    InvalidInput
        A design without blocks: dense, three or more factors, a convolution, experts that are
        dense or whole feed-forward blocks.
    """

    of: Theta | Mixture

    def __post_init__(self) -> None:
        theta = self.of.theta if isinstance(self.of, Mixture) else self.of
        if not isinstance(theta, Theta) or theta.is_dense:
            raise InvalidInput("heads", _plain_name(self.of), _ACCEPTED_AT_HEADS)
        if isinstance(self.of, Theta):
            object.__setattr__(self, "of", self.of.canonical())


Design = Theta | ChainTheta | Mixture | Convolution | Aligned


def parse_design(text: str) -> Design:
    """A design from its name or text.

    >>> design_name(parse_design("monarch@heads"))
    'monarch@heads'

    Raises
    ------
    InvalidInput
        Nothing that any family reads.
    """
    if not isinstance(text, str) or len(text) > _LONGEST:
        got = text if not isinstance(text, str) else text[:80] + "…"
        raise InvalidInput("theta", got, DESIGN_FORMS)
    plain, at, rest = text.strip().partition("@")
    if at:
        if at + rest != _AT_HEADS:
            raise InvalidInput("theta", text, f"nothing or {_AT_HEADS} after {plain}")
        return aligned(parse_design(plain))
    name = plain.partition(":")[0]
    if name.endswith("-moe"):
        return parse_mixture(plain)
    if name == "convolution":
        return parse_convolution(plain)
    numbers = not name[:1].isalpha()
    if "cores=" in plain or (numbers and plain.count(",") > len(Theta.__slots__) - 1):
        return parse_chain(plain)
    if not plain or (not numbers and name not in _TWO_FACTORS):
        raise InvalidInput("theta", text, DESIGN_FORMS)
    return parse_theta(plain)


_TWO_FACTORS = ("dense", "low-rank", "kronecker", "tensor-train", "monarch", "btt")


def aligned(design: Design) -> Aligned:
    """The design with its attention projections aligned with the heads; see `Aligned`."""
    if isinstance(design, Aligned):
        return design
    if not isinstance(design, Theta | Mixture):
        raise InvalidInput("heads", design_name(design), _ACCEPTED_AT_HEADS)
    return Aligned(design)


def canonical_design(design: Design) -> Design:
    """The same for every design that says the same."""
    if isinstance(design, Theta | ChainTheta):
        return design.canonical()
    return design


#: Family → what a picture calls it.
_KINDS = {"einsum": "two factors", "convolution": "convolution"}
_NUMBERS = {3: "three", 4: "four", 5: "five"}


def kind_of(text: str) -> str:
    """What a picture calls a design, from its text: dense | two factors | three factors … |
    mixture of experts | convolution."""
    design = parse_design(text)
    if isinstance(design, Theta) and design.is_dense:
        return "dense"
    if isinstance(design, ChainTheta):
        return f"{_NUMBERS[design.factors]} factors"
    return _KINDS.get(family_of(design), "mixture of experts")


def design_text(design: Design) -> str:
    """The design in full precision."""
    if isinstance(design, Aligned):
        return design_text(design.of) + _AT_HEADS
    if isinstance(design, Theta):
        return ",".join(map(exact_exponent, design.values))
    return design.text


def design_name(design: Design) -> str:
    """A short name, rounded; of nothing but numbers, the kind of einsum alone."""
    if isinstance(design, Aligned):
        return _plain_name(design.of) + _AT_HEADS
    return _plain_name(design)


def _plain_name(design: Theta | ChainTheta | Mixture | Convolution) -> str:
    if isinstance(design, Theta):
        return name_of(design)
    name = design.name
    if isinstance(design, ChainTheta) and (" " in name or len(name) > _LONGEST_NAME):
        return family_of(design)
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def described(text: str) -> str:
    """The name of a design's text, with its numbers where it has no other name.

    >>> described("0.5,0.25,0.25,0,0.5,0.5,0")
    'einsum 0.5,0.25,0.25,0,0.5,0.5,0'
    """
    design = parse_design(text)
    inner = design.of if isinstance(design, Aligned) else design
    name = design_name(design)
    if isinstance(inner, Theta | ChainTheta) and name.startswith("einsum"):
        family = family_of(design)
        return name.replace(family, f"{family} {','.join(f'{v:.3g}' for v in inner.values)}", 1)
    return name


def exponents(design: Design) -> tuple[float, ...]:
    """θ of the design: 7 numbers for two factors and mixtures of them, more for a chain, none for a
    convolution and for experts that are feed-forward blocks."""
    if isinstance(design, Aligned):
        return exponents(design.of)
    if isinstance(design, Theta | ChainTheta):
        return tuple(design.values)
    if isinstance(design, Mixture) and design.theta is not None:
        return design.theta.values
    return ()


def family_of(design: Design) -> str:
    """einsum | einsum3 … | btt-moe | low-rank-moe | dense-moe | ffn-moe | einsum-moe | convolution.

    The number after ``einsum`` is that of factors, 2 unless given.
    """
    if isinstance(design, Aligned):
        return family_of(design.of)
    if isinstance(design, Theta):
        return "einsum"
    if isinstance(design, ChainTheta):
        return f"einsum{design.factors}"
    return design.family if isinstance(design, Mixture) else "convolution"


def structure_of(design: Design, d_in: int, d_out: int) -> LinearStructure:
    """The integers of a layer d_in → d_out.

    Of an aligned design, those of a layer that is no projection of attention.

    Raises
    ------
    InvalidInput
        A dimension out of range, a rank axis that the experts do not divide, or experts that are
        whole feed-forward blocks, which no single layer is.
    """
    if isinstance(design, Aligned):
        return structure_of(design.of, d_in, d_out)
    if isinstance(design, Theta):
        return Structure.of(design, d_in, d_out)
    if isinstance(design, ChainTheta):
        found = design.canonical()
        if isinstance(found, Theta):
            return Structure.of(found, d_in, d_out)
        return ChainStructure.of(found, d_in, d_out)
    if isinstance(design, Mixture):
        return MixtureStructure.of(design, d_in, d_out)
    return ConvolutionStructure.of(design, d_in, d_out)


def with_heads(structure: LinearStructure, heads: int, side: str) -> LinearStructure:
    """The structure of a projection that makes (``out``) or reads (``in``) `heads` heads."""
    if side not in ("in", "out"):
        raise InvalidInput("side", side, "in | out")
    if isinstance(structure, MixtureStructure):
        return replace(structure, expert=_blocked(structure.expert, heads, side))
    return _blocked(structure, heads, side) if isinstance(structure, Structure) else structure


def _blocked(structure: Structure, heads: int, side: str) -> Structure:
    if side == "out":
        return structure.with_output_blocks(heads)
    return structure.with_input_blocks(heads)


def inspect_design(
    design: Design, d_in: int, d_out: int, sizing: Sizing = "least-waste"
) -> dict[str, object]:
    """Everything exact about a design at d_in → d_out, as plain JSON values.

    Of an aligned design, as of the design that is aligned; experts that are feed-forward blocks
    are those of d_in → d_out → d_in.  `sizing` is for two factors.

    Raises
    ------
    InvalidInput
        As `structure_of`; a sizing that other designs do not have.
    """
    if isinstance(design, Aligned):
        return inspect_design(design.of, d_in, d_out, sizing)
    if isinstance(design, Theta):
        return inspect_structure(design, d_in, d_out, sizing)
    if sizing != "least-waste":
        raise InvalidInput("sizing", sizing, "least-waste, but for two factors")
    if isinstance(design, ChainTheta):
        return inspect_chain(design, d_in, d_out)
    if isinstance(design, Mixture) and design.theta is None:
        return _inspect_feed_forward(design, d_in, d_out)
    if isinstance(design, Mixture):
        return inspect_mixture(design, d_in, d_out)
    return inspect_convolution(design, d_in, d_out)


def _inspect_feed_forward(mixture: Mixture, width: int, hidden: int) -> dict[str, object]:
    """A feed-forward block width → hidden → width of experts; dense MACs are those of one."""
    first, second = ffn_structures(mixture, width, hidden)
    macs = first.macs + second.macs
    return {
        "name": mixture.name,
        "family": mixture.family,
        "theta": [],
        "experts": mixture.experts,
        "active": mixture.active,
        "d_in": width,
        "d_out": hidden,
        "contraction": [f"{width} → {hidden} → {width}, experts whole"],
        "macs": macs,
        "gate_macs": width * mixture.experts,
        "flops": 2 * macs,
        "params": first.params + second.params,
        "dense_macs": 2 * width * hidden,
        "fingerprint": f"{first.fingerprint} {second.fingerprint}",
    }
