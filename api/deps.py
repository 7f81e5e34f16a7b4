"""What routes share: parameters, the store of the caller's tenant, pages and encoded answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal, TypeVar, get_args

from anyio import CapacityLimiter, to_thread
from fastapi import Depends, Header, Path, Query, Request, Response
from pydantic import BaseModel, Field
from pydantic_core import to_json

from api.caching.cache import AnswerCache
from api.declared import Caller
from api.middleware.bodies import REAL, WHOLE, Absent, read_strictly
from api.schemas import SearchOut
from nas.designs.structure import MAX_DIMENSION
from nas.records.search import SearchFailure, SearchState
from nas.settings import DEFAULT_TENANT, TENANT
from nas.store import AXES, Search, Store, of_tenant

T = TypeVar("T")
#: Refuses what a request has that its route does not know.
STRICT = Depends(read_strictly)
MAX_PAGE = 500
#: Largest number that a database's 64-bit column takes.
MAX_ID = 2**63 - 1
Limit = Annotated[int, Field(ge=1, le=MAX_PAGE), WHOLE, Query()]
#: Text that a database accepts: no NUL.
TEXT = r"^[^\x00]*$"
Cursor = Annotated[int, Field(ge=-1, le=MAX_ID), WHOLE]
SearchId = Annotated[str, Path(pattern=TEXT, min_length=1, max_length=64)]
Text = Annotated[
    Annotated[str, Field(pattern=TEXT, min_length=1, max_length=200)] | Absent, Query()
]
SearchText = Annotated[
    Annotated[str, Field(pattern=TEXT, min_length=1, max_length=200)] | Absent,
    Query(description="part of a search's name or tags, or how its id begins"),
]
Device = Annotated[
    Annotated[str, Field(pattern=TEXT, min_length=1, max_length=200)] | Absent,
    Query(
        description="on a measured axis: the device whose runs are read, or a part of its name; "
        "by default the one with the most runs"
    ),
]
IdempotencyKey = Annotated[
    Annotated[str, Field(pattern=r"^[!-~]{1,255}$")] | Absent,
    Header(
        description="a name for this request, in visible ASCII: a repetition with the same key "
        "returns what the first one created"
    ),
]
TenantName = Annotated[str, Field(pattern=TENANT)] | Absent
TenantFilter = Annotated[TenantName, Query()]
Tenant = Annotated[
    TenantName,
    Header(
        alias="X-Tenant",
        description="tenant of the request, for services without access control; otherwise the "
        "key decides",
    ),
]
State = Annotated[SearchState | Absent, Query(description=" | ".join(get_args(SearchState)))]
Failure = Annotated[SearchFailure | Absent, Query(description=" | ".join(get_args(SearchFailure)))]
Axis = Annotated[str, Query(description=" | ".join(AXES), json_schema_extra={"enum": list(AXES)})]
Budget = Annotated[float, Field(gt=0, allow_inf_nan=False), REAL] | Absent
#: A truth value: nothing but JSON's own words.
Flag = Literal["true", "false"]
#: Side of a layer.
Dimension = Annotated[int, Field(ge=1, le=MAX_DIMENSION), WHOLE, Query()]
PAGE = Query(description="the `next` of an earlier page")


async def get_store(request: Request, tenant: Tenant = None) -> Store:
    """The store, confined to the caller's tenant."""
    store: Store = request.app.state.store
    caller: Caller = request.state.caller
    if caller.tenant is not None:
        return store.view(caller.tenant, confined=True)
    return store.view(tenant or DEFAULT_TENANT)


StoreDep = Annotated[Store, Depends(get_store)]

#: Few threads make pages at a time: all threads share one interpreter, so more of them would only
#: delay each other and the event loop that sends the responses.
_PAGE_MAKERS = CapacityLimiter(2)


async def paged(
    read: Callable[[], Sequence[T]],
    limit: int,
    cursor: Callable[[T], int],
) -> Response:
    """A page, made in a thread and sent without validation; tests check it against its model."""

    def page() -> bytes:
        found = read()
        more = str(cursor(found[-1])) if len(found) == limit else None
        return to_json({"items": found, "next": more})

    return as_json(await to_thread.run_sync(page, limiter=_PAGE_MAKERS))


async def answered(
    request: Request,
    store: Store,
    find: Callable[..., BaseModel],
    *,
    task: str | None,
    search_id: str | None,
    **asked: Any,
) -> Response:
    """The answer about the runs of a task or a search, cached; in gzip if the client accepts it."""
    cache: AnswerCache = request.app.state.cache
    cached = await cache.get(
        of_tenant(search_id or task or "", store.tenant),
        (find.__name__, store.tenant, store.confined, task, search_id, *asked.items()),
        partial(find, store, task=task, search_id=search_id, **asked),
    )
    gzipped = "gzip" in request.headers.get("accept-encoding", "")
    response = as_json(cached.gzipped if gzipped else cached.body)
    response.headers["Vary"] = "Accept-Encoding"
    if gzipped:
        response.headers["Content-Encoding"] = "gzip"
    return response


def as_json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


def describe(search: Search) -> SearchOut:
    """A search in the service's form."""
    return SearchOut.model_validate(search, from_attributes=True)
