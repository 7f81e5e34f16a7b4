"""Routes for operators, about all tenants: the service's processes and its audit log."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from pydantic import Field

from api.middleware.bodies import Absent
from api.problems import refusals
from api.routes.v1 import Cursor, Limit
from api.schemas import AuditPage, WorkerList
from nas.settings import TENANT
from nas.store import Store
from nas.store.audit import Audit
from nas.store.processes import LIVE_SECONDS, Processes

router = APIRouter(prefix="/v1")


@router.get("/workers", responses=refusals(), summary="List workers and services seen recently")
def list_workers(request: Request) -> WorkerList:
    store: Store = request.app.state.store
    found = Processes(store).alive(LIVE_SECONDS)
    return WorkerList.model_validate({"items": found}, from_attributes=True)


@router.get("/audit", responses=refusals(), summary="List the audit log, newest first")
def list_audit(
    request: Request,
    limit: Limit = 50,
    cursor: Cursor | Absent = None,
    tenant: Annotated[Annotated[str, Field(pattern=TENANT)] | Absent, Query()] = None,
) -> AuditPage:
    store: Store = request.app.state.store
    found = Audit(store).entries(before=cursor, limit=limit, tenant=tenant)
    after = str(found[-1].id) if len(found) == limit else None
    return AuditPage.model_validate({"items": found, "next": after}, from_attributes=True)
