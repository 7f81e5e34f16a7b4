"""The product of a token batch with both factors and its gradient, tile by tile, without autograd.

Shapes: n tokens, x (n, d_in), A (γ, ρ, φ, δ, α), B (φ, γ, ρ, β, ε), y (n, d_out); γβα and φεδ may
differ from d_in and d_out, for which tiles are zero-padded or cut at their end.  A tile of tokens
passes both factors while it is in cache, and backward computes its intermediate again, so that
nothing but the input outlives forward.  Either factor may come first: contracting B first is the
same computation with the roles of (A, α, δ) and (B, β, ε) exchanged.

Each factor is a batch of matrix products, over γ for the first and over φ for the second.  A batch
runs as one `torch.bmm` ("batched"), as one matrix product after another ("blocks"), which is faster
where blocks are large, or, for the second factor where γ = φ = 1, as one small product per token
("tokens"), which needs no copy.  A dense layer is `materialised` with its matrix as A and no B.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from nas.designs.einsum import Structure
from nas.layers.kernels.plan import Gemm, Plan, Product, onednn_available
from nas.layers.kernels.shapes import SHORT, SLAB_ROWS, is_narrow, slabs
from nas.layers.kernels.torch_internals import linear_by_onednn, onednn_linear

#: Of x, A and B: whether the gradient is wanted; the gradient, or None.
Wanted = Sequence[bool]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
#: Where a tile writes dx, or adds da and db, and writes the gradient of gates.
_Into = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


if onednn_available():

    @register_flop_formula(onednn_linear())
    def _gemm_flops(
        x_shape: tuple[int, ...], w_shape: tuple[int, ...], *_: object, **__: object
    ) -> int:
        """For `torch.utils.flop_counter`, which knows no oneDNN: x (m, k) · w (n, k)ᵀ."""
        return 2 * x_shape[0] * x_shape[1] * w_shape[0]


def gemm(p: Tensor, q: Tensor, library: Gemm) -> Tensor:
    """p (m, k) · q (k, n) → (m, n); by oneDNN only what it can run."""
    single = p.dtype == q.dtype == torch.float32 and p.device.type == "cpu"
    if library == "blas" or not single or 0 in (*p.shape, q.shape[1]):
        return p @ q
    # oneDNN falls back to slow code for a right operand whose rows do not lie together
    if not (q.is_contiguous() or q.t().is_contiguous()):
        q = q.contiguous()
    if p.stride(0) == 1:  # torch transposes fast only what lies together as a whole
        p = p.t().contiguous().t()
    return linear_by_onednn(p.contiguous(), q.t())


def forward(
    x: Tensor, a: Tensor, b: Tensor | None, d_out: int, plan: Plan, gates: Tensor | None = None
) -> Tensor:
    """y (n, d_out).

    `gates` (n, E), under a plan by block alone, scale each of E equal parts of ρ token by token.
    """
    n, d_in = x.shape
    if b is None or plan.order == "materialised":
        return gemm(x, matrix(a, b, d_out, d_in).t(), plan.gemm)
    a, b = a.contiguous(), b.contiguous()
    y = x.new_empty(n, d_out)
    swap = plan.order == "b-first"
    factors = _swapped(a, b) if swap else (a, b)
    in_axes, out_axes = _axes(a, b)
    by_token = plan.second == "tokens"
    step: Callable[..., None] = _forward_by_token if by_token else _forward_by_block
    for tile in _tiles(n, plan.tile):
        out = _target(y[tile], out_axes)
        gating = () if gates is None else (gates[tile].t(),)
        step(_cube(x[tile], in_axes, swap), *factors, _turned(out, swap), plan, *gating)
        _deliver(out, y[tile])
    return y


def backward(
    x: Tensor,
    a: Tensor,
    b: Tensor | None,
    dy: Tensor,
    plan: Plan,
    wanted: Wanted,
    gates: Tensor | None = None,
    d_gates: Tensor | None = None,
) -> Gradients:
    """Gradients of x, A and B, each None where it is not wanted; that of `gates` into `d_gates`."""
    if b is None or plan.order == "materialised":
        return _materialised_backward(x, a, b, dy, plan, wanted)
    a, b = a.contiguous(), b.contiguous()
    swap = plan.order == "b-first"
    first, second = _swapped(a, b) if swap else (a, b)
    in_axes, out_axes = _axes(a, b)
    dx = torch.empty_like(x) if wanted[0] else None
    d_first, d_second = (
        torch.zeros_like(factor, dtype=_accumulator(a)) if needed else None
        for factor, needed in ((first, wanted[1 + swap]), (second, wanted[2 - swap]))
    )
    by_token = plan.second == "tokens"
    step: Callable[..., None] = _backward_by_token if by_token else _backward_by_block
    for tile in _tiles(len(x), plan.tile):
        out = None if dx is None else _target(dx[tile], in_axes)
        x_tile, dy_tile = _cube(x[tile], in_axes, swap), _cube(dy[tile], out_axes, swap)
        dx_tile = None if out is None else _turned(out, swap)
        into = dx_tile, d_first, d_second, None if d_gates is None else d_gates[tile]
        gating = () if gates is None else (gates[tile].t(),)
        step(x_tile, first, second, dy_tile, plan, into, *gating)
        if dx is not None and out is not None:
            _deliver(out, dx[tile])
    da, db = d_first, d_second
    if swap:
        da = None if d_second is None else d_second.permute(1, 2, 0, 4, 3).contiguous()
        db = None if d_first is None else d_first.permute(2, 0, 1, 4, 3).contiguous()
    return dx, None if da is None else da.to(a.dtype), None if db is None else db.to(b.dtype)


def matrix(a: Tensor, b: Tensor | None, d_out: int, d_in: int) -> Tensor:
    """W (d_out, d_in), contiguous: the two factors as one matrix, or the one matrix itself."""
    if b is None:
        return a.contiguous()
    gamma, rho, phi, delta, alpha = a.shape
    beta, epsilon = b.shape[3:]
    w = a.new_empty(phi, epsilon, delta, gamma, beta, alpha)
    right = a.permute(2, 0, 1, 3, 4).reshape(phi, gamma, rho, delta * alpha)
    for f, e in slabs(phi, epsilon, delta):  # so that no second W is needed
        left = b[f, ..., e]
        blocks, rows = left.shape[0] * gamma, beta * left.shape[4]
        left = left.permute(0, 1, 3, 4, 2).reshape(blocks, rows, rho)
        product = torch.bmm(left, right[f].reshape(blocks, rho, -1))
        shape = (blocks // gamma, gamma, beta, rows // beta, delta, alpha)
        w[f, e] = product.view(shape).permute(0, 3, 4, 1, 2, 5)
    w = w.view(phi * epsilon * delta, gamma * beta * alpha)
    if w.shape == (d_out, d_in):
        return w
    return functional.pad(w, (0, d_in - w.shape[1], 0, d_out - w.shape[0])).contiguous()


def _axes(a: Tensor, b: Tensor) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(γ, β, α) and (φ, ε, δ)."""
    return (a.shape[0], b.shape[3], a.shape[4]), (b.shape[0], b.shape[4], a.shape[3])


