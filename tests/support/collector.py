"""A collector of OpenTelemetry on loopback: it takes traces by OTLP over HTTP, as protobuf."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue


@dataclass(frozen=True)
class Told:
    """A span as the collector was told of it."""

    name: str
    trace: str
    id: str
    #: empty for a root
    parent: str
    #: a number of SpanKind
    kind: int
    #: 0 unset, 1 ok, 2 error
    status: int
    message: str
    #: nanoseconds since 1970
    begun: int
    ended: int
    attributes: Mapping[str, Any]
    #: names
    events: tuple[str, ...]
    #: of the process that it is from
    resource: Mapping[str, Any]


class Collector:
    """What has come in.

    Parameters
    ----------
    answers
        Whether it answers; otherwise it keeps every request waiting until it is closed.
    """

    def __init__(self, *, answers: bool = True) -> None:
        self.spans: list[Told] = []
        #: all that was sent, as it was sent
        self.received: list[bytes] = []
        self._closed, self._answers = threading.Event(), answers
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def named(self, name: str) -> list[Told]:
        """The spans of a name."""
        return [span for span in list(self.spans) if span.name == name]

    def close(self) -> None:
        """Take nothing more."""
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.received.append(body)
                if not collector._answers:
                    collector._closed.wait()
                    return
                assert self.path == "/v1/traces"
                assert self.headers["Content-Type"] == "application/x-protobuf"
                collector.spans += _read(ExportTraceServiceRequest.FromString(body))
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                """Nothing."""

        return Handler


@contextmanager
def collecting(*, answers: bool = True) -> Iterator[Collector]:
    """A collector until the end of the block."""
    found = Collector(answers=answers)
    try:
        yield found
    finally:
        found.close()


def _read(request: ExportTraceServiceRequest) -> Iterator[Told]:
    for resource in request.resource_spans:
        about = _attributes(resource.resource.attributes)
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Told(
                    span.name, span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(),
                    span.kind, span.status.code, span.status.message, span.start_time_unix_nano,
                    span.end_time_unix_nano, _attributes(span.attributes),
                    tuple(event.name for event in span.events), about,
                )  # fmt: skip


def _attributes(found: Any) -> dict[str, Any]:
    return {each.key: _value(each.value) for each in found if isinstance(each, KeyValue)}


def _value(found: AnyValue) -> Any:
    kind = found.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in found.array_value.values]
    return None if kind is None else getattr(found, kind)
