"""Request coalescing: requests that come together are answered by one read of the store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Set
from typing import Generic, TypeVar

from fastapi.concurrency import run_in_threadpool

Value = TypeVar("Value")


class Coalescer(Generic[Value]):
    """Looks up values by name; requests that come during one read share the next.

    A value is never older than the request for it: its read begins after the request came.  An
    instance belongs to one event loop.

    Parameters
    ----------
    read
        Names → values, called in a thread; a name without a value is left out.
    """

    def __init__(self, read: Callable[[Set[str]], Mapping[str, Value]]) -> None:
        self._read = read
        #: the names that the next read asks for, and what it will find
        self._next: tuple[set[str], asyncio.Future[Mapping[str, Value]]] | None = None
        self._reading: asyncio.Task[None] | None = None

    async def get(self, name: str) -> Value | None:
        """The current value of a name, None if it has none; raises what `read` raises."""
        if self._next is None:
            self._next = set(), asyncio.get_running_loop().create_future()
        names, found = self._next
        names.add(name)
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read_batches())
        # shielded: the cancellation of one request must not cancel the read that others wait for
        return (await asyncio.shield(found)).get(name)

    async def _read_batches(self) -> None:
        while self._next is not None:
            (names, found), self._next = self._next, None
            try:
                found.set_result(await run_in_threadpool(self._read, names))
            except Exception as error:
                found.set_exception(error)
                found.exception()  # mark as seen: every waiter may have been cancelled
