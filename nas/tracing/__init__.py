"""Traces: spans of requests, searches and trials, sent to a collector of OpenTelemetry.

They are on in a process that has called `start` and whose environment names a collector.  In every
other process nothing of OpenTelemetry is imported here, and a span is an object that does nothing.

Processes hand on the text of W3C Trace Context, `traceparent`.  Attributes never hold a key, a text
of a user, data or a result: an error is told by its kind alone.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nas.errors import InvalidInput
from nas.logs import masked

if TYPE_CHECKING:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider

    from nas.tracing.sdk import Sender

_log = logging.getLogger(__name__)
#: Each names a collector.
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
#: Seconds for the last spans; a collector that does not answer holds no process up for longer.
_LAST_SECONDS = 2.0
Attributes = Mapping[str, Any]
_sender: Sender | None = None


def start() -> None:
    """Send the spans of this process, where its environment names a collector.

    What is wrong with that is logged: a program that could run without traces does.
    """
    global _sender
    if _sender is not None or not _wanted():
        return
    try:
        _check()
        from nas.tracing.sdk import Sender

        _sender = Sender()
    except ModuleNotFoundError as error:
        missing = f"package {error.name} is missing: pip install 'einsum-nas[tracing]'"
        _log.warning("no traces are sent: %s", missing)
    except Exception as error:  # such as a number of OTEL_BSP_* that its library refuses
        _log.warning("no traces are sent: %s", error)


def stop() -> None:
    """Send what is left, for two seconds at most, and nothing from then on."""
    global _sender
    sender, _sender = _sender, None
    if sender is not None:
        # whatever it waits for, this process may end
        last = threading.Thread(target=sender.provider.shutdown, name="last-spans", daemon=True)
        last.start()
        last.join(_LAST_SECONDS)


def _wanted() -> bool:
    off = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    off |= os.environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() == "none"
    return not off and _named(_ENDPOINTS) is not None


def _named(variables: tuple[str, ...]) -> tuple[str, str] | None:
    """(the first variable that has a value, its value)."""
    return next(((name, found) for name in variables if (found := os.environ.get(name))), None)


def _check() -> None:
    """Raise `InvalidInput` for a way to a collector that spans cannot be sent."""
    name, endpoint = _named(_ENDPOINTS) or ("", "")
    if not endpoint.startswith(("http://", "https://")):
        raise InvalidInput(name, masked(endpoint), "http://HOST:PORT or https://HOST:PORT")
    name, protocol = _named(_PROTOCOLS) or ("", "http/protobuf")
    if protocol != "http/protobuf":
        raise InvalidInput(name, protocol, "http/protobuf")
    exporter = os.environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    if exporter.strip().lower() != "otlp":
        raise InvalidInput("OTEL_TRACES_EXPORTER", exporter, "otlp | none")


def on() -> bool:
    """Whether this process sends spans."""
    return _sender is not None


def provider() -> TracerProvider | None:
    """What makes the spans of this process; None where traces are off.

    It is not set for the whole process: what other libraries would tell, nobody here has looked
    through for what must not be told.
    """
    return None if _sender is None else _sender.provider


class Span:
    """A span that has begun; where traces are off it does nothing."""

    def __init__(self, span: trace.Span | None = None) -> None:
        self._span = span

    @property
    def traceparent(self) -> str | None:
        """By which other processes begin spans within this one."""
        if self._span is None or _sender is None:
            return None
        return _sender.traceparent(self._span)

    def set(self, attributes: Attributes) -> None:
        """Add attributes; those that are None are left out."""
        if self._span is not None:
            self._span.set_attributes(_given(attributes))

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        """Note what has happened now."""
        if self._span is not None:
            self._span.add_event(name, _given(attributes))

    def fail(self, kind: str) -> None:
        """Note an error by its kind: its text may hold what is nobody else's to read."""
        if self._span is not None and _sender is not None:
            _sender.fail(self._span, kind)

    def end(self, at: float | None = None) -> None:
        """End it.

        Parameters
        ----------
        at
            Seconds since 1970, by another clock perhaps; it ends no earlier than it began.
        """
        if self._span is not None:
            begun = getattr(self._span, "start_time", None) or 0
            self._span.end(max(begun, time.time_ns() if at is None else int(1e9 * at)))


_NOTHING = Span()


def _given(attributes: Attributes | None) -> dict[str, Any]:
    return {name: value for name, value in (attributes or {}).items() if value is not None}


def begin(name: str, attributes: Attributes | None = None, *, parent: str | None = None) -> Span:
    """A span within `parent`, or else within the current one; its caller ends it."""
    if _sender is None:
        return _NOTHING
    return Span(_sender.begin(name, _given(attributes), parent))


@contextmanager
def span(name: str, attributes: Attributes | None = None, *, alone: bool = False) -> Iterator[Span]:
    """A span as long as the block, within the current one; an error of the block is noted.

    Parameters
    ----------
    alone
        The spans of the block do not begin within this one, but beside it.
    """
    found = begin(name, attributes)
    try:
        with current(_NOTHING if alone else found):
            yield found
    except Exception as error:
        found.fail(type(error).__name__)
        raise
    finally:
        found.end()


@contextmanager
def current(found: Span) -> Iterator[None]:
    """Within it spans of this thread or task begin within this one, which it does not end."""
    if _sender is None or found._span is None:
        yield
        return
    with _sender.current(found._span):
        yield


def now() -> Span:
    """The current span."""
    return _NOTHING if _sender is None else Span(_sender.now())


def carrier() -> dict[str, str]:
    """`traceparent` of the current span, for what is stored and goes on elsewhere; else nothing."""
    found = now().traceparent
    return {} if found is None else {"traceparent": found}


def begin_lasting(
    name: str, of: str, attributes: Attributes, *, parent: str | None, at: float
) -> Span:
    """A span of something that outlives processes: each process that begins it begins the same.

    Only one may end it; the others leave theirs, of which nothing is told.  So what any process
    has done within it has a parent, even if that process was killed.

    Parameters
    ----------
    of
        Decides its id; and its trace's, where it has no parent.
    at
        Seconds since 1970.
    """
    if _sender is None:
        return _NOTHING
    digest = hashlib.sha256(f"{name} {of}".encode()).digest()
    ids = int.from_bytes(digest[:16]), int.from_bytes(digest[16:24])
    return Span(_sender.begin(name, _given(attributes), parent, int(1e9 * at), ids))
