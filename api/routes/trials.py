"""The trials of a search, and one trial with its learning curve."""

from __future__ import annotations

from functools import partial
from operator import attrgetter
from typing import Annotated, Any

from fastapi import APIRouter, Path, Response
from pydantic import Field

from api.declared import READ
from api.deps import MAX_ID, PAGE, STRICT, Cursor, Limit, SearchId, StoreDep, paged
from api.middleware.bodies import WHOLE
from api.problems import refusals
from api.reference import link
from api.schemas import TrialDetail, TrialPage

router = APIRouter(prefix="/v1", dependencies=[READ, STRICT])
_PAGE_FOUND: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A page of trials",
        "links": {
            "trial": link("get", "/v1/trials/{trial_id}", trial_id="$response.body#/items/0/id")
        },
    }
}


@router.get(
    "/searches/{search_id}/trials",
    responses={**refusals(404), **_PAGE_FOUND},
    response_model=TrialPage,
    summary="List the trials of a search",
)
async def list_trials(
    search_id: SearchId, store: StoreDep, limit: Limit = 100, cursor: Annotated[Cursor, PAGE] = -1
) -> Response:
    read = partial(store.trials, search_id, after=cursor, limit=limit)
    return await paged(read, limit, attrgetter("number"))


@router.get("/trials/{trial_id}", responses=refusals(404), summary="Get a trial with its curve")
def read_trial(
    trial_id: Annotated[int, Field(ge=0, le=MAX_ID), WHOLE, Path()], store: StoreDep
) -> TrialDetail:
    return TrialDetail.with_curve(store.trial(trial_id), store.curve(trial_id))
