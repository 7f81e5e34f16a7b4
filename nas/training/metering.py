"""What a training step costs where it runs: seconds, and memory at its peak."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile

from nas.records.trial import MeasuredCost

#: Steps before anything is timed: the first ones allocate, compile and warm caches.
_WARM_UP = 5
#: The step whose allocations are recorded: the optimiser has its state by then.
_RECORDED = 3
#: Steps timed together on a GPU, which is only waited for before and after.
_BURST = 20
#: Fewest timed steps that a median is taken of.
_MIN_TIMED = 5


class Optimized(Protocol):
    """What an optimiser holds; those of torch are such, and those of two parts."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    @property
    def state(self) -> Mapping[Any, Mapping[str, Any]]: ...

    def zero_grad(self, *, set_to_none: bool = True) -> None: ...


class CostMeter:
    """Measures the steps of one run; changes nothing that they compute."""

    def __init__(self, device: str) -> None:
        self._gpu = device.startswith("cuda")
        self._device = device
        self._done = 0
        self._seconds: list[float] = []
        self._peak: int | None = None
        self._started = 0.0
        self._runs = 1

    @contextmanager
    def step(self, optimizer: Optimized, runs: int = 1) -> Iterator[None]:
        """Around one training step of several runs, from its forward pass to its update."""
        self._done += 1
        self._runs = runs
        if self._gpu:
            yield from self._gpu_step(optimizer)
        elif self._done == _RECORDED:
            yield from self._recorded_step(optimizer)
        else:
            started = time.perf_counter()
            yield
            if self._done > _WARM_UP:
                self._seconds.append(time.perf_counter() - started)

    def _gpu_step(self, optimizer: Optimized) -> Iterator[None]:
        if self._done == _RECORDED:
            yield from self._recorded_gpu_step(optimizer)
            return
        if self._done == _WARM_UP + 1:
            torch.cuda.synchronize()
            self._started = time.perf_counter()
        yield
        if self._done == _WARM_UP + _BURST:
            torch.cuda.synchronize()
            self._seconds = [(time.perf_counter() - self._started) / _BURST]

    def _recorded_gpu_step(self, optimizer: Optimized) -> Iterator[None]:
        optimizer.zero_grad(set_to_none=True)
        held, before = _bytes_held(optimizer), torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        yield
        self._peak = held + torch.cuda.max_memory_allocated(self._device) - before

    def _recorded_step(self, optimizer: Optimized) -> Iterator[None]:
        # gradients of the step before would be freed unseen
        optimizer.zero_grad(set_to_none=True)
        held = _bytes_held(optimizer)
        with profile(
            activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False
        ) as record:
            yield
        level = most = 0
        for event in record.profiler.kineto_results.events():
            if event.name() == "[memory]":
                level += event.nbytes()
                most = max(most, level)
        self._peak = held + most

    def result(self) -> MeasuredCost:
        """What was measured so far: of runs that train together, the share of one."""
        timed = len(self._seconds) >= (1 if self._gpu else _MIN_TIMED)
        seconds = statistics.median(self._seconds) / self._runs if timed else None
        return MeasuredCost(seconds, None if self._peak is None else self._peak // self._runs)


def _bytes_held(optimizer: Optimized) -> int:
    """Parameters and optimiser state."""
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    tensors += [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    # of a tensor that lies on several devices, what lies on this one
    here = [getattr(t, "to_local", lambda t=t: t)() for t in tensors]
    return sum(t.numel() * t.element_size() for t in here)
