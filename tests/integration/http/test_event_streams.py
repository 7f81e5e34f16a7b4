"""Event streams: many at once, in order, each event once, and none that holds up the others."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from sqlalchemy import delete

from api.caching.following import POLL_SECONDS, Follower, TooManyStreams
from api.routes.events import EventStream
from nas.planning.request import SearchRequest
from nas.store import Event, Leases, Store, upgrade
from nas.store import rows as store_rows
from nas.store.engine import writing
from nas.store.following import Head, read_heads, read_news
from nas.store.keys import Keys
from nas.store.schema import SearchRow
from tests.support.databases import DATABASES
from tests.support.services import PATIENCE, wait_for
from tests.support.serving import Serving, serving
from tests.support.tiers import FULL, only

_REQUEST = SearchRequest.checked({"train_flops": 2e11, "trials": 2})
_STREAMS, _SEARCHES = 500, 5


@pytest.fixture
def store(migrated_url: str) -> Iterator[Store]:
    opened = Store(migrated_url)
    yield opened
    opened.close()


def new_search(store: Store) -> str:
    return store.create_search(_REQUEST)[0].id


def write(store: Store, search_id: str, number: int) -> None:
    """So many events in one transaction that holds the search's row, as every writer's does."""
    with writing(store.engine) as session:
        session.get(SearchRow, search_id, with_for_update=True)
        for i in range(number):
            store_rows.add_event(session, search_id, "test", {"number": i})


def ids_in(chunks: bytes) -> list[int]:
    return [int(line[4:]) for line in chunks.splitlines() if line.startswith(b"id: ")]


class Reader:
    """A stream inside this process, whose chunks are taken when it is told to."""

    def __init__(
        self, follower: Follower, search_id: str, after: int = 0,
        welcome: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:  # fmt: skip
        self.ids: list[int] = []
        self.may_read = asyncio.Event()
        self.may_read.set()
        self._stream = EventStream(follower, search_id, after, welcome)

    async def run(self) -> None:
        """Until the stream ends."""
        never = asyncio.Event()

        async def receive() -> Any:
            await never.wait()

        async def send(message: Any) -> None:
            await self.may_read.wait()
            self.ids += ids_in(message.get("body", b""))

        await self._stream({"type": "http", "method": "GET"}, receive, send)


async def until(condition: Callable[[], bool], what: str) -> None:
    give_up = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < give_up, f"{what}: not after {PATIENCE:g} s"
        await asyncio.sleep(0.02)


def following(
    store: Store, work: Callable[[Follower], Coroutine[Any, Any, None]], streams: int = 1000
) -> None:
    """Run the work with a follower, which is stopped in the end."""

    async def run() -> None:
        follower = Follower(store, streams)
        try:
            await work(follower)
        finally:
            await follower.stop()

    asyncio.run(run())


def all_ids(store: Store, search_id: str) -> list[int]:
    found: list[Event] = []
    while page := store.events(search_id, after=found[-1].id if found else 0):
        found += page
    return [event.id for event in found]


@pytest.mark.one_database
def test_a_tenant_has_half_of_all_streams_at_most(store: Store) -> None:
    search = new_search(store)

    async def work(follower: Follower) -> None:
        with ExitStack() as streams:
            for _ in range(2):
                streams.enter_context(follower.following(search, "a"))
            with pytest.raises(TooManyStreams, match="tenant a has 2 event streams"):
                streams.enter_context(follower.following(search, "a"))
            streams.enter_context(follower.following(search, "b"))
            streams.enter_context(follower.following(search))
            with pytest.raises(TooManyStreams, match="4 event streams are open"):
                streams.enter_context(follower.following(search, "c"))
        with follower.following(search, "a"):  # which has left meanwhile
            assert follower.open == 1

    following(store, work, streams=4)


def test_heads_and_news_are_those_of_the_log(store: Store) -> None:
    first, second = new_search(store), new_search(store)
    write(store, first, 7)
    last = all_ids(store, first)[-1]
    store.cancel(second)
    heads = read_heads(store, [first, second, "f" * 32])
    assert heads == {
        first: Head("queued", last), second: Head("cancelled", all_ids(store, second)[-1])
    }  # fmt: skip
    assert (heads[first].ended, heads[second].ended) == (False, True)
    span = all_ids(store, first)[1], all_ids(store, first)[5]
    news = read_news(store, {first: span, second: (0, last + 100)}, limit=3)
    assert [e.id for e in news[first]] == all_ids(store, first)[2:5]
    assert news[second] == store.events(second)
    assert read_heads(store, []) == {}


def test_more_searches_than_one_statement_takes(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'many.db'}"
    upgrade(url)
    store = Store(url)
    made = new_search(store)
    asked = [*(f"{i:032x}" for i in range(2500)), made]
    assert list(read_heads(store, asked)) == [made]
    store.close()


@pytest.mark.parametrize("migrated_url", only(["sqlite"], DATABASES), indirect=True)
def test_every_stream_is_told_everything_once(store: Store) -> None:
    """Streams that begin anywhere, at any time, while several write to several searches."""
    searches = [new_search(store) for _ in range(4)]
    chosen = random.Random(0)

    def write_for_a_while(search_id: str, seed: int) -> None:
        drawn = random.Random(seed)
        for _ in range(40):
            write(store, search_id, drawn.choice((1, 1, 2, 30, 130)))
            time.sleep(drawn.random() * 0.08)
        store.cancel(search_id)

    async def work(follower: Follower) -> None:
        writers = [
            threading.Thread(target=write_for_a_while, args=(s, i)) for i, s in enumerate(searches)
        ]
        for writer in writers:
            writer.start()
        readers: list[tuple[str, int, Reader]] = []
        async with asyncio.TaskGroup() as tasks:
            for _ in range(60):
                search_id = chosen.choice(searches)
                known = [0, *(e.id for e in store.events(search_id))]
                after = chosen.choice(known)
                readers.append((search_id, after, Reader(follower, search_id, after)))
                tasks.create_task(readers[-1][2].run())
                await asyncio.sleep(chosen.random() * 0.05)
            await until(lambda: follower.open == 0, "the end of every stream")
        for writer in writers:
            writer.join()
        for search_id, after, reader in readers:
            assert reader.ids == [i for i in all_ids(store, search_id) if i > after]

    following(store, work)


@pytest.mark.parametrize("migrated_url", ["postgresql"], indirect=True)
def test_an_event_that_is_committed_late_is_told(store: Store) -> None:
    """Ids are given when rows are written, and a greater one of another search is told first."""
    late, early = new_search(store), new_search(store)

    async def work(follower: Follower) -> None:
        one, other = Reader(follower, late), Reader(follower, early)
        tasks = [asyncio.create_task(r.run()) for r in (one, other)]
        with writing(store.engine) as session:
            session.get(SearchRow, late, with_for_update=True)
            store_rows.add_event(session, late, "late", {})
            session.flush()
            await asyncio.to_thread(write, store, early, 1)
            await until(lambda: len(other.ids) == 2, "the greater id")
            assert len(one.ids) == 1
        await until(lambda: len(one.ids) == 2, "the smaller id")
        assert one.ids[-1] < other.ids[-1]
        for search_id in (late, early):
            store.cancel(search_id)
        await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE)
        assert (one.ids, other.ids) == (all_ids(store, late), all_ids(store, early))

    following(store, work)


@pytest.mark.parametrize("migrated_url", only(["sqlite"], DATABASES), indirect=True)
def test_a_slow_stream_holds_up_nobody(store: Store) -> None:
    search_id = new_search(store)

    async def work(follower: Follower) -> None:
        slow, quick = Reader(follower, search_id), Reader(follower, search_id)
        tasks = [asyncio.create_task(r.run()) for r in (slow, quick)]
        await until(lambda: bool(slow.ids and quick.ids), "the first event")
        slow.may_read.clear()
        for _ in range(5):
            for number in (300, 300, 2000):
                await asyncio.to_thread(write, store, search_id, number)
                newest = all_ids(store, search_id)[-1]
                await until(lambda n=newest: quick.ids[-1] == n, "everything")  # type: ignore[misc]
                assert follower.cached <= 500
        assert len(slow.ids) == 1
        slow.may_read.set()
        store.cancel(search_id)
        await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE)
        assert slow.ids == quick.ids == all_ids(store, search_id)

    following(store, work)


@pytest.mark.one_database
def test_a_search_that_is_tried_again_is_followed_on(store: Store) -> None:
    leases = Leases(store, max_attempts=1)
    search_id = new_search(store)
    claimed = leases.claim("worker", 60, search_id=search_id)
    assert claimed is not None
    leases.hand_back(claimed[0])
    store.cancel(search_id)

    async def work(follower: Follower) -> None:
        ended = Reader(follower, search_id)
        await asyncio.wait_for(ended.run(), PATIENCE)
        assert ended.ids == all_ids(store, search_id)
        # behind the end of the log, and far beyond it
        for after in (ended.ids[-1], 2**62):
            none = Reader(follower, search_id, after)
            await asyncio.wait_for(none.run(), PATIENCE)
            assert none.ids == []
        # one that has not heard of the end keeps what was last seen of the search
        behind = Reader(follower, search_id)
        behind.may_read.clear()
        tasks = [asyncio.create_task(behind.run())]
        polls = follower.polls
        await until(lambda: follower.polls > polls + 1, "a poll at the end")
        store.retry(search_id)
        again, on = Reader(follower, search_id), Reader(follower, search_id, ended.ids[-1])
        tasks += [asyncio.create_task(reader.run()) for reader in (again, on)]
        await until(lambda: again.ids == all_ids(store, search_id), "the log")
        write(store, search_id, 1)
        await until(lambda: again.ids == all_ids(store, search_id), "what came then")
        assert not any(task.done() for task in tasks)
        store.cancel(search_id)
        behind.may_read.set()
        await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE)
        ids = all_ids(store, search_id)
        assert behind.ids == again.ids == ids
        assert on.ids == ids[len(ended.ids) :]

    following(store, work)


@pytest.mark.one_database
def test_the_stream_of_a_deleted_search_ends(store: Store) -> None:
    search_id, other = new_search(store), new_search(store)

    async def work(follower: Follower) -> None:
        gone, kept = Reader(follower, search_id), Reader(follower, other)
        tasks = [asyncio.create_task(r.run()) for r in (gone, kept)]
        await until(lambda: bool(gone.ids and kept.ids), "the first events")
        with writing(store.engine) as session:
            session.execute(delete(SearchRow).where(SearchRow.id == search_id))
        await asyncio.wait_for(tasks[0], PATIENCE)
        assert not tasks[1].done()
        store.cancel(other)
        await asyncio.wait_for(tasks[1], PATIENCE)
        assert kept.ids == all_ids(store, other)

    following(store, work)


@pytest.mark.one_database
def test_nothing_is_looked_at_for_nobody(store: Store) -> None:
    search_id = new_search(store)

    async def work(follower: Follower) -> None:
        for _ in range(2):
            reader = Reader(follower, search_id)
            task = asyncio.create_task(reader.run())
            begun = follower.polls
            await until(lambda begun=begun: follower.polls > begun + 1, "polls")  # type: ignore[misc]
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            assert follower.open == 0
            await until(lambda: not follower.is_polling, "an end")
            polls = follower.polls
            await asyncio.sleep(3 * POLL_SECONDS)
            assert follower.polls == polls

    following(store, work)


@pytest.mark.one_database
def test_no_more_streams_than_may_be(store: Store) -> None:
    search_id = new_search(store)

    async def work(follower: Follower) -> None:
        with follower.following(search_id), follower.following(new_search(store)):
            with pytest.raises(TooManyStreams, match="2 event streams"):
                with follower.following(search_id):
                    pass
            assert follower.open == 2
        assert follower.open == 0

    following(store, work, streams=2)


@pytest.mark.one_database
def test_who_is_no_longer_welcome_is_told_no_more(store: Store) -> None:
    search_id = new_search(store)

    async def work(follower: Follower) -> None:
        still = True

        async def welcome() -> bool:
            return still

        one, other = Reader(follower, search_id, welcome=welcome), Reader(follower, search_id)
        tasks = [asyncio.create_task(r.run()) for r in (one, other)]
        await until(lambda: bool(one.ids and other.ids), "the first event")
        still = False
        await asyncio.wait_for(tasks[0], PATIENCE)
        write(store, search_id, 1)
        store.cancel(search_id)
        await asyncio.wait_for(tasks[1], PATIENCE)
        assert other.ids == all_ids(store, search_id)
        assert one.ids == other.ids[:1]

    following(store, work)


def test_a_database_that_is_away_is_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "here.db"
    url = f"sqlite:///{file}"
    upgrade(url)
    store = Store(url)
    search_id, other = new_search(store), new_search(store)

    async def work(follower: Follower) -> None:
        live = Reader(follower, search_id)
        tasks = [asyncio.create_task(live.run())]
        await until(lambda: bool(live.ids), "the first event")
        file.rename(tmp_path / "away.db")
        late = Reader(follower, other)
        tasks.append(asyncio.create_task(late.run()))
        await asyncio.sleep(3 * POLL_SECONDS)
        assert late.ids == []
        (tmp_path / "away.db").rename(file)
        write(store, search_id, 3)
        for one in (search_id, other):
            store.cancel(one)
        await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE)
        assert live.ids == all_ids(store, search_id)
        assert late.ids == all_ids(store, other)

    following(store, work)
    store.close()


class RawStream:
    """One event stream over a plain connection: a client's library would cost more than it."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.status = b""

    async def run(self, port: int, search_id: str) -> None:
        """Until it ends."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        path = f"/v1/searches/{search_id}/events"
        writer.write(
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode()
        )
        self.status = (await reader.readline())[9:12]
        async for line in reader:
            self.ids += ids_in(line)
        writer.close()
        assert self.status == b"200"  # at once: whoever waits for its events would wait in vain


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving(tmp_path_factory.mktemp("streams")) as running:
        yield running


def test_500_streams_beside_another_client(service: Serving) -> None:
    store = service.store
    searches = [new_search(store) for _ in range(_SEARCHES)]

    async def reading(statuses: list[int], done: asyncio.Event) -> None:
        async with httpx.AsyncClient(base_url=service.url, timeout=PATIENCE) as client:
            while not done.is_set():
                for path in ("/healthz", "/v1/searches", f"/v1/searches/{searches[0]}"):
                    statuses.append((await client.get(path)).status_code)
                await asyncio.sleep(0.02)

    async def run() -> None:
        statuses: list[int] = []
        done = asyncio.Event()
        streams = [(RawStream(), searches[i % _SEARCHES]) for i in range(_STREAMS)]
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(reading(statuses, done))
            running = [tasks.create_task(s.run(service.port, search)) for s, search in streams]
            try:
                await until(lambda: all(len(s.ids) == 1 for s, _ in streams), "the first event")
                quiet = len(statuses)
                await until(lambda: len(statuses) > quiet + 100, "answers beside idle streams")
                for search in searches:
                    await asyncio.to_thread(store.set_priority, search, 5)
                await until(lambda: all(len(s.ids) == 2 for s, _ in streams), "a later event")
                for search in searches:
                    await asyncio.to_thread(store.cancel, search)
                await asyncio.wait_for(asyncio.gather(*running), PATIENCE)
            finally:
                done.set()  # or a reader that misses its cancellation is waited for
        assert set(statuses) == {200}
        for stream, search in streams:
            assert stream.ids == all_ids(store, search)

    asyncio.run(run())


def test_the_stream_of_a_revoked_key_ends(tmp_path: Path) -> None:
    with serving(tmp_path, access_control="true") as service:
        search_id = new_search(service.store)
        keys = Keys(service.store)
        made = [keys.create("default", name, ["read"]) for name in ("one", "other")]
        stranger = keys.create("elsewhere", "stranger", ["read"])[1]
        url = f"{service.url}/v1/searches/{search_id}/events"
        chunks: dict[str, bytes] = {"one": b"", "other": b""}

        def follow(name: str, secret: str) -> None:
            with httpx.stream("GET", url, headers=bearer(secret), timeout=PATIENCE) as answer:
                for chunk in answer.iter_bytes():
                    chunks[name] += chunk

        def bearer(secret: str) -> dict[str, str]:
            return {"Authorization": f"Bearer {secret}"}

        assert httpx.get(url).status_code == 401
        assert httpx.get(url, headers=bearer(stranger)).status_code == 404
        threads = [threading.Thread(target=follow, args=(k.name, secret)) for k, secret in made]
        for thread in threads:
            thread.start()
        wait_for(lambda: all(map(ids_in, chunks.values())), "the first event")
        keys.revoke(made[0][0].id)
        threads[0].join(PATIENCE)
        assert threads[1].is_alive()
        service.store.cancel(search_id)
        threads[1].join(PATIENCE)
        ids = all_ids(service.store, search_id)
        assert (ids_in(chunks["one"]), ids_in(chunks["other"])) == (ids[:1], ids)


@FULL
def test_streams_beyond_the_most_are_refused(tmp_path: Path) -> None:
    with serving(tmp_path, event_streams="3") as service, ExitStack() as stack:
        url = f"{service.url}/v1/searches/{new_search(service.store)}/events"
        assert httpx.get(url.replace("searches/", "searches/none")).status_code == 404
        for _ in range(3):
            assert stack.enter_context(httpx.stream("GET", url)).status_code == 200
        refused = httpx.get(url)
        assert refused.status_code == 503
        assert refused.headers["content-type"] == "application/problem+json"
        assert int(refused.headers["retry-after"]) > 0
        assert refused.json()["type"] == "urn:einsum-nas:too-many-streams"
        stack.close()

        def is_free() -> bool:
            with httpx.stream("GET", url) as answer:
                return answer.status_code == 200

        wait_for(is_free, "room for a stream")


def test_a_long_log_comes_whole_and_from_anywhere(service: Serving) -> None:
    search_id = new_search(service.store)
    write(service.store, search_id, 1234)
    service.store.cancel(search_id)
    url = f"{service.url}/v1/searches/{search_id}/events"
    ids = all_ids(service.store, search_id)
    assert ids_in(httpx.get(url).content) == ids
    for start in (0, 99, 100, 777, len(ids) - 1):
        given = {"Last-Event-ID": str(ids[start])}
        assert ids_in(httpx.get(url, headers=given).content) == ids[start + 1 :]


def test_open_streams_do_not_hold_up_the_end(tmp_path: Path) -> None:
    with serving(tmp_path) as service, ExitStack() as stack:
        url = f"{service.url}/v1/searches/{new_search(service.store)}/events"
        for _ in range(20):
            stack.enter_context(httpx.stream("GET", url))
        service.process.terminate()
        assert service.process.wait(PATIENCE) in (0, -15)
        assert "Traceback" not in service.log.read_text()
