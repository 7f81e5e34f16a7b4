"""Requests of one address take turns, so that one who asks for much does not keep all waiting."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.health import PROBES
from api.problems import RETRY_AFTER_SECONDS, problem
from api.rates import network_of

#: Key of a scope's extensions: whether the client is gone, as far as its connection knows.
GONE = "einsum_nas.gone"
_TURN = "einsum_nas.turn"
#: Requests of one address that are worked on at once, and that wait.  Two keep a core busy: one
#: waits for the database while the other computes; each more is in the way of other addresses.
_AT_ONCE, _WAITING = 2, 2000
#: Addresses of which lines are kept, unless more are at work.
_LINES = 10_000
#: Refusals for asking too often that one address is told in a second; more of them wait.
_REFUSALS_PER_SECOND = 100.0
#: Seconds that such a refusal waits at most.
_LONGEST_WAIT = 5.0


def give_back(scope: Scope) -> None:
    """Let others of the same address have the turn of a request that waits for something else."""
    found: Callable[[], None] | None = scope.get("extensions", {}).get(_TURN)
    if found is not None:
        found()


@dataclass(slots=True)
class Line:
    """The requests of one address: how many are worked on, and who waits by what they show."""

    working: int = 0
    waiting: OrderedDict[str, deque[asyncio.Future[None]]] = field(default_factory=OrderedDict)
    length: int = 0
    #: time.monotonic() of the last refusal for asking too often, told or to be told
    refused: float = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether nothing of it need be kept."""
        return not self.working and not self.length and self.refused < time.monotonic()

    async def enter(self, shown: str) -> None:
        """Wait for a turn; those who show the same wait behind each other, not before others."""
        if self.working < _AT_ONCE:
            self.working += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.setdefault(shown, deque()).append(turn)
        self.length += 1
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave()  # the turn came at the same moment
            else:
                self.length -= 1
                with suppress(KeyError, ValueError):
                    self.waiting[shown].remove(turn)
            raise

    def leave(self) -> None:
        """Hand the turn on."""
        while self.waiting:
            shown, turns = self.waiting.popitem(last=False)
            if not turns:
                continue
            turn = turns.popleft()
            if turns:
                self.waiting[shown] = turns  # behind everyone else
            if not turn.done():
                self.length -= 1
                turn.set_result(None)
                return
        self.working -= 1

    def refusal_wait(self) -> float:
        """Seconds until another refusal may be told."""
        now = time.monotonic()
        at = max(now, self.refused + 1 / _REFUSALS_PER_SECOND)
        self.refused = min(at, now + _LONGEST_WAIT)
        return self.refused - now


class Turn:
    """One request's: held while it is worked on, not while its client is waited for."""

    def __init__(self, line: Line, shown: str) -> None:
        self._line, self._shown = line, shown
        self._held = self._answered = False

    async def take(self) -> None:
        await self._line.enter(self._shown)
        self._held = True

    def give_back(self) -> None:
        if self._held:
            self._held = False
            self._line.leave()

    def receiving(self, receive: Receive) -> Receive:
        """`receive` that gives the turn back while the client sends."""

        async def received() -> Message:
            if self._answered:
                return await receive()
            self.give_back()
            message = await receive()
            if not self._answered:
                await self.take()
            return message

        return received

    def sending(self, send: Send) -> Send:
        """`send` that gives the turn back for good when the answer begins."""

        async def sent(message: Message) -> None:
            if not self._answered:
                self._answered = True
                self.give_back()
                if message.get("status") == 429:
                    # each costs a little: who asks again at once would take all of the process
                    await asyncio.sleep(self._line.refusal_wait())
            await send(message)

        return sent


class Turns:
    """Works on a few requests of one address at once, and lets the others wait for their turn."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._lines: dict[str, Line] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on, requests in their turn."""
        # probes are answered whatever other clients do
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        network = network_of(str((scope["client"] or ("",))[0]))
        if len(self._lines) >= _LINES:
            self._lines = {name: one for name, one in self._lines.items() if not one.is_idle}
        line = self._lines.setdefault(network, Line())
        if line.length >= _WAITING:
            refused = problem(
                503, "too-many-waiting", "Too many requests wait",
                f"{line.length} requests of this address wait; try again later",
                headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
            )  # fmt: skip
            await refused(scope, receive, send)
            return
        headers = Headers(scope=scope)
        turn = Turn(line, headers.get("authorization") or headers.get("cookie") or "")
        gone: Callable[[], bool] = scope.get("extensions", {}).get(GONE, lambda: False)
        scope.setdefault("extensions", {})[_TURN] = turn.give_back
        await turn.take()
        try:
            if not gone():
                await self._app(scope, turn.receiving(receive), turn.sending(send))
        finally:
            turn.give_back()
