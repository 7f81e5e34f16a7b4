"""A task of EinBench as arrays: the entries that every simulated search chooses among.

Entries are numbered.  Every entry was trained to the budget of its task, and evaluated at *levels*,
which are counted from the end: level L - 1 is the whole run, and each one before it has 1/√2 of its
compute.  Of a run whose warm-up was long the first levels are missing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas.designs.design import Design
from nas.designs.mixture import Mixture
from nas.einbench import Curve, EinBench
from nas.planning.recipe import Recipe
from nas.planning.request import SearchRequest
from nas.planning.runs import RunPlan, fit
from nas.planning.tasks import recipe_of

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Table:
    """The E entries of a task, with S seeds and at most L levels.

    Where an entry was not evaluated at a level, its arrays hold NaN, and `steps` 0.
    """

    bench: EinBench
    #: (E,)
    curves: tuple[Curve, ...]
    plans: tuple[RunPlan, ...]
    #: (E, L) steps up to a level
    steps: NDArray[np.int64]
    #: (E, L) train FLOPs up to a level
    flops: Array
    #: (E, S, L)
    loss: Array
    #: (E, S, L) standard error of the loss over the validation samples
    stderr: Array

    @classmethod
    def of(cls, bench: EinBench) -> Table:
        """The curves at widths at which more than dense layers were trained."""
        curves = tuple(c for c in bench.entries if c.width in bench.widths)
        levels = max(len(c.steps) for c in curves)

        def padded(values: NDArray[Any]) -> Array:
            missing = [*[(0, 0)] * (values.ndim - 1), (levels - values.shape[-1], 0)]
            return np.pad(values.astype(np.float64), missing, constant_values=np.nan)

        steps = np.stack([padded(c.steps) for c in curves])
        return cls(
            bench=bench,
            curves=curves,
            plans=tuple(map(bench.plan, curves)),
            steps=np.nan_to_num(steps, nan=0.0).astype(np.int64),
            flops=np.stack([padded(c.train_flops) for c in curves]),
            loss=np.stack([padded(c.loss) for c in curves]),
            stderr=np.stack([padded(c.loss_stderr) for c in curves]),
        )

    @property
    def task(self) -> str:
        return self.bench.task

    @property
    def recipe(self) -> Recipe:
        return self.bench.recipe

    @property
    def budget(self) -> float:
        """Train FLOPs that no run exceeds."""
        return self.bench.budget

    def __len__(self) -> int:
        return len(self.plans)

    @property
    def seeds(self) -> int:
        return int(self.loss.shape[1])

    @property
    def levels(self) -> int:
        return int(self.loss.shape[2])

    def request(self, **fields: Any) -> SearchRequest:
        """A search of the task, with the table's recipe and the budget of its runs."""
        default = recipe_of(self.task, self.recipe.name).as_dict()
        given = self.recipe.as_dict()
        overrides = {name: value for name, value in given.items() if value != default[name]}
        return SearchRequest.checked(
            {"task": self.task, "recipe": self.recipe.name, "overrides": overrides,
             "train_flops": self.budget, **fields}
        )  # fmt: skip

    @property
    def widths(self) -> tuple[int, ...]:
        return self.bench.widths

    @cached_property
    def whole(self) -> float:
        """Train FLOPs of every entry with one seed."""
        return float(self.flops[:, -1].sum())

    @cached_property
    def first(self) -> NDArray[np.int64]:
        """(E,) the first level at which an entry was evaluated."""
        found: NDArray[np.int64] = np.argmax(self.steps > 0, axis=1)
        return found

    @cached_property
    def truth(self) -> Array:
        """(E, L) the loss over seeds, a geometric mean as in answers."""
        found: Array = np.exp(np.log(self.loss).mean(axis=1))
        return found

    @cached_property
    def best(self) -> int:
        """The entry with the least mean loss at the whole budget."""
        return int(np.argmin(self.truth[:, -1]))

    @cached_property
    def true_front(self) -> tuple[tuple[int, int], ...]:
        """(entry, level) of the least mean loss at each level that is less than at all before."""
        losses = np.where(self.steps > 0, self.truth, np.inf)
        best, lowest, found = np.argmin(losses, axis=0), math.inf, []
        for level, entry in enumerate(best.tolist()):
            if losses[entry, level] < lowest:
                lowest = float(losses[entry, level])
                found.append((entry, level))
        return tuple(found)

    def level_of(self, entry: int, step: int) -> int:
        """The level of an entry's evaluation at a step.

        Raises
        ------
        ValueError
            The entry was not evaluated there.
        """
        found = np.flatnonzero(self.steps[entry] == step)
        if step <= 0 or len(found) == 0:
            known = [int(s) for s in self.steps[entry] if s]
            raise ValueError(f"no evaluation at step {step} of entry {entry}; there are {known}")
        return int(found[0])

    def entry_of(self, plan: RunPlan) -> int:
        """The entry with a plan's width and integer structures.

        Raises
        ------
        KeyError
            There is none.
        """
        return self._by_key[plan.width, plan.structures]

    @cached_property
    def _by_key(self) -> dict[tuple[int, tuple[str, ...]], int]:
        return {(plan.width, plan.structures): i for i, plan in enumerate(self.plans)}


class Snapper:
    """Takes a proposed design and width to an entry.

    The entry has the same width and family (for two factors, chains of a length, each kind of
    mixture), and among these the least Euclidean distance of canonical exponents, after both were
    made no dearer than dense at that width, as every run is.  Mixtures have two more coordinates:
    log2 of their experts and of the active ones.  Of equally near entries the first counts.  Where
    the table has nothing of a family at a width, all families with as many coordinates count.
    """

    def __init__(self, table: Table) -> None:
        self._recipe = table.recipe
        self._known: dict[tuple[str, int], int] = {}
        groups: dict[tuple[str, int], list[int]] = {}
        for entry, plan in enumerate(table.plans):
            groups.setdefault((group_of(plan.design), plan.width), []).append(entry)
        self._groups = {
            key: (np.array(found), np.array([_point(table.plans[e].design) for e in found]))
            for key, found in groups.items()
        }

    def entry(self, design: Design, width: int) -> int:
        """The nearest entry."""
        key = (design.text, width)
        if key not in self._known:
            self._known[key] = self._nearest(fit(self._recipe, design, width), width)
        return self._known[key]

    def _nearest(self, design: Design, width: int) -> int:
        point = _point(design)
        group = self._groups.get((group_of(design), width))
        near = [group] if group else [
            (entries, points) for (_, at), (entries, points) in self._groups.items()
            if at == width and points.shape[1] == len(point)
        ]  # fmt: skip
        entries = np.concatenate([e for e, _ in near])
        points = np.concatenate([p for _, p in near])
        return int(entries[np.argmin(np.linalg.norm(points - point, axis=1))])


def group_of(design: Design) -> str:
    """The designs among which it is snapped: its family, and the number of its factors."""
    return design.canonical().family


def _point(design: Design) -> Array:
    found = design.canonical()
    counts = (
        [math.log2(found.experts), math.log2(found.active)] if isinstance(found, Mixture) else []
    )
    return np.array([*found.exponents, *counts])
