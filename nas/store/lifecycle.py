"""The states of a search and the transitions between them.

    queued → running → succeeded | failed | cancelled
    queued, running ⇄ paused;  running → queued (handed back, lease lost, infrastructure error);
    failed, cancelled, succeeded with failed trials → queued (retried)

Every function works on a row that its caller has locked, in the caller's transaction, so that of
two changes at the same moment the second sees what the first has made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import ColumnElement, func, or_, select, update
from sqlalchemy.orm import Session

from nas import tracing
from nas.errors import Conflict, counted
from nas.records.search import SearchFailure, SearchState
from nas.records.trial import TrialState
from nas.store import rows, traces
from nas.store.quotas import used_flops
from nas.store.records import TERMINAL, UNFINISHED
from nas.store.schema import PointRow, SearchRow, TrialRow

LONGEST_ERROR = 4000
#: Failures of trials that may not occur again on another attempt.
RETRYABLE = ("process", "timeout", "memory")


def end(
    session: Session,
    row: SearchRow,
    state: SearchState,
    error: str | None = None,
    failure: SearchFailure | None = None,
) -> None:
    """End a search; if its cancellation was requested and it did not succeed, it is cancelled."""
    if row.cancel_requested and state != "succeeded":
        state, error, failure = "cancelled", None, None
    at = rows.now(session)
    why = row.limit_reached or f"search {state}"
    session.execute(
        update(TrialRow)
        .where(TrialRow.search_id == row.id, TrialRow.state.in_(UNFINISHED))
        .values(
            state="stopped", error=why, failure="search", finished_at=at, trained_steps=trained()
        )
    )
    unfinished = {name: row.tally.get(name, 0) for name in UNFINISHED}
    changes = {name: -n for name, n in unfinished.items()}
    rows.count(row, **changes, stopped=sum(unfinished.values()))
    _let_go(row, at)
    row.charged_flops = used_flops(session, row.id)
    row.state, row.finished_at, row.pause_requested = state, at, False
    row.error = None if error is None else error[:LONGEST_ERROR]
    row.failure = failure if state == "failed" else None
    data: dict[str, Any] = {} if error is None else {"error": row.error}
    if row.failure is not None:
        data["failure"] = row.failure
    if row.limit_reached is not None:
        data["limit_reached"] = row.limit_reached
    rows.add_event(session, row.id, state, data)
    traces.tell(session, row)


def trained() -> Any:
    """Steps that a trial has trained, to the last evaluation that is stored of it."""
    last = select(func.max(PointRow.step)).where(PointRow.trial_id == TrialRow.id)
    return func.coalesce(last.scalar_subquery(), 0)


def _stop_running(session: Session, row: SearchRow, state: SearchState) -> None:
    """Take a running search from its worker and set it to `state`, queued or paused.

    Its running trials become planned again; paused ones stay so.
    """
    session.execute(
        update(TrialRow)
        .where(TrialRow.search_id == row.id, TrialRow.state == "running")
        .values(state="planned")
    )
    running = row.tally.get("running", 0)
    rows.count(row, running=-running, planned=running)
    _let_go(row, rows.now(session))
    row.state, row.worker = state, None


def set_state(search: SearchRow, trial: TrialRow, state: TrialState) -> None:
    """Set the state of a trial, and the counts of its search."""
    rows.count(search, **{trial.state: -1})
    rows.count(search, **{state: 1})
    trial.state = state


def _let_go(row: SearchRow, at: float) -> None:
    """Add the time that the search was held, up to now or to the end of an expired lease."""
    if row.claimed_at is not None:
        until = at if row.lease_until is None else min(at, row.lease_until)
        row.held_seconds += max(until - row.claimed_at, 0.0)
    row.claimed_at = row.lease_until = None


def count_failure(session: Session, row: SearchRow, error: str, max_attempts: int) -> bool:
    """Count a lost lease or an infrastructure error; return whether the search is queued again.

    It is not if its cancellation or pause was requested, or its attempts are used up.
    """
    row.failures += 1
    if row.failures < max_attempts:
        return take_back(session, row)
    times = counted(
        row.failures, "lost lease or infrastructure error",
        "lost leases or infrastructure errors",
    )  # fmt: skip
    end(session, row, "failed", f"gave up after {times}: {error}", "attempts")
    return False


def take_back(session: Session, row: SearchRow) -> bool:
    """Take a running search from its worker; return whether it is queued again.

    It is not if its cancellation or pause was requested, which then happens.
    """
    if row.cancel_requested:
        end(session, row, "cancelled")
    elif row.pause_requested:
        _pause_now(session, row)
    else:
        _stop_running(session, row, "queued")
    return row.state == "queued"


def _pause_now(session: Session, row: SearchRow) -> None:
    """Pause a search that no worker holds."""
    _stop_running(session, row, "paused")
    row.pause_requested = False
    rows.add_event(session, row.id, "paused", {})


def _refuse_ended(row: SearchRow) -> None:
    if row.state in TERMINAL:
        raise Conflict(f"search {row.id} has ended: {row.state}")


def cancel(session: Session, row: SearchRow) -> None:
    """Cancel a search: at once if no worker holds it, else at its worker's next lease renewal."""
    _refuse_ended(row)
    row.cancel_requested = True
    if _is_held(session, row):
        rows.add_event(session, row.id, "cancel_requested", {})
    else:
        end(session, row, "cancelled")


