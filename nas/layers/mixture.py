"""`MixtureLinear` and `MixtureFFN`: layers and feed-forward blocks as mixtures of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from nas.designs.mixture import Mixture, MixtureStructure, ffn_structures, parse_mixture
from nas.errors import InvalidInput
from nas.layers.einsum import EinsumLinear, pair
from nas.layers.kernels import measuring
from nas.layers.kernels.contraction import matrices
from nas.layers.kernels.mixing import mix
from nas.layers.kernels.mixture_kernels import Form, Inputs
from nas.layers.kernels.mixture_plan import MixturePlan, choose_mixture_plan, mixture_plans
from nas.layers.kernels.plan import checked_plan
from nas.layers.modes import (
    autocast_dtype,
    is_recorded,
    over_nested,
    plus_bias,
    reshaped_like,
    without_autocast,
)
from nas.layers.of_design import DesignLinear
from nas.layers.routing import (
    Gated,
    Routing,
    auxiliary_loss,
    route,
    router_statistics,
    with_ones,
)

__all__ = ["MixtureFFN", "MixtureLinear", "auxiliary_loss", "router_statistics"]


class MixtureLinear(Gated, DesignLinear[Mixture, MixtureStructure]):
    """y = Σ_e g_e(x) W_e x + bias over k of E experts; (..., d_in) → (..., d_out).

    The last S experts, the shared ones, are used by every token and have g = 1.  Of the others a
    token chooses k - S; their g is the softmax over the k - S largest logits x·gateᵀ.  Only what is
    used is computed, and no token is dropped, however unequal the loads.

    Parameters
    ----------
    design
        A `Mixture` with θ, its text such as ``"btt-moe:experts=8,active=2"``, or the sized
        `MixtureStructure` of a layer d_in → d_out.
    bias
        Whether to add a learned bias (d_out,), shared by the experts.
    zero_init
        Start as the zero map: the factor that is contracted last is zero.
    normalize, gain
        As for `EinsumLinear`; the RMS of a factor is that over all experts.
    d_in_base
        Input dimension of this layer in the base model at which the learning rate was tuned.
    plan
        The execution plan, fixed; see `plan`.

    Raises
    ------
    InvalidInput
        The mixture, a dimension or the plan is not one that can be built.

    Parameters of the module: ``A`` (E, γ, ρ, φ, δ, α) and ``B`` (E, φ, γ, ρ, β, ε) with the ρ of
    one expert, or ``weight`` (E, d_out, d_in) for dense experts; ``gate`` (E - S, d_in), zero at
    initialisation, where all tokens choose the same experts with equal weights.  After each forward
    in training mode ``auxiliary_loss`` is that of the gate; see `nas.layers.routing`.

    >>> layer = MixtureLinear("btt-moe:experts=4,active=2", 64, 256)
    >>> layer(torch.zeros(5, 64)).shape
    torch.Size([5, 256])
    """

    is_matrix = False
    structure: MixtureStructure
    A: nn.Parameter
    B: nn.Parameter
    gate: nn.Parameter | None
    family = "mixture"
    design_class = Mixture
    structure_class = MixtureStructure
    parse = staticmethod(parse_mixture)

    def _shapes(self) -> dict[str, tuple[int, ...] | None]:
        structure, s = self.structure, self.structure.expert.sizes
        experts, d_in, d_out = structure.experts, structure.d_in, structure.d_out
        gate = {"gate": (structure.routed, d_in) if structure.gated else None}
        if structure.expert.is_dense:
            return {"weight": (experts, d_out, d_in), **gate}
        return {
            "A": (experts, s.gamma, s.rho, s.phi, s.delta, s.alpha),
            "B": (experts, s.phi, s.gamma, s.rho, s.beta, s.epsilon),
            **gate,
        }

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the factors anew, each expert as a layer of its own; the gate becomes zero."""
        super().reset_parameters(generator)
        if self.gate is not None:
            self.gate.zero_()

    def factors(self) -> dict[str, nn.Parameter]:
        """The factors by name, the matrices of dense experts being A; and the gate if there is."""
        found = super().factors()
        return found if self.gate is None else {**found, "gate": self.gate}

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        """As of every structured layer; `routing` replaces the gate, and a layer without a gate
        needs it: else ValueError."""
        if routing is None or isinstance(routing, fx.Proxy):  # what torch.fx gives for None
            return super().forward(x)
        if not isinstance(routing, Routing):
            raise TypeError(f"routing must be a Routing or None, got {type(routing).__name__}")
        self._check(x)
        y = self.mixed(x.reshape(-1, self.in_features), routing, self.effective_factors())
        return self._finished(y, x)

    def product(self, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
        plan = self._plan
        if plan is None and not torch.compiler.is_compiling():
            dtype = autocast_dtype(x.device, x.dtype)
            plan = measuring.remembered(self.structure, len(x), x.device, dtype)
        return self.mixed(x, self.route(x), factors, plan=plan)

    def matrices(self, factors: Sequence[Tensor]) -> Tensor:
        """W (n, E, d_out, d_in) of all experts of n layers like this one."""
        each = [f.flatten(0, 1) for f in factors]
        w = matrices(*pair(each), self.structure.expert)
        return w.view(*factors[0].shape[:2], *w.shape[1:])

    def plain(self, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """Every expert on every token: as many times the work as there are experts."""
        (a, b), e = pair(factors), self.structure.expert
        gates = self._gates(x)
        if b is None:  # one product at a time, for the order of three depends on the sizes
            return torch.einsum("neo,ne->no", torch.einsum("ni,eoi->neo", x, a), gates)
        s = e.sizes
        x = functional.pad(x, (0, e.padded_in - e.d_in))
        z = torch.einsum("ngba,egrfda->negbrfd", x.reshape(-1, s.gamma, s.beta, s.alpha), a)
        y = torch.einsum("negbrfd,efgrbs->nefsd", z, b)
        return torch.einsum("nefsd,ne->nfsd", y, gates).flatten(1)[:, : e.d_out]

    def _gates(self, x: Tensor) -> Tensor:
        """The weight of each expert (n, E), 0 for those that are not used; as `plain`."""
        gate = self._parameters["gate"]
        if gate is None:
            raise ValueError(f"MixtureLinear({self.extra_repr()}) has no gate")
        dtype = torch.float64 if gate.dtype == torch.float64 else torch.float32
        with without_autocast(gate.device):  # as `route`
            logits = functional.linear(x.to(dtype), self.gate.to(dtype))  # type: ignore[union-attr]
            s = self.structure
            best, chosen = torch.topk(logits, s.active - s.shared, dim=-1)
            gates = torch.zeros_like(logits).scatter(-1, chosen, torch.softmax(best, -1))
        return (with_ones(gates, s.shared) if s.shared else gates).to(x.dtype)

    def route(self, x: Tensor) -> Routing:
        """The gate's decision for x (n, d_in), which it remembers."""
        if self.gate is None:
            raise ValueError(f"MixtureLinear({self.extra_repr()}) has no gate; pass a routing")
        routing = route(x, self.gate, self.structure.active, self.structure.shared)
        self._remember(routing, self.training)
        return routing

    def mixed(
        self,
        x: Tensor,
        routing: Routing,
        factors: Sequence[Tensor],
        form: Form = "both",
        plan: MixturePlan | None = None,
    ) -> Tensor:
        """The product without the bias; `form` as in `nas.layers.kernels.mixture_kernels`.

        `plan` in place of the layer's own.
        """
        inputs = Inputs(x, routing.weights, routing.chosen, *pair(factors))
        plan, shared = plan or self._plan, self.structure.shared > 0
        return mix(inputs, self.out_features, plan, form, shared)

    def _checked_plan(self, value: object) -> MixturePlan:
        return checked_plan(MixturePlan, value, self.structure)

    def _chosen_plan(self, tokens: int, device: torch.device, dtype: torch.dtype) -> MixturePlan:
        found: MixturePlan | None = measuring.remembered(self.structure, tokens, device, dtype)
        if found is not None:
            return found.checked(self.structure)
        return choose_mixture_plan(self.structure, tokens, device, dtype)

    def _plans_to_try(
        self, tokens: int, device: torch.device, dtype: torch.dtype
    ) -> Sequence[MixturePlan]:
        """One of each grouping, as for loads that are spread over the experts."""
        if self.gate is None:
            return super()._plans_to_try(tokens, device, dtype)
        return mixture_plans(self.structure, tokens, device, dtype)

    def to_matrix(self) -> Tensor:
        """Raises TypeError: which matrix a mixture applies depends on the token."""
        raise TypeError(
            f"MixtureLinear({self.extra_repr()}) is not one matrix: each token has its own, "
            "the weighted sum of its experts"
        )

    def as_operator(self) -> NoReturn:
        """Raises InvalidInput, as `to_matrix` refuses."""
        accepted = "a layer of one matrix; a mixture has another for each token"
        raise InvalidInput("layer", self._described(), accepted)

    @classmethod
    @torch.no_grad()
    def from_einsum(cls, layer: EinsumLinear, experts: int, active: int) -> MixtureLinear:
        """The mixture whose experts are the ρ slices of an existing layer, ρ/E each.

        The gate is zero and B is multiplied by E, so that with `active` = `experts`, where each
        weight is 1/E, the output is that of the layer.  Factors that the layer normalises are
        taken as they are after it, and normalised no more.

        Raises
        ------
        InvalidInput
            Not an `EinsumLinear`, or one with a single matrix or in the papers' sizing; E does not
            divide its ρ; E and k that no mixture has.
        """
        if not isinstance(layer, EinsumLinear):
            raise InvalidInput("layer", type(layer).__name__, "an EinsumLinear")
        whole = layer.structure
        if whole.is_dense or whole.sizing == "paper":
            accepted = "an EinsumLinear of two factors in the sizing least-waste"
            raise InvalidInput("layer", f"EinsumLinear({layer.extra_repr()})", accepted)
        structure = MixtureStructure.split(whole, experts, active)
        a, b = layer.effective_factors()
        made = cls(
            structure, layer.in_features, layer.out_features, layer.bias is not None,
            d_in_base=layer.d_in_base, device=a.device, dtype=a.dtype,
        )  # fmt: skip
        made.A.copy_(_split(a, 1, experts))
        made.B.copy_(_split(b, 2, experts) * experts)
        if made.bias is not None and layer.bias is not None:
            made.bias.copy_(layer.bias)
        made.zero_init = layer.zero_init
        return made.train(layer.training)

    def _design_repr(self) -> str:
        s = self.structure
        shared = f", shared={s.shared}" if s.shared else ""
        return f"experts={s.experts}, active={s.active}{shared}, theta={s.expert.theta}"


class MixtureFFN(nn.Module):
    """The standard mixture: y = Σ_e g_e(x) W2_e gelu(W1_e x + b1) + b2; (..., width) → the same.

    Shared experts have g = 1, as in a `MixtureLinear`.  Tokens are routed once, by the gate of
    ``mlp_in``; hidden values stay sorted by expert between the two layers, both `MixtureLinear`
    with dense experts.  Their biases belong to all experts together.

    Parameters
    ----------
    mlp_in, mlp_out
        Two layers of equal experts, active and shared ones, the first with a gate; see `of`.

    Raises
    ------
    InvalidInput
        Layers that do not fit each other.

    >>> MixtureFFN.of("ffn-moe:experts=4,active=2", 16, 64)(torch.zeros(2, 3, 16)).shape
    torch.Size([2, 3, 16])
    """

    def __init__(self, mlp_in: MixtureLinear, mlp_out: MixtureLinear) -> None:
        super().__init__()
        one, other = mlp_in.structure, mlp_out.structure
        counts = (one.experts, one.active, one.shared), (other.experts, other.active, other.shared)
        if not (one.d_out == other.d_in and counts[0] == counts[1] and one.gated):
            got = f"{one.fingerprint} and {other.fingerprint}"
            raise InvalidInput(
                "layers", got, "layers of one hidden dimension, E, k and S, with a gate"
            )
        self.mlp_in, self.mlp_out = mlp_in, mlp_out

    @classmethod
    def of(
        cls,
        mixture: Mixture | str,
        width: int,
        hidden: int,
        bias: bool = True,
        *,
        zero_init: bool = False,
        normalize: bool = False,
        gain: bool = False,
        plan: MixturePlan | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MixtureFFN:
        """A block of a `Mixture` without θ, or of its text such as ``"ffn-moe:experts=8"``.

        An expert has the hidden dimension hidden/m, of granularity m.  Options as of
        `MixtureLinear`, for both layers but `zero_init`, for ``mlp_out`` alone.
        """
        if not isinstance(mixture, Mixture):
            mixture = parse_mixture(mixture)
        first, second = ffn_structures(mixture, width, hidden)
        return cls(
            MixtureLinear(
                first, width, first.d_out, bias, normalize=normalize, gain=gain, plan=plan,
                device=device, dtype=dtype,
            ),
            MixtureLinear(
                second, second.d_in, width, bias, zero_init=zero_init, normalize=normalize,
                gain=gain, plan=plan, device=device, dtype=dtype,
            ),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) → (..., width)."""
        if is_recorded(x):
            y = self.plain(x.reshape(-1, self.mlp_in.in_features))
            return reshaped_like(y, x, self.mlp_out.out_features)
        if x.is_nested:
            return over_nested(self, x)
        self.mlp_in._check(x)
        flat = x.reshape(-1, x.shape[-1])
        routing = self.mlp_in.route(flat)
        hidden = self.mlp_in.mixed(flat, routing, self.mlp_in.effective_factors(), "gather")
        if self.mlp_in.bias is not None:
            hidden = plus_bias(hidden, self.mlp_in.bias)
        hidden = functional.gelu(hidden)
        y = self.mlp_out.mixed(hidden, routing, self.mlp_out.effective_factors(), "combine")
        return self.mlp_out._finished(y, x)

    def plain(self, x: Tensor) -> Tensor:
        """(n, width) → (n, width); see `StructuredLinear.plain`."""
        (first,), (second,) = (layer.effective_factors() for layer in (self.mlp_in, self.mlp_out))
        hidden = torch.einsum("ni,eoi->neo", x, first)
        if self.mlp_in.bias is not None:
            hidden = hidden + self.mlp_in.bias.to(hidden.dtype)
        y = torch.einsum("nei,eoi->neo", functional.gelu(hidden), second)
        y = torch.einsum("neo,ne->no", y, self.mlp_in._gates(x))
        return y if self.mlp_out.bias is None else y + self.mlp_out.bias.to(y.dtype)


def _split(factor: Tensor, axis: int, experts: int) -> Tensor:
    """The slices along `axis` as (E, ..., ρ/E, ...)."""
    shape = factor.shape
    return factor.view(*shape[:axis], experts, -1, *shape[axis + 1 :]).movedim(axis, 0)
