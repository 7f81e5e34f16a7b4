"""Webhooks on both databases: signed, told until taken, and never to where they must not."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import socket
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from sqlalchemy import update

from nas.errors import Conflict, InvalidInput, NotFound
from nas.planning.request import SearchRequest
from nas.store import Store
from nas.store.engine import writing
from nas.store.schema import DeliveryRow
from nas.store.webhooks import MAX_ATTEMPTS, Webhooks
from tests.support.commands import execute
from tests.support.services import wait_for
from workers.webhooks import NotTold, Teller, address_of, tell

pytestmark = pytest.mark.one_database

REQUEST = SearchRequest.checked({"train_flops": 2e11, "trials": 2})


class Receiver:
    """An address that keeps what it is told, and answers with the statuses that it is given."""

    def __init__(self, *statuses: int) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        left = list(statuses)
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.got.append(({k.lower(): v for k, v in self.headers.items()}, body))
                self.send_response(left.pop(0) if left else 204)
                self.send_header("location", "http://127.0.0.1:1/elsewhere")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/hook?x=1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def told(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.got]


@pytest.fixture
def store(migrated_url: str) -> Iterator[Store]:
    opened = Store(migrated_url)
    yield opened
    opened.close()


@pytest.fixture
def receiver(request: pytest.FixtureRequest) -> Iterator[Receiver]:
    made = Receiver(*getattr(request, "param", ()))
    yield made
    made.close()


def ended(store: Store, tenant: str = "default") -> str:
    search = store.view(tenant).create_search(REQUEST)[0].id
    store.cancel(search)
    return search


def signature(secret: str, headers: dict[str, str], body: bytes) -> str:
    """As https://www.standardwebhooks.com says."""
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    key = base64.b64decode(secret.removeprefix("whsec_"))
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


def hurry(store: Store) -> None:
    """Let what is to be tried later be tried now."""
    with writing(store.engine) as session:
        due = DeliveryRow.due_at.is_not(None)
        session.execute(update(DeliveryRow).where(due).values(due_at=0.0))


def test_events_are_told_signed_and_once(store: Store, receiver: Receiver) -> None:
    hooks = Webhooks(store)
    hook, secret = hooks.add("default", receiver.url, private=True)
    hooks.add("other", receiver.url, ["queued"], private=True)
    with Teller(store, 0.05), Teller(store, 0.05):
        search = ended(store)
        wait_for(lambda: hooks.all("default")[0].delivered == 1, "the delivery")
        theirs = ended(store, "other")
        wait_for(lambda: hooks.all("other")[0].delivered == 1, "that of the other tenant")
    assert [(t["type"], t["data"]["search_id"], t["data"]["tenant"]) for t in receiver.told] == [
        ("search.cancelled", search, "default"), ("search.queued", theirs, "other"),
    ]  # fmt: skip
    headers, body = receiver.got[0]
    assert headers["webhook-signature"] == signature(secret, headers, body)
    assert headers["webhook-signature"] != signature("whsec_AAAA", headers, body)
    assert headers["host"] == receiver.url.split("/")[2]
    assert hooks.all("default")[0].waiting == 0
    hooks.remove(hook.id)
    with pytest.raises(NotFound):
        hooks.remove(hook.id)
    ended(store)
    assert [h.tenant for h in hooks.all()] == ["other"]


@pytest.mark.parametrize("receiver", [(500, 302)], indirect=True)
def test_what_is_not_taken_is_told_again(store: Store, receiver: Receiver) -> None:
    hooks = Webhooks(store)
    hooks.add("default", receiver.url, private=True)
    ended(store)
    with Teller(store, 0.05):
        for error in ("answered 500", "answered 302"):
            wait_for(partial(lambda said: hooks.all()[0].error == said, error), error)
            assert (hooks.all()[0].delivered, hooks.all()[0].waiting) == (0, 1)
            hurry(store)
        wait_for(lambda: hooks.all()[0].delivered == 1, "the delivery")
    assert len(receiver.got) == 3
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1


def test_what_nobody_takes_is_given_up_and_shown(store: Store) -> None:
    hooks = Webhooks(store)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    hooks.add("default", f"http://127.0.0.1:{port}/", private=True)
    ended(store)
    waits: list[float] = []
    for _ in range(MAX_ATTEMPTS):
        delivery = hooks.take()
        assert delivery is not None
        assert hooks.take() is None  # nobody else gets it meanwhile
        hooks.settle(delivery, "refused")
        with writing(store.engine) as session:
            row = session.get_one(DeliveryRow, delivery.id)
            waits.append(row.due_at or 0.0)
        hurry(store)
    assert waits[-1] == 0.0
    assert hooks.take() is None
    (hook,) = hooks.all()
    assert (hook.delivered, hook.waiting, hook.given_up, hook.error) == (0, 0, 1, "refused")


