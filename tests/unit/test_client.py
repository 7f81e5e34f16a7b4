"""What the clients refuse before they send anything, and that both send the same."""

from __future__ import annotations

import asyncio
import inspect
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx2 as httpx
import pytest

from nas.client import AsyncClient, AsyncRemoteSearch, Client, RemoteSearch, ServiceError
from nas.errors import InvalidInput, NotFound

AWAY = "http://nas.invalid:9"


@pytest.mark.parametrize(
    "url",
    ["http://::1:8953", "127.0.0.1:8000", "localhost:8000", "ftp://h", "http://", "", "http://h:x",
     "http://h:99999", "http://ho st", "http://[::1", "http://h/x?y=1", "http://h#x"],
)  # fmt: skip
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_an_address_that_is_none(kind: type[Client | AsyncClient], url: str) -> None:
    with pytest.raises(InvalidInput, match=r"^url: got .*; accepted: http://HOST:PORT .*\[::1\]"):
        kind(url)


def test_no_message_repeats_a_password() -> None:
    with pytest.raises(InvalidInput) as refused:
        Client("ftp://me:hu@sh@h")
    with pytest.raises(ServiceError) as away, Client("http://me:hush@127.0.0.1:9") as client:
        client.tasks()
    for told in (refused, away):
        assert "hu" not in str(told.value).replace("http", "")


@pytest.mark.parametrize(
    "key",
    ["\u201cenas_hush\u201d", "\u00e9nas_hush", "enas_hush\x01", "enas hush", '"enas_hush"', ""],
)
def test_a_key_with_characters_that_no_key_has(key: str) -> None:
    with pytest.raises(InvalidInput, match=r"^api_key: got a text") as refused:
        Client(AWAY, api_key=key)
    assert "hush" not in str(refused.value)


def test_other_texts_of_a_header() -> None:
    with pytest.raises(InvalidInput, match=r"^tenant: got é"):
        Client(AWAY, tenant="é")
    with Client(AWAY) as client, pytest.raises(InvalidInput, match=r"^Idempotency-Key: got “a”"):
        client.search(train_flops=1e9, idempotency_key="“a”")


class _Echo(BaseHTTPRequestHandler):
    """Answers every request, and keeps its path and its key."""

    seen: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers["Authorization"]))
        self.send_response(200)
        self.send_header("Content-Length", "13")
        self.end_headers()
        self.wfile.write(b'{"items": []}')

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def port() -> Iterator[int]:
    """Of a server that answers any request."""
    _Echo.seen.clear()
    server = HTTPServer(("127.0.0.1", 0), _Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_this_machine_is_reached_without_proxy_and_certificates(
    monkeypatch: pytest.MonkeyPatch, port: int, host: str
) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://proxy.invalid:1080")
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.invalid:3128")
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere.pem")
    with Client(f" http://{host}:{port}/nas/\r", api_key="enas_x\r\n") as client:
        assert client.tasks() == []
        client.get_search("a/b?c#d")

    async def ask() -> None:
        async with AsyncClient(f"http://{host}:{port}") as other:
            await other.tasks()

    asyncio.run(ask())
    assert _Echo.seen == [
        ("/nas/v1/tasks", "Bearer enas_x"),
        ("/nas/v1/searches/a%2Fb%3Fc%23d", "Bearer enas_x"),
        ("/v1/tasks", None),
    ]


@pytest.mark.parametrize("proxy", ["socks5://me:hush@h:1080", "ftp://me:hush@h", "http://h:x"])
def test_a_proxy_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(InvalidInput, match=r"^ALL_PROXY: got .*http://HOST:PORT.*NO_PROXY") as told:
        Client(AWAY)
    assert "hush" not in str(told.value)
    monkeypatch.setenv("NO_PROXY", "nas.invalid")
    Client(AWAY).close()


@pytest.mark.parametrize("there", [True, False])
def test_certificates_that_are_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there: bool
) -> None:
    file = tmp_path / "ca.pem"
    if there:
        file.write_text("no certificate")
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    with pytest.raises(InvalidInput, match=r"^SSL_CERT_FILE: got .*ca.pem"):
        Client("https://nas.invalid")


