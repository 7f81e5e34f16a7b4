"""Products of rows that are sorted by expert, each with its own expert, without autograd.

Shapes: E experts, rows xs (m, d_in), of which expert e has the next counts[e], ys (m, d_out);
A (E, γ, ρ, φ, δ, α) and B (E, φ, γ, ρ, β, ε), or for dense experts A (E, d_out, d_in) and no B.
Only ``batched`` rows are padded instead: (E·c, ·), c of them for each expert.  Backward takes and
gives the gradients of ys and of xs, A and B, each None where it is not wanted; weights are none of
its concern.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from nas.layers.kernels import einsum as kernels
from nas.layers.kernels.einsum import Gradients, Wanted
from nas.layers.kernels.mixture_plan import MixturePlan, has_grouped_mm
from nas.layers.kernels.plan import Plan

_Forward = Callable[[Tensor, Tensor, Tensor | None, int], Tensor]
_Backward = Callable[[Tensor, Tensor, Tensor | None, Tensor, Wanted], Gradients]


def products(plan: MixturePlan, counts: Tensor, dense: bool) -> tuple[_Forward, _Backward]:
    """The product by `plan` of (xs, A, B, d_out), and its gradient of (xs, A, B, dys, wanted)."""
    if plan.grouping == "batched":
        return batched_forward, batched_backward
    if plan.grouping == "experts":
        assert plan.plan is not None
        one = plan.plan
        return partial(experts_forward, counts, one), partial(experts_backward, counts, one)
    if plan.grouping == "matrices" and not dense:
        return partial(matrices_forward, counts), partial(matrices_backward, counts)
    return partial(grouped_forward, counts), partial(grouped_backward, counts)


# Experts: one after another, each by a plan of its own.


def _slices(counts: Tensor) -> list[tuple[int, slice]]:
    """The rows of each expert that has any."""
    found, start = [], 0
    for e, count in enumerate(counts.tolist()):
        if count:
            found.append((e, slice(start, start + count)))
        start += count
    return found


def experts_forward(
    counts: Tensor, plan: Plan, xs: Tensor, a: Tensor, b: Tensor | None, d_out: int
) -> Tensor:
    ys = xs.new_empty(len(xs), d_out)
    for e, part in _slices(counts):
        factor = None if b is None else b[e]
        ys[part] = kernels.forward(xs[part], a[e], factor, d_out, plan)
    return ys


def experts_backward(
    counts: Tensor, plan: Plan, xs: Tensor, a: Tensor, b: Tensor | None, dys: Tensor, wanted: Wanted
) -> Gradients:
    dx = torch.empty_like(xs) if wanted[0] else None
    da = torch.zeros_like(a) if wanted[1] else None
    db = torch.zeros_like(b) if b is not None and wanted[2] else None
    for e, part in _slices(counts):
        factor = None if b is None else b[e]
        found = kernels.backward(xs[part], a[e], factor, dys[part], plan, wanted)
        for whole, index, gradient in ((dx, part, found[0]), (da, e, found[1]), (db, e, found[2])):
            if whole is not None and gradient is not None:
                whole[index] = gradient
    return dx, da, db


# Batched: padded rows, experts in the batch dimension.


def _batched(rows: Tensor, experts: int, axes: tuple[int, int, int], swap: bool) -> Tensor:
    """Rows (E·c, d) with axes (i, j, k), or (i, k, j) to be exchanged, as (E, i, j, c, k)."""
    cube = kernels._cube(rows, axes, swap)
    return cube.view(experts, -1, *cube.shape[1:]).permute(0, 2, 3, 1, 4)


def _batched_in(xs: Tensor, experts: int, axes: tuple[int, int, int]) -> Tensor:
    """Rows (E·c, d_in) as (γE, βc, α)."""
    blocks = _batched(xs, experts, axes, False).transpose(0, 1)
    return blocks.reshape(axes[0] * experts, -1, axes[2])


def _batched_intermediate(blocks: Tensor, a_first: Tensor, a: Tensor, beta: int) -> Tensor:
    """A x as (Eφ, γρβ, δc), from x as (γE, βc, α); a view for ρ = β = δ = 1."""
    experts, gamma, rho, phi, delta, _ = a.shape
    z = torch.bmm(a_first, blocks.transpose(1, 2))  # (γE, ρφδ, βc)
    if rho == beta == delta == 1:
        return z.view(gamma, experts * phi, -1).transpose(0, 1)
    z = z.view(gamma, experts, rho, phi, delta, beta, -1).permute(1, 3, 0, 2, 5, 4, 6)
    return z.reshape(experts * phi, gamma * rho * beta, -1)


def _by_block(factor: Tensor) -> Tensor:
    """A as (γE, ρφδ, α), or B as (φE, γρβ, ε)."""
    return factor.transpose(0, 1).reshape(factor.shape[0] * factor.shape[1], -1, factor.shape[5])


def batched_forward(xs: Tensor, a: Tensor, b: Tensor | None, d_out: int) -> Tensor:
    experts = len(a)
    if b is None:
        return torch.bmm(xs.view(experts, -1, xs.shape[1]), a.transpose(1, 2)).view(-1, d_out)
    in_axes, (phi, epsilon, delta) = kernels._axes(a[0], b[0])
    z = _batched_intermediate(_batched_in(xs, experts, in_axes), _by_block(a), a, in_axes[1])
    y = torch.bmm(z.transpose(1, 2), b.view(experts * phi, -1, epsilon))  # (Eφ, δc, ε)
    y = y.view(experts, phi, delta, -1, epsilon).permute(0, 3, 1, 4, 2)
    return y.reshape(len(xs), -1)[:, :d_out]


def batched_backward(
    xs: Tensor, a: Tensor, b: Tensor | None, dys: Tensor, wanted: Wanted
) -> Gradients:
    experts, d_in = len(a), xs.shape[1]
    if b is None:
        left = dys.view(experts, -1, dys.shape[1])
        da = torch.bmm(left.transpose(1, 2), xs.view(experts, -1, d_in)) if wanted[1] else None
        return torch.bmm(left, a).view(-1, d_in) if wanted[0] else None, da, None
    gamma, rho, phi, delta, alpha = a.shape[1:]
    beta, epsilon = b.shape[4:]
    blocks, a_first = _batched_in(xs, experts, (gamma, beta, alpha)), _by_block(a)
    out = _batched(dys, experts, (phi, epsilon, delta), True).reshape(experts * phi, -1, epsilon)
    b_last = b.view(experts * phi, -1, epsilon)
    db = da = dx = None
    if wanted[2]:
        db = torch.bmm(_batched_intermediate(blocks, a_first, a, beta), out).view(b.shape)
    if not (wanted[0] or wanted[1]):
        return None, None, db
    dz = torch.bmm(b_last, out.transpose(1, 2))  # (Eφ, γρβ, δc)
    dz = dz.view(experts, phi, gamma, rho, beta, delta, -1).permute(2, 0, 3, 1, 5, 4, 6)
    dz = dz.reshape(gamma * experts, rho * phi * delta, -1)  # (γE, ρφδ, βc)
    if wanted[1]:
        da = torch.bmm(dz, blocks).view(gamma, experts, rho, phi, delta, alpha)
        da = da.transpose(0, 1).contiguous()
    if wanted[0]:
        dx = torch.bmm(dz.transpose(1, 2), a_first).view(gamma, experts, beta, -1, alpha)
        dx = dx.permute(1, 3, 0, 2, 4).reshape(len(xs), -1)[:, :d_in]
    return dx, da, db


# Grouped: ragged groups of rows, without the host learning how many.


def _grouped_mm(rows: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """rows (r, i) · w (g, i, o) → (r, o), rows up to ends[0] with w[0] and so on."""
    if not _can_group(rows):
        out = rows.new_zeros(len(rows), w.shape[2])
        for part, m, to in zip(_parts(rows, ends), w, _parts(out, ends), strict=True):
            torch.mm(part, m, out=to)
        return out
    step, o = 16 // rows.element_size(), w.shape[2]  # what lies 16 bytes apart may be grouped
    rows, w = _stepped(rows, step), _stepped(w.transpose(1, 2), step)
    short = -o % step
    w = functional.pad(w, (0, 0, 0, short)) if short else w
    out = functional.grouped_mm(rows.contiguous(), w.contiguous().transpose(1, 2), offs=ends)
    return out[:, :o] if short else out


def _grouped_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """leftᵀ right per group: left (r, i), right (r, o) → (g, i, o)."""
    i, o = left.shape[1], right.shape[1]
    if not _can_group(left):
        out = left.new_zeros(len(ends), i, o)
        for one, other, to in zip(_parts(left, ends), _parts(right, ends), out, strict=True):
            torch.mm(one.t(), other, out=to)
        return out
    step = 16 // left.element_size()
    left, right = _stepped(left, step).contiguous(), _stepped(right, step).contiguous()
    return functional.grouped_mm(left.t(), right, offs=ends)[:, :i, :o]


def _parts(rows: Tensor, ends: Tensor) -> tuple[Tensor, ...]:
    return rows.tensor_split(ends.tolist()[:-1])


def _can_group(t: Tensor) -> bool:
    known = t.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return known and len(t) > 0 and has_grouped_mm()


def _stepped(t: Tensor, step: int) -> Tensor:
    """The last axis zero-padded to a multiple of `step`."""
    short = -t.shape[-1] % step
    return functional.pad(t, (0, short)) if short else t


def _ends(xs: Tensor, counts: Tensor, blocks: int = 1, times: int = 1) -> Tensor:
    """Where each of blocks × E groups of xs ends, a row of an expert being `times` rows."""
    ends = counts.cumsum(0)
    starts = torch.arange(blocks, device=ends.device)[:, None] * len(xs)
    return ((starts + ends) * times).reshape(-1).to(torch.int32)


def _ragged(rows: Tensor, axes: tuple[int, int, int], swap: bool) -> Tensor:
    """Rows (m, d) with axes (i, j, k), or (i, k, j) to be exchanged, as (imj, k)."""
    cube = kernels._cube(rows, axes, swap)
    return cube.transpose(0, 1).reshape(-1, cube.shape[3])


def _ragged_intermediate(blocks: Tensor, a: Tensor, beta: int, ends: Tensor) -> Tensor:
    """A x as (φmδ, γρβ), from x as (γmβ, α)."""
    gamma, rho, phi, delta, _ = a.shape[1:]
    z = _grouped_mm(blocks, _by_block(a).transpose(1, 2), ends)
    z = z.reshape(gamma, -1, beta, rho, phi, delta).permute(4, 1, 5, 0, 3, 2)
    return z.reshape(-1, gamma * rho * beta)


def grouped_forward(counts: Tensor, xs: Tensor, a: Tensor, b: Tensor | None, d_out: int) -> Tensor:
    if b is None:
        return _grouped_mm(xs, a.transpose(1, 2), _ends(xs, counts))
    in_axes, (phi, epsilon, delta) = kernels._axes(a[0], b[0])
    gamma, beta, _ = in_axes
    blocks = _ragged(xs, in_axes, False)
    z = _ragged_intermediate(blocks, a, beta, _ends(xs, counts, gamma, beta))
    y = _grouped_mm(z, _by_block(b), _ends(xs, counts, phi, delta))
    y = y.reshape(phi, len(xs), delta, epsilon).permute(1, 0, 3, 2)
    return y.reshape(len(xs), phi * epsilon * delta)[:, :d_out]


def grouped_backward(
    counts: Tensor, xs: Tensor, a: Tensor, b: Tensor | None, dys: Tensor, wanted: Wanted
) -> Gradients:
    if b is None:
        ends = _ends(xs, counts)
        da = _grouped_outer(dys, xs, ends) if wanted[1] else None
        return _grouped_mm(dys, a, ends) if wanted[0] else None, da, None
    experts, gamma, rho, phi, delta, alpha = a.shape
    beta, epsilon = b.shape[4:]
    ends_in, ends_out = _ends(xs, counts, gamma, beta), _ends(xs, counts, phi, delta)
    blocks = _ragged(xs, (gamma, beta, alpha), False)
    out = _ragged(dys, (phi, epsilon, delta), True)
    da = db = dx = None
    if wanted[2]:
        z = _ragged_intermediate(blocks, a, beta, ends_in)
        db = _grouped_outer(z, out, ends_out).reshape(phi, experts, gamma, rho, beta, epsilon)
        db = db.transpose(0, 1).contiguous()
    if not (wanted[0] or wanted[1]):
        return None, None, db
    dz = _grouped_mm(out, _by_block(b).transpose(1, 2), ends_out)  # (φmδ, γρβ)
    dz = dz.reshape(phi, len(xs), delta, gamma, rho, beta).permute(3, 1, 5, 4, 0, 2)
    dz = dz.reshape(-1, rho * phi * delta)  # (γmβ, ρφδ)
    if wanted[1]:
        da = _grouped_outer(dz, blocks, ends_in).reshape(gamma, experts, rho, phi, delta, alpha)
        da = da.transpose(0, 1).contiguous()
    if wanted[0]:
        dx = _grouped_mm(dz, _by_block(a), ends_in).reshape(gamma, len(xs), beta, alpha)
        dx = dx.permute(1, 0, 2, 3).reshape(len(xs), -1)[:, : xs.shape[1]]
    return dx, da, db


# Matrices: the factors of all experts multiplied, as one operator of E times φ.


def _matrices(a: Tensor, b: Tensor, d_out: int, d_in: int) -> Tensor:
    """W of each expert, (E, d_out, d_in)."""
    experts, gamma, rho, phi, delta, alpha = a.shape
    first = a.permute(1, 2, 0, 3, 4, 5).reshape(gamma, rho, experts * phi, delta, alpha)
    wide = phi * b.shape[5] * delta
    w = kernels.matrix(first, b.view(experts * phi, *b.shape[2:]), experts * wide, d_in)
    return w.view(experts, wide, d_in)[:, :d_out]


def matrices_forward(counts: Tensor, xs: Tensor, a: Tensor, b: Tensor | None, d_out: int) -> Tensor:
    assert b is not None
    return grouped_forward(counts, xs, _matrices(a, b, d_out, xs.shape[1]), None, d_out)


def matrices_backward(
    counts: Tensor, xs: Tensor, a: Tensor, b: Tensor | None, dys: Tensor, wanted: Wanted
) -> Gradients:
    assert b is not None
    experts, gamma, rho, phi, delta, alpha = a.shape
    beta, epsilon = b.shape[4:]
    d_in, d_out = xs.shape[1], dys.shape[1]
    ends = _ends(xs, counts)
    dx = da = db = None
    if wanted[0]:
        dx = _grouped_mm(dys, _matrices(a, b, d_out, d_in), ends)
    if not (wanted[1] or wanted[2]):
        return dx, None, None
    dw = _grouped_outer(dys, xs, ends)
    short = phi * epsilon * delta - d_out, gamma * beta * alpha - d_in
    if any(short):
        dw = functional.pad(dw, (0, short[1], 0, short[0]))
    dw = dw.reshape(experts, phi, epsilon, delta, gamma, beta, alpha).permute(0, 1, 4, 5, 2, 3, 6)
    dw = dw.reshape(experts * phi * gamma, beta * epsilon, delta * alpha)
    if wanted[1]:
        da = torch.bmm(b.view(len(dw), rho, -1), dw)
        da = da.view(experts, phi, gamma, rho, delta, alpha).permute(0, 2, 3, 1, 4, 5).contiguous()
    if wanted[2]:
        right = a.permute(0, 3, 1, 2, 4, 5).reshape(len(dw), rho, -1)
        db = torch.bmm(right, dw.transpose(1, 2)).view(b.shape)
    return dx, da, db
