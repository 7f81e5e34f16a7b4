"""Follows the event logs of searches for all open event streams, with one poll of the store.

Streams pull: each knows its position in its search's log and asks for the events after it, so a
slow stream delays no other and needs no buffer.  One statement per poll finds the new events of all
followed searches.  The newest events of each are cached in encoded form; a stream that is further
behind reads from the store, page by page.
"""

from __future__ import annotations

import asyncio
import json
import logging
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from operator import attrgetter
from typing import NamedTuple, TypeVar

from anyio import CapacityLimiter, to_thread
from sse_starlette import ServerSentEvent

from nas.errors import EinsumNasError, StoreUnavailable
from nas.store import Event, Store
from nas.store.following import Head, read_heads, read_news

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
#: Seconds between polls of the store.
POLL_SECONDS = 0.5
#: Seconds between polls while streams of searches open that were not followed before.
_HURRY_SECONDS = 0.05
#: Seconds between attempts while the database cannot be reached.
AWAY_SECONDS = 2.0
#: Events that a stream gets at once.
_PAGE = 100
#: Newest events of a search that are cached in encoded form.
_CACHED = 500


class TooManyStreams(EinsumNasError):
    """The service, or the tenant, has as many event streams open as it may have."""


class EncodedEvent(NamedTuple):
    """An event in the form in which a stream sends it."""

    id: int
    data: bytes


def encoded(event: Event) -> EncodedEvent:
    """Encode an event as a server-sent event; its id is what a client returns as Last-Event-ID."""
    body = json.dumps({"created_at": event.created_at, **event.data})
    data = ServerSentEvent(body, event=event.kind, id=str(event.id)).encode()
    return EncodedEvent(event.id, data)


class FollowedSearch:
    """The newest events of one search, for all streams that follow it."""

    def __init__(self, search_id: str) -> None:
        self.search_id = search_id
        self.streams = 0
        #: None until the first poll
        self.head: Head | None = None
        #: number of the poll that found the head
        self.poll = 0
        #: no more events will come: the search is deleted, or polling has failed
        self.gone = False
        #: every event after `_floor`, up to the head, in order
        self.cached: list[EncodedEvent] = []
        self._floor = 0
        #: set once there are more events than there are now
        self.news = asyncio.Event()

    def covers(self, after: int) -> bool:
        """Whether all events after the id `after` are cached."""
        return self.head is not None and after >= self._floor

    def page(self, after: int) -> list[EncodedEvent]:
        """Cached events after the id `after`, oldest first."""
        start = bisect_right(self.cached, after, key=attrgetter("id"))
        return self.cached[start : start + _PAGE]

    def is_over(self, after: int, *, began: int, came: int) -> bool:
        """Whether the search has ended and a stream has sent all its events.

        Parameters
        ----------
        after
            Id of the last event that the stream has sent.
        began, came
            Number of polls when the stream began, and when it reached `after`.  A head found
            earlier may miss that the search was retried, or that event.
        """
        if self.gone:
            return True
        if self.head is None or not self.head.ended or self.poll <= began:
            return False
        return after == self.head.last or (after > self.head.last and self.poll > came)

    def update(self, head: Head, poll: int, news: list[Event]) -> None:
        """Take over the head that a poll found, and the events up to it since the last one."""
        changed = head != self.head
        if self.head is None or head.last < self.head.last or len(news) > _CACHED:
            # not continuous with the cache: streams read from the store until they have caught up
            self.cached, self._floor = [], head.last
        else:
            self.cached += map(encoded, news)
            if len(self.cached) > _CACHED:
                self._floor = self.cached[-_CACHED - 1].id
                del self.cached[:-_CACHED]
        self.head, self.poll = head, poll
        if changed or head.ended:
            self.wake()

    def end(self) -> None:
        """End every stream of it."""
        self.gone = True
        self.wake()

    def wake(self) -> None:
        """Make every stream that waits ask again."""
        waited, self.news = self.news, asyncio.Event()
        waited.set()


