"""The Pareto fronts of loss against an axis."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from api.declared import READ
from api.deps import STRICT, Axis, StoreDep, Text, answered
from api.problems import refusals
from nas.records.answers import FrontierAnswer
from nas.service import answers

router = APIRouter(prefix="/v1", dependencies=[READ, STRICT])
#: Of every answer about runs.
RULES = {
    "task, search": "exactly one of the two",
    "task": "the name of a task, or name@fingerprint",
}


@router.get(
    "/frontier",
    responses=refusals(404, rules=RULES),
    response_model=FrontierAnswer,
    summary="Get the Pareto fronts of loss against an axis, over a task or a search",
)
async def read_frontier(
    request: Request,
    store: StoreDep,
    task: Text = None,
    search: Text = None,
    x: Axis = "train_flops",
) -> Response:
    answers.checked_axis(x)
    return await answered(request, store, answers.get_frontier, task=task, search_id=search, x=x)
