"""The tasks, their recipes and their data."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from api.declared import READ
from api.deps import STRICT, StoreDep
from api.problems import refusals
from api.schemas import TaskList
from nas.service import catalogue

router = APIRouter(prefix="/v1", dependencies=[READ, STRICT])


@router.get(
    "/tasks",
    responses=refusals(),
    response_model=TaskList,
    summary="List tasks, their recipes and the data that searches have used",
)
def list_tasks(store: StoreDep) -> dict[str, Any]:
    return {"items": catalogue.get_tasks(store)}
