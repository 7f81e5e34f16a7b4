"""Enters completed runs in the standings and counts of their search and task, or all of them anew.

Only completed runs enter, never stopped, failed or running ones.  See `nas.store.scopes` for what
they are counted in, and `nas.store.fronts` for which of their points are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, select, update
from sqlalchemy.orm import Session

from nas.records.device import device_of, is_timed
from nas.store.fronts import AXES, Points, as_points, merge, model_number
from nas.store.schema import BarRow, PointRow, ScopeRow, SearchRow, StandingRow, TrialRow
from nas.store.scopes import device_scope, evidence_in, locked_scope, scopes_of, touch

#: Version of the table's contents, stored as the revision of the scope `*`; raise it to rebuild.
LAYOUT = 2
_LAYOUT_SCOPE = "*"


def enter(session: Session, search: SearchRow, trial: TrialRow) -> None:
    """Add a run that has just completed, in the transaction that completes it."""
    _add(session, search, TrialRow.id == trial.id)
    confirmed = trial.confirms and session.get(TrialRow, trial.confirms)
    if confirmed:  # answers about the confirmed search include its confirmations
        locked_scope(session, confirmed.search_id).revision += 1
    if trial.reused_from is None:
        touch(session, search)


def _add(session: Session, search: SearchRow, *which: ColumnElement[bool]) -> None:
    """Add completed runs of a search to its scopes.

    A run that reuses the result of another search counts in its search, but not in the task again.
    """
    where = (TrialRow.state == "complete", *evidence_in(search.id), *which)
    columns = [getattr(TrialRow, a.column) for a in AXES.values() if not a.along_curve]
    trials = (
        select(TrialRow.id, TrialRow.model, TrialRow.dense, TrialRow.reused_from, TrialRow.steps,
               TrialRow.loss, TrialRow.environment, *columns)
        .join(SearchRow, TrialRow.search_id == SearchRow.id)
    )  # fmt: skip
    curves = (
        select(PointRow.trial_id, PointRow.step, PointRow.train_flops, PointRow.seconds,
               PointRow.loss)
        .join(TrialRow, PointRow.trial_id == TrialRow.id)
        .join(SearchRow, TrialRow.search_id == SearchRow.id)
        .order_by(PointRow.trial_id, PointRow.step)
    )  # fmt: skip
    every, every_point = (session.execute(q.where(*where)).all() for q in (trials, curves))
    for scope in scopes_of(search):
        runs = {r.id: r for r in every if scope == search.id or r.reused_from is None}
        points = [p for p in every_point if p.trial_id in runs]
        if not runs:
            continue
        state = locked_scope(session, scope)
        state.revision += 1
        state.trials += len(runs)
        state.points += len(points)
        state.searches += not _has_others(session, search, scope, len(runs))
        flops = [p.train_flops for p in points]
        flops += [f for f in (state.least_flops, state.greatest_flops) if f is not None]
        state.least_flops, state.greatest_flops = min(flops), max(flops)
        merge(session, scope, _by_axis(runs, points, measured=False))
        _add_measured(session, scope, runs, points)


def _add_measured(
    session: Session, scope: str, runs: Mapping[int, Any], points: Sequence[Any]
) -> None:
    """Add runs to the scopes of the devices that they ran on, within a locked scope.

    These count the runs that were timed.
    """
    curves: dict[int, list[Any]] = {}
    for p in points:
        curves.setdefault(p.trial_id, []).append(p)
    devices: dict[str, dict[int, Any]] = {}
    for trial, run in runs.items():
        device = device_of(run.environment)
        if device is not None:
            devices.setdefault(device, {})[trial] = run
    for device, own in sorted(devices.items()):
        timed = [t for t in own if is_timed([p.seconds for p in curves.get(t, ())])]
        of_timed = [p for t in timed for p in curves[t]]
        state = locked_scope(session, device_scope(scope, device))
        state.revision += 1
        state.trials += len(timed)
        state.points += len(of_timed)
        merge(session, state.scope, _by_axis(own, of_timed, measured=True))


def _has_others(session: Session, search: SearchRow, scope: str, runs: int) -> bool:
    """Whether a search has more than so many completed runs in a scope."""
    completed = (
        select(TrialRow.id)
        .join(SearchRow, TrialRow.search_id == SearchRow.id)
        .where(SearchRow.id == search.id, TrialRow.state == "complete", *evidence_in(scope))
    )
    return len(session.scalars(completed.limit(runs + 1)).all()) > runs


def _by_axis(
    runs: Mapping[int, Any], points: Iterable[Any], *, measured: bool
) -> dict[tuple[str, bool], Points]:
    """(axis, dense) → the points of the runs that have a value on it, of the measured axes or of
    the others."""
    models = {trial: model_number(run.model, trial) for trial, run in runs.items()}
    found: dict[tuple[str, bool], list[tuple[Any, ...]]] = {}
    for name, axis in AXES.items():
        if axis.measured is not measured:
            continue
        if axis.along_curve:
            of_axis = [(p.trial_id, p.step, getattr(p, axis.column), p.loss) for p in points]
        else:
            of_axis = [(t, r.steps, getattr(r, axis.column), r.loss) for t, r in runs.items()]
        for trial, step, x, loss in of_axis:
            if x is not None:
                row = (models[trial], trial, step, x, loss)
                found.setdefault((name, runs[trial].dense), []).append(row)
    return {key: as_points(rows) for key, rows in found.items()}


def are_current(connection: Connection) -> bool:
    """Whether the standings have the contents that this version keeps."""
    with Session(connection) as session:
        layout = session.get(ScopeRow, _LAYOUT_SCOPE)
        return layout is not None and layout.revision == LAYOUT


def ensure(connection: Connection) -> None:
    """Rebuild the standings if they are not this version's."""
    if not are_current(connection):
        with Session(connection) as session:
            if session.get(ScopeRow, _LAYOUT_SCOPE) is not None:
                # a worker of the version before would enter its runs as that one keeps them
                running = update(SearchRow).where(SearchRow.state == "running")
                session.execute(running.values(epoch=SearchRow.epoch + 1))
            rebuild(session)
            session.flush()


def rebuild(session: Session) -> None:
    """Rebuild standings and counts of every scope from the completed runs, in one transaction.

    The transaction is the caller's.  It reads search by search, so that memory holds the points of
    one search only.  Revisions continue from their old values.
    """
    revisions = dict(session.execute(select(ScopeRow.scope, ScopeRow.revision)).all())
    for table in (StandingRow, BarRow, ScopeRow):
        session.execute(delete(table))
    for search in session.scalars(select(SearchRow).order_by(SearchRow.sequence)).all():
        touch(session, search)
        _add(session, search)
    session.flush()
    for state in session.scalars(select(ScopeRow)):
        state.revision += revisions.get(state.scope, 0)
    locked_scope(session, _LAYOUT_SCOPE).revision = LAYOUT
