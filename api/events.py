"""Server-sent events: a search's append-only log as it grows."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header
from fastapi.concurrency import run_in_threadpool
from sse_starlette import EventSourceResponse, ServerSentEvent

from api.problems import responses
from api.routes import SearchId, StoreDep
from nas.errors import StoreUnavailable
from nas.store import Store
from nas.store.records import TERMINAL

router = APIRouter(prefix="/v1")
_log = logging.getLogger(__name__)
#: Seconds between looks at the log.
_POLL_SECONDS = 0.5
#: Seconds between attempts while the database is away.
_AWAY_SECONDS = 2.0


async def _follow(store: Store, search_id: str, after: int) -> AsyncIterator[ServerSentEvent]:
    """Every event past `after`, then those to come, until the search has ended.

    While the database is away the stream waits; what happened meanwhile comes afterwards.
    """
    while True:
        try:
            events = await run_in_threadpool(store.events, search_id, after=after)
            ended = not events and await run_in_threadpool(_has_ended, store, search_id, after)
        except StoreUnavailable as error:
            _log.warning("events of search %s wait: %s", search_id, error)
            await asyncio.sleep(_AWAY_SECONDS)
            continue
        for event in events:
            after = event.id
            body = {"created_at": event.created_at, **event.data}
            yield ServerSentEvent(json.dumps(body), event=event.kind, id=str(event.id))
        if ended or (events and events[-1].kind in TERMINAL):
            return
        if not events:
            await asyncio.sleep(_POLL_SECONDS)


def _has_ended(store: Store, search_id: str, after: int) -> bool:
    """Whether the search has ended and its log holds nothing more."""
    return store.search(search_id).state in TERMINAL and not store.events(
        search_id, after=after, limit=1
    )


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
