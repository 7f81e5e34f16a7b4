"""Requests take turns: of one address a few at once, and nobody waits behind one who asks most."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from starlette.types import Receive, Scope, Send

from api.limits.fair_queue import GONE, FairQueue

_AT_ONCE = 2
_PATIENCE = 30.0


class Work:
    """An application whose requests end when they are told to."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.working = self.most = 0
        self.may_end = asyncio.Semaphore(0)
        self.status = 200

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "POST":
            while (await receive()).get("more_body"):
                pass
        self.begun.append(scope["name"])
        self.working += 1
        self.most = max(self.most, self.working)
        try:
            await self.may_end.acquire()
        finally:
            self.working -= 1
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        self.ended.append(scope["name"])
        if scope["path"] == "/stream":
            await asyncio.Event().wait()


def request(
    queue: FairQueue, name: str, *, address: str = "192.0.2.1", shown: str = "key", path: str = "/",
    body: asyncio.Event | None = None, gone: bool = False,
    statuses: list[int] | None = None,
) -> asyncio.Task[None]:  # fmt: skip
    """A request under way."""

    async def receive() -> Any:
        assert body is not None
        await body.wait()
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        if statuses is not None and "status" in message:
            statuses.append(message["status"])

    scope = {
        "type": "http", "method": "GET" if body is None else "POST", "path": path, "name": name,
        "headers": [(b"authorization", shown.encode())], "client": (address, 1),
        "extensions": {GONE: lambda: gone},
    }  # fmt: skip
    return asyncio.create_task(queue(scope, receive, send))


def run(test: Callable[[Work, FairQueue], Coroutine[Any, Any, None]]) -> None:
    async def running() -> None:
        work = Work()
        await asyncio.wait_for(
            test(work, FairQueue(work, lambda scope: scope["path"] == "/probe")), _PATIENCE
        )

    asyncio.run(running())


async def settle() -> None:
    """Let everything go as far as it can."""
    for _ in range(200):
        await asyncio.sleep(0)


def test_a_few_of_one_address_at_once() -> None:
    async def test(work: Work, queue: FairQueue) -> None:
        tasks = [request(queue, f"greedy {i}", shown=str(i)) for i in range(50)]
        await settle()
        assert work.working == _AT_ONCE
        other = request(queue, "other", address="192.0.2.2")
        await settle()
        assert work.begun[-1] == "other"
        for _ in range(51):
            work.may_end.release()
            await settle()
        await asyncio.gather(other, *tasks)
        assert work.most == _AT_ONCE + 1
        assert len(work.ended) == 51

    run(test)


def test_who_shows_another_key_waits_for_one_turn() -> None:
    async def test(work: Work, queue: FairQueue) -> None:
        tasks = [request(queue, f"greedy {i}") for i in range(50)]
        await settle()
        tasks += [request(queue, f"modest {i}", shown="another") for i in range(2)]
        await settle()
        for _ in range(4):
            work.may_end.release()
            await settle()
        assert work.begun[_AT_ONCE:] == ["greedy 2", "modest 0", "greedy 3", "modest 1"]
        for _ in range(48):
            work.may_end.release()
        await asyncio.gather(*tasks)
        greedy = [name for name in work.begun if "greedy" in name]
        assert greedy == [f"greedy {i}" for i in range(50)]

    run(test)


def test_addresses_of_one_network_are_one() -> None:
    async def test(work: Work, queue: FairQueue) -> None:
        tasks = [request(queue, "v6", address=f"2001:db8::{i:x}") for i in range(1, 20)]
        await settle()
        assert work.working == _AT_ONCE
        for _ in tasks:
            work.may_end.release()
        await asyncio.gather(*tasks)

    run(test)


def test_a_body_that_is_waited_for_holds_no_turn() -> None:
    async def test(work: Work, queue: FairQueue) -> None:
        body = asyncio.Event()
        tasks = [request(queue, f"slow {i}", body=body) for i in range(20)]
        await settle()
        quick = request(queue, "quick")
        await settle()
        assert work.begun == ["quick"]
        body.set()
        await settle()
        assert work.working == _AT_ONCE
        for _ in range(21):
            work.may_end.release()
        await asyncio.gather(quick, *tasks)
        assert len(work.ended) == 21
        assert work.most == _AT_ONCE

    run(test)


def test_an_answer_that_goes_on_holds_no_turn() -> None:
    async def test(work: Work, queue: FairQueue) -> None:
        streams = [request(queue, "stream", path="/stream") for _ in range(20)]
        for _ in streams:
            work.may_end.release()
        await settle()
        assert work.ended == ["stream"] * 20
        quick = request(queue, "quick")
        work.may_end.release()
        await quick
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)

    run(test)


def test_a_probe_waits_for_nobody() -> None:
    async def test(work: Work, queue: FairQueue) -> None:
        tasks = [request(queue, "greedy") for _ in range(20)]
        await settle()
        probe = request(queue, "probe", path="/probe")
        await settle()
        assert work.begun[-1] == "probe"
        for _ in range(21):
            work.may_end.release()
        await asyncio.gather(probe, *tasks)

    run(test)


def test_a_turn_is_not_lost_with_who_waits_for_it() -> None:
    async def test(work: Work, queue: FairQueue) -> None:
        tasks = [request(queue, f"request {i}") for i in range(30)]
        await settle()
        for task in tasks[1:29:2]:
            task.cancel()
        work.may_end.release()  # a turn is handed on in the moment that others give up
        await settle()
        for _ in range(30):
            work.may_end.release()
        await asyncio.gather(*tasks, return_exceptions=True)
        again = [request(queue, f"again {i}") for i in range(_AT_ONCE + 1)]
        work.may_end = asyncio.Semaphore(0)
        await settle()
        assert work.working == _AT_ONCE
        for _ in again:
            work.may_end.release()
        await asyncio.gather(*again)

    run(test)


def test_nothing_is_done_for_who_is_gone() -> None:
    async def test(work: Work, queue: FairQueue) -> None:
        await request(queue, "gone", gone=True)
        assert work.begun == []

    run(test)


def test_too_many_that_wait_are_refused() -> None:
    async def test(work: Work, queue: FairQueue) -> None:
        statuses: list[int] = []
        tasks = [request(queue, "greedy") for _ in range(2000 + _AT_ONCE)]
        await asyncio.sleep(0)
        await request(queue, "one more", statuses=statuses)
        other = request(queue, "other", address="192.0.2.2", statuses=statuses)
        for _ in range(2001 + _AT_ONCE):
            work.may_end.release()
        await asyncio.gather(other, *tasks)
        assert statuses == [503, 200]
        assert "one more" not in work.begun

    run(test)


def test_refusals_for_asking_too_often_come_one_after_another() -> None:
    """What is allowed meanwhile does not wait for them."""

    async def test(work: Work, queue: FairQueue) -> None:
        work.status = 429
        told: list[int] = []
        for _ in range(301):
            work.may_end.release()
        tasks = [request(queue, "refused", statuses=told) for _ in range(100)]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        work.status = 200
        await request(queue, "allowed")
        assert 0 < len(told) < 100
        await asyncio.gather(*tasks)
        assert told == [429] * 100

    run(test)
