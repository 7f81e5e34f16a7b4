"""What the integers of any structured linear layer tell, of whatever family."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, get_args

from nas.errors import InvalidInput

#: Largest dimension of a layer; indices of its padded product stay far inside 64 bits.
MAX_DIMENSION = 1 << 24
#: How d^θ becomes integers: axes whose product covers the dimension, or each rounded on its own.
Sizing = Literal["least-waste", "paper"]
#: Which rule sets standard deviations and learning rates of factors: that of arXiv:2406.06248, or
#: the spectral condition with what is said of factors that a token meets several times.
Parametrization = Literal["published", "spectral"]
PARAMETRIZATIONS: tuple[Parametrization, ...] = get_args(Parametrization)


class LinearStructure(ABC):
    """A linear operator d_in → d_out, as integers, or what replaces one.  1 MAC = 2 FLOPs."""

    #: whether it multiplies a token by a matrix; of mixtures, by one that the token chooses
    is_linear: ClassVar[bool] = True
    d_in: Any
    d_out: Any

    @property
    @abstractmethod
    def macs(self) -> int:
        """Multiply-accumulates per token, padding included."""

    @property
    @abstractmethod
    def params(self) -> int:
        """Learned numbers, bias not counted."""

    @property
    @abstractmethod
    def is_dense(self) -> bool:
        """Whether it is one d_out × d_in matrix."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Equal for equal integer operators."""

    @property
    @abstractmethod
    def factors(self) -> tuple[str, ...]:
        """Names of the factors, in the order they are contracted; a gate is none of them."""

    @abstractmethod
    def fans(self, factor: str) -> tuple[int, int]:
        """(fan in, fan out) of a factor (or gate)."""

    @abstractmethod
    def adam_lr_multiplier(self, factor: str, d_in_base: int | None = None) -> float:
        """Adam learning rate of a factor (or gate) over that of a dense base layer with
        `d_in_base` inputs, by default this layer's own d_in."""

    def uses(self, factor: str) -> int:
        """How many different vectors of one token each matrix of a factor multiplies."""
        self.check_factor(factor)
        return 1

    @property
    def flops(self) -> int:
        """Forward FLOPs per token: 2 × MACs."""
        return 2 * self.macs

    @property
    def is_degenerate(self) -> bool:
        """Whether it costs more than the dense layer, which expresses every linear operator."""
        dense: int = self.d_in * self.d_out
        return self.macs > dense

    def init_std(self, factor: str) -> float:
        """Standard deviation of a factor at initialisation: sqrt(min(f_in, f_out)) / f_in.

        Source: arXiv:2406.06248, section 3.2.
        """
        fan_in, fan_out = self.fans(factor)
        return math.sqrt(min(fan_in, fan_out)) / fan_in

    def spectral_gains(self, factor: str) -> tuple[float, float]:
        """What the spectral parametrization multiplies the standard deviation of a factor by, and
        its Adam learning rate; both are 1 where a token meets the factor once.

        With s uses: sqrt(min(f_in, s f_out) / min(f_in, f_out)), sqrt(min(s, f_in, f_out)).
        Derivation: docs/explanation/theta.md.
        """
        (fan_in, fan_out), uses = self.fans(factor), self.uses(factor)
        narrow = min(fan_in, fan_out)
        return math.sqrt(min(fan_in, uses * fan_out) / narrow), math.sqrt(min(uses, narrow))

    def counts(self) -> dict[str, object]:
        """What `inspect_design` tells of every family; `macs` and `flops` per token and forward."""
        return {
            "d_in": self.d_in, "d_out": self.d_out, "macs": self.macs, "flops": self.flops,
            "params": self.params, "dense_macs": self.d_in * self.d_out,
            "degenerate": self.is_degenerate, "fingerprint": self.fingerprint,
            "factors": [self.factor_row(factor) for factor in self.factors],
        }  # fmt: skip

    def check_factor(self, factor: str) -> None:
        """Raises `InvalidInput` for a name that no factor has."""
        if factor not in self.factors:
            raise InvalidInput("factor", factor, " | ".join(self.factors))

    def factor_row(self, factor: str) -> dict[str, object]:
        """What is told of a factor (or gate): its fans, initialisation and learning rate."""
        fan_in, fan_out = self.fans(factor)
        return {
            "name": factor,
            "fan_in": fan_in,
            "fan_out": fan_out,
            "init_std": self.init_std(factor),
            "adam_lr_multiplier": self.adam_lr_multiplier(factor),
        }


def check_dimensions(d_in: object, d_out: object) -> None:
    """Raises `InvalidInput` unless both are whole numbers from 1 to 2^24."""
    for field, value in (("d_in", d_in), ("d_out", d_out)):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (whole and 1 <= value <= MAX_DIMENSION):  # type: ignore[operator]
            raise InvalidInput(field, value, f"a whole number from 1 to {MAX_DIMENSION}")
