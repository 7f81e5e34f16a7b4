"""Clients that are slow, silent, endless or too many, beside one that is none of these.

They meet nginx, set up as where it is deployed, in front of a real service.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest

from api.server import checked_proxies, connections_for
from nas.errors import InvalidInput
from nas.planning.request import SearchRequest
from nas.settings import Settings
from nas.store.audit import Audit
from nas.store.keys import Keys
from tests.support.services import PATIENCE, wait_for
from tests.support.serving import QUICK, Edge, Serving, edged, serving
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
    "body that never comes": (_POST + b"Content-Length: 1000\r\n\r\n", b""),
    "chunks that never come": (_POST + b"Transfer-Encoding: chunked\r\n\r\n1;a=", b""),
    "refused body that goes on": (_POST + b"Content-Length: 1000000000\r\n\r\n", b" "),
    "answers that are not read": (_LARGE * 4, b""),
}  # fmt: skip
#: Bodies that go on for as long as their clients like, and of which the service sees nothing.
_ENDLESS = {
    "body by the byte": (_POST + b"Content-Length: 65000\r\n\r\n", b" "),
    "body by the chunk": (_POST + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "a chunk's extension": (_POST + b"Transfer-Encoding: chunked\r\n\r\n1;a=", b"b"),
    "trailers": (_POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X-Some: thing\r\n"),
}
#: Rates that leave a test's requests alone.
_ANY_RATE = {"rate=50r/s": "rate=100000r/s"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving(
        tmp_path_factory.mktemp("service"), log_level="info", trusted_proxies="127.0.0.1"
    ) as running:
        yield running


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory, service: Serving) -> Iterator[Edge]:
    """Without TLS, so that clients can be slow by the byte, and with short times."""
    folder = tmp_path_factory.mktemp("edge")
    with edged(folder, service, tls=False, changes=QUICK | _ANY_RATE) as running:
        yield running


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory, service: Serving) -> Iterator[Edge]:
    """As where it is deployed."""
    with edged(tmp_path_factory.mktemp("secure"), service) as running:
        yield running


def answers_of(connection: socket.socket) -> bytes:
    """Everything that comes until the connection is closed."""
    received = bytearray()
    with suppress(ConnectionError):
        while more := connection.recv(65536):
            received += more
    return bytes(received)


@contextmanager
def another_client(edge: Edge, service: Serving) -> Iterator[list[int]]:
    """Someone who asks all the time; the statuses of the answers."""
    statuses: list[int] = []
    done = threading.Event()
    search = service.store.create_search(_REQUEST)[0].id

    def ask() -> None:
        with httpx.Client(base_url=edge.url, timeout=PATIENCE) as client:
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

    def __init__(self, edge: Edge, first: bytes, more: bytes) -> None:
        self.edge, self.more = edge, more
        self.received = bytearray()
        self.ended = False
        self.socket = edge.connect("127.0.0.2", receive_bytes=4096)
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
        elif self.socket.getsockname() not in self.edge.held():
            self.ended = True

    def read(self) -> None:
        try:
            came = self.socket.recv(65536)
        except ConnectionError:
            came = b""
        self.received += came
        self.ended = not came


@contextmanager
def connected(edge: Edge, kinds: Iterable[str]) -> Iterator[list[Slow]]:
    """Some slow clients of each kind, until they have been cut off."""
    with ExitStack() as stack:
        slow = [Slow(edge, *_SLOW[kind]) for kind in kinds for _ in range(_OF_EACH)]
        for one in slow:
            stack.callback(one.socket.close)
        yield slow

        def cut_off() -> bool:
            left = [one for one in slow if not one.ended]
            for one in left:
                one.go_on()
            return not left

        wait_for(cut_off, "the end of slow connections")


def _reached(service: Serving) -> int:
    """How many connections the service has open."""
    found = psutil.Process(service.process.pid).net_connections("tcp")
    return sum(c.status == "ESTABLISHED" and c.laddr.port == service.port for c in found)


@pytest.mark.parametrize("kind", thinned(_SLOW, 3))
def test_a_slow_client_is_cut_off(edge: Edge, service: Serving, kind: str) -> None:
    with another_client(edge, service), connected(edge, [kind]) as slow:
        pass
    statuses = {bytes(one.received).rpartition(b"HTTP/1.1 ")[2][:3] for one in slow}
    expected = {"empty lines after an answer": b"200", "a second head by the byte": b"200"}
    assert statuses == {expected.get(kind, b"413" if "refused" in kind else b"")}


@pytest.mark.parametrize("kind", thinned(_ENDLESS, 2))
def test_an_endless_body_stays_at_the_edge(edge: Edge, service: Serving, kind: str) -> None:
    """Of one address as many as may be answered at once; more of it are refused, of others none."""
    with ExitStack() as stack:
        slow = [Slow(edge, *_ENDLESS[kind]) for _ in range(16)]
        for one in slow:
            stack.callback(one.socket.close)

        def next_status() -> bytes:
            with edge.connect("127.0.0.2") as connection:
                connection.sendall(_POST + b"Content-Length: 2\r\nConnection: close\r\n\r\n{}")
                return answers_of(connection)[9:12]

        with another_client(edge, service):
            for _ in range(5):
                for one in slow:
                    one.go_on()
                assert next_status() == b"429"
        assert not any(one.ended for one in slow)
        wait_for(lambda: _reached(service) == 0, "the end of what reached the service")


def test_all_kinds_at_once_leave_a_stream_alone(edge: Edge, service: Serving) -> None:
    search = service.store.create_search(_REQUEST)[0].id
    events: list[str] = []

    def follow() -> None:
        url = f"{edge.url}/v1/searches/{search}/events"
        with httpx.stream("GET", url, timeout=PATIENCE) as answer:
            events.extend(line[7:] for line in answer.iter_lines() if line.startswith("event: "))

    following = threading.Thread(target=follow)
    following.start()
    wait_for(lambda: events == ["queued"], "an event as soon as it happens")
    with another_client(edge, service):
        with connected(edge, _SLOW):
            pass
        service.store.set_priority(search, 3)
        wait_for(lambda: len(events) == 2, "an event as soon as it happens")
        service.store.cancel(search)
        following.join(PATIENCE)
    assert events == ["queued", "priority", "cancelled"]


def test_who_reads_slowly_gets_everything(edge: Edge) -> None:
    """Far longer than the time for reading nothing, and from the edge, not the service."""
    whole = httpx.get(f"{edge.url}/static/plotly.min.js", headers={"Accept-Encoding": "identity"})
    with edge.connect(receive_bytes=65536) as connection:
        connection.sendall(_LARGE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        received = bytearray()
        began = time.monotonic()
        while more := connection.recv(65536):
            received += more
            time.sleep(0.08)
    assert time.monotonic() - began > 4
    assert bytes(received).partition(b"\r\n\r\n")[2] == whole.content


_TOO_MUCH: dict[str, tuple[bytes, int]] = {
    "a long target": (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", 414),
    "a target without end": (b"GET /" + b"a" * 900_000, 414),
    "a long header": (_GET + b"X-Long: " + b"a" * 40_000 + b"\r\n\r\n", 431),
    "a header without end": (_GET + b"X-Long: " + b"a" * 900_000, 431),
    "a name without end": (_GET + b"X" * 900_000, 431),
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
}  # fmt: skip


@pytest.mark.parametrize("kind", _TOO_MUCH)
def test_too_much_is_refused_with_little(edge: Edge, service: Serving, kind: str) -> None:
    sent, status = _TOO_MUCH[kind]
    with another_client(edge, service), edge.connect("127.0.0.2") as connection:
        with suppress(ConnectionError):  # the rest may come after the end
            connection.sendall(sent)
        head, _, body = answers_of(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"application/problem+json" in head
    assert len(head) + len(body) < 1024
    found = json.loads(body)
    assert found["status"] == status
    assert "accepted" in found["detail"] or "not a valid" in found["detail"]


def test_requests_of_one_connection_are_answered_in_order(edge: Edge) -> None:
    with edge.connect() as connection:
        ahead = [_GET.replace(b"healthz", b"nothing-%d" % i) + b"\r\n" for i in range(20)]
        connection.sendall(b"".join(ahead) + _GET + b"Connection: close\r\n\r\n")
        received = answers_of(connection)
    assert [part[:3] for part in received.split(b"HTTP/1.1 ")[1:]] == [b"404"] * 20 + [b"200"]


@FULL
def test_a_client_that_went_away_leaves_nothing_behind(tmp_path: Path) -> None:
    """Also where a request was sent behind the one whose answer goes on."""
    with (
        serving(tmp_path / "home", event_streams="2") as service,
        edged(tmp_path / "edge", service, tls=False, changes=_ANY_RATE) as edge,
    ):
        search = service.store.create_search(_REQUEST)[0].id
        stream = b"GET /v1/searches/%s/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        stream %= search.encode()
        for rest in (b"", _GET + b"\r\n", _GET, stream, b"nonsense\r\n\r\n", stream * 100):
            with edge.connect() as connection:
                connection.sendall(stream + rest)
                came = b""
                while b"event: queued" not in came and (more := connection.recv(1000)):
                    came += more

            def is_free() -> bool:
                with ExitStack() as stack:
                    url = f"{edge.url}/v1/searches/{search}/events"
                    two = [stack.enter_context(httpx.stream("GET", url)) for _ in range(2)]
                    return all(answer.status_code == 200 for answer in two)

            wait_for(is_free, "room for streams")
        assert "Traceback" not in service.log.read_text()


def test_a_flood_of_one_address_leaves_room_for_another(tmp_path: Path) -> None:
    """Requests sent ahead on many connections, for as long as the other client asks."""
    slower = {"rate=50r/s": "rate=20r/s", "burst=200 delay=20": "burst=10 delay=5"}
    with (
        serving(tmp_path / "home", access_control="true", trusted_proxies="127.0.0.1") as service,
        edged(tmp_path / "edge", service, tls=False, changes=slower) as edge,
        ExitStack() as stack,
    ):
        search = service.store.create_search(_REQUEST)[0].id
        keys = Keys(service.store)
        greedy, modest = (keys.create("default", name, ["read"])[1] for name in ("a", "b"))
        request = f"GET /v1/searches?limit=1 HTTP/1.1\r\nAuthorization: Bearer {greedy}\r\n"
        ahead = (request.encode() + b"Host: 127.0.0.1\r\n\r\n") * 16
        done = threading.Event()
        statuses: Counter[bytes] = Counter()
        heads: dict[bytes, bytes] = {}

        def flood() -> None:
            while not done.is_set():
                with suppress(ConnectionError):
                    flood_once()

        def flood_once() -> None:
            with edge.connect("127.0.0.2") as connection:
                while not done.is_set():
                    connection.sendall(ahead)
                    left = 16
                    while left and not done.is_set() and (came := connection.recv(65536)):
                        starts = came.split(b"HTTP/1.1 ")[1:]
                        left -= len(starts)
                        statuses.update(part[:3] for part in starts)
                        heads.update({part[:3]: part for part in starts if b"\r\n\r\n" in part})

        flooding = [threading.Thread(target=flood) for _ in range(20)]
        for one in flooding:
            one.start()
        stack.callback(done.set)
        wait_for(lambda: statuses[b"429"] > 100, "refusals of the flood")
        with httpx.Client(base_url=edge.url, timeout=PATIENCE) as client:
            client.headers["Authorization"] = f"Bearer {modest}"
            for _ in range(30):
                assert client.get(f"/v1/searches/{search}").status_code == 200
        done.set()
        for one in flooding:
            one.join(PATIENCE)
        assert set(statuses) == {b"200", b"429"}
        assert b"\r\nRetry-After: 1\r\n" in heads[b"429"]


def test_streams_of_one_address_leave_room_for_another(tmp_path: Path, service: Serving) -> None:
    few = _ANY_RATE | {"limit_conn streams 500;": "limit_conn streams 3;"}
    search = service.store.create_search(_REQUEST)[0].id
    path = f"/v1/searches/{search}/events"
    with edged(tmp_path, service, tls=False, changes=few) as edge, ExitStack() as stack:

        def stream(source: str) -> bytes:
            connection = stack.enter_context(edge.connect(source))
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
            return connection.recv(1000)[9:12]

        sources = ["127.0.0.2"] * 5 + ["127.0.0.3"] * 3
        assert [stream(s) for s in sources] == [b"200"] * 3 + [b"429"] * 2 + [b"200"] * 3
        # what is no stream of that address is still answered
        with edge.connect("127.0.0.2") as connection:
            connection.sendall(_GET + b"Connection: close\r\n\r\n")
            assert answers_of(connection)[9:12] == b"200"


# TLS, as where it is deployed


def _over_tls(edge: Edge, protocols: list[str]) -> ssl.SSLSocket:
    context = edge.context()
    context.set_alpn_protocols(protocols)
    return context.wrap_socket(edge.connect(), server_hostname="localhost")


def test_it_speaks_tls_and_http_2(secure: Edge) -> None:
    for offered, chosen in ((["h2", "http/1.1"], "h2"), (["http/1.1"], "http/1.1")):
        with _over_tls(secure, offered) as connection:
            assert connection.selected_alpn_protocol() == chosen
            assert connection.version() == "TLSv1.3"
    old = secure.context()
    old.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError), secure.connect() as plain:
        old.wrap_socket(plain, server_hostname="localhost")
    answer = httpx.get(secure.url.replace("https", "http") + "/healthz")
    assert (answer.status_code, answer.json()["status"]) == (400, 400)


def test_a_handshake_that_is_never_complete_is_cut_off(tmp_path: Path, service: Serving) -> None:
    with edged(tmp_path, service, changes=QUICK) as edge:
        for begun in (b"", b"\x16\x03\x01\x02\x00\x01\x00"):
            with edge.connect("127.0.0.2") as connection:
                connection.sendall(begun)
                assert answers_of(connection) == b""


def test_the_command_line_asks_for_a_certificate_that_it_trusts(secure: Edge) -> None:
    found = {}
    for trusted in ({}, {"SSL_CERT_FILE": str(secure.certificate)}):
        found[len(trusted)] = subprocess.run(
            [sys.executable, "-m", "nas.cli", "searches", "--server", secure.url],
            env={**os.environ, **trusted}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert found[0].returncode == 1
    assert "CERTIFICATE_VERIFY_FAILED" in found[0].stderr
    assert "Traceback" not in found[0].stderr
    assert (found[1].returncode, found[1].stderr) == (0, "")


@pytest.mark.parametrize("coding", ["br", "gzip"])
def test_answers_are_compressed(secure: Edge, coding: str) -> None:
    with httpx.Client(base_url=secure.url, verify=secure.context()) as client:
        client.headers["Accept-Encoding"] = coding
        for path in ("/static/common.js", "/openapi.json", "/"):
            answer = client.get(path)
            assert answer.headers["content-encoding"] == coding, path
            assert "accept-encoding" in answer.headers["vary"].lower()
            if tag := answer.headers.get("etag"):
                assert client.get(path, headers={"If-None-Match": tag}).status_code == 304
    raw = http.client.HTTPSConnection("127.0.0.1", secure.port, context=secure.context())
    raw.request("GET", "/static/plotly.min.js", headers={"Accept-Encoding": coding})
    assert len(raw.getresponse().read()) < 1_600_000  # of 4.8 million
    raw.close()


def test_what_a_client_says_of_itself_is_not_believed(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "home", access_control="true", trusted_proxies="127.0.0.1") as service,
        edged(tmp_path / "edge", service) as edge,
        edge.connect("127.0.0.2") as plain,
        edge.context().wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        key = Keys(service.store).create("default", "ada", ["read", "submit"])[1]
        connection.sendall(
            b"GET /v1/searches HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
            b"Authorization: Bearer none\r\nX-Forwarded-For: 10.9.8.7\r\n"
            b"Forwarded: for=10.9.8.7\r\nX-Forwarded-Proto: http\r\n"
            b"X-Forwarded-Prefix: /elsewhere\r\n\r\n"
        )
        answer = answers_of(connection)
        assert answer[9:12] == b"401"
        assert b"strict-transport-security" in answer.lower()
        from_where = _refused_addresses(service)
        assert from_where == {"127.0.0.2"}
        with httpx.Client(base_url=edge.url, verify=edge.context()) as client:
            form: dict[str, Any] = {"key": key, "next": "/"}
            signed_in = client.post("/login", data=form, headers={"Origin": edge.url})
            assert signed_in.status_code == 303
            assert "Secure" in signed_in.headers["set-cookie"]


def _refused_addresses(service: Serving) -> set[str]:
    return {str(entry.address) for entry in Audit(service.store).entries() if entry.status == 401}


def test_it_serves_below_a_path(tmp_path: Path, service: Serving) -> None:
    with edged(tmp_path, service, prefix="/team/nas") as edge:
        assert edge.url.endswith("/team/nas")
        with httpx.Client(verify=edge.context()) as client:
            page = client.get(f"{edge.url}/")
            assert page.status_code == 200
            assert 'href="/team/nas/' in page.text
            made = client.post(f"{edge.url}/v1/searches", json={"train_flops": 2e11, "trials": 2})
            assert made.headers["location"].startswith("/team/nas/v1/searches/")
            stream = f"{edge.url}/v1/searches/{made.json()['id']}/events"
            with client.stream("GET", stream) as events:
                assert next(events.iter_lines()).startswith("id: ")
            elsewhere = client.get(edge.url.replace("/team/nas", "/other"))
            assert (elsewhere.status_code, elsewhere.json()["title"]) == (404, "Not Found")


def test_a_service_that_is_away_is_told_of(tmp_path: Path) -> None:
    with serving(tmp_path / "home") as service, edged(tmp_path / "edge", service) as edge:
        service.process.kill()
        service.process.wait(PATIENCE)
        with httpx.Client(base_url=edge.url, verify=edge.context()) as client:
            answer = client.get("/v1/searches")
            assert (answer.status_code, answer.json()["status"]) == (502, 502)
            assert answer.headers["retry-after"] == "5"
            service.start()
            wait_for(edge.is_ready, "the service again")
            assert client.get("/v1/searches").status_code == 200
        kept_back = [line for line in edge.log.read_text().splitlines() if " 502 " in line]
        assert all("/v1/searches" in line or "/healthz" in line for line in kept_back)


# Without the edge


def test_a_head_is_bounded_and_connections_are_kept(service: Serving) -> None:
    with socket.create_connection(("127.0.0.1", service.port), PATIENCE) as connection:
        with suppress(ConnectionError):
            connection.sendall(_GET + b"X" * 900_000)
        assert answers_of(connection)[9:12] in (b"400", b"")
    with httpx.Client(base_url=service.url) as client:
        for _ in range(50):
            assert client.get("/healthz").status_code == 200
            assert client.post("/v1/searches", json={}).status_code == 422
        assert _reached(service) == 1


def test_an_unfinished_request_is_no_error_of_the_service(service: Serving) -> None:
    with socket.create_connection(("127.0.0.1", service.port), PATIENCE) as connection:
        connection.sendall(_POST + b"Content-Length: 1000\r\n\r\n{")
    wait_for(lambda: _reached(service) == 0, "its end")
    assert "Traceback" not in service.log.read_text()
    assert "an error of this service" not in service.log.read_text()


def test_connections_come_from_the_files_that_may_be_open() -> None:
    assert connections_for(Settings(), 1_000_000) == 10_000
    assert connections_for(Settings(event_streams=100), 4096) == 1898
    assert connections_for(Settings(), 64) == 8


@pytest.mark.parametrize("given", ["*", "proxy.example", "10.0.0.0/33", "10.0.0.1/8"])
def test_a_proxy_is_an_address_or_a_network(given: str) -> None:
    assert checked_proxies(["10.0.0.1", "2001:db8::/32"]) == ["10.0.0.1", "2001:db8::/32"]
    with pytest.raises(InvalidInput, match="TRUSTED_PROXIES"):
        checked_proxies(["10.0.0.1", given])