def pause(session: Session, row: SearchRow) -> None:
    """Pause a search: at once if no worker holds it, else at its worker's next lease renewal."""
    _refuse_ended(row)
    if row.state == "paused":
        return
    if not _is_held(session, row):
        _pause_now(session, row)
    elif not row.pause_requested:
        row.pause_requested = True
        rows.add_event(session, row.id, "pause_requested", {})


def _is_held(session: Session, row: SearchRow) -> bool:
    """Whether a worker runs the search under a lease that has not expired."""
    if row.state != "running":
        return False
    return row.lease_until is None or row.lease_until >= rows.now(session)


def resume(session: Session, row: SearchRow) -> None:
    """Queue a paused search, or withdraw the request to pause a running one."""
    if row.state == "paused":
        row.state = "queued"
    elif row.state == "running" and row.pause_requested:
        row.pause_requested = False
    else:
        raise Conflict(f"search {row.id} is not paused: {row.state}")
    rows.add_event(session, row.id, "resumed", {})


def retry(session: Session, row: SearchRow) -> None:
    """Queue an ended search again, to run the trials that are not complete.

    Those are the trials that were stopped with it, those whose process died or ran out of memory or
    time, and those never proposed.  Runs that failed by themselves are not repeated, because they
    would fail again; a search that has none but these and complete ones is refused.  What ended for
    a reason outside of its runs may end otherwise, even with no run left.
    """
    refusal = why_not_retried(session, row)
    if refusal is not None:
        raise Conflict(refusal)
    owed = list(session.scalars(select(TrialRow).where(_owed(row))))
    for trial in owed:
        # one that had come to the end of its slice has nothing to do until it is to go on
        paused = trial.until_step is not None and trial.trained_steps == trial.until_step
        set_state(row, trial, "paused" if paused else "planned")
        if not paused:
            trial.trained_steps = 0  # its points are dropped when it starts
        trial.error = trial.failure = trial.finished_at = None
    row.state, row.failures, row.not_before = "queued", 0, 0.0
    row.error = row.failure = row.finished_at = None
    row.cancel_requested = False
    retried = {"trials": [t.number for t in owed], **tracing.carrier()}
    rows.add_event(session, row.id, "retried", retried)


def why_not_retried(session: Session, row: SearchRow) -> str | None:
    """Why a search cannot be retried; None if it can."""
    if row.state not in TERMINAL:
        return f"search {row.id} has not ended: {row.state}"
    if row.limit_reached is not None:
        return (
            f"search {row.id} reached its limit: {row.limit_reached}; clone it with another limit"
        )
    owes = session.scalar(select(TrialRow.id).where(_owed(row)).limit(1)) is not None
    if owes or _may_end_otherwise(session, row):
        return None
    return f"search {row.id} owes no run, so there is nothing to retry: {_ended(row)}"


def _may_end_otherwise(session: Session, row: SearchRow) -> bool:
    """Whether an ended search without a trial to repeat could still go on."""
    if row.state == "succeeded":
        return False
    proposed = select(func.count()).where(
        TrialRow.search_id == row.id, TrialRow.kind != "reference"
    )
    planned = row.request["trials"] * row.request.get("replicates", 1)
    if (session.scalar(proposed) or 0) < planned:
        return True
    return row.failure in ("attempts", "input")


def _ended(row: SearchRow) -> str:
    """What became of the trials of an ended search, in words."""
    complete, failed, stopped = (row.tally.get(s, 0) for s in ("complete", "failed", "stopped"))
    parts = [f"{counted(complete, 'trial')} complete"]
    if failed:
        parts.append(f"{failed:,} failed by {'itself' if failed == 1 else 'themselves'}")
    if stopped:
        parts.append(f"{stopped:,} stopped by a rule")
    why = f" ({row.error})" if row.error else ""
    return f"{', '.join(parts)}{why}; `einsum-nas clone` runs it with other settings"


def _owed(row: SearchRow) -> ColumnElement[bool]:
    stopped = (TrialRow.state == "stopped") & or_(
        TrialRow.failure == "search",
        # stopped by an older version, which stored no kind of failure
        TrialRow.failure.is_(None) & TrialRow.error.like("search %"),
    )
    failed = (TrialRow.state == "failed") & TrialRow.failure.in_(RETRYABLE)
    return (TrialRow.search_id == row.id) & or_(stopped, failed)


def set_labels(session: Session, row: SearchRow, labels: Mapping[str, Any]) -> None:
    """Set name, tags, notes or whether it is archived, of a search in any state."""
    for name, value in labels.items():
        setattr(row, name, value)
    rows.add_event(session, row.id, "labels", {"changed": sorted(labels)})


def set_priority(session: Session, row: SearchRow, priority: int) -> None:
    """Set the priority of a search that has not ended."""
    _refuse_ended(row)
    row.priority = priority
    rows.add_event(session, row.id, "priority", {"priority": priority})
