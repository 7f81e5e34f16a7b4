"""Execution plans: which of the exact ways to compute a structured layer is run.

A `Plan` is chosen by a cost model from the operator, the number of tokens (rounded up to a power
of two), the kind of device and the dtype alone, so that the same layer on the same kind of machine
runs the same plan every time; it can be read, stored as text, and fixed.  Every plan gives the same
result to rounding; the same plan, machine, torch and number of threads give the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cache, lru_cache
from itertools import product
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeVar, get_args

import torch

from nas.designs.einsum import Sizes
from nas.errors import InvalidInput
from nas.layers.kernels.torch_internals import onednn_linear

#: Which factor is contracted first, or both multiplied into one matrix.
Order = Literal["a-first", "b-first", "materialised"]
#: How the matrix products of one factor are run; see `nas.layers.kernels.einsum`.
Product = Literal["batched", "blocks", "tokens"]
#: The library of single matrix products on a CPU.
Gemm = Literal["blas", "onednn"]


class Operator(Protocol):
    """What a plan is chosen for: the integers of a `Structure`, without its θ."""

    @property
    def d_in(self) -> int: ...
    @property
    def d_out(self) -> int: ...
    @property
    def sizes(self) -> Sizes: ...
    @property
    def is_dense(self) -> bool: ...
    @property
    def fingerprint(self) -> str: ...
    def __hash__(self) -> int: ...


class _AnyPlan(Protocol):
    @classmethod
    def parse(cls, text: str) -> Self: ...
    def checked(self, operator: Any, /) -> Self: ...


_Plan = TypeVar("_Plan", bound=_AnyPlan)


@dataclass(frozen=True, slots=True)
class Plan:
    """One way to compute a layer.

    >>> plan = Plan.parse("a-first tile=256 first=batched second=blocks gemm=onednn")
    >>> plan.tile, str(plan) == "a-first tile=256 first=batched second=blocks gemm=onednn"
    (256, True)
    """

    order: Order
    #: tokens that pass both factors at a time; 0 is all at once
    tile: int = 0
    first: Product = "batched"
    second: Product = "batched"
    gemm: Gemm = "blas"

    def __post_init__(self) -> None:
        accepted = {"order": Order, "first": Product, "second": Product, "gemm": Gemm}
        for field, literal in accepted.items():
            if getattr(self, field) not in get_args(literal):
                choices = " | ".join(get_args(literal))
                raise InvalidInput(f"plan.{field}", getattr(self, field), choices)
        if isinstance(self.tile, bool) or not isinstance(self.tile, int) or self.tile < 0:
            raise InvalidInput("plan.tile", self.tile, "a number of tokens, or 0 for all at once")
        if self.first == "tokens":
            raise InvalidInput("plan.first", self.first, "batched | blocks")
        if self.order == "materialised":  # which the other fields do not concern
            for field, nothing in (("tile", 0), ("first", "batched"), ("second", "batched")):
                object.__setattr__(self, field, nothing)

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Read what `str` wrote.

        Raises
        ------
        InvalidInput
            Not such a text.
        """
        form = "a plan such as 'a-first tile=256 first=batched second=blocks gemm=blas'"
        order, *options = (text.split() if isinstance(text, str) else []) or [""]
        values: dict[str, str | int] = {"order": order}
        for option in options:
            name, _, value = option.partition("=")
            if name not in {f.name for f in fields(cls)} - {"order"} or name in values:
                raise InvalidInput("plan", text, form)
            if name == "tile":
                if not (value.isascii() and value.isdigit() and len(value) < 16):
                    raise InvalidInput("plan.tile", value, "a number of tokens, or 0 for all")
                values[name] = int(value)
            else:
                values[name] = value
        if not order:
            raise InvalidInput("plan", text, form)
        return cls(**values)  # type: ignore[arg-type]

    def checked(self, operator: Operator) -> Plan:
        """This plan, if it can run `operator` here.

        Raises
        ------
        InvalidInput
            Products per token without γ = φ = 1, an order for a dense layer, or oneDNN where
            there is none.
        """
        sizes = operator.sizes
        if operator.is_dense and self.order != "materialised":
            raise InvalidInput("plan.order", self.order, "materialised for a dense layer")
        if self.second == "tokens" and sizes.gamma * sizes.phi != 1:
            raise InvalidInput("plan.second", "tokens", "batched | blocks where γφ > 1")
        if self.gemm == "onednn" and not onednn_available():
            raise InvalidInput("plan.gemm", "onednn", "blas on this machine")
        return self

    def __str__(self) -> str:
        if self.order == "materialised":
            return f"{self.order} gemm={self.gemm}"
        return " ".join(
            [self.order, *(f"{f.name}={getattr(self, f.name)}" for f in fields(self)[1:])]
        )


