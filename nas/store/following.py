"""Finds new events in the logs of many searches.

Event ids increase over all searches, but on PostgreSQL a transaction that began earlier may commit
later, so that a smaller id may become visible after a greater one.  Within one search that cannot
happen, because a writer to its log locks the search's row.  Each search is therefore followed by
its own newest id.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sqlalchemy import func, select

from nas.records.search import SearchState
from nas.store.engine import pieces, reading
from nas.store.records import TERMINAL, Event
from nas.store.schema import EventRow, SearchRow, TrialRow
from nas.store.searches import Store

#: Kinds of events after which the points of no other run than the one that they name differ, or of
#: none.
_OF_A_RUN = {
    "point", "trial_planned", "trial_started", "trial_paused", "trial_complete", "trial_stopped",
    "trial_failed", "round", "labels", "priority",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Head:
    """The end of a search's log, and the search's state at the same moment."""

    state: SearchState
    #: id of the newest event; 0 in an empty log
    last: int

    @property
    def ended(self) -> bool:
        """Whether no event will follow `last`, unless the search is retried."""
        return self.state in TERMINAL


def read_heads(store: Store, searches: Collection[str]) -> dict[str, Head]:
    """The heads of the searches that exist, in one statement for every few hundred.

    Raises
    ------
    StoreUnavailable
        The database does not answer.
    """
    last = (
        select(func.max(EventRow.id))
        .where(EventRow.search_id == SearchRow.id)
        .correlate(SearchRow)
        .scalar_subquery()
    )
    heads: dict[str, Head] = {}
    with reading(store.engine) as session:
        for asked in pieces(list(searches)):
            query = select(SearchRow.id, SearchRow.state, last).where(SearchRow.id.in_(asked))
            for search_id, state, newest in session.execute(query):
                heads[search_id] = Head(state, newest or 0)
    return heads


def read_news(
    store: Store, spans: Mapping[str, tuple[int, int]], *, limit: int
) -> dict[str, list[Event]]:
    """The events of each search after the first id of its span, up to the last, oldest first.

    Parameters
    ----------
    limit
        Most events of one search.

    Raises
    ------
    StoreUnavailable
        The database does not answer.
    """
    with reading(store.engine) as session:
        news = {}
        for search_id, (after, last) in spans.items():
            query = (
                select(*EventRow.__table__.columns)  # plain rows: ORM objects are slower
                .where(EventRow.search_id == search_id, EventRow.id > after, EventRow.id <= last)
                .order_by(EventRow.id)
                .limit(limit)
            )
            news[search_id] = [Event(**row._mapping) for row in session.execute(query)]
        return news


def changed_runs(
    store: Store, search_id: str, since: int, last: int, *, limit: int
) -> set[int] | None:
    """Ids of the trials whose points may differ from those at an event of the search's log.

    None where more than the runs that the log names may differ, and after more than `limit` events.

    Parameters
    ----------
    since, last
        Ids of that event, and of the newest one that is looked at.
    """
    news = read_news(store, {search_id: (since, last)}, limit=limit + 1)[search_id]
    if len(news) > limit or any(e.kind not in _OF_A_RUN for e in news):
        return None
    numbers = {e.data["number"] for e in news if "number" in e.data}
    found: set[int] = set()
    with reading(store.engine) as session:
        for asked in pieces(sorted(numbers)):
            query = select(TrialRow.id).where(
                TrialRow.search_id == search_id, TrialRow.number.in_(asked)
            )
            found |= set(session.scalars(query))
    return found
