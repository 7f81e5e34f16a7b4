"""Conversion of rows to records, and the writes that several modules share."""

from __future__ import annotations

import hashlib
import json
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Row, select
from sqlalchemy.orm import Session

from nas.designs.design import Design, family_of
from nas.designs.theta import Theta
from nas.planning.request import SearchRequest
from nas.planning.runs import RunPlan
from nas.records.base import Record
from nas.records.device import device_of, trained_together
from nas.records.run import NOT_STORED, OF_TRIAL, CurvePoint, Run
from nas.records.search import Search
from nas.records.trial import StoredPoint, Trial
from nas.store.records import Event
from nas.store.schema import (
    DeliveryRow,
    EventRow,
    PointRow,
    SearchRow,
    TrialRow,
    WebhookRow,
    database_now,
)

R = TypeVar("R", bound=Record)
#: Events of searches that webhooks can be told of.
TOLD = ("queued", "paused", "resumed", "retried", "succeeded", "failed", "cancelled")
#: The tally's name for planned dense references, next to the states of trials.
REFERENCES = "references"


def now(session: Session) -> float:
    """The database's clock."""
    return float(session.execute(select(database_now())).scalar_one())


def add_event(session: Session, search_id: str, kind: str, data: Mapping[str, Any]) -> None:
    """Append to the search's log, in the caller's transaction, and note who is to be told."""
    at = now(session)
    session.add(EventRow(search_id=search_id, created_at=at, kind=kind, data=dict(data)))
    if kind in TOLD:
        _tell(session, search_id, kind, data, at)


def _tell(session: Session, search_id: str, kind: str, data: Mapping[str, Any], at: float) -> None:
    """Note a delivery for each webhook of the search's tenant that wants this event."""
    search = session.get_one(SearchRow, search_id)
    # locked, or one that is removed meanwhile would take this transaction with it
    mine = select(WebhookRow).where(WebhookRow.tenant == search.tenant)
    hooks = session.scalars(mine.with_for_update(read=True, key_share=True))
    for hook in hooks:
        if kind not in hook.events:
            continue
        body = {
            "type": f"search.{kind}",
            "timestamp": datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds"),
            "data": {
                "search_id": search_id, "task": search.task, "name": search.name,
                "tenant": search.tenant, **data,
            },
        }  # fmt: skip
        session.add(DeliveryRow(webhook_id=hook.id, body=body, attempts=0, due_at=at))


def _read(record: type[R], row: Any, **special: Any) -> R:
    """A record of a row's values of the same names, but for those of `special`."""
    names = record.model_fields.keys() - special.keys()
    return record(**{name: getattr(row, name) for name in names}, **special)


def to_search(row: SearchRow | Row[Any]) -> Search:
    counts, request = dict(row.tally), SearchRequest(**row.request)
    references = counts.pop(REFERENCES, 0)
    total: int | None = request.trials * request.replicates
    if request.stopping_rule != "none":
        total = None
    elif request.confirm is None:
        total = references + total if references else None
    return _read(
        Search, row, request=request, trial_counts=counts, references=references, runs_total=total
    )


def to_trial(row: TrialRow | Row[Any]) -> Trial:
    return _read(
        Trial, row, design=_design(row), train_flops=row.steps * row.train_flops_per_step,
        trained_flops=row.trained_steps * row.train_flops_per_step,
        **{field: getattr(row, column) for field, column in _COLUMN.items()},
    )  # fmt: skip


def _design(row: TrialRow | Row[Any]) -> str:
    """The design's text, which for two factors is not stored."""
    return design_text(row.design, row.theta)


def design_text(stored: str | None, theta: Sequence[float]) -> str:
    """The text of a design from what is stored of it; see `stored_design`."""
    return Theta(*theta).text if stored is None else stored


#: Field of a trial → its column, where their names differ.
_COLUMN = {"params": "model_params", "sampler_params": "params"}


def column_of(field: str) -> str:
    """The column of trials that a field of a run is read from."""
    of_trial = OF_TRIAL.get(field, field)
    return _COLUMN.get(of_trial, of_trial)


#: What `to_run` and `to_curve_points` read; of a point in the order of a `StoredPoint`.
RUN: Sequence[ColumnElement[Any]] = [
    getattr(TrialRow, column_of(field)).label(field)
    for field in Run.model_fields
    if field not in NOT_STORED
]
POINT: Sequence[Any] = [
    PointRow.step, PointRow.train_flops, PointRow.loss, PointRow.loss_stderr, PointRow.seconds
]  # fmt: skip
COMPLETE: ColumnElement[bool] = (TrialRow.state == "complete").label("complete")


def to_run(
    row: Row[Any],
    points: Sequence[StoredPoint] = (),
    *,
    complete: bool = True,
    environment: Mapping[str, Any] | None = None,
) -> Run:
    """A run from a row of the columns `RUN`."""
    return _read(
        Run, row, design=_design(row), model=row.model or str(row.trial_id), points=points,
        complete=complete, device=device_of(environment), together=trained_together(environment),
    )  # fmt: skip


def to_curve_points(found: Iterable[Row[Any]]) -> Iterator[CurvePoint]:
    """Points from rows of the columns `RUN`, `POINT` and `COMPLETE`, in this order."""
    runs: dict[int, Run] = {}
    for row in found:
        run = runs.get(row.trial_id)
        if run is None:
            run = runs[row.trial_id] = to_run(row, complete=row.complete)
        yield CurvePoint(*row[len(RUN) : len(RUN) + len(POINT)], run=run)


def stored_design(design: Design) -> str | None:
    """The text of a design to store; None where the stored exponents say what it is."""
    return None if family_of(design).exponents_suffice else design.text


def model_digest(task: str, plan: RunPlan) -> str:
    """Digest of a model: equal for runs that differ only in steps and seed.

    Parameters
    ----------
    task
        Identifies data and recipe.
    """
    return digest_of_model(task, plan.depth, plan.width, plan.structures)


def digest_of_model(task: str, depth: int, width: int, structures: Sequence[str]) -> str:
    """`model_digest` of stored values."""
    decides = json.dumps([task, depth, width, list(structures)])
    return hashlib.sha256(decides.encode()).hexdigest()


def to_point(row: PointRow) -> StoredPoint:
    return StoredPoint(
        row.step, row.train_flops, row.loss, row.loss_stderr, row.seconds,
        unpack_floats(row.window_losses),
    )  # fmt: skip


def to_event(row: EventRow) -> Event:
    return Event(row.id, row.search_id, row.created_at, row.kind, row.data)


def pack_floats(values: Iterable[float]) -> bytes:
    """Little-endian float32."""
    listed = list(values)
    return struct.pack(f"<{len(listed)}f", *listed)


def unpack_floats(packed: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(packed) // 4}f", packed)


def count(row: SearchRow, **changes: int) -> None:
    """Add to the counts of a search whose row the caller holds."""
    # assign a new object: SQLAlchemy does not notice changes within a JSON value
    tally = Counter(row.tally)
    tally.update(changes)
    row.tally = {name: n for name, n in sorted(tally.items()) if n}
