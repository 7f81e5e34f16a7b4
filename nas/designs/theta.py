"""θ: a two-factor einsum structure as seven exponents.

    y[δ,ε,φ] = Σ_{α,β,γ,ρ}  B[β,γ,ε,φ,ρ] · A[α,γ,δ,φ,ρ] · x[α,β,γ]

α, β, γ factor the input (α is contracted by A only, β by B only, γ by both); δ, ε, φ factor the
output (δ made by A only, ε by B only, φ by both); ρ is the rank axis that only the factors share.
An axis of a layer d_in → d_out has size d_in^θ (α, β, γ), d_out^θ (δ, ε, φ) or
min(d_in, d_out)^θ (ρ).  Source: Potapczynski et al., arXiv:2410.02117, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any

from nas.errors import InvalidInput

AXES = ("alpha", "beta", "gamma", "delta", "epsilon", "phi", "rho")
#: How far a group of exponents may be from 1 (the papers write .33 and .67).
SUM_TOLERANCE = 0.01
#: The exponents of Monarch.
MONARCH = (0.5, 0.0, 0.5, 0.0, 0.5, 0.5, 0.0)
#: An exponent below this is an axis of size 1 at every dimension, and is taken as 0.
VANISHING = 1e-9
_FORM = "seven numbers alpha,beta,gamma,delta,epsilon,phi,rho such as 1/2,0,1/2,0,1/2,1/2,0"


@dataclass(frozen=True, slots=True)
class Theta:
    """A point of [0,1]^7 with alpha+beta+gamma = 1 and delta+epsilon+phi = 1 (within 0.01).

    >>> Theta(0.5, 0, 0.5, 0, 0.5, 0.5, 0).is_canonical
    True

    Raises
    ------
    InvalidInput
        An exponent outside [0, 1], or a group that does not sum to 1.
    """

    alpha: float
    beta: float
    gamma: float
    delta: float
    epsilon: float
    phi: float
    rho: float

    def __post_init__(self) -> None:
        for axis in AXES:
            checked = checked_exponent(getattr(self, axis), f"theta.{axis}")
            object.__setattr__(self, axis, checked)
        for group in (("alpha", "beta", "gamma"), ("delta", "epsilon", "phi")):
            total = sum(getattr(self, axis) for axis in group)
            # 1e-9: .33 + .66 must not fail by a rounding of the last bit
            if abs(total - 1.0) > SUM_TOLERANCE + 1e-9:
                given = ", ".join(f"{axis}={getattr(self, axis):g}" for axis in group)
                raise InvalidInput(
                    "theta",
                    f"{given} (sum {total:g})",
                    f"{' + '.join(group)} = 1 within {SUM_TOLERANCE}",
                )

    @classmethod
    def of(cls, values: Any) -> Theta:
        """A `Theta` from a `Theta`, or from seven numbers in the order of `AXES`."""
        if isinstance(values, Theta):
            return values
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise InvalidInput("theta", values, _FORM)
        listed = list(values)
        if len(listed) != len(AXES):
            raise InvalidInput("theta", listed, f"{_FORM}; got {len(listed)} numbers")
        return cls(*listed)

    @classmethod
    def parse(cls, text: str) -> Theta:
        """Read seven comma-separated decimals or fractions.

        >>> Theta.parse("1/2,0,1/2,0,1/2,1/2,1/4").rho
        0.25
        """
        parts = text.split(",")
        if len(parts) != len(AXES):
            raise InvalidInput("theta", text, f"{_FORM}; got {len(parts)} parts")
        return cls(
            *(parse_exponent(p, f"theta.{axis}") for p, axis in zip(parts, AXES, strict=True))
        )

    @property
    def values(self) -> tuple[float, ...]:
        """The seven exponents in the order of `AXES`."""
        # not `astuple`, whose deep copies are most of the time of planning a candidate
        return self.alpha, self.beta, self.gamma, self.delta, self.epsilon, self.phi, self.rho

    @property
    def exponents(self) -> tuple[float, ...]:
        """The seven exponents in the order of `AXES`."""
        return self.values

    @property
    def text(self) -> str:
        """The seven exponents in full precision."""
        return ",".join(map(exact_exponent, self.values))

    @property
    def family(self) -> str:
        return "einsum"

    @property
    def kind(self) -> str:
        """What a picture calls it."""
        return "dense" if self.is_dense else "two factors"

    @property
    def name(self) -> str:
        """The most specific family name with its exponents, or `einsum` for a θ without one.

        >>> Theta(0.5, 0, 0.5, 0, 0.5, 0.5, 0).name
        'monarch'
        """
        t = self.canonical()
        if t.is_dense:
            return "dense"
        zero = {axis for axis in AXES if getattr(t, axis) == 0}
        if {"beta", "gamma", "delta", "phi"} <= zero:
            return f"low-rank:rho={format_exponent(t.rho)}"
        alpha, epsilon, rho = (format_exponent(v) for v in (t.alpha, t.epsilon, t.rho))
        if {"beta", "delta"} <= zero:
            if t.values == MONARCH:
                return "monarch"
            if "phi" in zero:
                return f"block-dense:blocks={format_exponent(t.gamma)},rho={rho}"
            return f"btt:alpha={alpha},epsilon={epsilon},rho={rho}"
        if {"gamma", "phi"} <= zero:
            if "rho" in zero:
                return f"kronecker:alpha={alpha},epsilon={epsilon}"
            return f"tensor-train:alpha={alpha},epsilon={epsilon},rho={rho}"
        return "einsum"

    @property
    def described(self) -> str:
        """The name, with the numbers of a θ without one.

        >>> Theta(0.5, 0.25, 0.25, 0, 0.5, 0.5, 0).described
        'einsum 0.5,0.25,0.25,0,0.5,0.5,0'
        """
        name = self.name
        return f"einsum {','.join(f'{v:.3g}' for v in self.values)}" if name == "einsum" else name

    def swapped(self) -> Theta:
        """The same operators with the two factors exchanged."""
        return Theta(
            self.beta, self.alpha, self.gamma, self.epsilon, self.delta, self.phi, self.rho
        )

    @property
    def is_dense(self) -> bool:
        """Whether one factor has no private axis, so that it is absorbed and one matrix is left."""
        return (self.alpha == 0 and self.delta == 0) or (self.beta == 0 and self.epsilon == 0)

    def canonical(self) -> Theta:
        """The representative of {θ, swapped θ} with min(alpha, epsilon) ≥ min(beta, delta).

        A tie goes to the lexicographically larger (alpha, epsilon, gamma, phi); every θ with an
        absorbed factor is dense.
        """
        return _canonical(self)

    @property
    def is_canonical(self) -> bool:
        return self == self.canonical()

    def __str__(self) -> str:
        return ",".join(format_exponent(v) for v in self.values)


@lru_cache(maxsize=4096)  # a plan asks for that of one θ at many widths
def _canonical(theta: Theta) -> Theta:
    return DENSE if theta.is_dense else max(theta, theta.swapped(), key=_rank_of_labels)


def _rank_of_labels(theta: Theta) -> tuple[float, ...]:
    order = (
        min(theta.alpha, theta.epsilon) - min(theta.beta, theta.delta),
        theta.alpha,
        theta.epsilon,
        theta.gamma,
        theta.phi,
    )
    # 1 - 2/3 and 1/3 differ in their last bit, which may decide only where nothing else does
    return (*(round(v, 12) for v in order), *theta.values)


def checked_exponent(value: object, field: str) -> float:
    """`value` if it is a number from 0 to 1, as a float; next to nothing becomes 0."""
    number = isinstance(value, int | float | Fraction) and not isinstance(value, bool)
    if not number or not (math.isfinite(value) and 0.0 <= value <= 1.0):  # type: ignore[arg-type, operator]
        raise InvalidInput(field, value, "a number from 0 to 1")
    return 0.0 if value < VANISHING else float(value)  # type: ignore[arg-type, operator]


def parse_exponent(text: str, field: str) -> float:
    """A decimal (`0.25`) or a fraction (`1/4`) as a float.

    Short on purpose: `Fraction` reads `1e999999999` by building that integer.
    """
    stripped = text.strip()
    if 0 < len(stripped) <= 40 and all(c in "0123456789./" for c in stripped):
        try:
            return float(Fraction(stripped))
        except (ValueError, ZeroDivisionError):
            pass
    raise InvalidInput(field, text, "a decimal or a fraction from 0 to 1, such as 0.25 or 1/4")


def read_options(text: str, takes: Collection[str], field: str = "theta") -> dict[str, str]:
    """The options of ``name:option=value,…``: each one that the name takes, and once.

    >>> read_options("btt:rho=1/4", ["rho"])
    {'rho': '1/4'}
    """
    name, _, options = text.partition(":")
    found: dict[str, str] = {}
    for option in filter(None, (part.strip() for part in options.split(","))):
        key, _, value = option.partition("=")
        if key not in takes or key in found:
            listed = ", ".join(f"{option}=" for option in takes)
            accepted = f"{name} takes {f'{listed} each once' if takes else 'no options'}"
            raise InvalidInput(field, text, accepted)
        found[key] = value
    return found


def exact_exponent(value: float) -> str:
    """Decimals that `parse_exponent` reads back to the same float.

    >>> exact_exponent(1e-05)
    '0.00001'
    """
    return format(Decimal(repr(value)), "f")


def format_exponent(value: float) -> str:
    """The fraction with a denominator up to 12 that `value` is (to 1e-12), else four decimals."""
    near = Fraction(value).limit_denominator(12)
    return str(near) if abs(float(near) - value) < 1e-12 else f"{value:.4f}"


DENSE = Theta(0, 0, 1, 0, 0, 1, 0)
