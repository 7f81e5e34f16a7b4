"""One look at the store for all who follow the logs of searches.

Streams pull: each keeps its own place in its search's log and asks for what follows it, so that one
that is slow holds up nobody, and nothing is kept for it.  What is new in any search is found by one
statement for all of them and read once; its encoded events are kept for a while, and streams that
are further behind read from the store, page by page.
"""

from __future__ import annotations

import asyncio
import json
import logging
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import TypeVar

from anyio import CapacityLimiter, to_thread
from sse_starlette import ServerSentEvent

from nas.errors import EinsumNasError, StoreUnavailable
from nas.store import Event, Store
from nas.store.following import Head, read_heads, read_news

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
#: Seconds between looks at all logs.
LOOK_SECONDS = 0.5
#: Seconds between looks while searches come that nobody followed before.
_HURRY_SECONDS = 0.05
#: Seconds between attempts while the database is away.
AWAY_SECONDS = 2.0
#: Events that a stream is given at once.
_PAGE = 100
#: Newest events of a search that are kept encoded.
_KEPT = 500


class TooManyStreams(EinsumNasError):
    """As many event streams are open as the service keeps open at once."""


@dataclass(frozen=True, slots=True)
class Told:
    """An event as it is sent."""

    id: int
    sent: bytes


def encoded(event: Event) -> Told:
    """An event with its id, for Last-Event-ID."""
    body = json.dumps({"created_at": event.created_at, **event.data})
    return Told(event.id, ServerSentEvent(body, event=event.kind, id=str(event.id)).encode())


class Followed:
    """The end of one search's log, for every stream that follows it."""

    def __init__(self, search_id: str) -> None:
        self.search_id = search_id
        self.streams = 0
        #: None until it has been looked at
        self.head: Head | None = None
        #: number of the look that found the head
        self.look = 0
        #: nothing more will be told: the search is deleted, or looking at it failed
        self.gone = False
        #: every event past `_floor`, up to the head, in order
        self._kept: list[Told] = []
        self._floor = 0
        self._news = asyncio.Event()

    @property
    def kept(self) -> int:
        """Events that are kept encoded."""
        return len(self._kept)

    @property
    def news(self) -> asyncio.Event:
        """Set once there is more to tell than there is now."""
        return self._news

    def covers(self, after: int) -> bool:
        """Whether all that follows the event id `after` is kept here."""
        return self.head is not None and after >= self._floor

    def page(self, after: int) -> list[Told]:
        """Kept events past `after`, oldest first."""
        start = bisect_right(self._kept, after, key=attrgetter("id"))
        return self._kept[start : start + _PAGE]

    def is_over(self, after: int, *, began: int, came: int) -> bool:
        """Whether a stream has been told everything.

        Parameters
        ----------
        after
            Id of the last event that it was told.
        began, came
            Looks there had been when it began, and when it came to `after`: an older head may not
            know that the search is being tried again, or of that event.
        """
        if self.gone:
            return True
        if self.head is None or not self.head.ended or self.look <= began:
            return False
        return after == self.head.last or (after > self.head.last and self.look > came)

    def span(self, head: Head) -> tuple[int, int] | None:
        """What has to be read for the new head; None where nothing has."""
        if self.head is None or head.last <= self.head.last:
            return None
        return self.head.last, head.last

    def update(self, head: Head, look: int, news: list[Event]) -> None:
        """Take in a new head, and the events that its span was found to hold."""
        changed = head != self.head
        if self.head is None or head.last < self.head.last or len(news) > _KEPT:
            # too far from what is kept: streams read from the store until they have caught up
            self._kept, self._floor = [], head.last
        else:
            self._kept += map(encoded, news)
            if len(self._kept) > _KEPT:
                self._floor = self._kept[-_KEPT - 1].id
                del self._kept[:-_KEPT]
        self.head, self.look = head, look
        if changed or head.ended:
            self.wake()

    def wake(self) -> None:
        """Let every stream look again."""
        waited, self._news = self._news, asyncio.Event()
        waited.set()


