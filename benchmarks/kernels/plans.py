"""The plan that the cost model chooses against the best of all candidates, by measuring them.

As a command: the 23 θ of the papers on four shapes, 1024 tokens, one thread, float32, by the rates
of this machine, and `torch.nn.Linear` beside them.

Candidates run forward and backward on the same tensors in turns.  Those that are expected or found
to be far slower than the fastest drop out at once.  Of the rest the best is picked by one half of
the rounds, and compared with the chosen one by the other half, then with the halves exchanged, so
that the luck of the fastest in the rounds that picked it is no part of the ratio; by noise that
leaves it may be below 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.kernels.interleaved import add_ratios, keep_freed_memory, rounds, with_interval
from benchmarks.kernels.papers import SHAPES, STRUCTURES
from benchmarks.reporting import report
from nas.designs.einsum import Structure
from nas.designs.taxonomy import parse_theta
from nas.layers.kernels import einsum as kernels
from nas.layers.kernels.machine import measure_rates
from nas.layers.kernels.plan import Plan, candidates, choose, cost
from nas.rates import use_rates

#: Times the least expected cost, and the least time of the first rounds, at which one drops out.
_HOPELESS, _FAR = 3.0, 1.3


def thread_seconds(threads: int, device: torch.device) -> Callable[[], float]:
    """A clock: of one thread on a CPU the time it computes, whoever else uses the machine."""
    return time.thread_time if threads == 1 and device.type == "cpu" else time.perf_counter


def chosen_and_best(
    structure: Structure,
    tokens: int,
    threads: int,
    device: torch.device,
    dtype: torch.dtype,
    budget_seconds: float,
) -> dict[str, Any]:
    """The plan chosen, the best one, and seconds of the one over those of the other."""
    chosen = choose(structure, tokens, device, dtype)
    plans = candidates(structure, tokens, device, dtype)
    costs = {plan: cost(plan, structure, tokens) for plan in plans}
    plans = [plan for plan in plans if costs[plan] <= _HOPELESS * costs[chosen]]
    clock = thread_seconds(threads, device)
    calls = _calls(structure, plans, tokens, clock, device, dtype)
    with torch.no_grad():
        first = {plan: min(call()[0] for _ in range(2)) for plan, call in calls.items()}
        near = {p for p in plans if first[p] <= _FAR * min(first.values())} | {chosen}
        kept = {str(plan): call for plan, call in calls.items() if plan in near}
        dense = {"dense": _dense_call(structure, tokens, clock, device, dtype)}
        timed = rounds(kept | dense, budget_seconds, 4, 60)
    seconds = {plan: times[:, 0] for plan, times in timed.items()}
    over_dense = {"chosen": seconds[str(chosen)], "linear": seconds.pop("dense")}
    ratio, best = crossed_ratio(seconds, str(chosen))
    found: dict[str, Any] = {
        "plan": str(chosen), "best_plan": best, "chosen_over_best": ratio,
        "plans_measured": len(plans), "plan_rounds": len(seconds[best]),
        "chosen_seconds": float(np.median(seconds[str(chosen)])),
        "best_seconds": float(np.median(seconds[best])),
    }  # fmt: skip
    add_ratios(found, over_dense, [("chosen", "linear")])
    return found


def crossed_ratio(seconds: Mapping[str, NDArray[np.float64]], chosen: str) -> tuple[float, str]:
    """Seconds of `chosen` over those of the best, and the best of all rounds."""

    def fastest(part: slice) -> str:
        return min(seconds, key=lambda plan: float(np.median(seconds[plan][part])))

    halves = slice(0, None, 2), slice(1, None, 2)
    logs = [
        np.log(np.median(seconds[chosen][other] / seconds[fastest(picked)][other]))
        for picked, other in (halves, halves[::-1])
    ]
    return float(np.exp(np.mean(logs))), fastest(slice(None))


def _calls(
    structure: Structure,
    plans: list[Plan],
    tokens: int,
    clock: Callable[[], float],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[Plan, Callable[[], tuple[float]]]:
    s = structure.sizes
    draw = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw, device=device, dtype=dtype)

    x, dy = drawn(tokens, structure.d_in), drawn(tokens, structure.d_out)
    if structure.is_dense:
        a, b = drawn(structure.d_out, structure.d_in), None
    else:
        a = drawn(s.gamma, s.rho, s.phi, s.delta, s.alpha)
        b = drawn(s.phi, s.gamma, s.rho, s.beta, s.epsilon)

    def timed(plan: Plan) -> Callable[[], tuple[float]]:
        def run() -> tuple[float]:
            _finish(device)
            started = clock()
            kernels.forward(x, a, b, structure.d_out, plan)
            kernels.backward(x, a, b, dy, plan, (True, True, True))
            _finish(device)
            return (clock() - started,)

        return run

    return {plan: timed(plan) for plan in plans}


def _dense_call(
    structure: Structure,
    tokens: int,
    clock: Callable[[], float],
    device: torch.device,
    dtype: torch.dtype,
) -> Callable[[], tuple[float]]:
    """`torch.nn.Linear` of the same dimensions, by its own products."""
    dense = Structure.of(parse_theta("dense"), structure.d_in, structure.d_out)
    plan = Plan("materialised", gemm="blas")
    return _calls(dense, [plan], tokens, clock, device, dtype)[plan]


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def short(plan: str) -> str:
    """The text of a plan for a narrow column: a/batched/blocks tile blas."""
    order, *options = plan.split()
    said = dict(option.split("=") for option in options)
    if order == "materialised":
        return f"W {said['gemm']}"
    text = f"{order[0]} {said['first']}/{said['second']}"
    text += f" {said['tile']}" if said["tile"] != "0" else ""
    return text + (f" {said['gemm']}" if "blocks" in text else "")


def plans_summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How well plans are chosen, over the rows of a device and number of threads."""
    worst = max(rows, key=lambda r: r["chosen_over_best"])
    cheap = [r for r in rows if r["flops_over_dense"] <= 1]
    slowest = max(cheap, key=lambda r: r["chosen_over_linear"])
    over = [r for r in cheap if r["chosen_over_linear_low"] > 1.1]

    def named(row: dict[str, Any]) -> str:
        return f"{row['theta']} {row['d_in']}→{row['d_out']}"

    return {
        "device": rows[0]["device"],
        "threads": rows[0]["threads"],
        "rows": len(rows),
        "chosen/best_median": statistics.median(r["chosen_over_best"] for r in rows),
        "chosen/best_worst": f"{worst['chosen_over_best']:.3f} {named(worst)}",
        "rows_above_1.03": sum(r["chosen_over_best"] > 1.03 for r in rows),
        "rows_above_1.15": sum(r["chosen_over_best"] > 1.15 for r in rows),
        "chosen/dense_most,_FLOPs_≤_dense": f"{with_interval(slowest, 'chosen_over_linear')} "
        f"{named(slowest)}",
        "above_1.1,_FLOPs_≤_dense": ", ".join(
            f"{named(r)} {r['chosen_over_linear']:.2f} (FLOPs {r['flops_over_dense']:.2f})"
            for r in sorted(over, key=lambda r: -r["chosen_over_linear"])
        ) or "none",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=1.5, help="of a structure and shape")
    budget = parser.parse_args().seconds
    keep_freed_memory()
    torch.set_num_threads(1)
    rates = measure_rates(1)
    use_rates(rates)
    rows: list[dict[str, Any]] = []
    for (d_in, d_out), (name, theta) in product(SHAPES, STRUCTURES.items()):
        structure = Structure.of(theta, d_in, d_out)
        found = chosen_and_best(structure, 1024, 1, torch.device("cpu"), torch.float32, budget)
        over_dense = structure.macs / (d_in * d_out)
        row = {"theta": name, "d_in": d_in, "d_out": d_out, "flops_over_dense": over_dense}
        rows.append(row | {"device": "cpu", "threads": 1} | found)
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    report("Rates of this machine, in seconds a unit", [rates.as_dict()])
    report("Plans, forward + backward", [plan_row(row) for row in rows], rows)
    chosen = plans_summary(rows)
    report("Plans chosen", [{"": k, "value": v} for k, v in chosen.items()], [chosen])


def plan_row(row: dict[str, Any]) -> dict[str, Any]:
    """What people read of a row."""
    return {
        "theta": row["theta"],
        "layer": f"{row['d_in']}→{row['d_out']}",
        "FLOPs/dense": row["flops_over_dense"],
        "chosen": short(row["plan"]),
        "best": "=" if row["plan"] == row["best_plan"] else short(row["best_plan"]),
        "chosen_ms": 1e3 * row["chosen_seconds"],
        "best_ms": 1e3 * row["best_seconds"],
        "chosen/best": f"{row['chosen_over_best']:.3f}",
        "chosen/dense": with_interval(row, "chosen_over_linear"),
    }


if __name__ == "__main__":
    main()
