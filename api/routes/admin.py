"""Routes for operators, about all tenants: the service's processes and its audit log."""

from __future__ import annotations

from fastapi import APIRouter, Request

from api.declared import ADMIN
from api.deps import STRICT, Cursor, Limit, TenantFilter
from api.middleware.bodies import Absent
from api.problems import refusals
from api.schemas import AuditPage, WorkerList
from nas.store import Store
from nas.store.audit import Audit
from nas.store.processes import LIVE_SECONDS, Processes

router = APIRouter(prefix="/v1", dependencies=[ADMIN, STRICT])


@router.get("/workers", responses=refusals(), summary="List workers and services seen recently")
def list_workers(request: Request) -> WorkerList:
    store: Store = request.app.state.store
    found = Processes(store).alive(LIVE_SECONDS)
    return WorkerList.model_validate({"items": found}, from_attributes=True)


@router.get("/audit", responses=refusals(), summary="List the audit log, newest first")
def list_audit(
    request: Request, limit: Limit = 50, cursor: Cursor | Absent = None, tenant: TenantFilter = None
) -> AuditPage:
    store: Store = request.app.state.store
    found = Audit(store).entries(before=cursor, limit=limit, tenant=tenant)
    after = str(found[-1].id) if len(found) == limit else None
    return AuditPage.model_validate({"items": found, "next": after}, from_attributes=True)
