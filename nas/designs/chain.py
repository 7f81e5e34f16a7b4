"""θ of einsums of N factors in a chain; their integers are in `nas.designs.chain_structure`.

Factors F1 … FN stand in a row.  Every interval {i..j} of neighbours has one input axis and one
output axis, which exactly those factors share (the input axis with x, the output axis with y), and
every two neighbours share a rank axis, the bond.  So for N = 2

    y[δ,ε,φ] = Σ_{α,β,γ,ρ}  F2[β,γ,ε,φ,ρ] · F1[α,γ,δ,φ,ρ] · x[α,β,γ]

is the two-factor einsum of `nas.designs.theta`, with α, β, γ the input axes of {1}, {2}, {12},
likewise δ, ε, φ of the output, and ρ the bond.  An axis has size d_in^θ, d_out^θ or, for a bond,
min(d_in, d_out)^θ.  Two factors are the space of arXiv:2410.02117, section 3; that the axes of more
belong to intervals of a chain is our generalisation, which Tensor-Trains and BTT of N cores lie in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from nas.designs.design import shortened
from nas.designs.taxonomy import parse_theta
from nas.designs.theta import (
    DENSE,
    SUM_TOLERANCE,
    Theta,
    checked_exponent,
    exact_exponent,
    format_exponent,
    parse_exponent,
    read_options,
)
from nas.errors import InvalidInput

_NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
#: Most factors of a chain.
MAX_FACTORS = 5
CHAIN_FORMS = (
    "tensor-train:cores=3,rho=1/4 or btt:cores=3,rho=1/8 (2 to 5 cores; inputs=, outputs= and rho= "
    "also take one exponent for each, such as 1/2+1/4+1/4), or 7, 14, 23 or 34 exponents for 2, 3, "
    "4 or 5 factors: inputs of {1},{2},{3},{12},{23},{123}, outputs of the same, bonds"
)
Interval = tuple[int, int]
_Exponent = TypeVar("_Exponent", bound=float)
_LONGEST_TEXT = 2000  # characters


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


def count_of_exponents(factors: int) -> int:
    return factors * (factors + 1) + factors - 1


#: How many numbers θ has → how many factors.
_FACTORS = {count_of_exponents(n): n for n in range(2, MAX_FACTORS + 1)}


def axis_names(factors: int) -> tuple[str, ...]:
    """in_1 in_2 in_12 out_1 out_2 out_12 bond_1 and so on, in the order of θ."""
    spans = ["".join(map(str, range(i, j + 1))) for i, j in intervals(factors)]
    return (
        *(f"in_{s}" for s in spans),
        *(f"out_{s}" for s in spans),
        *(f"bond_{k}" for k in range(1, factors)),
    )


def split_axes(
    values: Sequence[_Exponent], factors: int
) -> tuple[dict[Interval, _Exponent], dict[Interval, _Exponent], list[_Exponent]]:
    spans = intervals(factors)
    inputs = dict(zip(spans, values[: len(spans)], strict=True))
    outputs = dict(zip(spans, values[len(spans) : 2 * len(spans)], strict=True))
    return inputs, outputs, list(values[2 * len(spans) :])


def reversed_axes(values: Sequence[_Exponent], factors: int) -> tuple[_Exponent, ...]:
    """The same chain read backwards: {i..j} becomes {N+1-j..N+1-i}."""
    inputs, outputs, bonds = split_axes(values, factors)
    mirrored = [(factors + 1 - j, factors + 1 - i) for i, j in intervals(factors)]
    return (*(inputs[s] for s in mirrored), *(outputs[s] for s in mirrored), *bonds[::-1])


def without_first(
    values: Sequence[_Exponent],
    factors: int,
    combine: Callable[[_Exponent, _Exponent], _Exponent],
) -> tuple[_Exponent, ...]:
    """The chain whose F1, without axes of its own, is absorbed by F2.

    What {1..j} and {2..j} had is one axis of the new first factors; the bond between is summed.
    """
    inputs, outputs, bonds = split_axes(values, factors)

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
        names = axis_names(_FACTORS[len(given)])
        checked = tuple(
            checked_exponent(value, f"theta.{name}")
            for name, value in zip(names, given, strict=True)
        )
        object.__setattr__(self, "values", checked)
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
        names = axis_names(_FACTORS[len(parts)])
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
        return ChainTheta(reversed_axes(self.values, self.factors))

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
            values = without_first(theta.values, theta.factors, lambda a, b: min(1.0, a + b))
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
        return max(theta, theta.reversed(), key=rank_of_direction)

    @property
    def exponents(self) -> tuple[float, ...]:
        """The numbers in order."""
        return self.values

    @property
    def family(self) -> str:
        """``einsum3`` of three factors, and so on."""
        return f"einsum{self.factors}"

    @property
    def kind(self) -> str:
        """What a picture calls it."""
        return f"{_NUMBERS[self.factors]} factors"

    @property
    def name(self) -> str:
        """A short name, rounded: that of a family with its exponents, else ``einsum3``.

        >>> ChainTheta.parse("1/2,1/4,1/4,0,0,0,1/3,1/3,1/3,0,0,0,1/4,1/4").name
        'tensor-train:cores=3,inputs=1/2+1/4+1/4,rho=1/4'
        """
        name = self.full_name
        return self.family if " " in name or name != shortened(name) else name

    @property
    def described(self) -> str:
        """The name, with the numbers of a chain without one."""
        name = self.name
        if name != self.family:
            return name
        return f"{name} {','.join(f'{v:.3g}' for v in self.values)}"

    @property
    def full_name(self) -> str:
        """As `name`, whatever its length, and with the numbers of the canonical chain."""
        found = self.canonical()
        if isinstance(found, Theta):
            return found.described
        for theta in (found, found.reversed()):
            for family, (of_inputs, of_outputs) in _families(theta.factors).items():
                rest = set(intervals(theta.factors))
                inputs, outputs, bonds = split_axes(theta.values, theta.factors)
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


def rank_of_direction(theta: ChainTheta) -> tuple[float, ...]:
    n = theta.factors
    inputs, outputs, _ = split_axes(theta.values, n)
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
        theta = _named(text.strip(), name)
    return Theta(*theta.values) if theta.factors == 2 else theta


def is_chain(text: str) -> bool:
    """Whether a text looks like a chain: a name with ``cores=``, or more than seven numbers."""
    name = text.partition(":")[0]
    if name[:1].isalpha():
        return name in _TWO_FACTORS and "cores=" in text
    return text.count(",") >= 7


#: What `parse_theta` reads.
_TWO_FACTORS = ("dense", "low-rank", "kronecker", "tensor-train", "monarch", "btt")


def _named(text: str, family: str) -> ChainTheta:
    if family not in _families(2):
        raise InvalidInput("theta", text, CHAIN_FORMS)
    given = read_options(text, ("cores", "inputs", "outputs", "rho"))
    counts = {str(n): n for n in range(2, MAX_FACTORS + 1)}
    cores = counts.get(given["cores"], 0)
    if not cores:
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
