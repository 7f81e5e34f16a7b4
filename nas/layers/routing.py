"""Which experts a token uses: gates, the losses that balance them, and what they did.

A gate gives each token a logit for each of the E - S routed experts; the k - S largest are chosen,
and their softmax weighs the experts.  The S shared experts are used as well, with weight 1; the
gate, its loss and its statistics know nothing of them, and of these E and k are those of the routed
experts.  No token is ever dropped.  The auxiliary loss of a gate is E·Σ p̂ f̂ + 0.1·mean(lse²), with
p̂ the mean probability of an expert, f̂ its share of the assignments and lse the logsumexp of a
token's logits; a balanced router has 1 for the first term.  Source: arXiv:2410.02117, section 5;
shared experts: arXiv:2401.06066, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nas.layers.kernels.mixture_kernels import loads
from nas.layers.modes import transforms_active, without_autocast

#: Weight of the second term within the auxiliary loss.
Z_WEIGHT = 0.1


@dataclass(frozen=True, slots=True)
class Routing:
    """What n tokens use, S shared experts last: (n, k) of E with weights 1 for these, and for
    others that sum to 1 for each token."""

    #: (n, k), at least float32
    weights: Tensor
    #: (n, k) indices of experts, of which the last S are the shared ones
    chosen: Tensor
    #: (n, E - S), at least float32
    logits: Tensor
    shared: int = 0

    @staticmethod
    def of(weights: Tensor, chosen: Tensor, logits: Tensor, shared: int) -> Routing:
        """What a gate decided, (..., n, k - S) of the routed experts, and the shared ones."""
        if shared:
            routed = logits.shape[-1]
            always = torch.arange(routed, routed + shared, device=chosen.device)
            chosen = torch.cat([chosen, always.expand(*chosen.shape[:-1], shared)], -1)
            weights = with_ones(weights, shared)
        return Routing(weights, chosen, logits, shared)

    @property
    def experts(self) -> int:
        return self.logits.shape[-1] + self.shared

    @property
    def routed(self) -> Tensor:
        """(n, k - S) indices of the experts that the gate chose."""
        return self.chosen[..., : self.chosen.shape[-1] - self.shared]

    @property
    def order(self) -> Tensor:
        """Assignments t·k + j sorted by expert, (n·k,); of one expert in the order of tokens."""
        return torch.argsort(self.chosen.reshape(-1), stable=True)

    @property
    def counts(self) -> Tensor:
        """Assignments of each expert, (E,)."""
        return loads(self.chosen.reshape(-1), self.experts)


def with_ones(weights: Tensor, shared: int) -> Tensor:
    """Weights (..., n) and those of the shared experts, (..., n + S)."""
    return functional.pad(weights, (0, shared), value=1.0)


def route(x: Tensor, gate: Tensor, active: int, shared: int = 0) -> Routing:
    """The `active` experts for x (n, d_in): the shared ones, and of the others those with the
    largest logits x·gateᵀ, gate (E - S, d_in).

    In at least single precision, also under autocast.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x.device):
        logits = functional.linear(x.to(dtype), gate.to(dtype))
        best, chosen = torch.topk(logits, active - shared, dim=-1)
        if torch.compiler.is_compiling():
            # no scatter in backward: inductor of torch 2.13 loses it where the gradient of the
            # auxiliary loss is added to it
            at = chosen[..., None] == torch.arange(logits.shape[1], device=logits.device)
            best = torch.where(at, logits[:, None], 0.0).sum(-1)
        return Routing.of(softmax(best), chosen, logits, shared)


def softmax(x: Tensor) -> Tensor:
    """Softmax along the last axis, which is short: torch is ten times faster along another."""
    return torch.softmax(x.mT, -2).mT


