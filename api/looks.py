"""One look at the store for all who want one at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from fastapi.concurrency import run_in_threadpool

Value = TypeVar("Value")


@dataclass(slots=True)
class _Look(Generic[Value]):
    """A look that is under way, or comes next."""

    wanted: set[str] = field(default_factory=set)
    found: asyncio.Future[Mapping[str, Value]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Looks(Generic[Value]):
    """Looks values up by name, never with a look that began before it was asked for.

    Requests that come while a look is under way share the next one; for one event loop.

    Parameters
    ----------
    read
        Names → values, called in a thread; a name without a value is left out.
    """

    def __init__(self, read: Callable[[Set[str]], Mapping[str, Value]]) -> None:
        self._read = read
        self._next: _Look[Value] | None = None
        self._looking: asyncio.Task[None] | None = None

    async def get(self, name: str) -> Value | None:
        """The value of a name as it is now; raises what reading raises."""
        if self._next is None:
            self._next = _Look()
        look = self._next
        look.wanted.add(name)
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        # one who goes away must not take the others' look along
        return (await asyncio.shield(look.found)).get(name)

    async def _look(self) -> None:
        while self._next is not None:
            look, self._next = self._next, None
            try:
                look.found.set_result(await run_in_threadpool(self._read, look.wanted))
            except Exception as error:
                look.found.set_exception(error)
                look.found.exception()  # those who asked may all have gone away
