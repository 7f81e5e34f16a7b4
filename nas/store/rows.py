"""Rows to records, and the writes that several modules share."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from nas.request import SearchRequest
from nas.store.records import Event, Search, StoredPoint, Trial
from nas.store.schema import EventRow, PointRow, SearchRow, TrialRow, database_now


def now(session: Session) -> float:
    """The database's clock."""
    return float(session.execute(select(database_now())).scalar_one())


def add_event(session: Session, search_id: str, kind: str, data: Mapping[str, Any]) -> None:
    """Append to the search's log, in the caller's transaction."""
    session.add(EventRow(search_id=search_id, created_at=now(session), kind=kind, data=dict(data)))


def to_search(row: SearchRow, tallies: Mapping[str, Tally]) -> Search:
    tally = tallies.get(row.id, Tally())
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
        trial_counts=dict(tally.states),
        references=tally.references,
    )


def to_trial(row: TrialRow) -> Trial:
    return Trial(
        id=row.id,
        search_id=row.search_id,
        number=row.number,
        kind=row.kind,
        state=row.state,  # type: ignore[arg-type]
        params=row.params,
        sampler_state=row.sampler_state,
        unseen=tuple(row.unseen),
        theta=tuple(row.theta),
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
    )


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


@dataclass
class Tally:
    """Counts of the trials of one search."""

    #: trial state → how many
    states: Counter[str] = field(default_factory=Counter)
    references: int = 0


def tally_trials(session: Session, search_ids: Iterable[str]) -> dict[str, Tally]:
    """Search id → the counts of its trials; a search without any is left out."""
    tallies: dict[str, Tally] = {}
    query = (
        select(TrialRow.search_id, TrialRow.state, TrialRow.kind, func.count())
        .where(TrialRow.search_id.in_(list(search_ids)))
        .group_by(TrialRow.search_id, TrialRow.state, TrialRow.kind)
    )
    for search_id, state, kind, count in session.execute(query):
        tally = tallies.setdefault(search_id, Tally())
        tally.states[state] += count
        tally.references += count if kind == "reference" else 0
    return tallies
