"""Structured layers against the papers' path, `torch.einsum` and dense: time of every pass.

The contenders take turns on the same tensors: `EinsumLinear` with the plan that its cost model
chooses (`ours`), the same restricted to the matrix products that `torch.nn.Linear` uses
(`ours_blas`), the papers' path and one `torch.einsum`, all of the same structure; and
`torch.nn.Linear` (`dense`) and the dense `EinsumLinear` (`dense_ours`) of the same dimensions.
The cost model has the rates of this machine, measured first; `chosen/best` is the time of the plan
it chooses over that of the best found by measuring all (`benchmarks.kernels.plans`).
`off_dense_rate` is time per FLOP over that of the faster dense one.  By default the 23 θ of the
papers on four shapes with 1024 tokens and one thread; with FULL=1 also 4096 tokens and two threads.
With a GPU the same in bfloat16 there.
"""

from __future__ import annotations

import copy
import math
import os
import sys
import time
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.kernels.interleaved import (
    add_ratios,
    keep_freed_memory,
    median_interval,
    rounds,
    with_interval,
)
from benchmarks.kernels.papers import SHAPES, STRUCTURES, one_einsum
from benchmarks.kernels.papers import product as papers_product
from benchmarks.kernels.plans import (
    chosen_and_best,
    plans_summary,
    short,
    thread_seconds,
)
from benchmarks.reporting import report
from nas.layers import EinsumLinear
from nas.layers.kernels.machine import measure_rates
from nas.layers.kernels.plan import choose
from nas.rates import MachineRates, use_rates

_SECONDS_PER_ROW, _SECONDS_PER_PLANS = 1.5, 1.5
_PASSES = ("forward", "forward+backward")
_PAIRS = (
    ("papers", "ours"), ("einsum", "ours"), ("papers", "ours_blas"), ("ours", "dense"),
    ("ours", "dense_ours"),
)  # fmt: skip


def pass_seconds(
    call: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, leaves: list[Tensor]
) -> Callable[[], tuple[float, float]]:
    """A contender: seconds of (forward, forward + backward)."""
    clock = thread_seconds(torch.get_num_threads(), x.device)

    def now() -> float:
        if x.is_cuda:
            torch.cuda.synchronize()
        return clock()

    def run() -> tuple[float, float]:
        for leaf in leaves:
            leaf.grad = None
        started = now()
        y = call(x)
        middle = now()
        torch.autograd.backward(y, dy)
        return middle - started, now() - started

    return run


