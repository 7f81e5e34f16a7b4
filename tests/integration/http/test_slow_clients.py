"""Clients that are slow, silent, endless or too many, beside one that is none of these."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx2 as httpx
import pytest

from api.limits.connections import Limits
from api.server import checked_proxies, limits_for
from nas.errors import InvalidInput
from nas.planning.request import SearchRequest
from nas.settings import Settings
from nas.store.keys import Keys
from tests.support.services import PATIENCE, wait_for
from tests.support.serving import QUICK, Serving, serving
from tests.support.tiers import FULL, thinned

_OF_EACH = 10
_REQUEST = SearchRequest.checked({"train_flops": 2e11, "trials": 2})
_GET = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n"
_POST = b"POST /v1/searches HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
_LARGE = b"GET /static/plotly.min.js HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
#: What a client sends at once, and what it sends on for ever, a little at a time.
_SLOW: dict[str, tuple[bytes, bytes]] = {
    "says nothing": (b"", b""),
    "empty lines": (b"", b"\r\n"),
    "request line by the byte": (b"GET /", b"a"),
    "header by the byte": (_GET + b"X-Long: ", b"a"),
    "headers without end": (_GET, b"X-Some: thing\r\n"),
    "empty lines after an answer": (_GET + b"\r\n", b"\r\n"),
    "a second head by the byte": (_GET + b"\r\n" + _GET + b"X-Long: ", b"a"),
    "body by the byte": (_POST + b"Content-Length: 1000\r\n\r\n", b" "),
    "body that never comes": (_POST + b"Content-Length: 1000\r\n\r\n", b""),
    "body by the chunk": (_POST + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "a chunk's extension": (_POST + b"Transfer-Encoding: chunked\r\n\r\n1;a=", b"b"),
    "trailers without end": (
        _POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X-Some: thing\r\n"
    ),
    "refused body that goes on": (_POST + b"Content-Length: 1000000000\r\n\r\n", b" "),
    "answers that are not read": (_LARGE * 4, b""),
}  # fmt: skip


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving(tmp_path_factory.mktemp("slow"), log_level="info") as running:
        yield running


def answers_of(connection: socket.socket) -> bytes:
    """Everything that comes until the service closes the connection."""
    received = bytearray()
    with suppress(ConnectionError):
        while more := connection.recv(65536):
            received += more
    return bytes(received)


@contextmanager
def another_client(service: Serving) -> Iterator[list[int]]:
    """Someone who asks all the time; the statuses of the answers."""
    statuses: list[int] = []
    done = threading.Event()
    search = service.store.create_search(_REQUEST)[0].id

    def ask() -> None:
        with httpx.Client(base_url=service.url, timeout=PATIENCE) as client:
            while not done.is_set():
                for path in ("/healthz", f"/v1/searches/{search}", "/v1/searches"):
                    statuses.append(client.get(path).status_code)
                done.wait(0.02)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield statuses
        seen = len(statuses)
        wait_for(lambda: len(statuses) > seen, "an answer to another client")
    finally:
        done.set()
        asking.join()
    assert set(statuses) == {200}


class Slow:
    """A connection that sends a little at a time, and reads what comes or nothing."""

    def __init__(self, service: Serving, first: bytes, more: bytes) -> None:
        self.service, self.more = service, more
        self.received = bytearray()
        self.ended = False
        self.socket = service.connect(receive_bytes=4096)
        self.socket.sendall(first)
        self.reads = not first.startswith(_LARGE)
        if not self.reads:
            self.socket.recv(1, socket.MSG_PEEK)  # there is something to read
        self.socket.setblocking(False)

    def go_on(self) -> None:
        with suppress(OSError):
            self.socket.send(self.more)
        if self.reads:
            with suppress(BlockingIOError):
                self.read()
        elif self.socket.getsockname() not in self.service.held():
            self.ended = True

    def read(self) -> None:
        try:
            came = self.socket.recv(65536)
        except ConnectionError:
            came = b""
        self.received += came
        self.ended = not came


@contextmanager
def connected(service: Serving, kinds: Iterable[str]) -> Iterator[list[Slow]]:
    """Some slow clients of each kind, until the service has cut them off."""
    with ExitStack() as stack:
        slow = [Slow(service, *_SLOW[kind]) for kind in kinds for _ in range(_OF_EACH)]
        for one in slow:
            stack.callback(one.socket.close)
        yield slow

        def cut_off() -> bool:
            left = [one for one in slow if not one.ended]
            for one in left:
                one.go_on()
            return not left

        wait_for(cut_off, "the end of slow connections")


@pytest.mark.parametrize("kind", thinned(_SLOW, 3))
def test_a_slow_client_is_cut_off(service: Serving, kind: str) -> None:
    with another_client(service), connected(service, [kind]) as slow:
        pass
    statuses = {bytes(one.received).rpartition(b"HTTP/1.1 ")[2][:3] for one in slow}
    asked = any(word in kind for word in ("head", "line by", "body", "chunk", "trailers"))
    answered = {b"200"} if "after" in kind else {b""}
    refused = {b"413"} if "refused" in kind else {b"408"}
    assert statuses == (refused if asked else answered)


def test_all_kinds_at_once_leave_a_stream_alone(service: Serving) -> None:
    search = service.store.create_search(_REQUEST)[0].id
    events: list[str] = []

    def follow() -> None:
        url = f"{service.url}/v1/searches/{search}/events"
        with httpx.stream("GET", url, timeout=PATIENCE) as answer:
            events.extend(line[7:] for line in answer.iter_lines() if line.startswith("event: "))

    following = threading.Thread(target=follow)
    following.start()
    with another_client(service):
        with connected(service, _SLOW):
            pass
        service.store.set_priority(search, 3)
        service.store.cancel(search)
        following.join(PATIENCE)
    assert events == ["queued", "priority", "cancelled"]


def test_who_reads_slowly_gets_everything(service: Serving) -> None:
    """Far longer than the time for reading nothing."""
    whole = httpx.get(
        f"{service.url}/static/plotly.min.js", headers={"Accept-Encoding": "identity"}
    )
    with service.connect(receive_bytes=65536) as connection:
        connection.sendall(_LARGE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        received = bytearray()
        began = time.monotonic()
        while more := connection.recv(65536):
            received += more
            time.sleep(0.08)
    assert time.monotonic() - began > 4 * QUICK["stall_seconds"]
    assert bytes(received).partition(b"\r\n\r\n")[2] == whole.content


def test_an_unfinished_request_is_no_error_of_the_service(service: Serving) -> None:
    for ending in ("by the client", "by the service"):
        with service.connect() as connection:
            connection.sendall(_POST + b"Content-Length: 1000\r\n\r\n{")
            if ending == "by the service":
                assert b"408" in answers_of(connection)
    wait_for(lambda: service.held() == set(), "the end of both")
    assert "Traceback" not in service.log.read_text()
    assert "an error of this service" not in service.log.read_text()


_TOO_MUCH: dict[str, tuple[bytes, int]] = {
    "a long target": (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", 414),
    "a target without end": (b"GET /" + b"a" * 900_000, 414),
    "a long header": (_GET + b"X-Long: " + b"a" * 40_000 + b"\r\n\r\n", 431),
    "a header without end": (_GET + b"X-Long: " + b"a" * 900_000, 431),
    "a name without end": (_GET + b"X" * 900_000, 431),
    "many headers": (_GET + b"X-Some: thing\r\n" * 101 + b"\r\n", 431),
    "headers without end": (_GET + b"X-Some: thing\r\n" * 50_000, 431),
    "no request": (b"\x16\x03\x01\x02\x00\x01\x00", 400),
    "another protocol": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "two lengths": (_POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}", 400),
    "a length and chunks": (
        _POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400
    ),
    "a large body": (_POST + b"Content-Length: 2000000\r\n\r\n" + b" " * 2_000_000, 413),
    "a large chunk": (
        _POST + b"Transfer-Encoding: chunked\r\n\r\n1e8480\r\n" + b" " * 2_000_000, 413
    ),
    "a chunk's long extension": (
        _POST + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"a" * 2_000_000, 413
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", _TOO_MUCH)
def test_too_much_is_refused_with_little(service: Serving, kind: str) -> None:
    sent, status = _TOO_MUCH[kind]
    with another_client(service), service.connect() as connection:
        with suppress(ConnectionError):  # the rest may come after the end
            connection.sendall(sent)
        head, _, body = answers_of(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"application/problem+json" in head.lower() or status == 413
    assert b"server:" not in head.lower()
    assert len(head) + len(body) < 1024
    if status != 413:
        assert json.loads(body)["status"] == status


def test_a_kept_connection_serves_one_request_after_another(service: Serving) -> None:
    with httpx.Client(base_url=service.url) as client:
        for _ in range(50):
            assert client.get("/healthz").status_code == 200
            assert client.post("/v1/searches", json={}).status_code == 422
        assert len(service.held()) == 1


def test_requests_that_were_sent_ahead_are_answered_in_order(service: Serving) -> None:
    with service.connect() as connection:
        ahead = [_GET.replace(b"healthz", b"nothing-%d" % i) + b"\r\n" for i in range(20)]
        connection.sendall(b"".join(ahead) + _GET + b"Connection: close\r\n\r\n")
        received = answers_of(connection)
    assert [part[:3] for part in received.split(b"HTTP/1.1 ")[1:]] == [b"404"] * 20 + [b"200"]


def test_too_many_requests_sent_ahead_end_the_connection(service: Serving) -> None:
    with another_client(service), service.connect() as connection:
        with suppress(ConnectionError):
            connection.sendall((_GET + b"\r\n") * 5000)
        assert answers_of(connection).count(b"HTTP/1.1 ") < 100


@FULL
def test_a_client_that_went_away_leaves_nothing_behind(tmp_path: Path) -> None:
    """Also where a request was sent behind the one whose answer goes on."""
    with serving(tmp_path, event_streams="2") as service:
        search = service.store.create_search(_REQUEST)[0].id
        stream = b"GET /v1/searches/%s/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        stream %= search.encode()
        for rest in (b"", _GET + b"\r\n", _GET, stream, b"nonsense\r\n\r\n", stream * 100):
            with service.connect() as connection:
                connection.sendall(stream + rest)
                came = b""
                while b"event: queued" not in came and (more := connection.recv(1000)):
                    came += more

            def is_free() -> bool:
                with ExitStack() as stack:
                    url = f"{service.url}/v1/searches/{search}/events"
                    two = [stack.enter_context(httpx.stream("GET", url)) for _ in range(2)]
                    return all(answer.status_code == 200 for answer in two)

            wait_for(is_free, "room for streams")
        assert "Traceback" not in service.log.read_text()


@FULL
def test_a_flood_of_one_key_leaves_room_for_another(tmp_path: Path) -> None:
    """Requests sent ahead on many connections, for as long as the other client asks."""
    with (
        serving(tmp_path, access_control="true", rate_limit="200/minute") as service,
        ExitStack() as stack,
    ):
        search = service.store.create_search(_REQUEST)[0].id
        keys = Keys(service.store)
        greedy, modest = (keys.create("default", name, ["read"])[1] for name in ("a", "b"))
        request = f"GET /v1/searches?limit=1 HTTP/1.1\r\nAuthorization: Bearer {greedy}\r\n"
        ahead = (request.encode() + b"Host: 127.0.0.1\r\n\r\n") * 16
        done = threading.Event()
        statuses: Counter[bytes] = Counter()

        def flood() -> None:
            with service.connect() as connection:
                while not done.is_set():
                    connection.sendall(ahead)
                    left = 16
                    while left and not done.is_set() and (came := connection.recv(65536)):
                        starts = came.split(b"HTTP/1.1 ")[1:]
                        left -= len(starts)
                        statuses.update(part[:3] for part in starts)

        flooding = [threading.Thread(target=flood) for _ in range(20)]
        for one in flooding:
            one.start()
        stack.callback(done.set)
        wait_for(lambda: statuses[b"429"] > 20, "refusals of the flood")
        with httpx.Client(base_url=service.url, timeout=PATIENCE) as client:
            client.headers["Authorization"] = f"Bearer {modest}"
            for _ in range(50):
                assert client.get(f"/v1/searches/{search}").status_code == 200
        done.set()
        for one in flooding:
            one.join(PATIENCE)
        assert set(statuses) == {b"200", b"429"}


def test_one_address_leaves_room_for_others(tmp_path: Path) -> None:
    bounds = {"connections": 40, "connections_of_one": 30, "head_seconds": 600.0}
    with serving(tmp_path, bounds) as service, ExitStack() as stack:

        def fill(source: str, number: int) -> None:
            for _ in range(number):
                stack.enter_context(service.connect(source))

        def refusal(source: str) -> bytes:
            with service.connect(source) as connection:
                return answers_of(connection)

        def asked() -> int:
            with httpx.Client(base_url=service.url) as client:
                return client.get("/healthz").status_code

        fill("127.0.0.2", 30)
        wait_for(lambda: len(service.held()) == 30, "the connections of one address")
        for _ in range(5):
            assert refusal("127.0.0.2").startswith(b"HTTP/1.1 429 ")
        assert asked() == 200
        fill("127.0.0.3", 10)
        wait_for(lambda: len(service.held()) == 40, "all connections")
        for source in ("127.0.0.2", "127.0.0.3", "127.0.0.4"):
            assert refusal(source).startswith(b"HTTP/1.1 503 ")
        stack.close()
        wait_for(lambda: not service.held(), "the end of all connections")
        assert asked() == 200
        fill("127.0.0.2", 30)  # the count is taken back
        wait_for(lambda: len(service.held()) == 30, "the connections of one address again")
        assert asked() == 200


@FULL
def test_a_proxy_brings_as_many_connections_as_there_may_be(tmp_path: Path) -> None:
    bounds = {"connections": 40, "connections_of_one": 5, "head_seconds": 600.0}
    with serving(tmp_path, bounds, trusted_proxies="127.0.0.2") as service, ExitStack() as stack:
        for _ in range(35):
            stack.enter_context(service.connect("127.0.0.2"))
        wait_for(lambda: len(service.held()) == 35, "the proxy's connections")


def test_limits_come_from_the_files_that_may_be_open() -> None:
    many = limits_for(Settings(), 1_000_000)
    assert many.connections == 10_000
    assert many.connections > many.connections_of_one >= Settings().event_streams
    few = limits_for(Settings(event_streams=100), 4096)
    assert (few.connections, few.connections_of_one) == (1898, 1100)
    assert limits_for(Settings(), 64) == Limits(8, 6)


@pytest.mark.parametrize("given", ["*", "proxy.example", "10.0.0.0/33", "10.0.0.1/8"])
def test_a_proxy_is_an_address_or_a_network(given: str) -> None:
    assert checked_proxies(["10.0.0.1", "2001:db8::/32"]) == ["10.0.0.1", "2001:db8::/32"]
    with pytest.raises(InvalidInput, match="TRUSTED_PROXIES"):
        checked_proxies(["10.0.0.1", given])
