"""R models of any kind, which differ in their seeds, computed one after another.

The models of plug-ins, which have no operations that several models could share.  Their parameters
lie as those of `nas.training.stacked.Stacked` do, so that one optimiser trains them, and each model
is called with a view of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nas.layers import StructuredLinear
from nas.layers.routing import auxiliary_loss, router_statistics

#: Sets the random streams of steps apart from those of initialisation and batches.
_STREAM = 1 << 33


class Separate:
    """R models of equal shape.

    Parameters
    ----------
    groups
        Parameter groups of the first one: which parameters that train have which learning rate.
    plans
        Execution plan of each structure by fingerprint.
    seeds
        One a model: of what it draws in a step, such as dropout.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        groups: Sequence[Mapping[str, Any]],
        plans: Mapping[str, str],
        seeds: Sequence[int],
    ) -> None:
        self.count = len(models)
        self._models, self._seeds = list(models), list(seeds)
        names = {p: name for name, p in models[0].named_parameters()}
        #: names and shapes of each group in the order in which they lie in its tensor
        self._layout: list[list[tuple[str, torch.Size]]] = []
        #: learned tensors (R, P), one a learning rate
        self.parameters: list[nn.Parameter] = []
        every = [dict(model.named_parameters()) for model in models]
        for group in groups:
            mine = group["params"]
            self._layout.append([(names[p], p.shape) for p in mine])
            rows = [
                torch.cat([named[names[p]].detach().reshape(-1) for p in mine]) for named in every
            ]
            self.parameters.append(nn.Parameter(torch.stack(rows)))
        for module in (m for model in models for m in model.modules()):
            if isinstance(module, StructuredLinear):
                module.plan = plans[module.structure.fingerprint]
        self._steps = 0
        self._training = True
        #: parameters of each model by name, in the present step
        self._values: list[dict[str, Tensor]] = []

    def prepare(self) -> None:
        """Take the parameters as they are now; every `run` uses these."""
        self._values = [{} for _ in self._models]
        for parameter, layout in zip(self.parameters, self._layout, strict=True):
            sizes = [shape.numel() for _, shape in layout]
            for row, values in zip(parameter.unbind(0), self._values, strict=True):
                for (name, shape), piece in zip(layout, torch.split(row, sizes), strict=True):
                    values[name] = piece.view(shape)

    def views(self, index: int) -> Iterator[tuple[list[str], Tensor]]:
        """As `nas.training.stacked.Stacked.views`, each parameter alone."""
        layout, whole = self._layout[index], self.parameters[index].detach()
        sizes = [shape.numel() for _, shape in layout]
        for (name, shape), piece in zip(layout, torch.split(whole, sizes, dim=1), strict=True):
            yield [name], piece.view(self.count, 1, *shape)

    @torch.no_grad()
    def model_of(self, run: int) -> nn.Module:
        """The model of a run with its parameters as they are now."""
        named = dict(self._models[run].named_parameters())
        for index in range(len(self.parameters)):
            for (name,), values in self.views(index):
                named[name].copy_(values[run, 0])
        return self._models[run]

    def run(self, x: Tensor) -> Tensor:
        """The models' outputs (R, ...) for inputs (R, ...)."""
        outputs = []
        for model, values, seed, inputs in zip(
            self._models, self._values, self._seeds, x, strict=True
        ):
            devices = [inputs.device] if inputs.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):
                # by the step alone: a run that goes on from its checkpoint draws the same
                torch.manual_seed(_STREAM + (seed << 32) + self._steps)
                found = functional_call(model, values, (inputs,))
            if not isinstance(found, Tensor):
                raise TypeError(
                    f"the model gave a {type(found).__name__}; accepted: a tensor, samples first"
                )
            outputs.append(found)
        self._steps += self._training
        return torch.stack(outputs)

    def auxiliary_losses(self) -> Tensor | None:
        """Mean over gates of the auxiliary loss of each model in the last run (R,), or None."""
        losses = [loss for model in self._models if (loss := auxiliary_loss(model)) is not None]
        return torch.stack(losses) if losses else None

    def routers(self) -> list[list[dict[str, Any]]]:
        """What the gates of each model did in the last run; see `routing_statistics`."""
        return [list(router_statistics(model).values()) for model in self._models]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The models in evaluation mode."""
        self._mode(training=False)
        try:
            yield
        finally:
            self._mode(training=True)

    def _mode(self, *, training: bool) -> None:
        self._training = training
        for model in self._models:
            model.train(training)

    def extra_state(self) -> dict[str, Any]:
        """Steps taken, and the buffers of each model."""
        buffers = [{n: b.clone() for n, b in m.named_buffers()} for m in self._models]
        return {"steps": self._steps, "buffers": buffers}

    def load_extra_state(self, saved: Mapping[str, Any], runs: Sequence[int]) -> None:
        """Take over the given runs of what `extra_state` gave."""
        self._steps = saved["steps"]
        for model, run in zip(self._models, runs, strict=True):
            for name, buffer in model.named_buffers():
                buffer.copy_(saved["buffers"][run][name])