def _methods(kind: type) -> dict[str, Any]:
    return {n: m for n, m in vars(kind).items() if not n.startswith("_") and callable(m)}


@pytest.mark.parametrize(
    ("kind", "other"), [(Client, AsyncClient), (RemoteSearch, AsyncRemoteSearch)]
)
def test_both_clients_have_the_same_methods(kind: type, other: type) -> None:
    methods, awaited = _methods(kind), _methods(other)
    assert set(awaited) == set(methods)
    lists = ("searches", "api_keys", "iterate")
    for name, method in awaited.items():
        assert inspect.iscoroutinefunction(method) or name in lists, name
        if name != "wait":  # a coroutine takes no call of its progress
            assert inspect.signature(method).parameters == (
                inspect.signature(methods[name]).parameters
            ), name
        assert method.__doc__, name


def test_every_call_is_the_same_from_both_clients() -> None:
    """Each method's request, its own kind of search in the answer, and its refusal."""
    seen: dict[str, list[tuple[str, str, bytes]]] = {"sync": [], "async": []}

    def answer(kind: str) -> httpx.MockTransport:
        def handle(request: httpx.Request) -> httpx.Response:
            seen[kind].append((request.method, str(request.url), request.content))
            if request.url.path == "/v1/structures":
                return httpx.Response(404, json={"detail": "none"})
            return httpx.Response(
                200,
                json={"id": "s1", "state": "queued", "request": {"train_flops": 1e9}, "items": []},
            )

        return httpx.MockTransport(handle)

    here = Client(AWAY)
    here._http = httpx.Client(base_url=AWAY, transport=answer("sync"))
    with here as client:
        found = client.search(train_flops=1e9, seed=1)
        assert type(found) is RemoteSearch
        client.preview(train_flops=1e9)
        client.trial(3)
        client.ask("s1", holder="h")
        client.tell(3, token="0" * 32, outcome="complete")
        assert client.tasks() == []
        client.create_key("ci", scopes=["read"])
        client.rotate_key("a/b", grace_seconds=60)
        client.revoke_key("0123456789ab")
        found.confirm(top=2)
        found.refresh().cancel().pause().resume().retry().set_priority(3)
        found.set_labels(name="n").clone(trials=2)
        found.delete()
        client.weights(3, io.BytesIO())
        file = io.BytesIO()
        assert client.download("/v1/x", file, rows="points") == len(file.getvalue()) > 0
        with pytest.raises(NotFound, match="none"):
            client.structure("monarch", 8, 8)

    async def ask() -> None:
        away = AsyncClient(AWAY)
        away._http = httpx.AsyncClient(base_url=AWAY, transport=answer("async"))
        async with away as client:
            found = await client.search(train_flops=1e9, seed=1)
            assert type(found) is AsyncRemoteSearch
            await client.preview(train_flops=1e9)
            await client.trial(3)
            await client.ask("s1", holder="h")
            await client.tell(3, token="0" * 32, outcome="complete")
            assert await client.tasks() == []
            await client.create_key("ci", scopes=["read"])
            await client.rotate_key("a/b", grace_seconds=60)
            await client.revoke_key("0123456789ab")
            await found.confirm(top=2)
            found = await found.refresh()
            for change in (found.cancel, found.pause, found.resume, found.retry):
                assert type(await change()) is AsyncRemoteSearch
            await found.set_priority(3)
            await found.set_labels(name="n")
            await found.clone(trials=2)
            await found.delete()
            file = io.BytesIO()
            await client.weights(3, file)
            file = io.BytesIO()
            assert await client.download("/v1/x", file, rows="points") == len(file.getvalue()) > 0
            with pytest.raises(NotFound, match="none"):
                await client.structure("monarch", 8, 8)

    asyncio.run(ask())
    assert seen["sync"] == seen["async"]
    assert len(seen["sync"]) == 22
