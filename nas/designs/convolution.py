"""Convolutions as a baseline outside the space of θ: blocks of circulant matrices with few taps.

With L = min(d_in, d_out), W is ⌈d_out/L⌉ × ⌈d_in/L⌉ blocks, each an L × L circulant matrix of
K = L^kernel taps: a circular convolution of ⌈d_in/L⌉ channels to ⌈d_out/L⌉.  Every parameter is
used L times, which no θ with as much compute does.  Inputs are zero-padded at their end, surplus
outputs cut at theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from nas.designs.design import Design, Family, Proposals
from nas.designs.structure import LinearStructure, check_dimensions
from nas.designs.theta import checked_exponent, exact_exponent, format_exponent, parse_exponent
from nas.errors import InvalidInput

CONVOLUTION_FORM = "convolution or convolution:kernel=1/2, with a kernel from 0 to 1"


@dataclass(frozen=True, slots=True)
class Convolution(Design):
    """A circular convolution whose kernel has L^kernel taps; see the module.

    >>> Convolution(0.5).name
    'convolution:kernel=1/2'

    Raises
    ------
    InvalidInput
        A kernel that is not a number from 0 to 1.
    """

    kernel: float = 0.5

    def __post_init__(self) -> None:
        checked = checked_exponent(self.kernel, "convolution.kernel")
        object.__setattr__(self, "kernel", checked)

    @property
    def name(self) -> str:
        """A short name, rounded."""
        return f"convolution:kernel={format_exponent(self.kernel)}"

    @property
    def family(self) -> str:
        return "convolution"

    @property
    def text(self) -> str:
        """The convolution in full precision, which `parse_convolution` reads."""
        return f"convolution:kernel={exact_exponent(self.kernel)}"


def parse_convolution(text: str) -> Convolution:
    """Read ``convolution`` or ``convolution:kernel=1/2``.

    Raises
    ------
    InvalidInput
        Another name or option, or a kernel off its range.
    """
    if not isinstance(text, str):
        raise InvalidInput("convolution", text, CONVOLUTION_FORM)
    name, colon, option = text.strip().partition(":")
    if name != "convolution":
        raise InvalidInput("convolution", text, CONVOLUTION_FORM)
    if not colon:
        return Convolution()
    key, _, value = option.partition("=")
    if key != "kernel":
        raise InvalidInput("convolution", text, CONVOLUTION_FORM)
    return Convolution(parse_exponent(value, "convolution.kernel"))


@dataclass(frozen=True)
class ConvolutionStructure(LinearStructure):
    """A convolution d_in → d_out, as integers.  Build one with `ConvolutionStructure.of`.

    >>> s = ConvolutionStructure.of(Convolution(0.5), 1024, 4096)
    >>> s.length, s.channels_in, s.channels_out, s.taps, s.macs, s.params
    (1024, 1, 4, 32, 131072, 128)
    """

    convolution: Convolution
    d_in: int
    d_out: int

    def __post_init__(self) -> None:
        check_dimensions(self.d_in, self.d_out)

    @staticmethod
    def of(convolution: Convolution, d_in: int, d_out: int) -> ConvolutionStructure:
        """The structure of a convolution for a layer with `d_in` inputs and `d_out` outputs.

        Raises
        ------
        InvalidInput
            A dimension that is not a whole number from 1 to 2^24.
        """
        return ConvolutionStructure(convolution, d_in, d_out)

    @property
    def length(self) -> int:
        """L = min(d_in, d_out), the size of a block."""
        return min(self.d_in, self.d_out)

    @property
    def channels_in(self) -> int:
        """⌈d_in / L⌉."""
        return -(-self.d_in // self.length)

    @property
    def channels_out(self) -> int:
        """⌈d_out / L⌉."""
        return -(-self.d_out // self.length)

    @property
    def taps(self) -> int:
        """K = round(L^kernel), from 1 to L."""
        taps: int = round(math.pow(self.length, self.convolution.kernel))
        return max(1, min(self.length, taps))

    @property
    def padded_in(self) -> int:
        """Inputs after zero-padding."""
        return self.channels_in * self.length

    @property
    def padded_out(self) -> int:
        """Outputs before the cut."""
        return self.channels_out * self.length

    @property
    def params(self) -> int:
        """Taps of all blocks, bias not counted."""
        return self.channels_in * self.channels_out * self.taps

    @property
    def macs(self) -> int:
        """Multiply-accumulates per token, one per tap and position; padding included.

        As many as the products that are summed, so that compute means the same for every
        structure; an FFT, which would take fewer for many taps, is not counted.
        """
        return self.params * self.length

    @property
    def waste(self) -> float:
        """MACs spent on padding and on cut outputs, as a share of the other MACs."""
        useful = (
            self.taps * (self.channels_out * self.d_in + self.channels_in * self.d_out) - self.macs
        )  # surplus is on one side only, for L is a dimension
        return (self.macs - useful) / useful

    @property
    def is_dense(self) -> bool:
        """Whether it is any d_out × d_in matrix, which it is where L = 1."""
        return self.length == 1

    @property
    def rank(self) -> int:
        """Generic rank, min(d_in, d_out): exact for random taps.

        One block is an L × L circulant, with eigenvalues that are the discrete Fourier transform
        of its taps, none of which is zero for taps in general position.  L = min(d_in, d_out), so
        one side is one block alone and uncut, and that block has all L dimensions.
        """
        return min(self.d_in, self.d_out)

    @cached_property
    def fingerprint(self) -> str:
        """Equal for equal integer operators: dimensions and taps."""
        return f"{self.d_in}x{self.d_out}:convolution:{self.taps}"

    @property
    def factors(self) -> tuple[str, ...]:
        """The one factor, A: the kernel."""
        return ("A",)

    def fans(self, factor: str) -> tuple[int, int]:
        """(fan in, fan out) of the kernel: c_in·K → c_out·K, what one output sums and what one
        input reaches."""
        self.check_factor(factor)
        return self.channels_in * self.taps, self.channels_out * self.taps

    def uses(self, factor: str) -> int:
        """How many vectors of one token the kernel multiplies: L, one at each position."""
        self.check_factor(factor)
        return self.length

    def adam_lr_multiplier(self, factor: str, d_in_base: int | None = None) -> float:
        """Adam learning rate of the kernel, relative to a dense base layer with `d_in_base`
        inputs: d_in_base / f_in; `d_in_base` is this layer's own d_in unless given."""
        base = self.d_in if d_in_base is None else d_in_base
        return base / self.fans(factor)[0]


