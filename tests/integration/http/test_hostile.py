"""Hostile input to a real service: refused or harmless, in few bytes, storing nothing, and flat.

Every field of every body, every parameter and every header is taken from the OpenAPI document.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_from_bytes

import httpx2 as httpx
import pytest

from api.middleware.bodies import MAX_BODY, MAX_DEPTH
from tests.support.hostile import (
    FRAGMENTS,
    TEXTS,
    HostileService,
    bodies_with,
    operations,
    places,
)
from tests.support.services import running
from tests.support.serving import edged
from tests.support.tiers import only, thinned

#: As the id of a key is.
_KEY = "0" * 12
_GOOD: dict[str, Any] = {"train_flops": 2e11, "trials": 2}
_JSON = {"Content_Type": b"application/json"}
_LARGE = 50_000_000
_PIECE = b"x" * 65536
#: More than what allocators keep of what was in use once.
_GROWTH_BYTES = 64 * 2**20


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory, text_folder: Path
) -> Iterator[HostileService]:
    """Asked through the edge, as others would."""
    home = tmp_path_factory.mktemp("hostile")
    folder = tmp_path_factory.mktemp("edge")
    with (
        running(HostileService(home, text_folder.parent)) as found,
        edged(folder, found, tls=False, changes={"rate=50r/s": "rate=100000r/s"}) as edge,
    ):
        found.ask_at(edge.port)
        yield found
        log = found.log.read_text()
        assert "Traceback" not in log, log[-3000:]
        assert " ERROR " not in log, log[-3000:]


@pytest.fixture(scope="module")
def search(service: HostileService) -> str:
    """The id of a search that waits."""
    return str(httpx.post(f"{service.url}/v1/searches", json=_GOOD).json()["id"])


def _large(head: bytes, *, chunked: bool) -> Iterator[bytes]:
    yield head
    for _ in range(_LARGE // len(_PIECE)):
        yield b"%x\r\n%b\r\n" % (len(_PIECE), _PIECE) if chunked else _PIECE
    if chunked:
        yield b"0\r\n\r\n"


def _upload(
    service: HostileService, path: str, framing: bytes, kind: bytes = b"application/json"
) -> Any:
    head = (
        b"POST %b HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: %b\r\n%b\r\n"
        b"Connection: close\r\n\r\n" % (path.encode(), service.port, kind, framing)
    )
    return service.send(_large(head, chunked=b"chunked" in framing), method="POST")


_LYING = b"Content-Length: 10"
_FRAMINGS = (b"Content-Length: %d" % _LARGE, b"Transfer-Encoding: chunked", _LYING)


def test_bodies_of_50_megabytes_are_refused_in_flat_memory(
    service: HostileService, search: str
) -> None:
    paths = [
        path.replace("{search_id}", search)
        for method, path, _ in operations(service.document)
        if method == "POST"
    ]
    rows = service.rows()
    for path in [*paths, "/nowhere", "/static/x", "/"]:  # and a first time for all
        for framing in _FRAMINGS:
            answer = _upload(service, path, framing)
            if framing != _LYING or answer.status:  # which may be closed while it is being sent
                answer.refused((path, framing))
    for framing in _FRAMINGS[:2]:  # a page, which is answered with a page
        answer = _upload(service, "/login", framing, b"application/x-www-form-urlencoded")
        assert answer.status in (403, 413)
        assert len(answer.body) < 4096
    before = service.resident_bytes()
    for i in range(20):
        for framing in _FRAMINGS[:2]:
            _upload(service, paths[i % len(paths)], framing).refused(framing, 413, 422)
    after = service.resident_bytes()
    told = f"resident: {before / 2**20:.1f} MiB, then {after / 2**20:.1f} MiB after 40 × 50 MB"
    print(told)
    assert after - before < _GROWTH_BYTES, told
    assert service.rows() == rows


def test_a_body_is_read_up_to_the_limit_and_no_further(service: HostileService) -> None:
    for length, statuses in ((MAX_BODY, (422,)), (MAX_BODY + 1, (413,))):
        body = b'{"train_flops": 2e11, "seed": ' + b" " * (length - 32) + b"x}"
        assert len(body) == length
        service.request("POST", b"/v1/searches", body).refused(length, *statuses)
        chunk = b"%x\r\n%b\r\n0\r\n\r\n" % (length, body)
        head = (
            b"POST /v1/searches HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        )
        answer = service.send(
            head + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + chunk, method="POST"
        )
        answer.refused(length, *statuses)


_WHOLE_BODIES = {
    "empty": b"", "spaces": b"   ", "no JSON": b"{", "a list": b"[]", "null": b"null",
    "text": b'"x"',
    "a number": b"1", "two values": b'{"train_flops":2e11}{}', "a comment": b"{} // x",
    "a trailing comma": b'{"train_flops":2e11,}', "single quotes": b"{'train_flops':2e11}",
    "a byte order mark": b"\xef\xbb\xbf" + json.dumps(_GOOD).encode(),
    "UTF-16": json.dumps(_GOOD).encode("utf-16"), "UTF-32": json.dumps(_GOOD).encode("utf-32"),
    "no UTF-8": b'{"task":"\xff\xfe","train_flops":2e11}', "overlong": b'{"task":"\xc0\x80"}',
    "UTF-8 of a surrogate": b'{"task":"\xed\xa0\x80","train_flops":2e11}',
    "given twice": b'{"train_flops":2e11,"seed":1,"seed":2}',
    "given twice, escaped": b'{"train_flops":2e11,"seed":1,"\\u0073eed":2}',
    "given twice inside": b'{"train_flops":2e11,"limits":{"seconds":1,"seconds":2}}',
    "NUL in a name": b'{"train_flops":2e11,"a\\u0000":1}', "a raw NUL": b'{"task":"\x00"}',
    "100,000 lists": b"[" * 100_000 + b"]" * 100_000, "30,000 lists": b"[" * 30_000 + b"]" * 30_000,
    "10,000 objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "60,000 open": b"[" * 60_000,
    "one level too many": b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}",
    "a name of 60,000": b'{"%b":1}' % (b"n" * 60_000), "6,000 names": json.dumps(
        {f"n{i}": i for i in range(5000)}).encode(), "a bomb": b"\x1f\x8b" + b"\x00" * 1000,
    "XML": b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>', "YAML": b"a: 1",
    "pickle": b"\x80\x04\x95.", "form": b"train_flops=2e11&trials=2",
}  # fmt: skip


@pytest.mark.parametrize("what", thinned(_WHOLE_BODIES, 15))
def test_what_is_no_json_object_of_one_meaning_is_refused(
    service: HostileService, search: str, what: str
) -> None:
    rows, body = service.rows(), _WHOLE_BODIES[what]
    for _, path, operation in operations(service.document):
        body_of = operation.get("requestBody")
        if body_of is None or (what == "empty" and not body_of["required"]):
            continue
        target = (
            path.replace("{search_id}", search)
            .replace("{trial_id}", "1")
            .replace("{key_id}", _KEY)
            .encode()
        )
        service.request("POST", target, body).refused((path, what), 413, 422)
    assert service.rows() == rows


@pytest.mark.parametrize(
    "kind",
    [None, b"", b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data",
     b"application/json; charset=utf-16", b"application/json; charset=latin-1",
     b"application/jsonp", b"text/json", b"application/problem+json", b"application/xml",
     b"application", b"*/*", b"\xff",
     b"application/json, text/plain", b"application/json\x00", b"x" * 5000, b"application/pickle"],
)  # fmt: skip
def test_bodies_of_other_types_are_refused(service: HostileService, kind: bytes | None) -> None:
    rows, body = service.rows(), json.dumps(_GOOD).encode()
    length = b"Content-Length: %d\r\n" % len(body)
    given = b"" if kind is None else b"Content-Type: " + kind + b"\r\n"
    head = b"POST /v1/searches HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
    service.send(head + length + given + b"\r\n" + body, method="POST").refused(kind, 400, 415)
    twice = b"Content-Type: application/json\r\n" * 2
    service.send(head + length + twice + b"\r\n" + body, method="POST").refused("twice", 415, 422)
    assert service.rows() == rows


def _fragments() -> list[str]:
    texts = [json.dumps(text, ensure_ascii=False) for text in TEXTS]
    return [*texts, *FRAGMENTS]


@pytest.mark.parametrize("every", only([5], [5, 1]), ids="one in {}".format)
def test_every_field_of_every_body(service: HostileService, search: str, every: int) -> None:
    """Each place with one text in `every`, but not with the same as the places beside it."""
    tried = made = changed = turn = 0
    rows = service.rows()
    for _, path, operation in operations(service.document):
        if "requestBody" not in operation:
            continue
        content = operation["requestBody"]["content"]["application/json"]
        example = next(iter(content["examples"].values()))["value"]
        target = path.replace("{search_id}", search).replace("{key_id}", _KEY).encode()
        for place in places(content["schema"]):
            turn += 1
            for body in bodies_with(example, place, _fragments()[turn % every :: every]):
                answer = service.request("POST", target, body)
                answer.check((path, place, body[:300]))
                tried += 1
                made += answer.status == 201
                changed += answer.status == 200
    print(f"{tried} bodies, of which {made} made a search and {changed} changed one")
    assert tried > 5000 / every
    _only_searches_were_made(service, rows, made, changed)


def _only_searches_were_made(
    service: HostileService, before: dict[str, int], made: int, changed: int = 0
) -> None:
    """What was accepted is there, each with the event that it was queued or changed, and nothing
    else is."""
    after = service.rows()
    assert after.pop("searches") == before["searches"] + made
    events = after.pop("events")
    assert before["events"] + made <= events <= before["events"] + 2 * made + changed + 10
    assert after == {name: n for name, n in before.items() if name in after}


#: Numbers as no one writes them, and bytes that are no text.
_NUMBERS = ("1e999", "nan", "inf", "-0", "+1", " 1", "1_000", "１２", "0x10", "01", "1.0", "1,5",
            "9223372036854775808", "-9223372036854775809", "9" * 400, "½", "٣")  # fmt: skip
_BYTES = (
    b"\x00",
    b"a\x00b",
    b"\xff",
    b"\xed\xa0\x80",
    b"\xc0\xaf",
    b"\xf8\x88\x80\x80\x80",
    b"%00",
)
_VALUES = [*(t.encode() for t in (*TEXTS, *_NUMBERS)), *_BYTES]


def _targets(path: str, operation: dict[str, Any], search: str) -> tuple[str, dict[str, bytes]]:
    """A path that exists, and values that its required parameters have."""
    required = {
        p["name"]: str(p["schema"].get("examples", ["64"])[0]).encode()
        for p in operation.get("parameters", ())
        if p["in"] == "query" and p["required"]
    }
    return path.replace("{search_id}", search).replace("{trial_id}", "1").replace(
        "{key_id}", _KEY
    ), required


def _query(values: Iterable[tuple[str, bytes]]) -> bytes:
    return b"&".join(n.encode() + b"=" + quote_from_bytes(v, safe="").encode() for n, v in values)


@pytest.mark.parametrize("every", only([5], [5, 1]), ids="one in {}".format)
def test_every_query_parameter(service: HostileService, search: str, every: int) -> None:
    rows, tried, turn = service.rows(), 0, 0
    for method, path, operation in operations(service.document):
        found, required = _targets(path, operation, search)
        names = [p["name"] for p in operation.get("parameters", ()) if p["in"] == "query"]
        for name in names:
            turn += 1
            for value in _VALUES[turn % every :: every]:
                given = {**required, name: value}
                answer = service.request(method, found.encode() + b"?" + _query(given.items()))
                answer.check((found, name, value[:100]))
                tried += 1
            once = {**required, name: b"1"}
            twice = service.request(
                method, found.encode() + b"?" + _query([*once.items(), (name, b"1")])
            )
            twice.refused((found, name, "twice"), 422)
        if path.startswith("/v1/"):
            more = [*required.items(), ("no_such_parameter", b"1")]
            answer = service.request(method, found.encode() + b"?" + _query(more))
            answer.refused((method, found), 422)
            assert b"no_such_parameter" in answer.body
            bad = service.request(
                method, found.encode() + b"?" + _query(required.items()) + b"&%ff"
            )
            bad.refused((method, found), 422)
    assert tried > 1000 / every
    assert service.rows() == rows


@pytest.mark.parametrize("name", ["limit", "cursor"])
def test_numbers_are_written_in_one_way(service: HostileService, name: str) -> None:
    for value in _NUMBERS:
        target = b"/v1/searches?" + _query([(name, value.encode())])
        answer = service.request("GET", target)
        if not (name == "cursor" and value == "-0"):
            answer.refused(value, 422)
            assert json.loads(answer.body)["field"] == name


_TRICKS = (
    b"..", b"../..", b"%2e%2e", b"%2e%2e%2f%2e%2e%2fetc%2fpasswd", b"..%2f..%2fetc%2fpasswd",
    b"..%5c..%5cetc", b"..\\..\\etc", b"//etc/passwd", b"/etc/passwd", b".//x", b"x;a=b", b";",
    b"%3b", b"%00", b"x%00.txt", b"%0d%0aX-Evil:1", b"%ff", b"%c0%ae%c0%ae", b"%252e%252e%252f",
    b"%u002e", b"%", b"%zz", b"*", b"x" * 5000, b"%20", b"@", b"#", b"?", b"x?y#z", b"\xff\xfe",
    b"\xc3\xa9", b"{search_id}", b"%7b%7d", b"~", b"CON", b"con.txt",
)  # fmt: skip


def test_every_path_parameter_and_every_trick_in_a_path(service: HostileService) -> None:
    rows, tried = service.rows(), 0
    named = [quote(text, safe="").encode() for text in TEXTS]
    described = [(method, path) for method, path, _ in operations(service.document) if "{" in path]
    pages = [("GET", "/searches/{x}"), ("GET", "/searches/{x}/live"), ("GET", "/static/{x}"),
             ("GET", "/searches/{x}/analysis"), ("GET", "/searches/{x}/log"),
             ("GET", "/{x}"), ("GET", "/v1/{x}"), ("POST", "/v1/searches/{x}")]  # fmt: skip
    for method, path in [*described, *pages]:
        before, _, after = path.partition("{")
        after = after.partition("}")[2]
        body = b"{}" if method == "POST" and "clone" in path else None
        for value in [*_TRICKS, *named]:
            answer = service.request(method, before.encode() + value + after.encode(), body)
            answer.check((method, path, value))
            assert b"root:" not in answer.body
            assert "x-evil" not in answer.headers
            tried += 1
    assert tried > 1000
    assert service.rows() == rows


_HEADERS = (
    "Idempotency-Key", "X-Tenant", "Last-Event-ID", "X-Request-ID", "Content-Type", "Authorization",
    "Cookie", "Host", "Origin", "Referer", "Accept", "Accept-Encoding", "Content-Encoding",
    "User-Agent", "X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "Forwarded", "Range",
    "If-None-Match", "If-Modified-Since", "Expect", "Upgrade", "X-HTTP-Method-Override",
    "Transfer-Encoding", "Content-Length", "TE",
)  # fmt: skip


@pytest.mark.parametrize("every", only([5], [5, 1]), ids="one in {}".format)
def test_every_header(service: HostileService, search: str, every: int) -> None:
    described = {
        p["name"]
        for _, _, operation in operations(service.document)
        for p in operation.get("parameters", ())
        if p["in"] == "header"
    }
    assert {name.lower() for name in described} <= {name.lower() for name in _HEADERS}
    rows, made, body = service.rows(), 0, json.dumps(_GOOD).encode()
    values = [*_VALUES, b"a\x01b", b"\x7f", "é".encode("latin-1"), b"chunked, gzip", b"-1", b"gzip"]
    asked = (("POST", b"/v1/searches", body), ("GET", f"/v1/searches/{search}".encode(), None))
    for turn, name in enumerate(_HEADERS):
        for value in values[turn % every :: every]:
            if b"\r" in value or (name == "Content-Length" and value.strip().isdigit()):
                continue  # another request than this one
            for method, target, sent in asked:
                answer = service.request(method, target, sent, **{name.replace("-", "_"): value})
                answer.check((name, value[:100], method))
                assert "x-evil" not in answer.headers
                made += answer.status == 201
    _only_searches_were_made(service, rows, made)
    for name in ("Idempotency-Key", "X-Tenant", "Content-Type"):
        twice = b"%b: a\r\n%b: b\r\n" % (name.encode(), name.encode())
        head = b"POST /v1/searches HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        length = b"Content-Length: %d\r\n" % len(body)
        service.send(head + twice + length + b"\r\n" + body, method="POST").refused(name, 415, 422)


_POST = b"POST /v1/searches HTTP/1.1\r\nHost: 127.0.0.1\r\n"
_WIRE = {
    "nothing of HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 100,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HTTP/0.9": b"GET /\r\n\r\n",
    "no such version": b"GET / HTTP/9.9\r\nHost: 127.0.0.1\r\n\r\n",
    "no such method": b"BREW /v1/searches HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "CONNECT": b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "a proxy's target": b"GET http://127.0.0.1/etc HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "no Host": b"GET /v1/searches HTTP/1.1\r\n\r\n",
    "two lengths": _POST + b"Content-Length: 1\r\n"
    b"Content-Length: 2\r\n\r\nab",
    "a length and chunks": _POST + b"Content-Length: 4\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a negative length": _POST + b"Content-Length: -1\r\n\r\n",
    "a length of 10^30": _POST + b"Content-Length: 1%b\r\n\r\n" % (b"0" * 30),
    "chunks of no size": _POST + b"Transfer-Encoding: "
    b"chunked\r\n\r\nzz\r\n",
    "a line that is folded": b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A: a\r\n b\r\n\r\n",
    "a space before the colon": b"GET / HTTP/1.1\r\nHost : 127.0.0.1\r\n\r\n",
    "a million headers": b"GET /v1/searches HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"A: b\r\n" * 10**6,
    "a name of 10 MB": b"GET /v1/searches HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 10**7,
    "a path of 10 MB": b"GET /" + b"a" * 10**7, "a query of 10 MB": b"GET /?" + b"a" * 10**7,
}  # fmt: skip


@pytest.mark.parametrize("what", _WIRE)
def test_what_is_no_request_is_refused_or_dropped(service: HostileService, what: str) -> None:
    rows, before = service.rows(), service.resident_bytes()
    answer = service.send(_WIRE[what])
    if answer.status:
        answer.refused(what)
    assert service.resident_bytes() - before < _GROWTH_BYTES
    assert service.rows() == rows


def test_methods_that_a_path_does_not_have_are_named(service: HostileService, search: str) -> None:
    for path, of_path in service.document["paths"].items():
        target = (
            path.replace("{search_id}", search)
            .replace("{trial_id}", "1")
            .replace("{key_id}", _KEY)
            .encode()
        )
        allowed = {method.upper() for method in of_path}
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "TRACE", "HEAD"} - allowed:
            answer = service.request(method, target)
            if method != "HEAD":
                answer.refused((method, path), 404, 405)
            if answer.status == 405 and method != "TRACE":  # which the edge refuses on every path
                assert set(answer.headers["allow"].split(", ")) == allowed
