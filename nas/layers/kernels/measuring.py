"""Plans chosen by measurement instead of by the cost model, and remembered.

What is remembered belongs to a structure, a number of tokens (rounded up to a power of two), a
device, a dtype and a number of threads.  It lasts as long as the process; `remembered_plans` and
`remember_plans` carry it over.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch

from nas.errors import InvalidInput
from nas.layers.kernels import einsum as kernels
from nas.layers.kernels.plan import Operator, Plan, bucket, candidates, choose, cost

_plans: dict[str, Plan] = {}
_REPEATS = 5
_HOPELESS = 4.0


def _key(operator: Operator, tokens: int, device: torch.device, dtype: torch.dtype) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return f"{operator.fingerprint} tokens={bucket(tokens)} {name} {dtype} threads={threads}"


def resolve(operator: Operator, tokens: int, device: torch.device, dtype: torch.dtype) -> Plan:
    """The plan of an operator that has no fixed one: remembered, else from the cost model."""
    found = _plans.get(_key(operator, tokens, device, dtype)) if _plans else None
    return choose(operator, tokens, device, dtype) if found is None else found.checked(operator)


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
    _plans.update({key: Plan.parse(text) for key, text in plans.items()})


def measure(operator: Operator, tokens: int, device: torch.device, dtype: torch.dtype) -> Plan:
    """Time forward and backward of every candidate, in turns; remember and return the fastest."""
    if tokens < 1:
        raise InvalidInput("tokens", tokens, "at least 1 token to measure")
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

    def seconds(plan: Plan) -> float:
        _finish(device)
        started = time.perf_counter()
        kernels.forward(x, a, b, operator.d_out, plan)
        kernels.backward(x, a, b, dy, plan, (True, True, True))
        _finish(device)
        return time.perf_counter() - started

    with torch.no_grad():
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
