"""What an execution plan does: operations, matrix products and copies, counted for a cost model.

`Work` counts in the units of `nas.rates.MachineRates`, under the names of its fields, so that the
expected time of a plan is the sum of counts times rates.  It follows `nas.layers.kernels.einsum`
step by step, forward and backward with all gradients.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from nas.layers.kernels.shapes import SHORT, SLAB_ROWS, is_narrow, slabs

if TYPE_CHECKING:
    from nas.designs.einsum import Sizes
    from nas.layers.kernels.plan import Operator, Plan, Product

#: The width of the blocks in which libraries vectorise over columns.
_VECTOR = 16
_FEW = 12
#: Numbers of a tile that stay in cache between its steps: 8 MiB of float32.
_CACHED = 1 << 21


class Work(defaultdict[str, float]):
    """Units of work by the name of their rate."""

    def __init__(self) -> None:
        super().__init__(float)

    def product(self, kind: str, rows: float, inner: float, columns: float, count: float) -> None:
        """`count` products (rows × inner) · (inner × columns): blas, onednn, or in a batch."""
        self[f"{kind}_product"] += count
        self[f"{kind}_mac"] += count * rows * inner * columns
        self[f"{kind}_rest"] += count * rows * inner * _rest(int(columns))
        self[f"{kind}_operand"] += count * (rows * inner + inner * columns + rows * columns)

    def batch(self, size: int, rows: float, inner: float, columns: float, count: float) -> None:
        """`count` operations on batches of `size` products."""
        self["operation"] += count
        self.product("batched", rows, inner, columns, count * size)

    def small(self, rows: float, inner: float, columns: float, count: float) -> None:
        """One operation on a batch of products so small that all they touch is in cache."""
        self["operation"] += 1
        self["batched_product"] += count
        self["batched_mac"] += count * rows * inner * columns
        self["batched_rest"] += count * rows * inner * _rest(int(columns))

    def move(self, numbers: float, operations: float, turned: bool = False) -> None:
        """Copies of `numbers` altogether in so many operations, as they lie or transposed."""
        self["turned" if turned else "moved"] += numbers
        self["operation"] += operations


def _rest(columns: int) -> float:
    """Passes over the left operand for columns that fill no vector block.

    One for each power of two that their number is made of, less what they would take as part of a
    block, which is counted as multiply-accumulates; and more where there are few at all.
    """
    rest = columns % _VECTOR
    return rest.bit_count() - rest / _VECTOR + 5 * (columns < _FEW)


def work(plan: Plan, operator: Operator, tokens: int) -> Work:
    """Of forward and backward on a batch of `tokens`."""
    done = Work()
    if operator.is_dense:
        _dense(done, plan, operator, tokens)
    elif plan.order == "materialised":
        _materialised(done, plan, operator, tokens)
    else:
        _tiled(done, plan, operator, tokens)
    return done


def _dense(done: Work, plan: Plan, operator: Operator, tokens: int) -> None:
    d_in, d_out = operator.d_in, operator.d_out
    done.product(plan.gemm, tokens, d_in, d_out, 1)
    done.product(plan.gemm, tokens, d_out, d_in, 1)
    if plan.gemm == "blas":
        done.product(plan.gemm, d_out, tokens, d_in, 1)
        return
    parts = -(-d_out // SLAB_ROWS)
    done.product(plan.gemm, d_out / parts, tokens, d_in, parts)
    done.move(tokens * d_out, parts, turned=True)
    done.move(d_out * d_in, parts)


def _materialised(done: Work, plan: Plan, operator: Operator, tokens: int) -> None:
    s, d_in, d_out = operator.sizes, operator.d_in, operator.d_out
    wide_in, wide_out = s.alpha * s.beta * s.gamma, s.delta * s.epsilon * s.phi
    done.product(plan.gemm, tokens, d_in, d_out, 1)
    done.product(plan.gemm, tokens, d_out, d_in, 1)
    right = s.delta * s.alpha  # of each block of W: (βε, ρ) · (ρ, δα)
    for f, e in slabs(s.phi, s.epsilon, s.delta):
        blocks, rows = (f.stop - f.start) * s.gamma, s.beta * (e.stop - e.start)
        part, factor = blocks * rows * right, blocks * rows * s.rho
        done.move(2 * factor, 2)  # W is built twice
        done.batch(blocks, rows, s.rho, right, 2)
        done.move(2 * part, 2)
        start = (f.start * s.epsilon + e.start) * s.delta
        w_rows = max(0, min(part // wide_in, d_out - start))
        done.product(plan.gemm, w_rows, tokens, d_in, 1)
        if plan.gemm == "onednn":
            done.move(w_rows * tokens, 1, turned=True)
        done.move(part, 1)
        done.batch(blocks, s.rho, rows, right, 1)
        done.move(blocks * s.rho * right, 1)
        done.batch(blocks, s.rho, right, rows, 1)
        done.move(factor, 1)
    if (wide_in, wide_out) != (d_in, d_out):
        done.move(2 * d_in * d_out, 4)
    done.move(4 * s.gamma * s.rho * s.phi * right, 6)


class _Tile:
    """The steps of one tile of `tokens`, each counted as often as there are tiles."""

    def __init__(self, done: Work, plan: Plan, s: Sizes, tokens: float, tiles: int) -> None:
        self.done, self.plan, self.s, self.tokens, self.tiles = done, plan, s, tokens, tiles

    def products(self, how: Product, size: int, rows: float, inner: float, columns: float) -> None:
        """One for each block, or all in one batch."""
        if how == "blocks":
            self.done.product(self.plan.gemm, rows, inner, columns, size * self.tiles)
        else:
            self.done.batch(size, rows, inner, columns, self.tiles)

    def small(self, rows: float, inner: float, columns: float) -> None:
        """A product for each token."""
        self.done.small(rows, inner, columns, self.tokens * self.tiles)
        self.done["operation"] += self.tiles - 1

    def move(self, per_token: int, turned: bool = False, operations: int = 1) -> None:
        self.done.move(per_token * self.tokens * self.tiles, operations * self.tiles, turned=turned)

    def place(
        self, how: Product, size: int, rows: float, inner: int, columns: int, free: bool,
        turned: bool,
    ) -> None:  # fmt: skip
        """`kernels._place`; `free` where the result lies together, so that it needs no copy."""
        numbers = round(size * rows * columns / self.tokens)
        if how == "blocks" and not (free and inner <= SHORT):
            self.products(how, size, rows, inner, columns)
            if self.plan.gemm == "onednn":  # whose left operand must not be a transposed one
                self.move(round(size * rows * inner / self.tokens), True, size)
            self.move(numbers, turned, size)
        elif is_narrow(int(rows), inner, columns):
            self.products("batched", size, columns, inner, rows)
            self.move(numbers, True)
        else:
            self.products("batched", size, rows, inner, columns)
            if not free:
                self.move(numbers, turned)

    def accumulate(self, how: Product, size: int, rows: int, inner: float, columns: int) -> None:
        """`kernels._accumulate`."""
        if how == "batched" and is_narrow(rows, int(inner), columns):
            self.products(how, size, columns, inner, rows)
        else:
            self.products(how, size, rows, inner, columns)
        self.done.move(
            size * rows * columns * self.tiles, (size if how == "blocks" else 1) * self.tiles
        )


def _tiled(done: Work, plan: Plan, operator: Operator, tokens: int) -> None:
    """Both factors, tile by tile; names are those of A first."""
    swap = plan.order == "b-first"
    s = operator.sizes.swapped() if swap else operator.sizes
    wide_in, wide_out = s.alpha * s.beta * s.gamma, s.delta * s.epsilon * s.phi
    fits_in, fits_out = wide_in == operator.d_in, wide_out == operator.d_out
    tiles = -(-tokens // plan.tile) if 0 < plan.tile < tokens else 1
    tile = _Tile(done, plan, s, tokens / tiles, tiles)
    if swap:
        params = s.gamma * s.rho * s.phi * (s.delta * s.alpha + s.beta * s.epsilon)
        done.move(3 * params, 6, turned=True)
    # padding of x, twice, and of dy; y and dx out of their buffers
    if not fits_in:
        tile.move(3 * wide_in, operations=5)
    if not fits_out:
        tile.move(2 * wide_out, operations=4)
    done["operation"] += 4 * tiles
    (_by_token if plan.second == "tokens" else _by_block)(tile, swap, fits_in, fits_out)


def _by_block(tile: _Tile, swap: bool, fits_in: bool, fits_out: bool) -> None:
    s, t, plan = tile.s, tile.tokens, tile.plan
    z = s.beta * s.gamma * s.delta * s.phi * s.rho
    wide_in, wide_out = s.alpha * s.beta * s.gamma, s.delta * s.epsilon * s.phi
    columns, inner = s.rho * s.phi * s.delta, s.gamma * s.rho * s.beta
    apart = s.beta * s.delta > 1
    for _ in range(2):  # z in forward, and again in backward
        if s.beta > 1 or (plan.first == "blocks" and s.gamma > 1):
            tile.move(wide_in, swap and s.beta > 1)
        tile.products(plan.first, s.gamma, columns, s.alpha, t * s.beta)
        if plan.first == "blocks":
            tile.move(z, operations=s.gamma)
        if apart:
            tile.move(z)
    turned = s.delta > 1 and not swap
    free = s.phi * s.delta == 1 if fits_out else s.delta == 1
    tile.place(plan.second, s.phi, s.delta * t, inner, s.epsilon, free, turned)
    if s.delta > 1 or (plan.second == "blocks" and s.phi > 1):
        tile.move(wide_out, turned)
    tile.accumulate(plan.second, s.phi, inner, s.delta * t, s.epsilon)
    tile.products(plan.second, s.phi, inner, s.epsilon, s.delta * t)
    if plan.second == "blocks":
        tile.move(z, operations=s.phi)
    elif apart or (s.phi > 1 and s.rho > 1):
        tile.move(z)
    tile.accumulate(plan.first, s.gamma, columns, s.beta * t, s.alpha)
    free = s.gamma * s.beta == 1 if fits_in else s.beta == 1
    tile.place(plan.first, s.gamma, s.beta * t, columns, s.alpha, free, swap and s.beta > 1)
    tile.done["spilled"] += tile.tiles * max(0.0, t * (wide_in + z + wide_out) - _CACHED)


def _by_token(tile: _Tile, swap: bool, fits_in: bool, fits_out: bool) -> None:
    s, t = tile.s, tile.tokens
    columns, inner = s.rho * s.delta, s.beta * s.rho
    turned = swap and s.alpha > 1 and s.beta > 1
    for _ in range(2):
        if turned:
            tile.move(s.alpha * s.beta, turned)
        tile.products("blocks", 1, t * s.beta, s.alpha, columns)
    tile.small(s.epsilon, inner, s.delta)
    if swap and s.epsilon > 1 and s.delta > 1:
        tile.move(s.epsilon * s.delta, turned=True)
    tile.small(s.epsilon, s.delta, inner)
    tile.move(s.epsilon * inner)
    tile.small(inner, s.epsilon, s.delta)
    tile.products("blocks", 1, columns, t * s.beta, s.alpha)
    if tile.plan.gemm == "onednn":
        tile.move(columns * s.beta, turned=True)
    tile.products("blocks", 1, t * s.beta, columns, s.alpha)
    tile.move(s.alpha * s.beta, turned)
