"""Exact FLOPs and parameters of whole models and runs, and the inverse: budget → widths and steps.

The one definition of FLOPs in this project: 1 MAC = 2 FLOPs; every matrix product counts
(structured layers with their padding, attention over all pairs of positions, the embedding of
numbers, the output head), and element-wise work and table look-ups do not; training = 3 × forward.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from nas.designs.design import Design, LinearRole, family_of, parse_design, structure_in
from nas.designs.structure import LinearStructure
from nas.designs.theta import DENSE
from nas.errors import InvalidInput
from nas.planning.recipe import Recipe

#: Largest accepted budget, train FLOPs: days on the fastest accelerators, no longer a proxy run.
MAX_TRAIN_FLOPS = 1e20
#: Dense references a search runs at least.
MIN_REFERENCES = 3
#: Training FLOPs over forward FLOPs: the backward pass computes two products for each.
TRAIN_OVER_FORWARD = 3
#: FLOPs of a multiply-accumulate.
FLOPS_PER_MAC = 2


def linears(recipe: Recipe, width: int) -> tuple[LinearRole, ...]:
    """The structured layers of one residual block, in the order they run."""
    hidden, base = recipe.mlp_ratio * width, recipe.base_width
    heads = width // recipe.head_dim if recipe.attends else None
    attention = (
        *(LinearRole(name, width, width, base, heads) for name in ("query", "key", "value")),
        LinearRole("attention_out", width, width, base, heads, "in"),
    )
    return (
        *(attention if recipe.attends else ()),
        LinearRole("mlp_in", width, hidden, base),
        LinearRole("mlp_out", hidden, width, recipe.mlp_ratio * base),
    )


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


@lru_cache(maxsize=16384)
def structures_of(recipe: Recipe, design: Design, width: int) -> tuple[LinearStructure, ...]:
    """The integer structure of each layer of a block."""
    return tuple(structure_in(design, role) for role in linears(recipe, width))


def _unstructured_macs(recipe: Recipe, width: int) -> int:
    """MACs of one sample outside structured layers: attention, embedding of numbers, and head."""
    attention = 2 * recipe.tokens**2 * width if recipe.attends else 0  # logits, weighted values
    embedding = recipe.tokens * recipe.features * width
    head = recipe.predictions * width * recipe.outputs
    return recipe.depth * attention + embedding + head


def forward_flops_per_sample(recipe: Recipe, design: Design, width: int) -> int:
    """Forward FLOPs of the whole model on one sample: a sequence, an image or a row."""
    block = sum(s.macs for s in structures_of(recipe, design, width))
    macs = recipe.depth * recipe.tokens * block + _unstructured_macs(recipe, width)
    return FLOPS_PER_MAC * macs


def train_flops_per_step(recipe: Recipe, design: Design, width: int) -> int:
    """Training FLOPs of the whole model for one step."""
    return TRAIN_OVER_FORWARD * recipe.batch * forward_flops_per_sample(recipe, design, width)


def parameters(recipe: Recipe, design: Design, width: int) -> int:
    """Trainable parameters: layers, gates, gains, biases, layer norms, embeddings and head."""
    norms = 2 if recipe.attends else 1
    block = norms * 2 * width + (2 * 2 * recipe.head_dim if recipe.attends else 0)
    for role, s in zip(linears(recipe, width), structures_of(recipe, design, width), strict=True):
        gained = recipe.normalize and role.name not in ("query", "key")  # their norms have one
        gains = len(s.factors) if gained else 0
        block += s.params + gains + (s.d_out if recipe.bias else 0)
    if recipe.is_token_model:
        embedding = recipe.embedded_tokens * width
    else:
        embedding = (recipe.features + 1) * width
    positions = recipe.tokens * width if recipe.attends else 0
    head = recipe.outputs * width + (0 if recipe.is_token_model else recipe.outputs)
    return recipe.depth * block + embedding + positions + 2 * width + head


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


def _plan(recipe: Recipe, design: Design, width: int, budget: float) -> RunPlan:
    steps = int(budget // train_flops_per_step(recipe, design, width))
    return plan_of_steps(recipe, design, width, steps)


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
        if recipe.min_steps * _least_step(recipe, width) > budget:
            return
        plan = _plan(recipe, fit(recipe, design, width), width, budget)
        if plan.steps >= recipe.min_steps:
            yield plan


def _least_step(recipe: Recipe, width: int) -> int:
    """A lower bound of the FLOPs of a step at this width: the model without structured layers."""
    per_sample = FLOPS_PER_MAC * _unstructured_macs(recipe, width)
    return TRAIN_OVER_FORWARD * recipe.batch * per_sample


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


def plan_at(recipe: Recipe, design: Design, position: float, budget: float) -> RunPlan:
    """The run at `position` ∈ [0, 1] of the logarithmic range of widths that the budget admits."""
    found = plans(recipe, design, budget)
    logs = [math.log(p.width) for p in found]
    target = logs[0] + position * (logs[-1] - logs[0])
    right = bisect.bisect_left(logs, target)
    near = [i for i in (right - 1, right) if 0 <= i < len(logs)]
    return found[min(near, key=lambda i: abs(logs[i] - target))]


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
