"""Muon for the factors of structured layers, AdamW for all else.

Muon (`torch.optim.Muon`) makes the momentum of a matrix orthogonal, so that every
update of it has the same spectral norm.  A factor is a batch of matrices f_in → f_out, see
`StructuredLinear.blocks`; each is orthogonalised by itself.

The rate.  Features keep their size as a model widens where the spectral norm of each factor's
update is proportional to sqrt(f_out / f_in) (arXiv:2310.17813, condition 1), which an orthogonal
matrix times rate · sqrt(f_out / f_in) has.  N factors share one update, as with Adam.  So the rate
of a block is

    lr · 0.2 · sqrt(d_in_base) · sqrt(f_out / f_in) / N

where 0.2 · sqrt(d_in_base) makes the update of a square dense layer of the base width as large, by
its RMS, as Adam's usually is at the rate lr (arXiv:2502.16982, section 2.2).  One `lr` thus serves
both optimisers, although its best value need not be the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from nas.layers import StructuredLinear
from nas.planning.recipe import Recipe
from nas.training.separate import Separate
from nas.training.stacked import Stacked

#: RMS of Adam's updates over its learning rate; arXiv:2502.16982, section 2.2.
_ADAM_RMS = 0.2
_MOMENTUM = 0.95

Groups = list[dict[str, Any]]


def factors_of(model: nn.Module) -> dict[str, tuple[StructuredLinear, str]]:
    """Parameter name → (layer, name of the factor) of every factor in a model."""
    return {
        f"{prefix}.{parameter}".lstrip("."): (layer, name)
        for prefix, layer in model.named_modules()
        if isinstance(layer, StructuredLinear)
        for name, parameter, _ in layer._factors
    }


def muon_rate(layer: StructuredLinear, factor: str) -> float:
    """Learning rate of a factor's blocks over that of Adam on the dense base layer."""
    f_out, f_in = layer.blocks(factor, layer.factors()[factor]).shape[-2:]
    return _ADAM_RMS * math.sqrt(layer.d_in_base * f_out / f_in) * share_of(layer, factor)


def share_of(layer: StructuredLinear, factor: str) -> float:
    """What share of the layer's update is this factor's: 1/N, or what its family gives it."""
    # Adam's multiplier is base / (N f_in)
    multiplier = layer.structure.adam_lr_multiplier(factor, layer.d_in_base)
    return multiplier * layer.structure.fans(factor)[0] / layer.d_in_base


def split_groups(
    model: nn.Module, groups: Groups, lr: float, rate: Callable[[StructuredLinear, str], float]
) -> tuple[Groups, Groups]:
    """(what AdamW trains, what the optimiser of factors trains) of a model's parameter groups.

    Parameters
    ----------
    rate
        Learning rate of a factor over `lr`.
    """
    rates = {
        model.get_parameter(name): lr * rate(*factor) for name, factor in factors_of(model).items()
    }
    others = [
        {**group, "params": own}
        for group in groups
        if (own := [p for p in group["params"] if p not in rates])
    ]
    of_rate: dict[float, list[Tensor]] = {}
    for group in groups:
        for parameter in group["params"]:
            if parameter in rates:
                of_rate.setdefault(rates[parameter], []).append(parameter)
    return others, [{"params": own, "lr": rate} for rate, own in sorted(of_rate.items())]


class BatchedMuon(torch.optim.Optimizer):
    """`torch.optim.Muon` on batches of matrices (..., rows, columns), each by itself.

    The same to rounding, matrix by matrix, without its scale of the rate, which is left to the
    caller.  torch's own takes one matrix at a time, of which a model has hundreds; its
    orthogonalisation, mapped over a batch, is what this uses.
    """

    def __init__(
        self, params: Groups, *, weight_decay: float = 0.0, momentum: float = _MOMENTUM
    ) -> None:
        super().__init__(params, {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every matrix by its rate times what its momentum, with Nesterov's, is made of."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                held = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(held, group["momentum"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(_orthogonal(update), alpha=-group["lr"])


@lru_cache
def _of_one() -> Callable[[Tensor], Tensor]:
    """torch's orthogonalisation of one matrix, with the settings of `torch.optim.Muon`.

    Imported where it is used: torch has it from 2.9 on, and all else here works with older ones.
    """
    from torch.optim import _muon

    settings = (_muon.DEFAULT_A, _muon.DEFAULT_B, _muon.DEFAULT_C)
    return partial(
        _muon._zeropower_via_newtonschulz,
        ns_coefficients=settings, ns_steps=_muon.DEFAULT_NS_STEPS, eps=_muon.EPS,
    )  # fmt: skip


def _orthogonal(matrices: Tensor) -> Tensor:
    """The matrices (..., rows, columns) with all singular values near 1."""
    flat = matrices.reshape(-1, *matrices.shape[-2:])
    found = torch.vmap(_of_one())(flat)
    return found.view(matrices.shape).to(matrices.dtype)


class WithMuon:
    """AdamW for some of the tensors that runs train, Muon for the rest, used as one optimiser.

    Parameters
    ----------
    adamw
        Holds the first of `stacked.parameters`, one in a group.
    model
        One of the models that `stacked` has.
    rates
        Of Muon, for each tensor of the others.
    """

    def __init__(
        self,
        adamw: torch.optim.AdamW,
        model: nn.Module,
        stacked: Stacked | Separate,
        rates: Sequence[float],
        recipe: Recipe,
    ) -> None:
        self._adamw = adamw
        first = len(stacked.parameters) - len(rates)
        self._flat = list(stacked.parameters[first:])
        self._gradients = [torch.zeros_like(p) for p in self._flat]
        self._momenta = [torch.zeros_like(p) for p in self._flat]
        factors = factors_of(model)
        groups: Groups = []
        for place, rate in enumerate(rates):
            blocks = []
            for names, values in stacked.views(first + place):
                layer, factor = factors[names[0]]
                blocks.append(layer.blocks(factor, values))
                blocks[-1].grad = _same_place(blocks[-1], self._gradients[place])
            groups.append({"params": blocks, "lr": rate})
        self._muon = BatchedMuon(groups, weight_decay=recipe.weight_decay)
        for group, momentum in zip(groups, self._momenta, strict=True):
            for block in group["params"]:
                self._muon.state[block]["momentum_buffer"] = _same_place(block, momentum)

    @property
    def param_groups(self) -> Groups:
        return [*self._adamw.param_groups, *self._muon.param_groups]

    @property
    def state(self) -> Mapping[Tensor, dict[str, Tensor]]:
        """Of each tensor that runs train; of Muon's the momentum."""
        own: dict[Tensor, dict[str, Tensor]] = {
            p: {"momentum": m} for p, m in zip(self._flat, self._momenta, strict=True)
        }
        return {**self._adamw.state, **own}

    def load(self, parameter: Tensor, state: dict[str, Tensor]) -> None:
        """Take over the state of a tensor."""
        for flat, momentum in zip(self._flat, self._momenta, strict=True):
            if flat is parameter:
                momentum.copy_(state["momentum"])
                return
        self._adamw.state[parameter] = state

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        self._adamw.zero_grad(set_to_none=set_to_none)
        for flat in self._flat:
            flat.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for flat, gradient in zip(self._flat, self._gradients, strict=True):
            assert flat.grad is not None
            gradient.copy_(flat.grad)
        self._adamw.step()
        self._muon.step()


def _same_place(block: Tensor, other: Tensor) -> Tensor:
    """What lies in `other` where a view of a tensor as large lies in that tensor."""
    return other.as_strided(block.size(), block.stride(), block.storage_offset())
