"""GPT-2 and a vision transformer with Monarch layers in place of dense ones: counts and one step.

GPT-2 at its 124M shape and ViT-S/32 at 224 × 224, both built from their configuration by Hugging
Face transformers with random weights; every linear layer that `replace_linears` can take becomes
Monarch.  FLOPs of the dense model are counted by torch itself as it runs on the meta device; the
structured model spends the same outside the replaced layers.  The step is AdamW's on one batch of
random tokens or pixels, at the rates of `param_groups`; its loss is taken before and after in
evaluation mode.  Seconds of a step (forward, backward, AdamW) are a median of the ratio to the
dense model in turns, on one thread.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

from benchmarks.kernels.interleaved import keep_freed_memory, ratio
from benchmarks.reporting import report
from nas.layers import EinsumLinear, param_groups, replace_linears

THETA = "monarch"
_LR = 3e-4
_REPEATS = 7


@dataclass(frozen=True)
class Case:
    """A model and one batch for it."""

    name: str
    build: Callable[[], nn.Module]
    batch: dict[str, Tensor]


def cases() -> list[Case]:
    # the plain attention, whose products torch's counter sees
    gpt2 = GPT2Config(attn_implementation="eager")
    vit = ViTConfig(
        image_size=224, patch_size=32, hidden_size=384, num_hidden_layers=12,
        num_attention_heads=6, intermediate_size=1536, num_labels=1000,
        attn_implementation="eager",
    )  # fmt: skip
    tokens = torch.randint(gpt2.vocab_size, (1, 256))
    images = {"pixel_values": torch.randn(16, 3, 224, 224), "labels": torch.randint(1000, (16,))}
    return [
        Case("GPT-2 124M, 1 × 256 tokens", lambda: GPT2LMHeadModel(gpt2),
             {"input_ids": tokens, "labels": tokens}),
        Case("ViT-S/32, 16 images of 224", lambda: ViTForImageClassification(vit), images),
    ]  # fmt: skip


@contextmanager
def tokens_seen(model: nn.Module) -> Iterator[dict[EinsumLinear, int]]:
    """How many tokens pass each `EinsumLinear`."""
    seen: dict[EinsumLinear, int] = {}

    def add(module: EinsumLinear, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        seen[module] = seen.get(module, 0) + inputs[0].numel() // inputs[0].shape[-1]

    layers = [m for m in model.modules() if isinstance(m, EinsumLinear)]
    handles = [layer.register_forward_hook(add) for layer in layers]
    yield seen
    for handle in handles:
        handle.remove()


def forward_flops(case: Case) -> dict[str, int]:
    """Forward FLOPs of one batch: the model and its replaced layers, before and after."""
    batch = {name: value.to("meta") for name, value in case.batch.items()}
    with torch.device("meta"), torch.no_grad():
        model = case.build()
        with FlopCounterMode(display=False) as counter:
            model(**batch)
        replace_linears(model, THETA)
        with tokens_seen(model) as seen:
            model(**batch)
    structures = [(layer.structure, n) for layer, n in seen.items()]
    before = sum(2 * s.d_in * s.d_out * n for s, n in structures)
    after = sum(s.flops * n for s, n in structures)
    whole = counter.get_total_flops()
    return {
        "model_flops_before": whole,
        "model_flops_after": whole - before + after,
        "layers_flops_before": before,
        "layers_flops_after": after,
    }


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> float:
    model.eval()
    with torch.no_grad():
        loss = model(**batch).loss.item()
    model.train()
    return float(loss)


def step_of(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], None]:
    """One step of AdamW."""
    optimizer = torch.optim.AdamW(param_groups(model, _LR))

    def step() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    return step


def returns_from_disk(case: Case, model: nn.Module) -> bool:
    """Whether a new model that loads this one's state has the same tensors and the same loss."""
    other = case.build()
    replace_linears(other, THETA)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        safetensors.torch.save_model(model, str(path))
        safetensors.torch.load_model(other, path)
    state = other.state_dict()
    same = all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    return same and loss_of(other, case.batch) == loss_of(model, case.batch)


def measure(case: Case) -> dict[str, Any]:
    torch.manual_seed(0)
    dense = case.build()
    model = copy.deepcopy(dense)
    surgery = replace_linears(model, THETA)
    print(f"{case.name}\n{surgery}\n")
    step = step_of(model, case.batch)
    loss_before = loss_of(model, case.batch)
    step()
    loss_after = loss_of(model, case.batch)
    same = returns_from_disk(case, model)
    timed = ratio(step, step_of(dense, case.batch), _REPEATS)
    return {
        "model": case.name,
        "theta": THETA,
        "layers": len(surgery.replaced),
        "model_params_before": surgery.model_params_before,
        "model_params_after": surgery.model_params_after,
        "layers_params_before": surgery.params_before,
        "layers_params_after": surgery.params_after,
        **forward_flops(case),
        "loss_before_step": loss_before,
        "loss_after_step": loss_after,
        "state_returns": same,
        "dense_step_seconds": timed["other_seconds"],
        "step_seconds": timed["seconds"],
        "step_over_dense": timed["ratio"],
        "step_over_dense_low": timed["ratio_low"],
        "step_over_dense_high": timed["ratio_high"],
    }


def main() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    torch.manual_seed(0)
    for row in [measure(case) for case in cases()]:
        readable = [
            {"": key, row["model"]: f"{value:,}" if type(value) is int else value}
            for key, value in row.items()
            if key != "model"
        ]
        report(f"Every eligible linear layer as {THETA}", readable, [row])


if __name__ == "__main__":
    main()
