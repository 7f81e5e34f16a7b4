"""A structured layer's product as one differentiable operation, whatever plan runs it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from nas.layers.kernels import einsum as kernels
from nas.layers.kernels import measuring
from nas.layers.kernels.einsum import Gradients, Wanted
from nas.layers.kernels.operation import Operation
from nas.layers.kernels.plan import Operator, Plan, Sized
from nas.layers.modes import autocast_dtype, transforms_active


def plan_of(x: Tensor, a: Tensor, b: Tensor | None, d_out: int, fixed: Plan | str | None) -> Plan:
    """The plan that runs x (n, d_in): fixed (or its text), else as `measuring.resolve` says."""
    if isinstance(fixed, Plan):
        return fixed
    if fixed:
        return Plan.parse(fixed)
    return measuring.resolve(Sized.told(x, a, b, d_out), x.shape[0], x.device, x.dtype)


def contract(
    x: Tensor, a: Tensor, b: Tensor | None, d_out: int, plan: Plan | None = None
) -> Tensor:
    """y (n, d_out) = W x for x (n, d_in), W being both factors or, without `b`, `a` itself.

    Under autocast x and the factors are cast first.  Without a plan, `plan_of` gives one.
    """
    dtype = autocast_dtype(x.device, a.dtype)
    if dtype != a.dtype or dtype != x.dtype:
        x, a, b = x.to(dtype), a.to(dtype), None if b is None else b.to(dtype)
    if transforms_active():
        return plain(x, a, b, Sized.told(x, a, b, d_out))
    if torch.compiler.is_compiling():
        return _CONTRACT.compiled(x, a, b, d_out, str(plan or ""))
    plan = plan_of(x, a, b, d_out, plan)
    if b is None and plan.gemm == "blas":
        return functional.linear(x, a)
    return _CONTRACT.eager(x, a, b, d_out, plan)


def plain(x: Tensor, a: Tensor, b: Tensor | None, sized: Operator) -> Tensor:
    """The same by differentiable operations of torch, A first, for a structure of these sizes."""
    if b is None:
        return functional.linear(x, a)
    s = sized.sizes
    x = _fitted(x, sized.d_in, s.gamma * s.beta * s.alpha)
    z = torch.einsum("ngba,grfda->ngbrfd", x.reshape(-1, s.gamma, s.beta, s.alpha), a)
    y = torch.einsum("ngbrfd,fgrbe->nfed", z, b).flatten(1)
    return _fitted(y, s.phi * s.epsilon * s.delta, sized.d_out)


def matrices(a: Tensor, b: Tensor | None, sized: Operator) -> Tensor:
    """W (n, d_out, d_in) of n layers of these sizes, whose factors are stacked: (n, *shape)."""
    if b is None:
        return a
    s = sized.sizes
    w = torch.einsum("ngrfda,nfgrbe->nfedgba", a, b)
    w = w.reshape(len(w), s.phi * s.epsilon * s.delta, s.gamma * s.beta * s.alpha)
    short = sized.d_in - w.shape[2], sized.d_out - w.shape[1]
    # what is negative is cut, what is positive padded
    return functional.pad(w, (0, short[0], 0, short[1])) if any(short) else w


def _fitted(rows: Tensor, width: int, wanted: int) -> Tensor:
    """Rows (n, width) zero-padded or cut at their end."""
    if wanted <= width:
        return rows if wanted == width else rows[:, :wanted]
    return functional.pad(rows, (0, wanted - width))


def _plain_gradients(x: Tensor, a: Tensor, b: Tensor | None, dy: Tensor, *_: object) -> Gradients:
    """Gradients of x, A and B by differentiable operations, for derivatives of them."""
    if b is None:
        return dy @ a, dy.t() @ x, None
    in_axes, out_axes = kernels._axes(a, b)
    cube = functional.pad(x, (0, math.prod(in_axes) - x.shape[1])).reshape(-1, *in_axes)
    out = functional.pad(dy, (0, math.prod(out_axes) - dy.shape[1])).reshape(-1, *out_axes)
    z = torch.einsum("ngba,grfda->ngbrfd", cube, a)
    dz = torch.einsum("nfed,fgrbe->ngbrfd", out, b)
    dx = torch.einsum("ngbrfd,grfda->ngba", dz, a).flatten(1)
    da = torch.einsum("ngbrfd,ngba->grfda", dz, cube)
    db = torch.einsum("ngbrfd,nfed->fgrbe", z, out)
    return functional.pad(dx, (0, x.shape[1] - dx.shape[1])), da, db


def _forward(x: Tensor, a: Tensor, b: Tensor | None, d_out: int, plan: Plan | str) -> Tensor:
    return kernels.forward(x.contiguous(), a, b, d_out, plan_of(x, a, b, d_out, plan))


def _backward(
    x: Tensor, a: Tensor, b: Tensor | None, dy: Tensor, d_out: int, plan: Plan | str, wanted: Wanted
) -> Gradients:
    plan = plan_of(x, a, b, d_out, plan)
    return kernels.backward(x.contiguous(), a, b, dy.contiguous(), plan, wanted)


_CONTRACT = Operation(
    "contract",
    "Tensor x, Tensor a, Tensor? b",
    "int d_out, str plan",
    forward=_forward,
    backward=_backward,
    differentiable=_plain_gradients,
    fake=lambda x, a, b, d_out, plan: x.new_empty(x.shape[0], d_out),
)
