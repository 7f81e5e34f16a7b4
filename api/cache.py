"""Answers as the bytes that are sent, kept until what they are made of changes.

Each is kept with the revision of its task or search, which every completed run raises; one look at
that number tells whether the bytes still hold, so no answer is ever older than the store.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from pydantic import BaseModel

from nas.store import Standings

_CAPACITY = 2048


@dataclass(frozen=True, slots=True)
class _Held:
    revision: int
    body: bytes


class AnswerCache:
    """The answers given last, by what was asked; safe for threads."""

    def __init__(self, standings: Standings, capacity: int = _CAPACITY) -> None:
        self._standings, self._capacity = standings, capacity
        self._held: OrderedDict[Hashable, _Held] = OrderedDict()
        self._lock = threading.Lock()
        self._making: dict[Hashable, threading.Lock] = {}

    def body(self, scope: str, asked: Hashable, make: Callable[[], BaseModel]) -> bytes:
        """The answer to `asked` as JSON; made once for all who ask at the same time.

        Parameters
        ----------
        scope
            A search's id, a task's name or name@fingerprint: the answer changes with it only.
        """
        revision = self._standings.revision(scope)
        if revision is None:  # nothing is measured: an error, and errors are not kept
            return _encoded(make())
        found = self._find(asked, revision)
        if found is not None:
            return found
        with self._lock:
            making = self._making.setdefault(asked, threading.Lock())
        with making:
            found = self._find(asked, revision)
            if found is not None:
                return found
            try:
                # read before the answer is made: what lands meanwhile makes it stale, not wrong
                body = _encoded(make())
                self._keep(asked, _Held(revision, body))
                return body
            finally:
                with self._lock:
                    self._making.pop(asked, None)

    def _find(self, asked: Hashable, revision: int) -> bytes | None:
        with self._lock:
            held = self._held.get(asked)
            if held is None or held.revision < revision:
                return None
            self._held.move_to_end(asked)
            return held.body

    def _keep(self, asked: Hashable, held: _Held) -> None:
        with self._lock:
            self._held[asked] = held
            self._held.move_to_end(asked)
            while len(self._held) > self._capacity:
                self._held.popitem(last=False)


def _encoded(answer: BaseModel) -> bytes:
    return answer.model_dump_json().encode()
