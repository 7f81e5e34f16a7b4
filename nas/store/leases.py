"""Leases: claiming a search, renewing the claim, and the writes that it permits.

A claim raises the search's epoch, which is a fencing token.  Every later write names the epoch of
its claim, and is refused with `LeaseLost` once another claim has raised it.  So a worker that was
paused, swapped out or disconnected can do no harm when it continues.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from typing import Any

from sqlalchemy import ColumnElement, delete, func, select, true
from sqlalchemy.orm import Session

from nas import tracing
from nas.errors import LeaseLost
from nas.planning.request import Trainer
from nas.records.search import Search, SearchFailure, SearchState
from nas.records.trial import MeasuredCost, StoredPoint, Trial, TrialFailure, TrialState
from nas.store import lifecycle, queue, rounds, rows, scopes, standings, traces
from nas.store.engine import one_at_a_time, writing
from nas.store.records import DUE, Lease, Renewal, Round, TrialDraft
from nas.store.schema import EventRow, PointRow, SearchRow, TrialRow
from nas.store.searches import Store
from nas.store.weights import keep

#: Lost leases and infrastructure errors after which a search is given up.
MAX_ATTEMPTS = 5
#: Seconds before a search is tried again after an infrastructure error; doubles each time.
BACKOFF_SECONDS = 5.0
#: Key of the lock that serializes claims where tenants have limits; an arbitrary constant.
_CLAIM_LOCK = 7305615


class Leases:
    """Claims on searches, and the writes that only the holder of the current claim may do.

    Parameters
    ----------
    max_attempts
        Lost leases and infrastructure errors after which a search is given up.
    backoff_seconds
        Before a search is tried again after one; doubles each time.
    tenant_concurrency
        Searches of one tenant that may run at once, unless it has a quota of its own; None for no
        limit.
    """

    def __init__(
        self,
        store: Store,
        *,
        max_attempts: int = MAX_ATTEMPTS,
        backoff_seconds: float = BACKOFF_SECONDS,
        tenant_concurrency: int | None = None,
    ) -> None:
        self._engine, self._weights_bytes = store.engine, store.quotas.weights_bytes
        self._max_attempts, self._backoff_seconds = max_attempts, backoff_seconds
        self._tenant_concurrency = tenant_concurrency

    def claim(
        self,
        worker: str,
        lease_seconds: float,
        *,
        search_id: str | None = None,
        trainer: Trainer = "workers",
        tasks: Sequence[str] | None = None,
    ) -> tuple[Lease, Search] | None:
        """Claim the next search that is queued or whose lease has expired; None if there is none.

        The next tenant is the one that runs the fewest searches, and of these the one that has
        waited longest; tenants at their limit are skipped.  Of its searches the one of the highest
        priority is next, and of these the oldest.

        Parameters
        ----------
        worker
            Name shown to users.
        lease_seconds
            Length of the lease, by the database's clock.
        search_id
            Claim this search or nothing.
        trainer
            Who trains the trials of the search.
        tasks
            Claim only searches on these; by default on any.
        """
        which = [queue.is_trained_by(trainer)]
        if search_id is not None:
            which.append(SearchRow.id == search_id)
        if tasks is not None:
            which.append(SearchRow.task.in_(tasks))
        while True:
            found, got = self._claim_first(worker, lease_seconds, which, trainer)
            if got is not None or not found:
                return got
            # the first was given up or paused just now: the next one may still be claimed

    def _claim_first(
        self,
        worker: str,
        lease_seconds: float,
        which: Sequence[ColumnElement[bool]],
        trainer: Trainer,
    ) -> tuple[bool, tuple[Lease, Search] | None]:
        """(whether there was a search to claim, the claim unless it was given up or paused)."""
        with writing(self._engine) as session:
            at = rows.now(session)
            claimable = [queue.is_ready(at), *which]
            if trainer == "workers":  # those that clients train occupy no worker
                claimable += self._within_limits(session, at)
            row = None
            for tenant in queue.turns(session, claimable, at):
                query = (
                    select(SearchRow)
                    .where(SearchRow.tenant == tenant, *claimable)
                    .order_by(*queue.WITHIN_TENANT)
                    .limit(1)
                    .with_for_update(skip_locked=True)
                )
                row = session.scalars(query).one_or_none()
                if row is not None:
                    break
            if row is None:
                return False, None
            if row.state == "running":
                lost = {"worker": row.worker, "failures": row.failures + 1}
                rows.add_event(session, row.id, "lease_lost", lost)
                why = f"worker {row.worker} lost its lease"
                if not lifecycle.count_failure(session, row, why, self._max_attempts):
                    return True, None
            row.state, row.worker = "running", worker
            row.epoch += 1
            row.claimed_at, row.lease_until = at, at + lease_seconds
            row.started_at = at if row.started_at is None else row.started_at
            rows.add_event(session, row.id, "claimed", {"worker": worker, "epoch": row.epoch})
            session.flush()
            lease = Lease(row.id, row.epoch, worker, lease_seconds)
            return True, (lease, rows.to_search(row))

    def _within_limits(self, session: Session, at: float) -> list[ColumnElement[bool]]:
        """Exclude the tenants that run as many searches as they may."""
        if not queue.any_limit(session, self._tenant_concurrency):
            return []
        one_at_a_time(session, _CLAIM_LOCK)
        return queue.below_limits(at, self._tenant_concurrency)

    def renew(self, lease: Lease) -> Renewal:
        """Extend the lease by its length from now; return what is requested of the search.

        Raises
        ------
        LeaseLost
            Another worker has claimed the search.
        """
        with self._fenced(lease) as (session, row):
            at = rows.now(session)
            row.lease_until = at + lease.seconds
            held = row.held_seconds + at - (at if row.claimed_at is None else row.claimed_at)
            limits = (row.request.get("limits") or {}).get("seconds")
            over = limits is not None and held >= limits
            return Renewal(row.cancel_requested, row.pause_requested, over)

    def span(self, lease: Lease) -> tracing.Span:
        """The span of the search, which whoever writes its end tells."""
        return traces.span_of(self._engine, lease.search_id)

    def once(
        self, lease: Lease, kind: str, data: Mapping[str, Any] | None = None
    ) -> Mapping[str, Any] | None:
        """What the search's log tells of a kind that it tells once: what was told first.

        Parameters
        ----------
        data
            Told now if nothing has been told yet; None to ask only.
        """
        with self._fenced(lease) as (session, search):
            told = select(EventRow.data).where(
                EventRow.search_id == search.id, EventRow.kind == kind
            )
            first = session.scalars(told.order_by(EventRow.id).limit(1)).one_or_none()
            if first is None and data is not None:
                rows.add_event(session, search.id, kind, data)
                return data
            return first

    @contextmanager
    def _fenced(self, lease: Lease) -> Iterator[tuple[Session, SearchRow]]:
        """A write transaction that locks the search's row and checks the lease's epoch.

        A write of an earlier epoch is refused, and the refusal is logged.
        """
        with writing(self._engine) as session:
            query = select(SearchRow).where(SearchRow.id == lease.search_id).with_for_update()
            row = session.scalars(query).one_or_none()
            current = row is not None and row.epoch == lease.epoch and row.state == "running"
            if row is not None and current:
                yield session, row
            elif row is not None and row.epoch != lease.epoch:
                row.stale_writes += 1
                stale = {"worker": lease.worker, "of_epoch": lease.epoch}
                rows.add_event(session, row.id, "stale_write", stale)
        if not current:
            raise LeaseLost(
                f"search {lease.search_id}: epoch {lease.epoch} of worker {lease.worker} is "
                "no longer the current one"
            )

    def set_fingerprint(self, lease: Lease, fingerprint: str) -> str:
        """Store the fingerprint of the search's data if it has none; return the stored one."""
        with self._fenced(lease) as (session, row):
            if row.task_fingerprint is None:
                row.task_fingerprint = fingerprint
                scopes.touch(session, row)
            return row.task_fingerprint

    def add_trial(self, lease: Lease, draft: TrialDraft) -> Trial:
        """`add_trials` of one."""
        return self.add_trials(lease, [draft])[0]

    def add_trials(self, lease: Lease, drafts: Sequence[TrialDraft]) -> list[Trial]:
        """Commit planned trials, all or none; they are dispatched only after this has returned."""
        numbers = [draft.number for draft in drafts]
        with self._fenced(lease) as (session, search):
            same = select(TrialRow).where(
                TrialRow.search_id == lease.search_id,
                TrialRow.number.between(min(numbers, default=0), max(numbers, default=-1)),
                TrialRow.epoch == lease.epoch,
            )
            # this same write, repeated because its response was lost
            stored = {(row.number, row.key): row for row in session.scalars(same)}
            at = rows.now(session)
            found = [
                stored.get((draft.number, draft.key)) or rounds.planned(session, search, draft, at)
                for draft in drafts
            ]
            session.flush()
            return [rows.to_trial(row) for row in found]

    def begin_round(self, lease: Lease, round_: Round) -> list[Trial]:
        """Commit all moves of a round, or none; return the trials that are to train in it.

        Raises
        ------
        ValueError
            It names a trial that is not paused.
        """
        with self._fenced(lease) as (session, search):
            return [rows.to_trial(row) for row in rounds.begin(session, search, round_)]

    def start_trial(self, lease: Lease, trial_id: int, *, anew: bool = False) -> None:
        """Mark a trial as dispatched and drop the points of an interrupted attempt.

        Of a run that goes on after a pause the points up to there stay.

        Parameters
        ----------
        anew
            It was started under this lease before: this is another attempt, and no repeated write.
        """
        with self._fenced(lease) as (session, search):
            row = self._trial(session, lease, trial_id)
            dropped = session.execute(
                delete(PointRow)
                .where(PointRow.trial_id == trial_id, PointRow.step > row.trained_steps)
                .returning(PointRow.step)
            ).first()
            started = (row.state, row.epoch) == ("running", lease.epoch)
            if started and dropped is None and not anew:
                return  # this same write, repeated because its response was lost
            lifecycle.set_state(search, row, "running")
            row.epoch = lease.epoch
            # so many steps were charged when the search was submitted
            charged = max(row.steps, row.charged_steps)
            row.charged_steps += (row.until_step or row.steps) - row.trained_steps
            more = max(row.charged_steps - charged, 0)
            search.charged_flops += float(more * row.train_flops_per_step)
            row.attempts += 1
            row.started_at = rows.now(session)
            rows.add_event(
                session, lease.search_id, "trial_started",
                {"number": row.number, "attempt": row.attempts},
            )  # fmt: skip

    def adopt_trial(self, lease: Lease, trial_id: int) -> None:
        """Mark a trial as running that others have gone on with; its points stay."""
        with self._fenced(lease) as (session, search):
            row = self._trial(session, lease, trial_id)
            lifecycle.set_state(search, row, "running")
            row.epoch = lease.epoch

    def _trial(self, session: Session, lease: Lease, trial_id: int) -> TrialRow:
        row = session.get(TrialRow, trial_id, with_for_update=True)
        if row is None or row.search_id != lease.search_id or row.state not in DUE:
            raise LeaseLost(f"trial {trial_id} is not planned or running in {lease.search_id}")
        return row

    def _unended(
        self, session: Session, lease: Lease, trial_id: int, state: TrialState
    ) -> TrialRow | None:
        """The trial to end; None if this lease has ended it so before: the write is repeated."""
        row = session.get(TrialRow, trial_id)
        if row is not None and (row.state, row.epoch) == (state, lease.epoch):
            return None
        return self._trial(session, lease, trial_id)

    def add_point(self, lease: Lease, trial_id: int, point: StoredPoint) -> None:
        """`add_points` of one."""
        self.add_points(lease, [(trial_id, point)])

    def add_points(self, lease: Lease, points: Sequence[tuple[int, StoredPoint]]) -> None:
        """Store evaluations of trials; a run that was restarted overwrites its earlier points."""
        for _, point in points:
            if not (math.isfinite(point.loss) and math.isfinite(point.loss_stderr)):
                raise ValueError(f"a point needs a finite loss, got {point}")
        with self._fenced(lease) as (session, _):
            trials = {i: self._trial(session, lease, i) for i in {i for i, _ in points}}
            for trial_id, point in points:
                session.merge(
                    PointRow(
                        trial_id=trial_id,
                        step=point.step,
                        train_flops=point.train_flops,
                        loss=point.loss,
                        loss_stderr=point.loss_stderr,
                        seconds=point.train_seconds,
                        window_losses=rows.pack_floats(point.window_losses),
                    )
                )
                rows.add_event(
                    session, lease.search_id, "point",
                    {
                        "number": trials[trial_id].number, "train_flops": point.train_flops,
                        "loss": point.loss,
                    },
                )  # fmt: skip

    def complete_trial(
        self,
        lease: Lease,
        trial_id: int,
        environment: Mapping[str, Any] | None,
        cost: MeasuredCost | None = None,
        weights: bytes | str | None = None,
    ) -> None:
        """Complete a trial whose last point has been stored; from now on answers use it.

        Parameters
        ----------
        weights
            File of its weights, to be kept if its loss is among the lowest; or why there is none.
        """
        with self._fenced(lease) as (session, search):
            row = self._unended(session, lease, trial_id, "complete")
            if row is None:
                return
            last = session.get(PointRow, (trial_id, row.steps))
            if last is None:
                raise ValueError(f"trial {trial_id} has no point at its last step {row.steps}")
            row.loss, row.trained_steps = last.loss, row.steps
            _measured(row, environment, cost)
            data: dict[str, Any] = {"loss": last.loss}
            if isinstance(weights, bytes):
                data |= keep(session, search, row, weights, self._weights_bytes)
            elif weights is not None:
                data["weights_left"] = weights[: lifecycle.LONGEST_ERROR]
            self._finish_trial(session, search, row, "complete", data)
            standings.enter(session, search, row)

    def pause_trial(
        self,
        lease: Lease,
        trial_id: int,
        environment: Mapping[str, Any] | None,
        cost: MeasuredCost | None = None,
    ) -> None:
        """Pause a trial whose point at the last step of its slice has been stored.

        It goes on, or ends, by a move of a later round.
        """
        with self._fenced(lease) as (session, search):
            row = session.get(TrialRow, trial_id)
            if row is not None and (row.state, row.epoch) == ("paused", lease.epoch):
                return  # this same write, repeated because its response was lost
            row = self._trial(session, lease, trial_id)
            until = row.until_step
            last = None if until is None else session.get(PointRow, (trial_id, until))
            if last is None:
                raise ValueError(f"trial {trial_id} has no point at step {until}")
            row.trained_steps = last.step
            _measured(row, environment, cost)
            lifecycle.set_state(search, row, "paused")
            row.epoch = search.epoch
            data = {"number": row.number, "step": last.step, "loss": last.loss}
            rows.add_event(session, row.search_id, "trial_paused", data)

    def fail_trial(
        self, lease: Lease, trial_id: int, reason: str, failure: TrialFailure = "run"
    ) -> None:
        """End a trial with the reason why it has no result; its points stay."""
        with self._fenced(lease) as (session, search):
            row = self._unended(session, lease, trial_id, "failed")
            if row is None:
                return
            row.error, row.failure = reason[: lifecycle.LONGEST_ERROR], failure
            row.trained_steps = _last_step(session, trial_id)
            data = {"error": row.error, "failure": failure}
            self._finish_trial(session, search, row, "failed", data)

    def stop_trial(self, lease: Lease, trial_id: int, reason: str) -> None:
        """End a trial before its last step; its points stay, and it never counts as complete."""
        with self._fenced(lease) as (session, search):
            row = self._trial(session, lease, trial_id)
            row.error = reason[: lifecycle.LONGEST_ERROR]
            row.trained_steps = _last_step(session, trial_id)
            self._finish_trial(session, search, row, "stopped", {"reason": row.error})

    def _finish_trial(
        self,
        session: Session,
        search: SearchRow,
        row: TrialRow,
        state: TrialState,
        data: Mapping[str, Any],
    ) -> None:
        lifecycle.set_state(search, row, state)
        row.epoch, row.finished_at = search.epoch, rows.now(session)
        event = {"number": row.number, **data}
        rows.add_event(session, row.search_id, f"trial_{state}", event)

    def reuse_result(self, lease: Lease, trial_id: int) -> bool:
        """Complete a trial with the result of an equal run of its tenant, if there is one.

        Of a search that clients train, with one of the search itself: what their code does
        elsewhere is not known.
        """
        with self._fenced(lease) as (session, search):
            row = self._unended(session, lease, trial_id, "complete")
            if row is None:
                return True
            of_clients = search.request.get("trainer") == "client"
            twin = session.scalars(
                select(TrialRow)
                .join(SearchRow, TrialRow.search_id == SearchRow.id)
                .where(
                    SearchRow.tenant == search.tenant,
                    SearchRow.id == search.id if of_clients else true(),
                    TrialRow.key == row.key,
                    TrialRow.state == "complete",
                    TrialRow.reused_from.is_(None),
                )
                .order_by(TrialRow.id)
                .limit(1)
            ).one_or_none()
            if twin is None:
                return False
            session.execute(delete(PointRow).where(PointRow.trial_id == trial_id))
            for point in session.scalars(select(PointRow).where(PointRow.trial_id == twin.id)):
                copy = {c.name: getattr(point, c.name) for c in PointRow.__table__.columns}
                session.add(PointRow(**{**copy, "trial_id": trial_id}))
            for name in ("loss", "environment", *(f.name for f in fields(MeasuredCost))):
                setattr(row, name, getattr(twin, name))
            row.reused_from, row.started_at = twin.id, rows.now(session)
            data = {"loss": row.loss, "reused": True}
            self._finish_trial(session, search, row, "complete", data)
            session.flush()
            standings.enter(session, search, row)
            return True

    def release(
        self,
        lease: Lease,
        state: SearchState,
        error: str | None = None,
        *,
        failure: SearchFailure | None = None,
        limit_reached: str | None = None,
    ) -> None:
        """End the search as succeeded, failed or cancelled.

        Parameters
        ----------
        failure
            Why it failed.
        limit_reached
            The limit of its request that ended it before its last trial.
        """
        with self._fenced(lease) as (session, row):
            row.limit_reached = limit_reached
            lifecycle.end(session, row, state, error, failure)

    def hand_back(self, lease: Lease) -> None:
        """Queue the search again, or pause it if that was requested; this counts as no failure."""
        with self._fenced(lease) as (session, row):
            if lifecycle.take_back(session, row):
                rows.add_event(session, row.id, "handed_back", {"worker": lease.worker})

    def requeue(self, lease: Lease, error: str) -> None:
        """Queue the search again after an infrastructure error, with a delay."""
        with self._fenced(lease) as (session, row):
            if lifecycle.count_failure(session, row, error, self._max_attempts):
                delay = self._backoff_seconds * 2 ** (row.failures - 1)
                row.not_before = rows.now(session) + delay
                data = {"error": error[: lifecycle.LONGEST_ERROR], "seconds": delay}
                rows.add_event(session, row.id, "requeued", {**data, "attempt": row.failures})


def _measured(
    row: TrialRow, environment: Mapping[str, Any] | None, cost: MeasuredCost | None
) -> None:
    """Store where a trial ran and what its steps cost; what a slice was too short to tell stays."""
    row.environment = None if environment is None else dict(environment)
    for name, value in () if cost is None else asdict(cost).items():
        if value is not None:
            setattr(row, name, value)


def _last_step(session: Session, trial_id: int) -> int:
    """The step of the last evaluation that is stored of a trial; 0 without one."""
    last = select(func.max(PointRow.step)).where(PointRow.trial_id == trial_id)
    return session.scalar(last) or 0