class Follower:
    """Follows the searches of all open streams; belongs to one event loop.

    Polls the store only while streams are open.

    Parameters
    ----------
    streams
        The most that may be open at once.
    """

    def __init__(self, store: Store, streams: int) -> None:
        self.store, self.streams = store, streams
        #: number of polls begun
        self.polls = 0
        #: tenant → number of its open streams
        self._open_of: Counter[str | None] = Counter()
        self._followed: dict[str, FollowedSearch] = {}
        self._polling: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self._reading: dict[tuple[str, int], asyncio.Task[list[EncodedEvent]]] = {}
        # threads of their own: streams that catch up must delay neither requests nor polls
        self._pollers, self._readers = CapacityLimiter(1), CapacityLimiter(2)

    @property
    def open(self) -> int:
        """Number of open streams."""
        return self._open_of.total()

    @property
    def cached(self) -> int:
        """Number of cached events of all searches."""
        return sum(len(followed.cached) for followed in self._followed.values())

    @property
    def is_polling(self) -> bool:
        """Whether the store is being polled."""
        return self._polling is not None and not self._polling.done()

    @contextmanager
    def following(self, search_id: str, tenant: str | None = None) -> Iterator[FollowedSearch]:
        """Count a stream as open, and follow its search, until the context ends.

        Parameters
        ----------
        tenant
            Whose key opened the stream; one tenant may have half of all streams.

        Raises
        ------
        TooManyStreams
            No more streams may be opened.
        """
        if self.open >= self.streams:
            raise TooManyStreams(f"{self.streams} event streams are open, the most allowed")
        most = max(1, self.streams // 2)
        if tenant is not None and self._open_of[tenant] >= most:
            raise TooManyStreams(
                f"tenant {tenant} has {most} event streams open, the most allowed for one tenant"
            )
        followed = self._followed.get(search_id)
        if followed is None or followed.gone:
            followed = self._followed[search_id] = FollowedSearch(search_id)
        if followed.head is None or followed.head.ended:
            self._hurry.set()
        self._open_of[tenant] += 1
        followed.streams += 1
        if not self.is_polling:
            self._polling = asyncio.create_task(self._keep_polling())
        try:
            yield followed
        finally:
            self._open_of -= Counter([tenant])
            followed.streams -= 1
            if not followed.streams and self._followed.get(search_id) is followed:
                del self._followed[search_id]

    async def stop(self) -> None:
        """End every stream and stop polling."""
        self._end_streams()
        tasks = [*self._reading.values(), *([self._polling] if self._polling else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def page(self, followed: FollowedSearch, after: int) -> list[EncodedEvent]:
        """The next events after the id `after`, oldest first; empty if there are none.

        Raises
        ------
        StoreUnavailable
            The events are not cached, and the database does not answer.
        """
        if followed.covers(after):
            return followed.page(after)
        position = followed.search_id, after
        read = self._reading.get(position)
        if read is None:  # streams at the same position share one read
            read = self._reading[position] = asyncio.create_task(self._read(*position))
            read.add_done_callback(partial(self._forget, position))
        return await asyncio.shield(read)

    async def _read(self, search_id: str, after: int) -> list[EncodedEvent]:
        read = partial(self.store.events, search_id, after=after, limit=_PAGE)
        return [encoded(event) for event in await self._thread(self._readers, read)]

    def _forget(self, position: tuple[str, int], read: asyncio.Task[list[EncodedEvent]]) -> None:
        self._reading.pop(position, None)
        if not read.cancelled():
            read.exception()  # mark as seen: every waiter may have been cancelled

    async def _thread(self, limiter: CapacityLimiter, work: Callable[[], _T]) -> _T:
        return await to_thread.run_sync(work, limiter=limiter, abandon_on_cancel=True)

    async def _keep_polling(self) -> None:
        """Poll the store while any search is followed."""
        try:
            while self._followed:
                self._hurry.clear()
                try:
                    await self._poll()
                except StoreUnavailable as error:
                    _log.warning("events of %d searches wait: %s", len(self._followed), error)
                    await asyncio.sleep(AWAY_SECONDS)
                    continue
                await asyncio.sleep(_HURRY_SECONDS)
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS - _HURRY_SECONDS):
                        await self._hurry.wait()
        except Exception:
            _log.exception("polling for events failed; all event streams end")
            self._end_streams()

    async def _poll(self) -> None:
        self.polls += 1
        poll = self.polls
        followed = dict(self._followed)
        heads = await self._thread(self._pollers, partial(read_heads, self.store, list(followed)))
        #: search → ids (after, up to) of the events to read
        spans = {
            search_id: (known.last, head.last)
            for search_id, head in heads.items()
            if (known := followed[search_id].head) is not None and head.last > known.last
        }
        read = partial(read_news, self.store, spans, limit=_CACHED + 1)
        news = await self._thread(self._pollers, read) if spans else {}
        for search_id, one in followed.items():
            if search_id in heads:
                one.update(heads[search_id], poll, news.get(search_id, []))
            else:
                one.end()

    def _end_streams(self) -> None:
        for followed in self._followed.values():
            followed.end()