def shares(chosen: Tensor, experts: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """f̂: each expert's share of the assignments (..., E), which sum to 1; zeros without tokens.

    Of chosen (..., n, k).
    """
    flat = chosen.flatten(-2)
    ones = torch.ones(flat.shape, dtype=dtype, device=flat.device)
    counts = ones.new_zeros(*flat.shape[:-1], experts).scatter_add(-1, flat, ones)
    return counts / max(flat.shape[-1], 1)


def balance_loss(logits: Tensor, chosen: Tensor) -> Tensor:
    """E·Σ_e p̂_e f̂_e for logits (..., n, E), chosen (..., n, k), for each of the leading axes.

    1 if either is uniform; 0 without tokens.
    """
    n, experts = logits.shape[-2:]
    mean = torch.softmax(logits, -1).sum(-2) / max(n, 1)
    return experts * (mean * shares(chosen, experts, logits.dtype)).sum(-1)


def z_loss(logits: Tensor) -> Tensor:
    """mean(logsumexp(logits)²) over tokens; 0 without tokens."""
    return torch.logsumexp(logits, -1).square().sum(-1) / max(logits.shape[-2], 1)


def gate_loss(
    logits: Tensor, chosen: Tensor, over_batch: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """balance_loss + 0.1·z_loss of logits (..., n, E), chosen (..., n, k) → (...).

    In eager code one function with a written-out gradient, which a narrow layer notices.  For
    tokens that are a part of a batch, `over_batch` makes the shares of the batch of theirs; the
    mean of the losses of equal parts is then the loss of the batch.
    """
    if over_batch is None and (torch.compiler.is_compiling() or transforms_active()):
        return balance_loss(logits, chosen) + Z_WEIGHT * z_loss(logits)
    share = shares(chosen, logits.shape[-1], logits.dtype)
    if over_batch is not None:
        share = over_batch(share)
    loss: Tensor = _GateLoss.apply(logits, share)  # type: ignore[no-untyped-call]
    return loss


class _GateLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, share: Tensor) -> Tensor:
        n, experts = logits.shape[-2:]
        log_p = torch.log_softmax(logits.mT, -2).mT  # along the short axis torch is slow
        lse = logits[..., :1] - log_p[..., :1]
        p = log_p.exp_()
        ctx.save_for_backward(logits, share, p, lse)
        balance = experts * (p.sum(-2) * share).sum(-1)
        return (balance + Z_WEIGHT * lse.square().sum((-2, -1))) / max(n, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, share, p, lse = ctx.saved_tensors
        n, experts = logits.shape[-2:]
        if torch.is_grad_enabled():  # someone differentiates the gradient
            p, lse = torch.softmax(logits, -1), torch.logsumexp(logits, -1, keepdim=True)
        share = share.unsqueeze(-2)
        slope = experts * (share - (p * share).sum(-1, keepdim=True)) + 2 * Z_WEIGHT * lse
        return p * slope * (grad / max(n, 1))[..., None, None], None


class Gated:
    """A module with a gate, which remembers what its gate did in the last forward."""

    #: loss of the last forward, with its graph; None before it, after one that was no training,
    #: and without a gate
    auxiliary_loss: Tensor | None = None
    #: as in `gate_loss`, where other processes have other parts of the batch
    over_batch: Callable[[Tensor], Tensor] | None = None
    gate: nn.Parameter | None
    _last_logits: Tensor | None = None
    _last_chosen: Tensor | None = None

    def _remember(self, routing: Routing, training: bool) -> None:
        if transforms_active():
            return  # their tensors mean nothing outside
        self.auxiliary_loss = (
            gate_loss(routing.logits, routing.routed, self.over_batch) if training else None
        )
        self._last_logits, self._last_chosen = routing.logits.detach(), routing.routed

    def __getstate__(self) -> dict[str, Any]:
        """Without what the last forward left, whose graph cannot be copied."""
        state = dict(self.__dict__)
        for name in ("auxiliary_loss", "_last_logits", "_last_chosen"):
            state.pop(name, None)
        return state

    def router_statistics(self) -> dict[str, Any]:
        """`routing_statistics` of the last forward; empty before the first."""
        logits, chosen = self._last_logits, self._last_chosen
        if logits is None or chosen is None:
            return {}
        return routing_statistics(logits, chosen)


def routing_statistics(logits: Tensor, chosen: Tensor) -> dict[str, Any]:
    """What a gate did, from its logits (n, E) and choices (n, k); asking waits for the device.

    All of it is of routed experts, and tells nothing of shared ones.

    ``load``: share of the assignments per expert; ``load_entropy`` and ``gate_entropy``, in nats:
    of the load, and of the mean over tokens of the softmax of all logits; ``max_load``: largest
    load over a balanced one; ``dropped``: assignments that no expert took; ``assignments``: tokens
    times the experts that each chose.
    """
    experts = logits.shape[1]
    counts = torch.bincount(chosen.reshape(-1), minlength=experts)
    load = counts.double() / max(chosen.numel(), 1)
    mean = torch.softmax(logits.double(), -1).sum(0) / max(len(logits), 1)
    return {
        "load": load.tolist(),
        "load_entropy": torch.special.entr(load).sum().item(),
        "gate_entropy": torch.special.entr(mean).sum().item(),
        "max_load": load.max().item() * experts,
        "dropped": chosen.numel() - int(counts.sum()),
        "assignments": chosen.numel(),
    }


def auxiliary_loss(model: nn.Module) -> Tensor | None:
    """The mean of the auxiliary losses of all gates in the last forward, in training mode.

    None where there are none.

    Raises
    ------
    RuntimeError
        The gates learn but their last forward kept no graph, as under a reentrant checkpoint: what
        it gave would be a constant and balance nothing.
    """
    gated = [m for m in model.modules() if isinstance(m, Gated) and m.auxiliary_loss is not None]
    losses = [m.auxiliary_loss for m in gated if m.auxiliary_loss is not None]
    if not losses:
        return None
    learns = any(m.gate is not None and m.gate.requires_grad for m in gated)
    if torch.is_grad_enabled() and learns and not any(loss.requires_grad for loss in losses):
        raise RuntimeError(
            "the last forward kept no graph for the auxiliary loss; run it with gradients, and "
            "checkpoint with use_reentrant=False"
        )
    return torch.stack(losses).mean()


def router_statistics(model: nn.Module) -> dict[str, dict[str, Any]]:
    """`Gated.router_statistics` of every gate that has seen tokens, by the name of its module."""
    found = {
        name: module.router_statistics()
        for name, module in model.named_modules()
        if isinstance(module, Gated)
    }
    return {name: statistics for name, statistics in found.items() if statistics}
