"""What searches can use: the tasks with their recipes and data, and the structures of a layer."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query

from api.declared import READ
from api.deps import STRICT, TEXT, Dimension, StoreDep
from api.problems import refusals
from api.schemas import StructureOut, TaskList
from nas.designs.design import design_forms, inspect_design, parse_design
from nas.designs.structure import Sizing
from nas.service import catalogue

router = APIRouter(prefix="/v1", dependencies=[READ, STRICT])
_RULES = {
    "theta": "text that names a structure",
    "mixture": "text that names a mixture",
    "convolution": "text that names a convolution",
    "blast": "text that names a BLAST matrix",
    "block_sparse": "text that names a pattern of blocks, with exponents from 0 to 1",
    "sum": "text of a sum of two designs, or of one with a name",
    "cola": "text of two factors that are not dense with silu, gelu or relu between them",
    "experts": "a number of experts that the structure can have",
    "active": "at most `experts`",
    "shared": "less than `active`",
    "granularity": "1, or of feed-forward blocks of experts at most their hidden dimension",
    "heads": "only with two factors and mixtures of them",
    "sizing": "paper only with two factors",
}


@router.get(
    "/structures",
    responses=refusals(rules=_RULES),
    response_model=StructureOut,
    response_model_exclude_unset=True,
    summary="Get exact sizes, FLOPs, parameters and rank of a structure for one layer",
)
def read_structure(
    theta: Annotated[str, Query(pattern=TEXT, description=design_forms(), examples=["monarch"])],
    d_in: Dimension,
    d_out: Dimension,
    sizing: Sizing = "least-waste",
) -> dict[str, Any]:
    return inspect_design(parse_design(theta), d_in, d_out, sizing)


@router.get(
    "/tasks",
    responses=refusals(),
    response_model=TaskList,
    summary="List tasks, their recipes and the data that searches have used",
)
def list_tasks(store: StoreDep) -> dict[str, Any]:
    return {"items": catalogue.get_tasks(store)}
