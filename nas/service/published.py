"""The best structure within a budget by EinBench, for tasks on which nothing has been measured yet.

The table comes with the package: its runs are of one recipe at one scale, made on one machine.  So
they are never mixed with the runs of a service, which have another fingerprint; they answer alone,
by the same analysis, and the answer says what it rests on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count

import numpy as np
from numpy.typing import NDArray

from nas.analysis import Answer as BestFound
from nas.analysis import best_for_budget
from nas.designs.design import parse_design
from nas.einbench import Curve, EinBench
from nas.errors import InvalidInput, NotFound
from nas.planning.recipe import RECIPES
from nas.records.answers import PublishedTable
from nas.store import AXES, Run, StoredPoint
from nas.store.fronts import KEPT_MODELS

#: Stands for the search of a run that no search of this service has made.
TABLE = "einbench"


@dataclass(frozen=True, slots=True)
class Published:
    """What a table says of a budget."""

    found: BestFound
    bench: EinBench
    about: PublishedTable
    #: of all its entries
    runs: int
    points: int


@lru_cache(maxsize=8)
def table_of(task: str) -> EinBench | None:
    """EinBench's table of a task; None where it has none."""
    try:
        return EinBench(task)
    except InvalidInput:
        return None


@lru_cache(maxsize=256)
def best_published(bench: EinBench, axis: str, budget: float) -> Published:
    """The best structure within a budget; beyond all of the table's, within its greatest.

    Parameters
    ----------
    axis
        One of `nas.store.AXES`.
    budget
        In the unit of `axis`.

    Raises
    ------
    NotFound
        A budget below the least of the table, or an axis that it has no values of.
    """
    of_axis = [values for c in bench.entries if (values := _values(c, axis)) is not None]
    if not of_axis:
        raise NotFound(f"EinBench {bench.task} has no {axis}")
    least = min(float(v.min()) for v in of_axis)
    greatest = max(float(v.max()) for v in of_axis)
    if axis == "train_flops":
        greatest = max(greatest, bench.budget)  # a run ends less than a step below its budget
    if budget < least:
        raise NotFound(f"the least of EinBench {bench.task} is {axis}={least:.6g}")
    read_at = min(budget, greatest)
    runs = [r for c in _near(bench.entries, axis, read_at) for r in runs_of(bench, c)]
    found = best_for_budget(runs, read_at, lambda keys: [() for _ in keys], axis)
    return Published(
        found,
        bench,
        _about(bench, axis, read_at, (least, greatest)),
        runs=sum(len(c.seeds) for c in bench.entries),
        points=sum(c.loss.size for c in bench.entries),
    )


def _values(curve: Curve, axis: str) -> NDArray[np.float64] | None:
    """What a curve has of an axis, at each evaluation (n,) or at its end (1,)."""
    if axis == "train_flops":
        return curve.train_flops.astype(float)
    if axis == "train_seconds":
        mean: NDArray[np.float64] = curve.seconds.mean(axis=0)
        return mean
    name = {"inference_flops": "forward_flops_per_token", "step_seconds": "seconds_per_step",
            "peak_memory": "peak_memory_bytes"}.get(axis, axis)  # fmt: skip
    value = getattr(curve, name)
    return None if value is None else np.array([float(value)])


def _near(entries: Sequence[Curve], axis: str, budget: float) -> list[Curve]:
    """The entries that the best is compared with: the structured and the dense ones that are lowest
    within the budget, as many as answers about a service's own runs compare."""
    near: list[Curve] = []
    for dense in (False, True):
        lowest: list[tuple[float, int]] = []
        for place, curve in enumerate(entries):
            values = _values(curve, axis)
            if curve.dense is dense and values is not None and values.min() <= budget:
                losses = curve.mean_loss[-len(values) :]
                lowest.append((float(losses[values <= budget].min()), place))
        near += [entries[place] for _, place in sorted(lowest)[:KEPT_MODELS]]
    return near


def runs_of(bench: EinBench, curve: Curve) -> Iterator[Run]:
    """The runs of an entry, one a seed, with ids that no trial of a service has."""
    place = bench.entries.index(curve)
    design = parse_design(curve.design)
    for i, number in zip(range(len(curve.seeds)), count(place * len(curve.seeds)), strict=False):
        columns = (curve.steps, curve.train_flops, curve.loss[i], curve.loss_stderr[i],
                   curve.seconds[i])  # fmt: skip
        points = zip(*(c.tolist() for c in columns), strict=True)
        yield Run(
            search_id=TABLE, trial_id=-1 - number, number=number,
            kind="reference" if curve.dense else "candidate", name=curve.name,
            theta=list(design.exponents), design=curve.design, width=curve.width,
            inference_flops=curve.forward_flops_per_token, params=curve.params,
            step_seconds=curve.seconds_per_step, peak_memory=curve.peak_memory_bytes,
            dense=curve.dense, model=f"{curve.width} {curve.structures}",
            depth=bench.recipe.depth, steps=int(curve.steps[-1]), seed=int(curve.seeds[i]),
            train_flops_per_step=curve.train_flops_per_step,
            points=tuple(StoredPoint(step, float(flops), *rest) for step, flops, *rest in points),
            device=curve.device,
        )  # fmt: skip


def _about(
    bench: EinBench, axis: str, read_at: float, budgets: tuple[float, float]
) -> PublishedTable:
    settings = bench.recipe.as_dict()
    named = RECIPES[bench.recipe.name].as_dict()
    changed = {name: value for name, value in settings.items() if named.get(name) != value}
    devices = sorted({c.device for c in bench.entries if c.device is not None})
    return PublishedTable(
        name=f"EinBench {bench.task}",
        version=str(bench.about.get("einsum_nas", "")),
        date=str(bench.about.get("date", "")),
        recipe=bench.recipe.name,
        settings=changed,
        fingerprint=str(bench.about["task_fingerprint"]),
        machine=" | ".join(devices) or str(bench.about.get("processor", "")),
        entries=len(bench.entries),
        widths=list(bench.widths),
        dense_widths=list(bench.dense_widths),
        seeds=sorted({int(s) for c in bench.entries for s in c.seeds}),
        budgets=budgets,
        read_at=read_at,
        axis_unit=AXES[axis].unit,
    )
