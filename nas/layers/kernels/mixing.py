"""The product of a mixture of experts as one differentiable operation, whatever plan runs it.

Shapes are those of `nas.layers.kernels.mixture_kernels`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nas.layers.kernels import measuring, mixture_kernels
from nas.layers.kernels.mixture_kernels import Form, Gradients, Inputs
from nas.layers.kernels.mixture_plan import MixturePlan, choose_for_sizes
from nas.layers.kernels.operation import Operation
from nas.layers.kernels.plan import Sized, bucket
from nas.layers.modes import autocast_dtype, is_recorded, transforms_active


def mix(
    inputs: Inputs,
    d_out: int,
    plan: MixturePlan | None = None,
    form: Form = "both",
    shared: bool = False,
) -> Tensor:
    """The product, with gradients of x, weights, A and B; see `nas.layers.kernels.mixture_kernels`.

    Under autocast x and the factors are cast first.  Weights play no part in the forms "gather"
    and "sorted".  Without a plan the cost model chooses one; `shared`: whether some experts are
    used by every token.
    """
    x, weights, chosen, a, b = inputs
    dtype = autocast_dtype(x.device, a.dtype)
    if dtype != a.dtype or dtype != x.dtype:
        x, a, b = x.to(dtype), a.to(dtype), None if b is None else b.to(dtype)
    inputs = Inputs(x, weights.to(dtype), chosen, a, b)
    if transforms_active() or is_recorded(x):
        return plain(inputs, d_out, form)
    if torch.compiler.is_compiling():
        return _MIX.compiled(*inputs, d_out, str(plan or ""), form, shared)
    return _MIX.eager(*inputs, d_out, _plan_of(inputs, d_out, plan, form, shared), form, shared)


def _plan_of(
    inputs: Inputs, d_out: int, plan: MixturePlan | str | None, form: str, shared: bool
) -> MixturePlan:
    """The plan that runs: fixed (or its text), else by the cost model; its parts filled in."""
    x, _, chosen, a, b = inputs
    expert = Sized.of(x.shape[1], d_out, a.shape[1:], None if b is None else b.shape[1:])
    (n, k), kind = chosen.shape, x.device.type
    if not plan:
        return choose_for_sizes(
            expert, len(a), k, bucket(n), kind, x.dtype, form != "both", shared=shared
        )
    if isinstance(plan, str):
        plan = MixturePlan.parse(plan)
    if plan.grouping == "all" and form != "both":
        plan = MixturePlan("experts")
    if plan.grouping == "experts" and plan.plan is None:
        mean = max(1, -(-n * k // len(a)))
        return MixturePlan("experts", plan=measuring.resolve(expert, mean, x.device, x.dtype))
    return plan


def plain(inputs: Inputs, d_out: int, form: str) -> Tensor:
    """The same by differentiable operations of torch: every expert on every row."""
    x, weights, chosen, a, b = inputs
    (n, k), experts = chosen.shape, len(a)
    order = torch.argsort(chosen.reshape(-1), stable=True)
    tokens = order // k
    if form in ("gather", "both"):
        x = x[tokens]
    # by comparison: one_hot looks at its values, which transforms over samples do not allow
    each = torch.arange(experts, device=x.device)
    gates = (chosen.reshape(-1)[order, None] == each).to(x.dtype)
    if b is None:
        ys = torch.einsum("me,eoi,mi->mo", gates, a, x)
    else:
        gamma, alpha, beta = a.shape[1], a.shape[5], b.shape[4]
        cube = functional.pad(x, (0, gamma * beta * alpha - x.shape[-1]))
        cube = cube.reshape(n * k, gamma, beta, alpha)
        z = torch.einsum("ngba,egrfda,ne->ngberfd", cube, a, gates)
        ys = torch.einsum("ngberfd,efgrbs->nfsd", z, b).flatten(1)
        ys = functional.pad(ys, (0, d_out - ys.shape[1]))
    if form in ("gather", "sorted"):
        return ys
    ys = ys * weights.reshape(-1)[order, None]
    return ys.new_zeros(n, d_out).index_add(0, tokens, ys)


def _plain_gradients(*given: Any) -> Gradients:
    """The gradients by differentiable operations, for derivatives of them."""
    (x, weights, chosen, a, b), (dy, d_out, _, form, _) = Inputs(*given[:5]), given[5:]
    # aliases: x may be what the weights were made of
    x, weights, a = x.view_as(x), weights.view_as(weights), a.view_as(a)
    b = None if b is None else b.view_as(b)
    wanted = [t for t in (x, weights, a, b) if t is not None]
    for t in wanted:
        if not t.requires_grad:
            t.requires_grad_()
    y = plain(Inputs(x, weights, chosen, a, b), d_out, form)
    found = torch.autograd.grad(y, wanted, dy, create_graph=True, allow_unused=True)
    return found[0], found[1], None, found[2], None if b is None else found[3]


def _forward(*given: Any) -> Tensor:
    inputs, (d_out, plan, form, shared) = Inputs(*given[:5]), given[5:]
    plan = _plan_of(inputs, d_out, plan, form, shared)
    return mixture_kernels.forward(inputs, d_out, plan, form)


def _backward(*given: Any) -> Gradients:
    inputs, (dy, d_out, plan, form, shared, wanted) = Inputs(*given[:5]), given[5:]
    plan = _plan_of(inputs, d_out, plan, form, shared)
    return mixture_kernels.backward(inputs, dy, plan, form, wanted)


def _fake(*given: Any) -> Tensor:
    inputs, (d_out, _, form, _) = Inputs(*given[:5]), given[5:]
    n, k = inputs.chosen.shape
    return inputs.x.new_empty(n if form in ("both", "combine") else n * k, d_out)


_MIX = Operation(
    "mix",
    "Tensor x, Tensor weights, Tensor chosen, Tensor a, Tensor? b",
    "int d_out, str plan, str form, bool shared",
    forward=_forward,
    backward=_backward,
    differentiable=_plain_gradients,
    fake=_fake,
)
