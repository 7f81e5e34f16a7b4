"""Server-sent events: a search's append-only log as it grows."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header
from fastapi.concurrency import run_in_threadpool
from sse_starlette import EventSourceResponse, ServerSentEvent

from api.problems import responses
from api.routes import SearchId, StoreDep
from nas.store import Store

router = APIRouter(prefix="/v1")
#: Seconds between looks at the log.
_POLL_SECONDS = 0.5
_LAST = ("succeeded", "failed", "cancelled")


async def _follow(store: Store, search_id: str, after: int) -> AsyncIterator[ServerSentEvent]:
    """Every event past `after`, then those to come, until the search has ended."""
    while True:
        events = await run_in_threadpool(store.events, search_id, after=after)
        for event in events:
            after = event.id
            body = {"created_at": event.created_at, **event.data}
            yield ServerSentEvent(json.dumps(body), event=event.kind, id=str(event.id))
        if events and events[-1].kind in _LAST:
            return
        if not events:
            await asyncio.sleep(_POLL_SECONDS)
            search = await run_in_threadpool(store.search, search_id)
            if search.state in _LAST and not await run_in_threadpool(
                store.events, search_id, after=after, limit=1
            ):
                return


@router.get(
    "/searches/{search_id}/events",
    response_class=EventSourceResponse,
    responses=responses(404, 422),
    summary="What happens to a search, live (server-sent events)",
)
async def search_events(
    search_id: SearchId,
    store: StoreDep,
    last_event_id: Annotated[int | None, Header(ge=0, le=2**62)] = None,
) -> EventSourceResponse:
    await run_in_threadpool(store.search, search_id)
    return EventSourceResponse(_follow(store, search_id, last_event_id or 0), ping=15)
