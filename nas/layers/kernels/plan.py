"""Execution plans: which of the exact ways to compute a structured layer is run.

A `Plan` is chosen by a cost model from the operator, the number of tokens (rounded up to a power
of two), the kind of device, the dtype and the rates in use (`nas.rates`) alone, so that the same
layer on the same machine runs the same plan every time; it can be read, stored as text, and fixed.
Every plan gives the same result to rounding; the same plan, machine, torch and number of threads
give the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cache, cached_property, lru_cache
from itertools import product
from typing import Any, Literal, Protocol, Self, TypeVar, get_args

import torch
from torch import Tensor

from nas.designs.einsum import Sizes, Structure, fingerprint
from nas.errors import InvalidInput
from nas.layers.kernels.torch_internals import onednn_linear
from nas.layers.kernels.work import work
from nas.rates import MachineRates, current_rates

#: Which factor is contracted first, or both multiplied into one matrix.
Order = Literal["a-first", "b-first", "materialised"]
#: How the matrix products of one factor are run; see `nas.layers.kernels.einsum`.
Product = Literal["batched", "blocks", "tokens"]
#: The library of single matrix products on a CPU.
Gemm = Literal["blas", "onednn"]


@dataclass(frozen=True)
class Sized:
    """What a plan is chosen for: the integers of a `Structure`, without its θ."""

    d_in: int
    d_out: int
    sizes: Sizes
    is_dense: bool = False

    @cached_property
    def fingerprint(self) -> str:
        """As that of the structure."""
        return fingerprint(self.d_in, self.d_out, None if self.is_dense else self.sizes)

    @staticmethod
    def told(x: Tensor, a: Tensor, b: Tensor | None, d_out: int) -> Sized:
        """Of tensors, the first of shape (n, d_in)."""
        return Sized.of(x.shape[1], d_out, a.shape, None if b is None else b.shape)

    @staticmethod
    @lru_cache(maxsize=4096)
    def of(d_in: int, d_out: int, a: torch.Size, b: torch.Size | None) -> Sized:
        """Of the shapes of both factors or, without `b`, of a dense layer."""
        if b is None:
            return Sized(d_in, d_out, Sizes(1, 1, d_in, 1, 1, d_out, 1), True)
        gamma, rho, phi, delta, alpha = a
        return Sized(d_in, d_out, Sizes(alpha, b[3], gamma, delta, b[4], phi, rho))


Operator = Structure | Sized


class _AnyPlan(Protocol):
    @classmethod
    def parse(cls, text: str) -> Self: ...
    def checked(self, operator: Any, /) -> Self: ...


_Plan = TypeVar("_Plan", bound=_AnyPlan)


def check_tile(tile: object) -> None:
    """Raise `InvalidInput` for what is no number of tokens."""
    if isinstance(tile, bool) or not isinstance(tile, int) or tile < 0:
        raise InvalidInput("plan.tile", tile, "a number of tokens, or 0 for all at once")


def parse_tile(text: str) -> int:
    """The tile of a plan's text; `InvalidInput` if it is none."""
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise InvalidInput("plan.tile", text, "a number of tokens, or 0 for all")
    return int(text)


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
        check_tile(self.tile)
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
            values[name] = parse_tile(value) if name == "tile" else value
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


def gemm_libraries(device: torch.device, dtype: torch.dtype) -> tuple[Gemm, ...]:
    """The libraries that single matrix products can be run by."""
    both = device.type == "cpu" and dtype == torch.float32 and onednn_available()
    return ("blas", "onednn") if both else ("blas",)


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

    The model knows CPUs, by `current_rates`; for another device it tells the orders apart by
    default rates, so that measuring pays there.  `library` restricts single products to one.
    """
    rates = rates_for(device.type)
    return _choose(operator, bucket(tokens), device.type, dtype, library, rates)


def rates_for(device: str) -> MachineRates:
    """The rates by which plans for this kind of device are chosen."""
    return current_rates() if device == "cpu" else _DEFAULT_RATES


_DEFAULT_RATES = MachineRates()


@lru_cache(maxsize=65536)
def _choose(
    operator: Operator,
    tokens: int,
    device: str,
    dtype: torch.dtype,
    library: Gemm | None,
    rates: MachineRates,
) -> Plan:
    plans = candidates(operator, tokens, torch.device(device), dtype, library)
    return min(plans, key=lambda plan: cost(plan, operator, tokens, rates))


def candidates(
    operator: Operator,
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    library: Gemm | None = None,
) -> list[Plan]:
    """Every plan worth considering here, each with its tile."""
    libraries = gemm_libraries(device, dtype) if library is None else (library,)
    found = [Plan("materialised", gemm=gemm) for gemm in libraries]
    if operator.is_dense:
        return found
    sizes = operator.sizes
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
        single = "blocks" in (first, second)
        found += [
            Plan(order, tile, first, second, gemm) for gemm in (libraries if single else ("blas",))
        ]
    return found


def tile_of(s: Sizes, device: torch.device, dtype: torch.dtype) -> int:
    """Tokens at a time: as many as keep the widest of a tile's tensors in cache, or in bounds."""
    widest = max(s.alpha * s.beta * s.gamma, s.delta * s.epsilon * s.phi, _intermediate(s))
    widest *= dtype.itemsize
    budget = _CPU_TILE_BYTES if device.type == "cpu" else _GPU_TILE_BYTES
    tile = 1 << round(math.log2(max(budget / widest, 1)))
    return max(tile, _LEAST_TILE)


def _intermediate(s: Sizes) -> int:
    """Numbers per token between the factors, A first: βγδφρ."""
    return s.beta * s.gamma * s.delta * s.phi * s.rho


#: The widest tensor of a tile: near the second-level cache of a core; on a GPU, where only the
#: memory held matters, more.
_CPU_TILE_BYTES = 1 << 21
_GPU_TILE_BYTES = 1 << 28
_LEAST_TILE = 64
#: Smaller products of single tokens are slow everywhere.
_LEAST_TOKEN_SIDE = 8


def cost(plan: Plan, operator: Operator, tokens: int, rates: MachineRates | None = None) -> float:
    """Expected seconds of forward and backward on a CPU (relative ones elsewhere).

    By the rates given, else by those that this process uses.
    """
    rates = current_rates() if rates is None else rates
    seconds = rates.as_dict()
    return sum(seconds[name] * units for name, units in work(plan, operator, tokens).items())
