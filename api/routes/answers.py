"""Answers computed from completed runs: the Pareto fronts, and the best structure for a budget."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from api.declared import READ
from api.deps import STRICT, Axis, Budget, Device, Flag, StoreDep, Text, answered
from api.problems import refusals
from nas.records.answers import Answer, FrontierAnswer
from nas.service import answers

router = APIRouter(prefix="/v1", dependencies=[READ, STRICT])
_RULES = {
    "task, search": "exactly one of the two",
    "task": "the name of a task, or name@fingerprint",
    "device": "on a measured axis: one of its devices, or a part of the name of one",
}
_BUDGET_RULES = {
    **_RULES,
    "budget": "exactly one budget",
    "train_flops": "not so far beyond all measured budgets that no measured width would be run",
}


@router.get(
    "/frontier",
    responses=refusals(404, rules=_RULES),
    response_model=FrontierAnswer,
    summary="Get the Pareto fronts of loss against an axis, over a task or a search",
)
async def read_frontier(
    request: Request,
    store: StoreDep,
    task: Text = None,
    search: Text = None,
    x: Axis = "train_flops",
    device: Device = None,
) -> Response:
    answers.checked_axis(x)
    return await answered(
        request, store, answers.get_frontier, task=task, search_id=search, x=x, device=device
    )


@router.get(
    "/best",
    responses=refusals(404, rules=_BUDGET_RULES),
    response_model=Answer,
    summary="Get the best structure within one budget, compared with dense",
)
async def read_best(
    request: Request,
    store: StoreDep,
    train_flops: Annotated[Budget, Query()] = None,
    train_seconds: Annotated[
        Budget, Query(description="measured seconds of training, evaluation left out")
    ] = None,
    inference_flops: Annotated[Budget, Query(description="per token")] = None,
    params: Annotated[Budget, Query()] = None,
    step_seconds: Annotated[Budget, Query()] = None,
    peak_memory: Annotated[Budget, Query(description="bytes")] = None,
    task: Text = None,
    search: Text = None,
    device: Device = None,
    published: Annotated[
        Flag,
        Query(
            description="whether a published table answers, marked so, about a task that has no "
            "completed run within the budget here"
        ),
    ] = "true",
) -> Response:
    axis, budget = answers.checked_budget(
        {
            "train_flops": train_flops,
            "train_seconds": train_seconds,
            "inference_flops": inference_flops,
            "params": params,
            "step_seconds": step_seconds,
            "peak_memory": peak_memory,
        }
    )
    return await answered(
        request, store, answers.get_best, task=task, search_id=search, device=device,
        published=published == "true", **{axis: budget},
    )  # fmt: skip
