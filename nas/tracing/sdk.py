"""What makes and sends spans: imported only in processes whose traces are on."""

from __future__ import annotations

import os
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.trace import Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from nas.errors import echo
from nas.logs import masked

_NAME = "einsum-nas"
_FORMAT = TraceContextTextMapPropagator()


class Sender:
    """The spans of this process, by the standard variables OTEL_*.

    They leave in batches, from a thread of their own; where nobody takes them they are dropped.
    """

    def __init__(self) -> None:
        self._ids = _Ids()
        # `nas.tracing.stop` ends it: at the exit of the interpreter it would wait for its collector
        self.provider = TracerProvider(
            id_generator=self._ids, resource=_resource(), shutdown_on_exit=False
        )
        self.provider.add_span_processor(_Scrubbed())
        self.provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self.provider.get_tracer(_NAME, version("einsum-nas"))

    def begin(
        self,
        name: str,
        attributes: dict[str, Any],
        parent: str | None,
        at: int | None = None,
        ids: tuple[int, int] | None = None,
    ) -> trace.Span:
        """A span.

        Parameters
        ----------
        parent
            Its `traceparent`; None for the current span.
        at
            When it began, nanoseconds since 1970.
        ids
            Those of its trace, if it has no parent, and of itself.
        """
        context = None
        if parent is not None:
            context = _FORMAT.extract({"traceparent": parent}, context=Context())
        elif ids is not None:
            context = Context()
        with self._ids.given(ids):
            return self._tracer.start_span(name, context, attributes=attributes, start_time=at)

    def traceparent(self, span: trace.Span) -> str | None:
        """By which spans elsewhere begin within this one; None if it is none."""
        found: dict[str, str] = {}
        _FORMAT.inject(found, trace.set_span_in_context(span, Context()))
        return found.get("traceparent")

    def fail(self, span: trace.Span, kind: str) -> None:
        span.set_attribute("error.type", kind)
        span.set_status(Status(StatusCode.ERROR))

    def current(self, span: trace.Span) -> AbstractContextManager[Any]:
        return trace.use_span(span, record_exception=False, set_status_on_exception=False)

    def now(self) -> trace.Span:
        return trace.get_current_span()


class _Ids(IdGenerator):
    """Random ids, but for spans whose ids are given.

    Not the library's own: it draws them from the generator of `random`, and would change what a
    task draws from it.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    @contextmanager
    def given(self, ids: tuple[int, int] | None) -> Iterator[None]:
        """Within it spans of this thread get these ids: of their trace, and their own."""
        self._local.ids = ids
        try:
            yield
        finally:
            self._local.ids = None

    def generate_trace_id(self) -> int:
        given: tuple[int, int] | None = getattr(self._local, "ids", None)
        return secrets.randbits(128) or 1 if given is None else given[0]

    def generate_span_id(self) -> int:
        given: tuple[int, int] | None = getattr(self._local, "ids", None)
        return secrets.randbits(64) or 1 if given is None else given[1]

    def is_trace_id_random(self) -> bool:
        return True  # a digest's bits, too


class _Scrubbed(SpanProcessor):
    """Takes from spans of requests what clients wrote: a query may hold anything."""

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        found = span.attributes or {}
        if "url.query" in found:
            span.set_attribute("url.query", "REDACTED")
        if "url.path" in found:
            span.set_attribute("url.path", masked(echo(str(found["url.path"]))))


def _resource() -> Resource:
    """What all spans of this process say of it; OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES
    come first."""
    own: dict[str, str | int] = {
        "service.name": _NAME, "service.version": version("einsum-nas"),
        "host.name": socket.gethostname(), "process.pid": os.getpid(),
    }  # fmt: skip
    given = Resource.create()
    named = not str(given.attributes["service.name"]).startswith("unknown_service")
    found = {k: v for k, v in given.attributes.items() if named or k != "service.name"}
    return Resource(own).merge(Resource(found))
