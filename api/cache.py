"""Answers as the bytes that are sent, kept until what they are made of changes.

Each is kept with the revision of its task or search, which every completed run raises; a look at
that number, begun after the request came, tells whether the bytes still hold, so no answer is ever
older than the store.  Requests that come while a look is under way share the next one.
"""

from __future__ import annotations

import asyncio
import gzip
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel

from nas.store import Standings

_CAPACITY = 2048


@dataclass(frozen=True, slots=True)
class Kept:
    """An answer as JSON, plain and as gzip."""

    body: bytes
    packed: bytes


@dataclass(frozen=True, slots=True)
class _Held:
    revision: int
    answer: Kept


@dataclass(slots=True)
class _Look:
    """One look at the revisions of some scopes."""

    scopes: set[str] = field(default_factory=set)
    found: asyncio.Future[dict[str, int]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class AnswerCache:
    """The answers given last, by what was asked; for one event loop."""

    def __init__(self, standings: Standings, capacity: int = _CAPACITY) -> None:
        self._standings, self._capacity = standings, capacity
        self._held: OrderedDict[Hashable, _Held] = OrderedDict()
        self._making: dict[Hashable, asyncio.Lock] = {}
        self._next: _Look | None = None
        self._looking: asyncio.Task[None] | None = None

    async def get(self, scope: str, asked: Hashable, make: Callable[[], BaseModel]) -> Kept:
        """The answer to `asked`; made once for all who ask at the same time.

        Parameters
        ----------
        scope
            A search's id, a task's name or name@fingerprint: the answer changes with it only.
        make
            Called in a thread where nothing that is kept holds.
        """
        revision = await self._revision(scope)
        if revision is None:  # nothing is measured: an error, and errors are not kept
            return await run_in_threadpool(_encoded, make)
        found = self._find(asked, revision)
        if found is not None:
            return found
        lock = self._making.setdefault(asked, asyncio.Lock())
        try:
            async with lock:
                found = self._find(asked, revision)
                if found is None:
                    # the revision was read before: what lands meanwhile makes it stale, not wrong
                    found = await run_in_threadpool(_encoded, make)
                    self._keep(asked, _Held(revision, found))
                return found
        finally:
            self._making.pop(asked, None)

    async def _revision(self, scope: str) -> int | None:
        if self._next is None:
            self._next = _Look()
        look = self._next
        look.scopes.add(scope)
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        # one who goes away must not take the others' look along
        return (await asyncio.shield(look.found)).get(scope)

    async def _look(self) -> None:
        while self._next is not None:
            look, self._next = self._next, None
            try:
                look.found.set_result(
                    await run_in_threadpool(self._standings.revisions, look.scopes)
                )
            except Exception as error:
                look.found.set_exception(error)

    def _find(self, asked: Hashable, revision: int) -> Kept | None:
        held = self._held.get(asked)
        if held is None or held.revision < revision:
            return None
        self._held.move_to_end(asked)
        return held.answer

    def _keep(self, asked: Hashable, held: _Held) -> None:
        self._held[asked] = held
        self._held.move_to_end(asked)
        while len(self._held) > self._capacity:
            self._held.popitem(last=False)


def _encoded(make: Callable[[], BaseModel]) -> Kept:
    body = make().model_dump_json().encode()
    return Kept(body, gzip.compress(body, compresslevel=5))
