"""Self-guided training from trained dense weights: structured layers take over step by step.

In the warm-up a layer computes y = α W x + (1 − α) S x + bias, where W is the trained dense weight,
frozen, and S the structured matrix that is trained.  α falls from 1 to 0 by half a cosine, after
which W is dropped.  Source: arXiv:2406.16450, section 3.2; there W is trained too, and random.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nas.errors import InvalidInput
from nas.layers.base import StructuredLinear
from nas.layers.modes import is_recorded
from nas.layers.surgery import AnyDesign, Select, is_conv1d, replace_linears

#: Buffers of a layer in its warm-up: W (d_out, d_in), and α, a scalar.  Buffers and no parameters,
#: so that no optimiser holds W; α is a tensor, so that compiled code does not depend on its value.
_WEIGHT, _ALPHA = "dense_weight", "dense_alpha"


class SelfGuided:
    """Replaces the linear layers of a trained model, and fades their dense weights out.

    Parameters
    ----------
    model, theta, select, normalize, gain
        As in `replace_linears`.
    steps
        Optimiser steps of the warm-up, at least 1.
    from_dense
        As in `replace_linears`, but on by default.  Mixtures, and `normalize`, need False: their
        layers start from random factors.

    Build the optimiser afterwards; call `step` after each of its steps.  Parameters of the model
    are from the start those that it has at the end, the same objects.  A forward pass of the
    warm-up costs the dense product too, which `forward_flops` counts, and the backward pass the
    dense gradient of the input: a training step costs 3 structured and 2 dense products.

    In the warm-up the `state_dict` of the model holds the dense weights too (``….dense_weight``):
    a model without a guide refuses it, and `nas.layers.save` refuses to write it.  To resume, build
    model, guide and optimiser again and load the state of each, that of the guide first.

    Copy a model together with its guide: ``deepcopy((model, guide))``.  DistributedDataParallel
    needs ``broadcast_buffers=False``: it sends W at each step otherwise, and fails once W is gone.

    Raises
    ------
    InvalidInput
        `steps` is no whole number above 0; no layer can be replaced; what `replace_linears`
        refuses.  The model is then as it was.

    >>> model = nn.Sequential(nn.Linear(64, 64))
    >>> guide = SelfGuided(model, "monarch", steps=2)
    >>> guide.step(), guide.alpha
    (None, 0.5)
    >>> guide.step(), guide.ended
    (None, True)
    """

    def __init__(
        self,
        model: nn.Module,
        theta: AnyDesign | Mapping[str, AnyDesign],
        select: Select | None = None,
        *,
        steps: int,
        from_dense: bool = True,
        normalize: bool = False,
        gain: bool = False,
    ) -> None:
        if not _is_whole(steps) or steps < 1:
            raise InvalidInput("steps", steps, "a whole number above 0")
        found = model.named_modules(remove_duplicate=False) if isinstance(model, nn.Module) else ()
        dense = dict(found)
        #: what was replaced, as `replace_linears` reports it
        self.report = replace_linears(
            model, theta, select, from_dense=from_dense, normalize=normalize, gain=gain
        )
        if not self.report.replaced:
            reasons = "; ".join(f"{x.names[0]}: {x.reason}" for x in self.report.left_out)
            got = f"{type(model).__name__}, of which no layer can be replaced ({reasons or 'none'})"
            raise InvalidInput("model", got, "a model with linear layers that can be")
        self._steps, self._step = steps, 0
        self._layers: list[nn.Module] = []
        self._handles = []
        for row in self.report.replaced:
            layer, before = model.get_submodule(row.names[0]), dense[row.names[0]]
            weight = before.get_parameter("weight").detach()
            weight = weight.T if is_conv1d(before) else weight
            one = weight.new_ones((), dtype=torch.promote_types(weight.dtype, torch.float32))
            layer.register_buffer(_WEIGHT, weight)
            layer.register_buffer(_ALPHA, one, persistent=False)
            # first, so that the hooks that the dense layer had see the output as a whole
            handle = layer.register_forward_hook(_guided, prepend=True, with_kwargs=True)
            self._layers.append(layer)
            self._handles.append(handle)

    @property
    def alpha(self) -> float:
        """Share of the dense product in the next forward pass: (1 + cos(π · step / steps)) / 2."""
        return (1 + math.cos(math.pi * self._step / self._steps)) / 2

    @property
    def ended(self) -> bool:
        """Whether the warm-up is over: no layer has a dense weight any more."""
        return self._step == self._steps

    def step(self) -> None:
        """Go on to the α of the next optimiser step; the last of `steps` drops the dense weights.

        Raises
        ------
        InvalidInput
            The warm-up has ended.
        """
        if self.ended:
            accepted = f"{self._steps}, the steps of the warm-up, and none once guide.ended"
            raise InvalidInput("step", self._step + 1, accepted)
        self._go_to(self._step + 1)

    def state_dict(self) -> dict[str, int]:
        """How many steps were made, of how many."""
        return {"step": self._step, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stand where another guide stood; if that was its end, the dense weights are dropped.

        Raises
        ------
        InvalidInput
            No state of a guide of as many steps, or an earlier one than the end of one that ended.
        """
        found = dict(state)
        step: Any = found.get("step")
        first = self._steps if self.ended else 0  # what was dropped does not come back
        known = found == {"step": step, "steps": self._steps} and _is_whole(step)
        if not (known and first <= step <= self._steps):
            accepted = f"'step' from {first} to {self._steps}, and 'steps': {self._steps}"
            raise InvalidInput("state_dict", found, accepted)
        self._go_to(step)

    @torch.no_grad()
    def _go_to(self, step: int) -> None:
        self._step = step
        for layer in self._layers:
            # in place: compiled code and captured graphs read this tensor
            layer.get_buffer(_ALPHA).fill_(self.alpha)
        if self.ended:
            for layer, handle in zip(self._layers, self._handles, strict=True):
                handle.remove()
                delattr(layer, _WEIGHT)
                delattr(layer, _ALPHA)
            self._layers, self._handles = [], []


def is_guided(module: nn.Module) -> bool:
    """Whether a layer is in its warm-up."""
    return isinstance(module, StructuredLinear) and _WEIGHT in module._buffers


def _guided(
    layer: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], y: Tensor
) -> Tensor:
    """The structured output y (..., d_out) of an input (..., d_in), and the dense one, by α.

    Both have the bias, so that their mean has it once.
    """
    if not is_guided(layer):
        return y  # the dense layer, which has the same dictionary of hooks, called by itself
    (x,) = (*args, *named.values())
    if not is_recorded(x) and x.is_nested:
        return y  # the layer has called itself on the parts
    bias: Any = layer.bias
    dense = functional.linear(x, layer.get_buffer(_WEIGHT), bias)
    return torch.lerp(y, dense, layer.get_buffer(_ALPHA).to(y.dtype))  # exact at α = 1


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
