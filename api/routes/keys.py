"""Keys of the caller's tenant, managed by a key with scope `keys`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from api import reference
from api.declared import KEYS
from api.deps import PAGE, STRICT, IdempotencyKey, Limit, StoreDep
from api.middleware.bodies import Absent, read_json, read_json_if_any
from api.middleware.prefix import root_of
from api.problems import OF_BODIES, refusals
from api.schemas import KeyOut, KeyPage, MadeKey
from nas.service.keys import NewKey, Rotation
from nas.store import Store
from nas.store.delegation import TenantKeys
from nas.store.keys import Key

router = APIRouter(prefix="/v1/keys", dependencies=[KEYS, STRICT])
_ID = r"^[0-9a-f]{12}$"
KeyId = Annotated[str, Path(pattern=_ID)]
KeyCursor = Annotated[Annotated[str, Query(pattern=_ID)] | Absent, PAGE]


def _managed(request: Request, store: Store) -> TenantKeys:
    return TenantKeys(store, store.tenant, request.state.caller.key_id)


def _shown(key: Key) -> KeyOut:
    return KeyOut.model_validate(key, from_attributes=True)


def _made(request: Request, response: Response, key: Key, secret: str | None) -> MadeKey:
    """201 with the secret; 200 without it if an Idempotency-Key had made the key before."""
    response.status_code = 200 if secret is None else 201
    response.headers["Location"] = f"{root_of(request.scope)}/v1/keys/{key.id}"
    return MadeKey(**dict(_shown(key)), key=secret)


@router.get(
    "",
    responses=refusals(rules=reference.KEYS_RULES),
    summary="List the tenant's keys, newest first",
)
def list_keys(
    request: Request, store: StoreDep, limit: Limit = 50, cursor: KeyCursor = None
) -> KeyPage:
    found = _managed(request, store).list(before=cursor, limit=limit)
    after = found[-1].id if len(found) == limit else None
    return KeyPage(items=[_shown(key) for key in found], next=after)


@router.get("/{key_id}", responses=refusals(404), summary="Get a key, without its secret")
def read_key(key_id: KeyId, request: Request, store: StoreDep) -> KeyOut:
    return _shown(_managed(request, store).get(key_id))


@router.post(
    "",
    status_code=201,
    openapi_extra=reference.KEY_BODY,
    responses={**refusals(403, 409, *OF_BODIES, rules=reference.KEY_RULES), **reference.KEY_MADE},
    summary="Create a key; the answer alone has its secret",
)
async def create_key(
    request: Request, response: Response, store: StoreDep, idempotency_key: IdempotencyKey = None
) -> MadeKey:
    wanted = NewKey.checked(await read_json(request))
    key, secret = await run_in_threadpool(
        _managed(request, store).create, wanted.name, wanted.scopes,
        seconds=wanted.lifetime_seconds, idempotency_key=idempotency_key,
    )  # fmt: skip
    return _made(request, response, key, secret)


@router.post(
    "/{key_id}/rotate",
    status_code=201,
    openapi_extra=reference.ROTATION_BODY,
    responses={
        **refusals(403, 404, 409, *OF_BODIES, rules=reference.ROTATION_RULES), **reference.KEY_MADE,
    },
    summary="Replace a key; the answer alone has the new one's secret",
)  # fmt: skip
async def rotate_key(
    key_id: KeyId, request: Request, response: Response, store: StoreDep,
    idempotency_key: IdempotencyKey = None,
) -> MadeKey:  # fmt: skip
    wanted = Rotation.checked(await read_json_if_any(request))
    key, secret = await run_in_threadpool(
        _managed(request, store).rotate, key_id, grace_seconds=wanted.grace_seconds,
        idempotency_key=idempotency_key,
    )  # fmt: skip
    return _made(request, response, key, secret)


@router.post(
    "/{key_id}/revoke",
    responses=refusals(403, 404),
    summary="Revoke a key and the sessions that it opened, at once",
)
def revoke_key(key_id: KeyId, request: Request, store: StoreDep) -> KeyOut:
    return _shown(_managed(request, store).revoke(key_id))