def checked_plan(kind: type[_Plan], value: object, structure: Any) -> _Plan:
    """The plan of this kind, given as such or as its text, that can run `structure` here.

    Raises
    ------
    InvalidInput
        Neither of both, or one that cannot run it.
    """
    plan = kind.parse(value) if isinstance(value, str) else value
    if not isinstance(plan, kind):
        raise InvalidInput("plan", value, f"a {kind.__name__}, its text, or None")
    return plan.checked(structure)


@cache
def onednn_available() -> bool:
    """Whether this torch has single-precision matrix products of oneDNN."""
    return onednn_linear() is not None


@cache
def _onednn_is_faster() -> bool:
    """MKL keeps its AVX-512 code to Intel's processors; oneDNN's runs on all that have it."""
    if not (onednn_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"):
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def gemm_library(device: torch.device, dtype: torch.dtype) -> Gemm:
    """The faster library of single matrix products."""
    single = device.type == "cpu" and dtype == torch.float32
    return "onednn" if single and _onednn_is_faster() else "blas"


def bucket(tokens: int) -> int:
    """`tokens` rounded up to a power of two: the number for which a plan is chosen."""
    return 1 << max(tokens - 1, 0).bit_length()


def choose(
    operator: Operator,
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    library: Gemm | None = None,
) -> Plan:
    """The plan that the cost model expects to take the least time, forward and backward.

    The model knows CPUs; for another device it tells the orders apart by MACs and memory traffic
    only, so that measuring pays there.  `library` restricts single products to one library.
    """
    return _choose(operator, bucket(tokens), device.type, dtype, library)


@lru_cache(maxsize=65536)
def _choose(
    operator: Operator, tokens: int, device: str, dtype: torch.dtype, library: Gemm | None
) -> Plan:
    plans = candidates(operator, tokens, torch.device(device), dtype, library)
    return min(plans, key=lambda plan: cost(plan, operator, tokens))


def candidates(
    operator: Operator,
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    library: Gemm | None = None,
) -> list[Plan]:
    """Every plan worth considering here, each with its tile."""
    library = library or gemm_library(device, dtype)
    if operator.is_dense:
        libraries = dict.fromkeys((library, "blas"))
        return [Plan("materialised", gemm=gemm) for gemm in libraries]
    sizes = operator.sizes
    found = [Plan("materialised", gemm=library)]
    orders: tuple[Order, ...] = ("a-first", "b-first")
    ways: list[tuple[Product, Product]] = [("batched", "batched")]
    if device.type == "cpu":
        ways += [("batched", "blocks"), ("blocks", "batched"), ("blocks", "blocks")]
        if sizes.gamma * sizes.phi == 1 and min(sizes.delta, sizes.epsilon) >= _LEAST_TOKEN_SIDE:
            ways += [("blocks", "tokens")]
    for order, (first, second) in product(orders, ways):
        seen = sizes if order == "a-first" else sizes.swapped()
        tile = tile_of(seen, device, dtype)
        if "blocks" in (first, second) and second != "tokens":
            tile *= 2  # single products gain more from rows than from the cache
        tile = 0 if 2 * tile >= tokens else tile  # two tiles save no more than they cost
        found.append(Plan(order, tile, first, second, library))
    return found


def tile_of(s: Sizes, device: torch.device, dtype: torch.dtype) -> int:
    """Tokens at a time: as many as keep the widest of a tile's tensors in cache, or in bounds."""
    widest = max(s.alpha * s.beta * s.gamma, s.delta * s.epsilon * s.phi, _intermediate(s))
    widest *= dtype.itemsize
    budget = _CPU_TILE_BYTES if device.type == "cpu" else _GPU_TILE_BYTES
    tile = 1 << round(math.log2(max(budget / widest, 1)))
    return max(tile, _LEAST_TILE if widest <= _CPU_TILE_BYTES // 32 else _LEAST_TILE // 4)


def _intermediate(s: Sizes) -> int:
    """Numbers per token between the factors, A first: βγδφρ."""
    return s.beta * s.gamma * s.delta * s.phi * s.rho


#: The widest tensor of a tile: near the second-level cache of a core; on a GPU, where only the
#: memory held matters, more.
_CPU_TILE_BYTES = 1 << 21
_GPU_TILE_BYTES = 1 << 28
_LEAST_TILE = 256
#: Smaller products of single tokens are slow everywhere.
_LEAST_TOKEN_SIDE = 8

# Rates of one core of a 2024 server processor with AVX-512, in single precision, fitted to 440
# timed plans.  Only their ratios decide, so that they serve other processors and more threads.
MACS_PER_SECOND: dict[Gemm, float] = {"blas": 44e9, "onednn": 92e9}
_MOVE_SECONDS = 0.4e-9  # a number moved
_CALL_SECONDS = 4e-6  # a tensor operation
_GEMM_SECONDS = 49e-6  # a single matrix product, with its views and the copy of its result
_BLOCK_SECONDS = 0.35e-6  # a product within a batch
_FILL = 3.5  # the side at which a batched product reaches half its speed


def cost(plan: Plan, operator: Operator, tokens: int) -> float:
    """Expected seconds of forward and backward on one core (relative ones elsewhere)."""
    if plan.order == "materialised":
        return _materialised_cost(plan, operator, tokens)
    s = operator.sizes if plan.order == "a-first" else operator.sizes.swapped()
    tiles = -(-tokens // plan.tile) if plan.tile else 1
    t = tokens / max(tiles, 1)
    # forward z and y; backward z again, dB, dZ, dA and dX
    first = _product_seconds(
        plan.first, plan.gemm, s.gamma, t * s.beta, s.alpha, s.delta * s.phi * s.rho
    )
    if plan.second == "tokens":
        rate = MACS_PER_SECOND["blas"] * _fill(s.delta)
        macs = t * s.delta * s.epsilon * s.beta * s.rho
        second = macs / rate + t * _BLOCK_SECONDS + _CALL_SECONDS
        moved = t * (s.epsilon * s.beta * s.rho + s.epsilon * s.delta) * _MOVE_SECONDS
    else:
        second = _product_seconds(
            plan.second, plan.gemm, s.phi, t * s.delta, s.gamma * s.beta * s.rho, s.epsilon
        )
        moved = t * _relayout_seconds(plan, s)
    if plan.order == "b-first":
        moved += t * 4 * _MOVE_SECONDS * (s.alpha * s.beta * s.gamma)
    return max(tiles, 1) * (4 * first + 3 * second + moved + 12 * _CALL_SECONDS)


def _product_seconds(
    how: Product, library: Gemm, count: int, rows: float, inner: int, columns: int
) -> float:
    """`count` products (rows × inner) · (inner × columns)."""
    macs = count * rows * inner * columns
    if how == "blocks":
        return macs / MACS_PER_SECOND[library] + count * _GEMM_SECONDS
    fill = _fill(inner) * _fill(columns)
    return macs / (MACS_PER_SECOND["blas"] * fill) + count * _BLOCK_SECONDS + _CALL_SECONDS


def _fill(size: int) -> float:
    """The share of full speed that a product with a side of `size` reaches."""
    return size / (size + _FILL)


def _relayout_seconds(plan: Plan, s: Sizes) -> float:
    """Copies per token around the products of one tile, forward and backward."""
    z = _intermediate(s)
    seconds = 6 * z * _MOVE_SECONDS  # written once and read twice, and so its gradient
    if s.beta * s.delta > 1:
        seconds += 3 * z * _MOVE_SECONDS
    elif s.rho > 1 or plan.first == "blocks":
        seconds += z * _MOVE_SECONDS
    if plan.second == "blocks":
        seconds += 2 * z * _MOVE_SECONDS
    if plan.first == "blocks":
        seconds += z * _MOVE_SECONDS
    # y and dY, where products cannot write or read them in place; then X, twice, and dX
    moves = (plan.second == "blocks" or s.phi * s.delta > 1) + (
        s.delta > 1 or (plan.second == "blocks" and s.phi > 1)
    )
    seconds += moves * s.phi * s.epsilon * s.delta * _MOVE_SECONDS
    moves = (plan.first == "blocks" or s.gamma * s.beta > 1) + 2 * (
        s.gamma > 1 and (plan.first == "blocks" or s.beta > 1)
    )
    return seconds + moves * s.gamma * s.beta * s.alpha * _MOVE_SECONDS


def _materialised_cost(plan: Plan, operator: Operator, tokens: int) -> float:
    s = operator.sizes
    matrix = s.alpha * s.beta * s.gamma * s.phi * s.epsilon * s.delta
    rate = MACS_PER_SECOND[plan.gemm]
    if operator.is_dense:
        call = _CALL_SECONDS if plan.gemm == "blas" else _GEMM_SECONDS
        return 3 * (tokens * operator.d_in * operator.d_out / rate + call)
    products = 3 * (tokens * matrix / rate + _GEMM_SECONDS)
    # W twice, its gradient once; and the products of its gradient with both factors
    build = matrix * (3 * _MOVE_SECONDS + 4 * s.rho / (MACS_PER_SECOND["blas"] * 0.5))
    return products + build + 12 * _CALL_SECONDS
