"""The product of a mixture of experts, whatever plan runs it, as one differentiable operation.

    y_t = Σ_j w_tj · W_{e(t,j)} x_t        over the k chosen experts e(t, j) of token t

Shapes: n tokens, E experts, k chosen each, m = n·k assignments; x (n, d_in), weights and chosen
(n, k), y (n, d_out); A (E, γ, ρ, φ, δ, α) and B (E, φ, γ, ρ, β, ε), or for dense experts A
(E, d_out, d_in) and no B.  `Form` says whether x or y are instead rows of assignments, sorted by
expert (m, ·), as inside a feed-forward block.  Assignments are sorted, never dropped: every shape
but that of a padded batch depends on n and k alone.

Backward saves the input only.  With u_j = W_eᵀ dy_t, which no weight has touched, the gradients
are dw_j = ⟨u_j, x_t⟩ and dx_t = Σ w_j u_j, and those of the factors are products with w_j x_t.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from nas.errors import InvalidInput
from nas.layers import contraction, kernels, measuring
from nas.layers.modes import autocast_dtype, transforms_active
from nas.layers.plan import _MACS_PER_SECOND, Operator, Plan, bucket, candidates, cost
from nas.layers.plan import _tile as tile_of
from nas.mixture import MixtureStructure
from nas.structure import Sizes

#: Whether tokens are gathered from x (n, ·) or x holds sorted assignments (m, ·), and whether
#: assignments are combined into y (n, ·) or returned sorted (m, ·).
Form = Literal["both", "gather", "combine", "sorted"]
Grouping = Literal["experts", "batched", "grouped", "matrices", "all"]
_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True, slots=True)
class MixturePlan:
    """One way to compute a mixture; all give the same result to rounding.

    ``experts``
        One expert after another, each by `plan` (None: as `measuring.resolve` says for the mean
        number of tokens).
    ``batched``
        Each expert's tokens padded to the largest number, experts in the batch dimension.
    ``grouped``
        `torch.nn.functional.grouped_mm`; without it (float64, older torch) products in turn.
    ``matrices``
        The matrix of each expert, made of its factors, and then as ``grouped``: narrow layers.
    ``all``
        Every expert on every token, with weight 0 where it is not chosen; `tile` tokens at a time
        (0: all at once).  Products that have sorted rows on a side run as ``experts``.

    >>> str(MixturePlan.parse("grouping=all tile=256"))
    'grouping=all tile=256'
    """

    grouping: Grouping
    tile: int = 0
    plan: Plan | None = None

    def __post_init__(self) -> None:
        if self.grouping not in get_args(Grouping):
            choices = " | ".join(get_args(Grouping))
            raise InvalidInput("plan.grouping", self.grouping, choices)
        if isinstance(self.tile, bool) or not isinstance(self.tile, int) or self.tile < 0:
            raise InvalidInput("plan.tile", self.tile, "a number of tokens, or 0 for all at once")
        if self.tile and self.grouping != "all":
            raise InvalidInput("plan.tile", self.tile, "0, but for grouping=all")
        if self.plan is not None and self.grouping != "experts":
            raise InvalidInput("plan", str(self.plan), "a plan of experts for grouping=experts")

    @classmethod
    def parse(cls, text: str) -> MixturePlan:
        """Read what `str` wrote.

        Raises
        ------
        InvalidInput
            Not such a text.
        """
        form = (
            "a plan such as 'grouping=batched', 'grouping=grouped', 'grouping=matrices', "
            "'grouping=all tile=256' or "
            "'grouping=experts a-first tile=256 first=batched second=batched gemm=blas'"
        )
        words = text.split() if isinstance(text, str) else []
        name, _, grouping = words[0].partition("=") if words else ("", "", "")
        if name != "grouping":
            raise InvalidInput("plan", text, form)
        rest = words[1:]
        if grouping == "experts" and rest:
            return cls("experts", plan=Plan.parse(" ".join(rest)))
        tile = 0
        if len(rest) == 1 and grouping == "all" and rest[0].startswith("tile="):
            digits = rest.pop().removeprefix("tile=")
            if not (digits.isascii() and digits.isdigit() and len(digits) < 16):
                raise InvalidInput("plan.tile", digits, "a number of tokens, or 0 for all")
            tile = int(digits)
        if rest:
            raise InvalidInput("plan", text, form)
        return cls(grouping, tile)  # type: ignore[arg-type]

    def checked(self, structure: MixtureStructure) -> MixturePlan:
        """This plan, if its part for single experts can run `structure` here."""
        if self.plan is not None:
            self.plan.checked(structure.expert)
        return self

    def __str__(self) -> str:
        if self.grouping == "all":
            return f"grouping=all tile={self.tile}"
        return f"grouping={self.grouping}" + ("" if self.plan is None else f" {self.plan}")


# Seconds on one core besides those that `nas.layers.plan` knows, fitted to widths 16 to 1024.
_DISPATCH_SECONDS = 110e-6  # sorting, counting, index arithmetic, forward and backward
_ROW_MOVE_SECONDS = 0.45e-9  # a number gathered or combined
_PRODUCT_SECONDS = 2e-6  # a product within a grouped one
_EXPERT_SECONDS = 25e-6  # slicing for one expert
_PADDING = 1.3  # the largest load over the mean, as a guess that no load may change
_SPILL_BYTES = 5 << 20  # a batch that is wider than this leaves the cache,
_SPILL = 2.0  # and takes so many times as long
_GATE_MOVES = 4  # passes over the intermediate of all experts for gates and their gradient


def choose_mixture_plan(
    structure: MixtureStructure,
    tokens: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> MixturePlan:
    """The plan that a cost model expects to take the least time, forward and backward.

    It depends on the structure, the tokens (rounded up to a power of two), the kind of device and
    the dtype alone, never on the loads, so that the same layer runs the same plan every time.
    """
    return _choose(
        structure.expert, structure.experts, structure.active, bucket(tokens),
        torch.device(device).type, dtype, False,
    )  # fmt: skip


@lru_cache(maxsize=65536)
def _choose(
    expert: Operator,
    experts: int,
    active: int,
    tokens: int,
    device: str,
    dtype: torch.dtype,
    sorted_rows: bool,
) -> MixturePlan:
    kind = torch.device(device)
    rows = tokens * active
    mean = max(1, -(-rows // experts))
    plans = candidates(expert, mean, kind, dtype)
    best = min(plans, key=lambda plan: cost(plan, expert, mean))
    one_by_one = MixturePlan("experts", plan=best)
    tile = tile_of(_all_sizes(expert, experts), kind, dtype)
    everything = MixturePlan("all", 0 if 2 * tile >= tokens else tile)
    if device != "cpu":
        if not sorted_rows and experts * expert_macs(expert) * tokens < 1 << 28:
            return everything  # so small that launches decide
        half = dtype in (torch.bfloat16, torch.float16)
        return MixturePlan("grouped" if half and _has_grouped_mm() else "batched")
    dispatch = _DISPATCH_SECONDS + rows * 3 * (expert.d_in + expert.d_out) * _ROW_MOVE_SECONDS
    found = {
        one_by_one: dispatch + experts * (_EXPERT_SECONDS + cost(best, expert, mean)),
        MixturePlan("batched"): dispatch + _batched_cost(expert, experts, mean * _PADDING, dtype),
    }
    by_matrix = MixturePlan("grouped" if expert.is_dense else "matrices")
    found[by_matrix] = dispatch + _matrices_cost(expert, experts, rows)
    if not sorted_rows:
        found[everything] = _all_cost(expert, experts, tokens, everything.tile)
    return min(found, key=lambda plan: found[plan])


def expert_macs(expert: Operator) -> int:
    """Multiply-accumulates per token of one expert, A first."""
    return expert.d_in * expert.d_out if expert.is_dense else expert.sizes.macs_a_first


def _all_sizes(expert: Operator, experts: int) -> Sizes:
    """All experts as one operator."""
    s = expert.sizes
    if expert.is_dense:
        return Sizes(expert.d_in, 1, 1, 1, expert.d_out, 1, expert.d_out * experts)
    return Sizes(s.alpha, s.beta, s.gamma, s.delta, s.epsilon, s.phi, s.rho * experts)


@dataclass(frozen=True)
class _Sized:
    """An operator for `nas.layers.plan.cost`."""

    d_in: int
    d_out: int
    sizes: Sizes
    is_dense: bool = False
    fingerprint: str = ""


def _batched_cost(expert: Operator, experts: int, rows: float, dtype: torch.dtype) -> float:
    """Products over (γ, E) and (φ, E) in one batch each."""
    s = expert.sizes
    # as many blocks as one operator of E times γ and φ has, but each takes only its own expert
    wide = Sizes(s.alpha, s.beta, s.gamma * experts, s.delta, s.epsilon, s.phi * experts, s.rho)
    one = _Sized(expert.d_in, expert.d_out, wide)
    if expert.is_dense:
        one = _Sized(expert.d_in, expert.d_out, expert.sizes, True)
        seconds = experts * cost(Plan("materialised"), one, math.ceil(rows))
        between = 0
    else:
        seconds = cost(Plan("a-first"), one, math.ceil(rows)) / experts
        between = s.beta * s.gamma * s.delta * s.phi * s.rho
    held = experts * rows * (expert.d_in + between + expert.d_out) * dtype.itemsize
    return seconds * (_SPILL if held > _SPILL_BYTES else 1.0)


def _matrices_cost(expert: Operator, experts: int, rows: int) -> float:
    """Three products with the matrices; these built twice, and their gradient taken apart."""
    rate, entries = _MACS_PER_SECOND["blas"], expert.d_in * expert.d_out
    products = 3 * (rows * entries / rate + experts * _PRODUCT_SECONDS)
    if expert.is_dense:
        return products
    return products + experts * entries * (7 * _ROW_MOVE_SECONDS + 8 * expert.sizes.rho / rate)


def _all_cost(expert: Operator, experts: int, tokens: int, tile: int) -> float:
    """Every expert on every token."""
    if expert.is_dense:
        wide = experts * (expert.d_in + expert.d_out) * tokens
        dense = _Sized(expert.d_in, expert.d_out * experts, expert.sizes, True)
        products = cost(Plan("materialised"), dense, tokens)
    else:
        sizes = _all_sizes(expert, experts)
        wide = sizes.beta * sizes.gamma * sizes.delta * sizes.phi * sizes.rho * tokens
        products = cost(Plan("a-first", tile), _Sized(expert.d_in, expert.d_out, sizes), tokens)
    return products + _GATE_MOVES * wide * _ROW_MOVE_SECONDS


def _has_grouped_mm() -> bool:
    return hasattr(functional, "grouped_mm")


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
    """The product, with gradients of x, weights, A and B; see the top of this module.

    Under autocast x and the factors are cast first.  Weights play no part in the forms "gather"
    and "sorted".  Without a plan the cost model chooses one.
    """
    dtype = autocast_dtype(x.device, a.dtype)
    if dtype != a.dtype or dtype != x.dtype:
        x, a, b = x.to(dtype), a.to(dtype), None if b is None else b.to(dtype)
    weights = weights.to(dtype)
    if transforms_active():
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
        return _choose(expert, len(a), k, bucket(n), x.device.type, x.dtype, form != "both")
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
    gates = functional.one_hot(chosen.reshape(-1)[order], experts).to(x.dtype)
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
) -> _Gradients:
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
        return forward(x, weights, chosen, a, b, d_out, plan, form)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, chosen, a, b = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # someone differentiates the gradient
            found = _plain_gradients((x, weights, chosen, a, b), dy, ctx.form)
        else:
            kind = x.device.type
            casting = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
            with torch.autocast(kind, enabled=False) if casting else nullcontext():
                wanted = (needs[0], needs[1], needs[3], needs[4])
                found = backward(x, weights, chosen, a, b, dy, ctx.plan, ctx.form, wanted)
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
    return forward(x, weights, chosen, a, b, d_out, how, form).contiguous()


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
    found = backward(x, weights, chosen, a, b, dy, how, form, needed)
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
    found = iter(_operator_backward(x, weights, chosen, a, b, dy, ctx.plan, ctx.form, wanted))
    dx, dw, da, db = (next(found) if needed else None for needed in wanted)
    return dx, dw, None, da, db, None, None, None


_operator.register_autograd(_differentiate, setup_context=_keep_inputs)


# --- without autograd ---------------------------------------------------------------------------


class _Rows:
    """Which row of a product each assignment is: sorted by expert, and padded if batched."""

    def __init__(self, chosen: Tensor, experts: int, padded: bool) -> None:
        self.n, self.k = chosen.shape
        flat = chosen.reshape(-1)
        self.experts = experts
        #: assignment (t·k + j) of each sorted row
        self.order = torch.argsort(flat, stable=True)
        self.tokens = self.order.div(self.k, rounding_mode="floor") if self.k > 1 else self.order
        self.counts = torch.bincount(flat, minlength=experts)
        #: rows of each expert where they are padded
        self.capacity = 0
        self.slots: Tensor | None = None
        if padded:
            loads = self.counts.tolist()
            self.capacity = max(loads, default=0)
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
            return (
                None
                if weights is None
                else weights.reshape(-1).index_select(0, self.order)[:, None]
            )
        scale = torch.zeros(self.experts * self.capacity, dtype=dtype, device=self.order.device)
        if weights is None:
            return scale.index_fill_(0, self.slots, 1)[:, None]
        return scale.index_copy_(0, self.slots, weights.reshape(-1).index_select(0, self.order))[
            :, None
        ]


def forward(
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    a: Tensor,
    b: Tensor | None,
    d_out: int,
    plan: MixturePlan,
    form: str,
) -> Tensor:
    """y, by `plan`."""
    if not chosen.numel():
        return x.new_zeros(0, d_out)
    x, a, b = x.contiguous(), a.contiguous(), None if b is None else b.contiguous()
    gathers, combines = form in ("both", "gather"), form in ("both", "combine")
    if plan.grouping == "all":
        return _all_forward(x, weights, chosen, a, b, d_out, plan)
    rows = _Rows(chosen, len(a), plan.grouping == "batched")
    xs = rows.take(x, gathers)
    if plan.grouping == "experts":
        ys = _experts_forward(xs, rows, a, b, d_out, plan)
    elif plan.grouping == "batched":
        ys = _batched_forward(xs, rows, a, b, d_out)
    elif plan.grouping == "matrices" and b is not None:
        ys = _grouped_forward(xs, rows, _matrices(a, b, d_out, x.shape[1]), None, d_out)
    else:
        ys = _grouped_forward(xs, rows, a, b, d_out)
    return rows.give(ys, combines, weights)


def backward(
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    a: Tensor,
    b: Tensor | None,
    dy: Tensor,
    plan: MixturePlan,
    form: str,
    wanted: tuple[bool, bool, bool, bool],
) -> _Gradients:
    """Gradients of x, weights, A and B, each None where it is not wanted."""
    if not chosen.numel():
        zeros = [
            torch.zeros_like(t) if t is not None and needed else None
            for t, needed in zip((x, weights, a, b), wanted, strict=True)
        ]
        return zeros[0], zeros[1], zeros[2], zeros[3]
    x, a, b = x.contiguous(), a.contiguous(), None if b is None else b.contiguous()
    dy = dy.contiguous()
    gathers, combines = form in ("both", "gather"), form in ("both", "combine")
    if plan.grouping == "all":
        return _all_backward(x, weights, chosen, a, b, dy, plan, wanted)
    rows = _Rows(chosen, len(a), plan.grouping == "batched")
    xs, dys = rows.take(x, gathers), rows.take(dy, combines)
    scale = rows.scales(weights if combines else None, x.dtype)
    need_weights = wanted[1] and combines
    inner = (wanted[0] or need_weights, wanted[2], wanted[3])
    scaled = xs if scale is None or not (wanted[2] or wanted[3]) else xs * scale
    if plan.grouping == "experts":
        u, da, db = _experts_backward(scaled, rows, a, b, dys, plan, inner)
    elif plan.grouping == "batched":
        u, da, db = _batched_backward(scaled, rows, a, b, dys, inner)
    elif plan.grouping == "matrices" and b is not None:
        u, da, db = _matrices_backward(scaled, rows, a, b, dys, inner)
    else:
        u, da, db = _grouped_backward(scaled, rows, a, b, dys, inner)
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
    return dx, d_weights, da, db


def _slices(rows: _Rows) -> list[tuple[int, slice]]:
    """The rows of each expert that has any."""
    found, start = [], 0
    for e, count in enumerate(rows.counts.tolist()):
        if count:
            found.append((e, slice(start, start + count)))
        start += count
    return found


def _experts_forward(
    xs: Tensor, rows: _Rows, a: Tensor, b: Tensor | None, d_out: int, plan: MixturePlan
) -> Tensor:
    assert plan.plan is not None
    ys = xs.new_empty(len(xs), d_out)
    for e, part in _slices(rows):
        factor = None if b is None else b[e]
        ys[part] = kernels.forward(xs[part], a[e], factor, d_out, plan.plan)
    return ys


def _experts_backward(
    xs: Tensor,
    rows: _Rows,
    a: Tensor,
    b: Tensor | None,
    dys: Tensor,
    plan: MixturePlan,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    assert plan.plan is not None
    dx = torch.empty_like(xs) if wanted[0] else None
    da = torch.zeros_like(a) if wanted[1] else None
    db = torch.zeros_like(b) if b is not None and wanted[2] else None
    for e, part in _slices(rows):
        factor = None if b is None else b[e]
        found = kernels.backward(xs[part], a[e], factor, dys[part], plan.plan, wanted)
        for whole, index, gradient in ((dx, part, found[0]), (da, e, found[1]), (db, e, found[2])):
            if whole is not None and gradient is not None:
                whole[index] = gradient
    return dx, da, db


# Batched: rows (E·c, ·), each expert c of them.


def _blocks_in(xs: Tensor, a: Tensor, b: Tensor, experts: int) -> Tensor:
    """Rows (E·c, d_in) as (γE, βc, α)."""
    gamma, alpha, beta = a.shape[1], a.shape[5], b.shape[4]
    cube = _padded(xs, gamma * beta * alpha).view(experts, -1, gamma, beta, alpha)
    return cube.permute(2, 0, 3, 1, 4).reshape(gamma * experts, -1, alpha)


def _blocks_out(dys: Tensor, a: Tensor, b: Tensor, experts: int) -> Tensor:
    """Rows (E·c, d_out) as (Eφ, δc, ε)."""
    phi, epsilon, delta = b.shape[1], b.shape[5], a.shape[4]
    cube = _padded(dys, phi * epsilon * delta).view(experts, -1, phi, epsilon, delta)
    return cube.permute(0, 2, 4, 1, 3).reshape(experts * phi, -1, epsilon)


def _padded(rows: Tensor, width: int) -> Tensor:
    return rows if rows.shape[1] == width else functional.pad(rows, (0, width - rows.shape[1]))


def _batched_intermediate(blocks: Tensor, a_first: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A x as (Eφ, γρβ, δc); a view for ρ = β = δ = 1."""
    experts, gamma, rho, phi, delta, _ = a.shape
    beta = b.shape[4]
    z = torch.bmm(a_first, blocks.transpose(1, 2))  # (γE, ρφδ, βc)
    if rho == beta == delta == 1:
        return z.view(gamma, experts * phi, -1).transpose(0, 1)
    z = z.view(gamma, experts, rho, phi, delta, beta, -1).permute(1, 3, 0, 2, 5, 4, 6)
    return z.reshape(experts * phi, gamma * rho * beta, -1)


