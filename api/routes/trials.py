"""The trials of a search, and one trial with its learning curve."""

from __future__ import annotations

import base64
from functools import partial
from operator import attrgetter
from typing import Annotated, Any

from fastapi import APIRouter, Path, Response
from fastapi.responses import StreamingResponse
from pydantic import Field

from api.declared import READ
from api.deps import MAX_ID, PAGE, STRICT, Cursor, Limit, SearchId, StoreDep, paged
from api.middleware.bodies import WHOLE
from api.problems import refusals
from api.reference import link
from api.schemas import TrialDetail, TrialPage
from nas.store.weights import read_weights, weights_of

router = APIRouter(prefix="/v1", dependencies=[READ, STRICT])
_WEIGHTS, _BYTES = "application/octet-stream", {"type": "string", "format": "binary"}
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


_TrialId = Annotated[int, Field(ge=0, le=MAX_ID), WHOLE, Path()]


@router.get("/trials/{trial_id}", responses=refusals(404), summary="Get a trial with its curve")
def read_trial(trial_id: _TrialId, store: StoreDep) -> TrialDetail:
    curve, weights = store.curve(trial_id), weights_of(store, trial_id)
    return TrialDetail.of(store.trial(trial_id), curve, weights)


@router.get(
    "/trials/{trial_id}/weights",
    response_class=StreamingResponse,
    responses={
        200: {"description": "A safetensors file", "content": {_WEIGHTS: {"schema": _BYTES}}},
        **refusals(404),
    },
    summary="Download the trained weights of a trial",
)
def download_weights(trial_id: _TrialId, store: StoreDep) -> StreamingResponse:
    kept, parts = read_weights(store, trial_id)
    digest = base64.b64encode(bytes.fromhex(kept.sha256)).decode()
    headers = {
        "Content-Disposition": f'attachment; filename="trial-{kept.trial_id}.safetensors"',
        "Content-Length": str(kept.bytes),
        "Repr-Digest": f"sha-256=:{digest}:",
    }
    return StreamingResponse(parts, media_type=_WEIGHTS, headers=headers)
