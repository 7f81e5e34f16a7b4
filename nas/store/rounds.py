"""Planning of trials, and of a whole round of a search, in the transaction of its lease."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from nas.records.trial import TrialState
from nas.store import lifecycle, rows, standings
from nas.store.records import Round, TrialDraft
from nas.store.schema import EventRow, PointRow, SearchRow, TrialRow


def planned(session: Session, search: SearchRow, draft: TrialDraft, at: float) -> TrialRow:
    """Add a trial; `at` is the database's time."""
    plan = draft.plan
    row = TrialRow(
        search_id=search.id,
        number=draft.number,
        kind=draft.kind,
        state="planned",
        params=None if draft.params is None else dict(draft.params),
        sampler_state=dict(draft.sampler_state or {}),
        unseen=list(draft.unseen),
        theta=list(plan.design.exponents),
        design=rows.stored_design(plan.design),
        name=draft.name,
        structures=list(plan.structures),
        dense=plan.dense,
        width=plan.width,
        depth=plan.depth,
        steps=plan.steps,
        train_flops_per_step=plan.train_flops_per_step,
        train_flops=float(plan.train_flops),
        forward_flops_per_token=plan.forward_flops_per_token,
        model_params=plan.params,
        seed=draft.seed,
        key=draft.key,
        attempts=0,
        epoch=search.epoch,
        created_at=at,
        model=rows.model_digest(search.task_fingerprint or search.id, plan),
        confirms=draft.confirms,
        until_step=draft.until_step,
        trained_steps=0,
        charged_steps=0,
    )
    session.add(row)
    reference = {rows.REFERENCES: 1} if draft.kind == "reference" else {}
    rows.count(search, planned=1, **reference)
    told = {"number": row.number, "name": row.name, "width": row.width, "kind": row.kind}
    _tell(session, search, "trial_planned", told, at)
    return row


def begin(session: Session, search: SearchRow, round_: Round) -> list[TrialRow]:
    """Do all moves of a round; return the trials that it planned and those that go on.

    A round that the search has begun already is the same write, repeated because its response was
    lost: it changes nothing.
    """
    first = search.rounds < round_.number
    if first:
        at = rows.now(session)
        search.rounds = round_.number
        _tell(session, search, "round", _counts(round_), at)
        for trial in _of(session, search, round_.stopped, first):
            trial.error = round_.stopped[trial.id][: lifecycle.LONGEST_ERROR]
            _end(session, search, trial, "stopped", {"reason": trial.error}, at)
        for trial in _of(session, search, round_.ended, first):
            _end_here(session, search, trial, round_.ended[trial.id], at)
        for draft in round_.begun:
            planned(session, search, draft, at)
    advanced = _of(session, search, round_.advanced, first)
    for trial in advanced if first else ():
        lifecycle.set_state(search, trial, "planned")
        trial.until_step, trial.epoch = round_.advanced[trial.id], search.epoch
    session.flush()
    numbers = [draft.number for draft in round_.begun]
    begun = session.scalars(
        select(TrialRow)
        .where(TrialRow.search_id == search.id, TrialRow.number.in_(numbers))
        .order_by(TrialRow.number)
    ).all()
    return [*advanced, *begun]


def _counts(round_: Round) -> dict[str, int]:
    """The round and how many moves of each kind it has, as its event tells them."""
    confirmations = sum(draft.confirms is not None for draft in round_.begun)
    return {
        "round": round_.number,
        "begun": len(round_.begun) - confirmations,
        "advanced": len(round_.advanced),
        "stopped": len(round_.stopped),
        "ended": len(round_.ended),
        "confirmations": confirmations,
    }


def _of(session: Session, search: SearchRow, ids: Iterable[int], paused: bool) -> list[TrialRow]:
    """The trials of a round, in the order of their numbers; all of them paused if `paused`."""
    wanted = list(ids)
    found = session.scalars(
        select(TrialRow)
        .where(TrialRow.search_id == search.id, TrialRow.id.in_(wanted))
        .order_by(TrialRow.number)
    ).all()
    fit = [trial for trial in found if not paused or trial.state == "paused"]
    if len(fit) != len(wanted):
        missing = sorted(set(wanted) - {trial.id for trial in fit})
        raise ValueError(f"trials {missing} are not paused ones of search {search.id}")
    return fit


def _end_here(session: Session, search: SearchRow, trial: TrialRow, key: str, at: float) -> None:
    """Make a paused trial a complete one of the steps that it has trained."""
    last = session.get(PointRow, (trial.id, trial.trained_steps))
    if last is None:
        raise ValueError(f"trial {trial.id} has no point at step {trial.trained_steps}")
    trial.steps, trial.until_step, trial.key, trial.loss = trial.trained_steps, None, key, last.loss
    trial.train_flops = float(trial.steps * trial.train_flops_per_step)
    _end(session, search, trial, "complete", {"loss": last.loss, "steps": trial.steps}, at)
    session.flush()
    standings.enter(session, search, trial)


def _end(
    session: Session,
    search: SearchRow,
    trial: TrialRow,
    state: TrialState,
    data: Mapping[str, Any],
    at: float,
) -> None:
    lifecycle.set_state(search, trial, state)
    trial.epoch, trial.finished_at = search.epoch, at
    _tell(session, search, f"trial_{state}", {"number": trial.number, **data}, at)


def _tell(
    session: Session, search: SearchRow, kind: str, data: Mapping[str, Any], at: float
) -> None:
    session.add(EventRow(search_id=search.id, created_at=at, kind=kind, data=dict(data)))
