"""One run over several devices: each rank has its part of every batch.

Ranks are processes of torch's default process group.  With the recipe's sharding "none" each holds
the model (DistributedDataParallel), with "full" its part of parameters, gradients and optimiser
state (`torch.distributed.fsdp.fully_shard`, block by block).  Every rank draws the whole batch and
takes its part, and losses and gradients are means over all, so that a curve is that of one device
to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from nas.layers.building import plan_text
from nas.layers.routing import Gated, auxiliary_loss, routing_statistics
from nas.planning.cost import structures_of
from nas.planning.recipe import Recipe
from nas.planning.runs import RunPlan
from nas.tasks.data import Arrays
from nas.training.checkpoint import Checkpoint
from nas.training.engine import CPU, EVALUATION_TOKENS, ROUTER_WEIGHT, Execution
from nas.training.metering import CostMeter
from nas.training.run import LOOK_EVERY, Evaluations, train_with
from nas.training.tasks import build_model, learning_rates, task_of
from nas.training.weights import Keeping

#: What of a saved state lies on rank 0 alone, until it is loaded.
_TENSORS = ("model", "optimizer")


def rank_execution(execution: Execution) -> Execution:
    """What a rank does of it: nothing is compiled or captured, for ranks talk during a step."""
    return replace(execution, compile=False, graphs=False)


def rank_plans(plan: RunPlan, recipe: Recipe, execution: Execution = CPU) -> dict[str, str]:
    """The execution plan that layers choose for a rank's part of a batch, by fingerprint."""
    tokens, device = recipe.tokens_per_step // recipe.ranks, torch.device(execution.device)
    structures = structures_of(recipe, plan.design, plan.width)
    return {s.fingerprint: plan_text(s, tokens, device, execution.dtype) for s in structures}


def train_on_rank(
    plan: RunPlan,
    recipe: Recipe,
    train_data: Arrays,
    validation_data: Arrays,
    seed: int,
    execution: Execution = CPU,
    checkpoint: Checkpoint | None = None,
    meter: CostMeter | None = None,
    until: int | None = None,
    keeping: Keeping | None = None,
) -> Evaluations:
    """Take part in the training of `plan` with one seed, as each of `recipe.ranks` processes.

    Every rank yields and returns the same, as `nas.training.run.train_replicates` with that seed;
    seconds are its own.  Statistics of routers are over the last samples that each rank evaluated.

    Parameters
    ----------
    execution
        With the device of this rank, which is the current one of its kind; see `rank_execution`.
    checkpoint
        Used by rank 0, which alone needs the file; None on all ranks or on none.
    meter
        Measures what this rank's steps cost.
    until
        As of `train_replicates`.
    keeping
        The same on every rank; that of rank 0 is given the weights.

    Raises
    ------
    ValueError
        The process group has another number of ranks.
    """
    if distributed.get_world_size() != recipe.ranks:
        raise ValueError(f"{distributed.get_world_size()} processes for {recipe.ranks} ranks")
    execution = rank_execution(execution)
    device = torch.device(execution.device)
    return train_with(
        partial(_RankEngine, plan, recipe, seed, execution),
        plan, recipe, train_data, validation_data, (seed,), execution,
        None if checkpoint is None else _OfAllRanks(checkpoint, device), meter, until, keeping,
    )  # fmt: skip


