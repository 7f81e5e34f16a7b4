"""Answers as the bytes that are sent, kept until what they are made of changes.

Each is kept with the revision of its task or search, which every completed run raises; a look at
that number, begun after the request came, tells whether the bytes still hold, so no answer is ever
older than the store.
"""

from __future__ import annotations

import asyncio
import gzip
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel

from api.looks import Looks
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


class AnswerCache:
    """The answers given last, by what was asked; for one event loop."""

    def __init__(self, standings: Standings, capacity: int = _CAPACITY) -> None:
        self._capacity = capacity
        self._held: OrderedDict[Hashable, _Held] = OrderedDict()
        self._making: dict[Hashable, asyncio.Lock] = {}
        self._revisions = Looks(standings.revisions)

    async def get(self, scope: str, asked: Hashable, make: Callable[[], BaseModel]) -> Kept:
        """The answer to `asked`; made once for all who ask at the same time.

        Parameters
        ----------
        scope
            Of `nas.store.standings`, or a bare task's: the answer changes with it only.
        make
            Called in a thread where nothing that is kept holds.
        """
        revision = await self._revisions.get(scope)
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
