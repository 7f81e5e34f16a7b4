"""The runs that a budget admits: from train FLOPs to widths and steps, before a tensor exists."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from nas.designs.design import Design, family_of, parse_design
from nas.designs.theta import DENSE
from nas.errors import InvalidInput
from nas.planning.cost import (
    forward_flops_per_sample,
    least_train_flops_per_step,
    parameters,
    structures_of,
    train_flops_per_step,
)
from nas.planning.recipe import Recipe

#: Largest accepted budget, train FLOPs: days on the fastest accelerators, no longer a proxy run.
MAX_TRAIN_FLOPS = 1e20
#: Dense references a search runs at least.
MIN_REFERENCES = 3


@dataclass(frozen=True, slots=True)
class RunPlan:
    """One proxy run, decided in integers before a tensor exists."""

    design: Design
    width: int
    depth: int
    steps: int
    #: exact training FLOPs of one step of the whole model
    train_flops_per_step: int
    #: exact forward FLOPs of the whole model on one sample, over its tokens (positions)
    forward_flops_per_token: float
    #: trainable parameters of the whole model
    params: int
    #: fingerprints of the distinct integer structures, in the order of a block's layers
    structures: tuple[str, ...]
    dense: bool

    @property
    def train_flops(self) -> int:
        """Exact training FLOPs of the run."""
        return self.steps * self.train_flops_per_step

    @property
    def name(self) -> str:
        """What the design is called."""
        return self.design.name

    def as_dict(self) -> dict[str, Any]:
        """As JSON values; `from_dict` reads them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        structures = list(self.structures)
        return {**values, "design": self.design.text, "structures": structures}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunPlan:
        """The plan that `as_dict` wrote."""
        design, structures = parse_design(values["design"]), tuple(values["structures"])
        return cls(**{**values, "design": design, "structures": structures})

    @classmethod
    def of(cls, record: Any) -> RunPlan:
        """The plan of a record that has its fields, such as a trial."""
        return cls.from_dict({field.name: getattr(record, field.name) for field in fields(cls)})


def evaluation_steps(plan: RunPlan, recipe: Recipe) -> list[int]:
    """The steps at which a run is evaluated: spaced by √2, the last one included.

    None comes before the warm-up has ended.  Under a cosine schedule it is the last one alone: an
    earlier point has a learning rate that a run of that length would no longer have.
    """
    if recipe.schedule == "cosine":
        return [plan.steps]
    steps = {round(plan.steps / math.sqrt(2) ** i) for i in range(recipe.evaluations)}
    return sorted(s for s in steps if s >= min(max(1, recipe.warmup_steps), plan.steps))


def fit(recipe: Recipe, design: Design, width: int) -> Design:
    """The design nearest to `design` of which no layer costs more than dense at this width.

    Of a mixture that holds for one expert: the experts together express more than a dense layer.
    """
    return family_of(design).fit(design, width, lambda d: structures_of(recipe, d, width))


def plan_of_steps(recipe: Recipe, design: Design, width: int, steps: int) -> RunPlan:
    """The run of a design as it is at a given width for a given number of steps."""
    structures = structures_of(recipe, design, width)
    return RunPlan(
        design=design,
        width=width,
        depth=recipe.depth,
        steps=steps,
        train_flops_per_step=train_flops_per_step(recipe, design, width),
        forward_flops_per_token=forward_flops_per_sample(recipe, design, width) / recipe.tokens,
        params=parameters(recipe, design, width),
        structures=tuple(s.fingerprint for s in structures),
        dense=all(s.is_dense for s in structures),
    )


