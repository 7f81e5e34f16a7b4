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
from nas.store.schema import EventRow, SearchRow
from nas.store.searches import Store


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
