"""Training steps of the product's models beside a plain transformer of the same shape.

The plain model is written as in small GPT code: `torch.nn.Linear` with query, key and value in one,
`LayerNorm`, fused attention, `GELU`, AdamW with one learning rate and a clipped gradient; it has no
query-key norms, no capped factors, no learning rates by structure.  All contenders take turns on
one thread; `/plain` is time over that of the plain model, `FLOP/s` the exact train FLOPs of the
structure over seconds, `share` that over the measured rate of a large matrix product.

    python -m benchmarks.kernels.steps [--widths 16 32 64 96 256] [--replicates 1 3]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.kernels.interleaved import keep_freed_memory, median_interval, rounds
from benchmarks.reporting import report
from nas.designs.design import as_design
from nas.planning.recipe import TEXT, TextRecipe
from nas.planning.runs import plan_of_steps
from nas.training.engine import CPU, Engine, execution_plans

DESIGNS = ("dense", "monarch", "btt:rho=1/4", "btt-moe:experts=8,active=2")
_SECONDS = 4.0


class _Block(nn.Module):
    def __init__(self, recipe: TextRecipe, width: int) -> None:
        super().__init__()
        self.heads = width // recipe.head_dim
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=recipe.bias)
        self.out = nn.Linear(width, width, bias=recipe.bias)
        self.up = nn.Linear(width, recipe.mlp_ratio * width, bias=recipe.bias)
        self.down = nn.Linear(recipe.mlp_ratio * width, width, bias=recipe.bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        parts = self.qkv(self.first(x)).split(width, dim=2)
        q, k, v = (p.view(batch, tokens, self.heads, -1).transpose(1, 2) for p in parts)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        y: Tensor = x + self.down(functional.gelu(self.up(self.second(x))))
        return y


class Plain(nn.Module):
    """Token ids (batch, tokens) → logits (batch, tokens, vocabulary)."""

    def __init__(self, recipe: TextRecipe, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(recipe.vocabulary, width)
        self.places = nn.Embedding(recipe.context, width)
        self.blocks = nn.Sequential(*(_Block(recipe, width) for _ in range(recipe.depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, recipe.vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        places = self.places(torch.arange(x.shape[1], device=x.device))
        logits: Tensor = self.head(self.norm(self.blocks(self.tokens(x) + places)))
        return logits


def plain_step(recipe: TextRecipe, width: int, x: Tensor, y: Tensor) -> Callable[[], None]:
    """A step of the plain model on a batch."""
    model = Plain(recipe, width).to(x.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        loss = functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        loss.item()

    return step


def peak_flops(side: int = 1024) -> float:
    """FLOP/s of a square matrix product: the fastest of several."""
    a, b = torch.randn(side, side), torch.randn(side, side)
    times = []
    for _ in range(20):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return 2 * side**3 / min(times)


def _timed(step: Callable[[], Any]) -> Callable[[], tuple[float]]:
    def run() -> tuple[float]:
        started = time.perf_counter()
        step()
        return (time.perf_counter() - started,)

    return run


def measure(width: int, replicates: list[int], peak: float) -> list[dict[str, Any]]:
    """Rows of one width: the plain model, then each design and number of runs at once."""
    recipe = TEXT
    calls: dict[str, Callable[[], tuple[float, ...]]] = {}
    x = torch.randint(recipe.vocabulary, (max(replicates), recipe.batch, recipe.context))
    y = torch.randint(recipe.vocabulary, x.shape)
    calls["plain 1"] = _timed(plain_step(recipe, width, x[0], y[0]))
    flops = {}
    for name in DESIGNS:
        plan = plan_of_steps(recipe, as_design(name), width, 1)
        flops[name] = plan.train_flops_per_step
        plans = execution_plans(plan, recipe)
        for count in replicates:
            engine = Engine(plan, recipe, range(count), CPU, plans)

            def step(engine: Engine = engine, count: int = count) -> None:
                engine.step(x[:count], y[:count]).tolist()

            calls[f"{name} {count}"] = _timed(step)
    timed = rounds(calls, _SECONDS * len(calls) / 4, least=5)
    base = median_interval(timed["plain 1"][:, 0])[0]
    rows = []
    for key, times in timed.items():
        name, count = key.split()[0], int(key.split()[1])
        seconds = median_interval(times[:, 0])[0] / count
        rate = flops.get(name, flops["dense"]) / seconds
        rows.append(
            {
                "width": width, "model": name, "runs at once": count, "ms/run": 1e3 * seconds,
                "/plain": seconds / base, "GFLOP/s": rate / 1e9, "share": rate / peak,
            }
        )  # fmt: skip
    return rows


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64, 96, 256])
    options.add_argument("--replicates", type=int, nargs="+", default=[1, 3])
    given = options.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    peak = peak_flops()
    rows = [row for width in given.widths for row in measure(width, given.replicates, peak)]
    report("One training step of 512 tokens, one thread", rows)


if __name__ == "__main__":
    main()
