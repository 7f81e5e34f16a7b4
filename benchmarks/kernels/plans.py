"""The plan that the cost model chooses against the best of all candidates, by measuring them.

As a command: of the 23 θ of the papers on the shapes of `benchmarks.kernels.layers`, 1024 tokens, one
thread, float32, with the rates of this machine; a row of JSON as soon as it is measured.

Candidates run forward and backward on the same tensors in turns.  Those that are expected or found
to be far slower than the fastest drop out at once.  Of the rest the best is picked by one half of
the rounds, and compared with the chosen one by the other half, then with the halves exchanged, so
that the luck of the fastest in the rounds that picked it is no part of the ratio; by noise that
leaves it may be below 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.kernels.interleaved import rounds
from nas.designs.einsum import Structure
from nas.layers.kernels import einsum as kernels
from nas.layers.kernels.plan import Plan, candidates, choose, cost

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
    calls = _calls(structure, plans, tokens, thread_seconds(threads, device), device, dtype)
    with torch.no_grad():
        first = {plan: min(call()[0] for _ in range(2)) for plan, call in calls.items()}
        near = {p for p in plans if first[p] <= _FAR * min(first.values())} | {chosen}
        kept = {str(plan): call for plan, call in calls.items() if plan in near}
        seconds = {plan: t[:, 0] for plan, t in rounds(kept, budget_seconds, 4, 60).items()}
    ratio, best = crossed_ratio(seconds, str(chosen))
    return {
        "plan": str(chosen), "best_plan": best, "chosen_over_best": ratio,
        "plans_measured": len(plans), "plan_rounds": len(seconds[best]),
        "chosen_seconds": float(np.median(seconds[str(chosen)])),
        "best_seconds": float(np.median(seconds[best])),
    }  # fmt: skip


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


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
