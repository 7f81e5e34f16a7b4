"""The dashboard: pages from templates and figures as JSON; it loads nothing from other sites."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, get_args
from urllib.parse import urlencode

import numpy as np
from cachetools import LRUCache, cached
from fastapi import APIRouter, Query, Request, Response
from fastapi import Path as PathField
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles
from fastapi.templating import Jinja2Templates
from pydantic import Field

from api.dashboard import detail, figures, listing, plotly_js, table
from api.dashboard.listing import SEARCH_STATES, Filter, ListingDep
from api.declared import READ, Declared
from api.deps import MAX_ID, TEXT, Axis, Budget, Dimension, SearchId, StoreDep, describe
from api.middleware.bodies import WHOLE
from api.middleware.prefix import root_of
from nas.analysis.diagram import network, svg
from nas.designs.design import design_forms, inspect_design, parse_design, proposals
from nas.errors import InvalidInput, NotFound
from nas.planning.cost import linears, structures_of
from nas.planning.request import Objective, Sampler, SearchRequest, Stopping
from nas.planning.tasks import task_names
from nas.records.device import OnDevice
from nas.service import answers
from nas.service.catalogue import checked_filters, search_detail
from nas.store import AXES, CurvePoint, Run, Standings, Store
from nas.store.processes import LIVE_SECONDS, Processes
from nas.store.searches import Cloud
from nas.store.weights import weights_of

router = APIRouter(include_in_schema=False)
#: The search whose request a form begins with.
Source = Annotated[
    Annotated[str, Field(pattern=TEXT, min_length=1, max_length=64)] | None, Query(alias="from")
]
TrialId = Annotated[int, Field(ge=0, le=MAX_ID), WHOLE, PathField()]
DesignText = Annotated[str, Query(pattern=TEXT, min_length=1, max_length=4096)]
_CHOICES = {"samplers": Sampler, "rules": Stopping, "objectives": Objective}
_HERE = Path(__file__).parent
STATIC = _HERE / "static"
templates = Jinja2Templates(
    _HERE / "templates", context_processors=[lambda request: {"root": root_of(request.scope)}]
)
templates.env.globals["plotly_styles"] = plotly_js.styles
# four digits, as the scripts and the command line take them: 2e11
templates.env.filters["short"] = lambda value: f"{value:.4g}".replace("e+", "e")
#: Searches on an axis whose figures are kept.
_KEPT_FIGURES = 16
#: Runs of a model that the page of one of them lists.
_REPEATS = 20


@router.get("/", dependencies=[READ], response_class=HTMLResponse)
def index(request: Request, store: StoreDep, wanted: ListingDep) -> Response:
    shown = {"listing": listing.page(store, wanted), "states": SEARCH_STATES, "tasks": task_names()}
    return templates.TemplateResponse(request, "index.html", shown)


@router.get("/searches", dependencies=[READ])
def index_live(store: StoreDep, wanted: ListingDep) -> Response:
    """The cells of the index that change."""
    found = listing.page(store, wanted)
    rows = {row.id: row.cells for row in found.rows}
    return Response(json.dumps(rows), media_type="application/json")


@router.get("/new", dependencies=[READ], response_class=HTMLResponse)
def new_search(
    request: Request, store: StoreDep, source: Source = None, task: Filter = ""
) -> Response:
    """A form for a search, empty, of a task, or with the request of another one."""
    given = (
        checked_filters(**{"task": task} if task else {})
        if source is None
        else store.search(source).request.model_dump(mode="json", exclude_defaults=True)
    )
    given.pop("confirm", None)
    shown = {
        "tasks": task_names(), "families": list(proposals()), "given": given, "source": source,
        **{name: get_args(kind) for name, kind in _CHOICES.items()},
    }  # fmt: skip
    return templates.TemplateResponse(request, "new.html", shown)


@router.get("/searches/{search_id}", dependencies=[READ], response_class=HTMLResponse)
def search_page(search_id: SearchId, request: Request, store: StoreDep) -> Response:
    search = store.search(search_id)
    recipe = search.request.settings
    x, budget = (request.query_params.get(name, "") for name in ("x", "budget"))
    asked = {"x": x if x in AXES else next(iter(AXES))} | ({"budget": budget} if budget else {})
    shown = {
        # what its script asks for first, so that the browser begins while it reads the scripts
        "asked": urlencode(asked),
        "search": describe(search).model_dump(), "unit": recipe.loss_unit, "recipe": recipe.name,
        "axes": AXES, "rule": search.request.stopping_rule,
        "columns": table.COLUMNS, "trial_states": table.TRIAL_STATES,
    }  # fmt: skip
    return templates.TemplateResponse(request, "search.html", shown)


@router.get("/searches/{search_id}/rows", dependencies=[READ])
def search_rows(
    search_id: SearchId, store: StoreDep, wanted: table.RowsDep, since: table.Since = None
) -> Response:
    """A page of the table of a search's trials."""
    found = wanted.of(store, search_id, since)
    return Response(json.dumps(found, allow_nan=False), media_type="application/json")


