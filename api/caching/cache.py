"""Cache of encoded answers, each valid until the runs that it is computed from change.

An answer is cached with the revision of its task or search, a number that every completed run
raises.  Each request reads that number again, and uses the cached answer only if it is unchanged,
so no answer is ever older than the store.
"""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Callable, Hashable
from typing import NamedTuple

from cachetools import LRUCache
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel

from api.caching.coalescing import Coalescer
from nas.store import Standings


class CachedAnswer(NamedTuple):
    """An answer as JSON, plain and compressed."""

    body: bytes
    gzipped: bytes


class AnswerCache:
    """Least-recently-used cache of answers, by question; belongs to one event loop."""

    def __init__(self, standings: Standings, capacity: int = 2048) -> None:
        self._entries: LRUCache[Hashable, tuple[int, CachedAnswer]] = LRUCache(capacity)
        self._making: dict[Hashable, asyncio.Lock] = {}
        self._revisions = Coalescer(standings.revisions)

    async def get(
        self, scope: str, question: Hashable, make: Callable[[], BaseModel]
    ) -> CachedAnswer:
        """The answer to a question; computed once for requests that come at the same time.

        Parameters
        ----------
        scope
            As in `nas.store.scopes`, or a task: the answer depends on its runs only.
        make
            Computes the answer; called in a thread if no cached answer is valid.
        """
        revision = await self._revisions.get(scope)
        if revision is None:  # no run is complete: `make` raises, and errors are not cached
            return await run_in_threadpool(_encoded, make)
        if (found := self._find(question, revision)) is not None:
            return found
        lock = self._making.setdefault(question, asyncio.Lock())
        try:
            async with lock:
                if (found := self._find(question, revision)) is None:
                    # `revision` was read before the runs, so it may be too low, never too high:
                    # an answer with later runs is then computed once more, but is not wrong
                    found = await run_in_threadpool(_encoded, make)
                    self._entries[question] = revision, found
                return found
        finally:
            self._making.pop(question, None)

    def _find(self, question: Hashable, revision: int) -> CachedAnswer | None:
        of, found = self._entries.get(question, (-1, None))
        return found if of >= revision else None


def _encoded(make: Callable[[], BaseModel]) -> CachedAnswer:
    body = make().model_dump_json().encode()
    return CachedAnswer(body, gzip.compress(body, compresslevel=5))