def test_a_process_that_dies_while_it_tells_leaves_it_to_another(
    store: Store, receiver: Receiver
) -> None:
    hooks = Webhooks(store)
    hooks.add("default", receiver.url, private=True)
    ended(store)
    assert hooks.take() is not None  # and no more is heard of it
    hurry(store)  # its time is over
    with Teller(store, 0.05):
        wait_for(lambda: hooks.all()[0].delivered == 1, "the delivery")


def test_one_receiver_that_never_ends_its_answer_holds_up_no_other(
    store: Store, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.webhooks._WHOLE_SECONDS", 1.0)
    hooks = Webhooks(store)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and says nothing
        hooks.add("default", f"http://127.0.0.1:{silent.getsockname()[1]}/", private=True)
        hooks.add("default", receiver.url, private=True)
        ended(store)
        with Teller(store, 0.05):
            wait_for(lambda: hooks.all()[1].delivered == 1, "that of the other")
            wait_for(lambda: "no whole answer" in str(hooks.all()[0].error), "its error")
    assert hooks.all()[0].waiting == 1


def test_what_a_library_raises_counts_as_an_attempt(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def odd(*_: object, **__: object) -> None:
        raise UnicodeError("label too long")

    monkeypatch.setattr("workers.webhooks.address_of", odd)
    hooks = Webhooks(store)
    hooks.add("default", "http://example.com/")
    ended(store)
    with Teller(store, 0.05):
        wait_for(lambda: hooks.all()[0].error == "UnicodeError: label too long", "its error")


def test_what_is_rolled_back_is_not_told(store: Store, receiver: Receiver) -> None:
    hooks = Webhooks(store)
    hooks.add("default", receiver.url, private=True)
    search = ended(store)
    first = hooks.take()
    assert first is not None
    with pytest.raises(Conflict):
        store.cancel(search)
    assert hooks.take() is None


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254",
     "0.0.0.0", "::1", "fe80::1", "fc00::1", "::ffff:127.0.0.1", "100.64.0.1", "224.0.0.1",
     "2130706433", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1", "::127.0.0.1", "fec0::1"],
)  # fmt: skip
def test_private_addresses_are_not_told(host: str) -> None:
    with pytest.raises(NotTold, match=r"no public address|has no address"):
        address_of(host, 80, private=False)


def test_a_name_is_private_if_any_of_its_addresses_is(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(2, 1, 6, "", ("8.8.8.8", 80)), (2, 1, 6, "", ("10.0.0.1", 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(NotTold, match=r"rebound\.example is 10\.0\.0\.1"):
        address_of("rebound.example", 80, private=False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found[:1])
    assert address_of("public.example", 80, private=False) == "8.8.8.8"


def test_the_connection_goes_to_the_address_that_was_looked_at(
    store: Store, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = int(receiver.url.split(":")[2].split("/")[0])
    monkeypatch.setattr(
        "workers.webhooks.address_of", lambda host, at, private: "127.0.0.1" if at == port else ""
    )
    hooks = Webhooks(store)
    hooks.add("default", f"http://no.such.name.example:{port}/hook")
    ended(store)
    delivery = hooks.take()
    assert delivery is not None
    with httpx.Client(timeout=30.0) as client:
        tell(client, delivery)
    assert receiver.got[0][0]["host"] == f"no.such.name.example:{port}"


@pytest.mark.parametrize(
    "url",
    ["ftp://example.com/", "example.com", "http://", "http://me:secret@example.com/", "file:///x",
     "http://example.com/\n", "http://exämple.com/", "http://example.com/" + "x" * 3000,
     "http://h:99999/", "http://[::1", "http://a..b/", f"http://{'a' * 64}.example/"],
)  # fmt: skip
def test_addresses_that_are_none_are_refused(store: Store, url: str) -> None:
    with pytest.raises(InvalidInput, match="url"):
        Webhooks(store).add("default", url)
    with pytest.raises(InvalidInput, match=r"point; accepted: queued"):
        Webhooks(store).add("default", "https://example.com/", ["point"])


def test_the_command_line_adds_lists_and_removes(tmp_path: Path) -> None:
    made = execute(tmp_path, "webhooks", "add", "https://example.com/hook", "--json")
    assert made.returncode == 0, made.stderr
    found = json.loads(made.stdout)
    assert found["secret"].startswith("whsec_")
    listed = execute(tmp_path, "webhooks", "list", "--json").stdout
    assert [h["id"] for h in json.loads(listed)] == [found["webhook"]["id"]]
    assert found["secret"] not in listed
    assert execute(tmp_path, "webhooks", "remove", found["webhook"]["id"]).returncode == 0
    assert "there is no webhook" in execute(tmp_path, "webhooks", "list").stdout
