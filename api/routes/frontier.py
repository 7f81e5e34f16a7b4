"""The Pareto fronts of loss against an axis."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from api.declared import READ
from api.deps import STRICT, Axis, CacheDep, StoreDep, Text, cached_answer
from api.problems import refusals
from api.reference import FRONTIER_RULES
from nas.records.answers import FrontierAnswer
from nas.service import answers
from nas.store import of_tenant

router = APIRouter(prefix="/v1", dependencies=[READ, STRICT])


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
    return cached_answer(
        request,
        await cache.get(
            of_tenant(search or task or "", store.tenant),
            ("frontier", store.tenant, store.confined, task, search, x),
            lambda: answers.get_frontier(store, task=task, search_id=search, x=x),
        ),
    )
