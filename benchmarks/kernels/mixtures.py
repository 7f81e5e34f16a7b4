"""BTT mixtures: every expert computed, the chosen ones alone, and dense, in time per token.

The contenders take turns on the same tensors, forward and backward: a `MixtureLinear` of E experts
that computes them all and gates them, as the papers' code does (`all`), the same layer by the plan
that its cost model chooses (`ours`), one that chooses all E experts and computes them by the same
kernels as ours (`every`), `torch.nn.Linear` (`dense`) and the dense `EinsumLinear` (`dense_ours`),
which on some processors uses a faster library.  The gate is drawn at random,
so that loads differ.  FLOPs are those counted by torch in forward.
"""

from __future__ import annotations

import argparse
import copy
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.kernels.interleaved import (
    add_ratios,
    keep_freed_memory,
    median_interval,
    rounds,
    with_interval,
)
from benchmarks.kernels.layers import pass_seconds
from benchmarks.reporting import report
from nas.layers.einsum import EinsumLinear
from nas.layers.mixture import MixtureLinear
from nas.layers.routing import router_statistics

EXPERTS, WIDTHS, ACTIVE = (8, 16), (512, 1024), 2
_SECONDS_PER_ROW = 8.0
_PAIRS = (("all", "ours"), ("every", "ours"), ("ours", "dense"), ("ours", "dense_ours"))


def flops_per_token(layer: nn.Module, x: torch.Tensor) -> float:
    """Forward FLOPs that torch counts."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    flops: int = counter.get_total_flops()
    return flops / len(x)


def measure(experts: int, width: int, tokens: int, threads: int) -> dict[str, Any]:
    """One row: a square layer of `width`, its mixture with `experts` experts."""
    torch.manual_seed(0)
    ours = MixtureLinear(f"btt-moe:experts={experts},active={ACTIVE}", width, width, bias=False)
    assert ours.gate is not None
    nn.init.normal_(ours.gate, std=width**-0.5)
    everything, dense = copy.deepcopy(ours), nn.Linear(width, width, bias=False)
    every = MixtureLinear(f"btt-moe:experts={experts},active={experts}", width, width, bias=False)
    with torch.no_grad():  # by hand: a state says how many experts are active, which differs
        for own, given in zip(every.parameters(), ours.parameters(), strict=True):
            own.copy_(given)
    every.plan = ours.plan_for(tokens)
    # as many tokens at a time as this plan is fastest with
    everything.plan = "grouping=all tile=256"
    x = torch.randn(tokens, width, requires_grad=True)
    dy = torch.randn(tokens, width)
    torch.testing.assert_close(everything(x), ours(x), rtol=1e-3, atol=1e-3)
    layers: dict[str, nn.Module] = {
        "all": everything, "every": every, "ours": ours, "dense": dense,
        "dense_ours": EinsumLinear("dense", width, width, bias=False),
    }  # fmt: skip
    leaves = [x, *(p for layer in layers.values() for p in layer.parameters())]
    timed = rounds(
        {name: pass_seconds(layer, x, dy, leaves) for name, layer in layers.items()},
        _SECONDS_PER_ROW,
    )
    both = {name: times[:, 1] for name, times in timed.items()}
    row: dict[str, Any] = {
        "experts": experts, "active": ACTIVE, "width": width, "tokens": tokens,
        "threads": threads, "plan": str(ours.plan_for(tokens)), "rounds": len(both["ours"]),
        "max_load": router_statistics(ours)[""]["max_load"],
        "structure_flops": ours.structure.flops,
    }  # fmt: skip
    for name, layer in layers.items():
        row[f"{name}_us_per_token"] = 1e6 * median_interval(both[name])[0] / tokens
        row[f"{name}_flops_per_token"] = flops_per_token(layer, x)
    add_ratios(row, both, _PAIRS)
    return row


def table_row(row: dict[str, Any]) -> dict[str, Any]:
    """What people read of a row: ratios with their intervals."""
    shown = {key: row[key] for key in ("experts", "width", "tokens", "threads")}
    for name in ("all", "every", "ours", "dense"):
        shown[f"{name}_kFLOPs"] = round(row[f"{name}_flops_per_token"] / 1e3)
        shown[f"{name}_µs"] = row[f"{name}_us_per_token"]
    return {
        **shown,
        "all/ours": with_interval(row, "all_over_ours"),
        "every/ours": with_interval(row, "every_over_ours"),
        "ours/dense": with_interval(row, "ours_over_dense"),
        "ours/dense_ours": with_interval(row, "ours_over_dense_ours"),
        "plan": row["plan"].removeprefix("grouping=").split()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    given = parser.parse_args()
    keep_freed_memory()
    rows = []
    for threads, tokens, width, experts in product(given.threads, given.tokens, WIDTHS, EXPERTS):
        torch.set_num_threads(threads)
        rows.append(measure(experts, width, tokens, threads))
    report(
        f"BTT-MoE, {ACTIVE} experts per token, forward + backward: µs per token, medians of "
        "interleaved rounds (interval); forward FLOPs per token",
        [table_row(row) for row in rows],
        rows,
    )


if __name__ == "__main__":
    main()