def inspect_convolution(convolution: Convolution, d_in: int, d_out: int) -> dict[str, object]:
    """Everything exact about a convolution at d_in → d_out, as plain JSON values.

    `macs` and `flops` are per token and forward, `waste` is a fraction.

    Raises
    ------
    InvalidInput
        As `ConvolutionStructure.of`.
    """
    structure = ConvolutionStructure.of(convolution, d_in, d_out)
    return {
        **structure.counts(),
        "convolution": convolution.text,
        "kernel": convolution.kernel,
        "name": convolution.name,
        "length": structure.length,
        "channels_in": structure.channels_in,
        "channels_out": structure.channels_out,
        "taps": structure.taps,
        "rank": structure.rank,
        "padded_in": structure.padded_in,
        "padded_out": structure.padded_out,
        "waste": structure.waste,
        "factors": [
            {
                **structure.factor_row(f),
                "shape": [structure.channels_out, structure.channels_in, structure.taps],
            }
            for f in structure.factors
        ],
    }


FAMILY = Family(
    design=Convolution,
    structure=ConvolutionStructure.of,
    layer="nas.layers.convolution:ConvolutionLinear",
    structures=ConvolutionStructure,
    forms="convolution:kernel=1/2",
    reads=lambda text: text.partition(":")[0] == "convolution",
    parse=parse_convolution,
    inspect=inspect_convolution,
    lowered=lambda convolution, share: Convolution(convolution.kernel * share),
    proposals={
        "convolution": Proposals(
            lambda point: Convolution(point["kernel"]),
            coordinates=lambda choices: {"kernel": (0.0, 1.0)},
        )
    },
)