def admissible(
    recipe: Recipe, design: Design, budget: float, widths: Sequence[int] | None = None
) -> Iterator[RunPlan]:
    """The runs of a design within `budget` train FLOPs, one a width, from narrow to wide.

    Each is as long as the budget allows: its FLOPs are at most the budget, and one more step
    would exceed it.  A width is left out where fewer than `recipe.min_steps` steps fit.  Only
    `widths` are looked at, in their order, if they are given.
    """
    for width in recipe.widths if widths is None else widths:
        # a model costs at least this, whatever the structure: widths past it are hopeless
        if recipe.min_steps * least_train_flops_per_step(recipe, width) > budget:
            return
        fitted = fit(recipe, design, width)
        steps = int(budget // train_flops_per_step(recipe, fitted, width))
        if steps >= recipe.min_steps:
            yield plan_of_steps(recipe, fitted, width, steps)


@lru_cache(maxsize=4096)
def plans(recipe: Recipe, design: Design, budget: float) -> tuple[RunPlan, ...]:
    """`admissible` without the widths that are too narrow for the budget.

    Those are the ones that would run for more than `recipe.max_steps` steps; at least
    `MIN_REFERENCES` of the widest are kept.

    Raises
    ------
    InvalidInput
        The budget admits no width.
    """
    found = tuple(admissible(recipe, design, budget))
    if not found:
        raise InvalidInput("train_flops", budget, accepted_budget(recipe, design))
    wide = tuple(p for p in found if p.steps <= recipe.max_steps)
    return wide if len(wide) >= MIN_REFERENCES else found[-MIN_REFERENCES:]


def given_plan(recipe: Recipe, design: Design, width: int, budget: float) -> RunPlan:
    """The run of a design at one width, as long as the budget allows.

    Raises
    ------
    InvalidInput
        A width that the recipe does not have, or at which the budget admits too few steps.
    """
    if width not in recipe.widths:
        widths = recipe.widths
        every = widths[1] - widths[0]
        accepted = f"multiples of {every} from {widths[0]} to {widths[-1]}"
        raise InvalidInput("width", width, f"{accepted}, the widths of recipe {recipe.name}")
    found = next(admissible(recipe, design, budget, (width,)), None)
    if found is None:
        accepted = f"widths at which {recipe.min_steps} steps of {design.name} cost {budget:.4g}"
        raise InvalidInput("width", width, f"{accepted} train FLOPs or less")
    return found


def _crossing(widths: range, cost: Callable[[int], int], most: float) -> int:
    """How many of the widths, from the narrowest on, cost at most so much.

    By interpolation, as if costs were a power of the width; every third look halves what is left.
    """
    if cost(widths[0]) > most:
        return 0
    if cost(widths[-1]) <= most:
        return len(widths)
    low, high = 0, len(widths) - 1
    looks = 0
    while high - low > 1:
        looks += 1
        below, above = widths[low], widths[high]
        share = math.log(most / cost(below)) / math.log(cost(above) / cost(below))
        place = bisect.bisect_left(widths, below * (above / below) ** share)
        place = (low + high) // 2 if looks % 3 == 0 else place
        place = min(max(place, low + 1), high - 1)
        low, high = (place, high) if cost(widths[place]) <= most else (low, place)
    return high


def plan_at(recipe: Recipe, design: Design, position: float, budget: float) -> RunPlan:
    """The run at `position` ∈ [0, 1] of the logarithmic range of widths that the budget admits.

    Few of the hundreds of widths that `plans` would look at are built to find the ends of the
    range, because a wider model is dearer.

    Raises
    ------
    InvalidInput
        The budget admits no width.
    """
    widths = recipe.widths

    @lru_cache
    def cost(width: int) -> int:
        return train_flops_per_step(recipe, fit(recipe, design, width), width)

    admitted = _crossing(widths, cost, budget / recipe.min_steps)
    if not admitted:
        raise InvalidInput("train_flops", budget, accepted_budget(recipe, design))
    wide = _crossing(widths[:admitted], cost, budget / (recipe.max_steps + 1))
    first = max(0, min(wide, admitted - MIN_REFERENCES))
    logs = math.log(widths[first]), math.log(widths[admitted - 1])
    target = math.exp(logs[0] + position * (logs[1] - logs[0]))
    right = bisect.bisect_left(widths, target, first, admitted)
    near = [i for i in (right - 1, right) if first <= i < admitted]
    at = min(near, key=lambda i: abs(math.log(widths[i] / target)))
    # rounding makes a width now and then cheaper than a narrower one
    found = next(admissible(recipe, design, budget, widths[at : at + 1]), None)
    return found or plans(recipe, design, budget)[-1]


def references(recipe: Recipe, budget: float, count: int) -> tuple[RunPlan, ...]:
    """Dense runs at `count` distinct widths (all there are, if fewer), evenly spread in log."""
    found = plans(recipe, DENSE, budget)
    if count >= len(found):
        return found
    chosen: list[RunPlan] = []
    for i in range(count):
        plan = plan_at(recipe, DENSE, i / (count - 1), budget)
        chosen.append(plan if plan not in chosen else next(p for p in found if p not in chosen))
    return tuple(sorted(chosen, key=lambda p: p.width))


@lru_cache(maxsize=64)
def minimum_train_flops(recipe: Recipe) -> int:
    """The least budget of a search: its three narrowest dense references at the fewest steps."""
    width = recipe.widths[MIN_REFERENCES - 1]
    return recipe.min_steps * train_flops_per_step(recipe, DENSE, width)


def least_budget(recipe: Recipe, design: Design = DENSE) -> int:
    """The least budget of a search whose dearest design is `design`."""
    width = recipe.widths[0]
    own = recipe.min_steps * train_flops_per_step(recipe, fit(recipe, design, width), width)
    return max(own, minimum_train_flops(recipe))


def accepted_budget(recipe: Recipe, design: Design = DENSE) -> str:
    """The budgets of a search whose dearest design is `design`, in words."""
    least, dense = least_budget(recipe, design), minimum_train_flops(recipe)
    width = recipe.widths[MIN_REFERENCES - 1 if least == dense else 0]
    model = "a dense model" if least == dense else f"{design.name}, the dearest that may be"
    return (
        f"train FLOPs from {least:.4g} ({recipe.min_steps} steps of {model} of width {width}) "
        f"to {MAX_TRAIN_FLOPS:.0e}"
    )