class _RankEngine:
    """A rank's part in the steps of one run; see `nas.training.engine.Engine`."""

    def __init__(self, plan: RunPlan, recipe: Recipe, seed: int, execution: Execution) -> None:
        self._plan, self._recipe, self._execution = plan, recipe, execution
        self._rank, self._ranks = distributed.get_rank(), distributed.get_world_size()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._model = build_model(recipe, plan.design, plan.width)
        for module in self._gates():
            module.over_batch = self._mean
        self._trained: nn.Module = self._model
        #: which of the samples that were evaluated last are no repeated ones
        self._counted = torch.empty(0, dtype=torch.bool)
        device = torch.device(execution.device)
        if recipe.sharding == "full":
            # a block at a time, so that the device never holds more than its part and a block
            mesh = init_device_mesh(device.type, (self._ranks,))
            for block in self._model.get_submodule("blocks").children():
                fully_shard(block, mesh=mesh)
                register_fsdp_forward_method(block, "run")
            fully_shard(self._model, mesh=mesh)
        else:
            self._trained = DistributedDataParallel(
                self._model.to(device), gradient_as_bucket_view=True
            )
        # of the parameters as they are now
        groups = learning_rates(self._model, recipe, plan.width)
        self._rates = [group["lr"] for group in groups]
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            groups, betas=(recipe.beta1, recipe.beta2), weight_decay=recipe.weight_decay, fused=True
        )

    def _gates(self) -> list[Gated]:
        return [module for module in self._model.modules() if isinstance(module, Gated)]

    def set_rate(self, factor: float) -> None:
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Take one step on the whole batch (1, batch, ...); its loss before it (1,)."""
        part = slice(*(self._recipe.batch * r // self._ranks for r in (self._rank, self._rank + 1)))
        self._trained.train()
        with self._execution.autocast():
            outputs = self._trained(inputs[0, part])
        loss = task_of(self._recipe).loss(self._recipe, outputs, targets[0, part]).mean()
        routing = auxiliary_loss(self._model)
        trained = loss if routing is None else loss + ROUTER_WEIGHT * routing
        trained.backward()  # type: ignore[no-untyped-call]
        if self._recipe.clip:
            nn.utils.clip_grad_norm_(self._model.parameters(), self._recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self._mean(loss.detach()).view(1)

    def _mean(self, part: Tensor) -> Tensor:
        """The mean over all ranks."""
        whole = part.clone()
        distributed.all_reduce(whole)
        return whole / self._ranks

    @torch.no_grad()
    def evaluate(self, x: Tensor, y: Tensor) -> Tensor:
        """Loss of each validation sample (1, samples), float64 on the CPU."""
        each = -(-len(x) // self._ranks)
        # all ranks compute as much, or some would wait for ever: the last sample more than once
        first = self._rank * each
        own = torch.arange(first, first + each, device=x.device)
        piece = max(
            1, EVALUATION_TOKENS[torch.device(self._execution.device).type] // self._recipe.tokens
        )
        self._model.eval()
        losses = []
        for numbers in torch.split(own, piece):
            self._counted = numbers < len(x)
            at = numbers.clamp(max=len(x) - 1)
            with self._execution.autocast():
                outputs = self._model(x[at])
            losses.append(task_of(self._recipe).loss(self._recipe, outputs, y[at]))
        return self._gathered(torch.cat(losses))[: len(x)].double().cpu()[None]

    def _gathered(self, part: Tensor) -> Tensor:
        """The equal parts (n, ...) of all ranks in their order, (ranks · n, ...)."""
        parts = [torch.empty_like(part) for _ in range(self._ranks)]
        distributed.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    def routers(self) -> list[list[dict[str, Any]]]:
        """What the gates did with the last samples of each rank; see `routing_statistics`."""
        found = []
        for gate in self._gates():
            logits, chosen = gate._last_logits, gate._last_chosen
            if logits is None or chosen is None:
                continue
            tokens = self._counted.repeat_interleave(len(logits) // len(self._counted))
            kept = self._gathered(tokens)
            found.append(
                routing_statistics(self._gathered(logits)[kept], self._gathered(chosen)[kept])
            )
        return [found]

    def model_of(self, run: int) -> nn.Module | None:
        """On rank 0 the whole model on the CPU; None elsewhere."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        found = get_model_state_dict(self._model, options=options)
        if self._rank != 0:
            return None
        with torch.random.fork_rng(devices=[]):
            whole = build_model(self._recipe, self._plan.design, self._plan.width)
        whole.load_state_dict(found)
        return whole

    def state_dict(self) -> dict[str, Any]:
        """On rank 0 whole parameters and optimiser state, on the CPU; nothing elsewhere."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        found = get_state_dict(self._model, self.optimizer, options=options)
        return dict(zip(_TENSORS, found, strict=True)) if self._rank == 0 else {}

    def load_state_dict(self, saved: Mapping[str, Any], runs: Sequence[int]) -> None:
        """Take over the state that rank 0 has.

        Raises
        ------
        ValueError
            On every rank: it is that of another model.
        """
        shapes = {name: p.shape for name, p in self._model.named_parameters()}
        there = {name: getattr(saved.get("model", {}).get(name), "shape", None) for name in shapes}
        fits = torch.tensor(self._rank != 0 or there == shapes, device=self._execution.device)
        distributed.broadcast(fits, 0)
        if not fits:
            raise ValueError("its parameters have other shapes")
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        model, optimizer = (dict(saved.get(name, {})) for name in _TENSORS)
        # not by one call, which on a rank without a state would pass over the model
        set_model_state_dict(self._model, model, options=options)
        set_optimizer_state_dict(self._model, self.optimizer, optimizer, options=options)


class _OfAllRanks(Checkpoint):
    """A checkpoint that rank 0 reads and writes, and of which all ranks decide as one."""

    def __init__(self, kept: Checkpoint, device: torch.device) -> None:
        self._kept, self._device = kept, device
        self._first = distributed.get_rank() == 0
        self._asked = 0

    @property
    def is_due(self) -> bool:
        self._asked += 1
        if self._device.type != "cpu" and self._asked % LOOK_EVERY:
            return False  # an answer waits for the device
        due = torch.tensor(self._kept.is_due, device=self._device)
        distributed.broadcast(due, 0)
        return bool(due)

    def save(self, state: Mapping[str, Any]) -> None:
        if self._first:
            self._kept.save(state)

    def load(self) -> dict[str, Any] | None:
        saved = self._kept.load() if self._first else None
        told = [None if saved is None else {k: v for k, v in saved.items() if k not in _TENSORS}]
        distributed.broadcast_object_list(told, 0)
        return None if told[0] is None else told[0] | (saved or {})

    def remove(self) -> None:
        if self._first:
            self._kept.remove()