@router.get("/searches/{search_id}/live", dependencies=[READ])
def search_live(
    search_id: SearchId,
    store: StoreDep,
    x: Axis = "train_flops",
    budget: Annotated[Budget, Query()] = None,
    since: table.Since = None,
) -> Response:
    body = live_document(store, search_id, x, budget, since)
    return Response(json.dumps(body, allow_nan=False), media_type="application/json")


def live_document(
    store: Store,
    search_id: str,
    x: str = "train_flops",
    budget: float | None = None,
    since: int | None = None,
) -> dict[str, Any]:
    """What the page of a search shows but for its table: plain values, among them figures as
    plotly's JSON.

    Parameters
    ----------
    budget
        Train FLOPs of a run within which the best is asked for; by default the search's own.
    since
        The `last` of an earlier document: of traces of runs the points of the runs in `changed`
        alone, which are all that may differ from it.  Where more may, `changed` is None.
    """
    answers.checked_axis(x)
    search = store.search(search_id)
    last, changed = table.news_of(store, search_id, since)
    budget = search.request.train_flops if budget is None else budget
    found = _figures(search.id, x, last, store, search.request)
    try:
        answer = answers.get_best(store, search_id=search_id, train_flops=budget)
        best: dict[str, Any] | None = answer.model_dump(mode="json")
    except (NotFound, InvalidInput):
        # nothing has completed yet, or nothing near the budget
        best = None if found["curves_total"] else _published(search.request)
    scatter, curves = figures.at_budget(found["scatter"], x, budget), found["curves"]
    if changed is not None:
        scatter, curves = (figures.only_of(figure, changed) for figure in (scatter, curves))
    return {
        **found,
        "scatter": scatter,
        "curves": curves,
        "last": last,
        "changed": None if changed is None else sorted(changed),
        "search": search_detail(store, search),
        "budget": budget,
        "can_retry": store.can_retry(search_id),
        "best": best,
        "workers": sum(p.kind == "worker" for p in Processes(store).alive(LIVE_SECONDS)),
    }


@cached(LRUCache(_KEPT_FIGURES), key=lambda *given: given[:3], lock=Lock())
def _figures(
    search_id: str, x: str, last: int, store: Store, request: SearchRequest
) -> dict[str, Any]:
    """Both figures of a search, with what there is to tell of them: the same until its log grows
    beyond `last`."""
    standings, along = Standings(store), store.cloud(search_id, "train_flops")
    place, cloud = answers.measured_on(standings, search_id, x), along
    if x != "train_flops":
        cloud = store.cloud(search_id, x)
    if AXES[x].measured:
        on_device = standings.trials_on(search_id, place.device) if place.device else set()
        cloud = cloud[np.isin(cloud["trial_id"], list(on_device))]
    dots = places(cloud[detail.shown(cloud)])
    lines = places(along[detail.lowest_runs(along, figures.SHOWN_CURVES)])
    points = store.curve_points(search_id=search_id, at=dots | lines)
    shown, unit = figures.scatter_data(_at(points, dots), x), request.settings.loss_unit
    return {
        "budgets": _budgets(along, request.train_flops),
        "measured": OnDevice(**place.shown).model_dump(),
        "scatter": figures.draw_scatter(shown, x, unit, place.device),
        "points_shown": len(dots),
        "points_total": len(cloud),
        "curves": figures.draw_curves(figures.curves_data(_at(points, lines)), unit),
        "curves_total": len(np.unique(along["trial_id"])),
    }


