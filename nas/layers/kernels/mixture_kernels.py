"""The product of a mixture of experts and its gradient, by any plan, without autograd.

    y_t = Σ_j w_tj · W_{e(t,j)} x_t        over the k chosen experts e(t, j) of token t

Shapes: n tokens, E experts, k chosen each, m = n·k assignments; x (n, d_in), weights and chosen
(n, k), y (n, d_out); A (E, γ, ρ, φ, δ, α) and B (E, φ, γ, ρ, β, ε), or for dense experts A
(E, d_out, d_in) and no B.  `Form` says whether x or y are instead rows of assignments, sorted by
expert (m, ·), as inside a feed-forward block.  Assignments are sorted, never dropped: every shape
but that of a padded batch depends on n and k alone.

Backward saves the input only.  With u_j = W_eᵀ dy_t, which no weight has touched, the gradients
are dw_j = ⟨u_j, x_t⟩ and dx_t = Σ w_j u_j, and those of the factors are products with w_j x_t.
The products of sorted rows are those of `nas.layers.kernels.grouped`; under the grouping ``all`` no
row is sorted, and gates between the factors are zero for experts that were not chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from nas.layers.kernels import einsum as kernels
from nas.layers.kernels import grouped
from nas.layers.kernels.mixture_plan import MixturePlan
from nas.layers.kernels.plan import Plan

#: Whether tokens are gathered from x (n, ·) or x holds sorted assignments (m, ·), and whether
#: assignments are combined into y (n, ·) or returned sorted (m, ·).
Form = Literal["both", "gather", "combine", "sorted"]


class Inputs(NamedTuple):
    """What the product is of."""

    x: Tensor
    weights: Tensor
    chosen: Tensor
    a: Tensor
    b: Tensor | None

    def contiguous(self) -> Inputs:
        """With x and the factors contiguous."""
        x, weights, chosen, a, b = self
        b = None if b is None else b.contiguous()
        return Inputs(x.contiguous(), weights, chosen, a.contiguous(), b)


#: Of the inputs in their order; None for `chosen`, and for what is not wanted.
Gradients = tuple[Tensor | None, Tensor | None, None, Tensor | None, Tensor | None]


def loads(chosen: Tensor, experts: int) -> Tensor:
    """How often each expert occurs in chosen (m,), (E,); unlike bincount without waiting for it."""
    return chosen.new_zeros(experts).scatter_add_(0, chosen, torch.ones_like(chosen))


class _Rows:
    """Which row of a product each assignment is: sorted by expert, and padded if batched."""

    def __init__(self, chosen: Tensor, experts: int, padded: bool) -> None:
        self.k = chosen.shape[1]
        flat = chosen.reshape(-1)
        self.experts = experts
        #: assignment (t·k + j) of each sorted row
        self.order = torch.argsort(flat, stable=True)
        self.tokens = self.order.div(self.k, rounding_mode="floor") if self.k > 1 else self.order
        self.counts = loads(flat, experts)
        #: rows of each expert where they are padded
        self.capacity = 0
        self.slots: Tensor | None = None
        if padded:
            self.capacity = max(self.counts.tolist(), default=0)
            ends = self.counts.cumsum(0)
            shift = torch.arange(experts, device=flat.device) * self.capacity - ends + self.counts
            row = torch.arange(len(flat), device=flat.device)
            self.slots = row + shift.index_select(0, flat.index_select(0, self.order))

    def take(self, t: Tensor, gathered: bool) -> Tensor:
        """Rows of the product from tokens (n, ·) or from sorted assignments (m, ·)."""
        if self.slots is None:
            return t.index_select(0, self.tokens) if gathered else t
        source = self.tokens if gathered else torch.arange(len(self.order), device=t.device)
        # a padded row is a copy of some other, whose weight is 0 wherever it would count
        table = source.new_zeros(self.experts * self.capacity).index_copy_(0, self.slots, source)
        return t.index_select(0, table)

    def give(self, rows: Tensor, combined: bool, weights: Tensor | None) -> Tensor:
        """The inverse of `take`: weighted sums over the k assignments of a token, or sorted."""
        if not combined:
            return rows if self.slots is None else rows.index_select(0, self.slots)
        row = torch.arange(len(self.order), device=rows.device)
        row = row.new_empty(row.shape).index_copy_(
            0, self.order, row if self.slots is None else self.slots
        )
        starts = torch.arange(0, len(row), self.k, device=rows.device)
        flat = None if weights is None else weights.reshape(-1)
        # one pass that gathers, scales and sums in a fixed order
        return torch.embedding_bag(rows, row, starts, False, 0, False, flat)[0]

    def scales(self, weights: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The weight of each row, (rows, 1); None where all are 1."""
        if self.slots is None:
            if weights is None:
                return None
            return weights.reshape(-1).index_select(0, self.order)[:, None]
        scale = torch.zeros(self.experts * self.capacity, dtype=dtype, device=self.order.device)
        if weights is None:
            return scale.index_fill_(0, self.slots, 1)[:, None]
        sorted_weights = weights.reshape(-1).index_select(0, self.order)
        return scale.index_copy_(0, self.slots, sorted_weights)[:, None]


