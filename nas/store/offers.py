"""Trials that processes of a user's own train: offered, asked for, and told of.

The search itself is held by a worker as any other, which proposes its trials, offers them here, and
takes over what it is told.  Who asks for a trial gets a lease on it with a secret token, which each
`tell` renews.  Once a lease has run out the trial may be offered anew, and what its former holder
tells is refused.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import delete, func, or_, select, update
from sqlalchemy.orm import Session

from nas.errors import Conflict, InvalidInput, LeaseLost
from nas.records.trial import StoredPoint
from nas.store import rows
from nas.store.engine import reading, writing
from nas.store.records import TERMINAL
from nas.store.schema import OfferRow, SearchRow, ToldRow, TrialRow
from nas.store.searches import Store

Outcome = Literal["complete", "failed"]
#: Length of the lease on a trial, seconds.
LEAST_LEASE, MOST_LEASE = 1.0, 7 * 86_400.0


@dataclass(frozen=True, slots=True)
class Asked:
    """The answer to who asks for a trial."""

    #: None where there is none now
    trial_id: int | None
    token: str | None
    #: whether the search has ended, so that there will be none
    ended: bool


@dataclass(frozen=True, slots=True)
class News:
    """What a search has not taken over yet of what it was told, and offers nobody keeps up."""

    points: Sequence[tuple[int, StoredPoint]]
    #: trial → why it failed; None of a complete one
    ended: dict[int, str | None]
    #: trials whose holder let its lease run out
    lost: Sequence[int]
    #: trial → its holder; None while nobody trains it
    held: dict[int, str | None]


class Offers:
    """The offers of a store."""

    def __init__(self, store: Store) -> None:
        self._store, self._engine = store, store.engine

    # --- for who trains

    def ask(self, search_id: str, holder: str, seconds: float) -> Asked:
        """Lease the next trial of a search.

        Parameters
        ----------
        holder
            Name shown to users.
        seconds
            Length of the lease from now, and from each `tell`.

        Raises
        ------
        NotFound, Conflict
            No such search; one whose trials workers train.
        InvalidInput
            A lease too short or too long.
        """
        if not LEAST_LEASE <= seconds <= MOST_LEASE:
            accepted = f"seconds from {LEAST_LEASE:g} to {MOST_LEASE:g}"
            raise InvalidInput("lease_seconds", seconds, accepted)
        with writing(self._engine) as session:
            search = self._store.row(session, search_id)
            if search.request.get("trainer") != "client":
                raise Conflict(
                    f"workers train the trials of search {search_id}: nobody can ask for them"
                )
            if search.state in TERMINAL:
                return Asked(None, None, ended=True)
            if search.state == "paused" or search.cancel_requested or search.pause_requested:
                return Asked(None, None, ended=False)
            free = (
                select(OfferRow)
                .where(OfferRow.search_id == search_id, OfferRow.token.is_(None))
                .order_by(OfferRow.trial_id)
                .limit(1)
                .with_for_update(skip_locked=True)
            )
            row = session.scalars(free).one_or_none()
            if row is None:
                return Asked(None, None, ended=False)
            row.holder, row.token = holder, secrets.token_hex(16)
            row.lease_seconds, row.lease_until = seconds, rows.now(session) + seconds
            number = session.scalars(select(TrialRow.number).where(TrialRow.id == row.trial_id))
            told = {"number": number.one(), "holder": holder}
            rows.add_event(session, search_id, "trial_asked", told)
            return Asked(row.trial_id, row.token, ended=False)

    def tell(self, trial_id: int, token: str, points: Sequence[StoredPoint]) -> float:
        """Store evaluations and renew the lease; return the seconds that it has from now.

        The same points may be told again, and in any order of their steps.

        Raises
        ------
        NotFound, LeaseLost
            No such trial; it was not leased with this token, or no longer is.
        Conflict
            The trial has ended, or a step was told before with other losses.
        InvalidInput
            A step that the trial does not have, or another number of losses than before.
        """
        with self._held(trial_id, token) as (session, offer, trial):
            if offer.outcome is not None:
                raise Conflict(f"trial {trial_id} has ended: {offer.outcome}")
            for point in points:
                self._add(session, trial, point)
            assert offer.lease_seconds is not None
            offer.lease_until = rows.now(session) + offer.lease_seconds
            return offer.lease_seconds

    def _add(self, session: Session, trial: TrialRow, point: StoredPoint) -> None:
        if not 1 <= point.step <= trial.steps:
            accepted = f"a step from 1 to {trial.steps}, the last of trial {trial.id}"
            raise InvalidInput("step", point.step, accepted)
        packed = rows.pack_floats(point.window_losses)
        before = session.get(ToldRow, (trial.id, point.step))
        if before is not None:
            if before.losses != packed:
                raise Conflict(f"step {point.step} of trial {trial.id} was told with other losses")
            return
        others = (
            select(func.length(ToldRow.losses))
            .join(OfferRow, OfferRow.trial_id == ToldRow.trial_id)
            .where(OfferRow.search_id == trial.search_id)
            .limit(1)
        )
        size = session.scalar(others)
        if size is not None and size != len(packed):
            accepted = f"{size // 4} losses, as of the other points of the search"
            raise InvalidInput("losses", f"{len(packed) // 4} losses", accepted)
        session.add(
            ToldRow(
                trial_id=trial.id, step=point.step, loss=point.loss, loss_stderr=point.loss_stderr,
                seconds=point.train_seconds, losses=packed,
            )
        )  # fmt: skip
        session.flush()

    def end(self, trial_id: int, token: str, error: str | None) -> Outcome:
        """Say that a trial is complete, or why it failed; may be said again.

        Raises
        ------
        NotFound, LeaseLost, Conflict
            As of `tell`; it has ended otherwise.
        InvalidInput
            It is to be complete, and the point of its last step was not told.
        """
        outcome: Outcome = "complete" if error is None else "failed"
        with self._held(trial_id, token) as (session, offer, trial):
            if offer.outcome not in (None, outcome):
                raise Conflict(f"trial {trial_id} has ended: {offer.outcome}")
            if offer.outcome is None:
                if error is None and session.get(ToldRow, (trial_id, trial.steps)) is None:
                    accepted = f"complete once step {trial.steps} was told; or failed, with why"
                    raise InvalidInput("outcome", outcome, accepted)
                offer.outcome, offer.error = outcome, error
            return outcome

    @contextmanager
    def _held(self, trial_id: int, token: str) -> Iterator[tuple[Session, OfferRow, TrialRow]]:
        """A write transaction in which the lease of a trial is that of a token."""
        with writing(self._engine) as session:
            trial = self._store.trial_row(session, trial_id)
            offer = session.get(OfferRow, trial_id, with_for_update=True)
            search = session.get_one(SearchRow, trial.search_id)
            held = offer is not None and offer.token is not None
            if offer is None or not held or not secrets.compare_digest(str(offer.token), token):
                raise LeaseLost(
                    f"trial {trial_id} is not leased with this token, or no longer is; ask for "
                    "another one"
                )
            if search.state in TERMINAL and not offer.settled:
                raise Conflict(f"search {search.id} has ended: {search.state}")
            yield session, offer, trial

    # --- for the worker that holds the search

    def open(self, search_id: str, trial_id: int) -> None:
        """Offer a trial that the search has started."""
        with writing(self._engine) as session:
            if session.get(OfferRow, trial_id) is None:
                session.add(OfferRow(trial_id=trial_id, search_id=search_id))

    def news(self, search_id: str) -> News:
        """What there is to take over."""
        with reading(self._engine) as session:
            at = rows.now(session)
            mine = OfferRow.search_id == search_id, OfferRow.settled.is_(False)
            offers = list(session.scalars(select(OfferRow).where(*mine)))
            told = session.scalars(
                select(ToldRow)
                .join(OfferRow, OfferRow.trial_id == ToldRow.trial_id)
                .where(*mine, ToldRow.taken.is_(False))
                .order_by(ToldRow.trial_id, ToldRow.step)
            )
            points = [(row.trial_id, _point(row)) for row in told]
            return News(
                points,
                {o.trial_id: o.error for o in offers if o.outcome is not None},
                [
                    o.trial_id for o in offers
                    if o.outcome is None and o.lease_until is not None and o.lease_until < at
                ],
                {o.trial_id: o.holder for o in offers},
            )  # fmt: skip

    def taken(self, points: Sequence[tuple[int, StoredPoint]]) -> None:
        """Note that the search has stored these points."""
        with writing(self._engine) as session:
            for trial_id, point in points:
                session.execute(
                    update(ToldRow)
                    .where(ToldRow.trial_id == trial_id, ToldRow.step == point.step)
                    .values(taken=True)
                )

    def settle(self, trial_id: int) -> None:
        """Note that the search has taken over the outcome of a trial."""
        with writing(self._engine) as session:
            session.execute(
                update(OfferRow).where(OfferRow.trial_id == trial_id).values(settled=True)
            )

    def withdraw(self, trial_id: int) -> bool:
        """Take an offer back, unless its holder has renewed its lease meanwhile or ended it."""
        with writing(self._engine) as session:
            at = rows.now(session)
            gone = session.execute(
                delete(OfferRow)
                .where(
                    OfferRow.trial_id == trial_id,
                    OfferRow.outcome.is_(None),
                    or_(OfferRow.lease_until.is_(None), OfferRow.lease_until < at),
                )
                .returning(OfferRow.trial_id)
            )
            # a repeated write finds it gone
            return gone.first() is not None or session.get(OfferRow, trial_id) is None


def _point(row: ToldRow) -> StoredPoint:
    return StoredPoint(
        row.step, 0.0, row.loss, row.loss_stderr, row.seconds, rows.unpack_floats(row.losses)
    )
