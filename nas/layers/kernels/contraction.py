"""A structured layer's product as one differentiable operation, whatever plan runs it.

Eager code goes through `torch.autograd.Function`; `torch.compile` sees an operator of its own, so
that there is no graph break and the same kernels run.  Function transforms (`torch.func`),
forward-mode and higher derivatives take the plain einsum, which every one of them understands.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nas.designs.einsum import Sizes, Structure, fingerprint
from nas.layers.kernels import einsum as kernels
from nas.layers.kernels import measuring
from nas.layers.kernels.plan import Plan
from nas.layers.modes import autocast_dtype, transforms_active, without_autocast


def plan_of(x: Tensor, a: Tensor, b: Tensor | None, d_out: int, fixed: Plan | str | None) -> Plan:
    """The plan that runs x (n, d_in): fixed (or its text), else as `measuring.resolve` says."""
    if isinstance(fixed, Plan):
        return fixed
    if fixed:
        return Plan.parse(fixed)
    return measuring.resolve(_Operator.told(x, a, b, d_out), x.shape[0], x.device, x.dtype)


@dataclass(frozen=True)
class _Operator:
    """The integers of a structure, as its tensors tell them."""

    d_in: int
    d_out: int
    sizes: Sizes
    is_dense: bool
    fingerprint: str

    @staticmethod
    def told(x: Tensor, a: Tensor, b: Tensor | None, d_out: int) -> _Operator:
        """Of tensors, the first of shape (n, d_in)."""
        return _Operator.of(x.shape[1], d_out, a.shape, None if b is None else b.shape)

    @staticmethod
    @lru_cache(maxsize=4096)
    def of(d_in: int, d_out: int, a: torch.Size, b: torch.Size | None) -> _Operator:
        if b is None:
            sizes = Sizes(1, 1, d_in, 1, 1, d_out, 1)
            return _Operator(d_in, d_out, sizes, True, fingerprint(d_in, d_out, None))
        gamma, rho, phi, delta, alpha = a
        sizes = Sizes(alpha, b[3], gamma, delta, b[4], phi, rho)
        return _Operator(d_in, d_out, sizes, False, fingerprint(d_in, d_out, sizes))


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
        return plain(x, a, b, _Operator.told(x, a, b, d_out))
    if torch.compiler.is_compiling():
        compiled: Tensor = _operator(x, a, b, d_out, str(plan or ""))
        return compiled
    plan = plan_of(x, a, b, d_out, plan)
    if b is None and plan.gemm == "blas":
        return functional.linear(x, a)
    y: Tensor = _Contraction.apply(x, a, b, d_out, plan)  # type: ignore[no-untyped-call]
    return y


def plain(x: Tensor, a: Tensor, b: Tensor | None, sized: Structure | _Operator) -> Tensor:
    """The same by differentiable operations of torch, A first, for a structure of these sizes."""
    if b is None:
        return functional.linear(x, a)
    s = sized.sizes
    x = _fitted(x, sized.d_in, s.gamma * s.beta * s.alpha)
    z = torch.einsum("ngba,grfda->ngbrfd", x.reshape(-1, s.gamma, s.beta, s.alpha), a)
    y = torch.einsum("ngbrfd,fgrbe->nfed", z, b).flatten(1)
    return _fitted(y, s.phi * s.epsilon * s.delta, sized.d_out)


def _fitted(rows: Tensor, width: int, wanted: int) -> Tensor:
    """Rows (n, width) zero-padded or cut at their end."""
    if wanted <= width:
        return rows if wanted == width else rows[:, :wanted]
    return functional.pad(rows, (0, wanted - width))


def _plain_gradients(
    x: Tensor, a: Tensor, b: Tensor | None, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, A and B by differentiable operations, for derivatives of them."""
    if b is None:
        return dy @ a, dy.t() @ x, None
    in_axes, out_axes = (a.shape[0], b.shape[3], a.shape[4]), (b.shape[0], b.shape[4], a.shape[3])
    cube = functional.pad(x, (0, in_axes[0] * in_axes[1] * in_axes[2] - x.shape[1]))
    out = functional.pad(dy, (0, out_axes[0] * out_axes[1] * out_axes[2] - dy.shape[1]))
    cube, out = cube.reshape(len(x), *in_axes), out.reshape(len(x), *out_axes)
    z = torch.einsum("ngba,grfda->ngbrfd", cube, a)
    dz = torch.einsum("nfed,fgrbe->ngbrfd", out, b)
    dx = torch.einsum("ngbrfd,grfda->ngba", dz, a).flatten(1)
    da = torch.einsum("ngbrfd,ngba->grfda", dz, cube)
    db = torch.einsum("ngbrfd,nfed->fgrbe", z, out)
    return functional.pad(dx, (0, x.shape[1] - dx.shape[1])), da, db


class _Contraction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor | None, d_out: int, plan: Plan) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(x, a, b)
        return kernels.forward(x.contiguous(), a, b, d_out, plan)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b = ctx.saved_tensors
        if torch.is_grad_enabled():  # someone differentiates the gradient
            return *_plain_gradients(x, a, b, dy), None, None
        wanted = ctx.needs_input_grad[:3]
        with without_autocast(x.device):  # backward may be called under it
            found = kernels.backward(x.contiguous(), a, b, dy.contiguous(), ctx.plan, wanted)
        return *found, None, None


@torch.library.custom_op("einsum_nas::contract", mutates_args=())
def _operator(x: Tensor, a: Tensor, b: Tensor | None, d_out: int, plan: str) -> Tensor:
    return kernels.forward(x.contiguous(), a, b, d_out, plan_of(x, a, b, d_out, plan))


@_operator.register_fake
def _(x: Tensor, a: Tensor, b: Tensor | None, d_out: int, plan: str) -> Tensor:
    return x.new_empty(x.shape[0], d_out)


@torch.library.custom_op("einsum_nas::contract_backward", mutates_args=())
def _operator_backward(
    x: Tensor, a: Tensor, b: Tensor | None, dy: Tensor, plan: str, wanted: list[bool]
) -> list[Tensor]:
    all_three = (wanted[0], wanted[1], wanted[2])
    chosen = plan_of(x, a, b, dy.shape[1], plan)
    gradients = kernels.backward(x.contiguous(), a, b, dy.contiguous(), chosen, all_three)
    return [g.contiguous() for g in gradients if g is not None]


@_operator_backward.register_fake
def _(
    x: Tensor, a: Tensor, b: Tensor | None, dy: Tensor, plan: str, wanted: list[bool]
) -> list[Tensor]:
    tensors = zip((x, a, b), wanted, strict=True)
    return [t.new_empty(t.shape) for t, needed in tensors if needed and t is not None]


def _keep_inputs(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, int, str], output: Tensor
) -> None:
    *tensors, _, ctx.plan = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, a, b = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    found = _operator_backward(x, a, b, dy, ctx.plan, wanted)
    # by position, for compiled function transforms cannot trace a generator
    at = [sum(wanted[:i]) for i in range(3)]
    return *[found[at[i]] if wanted[i] else None for i in range(3)], None, None


_operator.register_autograd(_differentiate, setup_context=_keep_inputs)
