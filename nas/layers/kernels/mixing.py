"""The product of a mixture of experts as one differentiable operation, whatever plan runs it.

As in `nas.layers.kernels.contraction`, eager code goes through `torch.autograd.Function`,
`torch.compile` sees an operator of its own, and function transforms, forward-mode and higher
derivatives take plain operations of torch.  Shapes are those of
`nas.layers.kernels.mixture_kernels`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nas.layers.kernels import contraction, measuring, mixture_kernels
from nas.layers.kernels.mixture_kernels import Form, Gradients
from nas.layers.kernels.mixture_plan import MixturePlan, choose_for_sizes
from nas.layers.kernels.plan import bucket
from nas.layers.kernels.torch_internals import is_view
from nas.layers.modes import autocast_dtype, is_recorded, transforms_active, without_autocast


def mix(
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    a: Tensor,
    b: Tensor | None,
    d_out: int,
    plan: MixturePlan | None = None,
    form: Form = "both",
) -> Tensor:
    """The product, with gradients of x, weights, A and B; see `nas.layers.kernels.mixture_kernels`.

    Under autocast x and the factors are cast first.  Weights play no part in the forms "gather"
    and "sorted".  Without a plan the cost model chooses one.
    """
    dtype = autocast_dtype(x.device, a.dtype)
    if dtype != a.dtype or dtype != x.dtype:
        x, a, b = x.to(dtype), a.to(dtype), None if b is None else b.to(dtype)
    weights = weights.to(dtype)
    if transforms_active() or is_recorded(x):
        return plain(x, weights, chosen, a, b, d_out, form)
    if torch.compiler.is_compiling():
        compiled: Tensor = _operator(x, weights, chosen, a, b, d_out, str(plan or ""), form)
        return compiled
    plan = _plan_of(plan, chosen, a, b, x, d_out, form)
    y: Tensor = _Mix.apply(x, weights, chosen, a, b, d_out, plan, form)  # type: ignore[no-untyped-call]
    return y


def _plan_of(
    plan: MixturePlan | str | None,
    chosen: Tensor,
    a: Tensor,
    b: Tensor | None,
    x: Tensor,
    d_out: int,
    form: str,
) -> MixturePlan:
    """The plan that runs: fixed (or its text), else by the cost model; its parts filled in."""
    expert = contraction._Operator.of(
        x.shape[1], d_out, a.shape[1:], None if b is None else b.shape[1:]
    )
    n, k = chosen.shape
    if not plan:
        return choose_for_sizes(
            expert, len(a), k, bucket(n), x.device.type, x.dtype, form != "both"
        )
    if isinstance(plan, str):
        plan = MixturePlan.parse(plan)
    if plan.grouping == "all" and form != "both":
        plan = MixturePlan("experts")
    if plan.grouping == "experts" and plan.plan is None:
        mean = max(1, -(-n * k // len(a)))
        return MixturePlan("experts", plan=measuring.resolve(expert, mean, x.device, x.dtype))
    return plan


def plain(
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    a: Tensor,
    b: Tensor | None,
    d_out: int,
    form: str = "both",
) -> Tensor:
    """The same by differentiable operations of torch: every expert on every row."""
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


def _plain_gradients(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None], dy: Tensor, form: str
) -> Gradients:
    """The gradients by differentiable operations, for derivatives of them."""
    x, weights, chosen, a, b = tensors
    # aliases: x may be what the weights were made of
    x, weights, a = x.view_as(x), weights.view_as(weights), a.view_as(a)
    b = None if b is None else b.view_as(b)
    given = [t for t in (x, weights, a, b) if t is not None]
    for t in given:
        if not t.requires_grad:
            t.requires_grad_()
    y = plain(x, weights, chosen, a, b, dy.shape[1], form)
    found = torch.autograd.grad(y, given, dy, create_graph=True, allow_unused=True)
    return found[0], found[1], found[2], found[3] if b is not None else None


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        chosen: Tensor,
        a: Tensor,
        b: Tensor | None,
        d_out: int,
        plan: MixturePlan,
        form: str,
    ) -> Tensor:
        ctx.plan, ctx.form = plan, form
        ctx.save_for_backward(x, weights, chosen, a, b)
        y = mixture_kernels.forward(x, weights, chosen, a, b, d_out, plan, form)
        return y.clone() if is_view(y) else y  # autograd lets no one write into a view

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, chosen, a, b = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # someone differentiates the gradient
            found = _plain_gradients((x, weights, chosen, a, b), dy, ctx.form)
        else:
            with without_autocast(x.device):
                wanted = (needs[0], needs[1], needs[3], needs[4])
                found = mixture_kernels.backward(
                    x, weights, chosen, a, b, dy, ctx.plan, ctx.form, wanted
                )
        return found[0], found[1], None, found[2], found[3], None, None, None


@torch.library.custom_op("einsum_nas::mix", mutates_args=())
def _operator(
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    a: Tensor,
    b: Tensor | None,
    d_out: int,
    plan: str,
    form: str,
) -> Tensor:
    how = _plan_of(plan, chosen, a, b, x, d_out, form)
    return mixture_kernels.forward(x, weights, chosen, a, b, d_out, how, form).contiguous()


@_operator.register_fake
def _(
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    a: Tensor,
    b: Tensor | None,
    d_out: int,
    plan: str,
    form: str,
) -> Tensor:
    combined = form in ("both", "combine")
    return x.new_empty(chosen.shape[0] if combined else chosen.numel(), d_out)


@torch.library.custom_op("einsum_nas::mix_backward", mutates_args=())
def _operator_backward(
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    a: Tensor,
    b: Tensor | None,
    dy: Tensor,
    plan: str,
    form: str,
    wanted: list[bool],
) -> list[Tensor]:
    how = _plan_of(plan, chosen, a, b, x, dy.shape[1], form)
    needed = (wanted[0], wanted[1], wanted[2], wanted[3])
    found = mixture_kernels.backward(x, weights, chosen, a, b, dy, how, form, needed)
    return [
        torch.zeros_like(t) if g is None else g.contiguous()
        for g, t, need in zip(found, (x, weights, a, b), wanted, strict=True)
        if need and t is not None
    ]


@_operator_backward.register_fake
def _(
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    a: Tensor,
    b: Tensor | None,
    dy: Tensor,
    plan: str,
    form: str,
    wanted: list[bool],
) -> list[Tensor]:
    tensors = zip((x, weights, a, b), wanted, strict=True)
    return [t.new_empty(t.shape) for t, needed in tensors if needed and t is not None]


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, ctx.plan, ctx.form = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weights, chosen, a, b = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[1], needs[3], needs[4] and b is not None]
    found = _operator_backward(x, weights, chosen, a, b, dy, ctx.plan, ctx.form, wanted)
    # by position, for compiled function transforms cannot trace a generator
    at = [sum(wanted[:i]) for i in range(4)]
    dx, dw, da, db = [found[at[i]] if wanted[i] else None for i in range(4)]
    return dx, dw, None, da, db, None, None, None


_operator.register_autograd(_differentiate, setup_context=_keep_inputs)
