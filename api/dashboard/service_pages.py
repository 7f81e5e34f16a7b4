"""Pages about more than one search: tasks, the space, the queue, operation, the reference."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import HTMLResponse

from api.auth import RequestContext
from api.dashboard import detail, figures, space
from api.dashboard.pages import places, templates
from api.declared import ADMIN, READ, Caller, NotAllowed
from api.deps import TEXT, Axis, Budget, Cursor, StoreDep, Text
from api.middleware.bodies import Absent
from api.problems import HANDLERS
from nas.designs.design import parse_design
from nas.errors import InvalidInput, NotFound, span
from nas.planning.tasks import task_names
from nas.records.answers import Answer, Candidate
from nas.service import answers, catalogue
from nas.service.published import table_of
from nas.store import AXES, Standings, Store, task_scope
from nas.store.audit import Audit
from nas.store.keys import Keys
from nas.store.processes import LIVE_SECONDS, Processes
from nas.store.queue import read_queue
from nas.store.sampling import sample_runs
from nas.store.tenants import all_use

router = APIRouter(include_in_schema=False)
TaskName = Annotated[str, Path(pattern=TEXT, min_length=1, max_length=200)]
#: Searches that wait, and that run, and records of the audit log, on a page.
_QUEUED, _RECORDS = 100, 50
#: Runs that the table beside the figures of the space lists.
_LOWEST = 20
#: Structures that the page of a task lists before the others.
_RIVALS = 12
#: Budget of an answer about a task without runs: that of a search on the first pages.
_FIRST_BUDGET = 2e11


def _utc(seconds: float | None) -> str:
    """A time for reading, in UTC; a dash for none."""
    if seconds is None:
        return "–"
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M}"


def _signed(value: float) -> str:
    """A difference for reading.

    >>> _signed(-0.5)
    '−0.5000'
    """
    return f"{value:+.4f}".replace("-", "−")


def _value(value: Any) -> str:
    """A value of a record for reading; of a mapping its names and values.

    >>> _value({"device": "cpu", "rate": 0.25, "bf16": False})
    'device cpu, rate 0.25, bf16 no'
    """
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value(one)}" for name, one in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


templates.env.filters |= {"utc": _utc, "span": span, "signed": _signed, "value": _value}


@router.get("/tasks", dependencies=[READ], response_class=HTMLResponse)
def tasks_page(request: Request, store: StoreDep) -> Response:
    """Every task with its budgets, and what is measured on each of its data."""
    found = catalogue.get_tasks(store)
    standings = Standings(store)
    scopes = {
        (task["name"], data["fingerprint"]): task_scope(
            task["name"], data["fingerprint"], store.tenant
        )
        for task in found
        for data in task["fingerprints"]
    }
    shown = {
        "published": [task for task in task_names() if table_of(task) is not None],
        "tasks": found, "scopes": scopes, "states": standings.states(list(scopes.values())),
        "losses": standings.lowest_losses(list(scopes.values())),
    }  # fmt: skip
    return templates.TemplateResponse(request, "tasks.html", shown)


@router.get("/tasks/{task}", dependencies=[READ], response_class=HTMLResponse)
def task_page(
    task: TaskName,
    request: Request,
    store: StoreDep,
    train_flops: Annotated[Budget, Query()] = None,
    x: Axis = "train_flops",
) -> Response:
    """The fronts over all searches of a task, and the answer at one budget."""
    answers.checked_axis(x)
    shown: dict[str, Any] = {
        "task": task,
        "x": x,
        "axes": AXES,
        "first": _RIVALS,
    }
    budget = train_flops or _FIRST_BUDGET
    try:
        scope = answers.resolve_scope(store, task, None)
        state = Standings(store).state(scope.name)
        if state is None or not state.trials:
            raise answers.NothingMeasured(f"no run on task {scope.label} has completed yet")
        budget = train_flops or state.greatest_flops or budget
        shown |= {"scope": scope, "state": state, **_front(store, scope, x, budget)}
    except answers.NothingMeasured as error:
        shown["nothing"] = str(error)
    status = 200
    try:
        shown["best"] = best = answers.get_best(store, task=task, train_flops=budget)
        shown["rivals"] = _rivals(best)
    except NotFound as error:
        shown["refusal"] = str(error)
    except InvalidInput as error:
        shown["refusal"], status = str(error), 422
    return templates.TemplateResponse(
        request, "task.html", {**shown, "budget": budget}, status_code=status
    )


def _front(store: Store, scope: answers.Scope, x: str, budget: float) -> dict[str, Any]:
    """The figure of a task: its fronts, and the points of the models near them."""
    standings = Standings(store)
    place = answers.measured_on(standings, scope.name, x)
    cloud = standings.cloud(place.scope, x)
    points = store.curve_points(
        task=scope.task, fingerprint=scope.fingerprint, at=places(cloud[detail.shown(cloud)])
    )
    data = figures.scatter_data(points, x)
    figure = figures.draw_scatter(data, x, scope.loss_unit, place.device)
    figure = figures.at_budget(figure, x, budget)
    return {"figure": figure, "points_shown": len(points), "place": place}


def _rivals(best: Answer) -> list[dict[str, Any]]:
    """The best structured run, the best dense one, and those not told apart, as rows."""
    known = (("best structured", best.best_structured), ("best dense", best.best_dense))
    found: list[tuple[str, Candidate]] = [(what, run) for what, run in known if run is not None]
    found += [("not told apart from the best", run) for run in best.indistinguishable]
    return [
        {"what": what, "run": run, "name": parse_design(run.design).described}
        for what, run in found
    ]


@router.get("/space", dependencies=[READ], response_class=HTMLResponse)
def space_page(
    request: Request, store: StoreDep, task: Text = None, search: Text = None
) -> Response:
    """ω, ψ, ν and θ of the completed runs of a task or a search; by default of the first task that
    has any."""
    if task is None and search is None:
        task = next((name for name in task_names() if _is_measured(store, name)), None)
    shown: dict[str, Any] = {"tasks": task_names(), "task": task, "search": search}
    if task is not None or search is not None:
        try:
            scope = answers.resolve_scope(store, task, search)
        except answers.NothingMeasured as error:
            shown["nothing"] = str(error)
        else:
            found = sample_runs(store, scope.name, space.MOST_RUNS)
            placed = space.places(found.runs)
            shown |= {
                "scope": scope, "sample": found, "lowest": placed[:_LOWEST],
                "figures": space.figures_of(placed, scope.loss_unit) if placed else {},
            }  # fmt: skip
    return templates.TemplateResponse(request, "space.html", shown)


def _is_measured(store: Store, task: str) -> bool:
    try:
        answers.resolve_scope(store, task, None)
    except answers.NothingMeasured:
        return False
    return True


@router.get("/workers", dependencies=[READ], response_class=HTMLResponse)
def workers_page(request: Request, store: StoreDep) -> Response:
    """Workers, the queue and what runs: for readers their tenant's part of it."""
    caller: Caller = request.state.caller
    admin = "admin" in caller.scopes
    everything: Store = request.app.state.store
    alive = Processes(everything).alive(LIVE_SECONDS)
    workers = [p for p in alive if p.kind == "worker"]
    states = [p.state for p in workers]
    queue = read_queue(everything if admin else store, _QUEUED)
    shown = {
        "admin": admin, "queue": queue, "workers": workers, "live_seconds": LIVE_SECONDS,
        "counts": {state: states.count(state) for state in dict.fromkeys(states)},
        "services": sum(p.kind == "api" for p in alive),
        "tenant": store.tenant,
    }  # fmt: skip
    return templates.TemplateResponse(request, "workers.html", shown)