def measure(
    name: str, d_in: int, d_out: int, tokens: int, threads: int, device: str
) -> list[dict[str, Any]]:
    """Rows, one for each pass, of one structure and shape."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    ours = EinsumLinear(STRUCTURES[name], d_in, d_out, False, device=device, dtype=dtype)
    dense = nn.Linear(d_in, d_out, False, device=device, dtype=dtype)
    x = torch.randn(tokens, d_in, device=device, dtype=dtype).requires_grad_()
    dy = torch.randn(tokens, d_out, device=device, dtype=dtype)
    structure = ours.structure

    def padded(path: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        surplus = structure.padded_in - d_in
        return lambda x: path(functional.pad(x, (0, surplus)) if surplus else x, ours.A, ours.B)[
            :, :d_out
        ]

    ours_blas, dense_ours = copy.deepcopy(ours), EinsumLinear("dense", d_in, d_out, False).to(x)
    ours_blas.plan = choose(structure, tokens, x.device, dtype, library="blas")
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": ours, "dense": dense, "dense_ours": dense_ours, "ours_blas": ours_blas,
        "papers": padded(papers_product), "einsum": padded(one_einsum),
    }  # fmt: skip
    error = 1e-3 if dtype == torch.float32 else 5e-2
    for path in ("papers", "einsum", "ours_blas"):
        torch.testing.assert_close(calls[path](x), ours(x), rtol=error, atol=error)
    leaves = [x, *(p for m in (ours, ours_blas, dense, dense_ours) for p in m.parameters())]
    timed = rounds(
        {contender: pass_seconds(call, x, dy, leaves) for contender, call in calls.items()},
        _SECONDS_PER_ROW,
        least=3,
    )
    flops_over_dense = structure.macs / (d_in * d_out)
    found = chosen_and_best(structure, tokens, threads, x.device, dtype, _SECONDS_PER_PLANS)
    rows = []
    for part, label in enumerate(_PASSES):
        seconds = {contender: times[:, part] for contender, times in timed.items()}
        row: dict[str, Any] = {
            "theta": name, "d_in": d_in, "d_out": d_out, "tokens": tokens, "threads": threads,
            "device": device, "dtype": str(dtype).removeprefix("torch."), "pass": label,
            **found, "rounds": len(seconds["ours"]), "flops_over_dense": flops_over_dense,
        }  # fmt: skip
        for contender, times in seconds.items():
            row[f"{contender}_seconds"] = median_interval(times)[0]
        add_ratios(row, seconds, _PAIRS)
        slower = max(row["ours_over_dense"], row["ours_over_dense_ours"])
        row["off_dense_rate"] = slower / flops_over_dense
        rows.append(row)
    return rows


def table_row(row: dict[str, Any]) -> dict[str, Any]:
    """What people read of a row: ratios with their intervals."""
    return {
        "theta": row["theta"],
        "layer": f"{row['d_in']}→{row['d_out']}",
        "tokens": row["tokens"],
        "threads": row["threads"],
        "FLOPs/dense": row["flops_over_dense"],
        "rounds": row["rounds"],
        "ours_ms": 1e3 * row["ours_seconds"],
        "papers/ours": with_interval(row, "papers_over_ours"),
        "papers/ours_blas": f"{row['papers_over_ours_blas']:.2f}",
        "einsum/ours": with_interval(row, "einsum_over_ours"),
        "ours/dense": with_interval(row, "ours_over_dense"),
        "off_dense_rate": row["off_dense_rate"],
        "plan": short(row["plan"]),
        "best": "=" if row["plan"] == row["best_plan"] else short(row["best_plan"]),
        "chosen/best": f"{row['chosen_over_best']:.2f}",
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric means and extremes over rows of one pass, device and number of threads."""

    def mean(key: str, chosen: list[dict[str, Any]]) -> float:
        return math.exp(sum(math.log(r[key]) for r in chosen) / len(chosen))

    blocks = [r for r in rows if r["theta"].startswith("btt")]
    cheap = [r for r in rows if r["flops_over_dense"] <= 1]
    dear = [r for r in rows if r["flops_over_dense"] > 1]
    slowest = min(rows, key=lambda r: r["papers_over_ours"])
    return {
        "pass": rows[0]["pass"],
        "device": rows[0]["device"],
        "threads": rows[0]["threads"],
        "rows": len(rows),
        "papers/ours_BTT": mean("papers_over_ours", blocks),
        "papers/ours_all": mean("papers_over_ours", rows),
        "papers/ours_blas_BTT": mean("papers_over_ours_blas", blocks),
        "papers/ours_blas_all": mean("papers_over_ours_blas", rows),
        "einsum/ours_all": mean("einsum_over_ours", rows),
        "papers/ours_least": f"{with_interval(slowest, 'papers_over_ours')} "
        f"{slowest['theta']} {slowest['d_in']}→{slowest['d_out']}",
        "rows_below_0.95": sum(r["papers_over_ours_high"] < 0.95 for r in rows),
        "ours/dense_most,_FLOPs_≤_dense": max(r["ours_over_dense"] for r in cheap),
        "ours/dense_most,_FLOPs_>_dense": max((r["ours_over_dense"] for r in dear), default="–"),
        "off_dense_rate": mean("off_dense_rate", rows),
    }


def transposed(columns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a table with a column for each of these."""
    return [
        {"": name} | {f"with_{c['threads']}": c[name] for c in columns}
        for name in columns[0]
        if name != "threads"
    ]


def main() -> None:
    keep_freed_memory()
    full = os.environ.get("FULL") == "1"
    devices = [("cpu", t) for t in ((1, 2) if full else (1,))]
    devices += [("cuda", 1)] if torch.cuda.is_available() else []
    grid = list(product(devices, SHAPES, (1024, 4096) if full else (1024,), STRUCTURES))
    rows: list[dict[str, Any]] = []
    rates: dict[int, MachineRates] = {}
    started = time.perf_counter()
    for done, ((device, threads), (d_in, d_out), tokens, name) in enumerate(grid):
        torch.set_num_threads(threads)
        if threads not in rates:
            rates[threads] = measure_rates(threads)
        use_rates(rates[threads])
        rows += measure(name, d_in, d_out, tokens, threads, device)
        if sys.stderr.isatty() or done % 23 == 22:
            spent = time.perf_counter() - started
            print(f"{done + 1}/{len(grid)} structures, {spent:.0f} s", file=sys.stderr)
    both = [r for r in rows if r["pass"] == _PASSES[1]]
    report(
        "EinsumLinear, forward + backward: medians of interleaved rounds (interval)",
        [table_row(r) for r in both],
        rows,
    )
    by_threads = [{"threads": threads} | r.as_dict() for threads, r in rates.items()]
    report("Rates of this machine, in seconds a unit", transposed(by_threads), by_threads)
    for place in devices:
        chosen = plans_summary([r for r in both if (r["device"], r["threads"]) == place])
        report("Plans chosen", [{"": k, "value": v} for k, v in chosen.items()], [chosen])
    summaries = [
        summary([r for r in rows if (r["device"], r["threads"], r["pass"]) == (*where, label)])
        for where in devices
        for label in _PASSES
    ]
    for where in summaries:
        report(
            "Geometric means and extremes of the ratios",
            [{"ratio": k, "": v} for k, v in where.items()],
            [where],
        )


if __name__ == "__main__":
    main()
