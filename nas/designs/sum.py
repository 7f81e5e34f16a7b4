"""Sums of two structures, y = S1 x + S2 x, and the two of them that have names.

``lost:rank=1/2,channels=1/2`` is low-rank plus evenly spaced input channels, after LOST
(arXiv:2508.02668); ``pixelfly:rank=1/2,blocks=1/2,stride=1`` is low-rank plus the flat block
butterfly, after Pixelated Butterfly (arXiv:2112.00029).  `nas.designs.block_sparse` says what of
the papers' rules the sparse parts keep.  The parts are added as they are, without the learned
weight between them that the paper of pixelfly has.  MACs and parameters are those of both parts;
the additions, like those of a bias, are not charged.  1 MAC = 2 FLOPs.

Initialisation: each part as on its own, over √2.  The parts are drawn apart, so that the variances
of their outputs add, and the sum has the mean of what they have alone, (v1 + v2) / 2: that of one
layer where both have the same.  Where each part has the spectral norm √(d_out/d_in), that of the
sum is between 1/√2 and √2 of it for almost all draws, which is the condition of arXiv:2310.17813.
A part of m factors takes 2^(-1/(2m)) of it in each, which leaves their proportions as they are.

Learning rates: each part's own, over 2.  An update moves the output by ΔS1 x + ΔS2 x.  Alone, the
factors of a part together move it as far as one dense matrix; halved, both parts together do, just
as the 1/2 of two factors shares one update between them (arXiv:2406.06248, section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nas.designs.aligned import Aligned
from nas.designs.block_sparse import BlockSparse, Butterfly, Channels
from nas.designs.cola import Activated
from nas.designs.design import (
    BlockOf,
    Design,
    Family,
    Proposals,
    family_of,
    fit_by_lowering,
    layer_family,
    parse_design,
    shortened,
    structure_of,
)
from nas.designs.einsum import Structure, with_heads
from nas.designs.mixture import Mixture, MixtureStructure
from nas.designs.stored import AnyStructure
from nas.designs.structure import LinearStructure
from nas.designs.theta import (
    DENSE,
    Theta,
    exact_exponent,
    format_exponent,
    parse_exponent,
    read_options,
)
from nas.errors import InvalidInput

SUM_FORMS = (
    "lost:rank=1/2,channels=1/2, pixelfly:rank=1/2,blocks=1/2,stride=1, or "
    "sum(low-rank:rho=1/4;monarch) of any two designs with ; between them"
)
_PARTS = (
    "two designs of single layers, neither a mixture, a sum nor aligned with heads, and without "
    f"an activation; {SUM_FORMS}"
)
#: Between the texts of the parts, which have commas, colons and + of their own.
_BETWEEN = ";"
#: Named sum → its options with their defaults.
_OPTIONS = {
    "lost": {"rank": 0.5, "channels": 0.5},
    "pixelfly": {"rank": 0.5, "blocks": 0.5, "stride": 1.0},
}


@dataclass(frozen=True, slots=True)
class Sum(Design):
    """Two designs whose outputs are added; canonical: each part is, and they are in one order.

    A sum with dense is a design, and its canonical form is dense, which expresses it at no higher
    cost: where a part is a dense matrix, so is the layer.

    >>> Sum((Theta(1, 0, 0, 0, 1, 0, 0.25), BlockSparse(Butterfly(0.5, 1)))).name
    'pixelfly:rank=1/4,blocks=1/2,stride=1'

    Raises
    ------
    InvalidInput
        Not two parts; a part that is a sum, a mixture, aligned with heads, or not linear.
    """

    parts: tuple[Design, Design]

    def __post_init__(self) -> None:
        parts = tuple(self.parts)
        if len(parts) != 2:
            raise InvalidInput("sum", f"{len(parts)} parts", _PARTS)
        for part in parts:
            if isinstance(part, Sum | Mixture | Aligned | Activated):
                raise InvalidInput("sum", part.text, _PARTS)
        both = sorted((part.canonical() for part in parts), key=lambda part: part.text)
        object.__setattr__(self, "parts", tuple(both))

    @property
    def _named(self) -> tuple[str, dict[str, float]] | None:
        """The name that a sum has, and its options."""
        for one, other in (self.parts, self.parts[::-1]):
            if not isinstance(other, BlockSparse) or not isinstance(one, Theta):
                continue
            if one == _low_rank(one.rho):
                name = "pixelfly" if isinstance(other.pattern, Butterfly) else "lost"
                return name, {"rank": one.rho, **other.options}
        return None

    @property
    def name(self) -> str:
        """That of lost and pixelfly, else the names of both parts."""
        if self._named is None:
            return shortened(f"sum({_BETWEEN.join(part.name for part in self.parts)})")
        return self._told(format_exponent)

    @property
    def described(self) -> str:
        """The name, with the numbers of parts without one."""
        if self._named is not None:
            return self.name
        return shortened(f"sum({_BETWEEN.join(part.described for part in self.parts)})")

    @property
    def text(self) -> str:
        """Exact: `parse_sum` gives back an equal sum."""
        if self._named is None:
            return f"sum({_BETWEEN.join(part.text for part in self.parts)})"
        return self._told(exact_exponent)

    def _told(self, exponent: Callable[[float], str]) -> str:
        assert self._named is not None
        name, options = self._named
        return f"{name}:{','.join(f'{key}={exponent(v)}' for key, v in options.items())}"

    @property
    def family(self) -> str:
        """lost, pixelfly or sum."""
        return "sum" if self._named is None else self._named[0]

    @property
    def kind(self) -> str:
        return "sum"

    def canonical(self) -> Design:
        """Itself, or dense where a part is."""
        return DENSE if DENSE in self.parts else self


def _low_rank(rank: float) -> Theta:
    return Theta(1, 0, 0, 0, 1, 0, rank)


def _lost(options: Mapping[str, Any]) -> Sum:
    return Sum((_low_rank(options["rank"]), BlockSparse(Channels(options["channels"]))))


def _pixelfly(options: Mapping[str, Any]) -> Sum:
    pattern = Butterfly(options["blocks"], options["stride"])
    return Sum((_low_rank(options["rank"]), BlockSparse(pattern)))


_NAMED: dict[str, Callable[[Mapping[str, Any]], Sum]] = {"lost": _lost, "pixelfly": _pixelfly}


def parse_sum(text: str) -> Sum:
    """Read ``lost`` or ``pixelfly`` with their options, or ``sum(one;other)`` of any two texts.

    >>> parse_sum("sum(monarch;low-rank:rho=1/4)").name
    'sum(monarch;low-rank:rho=1/4)'

    Raises
    ------
    InvalidInput
        Another name or option, an exponent off its range, or a part that is no design or none that
        sums can have.
    """
    if not isinstance(text, str):
        raise InvalidInput("sum", text, SUM_FORMS)
    stripped = text.strip()
    name = stripped.partition(":")[0]
    if name in _OPTIONS:
        options = dict(_OPTIONS[name])
        for key, value in read_options(stripped, options, "sum").items():
            options[key] = parse_exponent(value, f"sum.{key}")
            if options[key] > 1:
                raise InvalidInput(f"sum.{key}", value, "a number from 0 to 1")
        return _NAMED[name](options)
    inside = stripped.removeprefix("sum(").removesuffix(")")
    parts = inside.split(_BETWEEN)
    if len(inside) + len("sum()") != len(stripped) or len(parts) != 2 or "(" in inside:
        raise InvalidInput("sum", text, _PARTS)
    return Sum((parse_design(parts[0]), parse_design(parts[1])))


@dataclass(frozen=True)
class SumStructure(LinearStructure):
    """A sum of two structures of one layer d_in → d_out; the parts are kept in one order.

    Factors are those of the first and of the second part, as ``first_A`` and ``second_A``.

    >>> s = SumStructure.of(parse_sum("pixelfly:rank=1/2,blocks=1/2"), 256, 256)
    >>> s.macs, s.params  # 80 blocks of 16 × 16, and rank 16
    (28672, 28672)
    >>> s.factors
    ('first_A', 'second_A', 'second_B')

    Raises
    ------
    InvalidInput
        Parts of different dimensions; a part that is a sum, a mixture, dense, or not linear.
    """

    first: AnyStructure
    second: AnyStructure

    def __post_init__(self) -> None:
        one, other = self.first, self.second
        for part in (one, other):
            fixed = isinstance(part, LinearStructure) and part.is_linear
            if not fixed or isinstance(part, SumStructure | MixtureStructure) or part.is_dense:
                accepted = "linear structures that are neither dense, nor sums, nor mixtures"
                raise InvalidInput("sum", part, accepted)
        if (one.d_in, one.d_out) != (other.d_in, other.d_out):
            shapes = f"{one.d_in} → {one.d_out} and {other.d_in} → {other.d_out}"
            raise InvalidInput("sum", shapes, "two structures of the same dimensions")
        one, other = sorted((one, other), key=lambda s: (type(s).__name__, s.fingerprint))
        object.__setattr__(self, "first", one)
        object.__setattr__(self, "second", other)

    @staticmethod
    def of(design: Sum, d_in: int, d_out: int) -> SumStructure:
        """The structure of a sum for a layer with `d_in` inputs and `d_out` outputs.

        Raises
        ------
        InvalidInput
            A dimension that is not a whole number from 1 to 2^24, or one at which a part is dense.
        """
        one, other = (structure_of(part, d_in, d_out) for part in design.parts)
        return SumStructure(one, other)

    @property
    def parts(self) -> tuple[LinearStructure, LinearStructure]:
        """Both parts, in the order of their factors."""
        return self.first, self.second

    @property
    def d_in(self) -> int:
        return int(self.first.d_in)

    @property
    def d_out(self) -> int:
        return int(self.first.d_out)

    @property
    def macs(self) -> int:
        """Multiply-accumulates per token of both parts, padding included."""
        return self.first.macs + self.second.macs

    @property
    def params(self) -> int:
        """Parameters of both parts, bias not counted."""
        return self.first.params + self.second.params

    @property
    def is_dense(self) -> bool:
        """Never: it is not one matrix."""
        return False

    @property
    def rank(self) -> int:
        """The most that the ranks of the parts add up to: generic where a part is low-rank, else
        an upper bound, for both parts may read the same channels."""
        full = min(self.d_in, self.d_out)
        return min(full, sum(int(getattr(part, "rank", full)) for part in self.parts))

    @property
    def waste(self) -> float:
        """MACs that the parts spend on padding, as a share of the other MACs."""
        useful = sum(part.macs / (1 + getattr(part, "waste", 0.0)) for part in self.parts)
        return self.macs / useful - 1

    @property
    def fingerprint(self) -> str:
        """Equal for equal integer operators."""
        return f"sum({self.first.fingerprint}{_BETWEEN}{self.second.fingerprint})"

    @property
    def factors(self) -> tuple[str, ...]:
        """Names of the factors, those of the first part before those of the second."""
        first = tuple(f"first_{name}" for name in self.first.factors)
        return first + tuple(f"second_{name}" for name in self.second.factors)

    def _own(self, factor: str) -> tuple[LinearStructure, str]:
        """The part of a factor, and its name there."""
        self.check_factor(factor)
        which, _, name = factor.partition("_")
        part: LinearStructure = self.first if which == "first" else self.second
        return part, name

    def fans(self, factor: str) -> tuple[int, int]:
        """(fan in, fan out) of a factor, as in its part."""
        part, name = self._own(factor)
        return part.fans(name)

    def init_std(self, factor: str) -> float:
        """Standard deviation of a factor at initialisation: as in its part of m factors, times
        2^(-1/(2m))."""
        part, name = self._own(factor)
        return part.init_std(name) * math.pow(2.0, -0.5 / len(part.factors))

    def uses(self, factor: str) -> int:
        """As in its part."""
        part, name = self._own(factor)
        return part.uses(name)

    def adam_lr_multiplier(self, factor: str, d_in_base: int | None = None) -> float:
        """Half of that of the factor in its part."""
        part, name = self._own(factor)
        return part.adam_lr_multiplier(name, d_in_base) / 2


def inspect_sum(design: Sum, d_in: int, d_out: int) -> dict[str, object]:
    """Everything exact about a sum at d_in → d_out, as plain JSON values.

    `macs` and `flops` are per token and forward, `waste` is a fraction.  `parts` are the designs
    that are added, each with its own sizes and cost; where one is dense, the layer is one matrix.

    Raises
    ------
    InvalidInput
        As `structure_of` of a part.
    """
    structure = _structure_of(design, d_in, d_out)
    parts = [(part, structure_of(part, d_in, d_out)) for part in design.parts]
    if isinstance(structure, SumStructure):  # as its factors are named: first_A is of the first
        parts.sort(key=lambda each: each[1] != structure.first)
    return {
        **structure.counts(),
        "name": design.name,
        "text": design.text,
        "family": design.family,
        "parts": [
            {"name": part.name, "text": part.text, "macs": s.macs, "params": s.params,
             "fingerprint": s.fingerprint}
            for part, s in parts
        ],
        "rank": structure.rank,
        "rank_is": _rank_is(design, structure),
        "waste": structure.waste,
    }  # fmt: skip


def _rank_is(design: Sum, structure: Structure | SumStructure) -> Literal["generic", "upper bound"]:
    generic = isinstance(structure, Structure) or design.family != "sum"
    return "generic" if generic else "upper bound"


def _structure_of(design: Sum, d_in: int, d_out: int) -> Structure | SumStructure:
    """One dense matrix where a part is one."""
    return _added([structure_of(part, d_in, d_out) for part in design.parts])


def _added(parts: Sequence[LinearStructure]) -> Structure | SumStructure:
    one, other = parts
    if one.is_dense or other.is_dense:
        return Structure.of(DENSE, one.d_in, one.d_out)
    return SumStructure(one, other)


def _with_heads(
    structure: Structure | SumStructure, heads: int, side: str
) -> Structure | SumStructure:
    """Each part with heads that can have them; the other as it is."""
    if isinstance(structure, Structure):
        return with_heads(structure, heads, side)
    return _added([layer_family(s).with_heads(s, heads, side) for s in structure.parts])


def _has_blocks(design: Sum) -> bool:
    return any(family_of(part).has_blocks(part) for part in design.parts)


def _lowered(design: Sum, share: float) -> Sum:
    one, other = (family_of(part).lowered(part, share) for part in design.parts)
    return Sum((one, other))


def _fit(design: Sum, width: int, block: BlockOf) -> Design:
    """Both parts lowered together until no layer is degenerate."""
    return fit_by_lowering(design, block)


def _coordinates(name: str) -> dict[str, tuple[float, float]]:
    every = dict.fromkeys(_OPTIONS[name], (0.0, 1.0))
    # as of block-sparse layers by themselves, which share the coordinate
    return every | ({"blocks": (0.25, 1.0)} if "blocks" in every else {})


def _proposals(name: str) -> Proposals:
    return Proposals(_NAMED[name], coordinates=lambda choices: _coordinates(name))


FAMILY = Family(
    design=Sum,
    structure=_structure_of,
    layer="nas.layers.sum:SumLinear",
    structures=SumStructure,
    forms=SUM_FORMS,
    reads=lambda text: text.startswith("sum(") or text.partition(":")[0] in _OPTIONS,
    parse=parse_sum,
    inspect=inspect_sum,
    with_heads=_with_heads,
    has_blocks=_has_blocks,
    fit=_fit,
    lowered=_lowered,
    slow=True,
    proposals={name: _proposals(name) for name in _OPTIONS},
)
