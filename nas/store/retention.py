"""Deletion of old data: detailed events of ended searches, searches without results, audit records,
weights of runs.

Results are never deleted: neither completed trials and their points, nor searches that have any.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Select, delete, func, select
from sqlalchemy.orm import Session, aliased

from nas.errors import Conflict, InvalidInput
from nas.records.search import Search
from nas.store import rows
from nas.store.audit import Audit
from nas.store.engine import SECONDS_PER_DAY, reading, writing
from nas.store.quotas import quotas_of
from nas.store.records import TERMINAL
from nas.store.schema import BarRow, EventRow, ScopeRow, SearchRow, TrialRow, database_now
from nas.store.searches import Store
from nas.store.selecting import pages
from nas.store.weights import prune_weights

#: Events that repeat what a trial's row and curve hold; all others are milestones and stay.
FINE_GRAINED = ("point", "trial_planned", "trial_started", "trial_paused")
#: Ends without success.
UNSUCCESSFUL = ("failed", "cancelled")
_OWN = aliased(TrialRow)


@dataclass(frozen=True, slots=True)
class Pruned:
    """Counts of what was deleted, or would be."""

    #: events of searches that stay
    events: int = 0
    #: failed and cancelled searches, with all their rows
    searches: int = 0
    #: trials of these searches
    trials: int = 0
    #: records of the audit log
    audit: int = 0
    #: runs whose weights are no longer kept
    weights: int = 0


def prune(
    store: Store,
    *,
    event_days: float | None,
    failed_days: float | None,
    audit_days: float | None = None,
    weights_days: float | None = None,
    dry_run: bool = False,
) -> Pruned:
    """Delete old data; safe to call from several processes at once.

    Parameters
    ----------
    event_days
        Days after the end of a search until its detailed events are deleted; None for never.
    failed_days
        Days after their end until failed and cancelled searches are deleted, unless one of their
        trials has completed or anything refers to them; None for never.
    audit_days
        Days until records of the audit log are deleted, at least 90; None for never.
    weights_days
        Days after the end of a search until the weights of its runs are deleted; None for never.
    dry_run
        Only count.

    Raises
    ------
    InvalidInput
        A number of days is not finite, not above 0, or below 90 for the audit log.
    """
    given = {
        "event_days": event_days, "failed_days": failed_days, "audit_days": audit_days,
        "weights_days": weights_days,
    }  # fmt: skip
    for name, days in given.items():
        if days is not None and not (math.isfinite(days) and days > 0):
            raise InvalidInput(name, days, "a number of days above 0")
    found, gone = Pruned(), set[str]()
    if failed_days is not None:
        found, gone = _prune_searches(store, failed_days * SECONDS_PER_DAY, dry_run)
    if event_days is not None:
        events = _prune_events(store, event_days * SECONDS_PER_DAY, gone, dry_run)
        found = replace(found, events=events)
    if audit_days is not None:
        found = replace(found, audit=Audit(store).prune(audit_days, dry_run=dry_run))
    if weights_days is not None:
        found = replace(found, weights=prune_weights(store, weights_days, dry_run=dry_run))
    return found


def delete_search(store: Store, search_id: str) -> Search:
    """Delete an ended search that has no result, with all of its own; the search as it was.

    Raises
    ------
    NotFound
        No such search.
    Conflict
        It has not ended, holds a completed run, another search refers to it, or it still counts
        for its tenant's quota of train FLOPs, which deletion must not give back.
    """
    with writing(store.engine) as session:
        row = store.row(session, search_id, lock=True)
        if row.finished_at is None:
            raise Conflict(f"search {search_id} is {row.state}: cancel it before it is deleted")
        if session.scalar(_with_result([search_id])) is not None:
            accepted = "archive it, and lists leave it out"
            raise Conflict(f"search {search_id} holds results, which are never deleted; {accepted}")
        if _kept(session, [search_id]):
            raise Conflict(f"search {search_id} is referred to by another one, and stays")
        quotas = quotas_of(session, row.tenant, store.quotas)
        left = row.finished_at + quotas.days * SECONDS_PER_DAY - rows.now(session)
        if quotas.train_flops is not None and row.charged_flops > 0 and left > 0:
            raise Conflict(
                f"search {search_id} counts for the quota of train FLOPs of tenant {row.tenant} "
                f"for {left / SECONDS_PER_DAY:.1f} more days, and stays until then"
            )
        found = rows.to_search(row)
        _delete_row(session, search_id)
        return found


# --- events


def _prune_events(store: Store, seconds: float, gone: Set[str], dry_run: bool) -> int:
    count = 0
    for ended in _ended(store, seconds, TERMINAL):
        searches = {row.id for row in ended} - gone
        fine = EventRow.search_id.in_(searches) & EventRow.kind.in_(FINE_GRAINED)
        if dry_run:
            with reading(store.engine) as session:
                count += session.scalar(select(func.count()).where(fine)) or 0
            continue
        for page in pages(store.engine, select(EventRow.id).where(fine), EventRow.id):
            count += _delete_events(store, [row.id for row in page])
    return count


def _delete_events(store: Store, ids: Sequence[int]) -> int:
    ended = select(SearchRow.id).where(SearchRow.finished_at.is_not(None))  # one may be retried
    chosen = delete(EventRow).where(EventRow.id.in_(ids), EventRow.search_id.in_(ended))
    with writing(store.engine) as session:
        return len(session.execute(chosen.returning(EventRow.id)).all())


def _ended(store: Store, seconds: float, states: Collection[str]) -> Iterator[Sequence[Any]]:
    """Pages of (id, sequence) of searches that ended in one of `states` so many seconds ago."""
    ended = select(SearchRow.id, SearchRow.sequence).where(
        SearchRow.state.in_(states), SearchRow.finished_at < database_now() - seconds
    )
    return pages(store.engine, ended, SearchRow.sequence)


# --- searches


def _prune_searches(store: Store, seconds: float, dry_run: bool) -> tuple[Pruned, set[str]]:
    """(the searches and trials that were deleted, or would be, and the ids of these searches)."""
    gone: set[str] = set()
    trials = 0
    for ended in _ended(store, seconds, UNSUCCESSFUL):
        searches = [row.id for row in ended]
        with reading(store.engine) as session:
            chosen = sorted(set(searches) - _kept(session, searches))
            owned = select(func.count()).where(TrialRow.search_id.in_(chosen))
            trials += (session.scalar(owned) or 0) if dry_run else 0
        for search_id in chosen:
            deleted = 0 if dry_run else _delete_search(store, search_id, seconds)
            if deleted is not None:
                gone.add(search_id)
                trials += deleted
    return Pruned(searches=len(gone), trials=trials), gone


def _kept(session: Session, searches: Sequence[str]) -> set[str]:
    """Those of the searches that hold a result, or that something refers to."""
    named = SearchRow.request[("confirm", "search")].as_string()
    kept = set(session.scalars(_with_result(searches)))
    for reference in (TrialRow.reused_from, TrialRow.confirms):
        there = select(reference).where(reference.is_not(None)).scalar_subquery()
        query = select(_OWN.search_id).where(_OWN.search_id.in_(searches), _OWN.id.in_(there))
        kept |= set(session.scalars(query))
    return kept | {str(name) for name in session.scalars(select(named).where(named.in_(searches)))}


def _with_result(searches: Sequence[str]) -> Select[str]:
    query = select(TrialRow.search_id).distinct()
    return query.where(TrialRow.search_id.in_(searches), TrialRow.state == "complete")


def _delete_search(store: Store, search_id: str, seconds: float) -> int | None:
    """Delete a search with everything of its own; its trials, or None where it has to stay."""
    with writing(store.engine) as session:
        row = session.get(SearchRow, search_id, with_for_update=True)
        if row is None or row.state not in UNSUCCESSFUL or row.finished_at is None:
            return None  # retried, or deleted by another process
        # what nothing referred to has no new reference: these name completed trials
        has_result = session.scalar(_with_result([search_id])) is not None
        if has_result or row.finished_at >= rows.now(session) - seconds:
            return None
        trials = session.scalar(select(func.count()).where(TrialRow.search_id == search_id)) or 0
        _delete_row(session, search_id)
        return trials


def _delete_row(session: Session, search_id: str) -> None:
    """Delete a search; its trials, points, standings and events go with it."""
    session.execute(delete(SearchRow).where(SearchRow.id == search_id))
    for table in (BarRow, ScopeRow):
        session.execute(delete(table).where(table.scope == search_id))
