"""The REST routes: thin, with neither SQL nor science."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, get_args

from anyio import CapacityLimiter, to_thread
from asgi_correlation_id import correlation_id
from fastapi import APIRouter, Depends, Header, HTTPException, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import Field
from pydantic_core import to_json

from api.auth import Caller
from api.caching.cache import AnswerCache, CachedAnswer
from api.limits.fair_queue import release_slot
from api.middleware.bodies import REAL, WHOLE, Absent, read_json, read_strictly
from api.middleware.prefix import root_of
from api.problems import OF_BODIES, RETRY_AFTER_SECONDS, refusals
from api.reference import (
    BEST_RULES,
    CONFIRM_BODY,
    CONFIRM_RULES,
    FRONTIER_RULES,
    MADE,
    SEARCH_BODY,
    SEARCH_FOUND,
    SEARCH_RULES,
    SEARCHES_FOUND,
    STRUCTURE_RULES,
    TRIALS_FOUND,
)
from api.schemas import (
    Preview,
    SearchOut,
    SearchPage,
    StructureOut,
    TaskList,
    TrialDetail,
    TrialPage,
)
from nas.designs.design import design_forms, inspect_design, parse_design
from nas.designs.structure import MAX_DIMENSION, Sizing
from nas.errors import InvalidInput
from nas.planning.recipe import Recipe
from nas.planning.request import SearchRequest
from nas.records.answers import Answer, FrontierAnswer
from nas.records.search import SearchFailure, SearchState
from nas.service import answers, catalogue
from nas.service.confirm import ConfirmRequest, create_confirmation
from nas.service.data_folder import data_inside
from nas.settings import DEFAULT_TENANT, TENANT, Settings
from nas.store import AXES, Search, Store, of_tenant
from nas.tasks import check_data

router = APIRouter(prefix="/v1", dependencies=[Depends(read_strictly)])

MAX_PAGE = 500
#: Largest number that a database's 64-bit column takes.
_MAX_ID = 2**63 - 1
Limit = Annotated[int, Field(ge=1, le=MAX_PAGE), WHOLE, Query()]
#: Text that a database accepts: no NUL.
_TEXT = r"^[^\x00]*$"
Cursor = Annotated[int, Field(ge=-1, le=_MAX_ID), WHOLE]
SearchId = Annotated[str, Path(pattern=_TEXT, min_length=1, max_length=64)]
Text = Annotated[
    Annotated[str, Field(pattern=_TEXT, min_length=1, max_length=200)] | Absent, Query()
]
IdempotencyKey = Annotated[
    Annotated[str, Field(pattern=r"^[!-~]{1,255}$")] | Absent,
    Header(
        description="a name for this request, in visible ASCII: a repetition with the same key "
        "returns the search that the first one created"
    ),
]
Tenant = Annotated[
    Annotated[str, Field(pattern=TENANT)] | Absent,
    Header(
        alias="X-Tenant",
        description="tenant of the request, for services without access control; otherwise the "
        "key decides",
    ),
]
State = Annotated[SearchState | Absent, Query(description=" | ".join(get_args(SearchState)))]
Failure = Annotated[SearchFailure | Absent, Query(description=" | ".join(get_args(SearchFailure)))]
Axis = Annotated[str, Query(description=" | ".join(AXES), json_schema_extra={"enum": list(AXES)})]
Budget = Annotated[float, Field(gt=0, allow_inf_nan=False), REAL] | Absent
#: Side of a layer.
Dimension = Annotated[int, Field(ge=1, le=MAX_DIMENSION), WHOLE, Query()]
_PAGE = Query(description="the `next` of an earlier page")


async def get_store(request: Request, tenant: Tenant = None) -> Store:
    """The store, confined to the caller's tenant."""
    store: Store = request.app.state.store
    caller: Caller = request.state.caller
    if caller.tenant is not None:
        return store.view(caller.tenant, confined=True)
    return store.view(tenant or DEFAULT_TENANT)


async def get_settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


async def get_cache(request: Request) -> AnswerCache:
    cache: AnswerCache = request.app.state.cache
    return cache


CacheDep = Annotated[AnswerCache, Depends(get_cache)]
StoreDep = Annotated[Store, Depends(get_store)]
SettingsDep = Annotated[Settings, Depends(get_settings)]


async def read_search_request(request: Request) -> SearchRequest:
    """The body as a `SearchRequest`; raises `InvalidInput` if it is not a valid one."""
    values = await read_json(request)
    if isinstance(values, dict) and values.get("confirm") is not None:
        accepted = "null; to confirm a search use POST /v1/searches/{id}/confirm"
        raise InvalidInput("confirm", values["confirm"], accepted)
    return SearchRequest.checked(values)


RequestDep = Annotated[SearchRequest, Depends(read_search_request)]