class Follower:
    """Follows the searches of all open streams; for one event loop.

    Looks at the store only while there are streams.

    Parameters
    ----------
    streams
        The most that are open at once.
    """

    def __init__(self, store: Store, streams: int) -> None:
        self.store, self.streams = store, streams
        #: looks begun
        self.looks = 0
        self._open = 0
        self._open_of: Counter[str] = Counter()
        self._followed: dict[str, Followed] = {}
        self._looking: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self._reading: dict[tuple[str, int], asyncio.Task[list[Told]]] = {}
        # threads of their own: streams that catch up keep neither requests nor looks waiting
        self._lookers, self._readers = CapacityLimiter(1), CapacityLimiter(2)

    @property
    def open(self) -> int:
        """Streams that are open."""
        return self._open

    @property
    def kept(self) -> int:
        """Events that are kept encoded."""
        return sum(followed.kept for followed in self._followed.values())

    @property
    def is_looking(self) -> bool:
        """Whether the store is looked at from time to time."""
        return self._looking is not None and not self._looking.done()

    @contextmanager
    def following(self, search_id: str, tenant: str | None = None) -> Iterator[Followed]:
        """Keep a stream's place among the open ones, and its search followed.

        Parameters
        ----------
        tenant
            Whose key asks: one tenant has half of all streams at most.

        Raises
        ------
        TooManyStreams
            There is none left.
        """
        if self._open >= self.streams:
            raise TooManyStreams(f"{self.streams} event streams are open, as many as may be")
        most = max(1, self.streams // 2)
        if tenant is not None and self._open_of[tenant] >= most:
            raise TooManyStreams(f"{most} event streams of tenant {tenant} are open, its most")
        followed = self._followed.get(search_id)
        if followed is None or followed.gone:
            followed = self._followed[search_id] = Followed(search_id)
        if followed.head is None or followed.head.ended:
            self._hurry.set()
        self._open += 1
        if tenant is not None:
            self._open_of[tenant] += 1
        followed.streams += 1
        if not self.is_looking:
            self._looking = asyncio.create_task(self._look_on())
        try:
            yield followed
        finally:
            self._open -= 1
            if tenant is not None:
                self._open_of -= Counter([tenant])
            followed.streams -= 1
            if not followed.streams and self._followed.get(search_id) is followed:
                del self._followed[search_id]

    async def stop(self) -> None:
        """End every stream and look no more."""
        self._give_up()
        tasks = [*self._reading.values(), *([self._looking] if self._looking else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def page(self, followed: Followed, after: int) -> list[Told]:
        """Some of what follows the event id `after`, oldest first; nothing if that is all.

        Raises
        ------
        StoreUnavailable
            It has to be read, and the database does not answer.
        """
        if followed.covers(after):
            return followed.page(after)
        asked = followed.search_id, after
        read = self._reading.get(asked)
        if read is None:  # streams that were opened together read together
            read = self._reading[asked] = asyncio.create_task(self._read(*asked))
            read.add_done_callback(partial(self._forget, asked))
        return await asyncio.shield(read)

    async def _read(self, search_id: str, after: int) -> list[Told]:
        read = partial(self.store.events, search_id, after=after, limit=_PAGE)
        return [encoded(event) for event in await self._thread(self._readers, read)]

    def _forget(self, asked: tuple[str, int], read: asyncio.Task[list[Told]]) -> None:
        self._reading.pop(asked, None)
        if not read.cancelled():
            read.exception()  # that nobody waited for it is no error of its own

    async def _thread(self, limiter: CapacityLimiter, work: Callable[[], _T]) -> _T:
        return await to_thread.run_sync(work, limiter=limiter, abandon_on_cancel=True)

    async def _look_on(self) -> None:
        """Look again and again while anything is followed."""
        try:
            while self._followed:
                self._hurry.clear()
                try:
                    await self._look()
                except StoreUnavailable as error:
                    _log.warning("events of %d searches wait: %s", len(self._followed), error)
                    await asyncio.sleep(AWAY_SECONDS)
                    continue
                await asyncio.sleep(_HURRY_SECONDS)
                try:
                    async with asyncio.timeout(LOOK_SECONDS - _HURRY_SECONDS):
                        await self._hurry.wait()
                except TimeoutError:
                    pass
        except Exception:
            _log.exception("events cannot be followed; their streams end")
            self._give_up()

    async def _look(self) -> None:
        self.looks += 1
        look = self.looks
        followed = dict(self._followed)
        heads = await self._thread(self._lookers, partial(read_heads, self.store, list(followed)))
        spans = {
            search_id: span
            for search_id, head in heads.items()
            if (span := followed[search_id].span(head)) is not None
        }
        news: dict[str, list[Event]] = {}
        if spans:
            read = partial(read_news, self.store, spans, limit=_KEPT + 1)
            news = await self._thread(self._lookers, read)
        for search_id, one in followed.items():
            if search_id in heads:
                one.update(heads[search_id], look, news.get(search_id, []))
            else:
                one.gone = True
                one.wake()

    def _give_up(self) -> None:
        for followed in self._followed.values():
            followed.gone = True
            followed.wake()