@router.get("/admin", dependencies=[ADMIN], response_class=HTMLResponse)
def admin_page(request: Request, before: Annotated[Cursor | Absent, Query()] = None) -> Response:
    """Keys without their secrets, tenants with their quotas, and the audit log."""
    store: Store = request.app.state.store
    found = Audit(store).entries(before=before, limit=_RECORDS)
    shown = {
        "keys": Keys(store).list(), "now": time.time(), "uses": all_use(store), "records": found,
        "before": before, "older": found[-1].id if len(found) == _RECORDS else None,
        "access_control": request.app.state.access_control,
    }  # fmt: skip
    return templates.TemplateResponse(request, "admin.html", shown)


@router.get("/reference", dependencies=[READ], response_class=HTMLResponse)
def reference_page(request: Request) -> Response:
    """The operations of the REST interface, from the OpenAPI document."""
    document = request.app.openapi()
    shown = {"operations": list(_operations(document["paths"])), "about": document["info"]}
    return templates.TemplateResponse(request, "reference.html", shown)


def _operations(paths: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Each operation of an OpenAPI document as the page shows it."""
    for path, its in paths.items():
        for method, operation in its.items():
            needed = [s for one in operation.get("security", ()) for s in one.get("key", ())]
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            yield {
                "method": method.upper(), "path": path, "summary": operation.get("summary", ""),
                "scopes": needed, "parameters": operation.get("parameters", ()),
                "fields": _fields(body.get("schema", {})),
                "statuses": _statuses(operation.get("responses", {})),
            }  # fmt: skip


def _fields(schema: Mapping[str, Any]) -> list[str]:
    required = schema.get("required", ())
    return [f"{name}*" if name in required else name for name in schema.get("properties", {})]


def _statuses(found: Iterable[str]) -> str:
    return ", ".join(sorted(str(status) for status in found))


def not_allowed(request: Request, error: Exception) -> Response:
    """403: a page for a browser that asks for one, a problem document for programs."""
    if not RequestContext(request.scope).is_page:
        told: Response = HANDLERS[NotAllowed](request, error)
        return told
    return templates.TemplateResponse(request, "refused.html", {"why": str(error)}, status_code=403)
