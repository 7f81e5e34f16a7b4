"""Routes that change a submitted search: pause, resume, cancel, retry, clone, priority."""

from __future__ import annotations

from anyio import from_thread
from asgi_correlation_id import correlation_id
from fastapi import APIRouter, Depends, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import ValidationError

from api.middleware.bodies import read_json, read_json_if_any, read_strictly
from api.problems import OF_BODIES, refusals
from api.reference import CLONE_BODY, CLONE_RULES, MADE, PRIORITY_BODY
from api.routes.v1 import (
    IdempotencyKey,
    SearchId,
    SettingsDep,
    StoreDep,
    describe,
    made,
    usable_data,
)
from api.schemas import PriorityIn, SearchOut
from nas.errors import InvalidInput
from nas.planning.request import MAX_PRIORITY, SearchRequest
from nas.service.clone import create_clone

router = APIRouter(prefix="/v1", dependencies=[Depends(read_strictly)])


@router.post(
    "/searches/{search_id}/cancel", responses=refusals(404, 409), summary="Cancel a search"
)
def cancel_search(search_id: SearchId, store: StoreDep) -> SearchOut:
    return describe(store.cancel(search_id))


@router.post(
    "/searches/{search_id}/pause",
    responses=refusals(404, 409),
    summary="Pause a search; resuming it continues its running trials from their checkpoints",
)
def pause_search(search_id: SearchId, store: StoreDep) -> SearchOut:
    return describe(store.pause(search_id))


@router.post(
    "/searches/{search_id}/resume",
    responses=refusals(404, 409),
    summary="Queue a paused search again",
)
def resume_search(search_id: SearchId, store: StoreDep) -> SearchOut:
    return describe(store.resume(search_id))


@router.post(
    "/searches/{search_id}/retry",
    responses=refusals(404, 409),
    summary="Queue an ended search again, to run the trials that are not complete",
)
def retry_search(search_id: SearchId, store: StoreDep) -> SearchOut:
    return describe(store.retry(search_id))


@router.post(
    "/searches/{search_id}/priority",
    openapi_extra=PRIORITY_BODY,
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


@router.post(
    "/searches/{search_id}/clone",
    status_code=201,
    openapi_extra=CLONE_BODY,
    responses={**refusals(404, *OF_BODIES, rules=CLONE_RULES), **MADE},
    summary="Submit a copy of a search, with the fields of the body changed",
)
async def clone_search(
    search_id: SearchId,
    request: Request,
    response: Response,
    store: StoreDep,
    settings: SettingsDep,
    idempotency_key: IdempotencyKey = None,
) -> SearchOut:
    changes = await read_json_if_any(request)
    if not isinstance(changes, dict):
        raise InvalidInput("body", changes, "a JSON object with the fields to change")
    if changes.get("confirm") is not None:
        accepted = "null; to confirm a search use POST /v1/searches/{id}/confirm"
        raise InvalidInput("confirm", changes["confirm"], accepted)

    def place(wanted: SearchRequest) -> tuple[str | None, str | None]:
        """Call `usable_data`, which needs the event loop, from the thread that clones."""
        return from_thread.run(usable_data, request, wanted, settings, store)[0]

    search, new = await run_in_threadpool(
        create_clone, store, search_id, changes, place,
        idempotency_key=idempotency_key, request_id=correlation_id.get(),
    )  # fmt: skip
    return made(request, search, new, response)
