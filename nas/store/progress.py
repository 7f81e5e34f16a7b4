"""What the worker of a search keeps in memory of its trials, read once when it begins."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sqlalchemy import select

from nas.designs.design import as_design
from nas.planning.runs import RunPlan
from nas.records.trial import StoredPoint, Trial
from nas.store import rows
from nas.store.engine import reading
from nas.store.schema import PointRow, TrialRow
from nas.store.searches import Store

#: Train FLOPs, loss, its standard error and seconds of an evaluation; a record of each would take
#: as long as reading them.
Told = tuple[float, float, float, float]
#: Columns of a trial that are copied as they are.
_COPIED = (
    "id", "number", "kind", "state", "seed", "key", "model", "steps", "train_flops_per_step",
    "until_step", "trained_steps", "loss", "failure", "reused_from", "confirms", "params",
    "sampler_state",
)  # fmt: skip
#: Columns of its plan besides, which is built only where somebody asks for it.
_OF_PLAN = (
    "theta", "design", "width", "depth", "forward_flops_per_token", "model_params", "structures",
    "dense",
)  # fmt: skip


@dataclass(kw_only=True)
class TrialProgress:
    """A trial as its worker sees it; fields as of `nas.records.trial.Trial`."""

    id: int
    number: int
    kind: str
    state: str
    seed: int
    key: str
    model: str | None
    steps: int
    train_flops_per_step: int
    until_step: int | None
    trained_steps: int
    loss: float | None
    failure: str | None
    reused_from: int | None
    confirms: int | None
    params: Mapping[str, float | str] | None
    sampler_state: Mapping[str, Any]
    #: by step
    points: dict[int, Told] = field(default_factory=dict)
    #: what the plan is built from
    planned: Mapping[str, Any] = field(repr=False)

    @cached_property
    def plan(self) -> RunPlan:
        """The run; one that was paused and has ended there is no longer than it was trained."""
        of = self.planned
        return RunPlan(
            design=as_design(of["design"]),
            width=of["width"],
            depth=of["depth"],
            steps=of["steps"],
            train_flops_per_step=self.train_flops_per_step,
            forward_flops_per_token=of["forward_flops_per_token"],
            params=of["params"],
            structures=tuple(of["structures"]),
            dense=of["dense"],
        )

    @classmethod
    def of(cls, trial: Trial) -> TrialProgress:
        """That of a trial that was just stored or changed, without points."""
        copied = {name: getattr(trial, name) for name in _COPIED if name != "params"}
        names = ("design", "width", "depth", "steps", "forward_flops_per_token", "params",
                 "structures", "dense")  # fmt: skip
        planned = {name: getattr(trial, name) for name in names}
        return cls(**copied, params=trial.sampler_params, planned=planned)


def read_progress(store: Store, search_id: str) -> list[TrialProgress]:
    """Every trial of a search in the order of their numbers, without points."""
    columns = [getattr(TrialRow, name) for name in (*_COPIED, *_OF_PLAN)]
    query = select(*columns).where(TrialRow.search_id == search_id).order_by(TrialRow.number)
    count = len(_COPIED)
    found = []
    with reading(store.engine) as session:
        for row in session.execute(query):
            copied = dict(zip(_COPIED, row[:count], strict=True))
            of = dict(zip(_OF_PLAN, row[count:], strict=True))
            of |= {"steps": copied["steps"], "params": of["model_params"]}
            # of exponents that suffice no text is made, which would only be read again
            of["design"] = of["design"] or of["theta"]
            found.append(TrialProgress(**copied, planned=of))
    return found


def told(point: StoredPoint) -> Told:
    """What is kept of a point."""
    return (point.train_flops, point.loss, point.loss_stderr, point.train_seconds)


def read_points(store: Store, search_id: str) -> dict[int, dict[int, Told]]:
    """Trial id → step → point, of every trial of a search but its confirmations."""
    query = (
        select(PointRow.trial_id, *rows.POINT)
        .join(TrialRow, PointRow.trial_id == TrialRow.id)
        .where(TrialRow.search_id == search_id, TrialRow.kind != "confirmation")
        .order_by(PointRow.trial_id, PointRow.step)
    )
    found: dict[int, dict[int, Told]] = defaultdict(dict)
    with reading(store.engine) as session:
        for trial_id, step, flops, loss, stderr, seconds in session.execute(query).all():
            found[trial_id][step] = (flops, loss, stderr, seconds)
    return found
