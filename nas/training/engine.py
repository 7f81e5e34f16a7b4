"""The training step of several runs of one plan at once, and their evaluation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nas.designs.structure import LinearStructure
from nas.errors import one_line
from nas.layers.building import matrix_pays, plan_text
from nas.planning.cost import structures_of
from nas.planning.recipe import PluginRecipe, Recipe
from nas.planning.runs import RunPlan
from nas.training.muon import WithMuon, muon_rate, split_groups
from nas.training.separate import Separate
from nas.training.sgd import WithSgd, sgd_lr, sgd_rate
from nas.training.stacked import STACKED, Stacked
from nas.training.tasks import build_model, learning_rates, task_of

_log = logging.getLogger(__name__)
#: Weight of the auxiliary loss, averaged over gates.  Source: arXiv:2410.02117, section 5.
ROUTER_WEIGHT = 0.01
#: Positions that are evaluated at once, by the kind of device.
EVALUATION_TOKENS = {"cpu": 1 << 12, "cuda": 1 << 16}
#: Steps that run before the step is captured, so that what is made once is there.
_EAGER_STEPS = 3
#: Train FLOPs of a run, about ten minutes on a fast GPU, from which on a minute of compiling pays.
_COMPILED_FLOPS = 1e17


@dataclass(frozen=True, slots=True)
class Execution:
    """Where and in what precision a run computes."""

    device: str = "cpu"
    #: products in bfloat16 under autocast, weights and optimiser in float32
    bf16: bool = False
    #: forward and backward through torch.compile
    compile: bool = False
    #: the whole step captured once as a CUDA graph and replayed
    graphs: bool = False

    @classmethod
    def on(cls, device: str, train_flops: float = 0.0) -> Execution:
        """What suits the device: bfloat16 and captured steps on a GPU, plain float32 elsewhere.

        Code is compiled for a run on a GPU that is so long that it pays.
        """
        gpu = device.startswith("cuda")
        return cls(device, bf16=gpu, compile=gpu and train_flops >= _COMPILED_FLOPS, graphs=gpu)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the products."""
        return torch.bfloat16 if self.bf16 else torch.float32

    def autocast(self) -> AbstractContextManager[object]:
        """The context of a forward pass."""
        kind = torch.device(self.device).type
        return torch.autocast(kind, torch.bfloat16) if self.bf16 else nullcontext()


CPU = Execution()


def execution_plans(plan: RunPlan, recipe: Recipe, execution: Execution = CPU) -> dict[str, str]:
    """The execution plan of each structure of a run, by fingerprint, from the cost models.

    `STACKED`, or that of single layers.  However many runs train together, it is the same; mixtures
    of several layers or runs, which are computed as one, then choose by the cost model again.
    """
    where, tokens = torch.device(execution.device), recipe.tokens_per_step
    stacks = not isinstance(recipe, PluginRecipe)

    def text(structure: LinearStructure) -> str:
        if stacks and matrix_pays(structure, tokens, where):
            return STACKED
        return plan_text(structure, tokens, where, execution.dtype)

    return {s.fingerprint: text(s) for s in structures_of(recipe, plan.design, plan.width)}


