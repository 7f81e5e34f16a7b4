"""The list of searches: which are wanted, and what the page says of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Annotated, Any, get_args
from urllib.parse import urlencode

from fastapi import Depends, Query

from api.deps import TEXT, Cursor
from api.middleware.bodies import Absent
from nas.errors import span
from nas.records.progress import Overview
from nas.records.search import Search, SearchState
from nas.service.catalogue import checked_filters
from nas.store import Store
from nas.store.course import overviews

SEARCH_STATES = get_args(SearchState)
#: Searches of a page.
_ROWS = 50
#: States in which a row still changes.
_LIVE = ("queued", "running", "paused")
Filter = Annotated[str, Query(pattern=TEXT, max_length=200)]


@dataclass(frozen=True)
class Wanted:
    """Filters of the list, and the place after which it goes on; all are in its URL."""

    text: str | None = None
    state: str | None = None
    task: str | None = None
    #: "true": archived searches instead of the others
    archived: str | None = None
    before: int | None = None

    @property
    def filtered(self) -> bool:
        return any((self.text, self.state, self.task, self.archived))

    def url(self, **changes: Any) -> str:
        """The query of this list with changes."""
        given = vars(replace(self, **changes))
        return "?" + urlencode({name: value for name, value in given.items() if value})


def wanted_of(
    text: Filter = "", state: Filter = "", task: Filter = "", archived: Filter = "",
    before: Cursor | Absent = None,
) -> Wanted:  # fmt: skip
    """What a URL asks for; forms send empty texts for what is not filled in."""
    given = Wanted(text.strip() or None, state or None, task or None,
                   "true" if archived == "true" else None, before)  # fmt: skip
    checked_filters(state=given.state, task=given.task)
    return given


ListingDep = Annotated[Wanted, Depends(wanted_of)]


@dataclass(frozen=True)
class Row:
    """A search of the list; the cells are texts by name, those that change while it runs."""

    id: str
    search: Search
    created: str
    cells: dict[str, str]


@dataclass(frozen=True)
class Listing:
    """A page of the list."""

    rows: Sequence[Row]
    wanted: Wanted
    #: query of the next page, of older searches
    older: str | None

    @property
    def live(self) -> bool:
        """Whether a row may still change."""
        return any(row.search.state in _LIVE for row in self.rows)


def page(store: Store, wanted: Wanted) -> Listing:
    """The newest searches that are wanted."""
    found = store.searches(
        before=wanted.before, limit=_ROWS + 1, state=wanted.state, task=wanted.task,
        text=wanted.text, archived=wanted.archived is not None,
    )  # fmt: skip
    shown = found[:_ROWS]
    seen = overviews(store, shown)
    rows = [
        Row(s.id, s, f"{datetime.fromtimestamp(s.created_at, UTC):%Y-%m-%d %H:%M}",
            cells(s, seen[s.id]))
        for s in shown
    ]  # fmt: skip
    older = wanted.url(before=shown[-1].sequence) if len(found) > _ROWS else None
    return Listing(rows, wanted, older)


def cells(search: Search, seen: Overview) -> dict[str, str]:
    """What changes of a search, as texts."""
    complete, total = search.trial_counts.get("complete", 0), search.runs_total
    left = seen.seconds_left if search.state == "running" else None
    structured, dense = (
        "–" if loss is None else f"{loss:.4f}" for loss in (seen.structured, seen.dense)
    )
    return {
        "state": search.state,
        "structured": structured,
        "dense": dense,
        "runs": f"{complete:,} / {total:,}" if total else f"{complete:,}",
        "cost": f"{seen.trained_flops:.3g}" if seen.trained_flops else "–",
        "took": span(seen.held_seconds) if seen.held_seconds else "",
        "left": "" if left is None else f"about {span(left)} left",
    }