def _accumulator(a: Tensor) -> torch.dtype:
    """The dtype of sums over tiles, which in half precision would lose what each tile adds."""
    return torch.promote_types(a.dtype, torch.float32)


def _tiles(tokens: int, tile: int) -> list[slice]:
    if not 0 < tile < tokens:
        return [slice(None)] if tokens else []
    return [slice(start, start + tile) for start in range(0, tokens, tile)]


def _target(rows: Tensor, axes: tuple[int, int, int]) -> Tensor:
    """Where a tile is written as (t, ·, ·, ·): `rows` itself, or a buffer if the widths differ."""
    exact = rows.shape[1] == axes[0] * axes[1] * axes[2]
    if exact:
        return rows.view(-1, *axes)
    # blocks first, as a batched product comes out, so that it is moved once only
    return rows.new_empty(axes[0], len(rows), axes[1], axes[2]).transpose(0, 1)


def _deliver(tile: Tensor, rows: Tensor) -> None:
    """The contents of a buffer, cut or zero-padded at its end, into the rows it stands for."""
    width, real = tile[0].numel(), rows.shape[1]
    if width == real:
        return
    whole = min(width, real) // (width // tile.shape[1])  # leading blocks that are not cut
    start = whole * (width // tile.shape[1])
    rows[:, :start].view(len(rows), whole, *tile.shape[2:]).copy_(tile[:, :whole])
    if start < min(width, real):
        rows[:, start:width] = tile[:, whole].flatten(1)[:, : real - start]
    rows[:, width:] = 0


def _cube(rows: Tensor, axes: tuple[int, int, int], swap: bool) -> Tensor:
    """(t, d) as (t, ·, ·, ·); the last two axes exchanged for B first."""
    width, real = axes[0] * axes[1] * axes[2], rows.shape[1]
    if real != width:
        padded = rows.new_empty(len(rows), width)
        padded[:, :real] = rows[:, :width]
        padded[:, real:] = 0
        rows = padded
    return _turned(rows.view(-1, *axes), swap)


def _turned(cube: Tensor, swap: bool) -> Tensor:
    return cube.transpose(2, 3) if swap else cube


def _swapped(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same operator with B as first factor: (γ, ρ, φ, ε, β) and (φ, γ, ρ, α, δ)."""
    return b.permute(1, 2, 0, 4, 3).contiguous(), a.permute(2, 0, 1, 4, 3).contiguous()


def _multiply(out: Tensor, p: Tensor, q: Tensor, how: Product, library: Gemm) -> None:
    """out (b, m, n) = p (b, m, k) · q (b, k, n)."""
    if how == "blocks":
        for o, left, right in zip(out.unbind(), p.unbind(), q.unbind(), strict=True):
            o.copy_(gemm(left, right, library))
    else:
        torch.bmm(p, q, out=out)


def _place(out: Tensor, p: Tensor, q: Tensor, how: Product, library: Gemm) -> None:
    """p (b, m, k) · q (b, k, n) into the axes of `out` (b, ·, ·, n), of any strides."""
    in_place = out.is_contiguous()
    if how == "blocks" and not (in_place and p.shape[2] <= SHORT):
        for o, left, right in zip(out, p, q, strict=True):
            o.copy_(gemm(left, right, library).view(o.shape))
    elif _turns(p, q):
        _transpose_into(out, torch.bmm(q.mT, p.mT))
    elif in_place:
        torch.bmm(p, q, out=out.view(len(p), -1, q.shape[2]))
    else:
        out.copy_(torch.bmm(p, q).view(out.shape))


def _turns(p: Tensor, q: Tensor) -> bool:
    """Whether p · q (b, m, n) is better computed as the transpose of qᵀ · pᵀ."""
    return p.device.type == "cpu" and is_narrow(p.shape[1], p.shape[2], q.shape[2])


def _transpose_into(out: Tensor, product: Tensor) -> None:
    """product (b, n, ij) into the axes of `out` (b, i, j, n), of any strides."""
    blocks, middle, rows, columns = out.shape
    if middle == 1:  # as matrices, which torch transposes fast
        flat = out[:, 0].transpose(0, 1)
        if flat.is_contiguous():
            flat.view(rows, -1).copy_(product.view(blocks * columns, rows).t())
            return
    out.copy_(product.mT.view(out.shape))


def _accumulate(out: Tensor, p: Tensor, q: Tensor, how: Product, library: Gemm) -> None:
    """out (b, m, n) += p · q, in the dtype of `out`."""
    if how == "blocks":
        for o, left, right in zip(out.unbind(), p.unbind(), q.unbind(), strict=True):
            o.add_(gemm(left, right, library))
    elif _turns(p, q):
        out.add_(torch.bmm(q.mT, p.mT).mT)
    elif out.dtype == p.dtype:
        torch.baddbmm(out, p, q, out=out)
    else:
        out.add_(torch.bmm(p, q))


def _rows(cube: Tensor, how: Product) -> Tensor:
    """(t, i, j, k) as (i, jt, k): a view if j = 1, but contiguous for blocks."""
    rows = cube.permute(1, 2, 0, 3).reshape(cube.shape[1], -1, cube.shape[3])
    return rows.contiguous() if how == "blocks" else rows


def _first(xs: Tensor, a: Tensor, plan: Plan) -> Tensor:
    """z = A x (γ, ρφδ, βt) from xs (γ, βt, α)."""
    gamma, alpha = a.shape[0], a.shape[4]
    flat = a.view(gamma, -1, alpha)
    z = xs.new_empty(gamma, flat.shape[1], xs.shape[1])
    _multiply(z, flat, xs.transpose(1, 2), plan.first, plan.gemm)
    return z


def _by_gate(z: Tensor, gates: Tensor) -> Tensor:
    """z (γ, ρφδ, βt) as (γ, E, ·, t), for gates (E, t)."""
    return z.view(len(z), len(gates), -1, gates.shape[1])


def _for_second(z: Tensor, a: Tensor, beta: int) -> Tensor:
    """z laid out for the product with B: (φ, γρβ, δt).

    Tokens stay innermost, so that what is moved lies together; nothing is if β = δ = 1.
    """
    gamma, rho, phi, delta, _ = a.shape
    if beta == delta == 1:
        return z.view(gamma * rho, phi, -1).transpose(0, 1)
    z = z.view(gamma, rho, phi, delta, beta, -1).permute(2, 0, 1, 4, 3, 5)
    return z.reshape(phi, gamma * rho * beta, -1)


def _forward_by_block(
    x: Tensor, a: Tensor, b: Tensor, y: Tensor, plan: Plan, gates: Tensor | None = None
) -> None:
    """One tile: x (t, γ, β, α) → y (t, φ, ε, δ)."""
    phi, epsilon = y.shape[1:3]
    z = _first(_rows(x, plan.first), a, plan)
    if gates is not None:
        _by_gate(z, gates).mul_(gates[:, None])
    z = _for_second(z, a, b.shape[3]).transpose(1, 2)
    out = y.permute(1, 3, 0, 2)  # (φ, δ, t, ε)
    _place(out, z, b.view(phi, -1, epsilon), plan.second, plan.gemm)


def _backward_by_block(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    dy: Tensor,
    plan: Plan,
    into: _Into,
    gates: Tensor | None = None,
) -> None:
    """One tile: writes dx (t, γ, β, α) and d_gates (t, E), for gates (E, t); adds to da and db."""
    dx, da, db, d_gates = into
    gamma, rho, phi, delta, alpha = a.shape
    beta, epsilon = b.shape[3:]
    t = x.shape[0]
    xs = _rows(x, plan.first)
    dys = _rows(dy.transpose(2, 3), plan.second)  # (φ, δt, ε)
    z = _first(xs, a, plan) if db is not None or d_gates is not None else None
    if db is not None and z is not None:
        gated = z if gates is None else _by_gate(z, gates) * gates[:, None]
        z = None if d_gates is None else z
        gated = _for_second(gated, a, beta)
        _accumulate(db.view(phi, -1, epsilon), gated, dys, plan.second, plan.gemm)
        del gated
    if dx is None and da is None and d_gates is None:
        return
    right, flat = dys.transpose(1, 2), b.view(phi, -1, epsilon)
    if plan.second == "blocks":
        dz = x.new_empty(gamma, rho, phi, delta, beta, t)
        for o, f, d in zip(dz.permute(2, 0, 1, 4, 3, 5), flat, right, strict=True):
            o.copy_(gemm(f, d, plan.gemm).view(o.shape))
    else:
        dz = torch.bmm(flat, right).view(phi, gamma, rho, beta, delta, t)
        dz = dz.permute(1, 2, 0, 4, 3, 5)
    dz = dz.reshape(gamma, rho * phi * delta, beta * t)
    if gates is not None:
        if d_gates is not None and z is not None:
            d_gates.copy_(_by_gate(z.mul_(dz), gates).sum((0, 2)).t())
        dz = (_by_gate(dz, gates) * gates[:, None]).view(dz.shape)
    if da is not None:
        _accumulate(da.view(gamma, -1, alpha), dz, xs, plan.first, plan.gemm)
    if dx is None:
        return
    out, back = dx.permute(1, 2, 0, 3), dz.transpose(1, 2)
    _place(out, back, a.view(gamma, -1, alpha), plan.first, plan.gemm)


def _by_token(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """For γ = φ = 1: A as (ρδ, α) and B as (ε, βρ), the order in which z comes out per token."""
    alpha, epsilon = a.shape[4], b.shape[4]
    return a.view(-1, alpha), b.permute(0, 1, 4, 3, 2).reshape(epsilon, -1)


def _token_intermediate(xs: Tensor, a: Tensor, b: Tensor, delta: int, plan: Plan) -> Tensor:
    """z of each token (t, βρ, δ) from xs (tβ, α)."""
    return gemm(xs, a.t(), plan.gemm).view(-1, b.shape[1], delta)


def _forward_by_token(x: Tensor, a: Tensor, b: Tensor, y: Tensor, plan: Plan) -> None:
    a2, b2 = _by_token(a, b)
    z = _token_intermediate(x.reshape(-1, x.shape[3]), a2, b2, a.shape[3], plan)
    out, left = y[:, 0], b2.expand(len(z), *b2.shape)
    if out.is_contiguous():
        torch.bmm(left, z, out=out)
    else:
        out.copy_(torch.bmm(left, z))


def _backward_by_token(
    x: Tensor, a: Tensor, b: Tensor, dy: Tensor, plan: Plan, into: _Into
) -> None:
    (dx, da, db, _), (t, _, beta, alpha) = into, x.shape
    rho, delta, epsilon = a.shape[1], a.shape[3], b.shape[4]
    a2, b2 = _by_token(a, b)
    xs, dys = x.reshape(-1, alpha), dy[:, 0]  # (tβ, α), (t, ε, δ)
    if db is not None:
        z = _token_intermediate(xs, a2, b2, delta, plan)
        both = torch.bmm(dys, z.transpose(1, 2)).sum(0, dtype=db.dtype)  # (ε, βρ)
        db.add_(both.view(epsilon, beta, rho).permute(2, 1, 0)[None, None])
        del z, both
    if dx is None and da is None:
        return
    dz = torch.bmm(b2.t().expand(t, -1, -1), dys).view(t * beta, rho * delta)
    if da is not None:
        da.view(-1, alpha).add_(gemm(dz.t(), xs, plan.gemm))
    if dx is not None:
        dx[:, 0].copy_(gemm(dz, a2, plan.gemm).view(t, beta, alpha))


def _materialised_backward(
    x: Tensor, a: Tensor, b: Tensor | None, dy: Tensor, plan: Plan, wanted: Wanted
) -> Gradients:
    d_in, d_out = x.shape[1], dy.shape[1]
    dx = gemm(dy, matrix(a, b, d_out, d_in), plan.gemm) if wanted[0] else None
    if b is None:
        return dx, _rowwise(dy, x, plan.gemm, a) if wanted[1] else None, None
    if not (wanted[1] or wanted[2]):
        return dx, None, None
    gamma, rho, phi, delta, alpha = a.shape
    beta, epsilon = b.shape[3:]
    da = torch.zeros(phi, gamma, rho, delta * alpha, dtype=_accumulator(a), device=a.device)
    db = torch.zeros_like(b, dtype=_accumulator(b))
    right = a.permute(2, 0, 1, 3, 4).reshape(da.shape)
    for f, e in slabs(phi, epsilon, delta):  # so that no second W is needed
        left = b[f, ..., e]
        count, some = left.shape[0], left.shape[4]
        start = (f.start * epsilon + e.start) * delta
        rows = dy[:, start : start + count * some * delta]
        dw = gemm(rows.t(), x, plan.gemm)
        short = count * some * delta - dw.shape[0], gamma * beta * alpha - d_in
        if any(short):
            dw = functional.pad(dw, (0, short[1], 0, short[0]))
        dw = dw.view(count, some, delta, gamma, beta, alpha).permute(0, 3, 4, 1, 2, 5)
        dw = dw.reshape(count * gamma, beta * some, delta * alpha)
        if wanted[1]:
            product = torch.bmm(left.reshape(count * gamma, rho, beta * some), dw)
            da[f] += product.view(count, gamma, rho, delta * alpha)
        if wanted[2]:
            product = torch.bmm(right[f].reshape(count * gamma, rho, -1), dw.transpose(1, 2))
            db[f, ..., e] = product.view(left.shape)
    da = da.view(phi, gamma, rho, delta, alpha).permute(1, 2, 0, 3, 4).contiguous()
    return dx, da.to(a.dtype) if wanted[1] else None, db.to(b.dtype) if wanted[2] else None


def _rowwise(dy: Tensor, x: Tensor, library: Gemm, like: Tensor) -> Tensor:
    """dyᵀ x, some rows at a time where the product needs dyᵀ copied."""
    if library == "blas":
        return dy.t() @ x
    dw = torch.empty_like(like)
    for start in range(0, dy.shape[1], SLAB_ROWS):
        dw[start : start + SLAB_ROWS] = gemm(dy[:, start : start + SLAB_ROWS].t(), x, library)
    return dw


def workspace_elements(structure: Structure, plan: Plan, tokens: int) -> int:
    """Numbers that a layer holds at once, at most, besides x, y, parameters and all gradients.

    One tile of x, of y and of the intermediate, each once more for every reordering, and both
    factors reordered; under the materialised plan W and some rows of dY and of the gradient of W.
    """
    s = structure.sizes
    wide_in, wide_out = s.alpha * s.beta * s.gamma, s.delta * s.epsilon * s.phi
    if structure.is_dense:
        return SLAB_ROWS * (2 * tokens + structure.d_in)
    if plan.order == "materialised":
        exact = (structure.d_in, structure.d_out) == (wide_in, wide_out)
        rows = max(SLAB_ROWS, s.delta)
        w = wide_in * wide_out + (0 if exact else structure.d_in * structure.d_out)
        return w + rows * (2 * tokens + 3 * wide_in) + 3 * structure.params
    t = min(plan.tile or tokens, tokens)
    z = s.gamma * s.phi * s.rho
    z *= s.alpha * s.epsilon if plan.order == "b-first" else s.beta * s.delta
    if plan.second == "tokens":
        z += s.epsilon * s.rho * (s.alpha if plan.order == "b-first" else s.beta)
    return t * (3 * z + 2 * wide_in + 3 * wide_out) + 3 * structure.params
