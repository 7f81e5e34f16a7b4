"""Execution plans of mixtures of experts: which of the exact ways to compute one is run.

A `MixturePlan` is to a mixture what a `Plan` is to a single layer: chosen by a cost model, read,
stored as text, and fixed.  No plan depends on the loads of the experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch.nn import functional

from nas.designs.einsum import Sizes
from nas.designs.mixture import MixtureStructure
from nas.errors import InvalidInput
from nas.layers.kernels.plan import (
    Operator,
    Plan,
    Sized,
    bucket,
    candidates,
    check_tile,
    cost,
    parse_tile,
    rates_for,
    tile_of,
)
from nas.rates import MachineRates

#: How the experts are taken together; see `MixturePlan`.
Grouping = Literal["experts", "batched", "grouped", "matrices", "all"]


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
        check_tile(self.tile)
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
            tile = parse_tile(rest.pop().removeprefix("tile="))
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


# What mixtures do besides what `kernels.work` counts, fitted to widths 16 to 1024.
_DISPATCH_OPERATIONS = 16  # sorting, counting, index arithmetic, forward and backward
_EXPERT_OPERATIONS = 4  # slicing for one expert
_PADDING = 2.5  # the largest load over the mean while gates learn; a guess that no load may change
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
    return choose_for_sizes(
        structure.expert, structure.experts, structure.active, bucket(tokens),
        torch.device(device).type, dtype, False, shared=structure.shared > 0,
    )  # fmt: skip


def mixture_plans(
    structure: MixtureStructure, tokens: int, device: torch.device, dtype: torch.dtype
) -> list[MixturePlan]:
    """One plan of each grouping that is worth measuring, the chosen one first."""
    expert = structure.expert
    tile = tile_of(_all_sizes(expert, structure.experts), device, dtype)
    found = [
        choose_mixture_plan(structure, tokens, device, dtype),
        MixturePlan("experts"),
        MixturePlan("batched"),
        MixturePlan("grouped" if expert.is_dense else "matrices"),
        MixturePlan("all", 0 if 2 * tile >= tokens else tile),
    ]
    return list({plan.grouping: plan for plan in reversed(found)}.values())[::-1]


def choose_for_sizes(
    expert: Operator,
    experts: int,
    active: int,
    tokens: int,
    device: str,
    dtype: torch.dtype,
    sorted_rows: bool,
    apart: bool = False,
    shared: bool = False,
) -> MixturePlan:
    """The same from what decides: `tokens` is a `bucket`, `sorted_rows` whether x or y has such.

    Where experts are those of several models and have to be kept `apart`, no plan multiplies the
    numbers of one with zero weights of another, which would pass on what is not finite.  Where
    some are `shared`, used by every token, none is padded to their load, which is E/k of the mean.
    """
    rates = rates_for(device)
    return _choose(
        expert, experts, active, tokens, device, dtype, sorted_rows, apart, shared, rates
    )


@lru_cache(maxsize=65536)
def _choose(
    expert: Operator,
    experts: int,
    active: int,
    tokens: int,
    device: str,
    dtype: torch.dtype,
    sorted_rows: bool,
    apart: bool,
    shared: bool,
    rates: MachineRates,
) -> MixturePlan:
    kind = torch.device(device)
    rows = tokens * active
    mean = max(1, -(-rows // experts))
    plans = candidates(expert, mean, kind, dtype)
    best = min(plans, key=lambda plan: cost(plan, expert, mean, rates))
    one_by_one = MixturePlan("experts", plan=best)
    tile = tile_of(_all_sizes(expert, experts), kind, dtype)
    everything = MixturePlan("all", 0 if 2 * tile >= tokens else tile)
    if device != "cpu":
        if not (sorted_rows or apart) and experts * _expert_macs(expert) * tokens < 1 << 28:
            return everything  # so small that launches decide
        half = dtype in (torch.bfloat16, torch.float16)
        grouped = apart or shared or (half and has_grouped_mm())
        return MixturePlan("grouped" if grouped else "batched")
    # rows of x and y gathered, scattered and combined
    dispatch = _DISPATCH_OPERATIONS * rates.operation
    dispatch += rows * 3 * (expert.d_in + expert.d_out) * rates.moved
    each = _EXPERT_OPERATIONS * rates.operation + cost(best, expert, mean, rates)
    padded = math.ceil(mean * _PADDING)
    found = {one_by_one: dispatch + experts * each}
    if not (apart or shared):
        together = _batched_cost(expert, experts, padded, dtype, rates)
        found[MixturePlan("batched")] = dispatch + together
    by_matrix = MixturePlan("grouped" if expert.is_dense else "matrices")
    found[by_matrix] = dispatch + _matrices_cost(expert, experts, rows, rates)
    if not (sorted_rows or apart):
        found[everything] = _all_cost(expert, experts, tokens, everything.tile, rates)
    return min(found, key=lambda plan: found[plan])


def _expert_macs(expert: Operator) -> int:
    """Multiply-accumulates per token of one expert, A first."""
    return expert.d_in * expert.d_out if expert.is_dense else expert.sizes.macs_a_first


def _all_sizes(expert: Operator, experts: int) -> Sizes:
    """All experts as one operator."""
    s = expert.sizes
    if expert.is_dense:
        return Sizes(expert.d_in, 1, 1, 1, expert.d_out, 1, expert.d_out * experts)
    return Sizes(s.alpha, s.beta, s.gamma, s.delta, s.epsilon, s.phi, s.rho * experts)


def _batched_cost(
    expert: Operator, experts: int, rows: int, dtype: torch.dtype, rates: MachineRates
) -> float:
    """Products over (γ, E) and (φ, E) in one batch each."""
    s = expert.sizes
    # as many blocks as one operator of E times γ and φ has, but each takes only its own expert
    wide = Sizes(s.alpha, s.beta, s.gamma * experts, s.delta, s.epsilon, s.phi * experts, s.rho)
    one = Sized(expert.d_in, expert.d_out, wide)
    if expert.is_dense:
        one = Sized(expert.d_in, expert.d_out, expert.sizes, True)
        seconds = experts * cost(Plan("materialised"), one, rows, rates)
        between = 0
    else:
        seconds = cost(Plan("a-first"), one, rows, rates) / experts
        between = s.beta * s.gamma * s.delta * s.phi * s.rho
    held = experts * rows * (expert.d_in + between + expert.d_out) * dtype.itemsize
    return seconds * (_SPILL if held > _SPILL_BYTES else 1.0)


def _matrices_cost(expert: Operator, experts: int, rows: int, rates: MachineRates) -> float:
    """Three products with the matrices; these built twice, and their gradient taken apart."""
    entries = expert.d_in * expert.d_out
    products = 3 * (rows * entries * rates.blas_mac + experts * rates.blas_product)
    if expert.is_dense:
        return products
    return products + experts * entries * (
        7 * rates.moved + 8 * expert.sizes.rho * rates.batched_mac
    )


def _all_cost(expert: Operator, experts: int, tokens: int, tile: int, rates: MachineRates) -> float:
    """Every expert on every token."""
    if expert.is_dense:
        wide = experts * (expert.d_in + expert.d_out) * tokens
        dense = Sized(expert.d_in, expert.d_out * experts, expert.sizes, True)
        products = cost(Plan("materialised"), dense, tokens, rates)
    else:
        sizes = _all_sizes(expert, experts)
        wide = sizes.beta * sizes.gamma * sizes.delta * sizes.phi * sizes.rho * tokens
        all_of_them = Sized(expert.d_in, expert.d_out, sizes)
        products = cost(Plan("a-first", tile), all_of_them, tokens, rates)
    return products + _GATE_MOVES * wide * rates.moved


def has_grouped_mm() -> bool:
    """Whether this torch has products of ragged groups."""
    return hasattr(functional, "grouped_mm")
