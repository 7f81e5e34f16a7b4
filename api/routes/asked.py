"""Trials that clients train."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import Field

from api import reference
from api.declared import SUBMIT
from api.deps import MAX_ID, STRICT, SearchId, StoreDep
from api.middleware.bodies import WHOLE, read_json, read_json_if_any
from api.problems import OF_BODIES, refusals
from nas.service import asking

router = APIRouter(prefix="/v1", dependencies=[SUBMIT, STRICT])


@router.post(
    "/searches/{search_id}/ask",
    openapi_extra=reference.ASK_BODY,
    responses=refusals(404, 409, *OF_BODIES),
    summary="Ask for the next trial of a search with `trainer` client, to train it yourself",
)
async def ask_for_trial(
    search_id: SearchId, request: Request, store: StoreDep
) -> asking.AskedTrial:
    wanted = asking.Ask.checked(await read_json_if_any(request))
    return await run_in_threadpool(asking.ask, store, search_id, wanted)


@router.post(
    "/trials/{trial_id}/points",
    openapi_extra=reference.TELL_BODY,
    responses=refusals(404, 409, *OF_BODIES, rules=reference.TELL_RULES),
    summary="Tell evaluations of a trial that was asked for, that it goes on, or how it ended",
)
async def tell_of_trial(
    trial_id: Annotated[int, Field(ge=0, le=MAX_ID), WHOLE, Path()],
    request: Request,
    store: StoreDep,
) -> asking.ToldTrial:
    told = asking.Tell.checked(await read_json(request))
    return await run_in_threadpool(asking.tell, store, trial_id, told)
