"""The best structure within one budget, compared with dense."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from api.declared import READ
from api.deps import STRICT, Budget, CacheDep, StoreDep, Text, cached_answer
from api.problems import refusals
from api.reference import BEST_RULES
from nas.records.answers import Answer
from nas.service import answers
from nas.store import of_tenant

router = APIRouter(prefix="/v1", dependencies=[READ, STRICT])


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
    return cached_answer(
        request,
        await cache.get(
            of_tenant(search or task or "", store.tenant),
            ("best", store.tenant, store.confined, task, search, axis, budget),
            lambda: answers.get_best(store, task=task, search_id=search, **{axis: budget}),
        ),
    )
