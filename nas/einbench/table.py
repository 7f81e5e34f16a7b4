"""EinBench as it is read: curves by design and width, fronts, and what is nearest.

Nothing is interpolated: a design that was not trained at a width is refused, and the error names
the entries that are nearest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.designs.aligned import Aligned
from nas.designs.design import Design, as_design, parse_design
from nas.designs.mixture import Mixture
from nas.designs.theta import DENSE
from nas.einbench.files import Curve, read_about, read_curves
from nas.errors import EinsumNasError, InvalidInput
from nas.planning.cost import structures_of
from nas.planning.recipe import Recipe, stored_recipe
from nas.planning.runs import RunPlan, fit, plan_of_steps

if TYPE_CHECKING:
    import pandas as pd

_SUFFIX = ".parquet"
#: Folder of the files that come with the package.
PACKAGED = Path(str(files("nas.einbench"))) / "data"
#: Nearest entries that a refusal names.
_NAMED = 3


@dataclass(frozen=True, slots=True)
class Neighbour:
    """An entry, and how far its design is from one that was asked for; see `EinBench.nearest`."""

    curve: Curve
    distance: float

    def __str__(self) -> str:
        c = self.curve
        named = c.design if c.name == c.family == "einsum" else c.name
        return f"{named} at width {c.width} (distance {self.distance:.3g})"


@dataclass(frozen=True, slots=True)
class BenchPoint:
    """An evaluation of an entry."""

    curve: Curve
    step: int
    #: exact, of one run
    train_flops: int
    #: of one seed, or the mean over the seeds
    loss: float


class EinBench:
    """The learning curves of one task.

    Parameters
    ----------
    task
        regression | text | images, as far as the folder holds them.
    path
        Folder of the Parquet files; by default those that came with the package.

    Raises
    ------
    InvalidInput
        A task that the folder does not hold, or a file that is not of EinBench.
    """

    def __init__(self, task: str = "regression", path: str | Path | None = None) -> None:
        self._folder = PACKAGED if path is None else Path(path)
        if task not in self.tasks:
            raise InvalidInput("task", task, " | ".join(self.tasks) or f"none in {self._folder}")
        self.task = task
        self._file = self._folder / f"{task}{_SUFFIX}"
        #: what the file says of itself: provenance, versions, licence
        self.about: dict[str, Any] = read_about(self._file)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that the folder holds."""
        return tuple(sorted(p.stem for p in self._folder.glob(f"*{_SUFFIX}")))

    @cached_property
    def recipe(self) -> Recipe:
        """How every model was trained."""
        return stored_recipe(self.about["recipe"])

    @property
    def budget(self) -> float:
        """Train FLOPs that no run exceeds, and that one more step of any would."""
        return float(self.about["train_flops"])

    @cached_property
    def entries(self) -> tuple[Curve, ...]:
        """Every curve."""
        return tuple(read_curves(self._file))

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """The widths at which designs were trained; dense was at more, see `dense_widths`."""
        return tuple(sorted({c.width for c in self.entries if not c.dense}))

    @cached_property
    def dense_widths(self) -> tuple[int, ...]:
        """The widths at which the dense model was trained."""
        return tuple(sorted(c.width for c in self.entries if c.dense))

    def curve(self, design: Design | str, width: int) -> Curve:
        """The entry of a design at a width, found by the integers of its layers there.

        So ``monarch``, its seven exponents, and others that round to the same axes are one.

        Raises
        ------
        InvalidInput
            The width, or the design at that width, was not trained; the error names the nearest.
        """
        wanted = as_design(design)
        self._check_width(width)
        found = self._held.get((width, self._structures(wanted, width)))
        if found is None:
            near = "; ".join(map(str, self.nearest(wanted, width)))
            accepted = f"one of the {len(self.entries)} entries of EinBench {self.task}"
            accepted += f", of which the nearest are {near}" if near else ", none of this family"
            raise InvalidInput("design", f"{design} at width {width}", accepted)
        return found

    def nearest(self, design: Design | str, width: int, count: int = _NAMED) -> list[Neighbour]:
        """The entries that are nearest to a design at a width, the nearest first.

        The distance of two designs of one family is the Euclidean distance of their exponents in
        canonical form, each as it was fitted to its width, plus |log₂ of the ratio of the widths|,
        and of mixtures those of the numbers of experts, of active experts, of shared ones plus 1,
        and of granularities.  Designs of other families, and ones that are aligned with heads and
        ones that are not, have none: they are left out.
        """
        own = _Place.of(fit(self.recipe, as_design(design), width), width)
        found = [
            Neighbour(curve, place.distance(own))
            for curve, place in self._places
            if place.kind == own.kind
        ]
        return sorted(found, key=lambda n: (n.distance, n.curve.design, n.curve.width))[:count]

    def dense(self, width: int) -> Curve:
        """The dense model of a width, one of `dense_widths`."""
        return self.curve(DENSE, width)

    def plan(self, curve: Curve) -> RunPlan:
        """The run of an entry, as searches plan it."""
        return plan_of_steps(
            self.recipe, parse_design(curve.design), curve.width, int(curve.steps[-1])
        )

    def points(self, seed_index: int | None = None) -> Iterator[BenchPoint]:
        """Every evaluation: of one seed, by its place, or the means over the seeds."""
        for curve in self.entries:
            each = zip(curve.steps, curve.train_flops, curve.losses(seed_index), strict=True)
            for step, flops, loss in each:
                yield BenchPoint(curve, int(step), int(flops), float(loss))

    def front(self, seed_index: int | None = None) -> tuple[BenchPoint, ...]:
        """The points that no other beats in train FLOPs and loss, in the order of FLOPs."""
        front: list[BenchPoint] = []
        for point in sorted(self.points(seed_index), key=lambda p: (p.train_flops, p.loss)):
            if not front or point.loss < front[-1].loss:
                front.append(point)
        return tuple(front)

    def best(self, train_flops: float, seed_index: int | None = None) -> BenchPoint:
        """The point of the least loss within a budget.

        Raises
        ------
        InvalidInput
            A budget below that of every point.
        """
        front = self.front(seed_index)
        within = [point for point in front if point.train_flops <= train_flops]
        if not within:
            raise InvalidInput("train_flops", train_flops, f"at least {front[0].train_flops:.4g}")
        return within[-1]

    def as_pandas(self) -> pd.DataFrame:
        """A row an evaluation of a run: entry, seed, step, FLOPs, loss and seconds.

        Raises
        ------
        EinsumNasError
            pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise EinsumNasError("as_pandas() needs pandas: pip install pandas") from None
        return pd.DataFrame(
            {
                "design": c.design, "name": c.name, "family": c.family, "width": c.width,
                "params": c.params, "seed": int(seed), "step": int(step),
                "train_flops": int(flops), "loss": float(c.loss[i, j]),
                "loss_stderr": float(c.loss_stderr[i, j]), "seconds": float(c.seconds[i, j]),
            }
            for c in self.entries
            for i, seed in enumerate(c.seeds)
            for j, (step, flops) in enumerate(zip(c.steps, c.train_flops, strict=True))
        )  # fmt: skip

    def _check_width(self, width: int) -> None:
        if width not in self.widths and width not in self.dense_widths:
            widths, dense = (", ".join(map(str, w)) for w in (self.widths, self.dense_widths))
            raise InvalidInput("width", width, f"{widths}; dense also {dense}")

    def _structures(self, design: Design, width: int) -> tuple[str, ...]:
        fitted = fit(self.recipe, design, width)
        return tuple(s.fingerprint for s in structures_of(self.recipe, fitted, width))

    @cached_property
    def _held(self) -> dict[tuple[int, tuple[str, ...]], Curve]:
        return {(c.width, c.structures): c for c in self.entries}

    @cached_property
    def _places(self) -> list[tuple[Curve, _Place]]:
        return [(c, _Place.of(parse_design(c.design), c.width)) for c in self.entries]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a design stands among those of its kind."""

    #: designs of different kinds have no distance
    kind: tuple[object, ...]
    exponents: tuple[float, ...]
    #: base 2: of the width and, of a mixture, of its numbers of experts (1 more than are shared)
    #: and its granularity
    logs: tuple[float, ...]

    @classmethod
    def of(cls, design: Design, width: int) -> _Place:
        canonical = design.canonical()
        inner = canonical.of if isinstance(canonical, Aligned) else canonical
        sizes = []
        if isinstance(inner, Mixture):
            sizes = [inner.experts, inner.active, 1 + inner.shared, inner.granularity]
        kind = (type(canonical), canonical.family, len(canonical.exponents))
        logs = tuple(math.log2(size) for size in (width, *sizes))
        return cls(kind, tuple(canonical.exponents), logs)

    def distance(self, other: _Place) -> float:
        apart = sum(abs(a - b) for a, b in zip(self.logs, other.logs, strict=True))
        return math.dist(self.exponents, other.exponents) + apart
