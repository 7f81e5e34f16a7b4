"""Fair queueing of requests per address: a client with many requests does not delay the others."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.limits.rates import network_of
from api.problems import problem

#: Key of a scope's extensions: a function that tells whether the client has disconnected.
GONE = "einsum_nas.gone"
_RELEASE = "einsum_nas.release"
#: Requests of one address that are processed at once, and that wait.  Two keep a core busy: one
#: waits for the database while the other computes; more of them would slow down other addresses.
_AT_ONCE, _WAITING = 2, 2000
#: Addresses whose queues are kept although they are idle.
_QUEUES = 10_000
#: Responses with status 429 that one address gets in a second; further ones are delayed.
_REFUSALS_PER_SECOND = 100.0
#: Seconds that such a response is delayed at most.
_LONGEST_WAIT = 5.0


def release_slot(scope: Scope) -> None:
    """Free the slot of a request that is about to wait, for other requests of its address."""
    found: Callable[[], None] | None = scope.get("extensions", {}).get(_RELEASE)
    if found is not None:
        found()


@dataclass(slots=True)
class AddressQueue:
    """The requests of one address: how many are processed, and which wait, by credential."""

    working: int = 0
    waiting: OrderedDict[str, deque[asyncio.Future[None]]] = field(default_factory=OrderedDict)
    length: int = 0
    #: time.monotonic() of the last response with status 429, sent or still delayed
    refused: float = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether it can be dropped: it holds nothing that matters later."""
        return not self.working and not self.length and self.refused < time.monotonic()

    async def enter(self, credential: str) -> None:
        """Wait for a slot.  Credentials are served in rotation, each first come, first served."""
        if self.working < _AT_ONCE:
            self.working += 1
            return
        slot: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.setdefault(credential, deque()).append(slot)
        self.length += 1
        try:
            await slot
        except asyncio.CancelledError:
            if slot.done() and not slot.cancelled():
                self.leave()  # the slot was granted at the moment of the cancellation
            else:
                self.length -= 1
                with suppress(KeyError, ValueError):
                    self.waiting[credential].remove(slot)
            raise

    def leave(self) -> None:
        """Pass the slot on to a waiting request, or free it if none waits."""
        while self.waiting:
            credential, slots = self.waiting.popitem(last=False)
            if not slots:
                continue
            slot = slots.popleft()
            if slots:
                self.waiting[credential] = slots  # behind all other credentials
            if not slot.done():
                self.length -= 1
                slot.set_result(None)
                return
        self.working -= 1

    def refusal_wait(self) -> float:
        """Seconds by which the next response with status 429 is to be delayed."""
        now = time.monotonic()
        at = max(now, self.refused + 1 / _REFUSALS_PER_SECOND)
        self.refused = min(at, now + _LONGEST_WAIT)
        return self.refused - now


class Slot:
    """One request's place among those processed; given up whenever it waits for its client."""

    def __init__(self, queue: AddressQueue, credential: str) -> None:
        self._queue, self._credential = queue, credential
        self._held = self._answered = False

    async def acquire(self) -> None:
        await self._queue.enter(self._credential)
        self._held = True

    def release(self) -> None:
        if self._held:
            self._held = False
            self._queue.leave()

    def receiving(self, receive: Receive) -> Receive:
        """`receive` that frees the slot while the client sends."""

        async def received() -> Message:
            if self._answered:
                return await receive()
            self.release()
            message = await receive()
            if not self._answered:
                await self.acquire()
            return message

        return received

    def sending(self, send: Send) -> Send:
        """`send` that frees the slot for good when the response begins."""

        async def sent(message: Message) -> None:
            if not self._answered:
                self._answered = True
                self.release()
                if message.get("status") == 429:
                    # clients that repeat a refused request at once would keep the process busy
                    await asyncio.sleep(self._queue.refusal_wait())
            await send(message)

        return sent


class FairQueue:
    """Middleware that processes a few requests of each address at once and queues the others.

    Parameters
    ----------
    is_probe
        Tells of which requests the answer must not wait, however many others do.
    """

    def __init__(self, app: ASGIApp, is_probe: Callable[[Scope], bool]) -> None:
        self._app, self._is_probe = app, is_probe
        self._queues: dict[str, AddressQueue] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on once it has a slot; everything else at once."""
        if scope["type"] != "http" or self._is_probe(scope):
            await self._app(scope, receive, send)
            return
        network = network_of(str((scope["client"] or ("",))[0]))
        if len(self._queues) >= _QUEUES:
            self._queues = {name: one for name, one in self._queues.items() if not one.is_idle}
        queue = self._queues.setdefault(network, AddressQueue())
        if queue.length >= _WAITING:
            why = f"{queue.length} requests of this address wait; try again later"
            refused = problem(503, "too-many-waiting", "Too many requests wait", why)
            await refused(scope, receive, send)
            return
        headers = Headers(scope=scope)
        slot = Slot(queue, headers.get("authorization") or headers.get("cookie") or "")
        gone: Callable[[], bool] = scope.get("extensions", {}).get(GONE, lambda: False)
        scope.setdefault("extensions", {})[_RELEASE] = slot.release
        await slot.acquire()
        try:
            if not gone():
                await self._app(scope, slot.receiving(receive), slot.sending(send))
        finally:
            slot.release()
