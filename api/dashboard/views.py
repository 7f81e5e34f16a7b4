"""Pages about searches beside their own: analysis, log, and several of them compared."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import Field

from api.dashboard import compare, insight
from api.dashboard.pages import templates
from api.declared import READ
from api.deps import MAX_ID, TEXT, SearchId, StoreDep
from api.middleware.bodies import WHOLE
from nas.service.compare import FEWEST
from nas.store import Store
from nas.store.table import outcomes

router = APIRouter(include_in_schema=False)
#: Entries of a page of the log, and searches that the page of comparisons offers.
_ENTRIES, _OFFERED = 200, 20
#: What each figure shows.
_MEANS = {
    "related": "Kendall's τ between each quantity and the loss of completed candidates, with its "
    "95% interval where there are five or more: −1 where more of it always goes with a lower "
    "loss, +1 with a higher one. It tells what goes together, not what causes what.",
    "parallel": "Each line is a completed candidate, from the least to the greatest value of each "
    "axis, in fifths by loss. A click on a fifth in the legend hides it.",
    "course": "How much the front dominated after so much compute: the area between it and its "
    "own worst corner in the end, over decades of train FLOPs and the loss. Measured.",
    "timeline": "Each bar is a run, from its first start to its end; there are as many rows as "
    "runs at once. The bar of a paused run covers its pauses.",
}
Ids = Annotated[str, Query(pattern=TEXT, max_length=400)]
Each = Annotated[
    list[Annotated[str, Field(pattern=TEXT, min_length=1, max_length=64)]],
    Query(alias="id", max_length=20, default_factory=list),
]
After = Annotated[int, Query(ge=0, le=MAX_ID), WHOLE]


@router.get("/searches/{search_id}/analysis", dependencies=[READ], response_class=HTMLResponse)
def analysis(search_id: SearchId, request: Request, store: StoreDep) -> Response:
    search = store.search(search_id)
    shown = {
        "search": search, "figures": _figures(store, search_id, search.request.settings.loss_unit),
        "total": sum(search.trial_counts.values()), "most": insight.MOST,
    }  # fmt: skip
    return templates.TemplateResponse(request, "analysis.html", shown)


def _figures(store: Store, search_id: str, unit: str) -> list[dict[str, Any]]:
    """Those of which there is something to show, each with what it means."""
    trials = outcomes(store, search_id, insight.MOST)
    found = insight.quantities(trials)
    related = insight.correlations(found)
    grown = insight.course(trials, store.cloud(search_id, "train_flops"))
    begun = insight.lanes(trials, datetime.now(UTC).timestamp())
    drawn = {
        "related": insight.draw_correlations(related) if related else None,
        "parallel": insight.draw_parallel(found, unit) if len(found.loss) > 1 else None,
        "course": insight.draw_course(grown, unit) if len(grown.spent) > 1 else None,
        "timeline": insight.draw_timeline(begun) if begun else None,
    }
    means = dict(_MEANS)
    if len(begun) == insight.BARS:
        means["timeline"] += f" Shown are the {insight.BARS:,} runs that began last."
    if found.left_out:
        left_out = f" Left out: {found.left_out:,} completed candidates that are no product of two"
        for name in ("related", "parallel"):
            means[name] += f"{left_out} factors."
    return [
        {"name": name, "drawn": figure, "means": means[name]}
        for name, figure in drawn.items()
        if figure is not None
    ]


@router.get("/searches/{search_id}/log", dependencies=[READ], response_class=HTMLResponse)
def log(search_id: SearchId, request: Request, store: StoreDep, after: After = 0) -> Response:
    search = store.search(search_id)
    found = store.events(search_id, after=after, limit=_ENTRIES)
    events = [
        {"at": f"{datetime.fromtimestamp(e.created_at, UTC):%Y-%m-%d %H:%M:%S}", "kind": e.kind,
         "data": e.data}
        for e in found
    ]  # fmt: skip
    shown = {
        "search": search, "events": events, "after": after,
        "next": found[-1].id if len(found) == _ENTRIES else None,
    }  # fmt: skip
    return templates.TemplateResponse(request, "log.html", shown)


@router.get("/compare", dependencies=[READ], response_class=HTMLResponse)
def compare_page(
    request: Request,
    store: StoreDep,
    each: Each,
    ids: Ids = "",
) -> Response:
    """Searches side by side; with fewer than two of them, a form to choose."""
    given = [*each, *compare.split(ids)]
    shown: dict[str, Any] = {"ids": ", ".join(i[:8] for i in given)}
    if len(set(given)) < FEWEST:
        newest = store.searches(limit=_OFFERED)
        shown |= {"newest": newest if len(newest) > 1 else [], "chosen": given}
        return templates.TemplateResponse(request, "compare.html", shown)
    compared = compare.compare(store, compare.chosen(store, given))
    shown |= {
        "compared": compared, "rows": compare.table(compared),
        "figure": compare.draw_fronts(compared),
        "units": sorted({c.front.y_unit for c in compared}),
        "comparable": compare.comparable(compared),
    }  # fmt: skip
    return templates.TemplateResponse(request, "compare.html", shown)