def _first_factors(a: Tensor) -> Tensor:
    """A as (γE, ρφδ, α)."""
    return a.transpose(0, 1).reshape(a.shape[0] * a.shape[1], -1, a.shape[5])


def _batched_forward(xs: Tensor, rows: _Rows, a: Tensor, b: Tensor | None, d_out: int) -> Tensor:
    experts = rows.experts
    if b is None:
        return torch.bmm(xs.view(experts, -1, xs.shape[1]), a.transpose(1, 2)).view(-1, d_out)
    phi, epsilon, delta = b.shape[1], b.shape[5], a.shape[4]
    z = _batched_intermediate(_blocks_in(xs, a, b, experts), _first_factors(a), a, b)
    y = torch.bmm(z.transpose(1, 2), b.view(experts * phi, -1, epsilon))  # (Eφ, δc, ε)
    y = y.view(experts, phi, delta, -1, epsilon).permute(0, 3, 1, 4, 2)
    return y.reshape(len(xs), -1)[:, :d_out]


def _batched_backward(
    xs: Tensor,
    rows: _Rows,
    a: Tensor,
    b: Tensor | None,
    dys: Tensor,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    experts, d_in = rows.experts, xs.shape[1]
    if b is None:
        left = dys.view(experts, -1, dys.shape[1])
        da = torch.bmm(left.transpose(1, 2), xs.view(experts, -1, d_in)) if wanted[1] else None
        return torch.bmm(left, a).view(-1, d_in) if wanted[0] else None, da, None
    gamma, rho, phi, delta, alpha = a.shape[1:]
    beta, epsilon = b.shape[4:]
    blocks, a_first = _blocks_in(xs, a, b, experts), _first_factors(a)
    out, b_last = _blocks_out(dys, a, b, experts), b.view(experts * phi, -1, epsilon)
    db = da = dx = None
    if wanted[2]:
        db = torch.bmm(_batched_intermediate(blocks, a_first, a, b), out).view(b.shape)
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
        out, start = rows.new_zeros(len(rows), w.shape[2]), 0
        for g, end in enumerate(ends.tolist()):
            torch.mm(rows[start:end], w[g], out=out[start:end])
            start = end
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
        out, start = left.new_zeros(len(ends), i, o), 0
        for g, end in enumerate(ends.tolist()):
            torch.mm(left[start:end].t(), right[start:end], out=out[g])
            start = end
        return out
    step = 16 // left.element_size()
    left, right = _stepped(left, step).contiguous(), _stepped(right, step).contiguous()
    return functional.grouped_mm(left.t(), right, offs=ends)[:, :i, :o]


def _can_group(t: Tensor) -> bool:
    known = t.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return known and len(t) > 0 and _has_grouped_mm()


def _stepped(t: Tensor, step: int) -> Tensor:
    """The last axis zero-padded to a multiple of `step`."""
    short = -t.shape[-1] % step
    return functional.pad(t, (0, short)) if short else t


def _ends(rows: _Rows, blocks: int, times: int) -> Tensor:
    """Where each of blocks × E groups ends, a row of an expert being `times` rows."""
    ends = rows.counts.cumsum(0)
    starts = torch.arange(blocks, device=ends.device)[:, None] * len(rows.order)
    return ((starts + ends) * times).reshape(-1).to(torch.int32)


def _ragged_in(xs: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Rows (m, d_in) as (γmβ, α)."""
    gamma, alpha, beta = a.shape[1], a.shape[5], b.shape[4]
    cube = _padded(xs, gamma * beta * alpha).view(-1, gamma, beta, alpha)
    return cube.permute(1, 0, 2, 3).reshape(-1, alpha)


def _ragged_out(dys: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Rows (m, d_out) as (φmδ, ε)."""
    phi, epsilon, delta = b.shape[1], b.shape[5], a.shape[4]
    cube = _padded(dys, phi * epsilon * delta).view(-1, phi, epsilon, delta)
    return cube.permute(1, 0, 3, 2).reshape(-1, epsilon)


def _ragged_intermediate(
    blocks: Tensor, a_first: Tensor, ends: Tensor, a: Tensor, b: Tensor
) -> Tensor:
    """A x as (φmδ, γρβ)."""
    gamma, rho, phi, delta, _ = a.shape[1:]
    beta = b.shape[4]
    z = _grouped_mm(blocks, a_first.transpose(1, 2), ends)
    z = z.reshape(gamma, -1, beta, rho, phi, delta).permute(4, 1, 5, 0, 3, 2)
    return z.reshape(-1, gamma * rho * beta)


def _last_factors(b: Tensor) -> Tensor:
    """B as (φE, γρβ, ε)."""
    return b.transpose(0, 1).reshape(b.shape[0] * b.shape[1], -1, b.shape[5])


def _grouped_forward(xs: Tensor, rows: _Rows, a: Tensor, b: Tensor | None, d_out: int) -> Tensor:
    if b is None:
        return _grouped_mm(xs, a.transpose(1, 2), _ends(rows, 1, 1))
    gamma, beta, delta = a.shape[1], b.shape[4], a.shape[4]
    phi, epsilon = b.shape[1], b.shape[5]
    ends = _ends(rows, gamma, beta)
    z = _ragged_intermediate(_ragged_in(xs, a, b), _first_factors(a), ends, a, b)
    y = _grouped_mm(z, _last_factors(b), _ends(rows, phi, delta))
    y = y.reshape(phi, len(xs), delta, epsilon).permute(1, 0, 3, 2)
    return y.reshape(len(xs), phi * epsilon * delta)[:, :d_out]


def _grouped_backward(
    xs: Tensor,
    rows: _Rows,
    a: Tensor,
    b: Tensor | None,
    dys: Tensor,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if b is None:
        ends = _ends(rows, 1, 1)
        da = _grouped_outer(dys, xs, ends) if wanted[1] else None
        return _grouped_mm(dys, a, ends) if wanted[0] else None, da, None
    experts, gamma, rho, phi, delta, alpha = a.shape
    beta, epsilon = b.shape[4:]
    ends_in, ends_out = _ends(rows, gamma, beta), _ends(rows, phi, delta)
    blocks, a_first, b_last = _ragged_in(xs, a, b), _first_factors(a), _last_factors(b)
    out = _ragged_out(dys, a, b)
    da = db = dx = None
    if wanted[2]:
        z = _ragged_intermediate(blocks, a_first, ends_in, a, b)
        db = _grouped_outer(z, out, ends_out).reshape(phi, experts, gamma, rho, beta, epsilon)
        db = db.transpose(0, 1).contiguous()
    if not (wanted[0] or wanted[1]):
        return None, None, db
    dz = _grouped_mm(out, b_last.transpose(1, 2), ends_out)  # (φmδ, γρβ)
    dz = dz.reshape(phi, len(xs), delta, gamma, rho, beta).permute(3, 1, 5, 4, 0, 2)
    dz = dz.reshape(-1, rho * phi * delta)  # (γmβ, ρφδ)
    if wanted[1]:
        da = _grouped_outer(dz, blocks, ends_in).reshape(gamma, experts, rho, phi, delta, alpha)
        da = da.transpose(0, 1).contiguous()
    if wanted[0]:
        dx = _grouped_mm(dz, a_first, ends_in).reshape(gamma, len(xs), beta, alpha)
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


def _matrices_backward(
    xs: Tensor,
    rows: _Rows,
    a: Tensor,
    b: Tensor,
    dys: Tensor,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    experts, gamma, rho, phi, delta, alpha = a.shape
    beta, epsilon = b.shape[4:]
    d_in, d_out = xs.shape[1], dys.shape[1]
    ends = _ends(rows, 1, 1)
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


# All: gates between the factors, zero for experts that were not chosen.


def _gates(x: Tensor, weights: Tensor, chosen: Tensor, experts: int) -> Tensor:
    """The weights as (n, E)."""
    return weights.new_zeros(len(x), experts).scatter_(1, chosen, weights)


def _all_factors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A as (γ, Eρφδ, α) and B as (φ, γEρβ, ε)."""
    first = a.transpose(0, 1).reshape(a.shape[1], -1, a.shape[5])
    return first, b.permute(1, 2, 0, 3, 4, 5).reshape(b.shape[1], -1, b.shape[5])


def _gated_layout(z: Tensor, a: Tensor, beta: int) -> Tensor:
    """z (γ, E, ρφδβ, t) as (φ, γEρβ, δt)."""
    experts, gamma, rho, phi, delta, _ = a.shape
    if beta == delta == 1:
        return z.view(gamma * experts * rho, phi, -1).transpose(0, 1)
    z = z.view(gamma, experts * rho, phi, delta, beta, -1).permute(2, 0, 1, 4, 3, 5)
    return z.reshape(phi, gamma * experts * rho * beta, -1)


def _all_forward(
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    a: Tensor,
    b: Tensor | None,
    d_out: int,
    plan: MixturePlan,
) -> Tensor:
    n, experts = len(x), len(a)
    gates = _gates(x, weights, chosen, experts)
    y = x.new_empty(n, d_out)
    tiles = kernels._tiles(n, plan.tile)
    if b is None:
        flat = a.view(-1, a.shape[2]).t()
        for tile in tiles:
            u = (x[tile] @ flat).view(-1, experts, d_out)
            torch.bmm(gates[tile, None], u, out=y[tile, None])
        return y
    first, last = _all_factors(a, b)
    gamma, beta = a.shape[1], b.shape[4]
    in_axes, out_axes = (gamma, beta, a.shape[5]), (b.shape[1], b.shape[5], a.shape[4])
    for tile in tiles:
        xs = kernels._rows(kernels._cube(x[tile], in_axes, False), "batched")
        g = gates[tile].t()
        z = torch.bmm(first, xs.transpose(1, 2)).view(gamma, experts, -1, g.shape[1])
        z.mul_(g[:, None])
        out = kernels._target(y[tile], out_axes)
        left = _gated_layout(z, a, beta).transpose(1, 2)
        kernels._place(out.permute(1, 3, 0, 2), left, last, "batched", "blas")
        kernels._deliver(out, y[tile])
    return y


def _all_backward(
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    a: Tensor,
    b: Tensor | None,
    dy: Tensor,
    plan: MixturePlan,
    wanted: tuple[bool, bool, bool, bool],
) -> _Gradients:
    n, experts = len(x), len(a)
    gates = _gates(x, weights, chosen, experts)
    dx = torch.empty_like(x) if wanted[0] else None
    d_gates = torch.empty_like(gates) if wanted[1] else None
    accumulator = torch.promote_types(a.dtype, torch.float32)
    tiles = kernels._tiles(n, plan.tile)
    if b is None:
        da = torch.zeros_like(a, dtype=accumulator) if wanted[2] else None
        side = a.transpose(0, 1).reshape(a.shape[1], -1)  # (d_out, E·d_in)
        for tile in tiles:
            if dx is not None or d_gates is not None:
                u = (dy[tile] @ side).view(-1, experts, x.shape[1])  # Wᵀ dy of each expert
                if dx is not None:
                    torch.bmm(gates[tile, None], u, out=dx[tile, None])
                if d_gates is not None:
                    torch.bmm(u, x[tile, :, None], out=d_gates[tile, :, None])
            if da is not None:
                spread = (gates[tile, :, None] * dy[tile, None]).flatten(1)  # (t, E·d_out)
                kernels._accumulate(
                    da.view(1, -1, x.shape[1]), spread.t()[None], x[tile][None], "batched", "blas"
                )
        return (
            dx,
            None if d_gates is None else d_gates.gather(1, chosen),
            None if da is None else da.to(a.dtype),
            None,
        )
    first, last = _all_factors(a, b)
    gamma, rho, phi, delta, alpha = a.shape[1:]
    beta, epsilon = b.shape[4:]
    in_axes, out_axes = (gamma, beta, alpha), (phi, epsilon, delta)
    d_first = torch.zeros_like(first, dtype=accumulator) if wanted[2] else None
    d_last = torch.zeros_like(last, dtype=accumulator) if wanted[3] else None
    for tile in tiles:
        xs = kernels._rows(kernels._cube(x[tile], in_axes, False), "batched")
        dys = kernels._rows(kernels._cube(dy[tile], out_axes, True), "batched")  # (φ, δt, ε)
        g = gates[tile].t()  # (E, t)
        z = None
        if d_last is not None or d_gates is not None:
            z = torch.bmm(first, xs.transpose(1, 2)).view(gamma, experts, -1, g.shape[1])
        if d_last is not None:
            assert z is not None
            kernels._accumulate(
                d_last, _gated_layout(z * g[:, None], a, beta), dys, "batched", "blas"
            )
        dz = torch.bmm(last, dys.transpose(1, 2)).view(phi, gamma, experts * rho, beta, delta, -1)
        dz = dz.permute(1, 2, 0, 4, 3, 5).reshape(gamma, experts, -1, g.shape[1])
        if d_gates is not None:
            assert z is not None
            d_gates[tile] = z.mul_(dz).sum((0, 2)).t()
        if d_first is None and dx is None:
            continue
        dz = (dz * g[:, None]).reshape(gamma, experts * rho * phi * delta, -1)  # (γ, Eρφδ, βt)
        if d_first is not None:
            kernels._accumulate(d_first, dz, xs, "batched", "blas")
        if dx is not None:
            out = kernels._target(dx[tile], in_axes)
            kernels._place(out.permute(1, 2, 0, 3), dz.transpose(1, 2), first, "batched", "blas")
            kernels._deliver(out, dx[tile])
    da = db = None
    if d_first is not None:
        da = d_first.view(gamma, experts, rho, phi, delta, alpha).transpose(0, 1)
        da = da.to(a.dtype).contiguous()
    if d_last is not None:
        db = d_last.view(phi, gamma, experts, rho, beta, epsilon).permute(2, 0, 1, 3, 4, 5)
        db = db.to(b.dtype).contiguous()
    return dx, None if d_gates is None else d_gates.gather(1, chosen), da, db
