"""Requests that no well-behaved client sends, byte by byte, and what must hold of every answer."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2 as httpx
from sqlalchemy import MetaData, create_engine, func, select

from tests.support.services import PATIENCE, Service

LONGEST_PROBLEM_BYTES = 4096
#: Text for any field: as JSON it is legal, and nothing but a name must ever become of it.
TEXTS = (
    "'; DROP TABLE searches; --", "1 OR 1=1", "\" UNION SELECT digest FROM api_keys --",
    "<script>alert(1)</script>", "\"><img src=x onerror=alert(1)>", "{{7*7}}", "${7*7}",
    "{% import os %}", "${jndi:ldap://127.0.0.1/a}", "%s%s%n", "$(id)", "`id`", "; id", "| id",
    "../../../../etc/passwd", "..\\..\\windows", "%2e%2e%2fetc%2fpasswd", "..%252f", "/etc/passwd",
    "//127.0.0.1/share", "file:///etc/passwd", "hf:imdb", "a;b", "C:\\", ".", "..", "/", "~root",
    "\u202egnp.exe", "a\u200bb", "e" + "\u0301" * 60, "\U0001f469\u200d\U0001f467", "１２３", "ﬁ",
    "\ufeff", "\u2028", "\x07\x1b[31m", "a\r\nX-Evil: 1", "a\tb", " ", "", "null", "true", "NaN",
    "1e999", "-0", "1_000", "9223372036854775808", "[]", "{}", "x" * 5000, "\U0001f9ff" * 300,
)  # fmt: skip
#: What stands for a value in JSON, and is none that a field could have, or none at all.
FRAGMENTS = (
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-999", "9223372036854775808",
    "-9223372036854775809", "9" * 5000, "-0", "0x10", "01", "1_000", "+1", "１２", "'a'", "None",
    '"\\u0000"', '"a\\u0000b"', '"\\ud800"', '"\\udc00\\ud800"', '"\x00"', '"\\x41"', '"', "[", "{",
    "[" * 900 + "]" * 900, "{" + '"a":{' * 40 + "}" * 41, '{"a":1,"a":2}', '{"\\u0000":1}',
    '{"__proto__":{}}', "null", "[]", "{}", "true", "1.5", "-1", "[null]", "[[]]", '[""]', "",
)  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What came back; status 0 where the connection was closed without an answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    def check(self, sent: object) -> None:
        """An answer, no error of the service, and every refusal a small problem document."""
        shown = (sent, self.status, self.headers, self.body[:500])
        assert 0 < self.status < 500, shown
        assert b"Traceback (most recent" not in self.body, shown
        if self.status >= 400:
            assert self.headers["content-type"] == "application/problem+json", shown
            assert len(self.body) < LONGEST_PROBLEM_BYTES, shown
            problem = json.loads(self.body)
            assert {"type", "title", "status", "detail"} <= set(problem), shown
            if "field" in problem:
                assert {"value", "accepted"} <= set(problem), shown

    def refused(self, sent: object, *statuses: int) -> None:
        """Refused, with one of the statuses where some are named."""
        self.check(sent)
        accepted = statuses or range(400, 500)
        assert self.status in accepted, (sent, self.status, self.body[:500])


class HostileService(Service):
    """`einsum-nas api`, and connections to it that send any bytes."""

    def __init__(self, home: Path, data: Path) -> None:
        super().__init__(home, "api", data_dir=str(data), failure_limit="1000000/second")

    def ask_at(self, port: int) -> None:
        """Send everything to a port from now on: that of what stands before the service."""
        self.port, self.url = port, f"http://127.0.0.1:{port}"

    @property
    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{self.url}/openapi.json").json()
        return found

    def rows(self) -> dict[str, int]:
        """Rows of every table, but for that of the processes, who keep saying that they live."""
        engine = create_engine(f"sqlite:///{self.home / 'einsum-nas.db'}")
        tables = MetaData()
        tables.reflect(engine)
        with engine.connect() as connection:
            counted = {
                name: connection.execute(select(func.count()).select_from(table)).scalar_one()
                for name, table in tables.tables.items()
                if name != "processes"
            }
        engine.dispose()
        return counted

    def send(self, *pieces: bytes | Iterable[bytes], method: str = "GET") -> Answer:
        """What is answered to some bytes on a connection of their own."""
        with closing(socket.create_connection(("127.0.0.1", self.port))) as connection:
            connection.settimeout(PATIENCE)
            # a refusal may come, and the connection go, before all has been sent
            with suppress(BrokenPipeError, ConnectionResetError):
                for piece in pieces:
                    for part in [piece] if isinstance(piece, bytes) else piece:
                        connection.sendall(part)
            answer = http.client.HTTPResponse(connection, method=method)
            try:
                answer.begin()
                headers = {name.lower(): value for name, value in answer.getheaders()}
                body = b"" if "event-stream" in headers.get("content-type", "") else answer.read()
            except (http.client.HTTPException, ConnectionResetError):
                return Answer(0, {}, b"")
            return Answer(answer.status, headers, body)

    def request(
        self, method: str, target: bytes, body: bytes | None = None, **headers: bytes
    ) -> Answer:
        """What is answered to a request whose parts are sent as they are."""
        given = {
            "Host": b"127.0.0.1:%d" % self.port,
            **({} if body is None else {"Content-Type": b"application/json",
                                        "Content-Length": b"%d" % len(body)}),
            **{name.replace("_", "-"): value for name, value in headers.items()},
            "Connection": b"close",
        }  # fmt: skip
        lines = b"".join(name.encode() + b": " + value + b"\r\n" for name, value in given.items())
        head = method.encode() + b" " + target + b" HTTP/1.1\r\n" + lines + b"\r\n"
        return self.send(head + (body or b""), method=method)


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(method, path, operation) of everything that the document describes."""
    for path, of_path in document["paths"].items():
        for method, operation in of_path.items():
            yield method.upper(), path, operation


def places(
    schema: dict[str, Any], at: tuple[str | int, ...] = ()
) -> Iterator[tuple[str | int, ...]]:
    """Where a body of the schema has a value: every field, those of fields, elements of lists."""
    for kind in (schema, *schema.get("anyOf", ())):
        for name, inner in kind.get("properties", {}).items():
            yield (*at, name)
            yield from places(inner, (*at, name))
        if isinstance(kind.get("items"), dict):
            yield (*at, 0)
            yield from places(kind["items"], (*at, 0))


_MARK = "put it here"


def bodies_with(
    example: dict[str, Any], place: tuple[str | int, ...], fragments: Iterable[str]
) -> Iterator[bytes]:
    """The example as JSON with each fragment in a place."""
    body: Any = deepcopy(example)
    inner = body
    for name, after in pairwise(place):
        empty: Any = [] if isinstance(after, int) else {}
        if isinstance(name, int):
            inner.append(empty)
        elif not isinstance(inner.get(name), type(empty)) or isinstance(after, int):
            inner[name] = empty
        inner = inner[name]
    if isinstance(place[-1], int):
        inner.append(_MARK)
    else:
        inner[place[-1]] = _MARK
    text = json.dumps(body)
    for fragment in fragments:
        yield text.replace(json.dumps(_MARK), fragment).encode("utf-8", "surrogatepass")
