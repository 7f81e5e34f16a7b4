"""Conversion of rows to records, and the writes that several modules share."""

from __future__ import annotations

import hashlib
import json
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Row, select
from sqlalchemy.orm import Session

from nas.designs.design import Design
from nas.designs.theta import Theta
from nas.planning.cost import RunPlan
from nas.planning.request import SearchRequest
from nas.store.records import CurvePoint, Event, Search, StoredPoint, Trial
from nas.store.schema import EventRow, PointRow, SearchRow, TrialRow, database_now

#: The tally's name for planned dense references, next to the states of trials.
REFERENCES = "references"


def now(session: Session) -> float:
    """The database's clock."""
    return float(session.execute(select(database_now())).scalar_one())


def add_event(session: Session, search_id: str, kind: str, data: Mapping[str, Any]) -> None:
    """Append to the search's log, in the caller's transaction."""
    session.add(EventRow(search_id=search_id, created_at=now(session), kind=kind, data=dict(data)))


def to_search(row: SearchRow | Row[Any]) -> Search:
    return Search(
        id=row.id,
        sequence=row.sequence,
        state=row.state,  # type: ignore[arg-type]
        task=row.task,
        task_fingerprint=row.task_fingerprint,
        request=SearchRequest(**row.request),
        data_path=row.data_path,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        cancel_requested=row.cancel_requested,
        error=row.error,
        epoch=row.epoch,
        failures=row.failures,
        worker=row.worker,
        trial_counts={k: n for k, n in row.tally.items() if k != REFERENCES},
        references=row.tally.get(REFERENCES, 0),
        tenant=row.tenant,
        priority=row.priority,
        pause_requested=row.pause_requested,
        failure=row.failure,  # type: ignore[arg-type]
        limit_reached=row.limit_reached,
        stale_writes=row.stale_writes,
        held_seconds=row.held_seconds,
        cloned_from=row.cloned_from,
        charged_flops=row.charged_flops,
        data_root=row.data_root,
    )


def to_trial(row: TrialRow | Row[Any]) -> Trial:
    return Trial(
        id=row.id,
        search_id=row.search_id,
        number=row.number,
        kind=row.kind,
        state=row.state,  # type: ignore[arg-type]
        params=row.params,
        sampler_state=row.sampler_state,
        unseen=tuple(row.unseen),
        **read_design(row),
        name=row.name,
        structures=tuple(row.structures),
        dense=row.dense,
        width=row.width,
        depth=row.depth,
        steps=row.steps,
        train_flops_per_step=row.train_flops_per_step,
        train_flops=row.steps * row.train_flops_per_step,
        forward_flops_per_token=row.forward_flops_per_token,
        model_params=row.model_params,
        seed=row.seed,
        key=row.key,
        reused_from=row.reused_from,
        attempts=row.attempts,
        environment=row.environment,
        loss=row.loss,
        error=row.error,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        model=row.model,
        confirms=row.confirms,
        seconds_per_step=row.seconds_per_step,
        peak_memory_bytes=row.peak_memory_bytes,
        failure=row.failure,  # type: ignore[arg-type]
    )


def read_design(row: Row[Any] | TrialRow) -> dict[str, Any]:
    """The fields `theta` and `design` of a row that has both columns."""
    theta = tuple(row.theta)
    return {
        "theta": theta,
        "design": Theta(*theta).text if row.design is None else row.design,
    }


def to_curve_point(row: Row[Any], *, complete: bool) -> CurvePoint:
    """A curve point from a row of its other fields by name."""
    return CurvePoint(**{**row._mapping, **read_design(row), "complete": complete})


def stored_design(design: Design) -> str | None:
    """The text of a design to store; None for two factors, which the stored exponents determine."""
    return None if isinstance(design, Theta) else design.text


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
