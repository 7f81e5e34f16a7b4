"""Seconds of calls on a GPU (CUDA events) or a CPU, contenders in turns; graphs; memory; peak."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], object]
#: Rounds in which contenders take turns, so that a drift of the clock meets all of them.
_ROUNDS = 3
#: Seconds of one contender in one round, about, and the fewest and most calls in it.
_BURST_SECONDS, _LEAST, _MOST = 0.03, 3, 40
#: Seconds of a call above which a few calls are enough, and a graph would change little.
LONG = 0.1


def burst(call: Call, device: torch.device, count: int) -> list[float]:
    """Seconds of each of `count` calls that follow one another without waiting.

    On a GPU from event to event, so that a call whose launches take longer than its kernels counts
    with its launches.
    """
    call()
    if device.type != "cuda":
        times = [time.perf_counter()]
        for _ in range(count):
            call()
            times.append(time.perf_counter())
        return [after - before for before, after in pairwise(times)]
    marks = [_mark() for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]


def _mark() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def seconds(
    contenders: Mapping[str, Call], device: torch.device, toy: bool = False
) -> dict[str, dict[str, float]]:
    """Of each contender the median over all rounds, the quartiles, and the number of calls.

    A contender that takes long has a few calls only.
    """
    first = {name: burst(call, device, 2 if toy else 3) for name, call in contenders.items()}
    typical = {name: max(statistics.median(found), 1e-7) for name, found in first.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(1 if toy else _ROUNDS):
        for name, call in contenders.items():
            if typical[name] > LONG:
                times[name] = first[name]
                continue
            fitting = round(_BURST_SECONDS / typical[name])
            times[name] += burst(call, device, min(2 if toy else _MOST, max(_LEAST, fitting)))
    return {name: _summary(found) for name, found in times.items()}


def _summary(times: list[float]) -> dict[str, float]:
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return {
        "seconds": statistics.median(times),
        "lower_quartile": low,
        "upper_quartile": high,
        "calls": len(times),
    }


def graphed(call: Call) -> Call:
    """The same work as one CUDA graph, without Python and launches one by one.

    Raises
    ------
    RuntimeError
        The call waits for the GPU, or does something else that no graph can hold.
    """
    own = torch.cuda.current_stream()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(own)
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    own.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = call()
    except BaseException:
        torch.cuda.set_stream(own)  # which a capture that fails does not bring back
        torch.cuda.synchronize()
        raise

    def replay(kept: object = kept) -> object:  # what it writes to must live as long as it
        graph.replay()
        return kept

    return replay


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Memory that a call holds at its peak besides what is held already; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device) - before


def gemm_peak(device: torch.device, dtype: torch.dtype, toy: bool) -> dict[str, Any]:
    """FLOPs a second of one large square matrix product of random numbers."""
    side = 256 if toy else 8192 if device.type == "cuda" else 1024
    p, q = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(p)
    found = seconds({"gemm": lambda: torch.mm(p, q, out=out)}, device, toy)["gemm"]
    return {
        "flops_per_second": 2 * side**3 / found["seconds"],
        "side": side,
        "dtype": str(dtype).removeprefix("torch."),
    }


def passes(
    function: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, leaves: Sequence[Tensor]
) -> dict[str, Call]:
    """A layer's forward without gradients, and forward with the gradients of x and `leaves`."""

    def forward() -> Tensor:
        with torch.no_grad():
            return function(x)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(x), [x, *leaves], dy)

    return {"forward": forward, "forward+backward": both}