def forward(inputs: Inputs, d_out: int, plan: MixturePlan, form: str) -> Tensor:
    """y, by `plan`."""
    x, weights, chosen, a, b = inputs.contiguous()
    if not chosen.numel():
        return x.new_zeros(0, d_out)
    gathers, combines = form in ("both", "gather"), form in ("both", "combine")
    if plan.grouping == "all":
        return _all_forward(x, _gates(weights, chosen, len(a)), a, b, d_out, plan)
    rows = _Rows(chosen, len(a), plan.grouping == "batched")
    product, _ = grouped.products(plan, rows.counts, b is None)
    ys = product(rows.take(x, gathers), a, b, d_out)
    return rows.give(ys, combines, weights)


def backward(
    inputs: Inputs, dy: Tensor, plan: MixturePlan, form: str, wanted: Sequence[bool]
) -> Gradients:
    """The gradients of the inputs, of those that are wanted."""
    x, weights, chosen, a, b = inputs = inputs.contiguous()
    if not chosen.numel():
        zeros = [
            torch.zeros_like(t) if t is not None and needed else None
            for t, needed in zip(inputs, wanted, strict=True)
        ]
        return zeros[0], zeros[1], None, zeros[3], zeros[4]
    dy = dy.contiguous()
    gathers, combines = form in ("both", "gather"), form in ("both", "combine")
    if plan.grouping == "all":
        return _all_backward(inputs, dy, plan, wanted)
    rows = _Rows(chosen, len(a), plan.grouping == "batched")
    xs, dys = rows.take(x, gathers), rows.take(dy, combines)
    scale = rows.scales(weights if combines else None, x.dtype)
    need_weights = wanted[1] and combines
    scaled = xs if scale is None or not (wanted[3] or wanted[4]) else xs * scale
    _, product = grouped.products(plan, rows.counts, b is None)
    u, da, db = product(scaled, a, b, dys, (wanted[0] or need_weights, wanted[3], wanted[4]))
    dx = d_weights = None
    if need_weights:
        assert u is not None
        along = torch.linalg.vecdot(u, xs)
        along = along if rows.slots is None else along.index_select(0, rows.slots)
        d_weights = weights.new_empty(weights.numel()).index_copy_(0, rows.order, along)
        d_weights = d_weights.view(weights.shape)
    if wanted[0]:
        assert u is not None
        if gathers:
            dx = rows.give(u, True, weights if combines else None)
        else:
            dx = rows.give(u if scale is None or not combines else u * scale, False, None)
    return dx, d_weights, None, da, db


def _gates(weights: Tensor, chosen: Tensor, experts: int) -> Tensor:
    """The weights as (n, E)."""
    return weights.new_zeros(len(chosen), experts).scatter_(1, chosen, weights)


def _as_one(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The experts as one operator of E times their ρ: A (γ, Eρ, φ, δ, α) and B (φ, γ, Eρ, β, ε)."""
    return a.transpose(0, 1).flatten(1, 2), b.permute(1, 2, 0, 3, 4, 5).flatten(2, 3)


def _all_forward(
    x: Tensor, gates: Tensor, a: Tensor, b: Tensor | None, d_out: int, plan: MixturePlan
) -> Tensor:
    if b is not None:
        return kernels.forward(x, *_as_one(a, b), d_out, Plan("a-first", plan.tile), gates)
    n, experts = gates.shape
    y = x.new_empty(n, d_out)
    flat = a.view(-1, a.shape[2]).t()
    for tile in kernels._tiles(n, plan.tile):
        u = (x[tile] @ flat).view(-1, experts, d_out)
        torch.bmm(gates[tile, None], u, out=y[tile, None])
    return y


def _all_backward(
    inputs: Inputs, dy: Tensor, plan: MixturePlan, wanted: Sequence[bool]
) -> Gradients:
    x, weights, chosen, a, b = inputs
    n, experts = len(x), len(a)
    gates = _gates(weights, chosen, experts)
    d_gates = torch.empty_like(gates) if wanted[1] else None
    if b is not None:
        first, last = _as_one(a, b)
        how, needed = Plan("a-first", plan.tile), (wanted[0], wanted[3], wanted[4])
        dx, da, db = kernels.backward(x, first, last, dy, how, needed, gates, d_gates)
        if da is not None:
            da = da.view(len(da), experts, -1, *da.shape[2:]).transpose(0, 1).contiguous()
        if db is not None:
            db = db.view(*db.shape[:2], experts, -1, *db.shape[3:])
            db = db.permute(2, 0, 1, 3, 4, 5).contiguous()
        return dx, None if d_gates is None else d_gates.gather(1, chosen), None, da, db
    dx = torch.empty_like(x) if wanted[0] else None
    sums = torch.zeros_like(a, dtype=kernels._accumulator(a)) if wanted[3] else None
    side = a.transpose(0, 1).reshape(a.shape[1], -1)  # (d_out, E·d_in)
    for tile in kernels._tiles(n, plan.tile):
        if dx is not None or d_gates is not None:
            u = (dy[tile] @ side).view(-1, experts, x.shape[1])  # Wᵀ dy of each expert
            if dx is not None:
                torch.bmm(gates[tile, None], u, out=dx[tile, None])
            if d_gates is not None:
                torch.bmm(u, x[tile, :, None], out=d_gates[tile, :, None])
        if sums is not None:
            spread = (gates[tile, :, None] * dy[tile, None]).flatten(1)  # (t, E·d_out)
            kernels._accumulate(
                sums.view(1, -1, x.shape[1]), spread.t()[None], x[tile][None], "batched", "blas"
            )
    da = None if sums is None else sums.to(a.dtype)
    return dx, None if d_gates is None else d_gates.gather(1, chosen), None, da, None
