"""The table of a search's trials: which are wanted, all of it in the page's URL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, get_args

from fastapi import Depends, Query
from pydantic import Field

from api.deps import MAX_ID, TEXT
from api.middleware.bodies import WHOLE
from nas.errors import InvalidInput
from nas.records.trial import TrialState
from nas.store import Store
from nas.store.following import changed_runs, read_heads
from nas.store.table import SORTS, trial_page

TRIAL_STATES = get_args(TrialState)
#: Trials of a page.
_ROWS = 100
#: Columns: heading, what stands below it, what the column sorts by, whether it holds numbers.
COLUMNS = {
    "number": ("#", "", "number", True),
    "structure": ("Structure", "", "name", False),
    "theta": ("θ", "α β γ · δ ε φ · ρ", "", False),
    "state": ("State", "", "state", False),
    "loss": ("Loss", "measured", "loss", True),
    "width": ("Width", "", "width", True),
    "steps": ("Steps", "", "steps", True),
    "train_flops": ("Train FLOPs", "", "train_flops", True),
    "params": ("Parameters", "", "params", True),
    "seconds": ("Time of a step", "ms, measured", "seconds_per_step", True),
}
#: Events after which a page is told all, instead of what changed.
_MOST_EVENTS = 2000
#: The newest event that a page knows of.
Since = Annotated[Annotated[int, Field(ge=0, le=MAX_ID), WHOLE] | None, Query()]
Text = Annotated[str, Query(pattern=TEXT, max_length=200)]
Page = Annotated[int, Query(ge=1, le=1_000_000), WHOLE]


def news_of(store: Store, search_id: str, since: int | None) -> tuple[int, set[int] | None]:
    """The newest event of a search, and the runs that may differ since an earlier one.

    None of them where all may.  To be asked before anything else is read: what comes later is then
    told the next time.
    """
    heads = read_heads(store, [search_id])
    last = heads[search_id].last if heads else 0
    if since is None or since > last:  # later: of a database that is there no more
        return last, None
    return last, changed_runs(store, search_id, since, last, limit=_MOST_EVENTS)


@dataclass(frozen=True)
class Rows:
    """What of the trials is wanted."""

    sort: str
    down: bool
    state: str | None
    text: str | None
    page: int

    def of(self, store: Store, search_id: str, since: int | None = None) -> dict[str, Any]:
        """The trials of the page that is wanted, and how many there are.

        Parameters
        ----------
        since
            The `last` of an earlier page: of the trials in `order` those that changed alone.
        """
        last, changed = news_of(store, search_id, since)
        found, total = trial_page(
            store, search_id, sort=self.sort, down=self.down, state=self.state, text=self.text,
            offset=(self.page - 1) * _ROWS, limit=_ROWS,
        )  # fmt: skip
        return {
            "last": last,
            "order": [t.id for t in found],
            "trials": [t.model_dump() for t in found if changed is None or t.id in changed],
            "total": total,
            "pages": max(1, -(-total // _ROWS)),
        }


def rows_of(sort: Text = "number", state: Text = "", text: Text = "", page: Page = 1) -> Rows:
    """What a URL asks for; a sort that begins with ``-`` puts the greatest first."""
    by = sort.removeprefix("-")
    if by not in SORTS:
        raise InvalidInput(
            "sort", sort, f"{' | '.join(SORTS)}, with - before it the greatest first"
        )
    if state and state not in TRIAL_STATES:
        raise InvalidInput("state", state, " | ".join(TRIAL_STATES))
    return Rows(by, sort != by, state or None, text.strip() or None, page)


RowsDep = Annotated[Rows, Depends(rows_of)]