class Engine:
    """R runs of one plan, one seed each, computed as one model, or those of a plug-in one by one.

    Parameters
    ----------
    layer_plans
        Execution plan of each structure by its fingerprint, as `execution_plans` gives.
    """

    def __init__(
        self,
        plan: RunPlan,
        recipe: Recipe,
        seeds: Sequence[int],
        execution: Execution,
        layer_plans: Mapping[str, str],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._recipe, self._task = recipe, task_of(recipe)
        models = []
        for seed in seeds:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                models.append(build_model(recipe, plan.design, plan.width).to(dtype))
        groups = [
            {**group, "params": trained}
            for group in learning_rates(models[0], recipe, plan.width)
            if (trained := [p for p in group["params"] if p.requires_grad])
        ]
        others: list[dict[str, Any]] = []
        if recipe.optimizer != "adamw":
            of_factors = muon_rate if recipe.optimizer == "muon" else sgd_rate
            lr = recipe.lr if recipe.optimizer == "muon" else sgd_lr(recipe)
            groups, others = split_groups(models[0], groups, lr, of_factors)
            # they look at their rates on the host, and leave them there
            execution = replace(execution, graphs=False)
        models = [m.to(execution.device) for m in models]
        self.stacked: Stacked | Separate
        if isinstance(recipe, PluginRecipe):
            # what code of others does is not known to compile, nor to be the same when replayed
            execution = replace(execution, compile=False, graphs=False)
            self.stacked = Separate(models, [*groups, *others], layer_plans, seeds)
        else:
            self.stacked = Stacked(models, [*groups, *others], layer_plans)
        self._execution = execution
        self._rates = [group["lr"] for group in (*groups, *others)]
        on_gpu = execution.device.startswith("cuda")
        rates = [
            torch.tensor(rate, device=execution.device) if on_gpu else rate
            for rate in self._rates[: len(groups)]
        ]
        adamw = torch.optim.AdamW(
            [
                {"params": [p], "lr": rate}
                for p, rate in zip(self.stacked.parameters, rates, strict=False)
            ],
            betas=(recipe.beta1, recipe.beta2),
            weight_decay=recipe.weight_decay,
            fused=True,
            capturable=on_gpu,
        )
        self.optimizer: torch.optim.Optimizer | WithMuon | WithSgd = adamw
        its_rates = self._rates[len(groups) :]
        if others and recipe.optimizer == "muon":
            self.optimizer = WithMuon(adamw, models[0], self.stacked, its_rates, recipe)
        elif others:
            factors = self.stacked.parameters[len(groups) :]
            self.optimizer = WithSgd(adamw, factors, its_rates, recipe.weight_decay)
        self._factor = 1.0
        self._forward = torch.compile(self._losses) if execution.compile else self._losses
        self._graph: _Captured | None = None

    @property
    def count(self) -> int:
        """Runs."""
        return self.stacked.count

    def set_rate(self, factor: float) -> None:
        """Learning rates of the next step over their peaks."""
        if factor == self._factor:
            return
        self._factor = factor
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * factor)
            else:
                group["lr"] = rate * factor

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Take one step on a batch of each run (R, batch, ...); their losses before it (R,)."""
        if not self._execution.graphs:
            return self._step(inputs, targets)
        if self._graph is None:
            self._graph = _Captured(self._step)
        return self._graph(inputs, targets)

    def _step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        losses, trained = self._forward(inputs, targets)
        parameters = self.stacked.parameters
        gradients: Sequence[Tensor] = torch.autograd.grad(
            trained, parameters, materialize_grads=True
        )
        if self._recipe.clip:
            gradients = _clipped(gradients, self._recipe.clip)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        return losses.detach()

    def _losses(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each run (R,), and the sum of what is minimised."""
        with self._execution.autocast():
            self.stacked.prepare()
            outputs = self.stacked.run(inputs)
        losses = self._sample_losses(outputs, targets).mean(1)
        routing = self.stacked.auxiliary_losses()
        trained = losses if routing is None else losses + ROUTER_WEIGHT * routing
        return losses, trained.sum()

    def _sample_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(R, batch)."""
        each = self._task.loss(self._recipe, outputs.flatten(0, 1), targets.flatten(0, 1))
        return each.view(self.count, outputs.shape[1])

    @torch.no_grad()
    def evaluate(self, x: Tensor, y: Tensor) -> Tensor:
        """Loss of each validation sample for each run (R, samples), float64 on the CPU."""
        positions = EVALUATION_TOKENS[torch.device(self._execution.device).type]
        piece = max(1, positions // (self._recipe.tokens * self.count))
        losses = []
        with self._execution.autocast(), self.stacked.evaluating():
            self.stacked.prepare()
            for inputs, targets in zip(torch.split(x, piece), torch.split(y, piece), strict=True):
                outputs = self.stacked.run(inputs.expand(self.count, *inputs.shape))
                losses.append(
                    self._sample_losses(outputs, targets.expand(self.count, *targets.shape))
                )
        return torch.cat(losses, dim=1).double().cpu()

    def routers(self) -> list[list[dict[str, Any]]]:
        """What the gates of each run did with the last batch; see `routing_statistics`."""
        return self.stacked.routers()

    def model_of(self, run: int) -> nn.Module:
        """A model with the parameters of a run as they are now; until the next call."""
        return self.stacked.model_of(run)

    def state_dict(self) -> dict[str, Any]:
        """Parameters and optimiser state; the first axis of each tensor is that of the runs."""
        state = self.optimizer.state
        return {
            "parameters": [p.detach() for p in self.stacked.parameters],
            "optimizer": [dict(state[p]) for p in self.stacked.parameters],
            **self.stacked.extra_state(),
        }

    @torch.no_grad()
    def load_state_dict(self, saved: Mapping[str, Any], runs: Sequence[int]) -> None:
        """Take over the given runs of a saved state.

        Raises
        ------
        ValueError
            The state is that of other models.
        """
        parameters = self.stacked.parameters
        at = torch.tensor(runs)
        if [p.shape[1:] for p in parameters] != [p.shape[1:] for p in saved["parameters"]]:
            raise ValueError("its parameters have other shapes")
        for parameter, value, state in zip(
            parameters, saved["parameters"], saved["optimizer"], strict=True
        ):
            parameter.copy_(value[at])
            own = {
                name: (t[at] if t.dim() else t).to(parameter.device) for name, t in state.items()
            }
            if isinstance(self.optimizer, torch.optim.Optimizer):
                self.optimizer.state[parameter] = own
            else:
                self.optimizer.load(parameter, own)
        self.stacked.load_extra_state(saved, runs)


class _Captured:
    """A step on a GPU: the first ones run as they are, then one is captured and replayed.

    Everything that a step reads and writes keeps its place: parameters, optimiser state and rates
    by being changed in place, batches by being copied into tensors of the graph's own.  A step that
    waits for the device, as some plans of mixtures do, cannot be captured and runs as it is.
    """

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._step = step
        self._taken = 0
        self._refused = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self._taken += 1
        if self._taken <= _EAGER_STEPS:
            # on a stream of its own, as the capture is, or its memory is not what the graph finds
            here = torch.cuda.current_stream()
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                losses = self._step(inputs, targets)
            here.wait_stream(aside)
            return losses
        if self._graph is None and not self._refused:
            self._capture(inputs, targets)
        if self._graph is None:
            return self._step(inputs, targets)
        self._inputs.copy_(inputs)
        self._targets.copy_(targets)
        self._graph.replay()
        return self._losses

    def _capture(self, inputs: Tensor, targets: Tensor) -> None:
        """Record a step, which does not run it."""
        self._inputs, self._targets = inputs.clone(), targets.clone()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._losses = self._step(self._inputs, self._targets)
        except RuntimeError as error:
            _log.warning("steps run one operation after another: %s", one_line(error))
            self._refused = True
        else:
            self._graph = graph


def _clipped(gradients: Sequence[Tensor], most: float) -> list[Tensor]:
    """Gradients (R, P) of each run scaled so that their common norm is at most `most`."""
    norms = torch.stack([torch.linalg.vector_norm(g, dim=1) for g in gradients])
    whole = torch.linalg.vector_norm(norms, dim=0)
    scale = (most / (whole + 1e-6)).clamp(max=1.0)[:, None]
    return [gradient * scale for gradient in gradients]