#: One request at a time reads data, which may take much memory and time.
_READER = CapacityLimiter(1)
#: Requests that may wait to read data: in total, and of one tenant.
_MOST_WAITING, _MOST_OF_ONE = 16, 4
_waiting: Counter[str] = Counter()


async def usable_data(
    request: Request, wanted: SearchRequest, settings: Settings, store: Store
) -> tuple[tuple[str | None, str | None], Recipe]:
    """Check a request's data: ((its path, the folder that it must lie in), the completed recipe).

    Raises
    ------
    HTTPException
        503 where too many requests wait to read data.
    InvalidInput
        The data cannot be used.
    """
    if wanted.data is None:
        return (None, None), wanted.settings
    tenant = store.tenant if store.confined else None
    place = data_inside(settings.data_dir, wanted.data, tenant)
    if _waiting.total() >= _MOST_WAITING or _waiting[store.tenant] >= _MOST_OF_ONE:
        later = {"Retry-After": str(RETRY_AFTER_SECONDS)}
        raise HTTPException(503, "data of other requests is being read; try again later", later)
    release_slot(request.scope)
    _waiting[store.tenant] += 1
    try:
        # errors show the name that was sent, never the path on this host
        check = partial(
            check_data, wanted.settings, place.path, shown=wanted.data, root=place.root
        )  # fmt: skip
        recipe = await to_thread.run_sync(check, limiter=_READER)
    finally:
        _waiting[store.tenant] -= 1
        if not _waiting[store.tenant]:
            del _waiting[store.tenant]  # clients choose the names: they must not fill the memory
    wanted.check_budget(recipe)
    return (str(place.path), str(place.root)), recipe


def describe(search: Search) -> SearchOut:
    """A search in the service's form."""
    return SearchOut.model_validate(search, from_attributes=True)


@router.post(
    "/searches",
    status_code=201,
    openapi_extra=SEARCH_BODY,
    responses={**refusals(*OF_BODIES, rules=SEARCH_RULES), **MADE},
    summary="Submit a search",
)
async def create_search(
    body: RequestDep,
    request: Request,
    response: Response,
    store: StoreDep,
    settings: SettingsDep,
    idempotency_key: IdempotencyKey = None,
) -> SearchOut:
    (data_path, data_root), _ = await usable_data(request, body, settings, store)
    search, new = await run_in_threadpool(
        store.create_search, body, data_path=data_path, data_root=data_root,
        idempotency_key=idempotency_key, request_id=correlation_id.get(),
    )  # fmt: skip
    return made(request, search, new, response)


def made(request: Request, search: Search, new: bool, response: Response) -> SearchOut:
    """The response to a request that creates a search: 200 if its key had created it before."""
    response.status_code = 201 if new else 200
    response.headers["Location"] = f"{root_of(request.scope)}/v1/searches/{search.id}"
    return describe(search)


@router.post(
    "/searches/preview",
    openapi_extra=SEARCH_BODY,
    responses=refusals(*OF_BODIES, rules=SEARCH_RULES),
    response_model=Preview,
    summary="Show what a search would run, without running it",
)
async def preview_search(
    body: RequestDep, request: Request, store: StoreDep, settings: SettingsDep
) -> dict[str, Any]:
    _, recipe = await usable_data(request, body, settings, store)
    return await to_thread.run_sync(catalogue.get_preview, body, recipe, limiter=_PREVIEWS)


@router.get(
    "/searches",
    responses={**refusals(), **SEARCHES_FOUND},
    response_model=SearchPage,
    summary="List searches, newest first",
)
async def list_searches(
    store: StoreDep,
    limit: Limit = 50,
    cursor: Annotated[Cursor | Absent, _PAGE] = None,
    state: State = None,
    failure: Failure = None,
    tenant: Annotated[Annotated[str, Field(pattern=TENANT)] | Absent, Query()] = None,
) -> Response:
    filters = catalogue.checked_filters(state=state, failure=failure, tenant=tenant)

    def page() -> dict[str, Any]:
        found = store.searches(before=cursor, limit=limit, **filters)
        more = len(found) == limit
        return {
            "items": found,
            "next": str(found[-1].sequence) if more else None,
        }

    return await _paged(page)


@router.get(
    "/searches/{search_id}", responses={**refusals(404), **SEARCH_FOUND}, summary="Get a search"
)
def read_search(search_id: SearchId, store: StoreDep) -> SearchOut:
    return describe(store.search(search_id))


@router.get(
    "/searches/{search_id}/trials",
    responses={**refusals(404), **TRIALS_FOUND},
    response_model=TrialPage,
    summary="List the trials of a search",
)
async def list_trials(
    search_id: SearchId, store: StoreDep, limit: Limit = 100, cursor: Annotated[Cursor, _PAGE] = -1
) -> Response:
    def page() -> dict[str, Any]:
        found = store.trials(search_id, after=cursor, limit=limit)
        more = len(found) == limit
        return {
            "items": found,
            "next": str(found[-1].number) if more else None,
        }

    return await _paged(page)


