"""How far the logs of many searches have come, and what is new in them.

Ids of events grow over all searches, but on PostgreSQL a transaction that began earlier may commit
later, so that an id appears behind a greater one.  Within a search that cannot be: whoever writes
to its log holds the search's row.  Hence every search is followed by its own newest id.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import islice

from sqlalchemy import func, select

from nas.store.engine import reading
from nas.store.records import TERMINAL, Event, SearchState
from nas.store.schema import EventRow, SearchRow
from nas.store.searches import Store

#: Searches that one statement asks about: databases limit the parameters of a statement.
_AT_ONCE = 1000
_EVENT = (EventRow.id, EventRow.search_id, EventRow.created_at, EventRow.kind, EventRow.data)


@dataclass(frozen=True, slots=True)
class Head:
    """How far the log of a search has come; state and log are of the same moment."""

    state: SearchState
    #: id of the newest event; 0 in an empty log
    last: int

    @property
    def ended(self) -> bool:
        """Whether nothing follows `last`, unless the search is tried again."""
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
    """The events of each search past the first id of its span up to the last, oldest first.

    Parameters
    ----------
    limit
        Of the events of one search.

    Raises
    ------
    StoreUnavailable
        The database does not answer.
    """
    with reading(store.engine) as session:
        news = {}
        for search_id, (after, last) in spans.items():
            query = (
                # plain rows: objects that are tracked cost more
                select(*_EVENT)
                .where(EventRow.search_id == search_id, EventRow.id > after, EventRow.id <= last)
                .order_by(EventRow.id)
                .limit(limit)
            )
            rows = session.execute(query)
            news[search_id] = [Event(r.id, r.search_id, r.created_at, r.kind, r.data) for r in rows]
        return news
