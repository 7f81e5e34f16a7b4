"""The rates of this machine, fitted to layers that are timed on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nas.designs.einsum import Sizes
from nas.errors import InvalidInput
from nas.layers.kernels import einsum as kernels
from nas.layers.kernels.plan import Plan, Sized, gemm_libraries
from nas.layers.kernels.work import work
from nas.rates import Machine, MachineRates, load_or_measure, processor, use_rates

#: Tokens, (α, β, γ, δ, ε, φ, ρ) and plan of layers that are small enough to be timed often, large
#: enough to leave the caches, and so different that each kind of work is much of some's time.
_LAYERS: tuple[tuple[int, tuple[int, ...], str], ...] = (
    (1024, (16, 1, 16, 1, 32, 32, 1), "a-first"),
    (1024, (16, 1, 16, 1, 32, 32, 1), "a-first second=blocks"),
    (1024, (16, 1, 16, 1, 32, 32, 1), "a-first first=blocks"),
    (512, (16, 1, 16, 1, 32, 32, 1), "a-first second=blocks gemm=onednn"),
    (1024, (32, 1, 32, 1, 32, 32, 1), "a-first tile=256"),
    (1024, (32, 1, 32, 1, 32, 32, 1), "a-first first=blocks second=blocks"),
    (1024, (64, 1, 16, 1, 64, 16, 1), "a-first"),
    (1024, (64, 1, 16, 1, 64, 16, 1), "a-first first=blocks second=blocks"),
    (1024, (64, 1, 16, 1, 64, 16, 1), "a-first first=blocks second=blocks gemm=onednn"),
    (512, (128, 1, 4, 1, 128, 4, 1), "a-first"),
    (512, (8, 1, 32, 1, 8, 128, 1), "a-first tile=256"),
    (512, (8, 1, 32, 1, 8, 128, 1), "a-first first=blocks"),
    (1024, (8, 1, 32, 1, 128, 8, 1), "a-first"),
    (1024, (8, 1, 32, 1, 128, 8, 1), "a-first second=blocks"),
    (1024, (64, 1, 4, 1, 205, 5, 1), "a-first"),
    (1024, (64, 1, 4, 1, 205, 5, 1), "a-first second=blocks"),
    (512, (16, 1, 16, 1, 32, 32, 4), "a-first tile=256"),
    (512, (16, 1, 16, 1, 32, 32, 4), "a-first second=blocks"),
    (1024, (16, 1, 16, 1, 32, 32, 4), "materialised"),
    (1024, (16, 1, 16, 1, 32, 32, 4), "materialised gemm=onednn"),
    (1024, (256, 1, 1, 1, 512, 1, 64), "a-first"),
    (1024, (256, 1, 1, 1, 512, 1, 64), "a-first first=blocks second=blocks"),
    (1024, (256, 1, 1, 1, 512, 1, 64), "a-first first=blocks second=blocks gemm=onednn"),
    (1024, (16, 16, 1, 16, 16, 1, 1), "a-first"),
    (1024, (16, 16, 1, 16, 16, 1, 1), "b-first"),
    (1024, (16, 16, 1, 32, 32, 1, 1), "a-first first=blocks second=tokens"),
    (512, (16, 16, 1, 32, 32, 1, 4), "a-first first=blocks second=tokens"),
    (1024, (16, 16, 1, 32, 32, 1, 4), "a-first"),
    (1024, (16, 4, 4, 5, 41, 5, 1), "a-first"),
    (1024, (16, 4, 4, 5, 41, 5, 1), "a-first first=blocks second=blocks"),
    (512, (4, 1, 8, 1, 4, 8, 1), "a-first"),
    (512, (4, 1, 8, 1, 4, 8, 1), "materialised"),
    (64, (8, 1, 8, 1, 8, 8, 1), "a-first"),
    (64, (8, 1, 8, 1, 8, 8, 1), "a-first second=blocks"),
    (64, (8, 1, 8, 1, 8, 8, 1), "materialised"),
)
#: Dense layers: (tokens, d_in, d_out).
_DENSE = ((512, 32, 32), (512, 128, 512), (512, 512, 512), (64, 256, 256))
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 40
_SECONDS = 4.0
#: A rate of twice its default, all others as they are in proportion, weighs as much as a layer
#: whose time is off by this share: it decides where layers do not.
_PRIOR = 0.2
#: A share by which a layer may be off before it weighs less.
_TOLERANCE = 0.1


def measure_rates(threads: int = 1) -> MachineRates:
    """The rates of this machine in float32 with so many threads; takes some five seconds.

    Layers are run forward and backward in turns, the least time of each is kept, and the rates
    are those that explain these times best (non-negative least squares of relative errors), near
    the defaults, all scaled alike, where times tell nothing.

    Raises
    ------
    InvalidInput
        No such number of threads.
    """
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise InvalidInput("threads", threads, "a number of threads, at least 1")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            cases = list(_cases())
            seconds = _least_seconds([run for *_, run in cases], threads)
    finally:
        torch.set_num_threads(before)
    counted = [work(plan, operator, tokens) for plan, operator, tokens, _ in cases]
    names = [field.name for field in fields(MachineRates)]
    units = np.array([[done.get(name, 0.0) for name in names] for done in counted])
    return MachineRates(**dict(zip(names, fitted_rates(units, seconds), strict=True)))


def fitted_rates(units: NDArray[np.float64], seconds: NDArray[np.float64]) -> list[float]:
    """Seconds a unit, from units of work (cases, rates) and the seconds of each case."""
    from scipy.optimize import nnls  # which no one needs who has rates

    default = np.array(list(MachineRates().as_dict().values()))
    scaled = units * default / seconds[:, None]
    scale = 1 / np.median(scaled.sum(1))
    # unknowns: rates over their scaled defaults; the last rows hold them at 1
    shares = scaled * scale
    prior = _PRIOR * np.eye(len(default))
    weights = np.ones(len(seconds))
    for _ in range(5):
        rows = np.vstack([shares * weights[:, None], prior])
        found, _residual = nnls(rows, np.concatenate([weights, np.diag(prior)]))
        error = (shares @ found - 1) / _TOLERANCE
        weights = (1 + error**2) ** -0.25
    # nothing is free: a rate of zero would make plans equal that are not
    rates = np.maximum(found, 0.01) * default * scale
    return [float(f"{rate:.3g}") for rate in rates]


def _cases() -> Iterator[tuple[Plan, Sized, int, Callable[[], object]]]:
    """Plans, what they compute, tokens, and a call that computes it."""
    libraries = gemm_libraries(torch.device("cpu"), torch.float32)
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float32)

    for tokens, d_in, d_out in _DENSE:
        operator = Sized(d_in, d_out, Sizes(1, 1, d_in, 1, 1, d_out, 1), True)
        tensors = drawn(tokens, d_in), drawn(d_out, d_in), None, drawn(tokens, d_out)
        for library in libraries:
            plan = Plan("materialised", gemm=library)
            yield plan, operator, tokens, _call(plan, *tensors)
    for tokens, sizes, text in _LAYERS:
        plan, s = Plan.parse(text), Sizes(*sizes)
        if plan.gemm not in libraries:
            continue
        d_in, d_out = s.alpha * s.beta * s.gamma, s.delta * s.epsilon * s.phi
        operator = Sized(d_in, d_out, s)
        a = drawn(s.gamma, s.rho, s.phi, s.delta, s.alpha)
        b = drawn(s.phi, s.gamma, s.rho, s.beta, s.epsilon)
        x, dy = drawn(tokens, d_in), drawn(tokens, d_out)
        yield plan, operator, tokens, _call(plan, x, a, b, dy)


def _call(plan: Plan, x: Tensor, a: Tensor, b: Tensor | None, dy: Tensor) -> Callable[[], object]:
    """Forward and backward."""

    def run() -> None:
        kernels.forward(x, a, b, dy.shape[1], plan)
        kernels.backward(x, a, b, dy, plan, (True, True, True))

    return run


def _least_seconds(runs: list[Callable[[], object]], threads: int) -> NDArray[np.float64]:
    """The least seconds of each, taken in turns."""
    # of one thread the seconds that it computes, whoever else uses the machine
    clock = time.thread_time if threads == 1 else time.perf_counter
    least = np.full(len(runs), np.inf)
    for run in runs:
        run()
    started = time.perf_counter()
    for done in range(_MOST_ROUNDS):
        if done >= _LEAST_ROUNDS and time.perf_counter() - started > _SECONDS:
            break
        for i, run in enumerate(runs):
            begun = clock()
            run()
            least[i] = min(least[i], max(clock() - begun, 1e-9))  # a clock may stand still
    return least


def this_machine(threads: int) -> Machine:
    """What the rates of this process belong to."""
    capability = torch.backends.cpu.get_cpu_capability()
    return Machine(processor(), torch.__version__, capability, threads)


def machine_rates(home: Path, threads: int) -> MachineRates:
    """Use the rates of this machine from now on: those kept in `home`, else measured and kept.

    They are looked for by processor, release of torch, vector instructions and number of threads.
    Where nothing can be kept the defaults are used, and a warning says so.

    Raises
    ------
    InvalidInput
        No such number of threads.
    """
    rates = load_or_measure(home, this_machine(threads), lambda: measure_rates(threads))
    use_rates(rates)
    return rates


def use_measured_rates(folder: Path | str | None = None) -> MachineRates:
    """Choose execution plans by what this machine is measured to do, from now on.

    The first call on a machine takes some five seconds; its result is kept, so that later
    processes choose the same plans.  Plans that were chosen before, and fixed ones, stay.

    Parameters
    ----------
    folder
        Where rates are kept; by default the home of einsum-nas, `EINSUM_NAS_HOME`.

    Returns
    -------
    MachineRates
        The rates now in use, for as many threads as torch uses.

    Raises
    ------
    InvalidInput
        A home that cannot be used.
    """
    if folder is None:
        from nas.settings import settings  # which layers need for nothing else

        folder = settings().resolved_rates_home
    return machine_rates(Path(folder), torch.get_num_threads())