@router.get("/searches/{search_id}/laws", dependencies=[READ])
def search_laws(search_id: SearchId, store: StoreDep) -> Response:
    """The lines of the power laws of the fronts, which take longer than all the rest."""
    front = answers.get_frontier(store, search_id=search_id)
    traces = figures.draw_laws(front.structured_law, front.dense_law)
    return Response(json.dumps(traces), media_type="application/json")


def _budgets(along: Cloud, own: float) -> tuple[float, float] | None:
    """The least and the greatest budget that completed runs answer for; None before the first."""
    reached = along["x"][along["complete"]]
    if not len(reached):
        return None
    low, high = float(reached.min()), max(own, float(reached.max()))
    return (low, high) if low < high else None


def places(cloud: Cloud) -> set[tuple[int, int]]:
    """(trial, step) of points."""
    return set(zip(cloud["trial_id"].tolist(), cloud["step"].tolist(), strict=True))


def _at(points: Sequence[CurvePoint], places: set[tuple[int, int]]) -> list[CurvePoint]:
    return [p for p in points if (p.run.trial_id, p.step) in places]


def _published(request: SearchRequest) -> dict[str, Any] | None:
    """What a published table says of a search on a task's default data, until it has own runs."""
    if request.data is not None:
        return None
    try:
        found = answers.published_answer(request.task, "train_flops", request.train_flops)
    except NotFound:
        return None
    return found.model_dump(mode="json")


@router.get("/trials/{trial_id}", dependencies=[READ], response_class=HTMLResponse)
def trial_page(trial_id: TrialId, request: Request, store: StoreDep) -> Response:
    trial = store.trial(trial_id)
    search, curve = store.search(trial.search_id), store.curve(trial_id)
    recipe = search.request.settings
    run = Run.of(trial)
    points = [CurvePoint(p.step, p.train_flops, p.loss, p.loss_stderr, p.train_seconds, run=run)
              for p in curve]  # fmt: skip
    design = parse_design(trial.design)
    shown = {
        "trial": trial.model_dump(), "search": search, "unit": recipe.loss_unit, "curve": curve,
        "layers": [
            {"name": role.name or "linear", "d_in": role.d_in, "d_out": role.d_out, "macs": s.macs,
             "params": s.params, "dense_macs": role.d_in * role.d_out}
            for role, s in zip(
                linears(recipe, trial.width), structures_of(recipe, design, trial.width),
                strict=True,
            )
        ],
        "figure": figures.draw_curves(figures.curves_data(points), recipe.loss_unit),
        "weights": weights_of(store, trial_id),
        "others": [t for t in store.repeats_of(trial, _REPEATS) if t.id != trial.id],
        }  # fmt: skip
    return templates.TemplateResponse(request, "trial.html", shown)


@router.get("/structures", dependencies=[READ], response_class=HTMLResponse)
def structure_page(
    request: Request, theta: DesignText = "btt", d_in: Dimension = 64, d_out: Dimension = 256
) -> Response:
    """A structure of one layer: its network, sizes and costs, and code that uses it."""
    found = inspect_design(parse_design(theta), d_in, d_out)
    shown = {
        "theta": theta, "d_in": d_in, "d_out": d_out, "found": found, "forms": design_forms(),
        "drawn": network(found) is not None,
    }  # fmt: skip
    return templates.TemplateResponse(request, "structure.html", shown)


@router.get("/structures/network.svg", dependencies=[READ])
def structure_network(theta: DesignText, d_in: Dimension, d_out: Dimension) -> Response:
    drawn = network(inspect_design(parse_design(theta), d_in, d_out))
    if drawn is None:
        raise NotFound(f"no network of {theta!r}: it is no product of factors")
    return Response(svg(drawn, f"{theta}, {d_in} → {d_out}"), media_type="image/svg+xml")


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
