"""What a search chooses: how every structured layer of a model's blocks is built.

A `Design` is valid at every dimension; `structure_of` gives its integers for a layer.  Its text is
exact: `parse_design` reads it back to an equal design.  Designs come in families.  A `Family` says
everything that the other rooms need of its designs, so that only `parse_design` asks which family
a design is of.  `nas.designs` registers the families there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from nas.designs.structure import LinearStructure, Sizing
from nas.designs.theta import DENSE, Theta
from nas.errors import InvalidInput

#: Follows the text of a design whose attention projections are aligned with the heads.
AT_HEADS = "@heads"
_LONGEST = 2000  # characters
_LONGEST_NAME = 96


class Design(Protocol):
    """A way to build linear layers; hashable, and equal to designs that say the same."""

    __slots__ = ()

    @property
    def text(self) -> str:
        """In full precision."""

    @property
    def name(self) -> str:
        """A short name, rounded; of nothing but numbers, the kind of einsum alone."""

    @property
    def described(self) -> str:
        """The name, with its numbers where it has no other name."""
        return self.name

    @property
    def family(self) -> str:
        """einsum | einsum3 … | btt-moe | low-rank-moe | dense-moe | ffn-moe | einsum-moe |
        convolution | blast | block-sparse | lost | pixelfly | sum | cola-mlp | activated.  The
        number after ``einsum`` is that of factors, 2 unless given."""

    @property
    def kind(self) -> str:
        """What a picture calls it: dense | two factors | three factors … | mixture of experts |
        convolution | blast | block-sparse | sum | activated."""
        return self.family

    @property
    def exponents(self) -> tuple[float, ...]:
        """θ: 7 numbers for two factors and mixtures of them, more for a chain, none for designs
        outside the space of θ and for experts that are feed-forward blocks."""
        return ()

    def canonical(self) -> Design:
        """The same for every design that says the same."""
        return self

    def __hash__(self) -> int:
        return hash(self.text)


@dataclass(frozen=True, slots=True)
class LinearRole:
    """A structured linear layer of a block: its name and its dimensions."""

    name: str
    d_in: int
    d_out: int
    #: input dimension of the same layer in the base model
    d_in_base: int
    #: of a projection of attention: how many heads it makes (`side` "out") or reads ("in")
    heads: int | None = None
    side: Literal["in", "out"] = "out"


class Choices(Protocol):
    """What a search may choose among, beside families."""

    @property
    def factors(self) -> tuple[int, ...]: ...
    @property
    def experts(self) -> tuple[int, ...]: ...
    @property
    def active(self) -> tuple[int, ...]: ...
    @property
    def shared(self) -> tuple[int, ...]: ...
    @property
    def granularity(self) -> tuple[int, ...]: ...
    @property
    def activation(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Proposals:
    """How a search proposes the designs of one name in `Space.families`."""

    #: the design of a point: its coordinates, and one of each of the choices below
    design: Callable[[Mapping[str, Any]], Design]
    #: names of the `Choices` that it takes
    choices: tuple[str, ...] = ()
    #: coordinates of its own beside those of two factors, each with its range
    coordinates: Callable[[Choices], Mapping[str, tuple[float, float]]] = lambda choices: {}
    #: texts of named designs that show what it costs; by default the name itself
    examples: Callable[[Choices], Iterable[str]] | None = None
    #: a design that costs as much as any it proposes, at every width; None where dense does
    dearest: Callable[[Choices], Design] | None = None


#: The structures of every layer of a block that is built to a design, at some width.
BlockOf = Callable[[Design], Sequence[LinearStructure]]


def _as_it_is(design: Any, width: int, block: BlockOf) -> Design:
    found: Design = design
    return found


@dataclass(frozen=True)
class Family:
    """What the other rooms ask of the designs of one family."""

    #: the class of its designs
    design: type
    #: (design, d_in, d_out): the integers of a layer
    structure: Callable[[Any, int, int], LinearStructure]
    #: module:class of its layer, which takes a structure, d_in, d_out and the options of
    #: `nas.layers.EinsumLinear`; None of a family that has the layers of another
    layer: str | None
    #: the class of the structures that it is the layer of
    structures: type | None
    #: what its texts look like, for messages
    forms: str
    #: whether a text is one of its own to read
    reads: Callable[[str], bool]
    parse: Callable[[str], Design]
    #: (design, d_in, d_out): everything exact, as plain JSON values
    inspect: Callable[..., dict[str, object]]
    #: the same structure for a projection that makes or reads heads
    with_heads: Callable[[Any, int, str], LinearStructure] = lambda structure, heads, side: (
        structure
    )
    #: whether blocks of its projections can be heads
    has_blocks: Callable[[Any], bool] = lambda design: False
    #: the structure in a role, where that is not the one for the role's dimensions
    in_role: Callable[[Any, LinearRole], LinearStructure] | None = None
    #: the nearest design of which no layer costs more than dense at a width
    fit: Callable[[Any, int, BlockOf], Design] = _as_it_is
    #: the same with its exponents of rank, or of whatever else raises the cost, times a share
    lowered: Callable[[Any, float], Design] = lambda design, share: design
    #: of a design to which no single layer can be built: what can be, in words
    alone: Callable[[Any], str | None] = lambda design: None
    #: whether a design's exponents alone say what it is
    exponents_suffice: bool = False
    #: whether `inspect` takes a sizing
    sized: bool = False
    #: whether counting its FLOPs at one width takes milliseconds
    slow: bool = False
    #: name in `Space.families` → how a search proposes it
    proposals: Mapping[str, Proposals] = field(default_factory=dict)


_FAMILIES: dict[type, Family] = {}


def register(family: Family) -> None:
    """Make a family known: to parsing, planning, search, layers, answers and pictures."""
    _FAMILIES[family.design] = family


def families() -> tuple[Family, ...]:
    """The known families, in the order in which they were registered."""
    return tuple(_FAMILIES.values())


def layer_family(structure: LinearStructure) -> Family:
    """The family whose layers have structures of this kind."""
    return next(f for f in _FAMILIES.values() if f.structures is type(structure))


def family_of(design: Design) -> Family:
    """The family of a design."""
    return _FAMILIES[type(design)]


#: Steps in which the exponents of a design are lowered to 0.
_LOWERINGS = 20


def fit_by_lowering(design: Design, block: BlockOf) -> Design:
    """The design lowered until no layer is degenerate; dense where none is left, or all are."""
    found = design.canonical()
    for step in range(_LOWERINGS + 1):
        lowered = family_of(found).lowered(found, 1 - step / _LOWERINGS)
        structures = block(lowered)
        if not any(s.is_degenerate for s in structures):
            return DENSE if all(s.is_dense for s in structures) else lowered
    return DENSE


def proposals() -> dict[str, Proposals]:
    """Every name that `Space.families` may have, and how a search proposes it."""
    return {name: found for family in families() for name, found in family.proposals.items()}


def design_forms() -> str:
    """What `parse_design` reads, in words."""
    forms = "; ".join(family.forms for family in families() if family.forms)
    unlike = "dense, convolution, block-sparse, dense-moe, ffn-moe, cola-mlp and activated"
    return f"{forms}; and any of these but {unlike}, followed by {AT_HEADS}"


def parse_design(text: str) -> Design:
    """A design from its name or text.

    >>> parse_design("monarch@heads").name
    'monarch@heads'

    Raises
    ------
    InvalidInput
        Nothing that any family reads.
    """
    if not isinstance(text, str) or len(text) > _LONGEST:
        got = text if not isinstance(text, str) else text[:80] + "…"
        raise InvalidInput("theta", got, design_forms())
    for family in families():
        if family.reads(text.strip()):
            return family.parse(text.strip())
    raise InvalidInput("theta", text, design_forms())


def as_design(given: Design | str | Sequence[float]) -> Design:
    """A design from itself, from its text, or from the seven numbers of two factors."""
    if isinstance(given, str):
        return parse_design(given)
    return given if type(given) in _FAMILIES else Theta.of(given)  # type: ignore[return-value]


def shortened(name: str) -> str:
    """A name as tables and figures can hold it."""
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def structure_of(design: Design, d_in: int, d_out: int) -> LinearStructure:
    """The integers of a layer d_in → d_out.

    Of an aligned design, those of a layer that is no projection of attention.

    Raises
    ------
    InvalidInput
        A dimension out of range, a rank axis that the experts do not divide, or experts that are
        whole feed-forward blocks, which no single layer is.
    """
    return family_of(design).structure(design, d_in, d_out)


def structure_in(design: Design, role: LinearRole) -> LinearStructure:
    """The integers of a layer in its role in a block."""
    family = family_of(design)
    if family.in_role is not None:
        return family.in_role(design, role)
    return family.structure(design, role.d_in, role.d_out)


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
    family = family_of(design)
    if family.sized:
        return family.inspect(design, d_in, d_out, sizing)
    if sizing != "least-waste":
        raise InvalidInput("sizing", sizing, "least-waste, but for two factors")
    return family.inspect(design, d_in, d_out)
