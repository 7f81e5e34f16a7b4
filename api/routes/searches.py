"""Searches: submitted, previewed, listed, and changed after that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Annotated, Any

from anyio import CapacityLimiter, from_thread, to_thread
from asgi_correlation_id import correlation_id
from fastapi import APIRouter, Depends, HTTPException, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import ValidationError

from api import reference
from api.declared import READ, SUBMIT
from api.deps import (
    PAGE,
    STRICT,
    Cursor,
    Failure,
    Flag,
    IdempotencyKey,
    Limit,
    SearchId,
    SearchText,
    State,
    StoreDep,
    TenantFilter,
    Text,
    describe,
    paged,
)
from api.middleware.bodies import Absent, read_json, read_json_if_any
from api.middleware.prefix import root_of
from api.problems import OF_BODIES, refusals
from api.schemas import Preview, PriorityIn, SearchDetail, SearchOut, SearchPage
from nas import tracing
from nas.errors import InvalidInput
from nas.planning.recipe import Recipe
from nas.planning.request import MAX_PRIORITY, SearchRequest
from nas.service import catalogue
from nas.service.clone import create_clone
from nas.service.confirm import ConfirmRequest, create_confirmation
from nas.service.data_folder import data_inside
from nas.service.labels import Labels, set_labels
from nas.settings import Settings
from nas.store import Search, Store
from nas.store.retention import delete_search
from nas.tasks import check_data

router = APIRouter(prefix="/v1/searches", dependencies=[READ, STRICT])
#: Routes that change something.
changing = APIRouter(prefix="/v1/searches", dependencies=[SUBMIT, STRICT])


async def read_search_request(request: Request) -> SearchRequest:
    """The body as a `SearchRequest`; raises `InvalidInput` if it is not a valid one."""
    values = await read_json(request)
    if isinstance(values, dict):
        _refuse_confirmation(values)
    return SearchRequest.checked(values)


def _refuse_confirmation(values: dict[str, Any]) -> None:
    if values.get("confirm") is not None:
        accepted = "null; to confirm a search use POST /v1/searches/{id}/confirm"
        raise InvalidInput("confirm", values["confirm"], accepted)


RequestDep = Annotated[SearchRequest, Depends(read_search_request)]


class Creation:
    """A dependency of routes that create a search, once for each Idempotency-Key."""

    def __init__(
        self, request: Request, response: Response, idempotency_key: IdempotencyKey = None
    ) -> None:
        self._root, self._response = root_of(request.scope), response
        self._key = idempotency_key

    async def run(
        self, create: Callable[..., tuple[Search, bool]], *given: Any, **options: Any
    ) -> SearchOut:
        """The response: 201, or 200 if the key had created the search before."""
        ids = {"idempotency_key": self._key, "request_id": correlation_id.get()}
        search, new = await run_in_threadpool(create, *given, **options, **ids)
        tracing.now().set({"einsum_nas.search.id": search.id})
        self._response.status_code = 201 if new else 200
        self._response.headers["Location"] = f"{self._root}/v1/searches/{search.id}"
        return describe(search)


CreationDep = Annotated[Creation, Depends()]
#: A preview of many families occupies a core for a second.
_PREVIEWS = CapacityLimiter(1)
#: One request at a time reads data, which may take much memory and time.
_READER = CapacityLimiter(1)
#: Requests that may wait to read data: in total, and of one tenant.
_MOST_WAITING, _MOST_OF_ONE = 16, 4
_waiting: Counter[str] = Counter()


async def usable_data(
    request: Request, wanted: SearchRequest, store: Store
) -> tuple[tuple[str | None, str | None], Recipe]:
    """Check a request's data: ((its path, the folder that it must lie in), the completed recipe).

    Raises
    ------
    HTTPException
        503 where too many requests wait to read data.
    InvalidInput
        The data cannot be used.
    """
    if wanted.data is None or wanted.trainer == "client":
        return (None, None), wanted.settings
    tenant = store.tenant if store.confined else None
    settings: Settings = request.app.state.settings
    place = data_inside(settings.data_dir, wanted.data, tenant)
    if _waiting.total() >= _MOST_WAITING or _waiting[store.tenant] >= _MOST_OF_ONE:
        raise HTTPException(503, "data of other requests is being read; try again later")
    _waiting[store.tenant] += 1
    try:
        # errors show the name that was sent, never the path on this host
        check = partial(check_data, wanted.settings, place.path, shown=wanted.data, root=place.root)
        recipe = await to_thread.run_sync(check, limiter=_READER)
    finally:
        _waiting[store.tenant] -= 1
        if not _waiting[store.tenant]:
            del _waiting[store.tenant]  # clients choose the names: they must not fill the memory
    wanted.check_budget(recipe)
    return (str(place.path), str(place.root)), recipe


@changing.post(
    "",
    status_code=201,
    openapi_extra=reference.SEARCH_BODY,
    responses={**refusals(*OF_BODIES, rules=reference.SEARCH_RULES), **reference.MADE},
    summary="Submit a search",
)
async def create_search(
    body: RequestDep, request: Request, creation: CreationDep, store: StoreDep
) -> SearchOut:
    (data_path, data_root), _ = await usable_data(request, body, store)
    return await creation.run(store.create_search, body, data_path=data_path, data_root=data_root)


@router.post(
    "/preview",
    openapi_extra=reference.SEARCH_BODY,
    responses=refusals(*OF_BODIES, rules=reference.SEARCH_RULES),
    response_model=Preview,
    summary="Show what a search would run, without running it",
)
async def preview_search(body: RequestDep, request: Request, store: StoreDep) -> dict[str, Any]:
    _, recipe = await usable_data(request, body, store)
    return await to_thread.run_sync(catalogue.get_preview, body, recipe, store, limiter=_PREVIEWS)


@router.get(
    "",
    responses={**refusals(rules=reference.LIST_RULES), **reference.SEARCHES_FOUND},
    response_model=SearchPage,
    summary="List searches, newest first",
)
async def list_searches(
    store: StoreDep,
    limit: Limit = 50,
    cursor: Annotated[Cursor | Absent, PAGE] = None,
    state: State = None,
    failure: Failure = None,
    tenant: TenantFilter = None,
    task: Text = None,
    text: SearchText = None,
    archived: Annotated[Flag | Absent, Query(description="true | false: archived or not")] = None,
) -> Response:
    filters = catalogue.checked_filters(
        state=state, failure=failure, tenant=tenant, task=task, text=text,
        archived=None if archived is None else archived == "true",
    )  # fmt: skip
    read = partial(store.searches, before=cursor, limit=limit, **filters)
    return await paged(read, limit, attrgetter("sequence"))


@router.get(
    "/{search_id}", responses={**refusals(404), **reference.SEARCH_FOUND}, summary="Get a search"
)
def read_search(search_id: SearchId, store: StoreDep) -> SearchDetail:
    return SearchDetail(**catalogue.search_detail(store, store.search(search_id)))


@changing.post(
    "/{search_id}/confirm",
    status_code=201,
    openapi_extra=reference.CONFIRM_BODY,
    responses={**refusals(404, 409, *OF_BODIES, rules=reference.CONFIRM_RULES), **reference.MADE},
    summary="Run the best candidates and the best dense run of a search again with new seeds",
)
async def confirm_search(
    search_id: SearchId, request: Request, creation: CreationDep, store: StoreDep
) -> SearchOut:
    wanted = ConfirmRequest.checked(await read_json(request))
    return await creation.run(create_confirmation, store, search_id, wanted)


@changing.post("/{search_id}/cancel", responses=refusals(404, 409), summary="Cancel a search")
def cancel_search(search_id: SearchId, store: StoreDep) -> SearchOut:
    return describe(store.cancel(search_id))


@changing.post(
    "/{search_id}/pause",
    responses=refusals(404, 409),
    summary="Pause a search; resuming it continues its running trials from their checkpoints",
)
def pause_search(search_id: SearchId, store: StoreDep) -> SearchOut:
    return describe(store.pause(search_id))


@changing.post(
    "/{search_id}/resume", responses=refusals(404, 409), summary="Queue a paused search again"
)
def resume_search(search_id: SearchId, store: StoreDep) -> SearchOut:
    return describe(store.resume(search_id))


@changing.post(
    "/{search_id}/retry",
    responses=refusals(404, 409),
    summary="Queue an ended search again, to run the trials that are not complete",
)
def retry_search(search_id: SearchId, store: StoreDep) -> SearchOut:
    return describe(store.retry(search_id))


@changing.post(
    "/{search_id}/priority",
    openapi_extra=reference.PRIORITY_BODY,
    responses=refusals(404, 409, *OF_BODIES),
    summary="Change the priority of a search; those of higher priority run first",
)
async def prioritise_search(search_id: SearchId, request: Request, store: StoreDep) -> SearchOut:
    try:
        wanted = PriorityIn.model_validate(await read_json(request))
    except ValidationError as error:
        accepted = f"an object with a whole number from -{MAX_PRIORITY} to {MAX_PRIORITY}"
        raise InvalidInput("priority", error.errors()[0]["input"], accepted) from None
    return describe(await run_in_threadpool(store.set_priority, search_id, wanted.priority))


@changing.post(
    "/{search_id}/labels",
    openapi_extra=reference.LABELS_BODY,
    responses=refusals(404, *OF_BODIES, rules=reference.LABELS_RULES),
    summary="Change the name, tags or notes of a search, or archive it",
)
async def label_search(search_id: SearchId, request: Request, store: StoreDep) -> SearchOut:
    wanted = Labels.checked(await read_json(request))
    return describe(await run_in_threadpool(set_labels, store, search_id, wanted))


@changing.post(
    "/{search_id}/delete",
    responses=refusals(404, 409),
    summary="Delete an ended search that has no completed run; one that has can be archived",
)
def delete_one_search(search_id: SearchId, store: StoreDep) -> SearchOut:
    return describe(delete_search(store, search_id))


@changing.post(
    "/{search_id}/clone",
    status_code=201,
    openapi_extra=reference.CLONE_BODY,
    responses={**refusals(404, *OF_BODIES, rules=reference.CLONE_RULES), **reference.MADE},
    summary="Submit a copy of a search, with the fields of the body changed",
)
async def clone_search(
    search_id: SearchId, request: Request, creation: CreationDep, store: StoreDep
) -> SearchOut:
    changes = await read_json_if_any(request)
    if not isinstance(changes, dict):
        raise InvalidInput("body", changes, "a JSON object with the fields to change")
    _refuse_confirmation(changes)

    def place(wanted: SearchRequest) -> tuple[str | None, str | None]:
        """Call `usable_data`, which needs the event loop, from the thread that clones."""
        return from_thread.run(usable_data, request, wanted, store)[0]

    return await creation.run(create_clone, store, search_id, changes, place)
