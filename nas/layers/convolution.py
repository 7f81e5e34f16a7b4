"""`ConvolutionLinear`: a linear layer that is a circular convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from nas.designs.convolution import Convolution, ConvolutionStructure, parse_convolution
from nas.errors import InvalidInput
from nas.layers.base import StructuredLinear, sized
from nas.layers.modes import autocast_dtype
from nas.layers.normalization import cap_rms

_PLAN = "conv1d"


class ConvolutionLinear(StructuredLinear):
    """y = x Wᵀ + bias with W (d_out, d_in) blocks of circulants; shape (..., d_in) → (..., d_out).

    With z the input as channels (c_in, L), output channel o at position l is
    Σ_{i,k} A[o,i,k] · z[i, (l + k) mod L]; see `nas.designs.convolution`.

    Parameters
    ----------
    convolution
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
    _plan: str | None = None
    gain_A: Tensor | None

    def __init__(
        self,
        convolution: Convolution | str | ConvolutionStructure,
        d_in: int,
        d_out: int,
        bias: bool = True,
        *,
        zero_init: bool = False,
        normalize: bool = False,
        gain: bool = False,
        d_in_base: int | None = None,
        plan: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.structure = _structure(convolution, d_in, d_out)
        self.plan = plan
        self.in_features, self.out_features = d_in, d_out
        self.zero_init, self.normalize = zero_init, normalize
        self.d_in_base = d_in if d_in_base is None else d_in_base
        s = self.structure

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.A = empty(s.channels_out, s.channels_in, s.taps)
        self.register_parameter("gain_A", empty(1) if normalize and gain else None)
        self.register_parameter("bias", empty(d_out) if bias else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the kernel anew: normal, std sqrt(min(f_in, f_out)) / f_in."""
        self.A.normal_(0.0, self.structure.init_std("A"), generator=generator)
        if self.zero_init:
            self.A.zero_()
        if self.gain_A is not None:
            self.gain_A.fill_(1.0)
        if self.bias is not None:
            self.bias.zero_()

    def factors(self) -> dict[str, nn.Parameter]:
        """The kernel."""
        return {"A": self.A}

    def _effective(self) -> Tensor:
        if not self.normalize:
            return self.A
        return cap_rms(self.A, self.structure.init_std("A"), self.gain_A)

    def _product(self, x: Tensor) -> Tensor:
        kernel = self._effective()
        dtype = autocast_dtype(x.device, kernel.dtype)
        return self._convolved(x.to(dtype), kernel.to(dtype)).contiguous()

    def _plain(self, x: Tensor) -> Tensor:
        return self._convolved(x, self._effective())

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

    @property
    def plan(self) -> str | None:
        """``conv1d`` if that was fixed, else None; it is what runs either way."""
        return self._plan

    @plan.setter
    def plan(self, value: str | None) -> None:
        if value not in (None, _PLAN):
            raise InvalidInput("plan", value, f"None or {_PLAN}")
        self._plan = value

    def plan_for(
        self, tokens: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> str:
        """``conv1d``, for any input."""
        return _PLAN

    def to_matrix(self) -> Tensor:
        """The matrix W (d_out, d_in) that the layer applies, without the bias."""
        eye = torch.eye(self.in_features, dtype=self.A.dtype, device=self.A.device)
        return self._convolved(eye, self._effective()).t().contiguous()

    def extra_repr(self) -> str:
        s = self.structure
        return (
            f"{s.convolution.name}, d_in={s.d_in}, d_out={s.d_out}, bias={self.bias is not None}, "
            f"macs={s.macs}, rank={s.rank}"
        )


def _structure(
    convolution: Convolution | str | ConvolutionStructure, d_in: int, d_out: int
) -> ConvolutionStructure:
    if isinstance(convolution, ConvolutionStructure):
        return sized(convolution, d_in, d_out)
    found = parse_convolution(convolution) if isinstance(convolution, str) else convolution
    if not isinstance(found, Convolution):
        accepted = "a Convolution, its text, or a ConvolutionStructure"
        raise InvalidInput("convolution", found, accepted)
    return ConvolutionStructure.of(found, d_in, d_out)
