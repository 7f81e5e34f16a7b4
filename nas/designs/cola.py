"""Two factors with a nonlinearity between them, y = B act(A x), after CoLA (arXiv:2502.10940).

    z[β,γ,δ,φ,ρ] = Σ_α A[α,γ,δ,φ,ρ] · x[α,β,γ]
    y[δ,ε,φ]     = Σ_{β,γ,ρ} B[β,γ,ε,φ,ρ] · act(z[β,γ,δ,φ,ρ])

The axes are those of θ, see `nas.designs.theta`, and act is silu, gelu or relu of each number of z,
of which there are βγδφρ per token.  ``cola-mlp`` is the paper's: low-rank, with silu.

What holds of two factors without the activation and not with it:

- The layer is no matrix, and has no rank.
- Exchanging A and B gives another function, so that θ as it is given is the canonical form, and A
  is always contracted first: F_A = βγδφρ(α + ε) MACs per token, even where F_B is less.
- A factor without axes of its own is not absorbed.  No θ that is dense is taken; where axes of
  another one round to 1, both factors are kept.

1 MAC = 2 FLOPs; the activation, like those of a model, is not charged.

Initialisation and learning rates are those of the two factors.  The activation multiplies the RMS
of normal z by a number between 1/2 and 1/√2: relu by 1/√2, silu by 1/2 where z is small, as it is
at first for low ranks, to 0.60 at variance 1, gelu by 1/2 to 0.65.  These bounds hold at every
width, so that no rule of scaling changes, and nothing makes up for the constant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar, Literal, get_args

from nas.designs.design import BlockOf, Design, Family, Proposals, shortened
from nas.designs.einsum import Factor, Sizes, fit_labelled, sizes_of, theta_of
from nas.designs.structure import LinearStructure, check_dimensions
from nas.designs.taxonomy import parse_theta
from nas.designs.theta import (
    DENSE,
    Theta,
    exact_exponent,
    format_exponent,
    parse_exponent,
    read_options,
)
from nas.errors import InvalidInput

Activation = Literal["silu", "gelu", "relu"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
COLA_FORMS = (
    "cola-mlp:rank=1/2,activation=silu, or activated(btt:rho=1/4;silu) of any two factors that are "
    f"not dense with {', '.join(ACTIVATIONS)} between them"
)
#: Options of ``cola-mlp`` with their defaults.
_OPTIONS = {"rank": "1/2", "activation": "silu"}


@dataclass(frozen=True, slots=True)
class Activated(Design):
    """Two factors with an activation between them; canonical as it is, see the module.

    >>> Activated(Theta(1, 0, 0, 0, 1, 0, 0.5)).name
    'cola-mlp:rank=1/2,activation=silu'

    Raises
    ------
    InvalidInput
        θ that is no `Theta`, or dense; an activation that is not one of `ACTIVATIONS`.
    """

    theta: Theta
    activation: str = "silu"

    def __post_init__(self) -> None:
        if not isinstance(self.theta, Theta) or self.theta.is_dense:
            raise InvalidInput("cola", self.theta, "the θ of two factors that is not dense")
        if self.activation not in ACTIVATIONS:
            raise InvalidInput("cola.activation", self.activation, " | ".join(ACTIVATIONS))

    def _told(self, exponent: Callable[[float], str], of_theta: str) -> str:
        if self.family == "cola-mlp":
            return f"cola-mlp:rank={exponent(self.theta.rho)},activation={self.activation}"
        return f"activated({of_theta};{self.activation})"

    @property
    def name(self) -> str:
        """That of cola-mlp, else the name of θ with the activation."""
        # names are those of the canonical form, and do not say which factor is A
        name = self.theta.name if self.theta.is_canonical else "einsum"
        return self._told(format_exponent, name)

    @property
    def described(self) -> str:
        """The name, with the numbers of a θ without one."""
        described = self.theta.described if self.theta.is_canonical else f"einsum {self.theta}"
        return shortened(self._told(format_exponent, described))

    @property
    def text(self) -> str:
        """Exact: `parse_cola` gives back an equal design."""
        return self._told(exact_exponent, self.theta.text)

    @property
    def family(self) -> str:
        """cola-mlp or activated."""
        return "cola-mlp" if self.theta == _low_rank(self.theta.rho) else "activated"

    @property
    def kind(self) -> str:
        return "activated"


def _low_rank(rank: float) -> Theta:
    return Theta(1, 0, 0, 0, 1, 0, rank)


def parse_cola(text: str) -> Activated:
    """Read ``cola-mlp`` with its options, or ``activated(θ;activation)`` with any text of a θ.

    >>> parse_cola("activated(monarch;relu)").theta.name
    'monarch'

    Raises
    ------
    InvalidInput
        Another name or option, an exponent off its range, a part that is not two factors, dense
        ones, or an unknown activation.
    """
    if not isinstance(text, str):
        raise InvalidInput("cola", text, COLA_FORMS)
    stripped = text.strip()
    if stripped.partition(":")[0] == "cola-mlp":
        options = _OPTIONS | read_options(stripped, _OPTIONS, "cola")
        rank = parse_exponent(options["rank"], "cola.rank")
        if rank > 1:
            raise InvalidInput("cola.rank", options["rank"], "a number from 0 to 1")
        return Activated(_low_rank(rank), options["activation"])
    inside = stripped.removeprefix("activated(").removesuffix(")")
    parts = inside.split(";")
    if len(inside) + len("activated()") != len(stripped) or len(parts) != 2:
        raise InvalidInput("cola", text, COLA_FORMS)
    return Activated(parse_theta(parts[0]), parts[1].strip())


@lru_cache(maxsize=65536)
def _sizes(theta: Theta, d_in: int, d_out: int) -> Sizes:
    return sizes_of(theta, d_in, d_out)


@dataclass(frozen=True)
class ActivatedStructure(LinearStructure):
    """Two factors with an activation for a layer d_in → d_out, as integers; no linear operator.

    >>> s = ActivatedStructure.of(parse_cola("cola-mlp:rank=1/2"), 256, 1024)
    >>> s.intermediate, s.macs, s.params  # 16 · (256 + 1024)
    (16, 20480, 20480)
    """

    is_linear: ClassVar[bool] = False
    design: Activated
    d_in: int
    d_out: int

    def __post_init__(self) -> None:
        check_dimensions(self.d_in, self.d_out)

    @staticmethod
    def of(design: Activated, d_in: int, d_out: int) -> ActivatedStructure:
        """The structure of a design for a layer with `d_in` inputs and `d_out` outputs.

        Raises
        ------
        InvalidInput
            A dimension that is not a whole number from 1 to 2^24.
        """
        return ActivatedStructure(design, d_in, d_out)

    @cached_property
    def sizes(self) -> Sizes:
        """The axes of A and B, as they are labelled in the design."""
        return _sizes(self.design.theta, self.d_in, self.d_out)

    @property
    def intermediate(self) -> int:
        """Numbers per token between the factors, βγδφρ, each through the activation."""
        s = self.sizes
        return s.beta * s.gamma * s.delta * s.phi * s.rho

    @property
    def macs(self) -> int:
        """Multiply-accumulates per token of both factors, A first; padding included."""
        return self.sizes.macs_a_first

    @property
    def params(self) -> int:
        """Parameters of both factors, bias not counted."""
        return self.sizes.params

    @property
    def is_dense(self) -> bool:
        """Never: it is no matrix."""
        return False

    @property
    def waste(self) -> float:
        """MACs spent on padding and on cut outputs, as a share of the other MACs."""
        return self.sizes.waste(self.d_in, self.d_out)

    @cached_property
    def fingerprint(self) -> str:
        """Equal for equal functions of equal factors: dimensions, activation and sizes."""
        sizes = ".".join(str(n) for n in asdict(self.sizes).values())
        return f"{self.d_in}x{self.d_out}:{self.design.activation}:{sizes}"

    @property
    def factors(self) -> tuple[Factor, ...]:
        """A, before the activation, and B."""
        return ("A", "B")

    def fans(self, factor: str) -> tuple[int, int]:
        """(fan in, fan out) of a factor as a batched matrix: A: α → δφρ;  B: βγρ → ε."""
        self.check_factor(factor)
        return self.sizes.fans(factor)

    def uses(self, factor: str) -> int:
        """As of two factors without an activation."""
        self.check_factor(factor)
        return self.sizes.uses(factor)

    def adam_lr_multiplier(self, factor: str, d_in_base: int | None = None) -> float:
        """As of two factors without an activation: d_in_base / (2 f_in)."""
        base = self.d_in if d_in_base is None else d_in_base
        return base / (2 * self.fans(factor)[0])


def inspect_cola(design: Activated, d_in: int, d_out: int) -> dict[str, object]:
    """Everything exact about two factors with an activation at d_in → d_out, as plain JSON values.

    `macs` and `flops` are per token and forward, `waste` is a fraction, and `intermediate` counts
    the numbers per token between the factors.

    Raises
    ------
    InvalidInput
        As `ActivatedStructure.of`.
    """
    structure = ActivatedStructure.of(design, d_in, d_out)
    s = structure.sizes
    return {
        **structure.counts(),
        "name": design.name,
        "text": design.text,
        "family": design.family,
        "theta": list(design.theta.values),
        "activation": design.activation,
        "linear": structure.is_linear,
        "intermediate": structure.intermediate,
        "sizes": asdict(s),
        "contraction": ["agdfr,...abg->...bgdfr", "bgefr,...bgdfr->...def"],
        "padded_in": s.inputs,
        "padded_out": s.outputs,
        "waste": structure.waste,
    }


def _fit(design: Activated, width: int, block: BlockOf) -> Design:
    """θ fitted as without the activation, but with A first; dense where nothing else is left."""
    activation = design.activation
    theta = fit_labelled(design.theta, width, lambda t: block(_activated(t, activation)))
    return _activated(theta, activation)


def _activated(theta: Any, activation: str) -> Design:
    return DENSE if theta.is_dense else Activated(theta, activation)


def _of_point(point: Mapping[str, Any]) -> Design:
    """A canonical θ, of which A first is the cheaper order."""
    return Activated(theta_of(point), point["activation"])


FAMILY = Family(
    design=Activated,
    structure=ActivatedStructure.of,
    layer="nas.layers.cola:ActivatedLinear",
    structures=ActivatedStructure,
    forms=COLA_FORMS,
    reads=lambda text: text.startswith("activated(") or text.partition(":")[0] == "cola-mlp",
    parse=parse_cola,
    inspect=inspect_cola,
    fit=_fit,
    proposals={
        "cola-mlp": Proposals(
            lambda point: Activated(_low_rank(point["rank"]), point["activation"]),
            choices=("activation",),
            coordinates=lambda choices: {"rank": (0.0, 1.0)},
            examples=lambda choices: [
                "cola-mlp" if a == _OPTIONS["activation"] else f"cola-mlp:activation={a}"
                for a in choices.activation
            ],
        ),
        "activated": Proposals(
            _of_point,
            choices=("activation",),
            examples=lambda choices: [f"activated(monarch;{a})" for a in choices.activation],
        ),
    },
)
