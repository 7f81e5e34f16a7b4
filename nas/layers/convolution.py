"""`ConvolutionLinear`: a linear layer that is a circular convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from nas.designs.convolution import Convolution, ConvolutionStructure, parse_convolution
from nas.layers.modes import autocast_dtype
from nas.layers.of_design import DesignLinear


class ConvolutionLinear(DesignLinear[Convolution, ConvolutionStructure]):
    """y = x Wᵀ + bias with W (d_out, d_in) blocks of circulants; shape (..., d_in) → (..., d_out).

    With z the input as channels (c_in, L), output channel o at position l is
    Σ_{i,k} A[o,i,k] · z[i, (l + k) mod L]; see `nas.designs.convolution`.

    Parameters
    ----------
    design
        A `Convolution`, its text, or the `ConvolutionStructure` of a layer d_in → d_out.
    d_in, d_out
        Any dimensions; inputs are zero-padded, outputs cut, at their end.
    bias, zero_init, normalize, gain, d_in_base
        As in `nas.layers.EinsumLinear`; the kernel is the only factor.
    plan
        None or ``"conv1d"``, the only way it is run.

    Raises
    ------
    InvalidInput
        The convolution, a dimension or the plan is not one that can be built.

    The kernel is the parameter ``A`` (c_out, c_in, taps).

    >>> layer = ConvolutionLinear("convolution:kernel=1/2", 64, 256)
    >>> layer(torch.zeros(5, 64)).shape
    torch.Size([5, 256])
    """

    structure: ConvolutionStructure
    family = "convolution"
    design_class = Convolution
    structure_class = ConvolutionStructure
    parse = staticmethod(parse_convolution)
    only_plan = "conv1d"

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        s = self.structure
        return {"A": (s.channels_out, s.channels_in, s.taps)}

    def blocks(self, factor: str, t: Tensor) -> Tensor:
        """The kernel as the matrix of a position, (..., 1, channels_out, channels_in · taps)."""
        return t.flatten(-2).unsqueeze(-3)

    def product(self, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
        (kernel,) = factors
        dtype = autocast_dtype(x.device, kernel.dtype)
        return self._convolved(x.to(dtype), kernel.to(dtype)).contiguous()

    def plain(self, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
        return self._convolved(x, *factors)

    def _convolved(self, x: Tensor, kernel: Tensor) -> Tensor:
        """(n, d_in) → (n, d_out)."""
        s = self.structure
        if s.padded_in > s.d_in:
            x = functional.pad(x, (0, s.padded_in - s.d_in))
        z = x.reshape(-1, s.channels_in, s.length)
        if s.taps > 1:
            z = torch.cat((z, z[..., : s.taps - 1]), dim=-1)  # what follows the end is the start
        y = functional.conv1d(z, kernel).flatten(1)
        return y[:, : s.d_out] if s.padded_out > s.d_out else y

    def _design_repr(self) -> str:
        return self.structure.convolution.name
