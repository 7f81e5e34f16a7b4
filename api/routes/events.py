"""Server-sent events: streams the event log of a search while it grows."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import Field
from sse_starlette import EventSourceResponse
from starlette.types import Receive, Scope, Send

from api.caching.following import AWAY_SECONDS, FollowedSearch, Follower, TooManyStreams
from api.declared import READ
from api.deps import STRICT, SearchId, StoreDep
from api.middleware.bodies import Absent
from api.problems import problem, refusals
from nas.errors import StoreUnavailable

router = APIRouter(prefix="/v1/searches", dependencies=[READ, STRICT])
_log = logging.getLogger(__name__)
#: Schema of one event of the stream.
_EVENT: dict[str, Any] = {
    "type": "object",
    "required": ["id", "event", "data"],
    "properties": {
        "id": {"type": "string", "pattern": "^[0-9]+$"},
        "event": {"type": "string", "description": "what happened"},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {
                "type": "object",
                "required": ["created_at"],
                "properties": {"created_at": {"type": "number"}},
            },
        },
    },
}
_FOUND: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "All events, past and future, until the search has ended",
        "content": {"text/event-stream": {"itemSchema": _EVENT}},
    }
}
#: Seconds between comments that keep an idle stream's connection alive.
_PING_SECONDS = 15
#: Seconds between checks that the key which opened a stream is still valid.
_WELCOME_SECONDS = 5.0

Welcome = Callable[[], Awaitable[bool]]


class EventStream(EventSourceResponse):
    """Sends every event of a search after an id, past and future, until the search has ended.

    While the database cannot be reached, the stream waits; it omits no event.

    Parameters
    ----------
    after
        Id of the last event that the client has.
    welcome
        Tells whether the client may still follow the search; if not, the stream ends.
    tenant
        Whose key opened the stream; None without access control.
    """

    def __init__(
        self,
        follower: Follower,
        search_id: str,
        after: int,
        welcome: Welcome | None,
        tenant: str | None = None,
    ) -> None:
        super().__init__(self._chunks(), ping=_PING_SECONDS)
        self._follower, self._search_id, self._after = follower, search_id, after
        self._welcome, self._asked = welcome, time.monotonic()
        self._tenant = tenant
        self._followed: FollowedSearch | None = None
        self._began = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 503 where no more streams may be opened."""
        try:
            with self._follower.following(self._search_id, self._tenant) as self._followed:
                self._began = self._follower.polls
                await super().__call__(scope, receive, send)
        except TooManyStreams as error:
            why = f"{error}; try again later"
            refused = problem(503, "too-many-streams", "Too many event streams", why)
            await refused(scope, receive, send)

    async def _chunks(self) -> AsyncIterator[bytes]:
        follower, followed, after = self._follower, self._followed, self._after
        assert followed is not None
        came = self._began
        while True:
            news = followed.news  # taken before the page, so that no later event is missed
            try:
                if not await self._is_welcome():
                    return
                page = await follower.page(followed, after)
            except StoreUnavailable as error:
                _log.warning("events of search %s wait: %s", self._search_id, error)
                await asyncio.sleep(AWAY_SECONDS)
                continue
            if page:
                yield b"".join(event.data for event in page)
                after, came = page[-1].id, follower.polls
            elif followed.is_over(after, began=self._began, came=came):
                return
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(None if self._welcome is None else _WELCOME_SECONDS):
                        await news.wait()

    async def _is_welcome(self) -> bool:
        if self._welcome is None or time.monotonic() - self._asked < _WELCOME_SECONDS:
            return True
        answer = await self._welcome()
        self._asked = time.monotonic()
        return answer


@router.get(
    "/{search_id}/events",
    response_class=EventSourceResponse,
    responses={**_FOUND, **refusals(404)},
    summary="Stream the events of a search, past and future (server-sent events)",
)
async def search_events(
    request: Request,
    search_id: SearchId,
    store: StoreDep,
    last_event_id: Annotated[
        Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,17})$")] | Absent,
        Header(description="id of the last event that the client has received"),
    ] = None,
) -> EventSourceResponse:
    await run_in_threadpool(store.search, search_id)
    follower: Follower = request.app.state.follower
    welcome: Welcome | None = getattr(request.state, "still_welcome", None)
    tenant = store.tenant if store.confined else None
    return EventStream(follower, search_id, int(last_event_id or 0), welcome, tenant)