#: Few threads make pages at a time: all threads share one interpreter, so more of them would only
#: delay each other and the event loop that sends the responses.
_PAGE_MAKERS = CapacityLimiter(2)


#: A preview of many families occupies a core for a second.
_PREVIEWS = CapacityLimiter(1)


async def _paged(page: Callable[[], dict[str, Any]]) -> Response:
    """A page, made in a thread and sent without validation; tests check it against its model."""
    return _json(await to_thread.run_sync(lambda: to_json(page()), limiter=_PAGE_MAKERS))


@router.post(
    "/searches/{search_id}/confirm",
    status_code=201,
    openapi_extra=CONFIRM_BODY,
    responses={**refusals(404, 409, *OF_BODIES, rules=CONFIRM_RULES), **MADE},
    summary="Run the best candidates and the best dense run of a search again with new seeds",
)
async def confirm_search(
    search_id: SearchId,
    request: Request,
    response: Response,
    store: StoreDep,
    idempotency_key: IdempotencyKey = None,
) -> SearchOut:
    wanted = ConfirmRequest.checked(await read_json(request))
    search, new = await run_in_threadpool(
        create_confirmation, store, search_id, wanted,
        idempotency_key=idempotency_key, request_id=correlation_id.get(),
    )  # fmt: skip
    return made(request, search, new, response)


@router.get("/trials/{trial_id}", responses=refusals(404), summary="Get a trial with its curve")
def read_trial(
    trial_id: Annotated[int, Field(ge=0, le=_MAX_ID), WHOLE, Path()], store: StoreDep
) -> TrialDetail:
    return TrialDetail.with_curve(store.trial(trial_id), store.curve(trial_id))


@router.get(
    "/frontier",
    responses=refusals(404, rules=FRONTIER_RULES),
    response_model=FrontierAnswer,
    summary="Get the Pareto fronts of loss against an axis, over a task or a search",
)
async def read_frontier(
    request: Request,
    store: StoreDep,
    cache: CacheDep,
    task: Text = None,
    search: Text = None,
    x: Axis = "train_flops",
) -> Response:
    answers.checked_axis(x)
    return _answer(
        request,
        await cache.get(
            of_tenant(search or task or "", store.tenant),
            ("frontier", store.tenant, store.confined, task, search, x),
            lambda: answers.get_frontier(store, task=task, search_id=search, x=x),
        ),
    )


@router.get(
    "/best",
    responses=refusals(404, rules=BEST_RULES),
    response_model=Answer,
    summary="Get the best structure within one budget, compared with dense",
)
async def read_best(
    request: Request,
    store: StoreDep,
    cache: CacheDep,
    train_flops: Annotated[Budget, Query()] = None,
    inference_flops: Annotated[Budget, Query(description="per token")] = None,
    params: Annotated[Budget, Query()] = None,
    step_seconds: Annotated[Budget, Query()] = None,
    peak_memory: Annotated[Budget, Query(description="bytes")] = None,
    task: Text = None,
    search: Text = None,
) -> Response:
    axis, budget = answers.checked_budget(
        {
            "train_flops": train_flops,
            "inference_flops": inference_flops,
            "params": params,
            "step_seconds": step_seconds,
            "peak_memory": peak_memory,
        }
    )
    return _answer(
        request,
        await cache.get(
            of_tenant(search or task or "", store.tenant),
            ("best", store.tenant, store.confined, task, search, axis, budget),
            lambda: answers.get_best(store, task=task, search_id=search, **{axis: budget}),
        ),
    )


def _answer(request: Request, cached: CachedAnswer) -> Response:
    """A cached answer, compressed if the client accepts gzip."""
    gzipped = "gzip" in request.headers.get("accept-encoding", "")
    response = _json(cached.gzipped if gzipped else cached.body)
    response.headers["Vary"] = "Accept-Encoding"
    if gzipped:
        response.headers["Content-Encoding"] = "gzip"
    return response


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


@router.get(
    "/structures",
    responses=refusals(rules=STRUCTURE_RULES),
    response_model=StructureOut,
    response_model_exclude_unset=True,
    summary="Get exact sizes, FLOPs, parameters and rank of a structure for one layer",
)
def read_structure(
    theta: Annotated[str, Query(pattern=_TEXT, description=design_forms(), examples=["monarch"])],
    d_in: Dimension,
    d_out: Dimension,
    sizing: Sizing = "least-waste",
) -> dict[str, Any]:
    return inspect_design(parse_design(theta), d_in, d_out, sizing)


@router.get(
    "/tasks",
    responses=refusals(),
    response_model=TaskList,
    summary="List tasks, their recipes and the data that searches have used",
)
def list_tasks(store: StoreDep) -> dict[str, Any]:
    return {"items": catalogue.get_tasks(store)}
