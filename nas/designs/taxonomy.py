"""Reading a θ from its name among the known families; ω, ψ, ν (arXiv:2410.02117, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

from nas.designs.theta import DENSE, MONARCH, Theta, parse_exponent, read_options
from nas.errors import InvalidInput

#: Family → its default exponents. Private axes given to a family change their complement too.
_FAMILIES: dict[str, dict[str, float]] = {
    "dense": {},
    "low-rank": {"rho": 0.5},
    "kronecker": {"alpha": 0.5, "epsilon": 0.5},
    "tensor-train": {"alpha": 0.5, "epsilon": 0.5, "rho": 0.25},
    "monarch": {},
    "btt": {"alpha": 0.5, "epsilon": 0.5, "rho": 0.25},
    "block-dense": {"blocks": 0.25, "rho": 0.5},
}
NAMED_FORMS = (
    "dense, low-rank:rho=1/2, kronecker, tensor-train:rho=1/4, monarch, btt:rho=1/4, "
    "block-dense:blocks=1/4,rho=1/2 "
    "(kronecker, tensor-train and btt also take alpha= and epsilon=), "
    "or seven numbers alpha,beta,gamma,delta,epsilon,phi,rho such as 1/2,0,1/2,0,1/2,1/2,0"
)


@dataclass(frozen=True, slots=True)
class Taxonomy:
    """Scaling exponents of a θ for a square layer of dimension d."""

    #: compute per parameter is d^omega; 0 means no parameter is shared
    omega: float
    #: rank is d^psi; 1 is full rank
    psi: float
    #: compute is d^(1 + nu); 1 is dense
    nu: float


def taxonomy(theta: Theta) -> Taxonomy:
    """ω, ψ and ν, which hold for the canonical form and are therefore taken there.

    >>> taxonomy(parse_theta("monarch"))
    Taxonomy(omega=0.0, psi=1.0, nu=0.5)
    """
    t = theta.canonical()
    inner = min(t.alpha, t.epsilon)
    return Taxonomy(
        omega=_clean(min(t.alpha + t.delta, t.beta + t.epsilon) - inner),
        psi=_clean(1.0 + min(0.0, 1.0 + t.rho - t.alpha - t.epsilon)),
        nu=_clean(1.0 + t.rho - inner),
    )


def _clean(value: float) -> float:
    """Round away the last bits, so that 1 - .33 - .67 is 0."""
    return round(value, 12) + 0.0


def is_named(text: str) -> bool:
    """Whether a text looks like two factors: a name without ``cores=``, or up to seven numbers."""
    name = text.partition(":")[0]
    if name[:1].isalpha():
        return name in _FAMILIES and "cores=" not in text
    return bool(text) and text.count(",") < 7


def parse_theta(text: str) -> Theta:
    """A θ from its seven numbers or from a name.

    >>> str(parse_theta("btt:rho=1/4"))
    '1/2,0,1/2,0,1/2,1/2,1/4'

    Raises
    ------
    InvalidInput
        Unknown name, unknown or missing exponent, or an exponent off its range.
    """
    if not isinstance(text, str) or len(text) > 400:
        raise InvalidInput("theta", text, NAMED_FORMS)
    name = text.strip().partition(":")[0]
    if name not in _FAMILIES:
        if name[:1].isdigit() or name[:1] in "-.+":
            return Theta.parse(text)
        raise InvalidInput("theta", text, NAMED_FORMS)
    exponents = dict(_FAMILIES[name])
    for axis, value in read_options(text.strip(), exponents).items():
        exponents[axis] = parse_exponent(value, f"theta.{axis}")
        if exponents[axis] > 1:
            raise InvalidInput(f"theta.{axis}", value, "a number from 0 to 1")
    return _named(name, exponents)


def _named(name: str, e: dict[str, float]) -> Theta:
    if name == "dense":
        return DENSE
    if name == "low-rank":
        return Theta(1, 0, 0, 0, 1, 0, e["rho"])
    if name == "monarch":
        return Theta(*MONARCH)
    if name == "block-dense":
        return Theta(1 - e["blocks"], 0, e["blocks"], 0, 1, 0, e["rho"])
    alpha, epsilon, rho = e["alpha"], e["epsilon"], e.get("rho", 0.0)
    if name == "btt":
        return Theta(alpha, 0, 1 - alpha, 0, epsilon, 1 - epsilon, rho)
    return Theta(alpha, 1 - alpha, 0, 1 - epsilon, epsilon, 0, rho)
