"""`EinsumLinear`: a linear layer whose matrix is a two-factor einsum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nas.layers.contraction import two_factor_product
from nas.layers.normalization import cap_rms
from nas.structure import Factor, Structure
from nas.taxonomy import parse_theta
from nas.theta import Theta


class EinsumLinear(nn.Module):
    """y = x Wᵀ + bias with W (d_out, d_in) of the structure θ; shape (..., d_in) → (..., d_out).

    Parameters
    ----------
    theta
        A `Theta`, seven exponents, or a name such as ``"btt:rho=1/4"``.
    d_in, d_out
        Any dimensions.  Where they cannot be factored near θ the input is zero-padded at its end
        and surplus outputs are cut; no input is dropped and no output is constant.
    bias
        Whether to add a learned bias (d_out,), zero at initialisation.
    zero_init
        Start as the zero map, as the last layer of a residual branch does: only the factor that
        is contracted last is zero, so that gradients flow.
    normalize
        Cap the RMS of each factor at its initial standard deviation σ: W / max(1, RMS(W)/σ),
        differentiated through.  Source: arXiv:2410.02117, appendix.
    gain
        With `normalize`, a learned scalar per factor.
    d_in_base
        Input dimension of this layer in the base model at which the learning rate was tuned;
        see `nas.layers.param_groups`.  Default: d_in.

    The factors are the parameters ``A`` (γ, ρ, φ, δ, α) and ``B`` (φ, γ, ρ, β, ε); a dense layer
    has ``weight`` (d_out, d_in) instead, as `torch.nn.Linear`.

    >>> layer = EinsumLinear("monarch", 64, 256)
    >>> layer(torch.zeros(5, 64)).shape
    torch.Size([5, 256])
    """

    bias: Tensor | None
    gain_A: Tensor | None
    gain_B: Tensor | None

    def __init__(
        self,
        theta: Theta | str | Sequence[float],
        d_in: int,
        d_out: int,
        bias: bool = True,
        *,
        zero_init: bool = False,
        normalize: bool = False,
        gain: bool = False,
        d_in_base: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        parsed = parse_theta(theta) if isinstance(theta, str) else Theta.of(theta)
        self.structure = Structure.of(parsed, d_in, d_out)
        self.in_features, self.out_features = d_in, d_out
        self.zero_init, self.normalize = zero_init, normalize
        self.d_in_base = d_in if d_in_base is None else d_in_base
        s = self.structure.sizes

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        if self.structure.is_dense:
            self.weight = empty(d_out, d_in)
        else:
            self.A = empty(s.gamma, s.rho, s.phi, s.delta, s.alpha)
            self.B = empty(s.phi, s.gamma, s.rho, s.beta, s.epsilon)
        one_gain = normalize and gain
        self.register_parameter("gain_A", empty() if one_gain else None)
        self.register_parameter(
            "gain_B", empty() if one_gain and not self.structure.is_dense else None
        )
        self.register_parameter("bias", empty(d_out) if bias else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the factors anew: normal, std sqrt(min(f_in, f_out)) / f_in."""
        for name, factor in self.factors().items():
            factor.normal_(0.0, self.structure.init_std(name), generator=generator)
        if self.zero_init:
            last = self.weight if self.structure.is_dense else self.B
            last.zero_()
        for scalar in (self.gain_A, self.gain_B):
            if scalar is not None:
                scalar.fill_(1.0)
        if self.bias is not None:
            self.bias.zero_()

    def factors(self) -> dict[Factor, nn.Parameter]:
        """The factors by name; a dense layer's matrix is factor A."""
        return {"A": self.weight} if self.structure.is_dense else {"A": self.A, "B": self.B}

    def _effective(self, name: Factor, gain: Tensor | None) -> Tensor:
        """The factor as it enters the product: capped at its initial RMS and scaled."""
        factor: Tensor = self.factors()[name]
        return cap_rms(factor, self.structure.init_std(name), gain) if self.normalize else factor

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"EinsumLinear({self.extra_repr()}) got an input of shape {tuple(x.shape)}; "
                f"its last dimension must be {self.in_features}"
            )
        a = self._effective("A", self.gain_A)
        if self.structure.is_dense:
            return nn.functional.linear(x, a, self.bias)
        y = self._contract(x.reshape(-1, self.in_features), a, self._effective("B", self.gain_B))
        y = y[:, : self.out_features]
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features)

    def _contract(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """(n, d_in) → (n, padded d_out), A contracted first."""
        surplus = self.structure.padded_in - self.in_features
        if surplus:
            x = nn.functional.pad(x, (0, surplus))
        return two_factor_product(x, a, b)

    def to_matrix(self) -> Tensor:
        """The matrix W (d_out, d_in) that the layer applies, without the bias."""
        a = self._effective("A", self.gain_A)
        if self.structure.is_dense:
            return a
        b = self._effective("B", self.gain_B)
        w = torch.einsum("grfda,fgrbe->fedgba", a, b)
        w = w.reshape(self.structure.padded_out, self.structure.padded_in)
        return w[: self.out_features, : self.in_features]

    def extra_repr(self) -> str:
        s = self.structure
        return (
            f"theta={s.theta}, d_in={s.d_in}, d_out={s.d_out}, bias={self.bias is not None}, "
            f"macs={s.macs}, rank={s.rank}"
        )
