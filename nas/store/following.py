"""Finds new events in the logs of many searches.

Event ids increase over all searches, but on PostgreSQL a transaction that began earlier may commit
later, so that a smaller id may become visible after a greater one.  Within one search that cannot
happen, because a writer to its log locks the search's row.  Each search is therefore followed by
its own newest id.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import islice

from sqlalchemy import func, select

from nas.records.search import SearchState
from nas.store.engine import reading
from nas.store.records import TERMINAL, Event
from nas.store.schema import EventRow, SearchRow
from nas.store.searches import Store

#: Searches of one statement: databases limit the number of its parameters.
_AT_ONCE = 1000
_EVENT = (EventRow.id, EventRow.search_id, EventRow.created_at, EventRow.kind, EventRow.data)


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
    """The heads of the searches that exist, in one statement for every thousand.

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
    left = iter(searches)
    with reading(store.engine) as session:
        while asked := list(islice(left, _AT_ONCE)):
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
                # plain rows: ORM objects are slower
                select(*_EVENT)
                .where(EventRow.search_id == search_id, EventRow.id > after, EventRow.id <= last)
                .order_by(EventRow.id)
                .limit(limit)
            )
            rows = session.execute(query)
            news[search_id] = [Event(r.id, r.search_id, r.created_at, r.kind, r.data) for r in rows]
        return news
