"""Plans chosen by measurement instead of by the cost model, and remembered.

What is remembered belongs to a structure, a number of tokens (rounded up to a power of two), a
device, a dtype and a number of threads.  It lasts as long as the process; `remembered_plans` and
`remember_plans` carry it over.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from nas.designs.structure import LinearStructure
from nas.errors import InvalidInput
from nas.layers.kernels import einsum as kernels
from nas.layers.kernels.mixture_plan import MixturePlan
from nas.layers.kernels.plan import Operator, Plan, Sized, bucket, candidates, choose, cost

#: Plans of two factors and of mixtures; the path of a chain is its text.
_plans: dict[str, Any] = {}
_REPEATS = 5
_HOPELESS = 4.0


_Plan = TypeVar("_Plan")


def _key(
    operator: LinearStructure | Sized, tokens: int, device: torch.device, dtype: torch.dtype
) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return f"{operator.fingerprint} tokens={bucket(tokens)} {name} {dtype} threads={threads}"


def resolve(operator: Operator, tokens: int, device: torch.device, dtype: torch.dtype) -> Plan:
    """The plan of an operator that has no fixed one: remembered, else from the cost model."""
    found = remembered(operator, tokens, device, dtype)
    return choose(operator, tokens, device, dtype) if found is None else found.checked(operator)


def remembered(
    operator: LinearStructure | Sized, tokens: int, device: torch.device, dtype: torch.dtype
) -> Any:
    """What was measured or given for an operator, or None."""
    return _plans.get(_key(operator, tokens, device, dtype)) if _plans else None


def remembered_plans() -> dict[str, str]:
    """All that this process has measured or was given, as text that `remember_plans` reads."""
    return {key: str(plan) for key, plan in dict(_plans).items()}


def remember_plans(plans: Mapping[str, str]) -> None:
    """Take over what another process measured on the same kind of machine.

    Raises
    ------
    InvalidInput
        A value that is not the text of a plan; then none is taken over.
    """
    _plans.update({key: _read(text) for key, text in plans.items()})


def _read(text: str) -> Any:
    """A plan of any family; a path is read by the chain that it is of."""
    if isinstance(text, str) and text.startswith("path "):
        return text
    mixture = isinstance(text, str) and text.startswith("grouping=")
    return MixturePlan.parse(text) if mixture else Plan.parse(text)


def check_tokens(tokens: int) -> None:
    """Raise `InvalidInput` where there is nothing to measure."""
    if tokens < 1:
        raise InvalidInput("tokens", tokens, "at least 1 token to measure")


def measure(operator: Operator, tokens: int, device: torch.device, dtype: torch.dtype) -> Plan:
    """Time forward and backward of every candidate, in turns; remember and return the fastest."""
    check_tokens(tokens)
    plans = candidates(operator, tokens, device, dtype)
    costs = {plan: cost(plan, operator, tokens) for plan in plans}
    # not those that are hopeless, which may also need more memory than there is
    plans = [plan for plan in plans if costs[plan] <= _HOPELESS * min(costs.values())]
    draw = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw, device=device, dtype=dtype)

    s = operator.sizes
    x, dy = drawn(tokens, operator.d_in), drawn(tokens, operator.d_out)
    if operator.is_dense:
        a, b = drawn(operator.d_out, operator.d_in), None
    else:
        a = drawn(s.gamma, s.rho, s.phi, s.delta, s.alpha)
        b = drawn(s.phi, s.gamma, s.rho, s.beta, s.epsilon)

    def run(plan: Plan) -> None:
        kernels.forward(x, a, b, operator.d_out, plan)
        kernels.backward(x, a, b, dy, plan, (True, True, True))

    with torch.no_grad():
        return fastest(operator, tokens, device, dtype, plans, run)


def fastest(
    operator: LinearStructure | Sized,
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    plans: Sequence[_Plan],
    run: Callable[[_Plan], object],
) -> _Plan:
    """The plan by which `run` takes the least time, by the median of turns; it is remembered."""

    def seconds(plan: _Plan) -> float:
        _finish(device)
        started = time.perf_counter()
        run(plan)
        _finish(device)
        return time.perf_counter() - started

    first = {plan: seconds(plan) for plan in plans}  # also compiles and warms
    first = {plan: min(seconds(plan), took) for plan, took in first.items()}
    near = [plan for plan in plans if first[plan] < 2 * min(first.values())]
    times = {plan: [seconds(plan) for _ in range(_REPEATS)] for plan in near}
    best = min(near, key=lambda plan: statistics.median(times[plan]))
    _plans[_key(operator, tokens, device, dtype)] = best
    return best


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
