"""The dashboard: pages from templates and figures as JSON; it loads nothing from other sites."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, HTMLResponse
from fastapi.staticfiles import StaticFiles
from fastapi.templating import Jinja2Templates

from api.dashboard import figures
from api.declared import PUBLIC, READ, WITHOUT_STORE, Declared
from api.deps import Axis, SearchId, StoreDep, describe
from api.middleware.prefix import root_of
from nas.errors import InvalidInput, NotFound
from nas.records.device import OnDevice
from nas.service import answers
from nas.store import AXES, Standings
from nas.store.processes import LIVE_SECONDS, Processes

router = APIRouter(include_in_schema=False)
_HERE = Path(__file__).parent
STATIC = _HERE / "static"
templates = Jinja2Templates(
    _HERE / "templates", context_processors=[lambda request: {"root": root_of(request.scope)}]
)
#: Trials that the page's table shows.
_TABLE_ROWS = 500
_CACHE = {"Cache-Control": "public, max-age=86400"}


@router.get("/", dependencies=[READ], response_class=HTMLResponse)
def index(request: Request, store: StoreDep) -> Response:
    found = [describe(s).model_dump() for s in store.searches(limit=100)]
    return templates.TemplateResponse(request, "index.html", {"searches": found})


@router.get("/searches/{search_id}", dependencies=[READ], response_class=HTMLResponse)
def search_page(search_id: SearchId, request: Request, store: StoreDep) -> Response:
    search = store.search(search_id)
    recipe = search.request.settings
    shown = {
        "search": describe(search).model_dump(), "unit": recipe.loss_unit, "recipe": recipe.name,
        "axes": AXES, "plotly_styles": plotly_styles(),
    }  # fmt: skip
    return templates.TemplateResponse(request, "search.html", shown)


@router.get("/searches/{search_id}/live", dependencies=[READ])
def search_live(search_id: SearchId, store: StoreDep, x: Axis = "train_flops") -> Response:
    """Everything that the page of a search shows, as one JSON document."""
    answers.checked_axis(x)
    search = store.search(search_id)
    points, standings = store.curve_points(search_id=search_id), Standings(store)
    budget, unit = search.request.train_flops, search.request.settings.loss_unit
    place, shown = answers.measured_on(standings, search.id, x), points
    if AXES[x].measured:
        on_device = standings.trials_on(search.id, place.device) if place.device else set()
        shown = [p for p in points if p.run.trial_id in on_device]
    try:
        found = answers.get_best(store, search_id=search_id, train_flops=budget)
        best: dict[str, Any] | None = found.model_dump(mode="json")
    except (NotFound, InvalidInput):
        best = None  # nothing has completed yet, or nothing near the budget
    from plotly.utils import PlotlyJSONEncoder  # on first use: importing plotly is slow

    body = {
        "search": describe(search).model_dump(),
        "can_retry": store.can_retry(search_id),
        "best": best,
        "workers": sum(p.kind == "worker" for p in Processes(store).alive(LIVE_SECONDS)),
        "measured": OnDevice(**place.shown).model_dump(),
        "scatter": figures.draw_scatter(
            figures.scatter_data(shown, x), x, budget, unit, place.device
        ),
        "curves": figures.draw_curves(figures.curves_data(points), unit),
        "trials_total": sum(search.trial_counts.values()),
        "trials": [t.model_dump() for t in store.trials(search_id, limit=_TABLE_ROWS)],
    }
    return Response(
        json.dumps(body, cls=PlotlyJSONEncoder, allow_nan=False), media_type="application/json"
    )


class Files(StaticFiles):
    """The files that pages load: open to anyone, whatever the state of the database."""

    declared = Declared(scopes=None, needs_store=False)

    def __init__(self) -> None:
        super().__init__(directory=STATIC)

    def file_response(self, *given: Any, **options: Any) -> Response:
        response = super().file_response(*given, **options)
        # files keep their names over upgrades, so browsers must not cache them for long
        response.headers["Cache-Control"] = "public, max-age=3600"
        return response


@router.get("/static/plotly.min.js", dependencies=[PUBLIC, WITHOUT_STORE])
def plotly_script() -> Response:
    return FileResponse(_plotly(), media_type="text/javascript", headers=_CACHE)


def _plotly() -> Path:
    return Path(str(distribution("plotly").locate_file("plotly/package_data/plotly.min.js")))


@lru_cache(maxsize=1)
def plotly_styles() -> tuple[str, ...]:
    """Ids of the <style> elements that plotly.js would add for its maps.

    It adds none that is there already, and the pages' policy refuses inline styles, so the page has
    empty elements with these ids.  The ids are digests that change with plotly's version.
    """
    script = _plotly().read_text(encoding="utf-8")
    return tuple(dict.fromkeys(re.findall(r'getElementById\("([0-9a-f]{64})"\)', script)))
