"""Spans of this process, told to a collector; how traces are switched on; ids across processes."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Iterator

import pytest

from nas import tracing
from tests.support.collector import Collector, collecting

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector that this process sends its spans to."""
    with collecting() as found:
        monkeypatch.setenv(ENDPOINT, found.url)
        tracing.start()
        try:
            yield found
        finally:
            tracing.stop()


def lasting(parent: str | None = None) -> tracing.Span:
    return tracing.begin_lasting("search", "a1", {"x": 1}, parent=parent, at=1e9)


def test_spans_are_told_with_their_parents_and_errors(collector: Collector) -> None:
    with tracing.span("outer", {"einsum_nas.width": 16, "einsum_nas.round": None}) as outer:
        with pytest.raises(ZeroDivisionError), tracing.span("inner"):
            raise ZeroDivisionError("a text that is nobody else's")
        with tracing.span("beside", alone=True):
            assert tracing.carrier() == {"traceparent": outer.traceparent}
            tracing.begin("also beside").end()
        outer.event("noted")
    child = tracing.begin("child", parent=PARENT)
    child.end()
    tracing.stop()
    told = {span.name: span for span in collector.spans}
    assert told["outer"].attributes == {"einsum_nas.width": 16}
    assert told["outer"].events == ("noted",)
    assert told["inner"].parent == told["beside"].parent == told["outer"].id
    assert told["also beside"].parent == told["outer"].id
    assert told["inner"].status == 2
    assert told["inner"].attributes == {"error.type": "ZeroDivisionError"}
    assert b"nobody else" not in b"".join(collector.received)
    assert f"00-{told['child'].trace}-{told['child'].parent}-01" == PARENT
    assert told["child"].resource["service.name"] == "einsum-nas"


@pytest.mark.parametrize("parent", [None, PARENT])
def test_a_span_that_outlives_processes_is_the_same_in_each(
    collector: Collector, parent: str | None
) -> None:
    with tracing.span("of another trace"):
        first, second = lasting(parent), lasting(parent)
        with tracing.current(first), tracing.span("child"):
            pass
    other = tracing.begin_lasting("search", "a2", {}, parent=parent, at=1e9)
    assert first.traceparent == second.traceparent != other.traceparent
    second.end(at=0.0)  # by a clock that is behind
    tracing.stop()
    (search,) = collector.named("search")
    (child,) = collector.named("child")
    assert (child.parent, child.trace) == (search.id, search.trace)
    assert search.begun == search.ended == int(1e18)
    assert search.parent == ("" if parent is None else "b7ad6b7169203331")


def test_an_unsampled_parent_has_unsampled_children(collector: Collector) -> None:
    unsampled = PARENT.removesuffix("01") + "00"
    search = lasting(unsampled)
    with tracing.current(search), tracing.span("child") as child:
        assert str(child.traceparent).endswith("-00")
    search.end()
    tracing.stop()
    assert not collector.spans


def test_the_random_numbers_of_tasks_stay_theirs(collector: Collector) -> None:
    state = random.getstate()
    with tracing.span("any"):
        pass
    assert random.getstate() == state


def test_without_a_collector_a_span_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENDPOINT, raising=False)
    tracing.start()
    assert not tracing.on()
    with tracing.span("any", {"x": 1}) as span, tracing.current(lasting()):
        span.event("noted")
        span.fail("any")
        assert tracing.carrier() == {}
    assert tracing.provider() is None
    tracing.stop()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (ENDPOINT, "collector:4317", "OTEL_EXPORTER_OTLP_ENDPOINT: got collector:4317; accepted:"),
        (ENDPOINT, "x://me:hidden@host", r"got x://me:\*\*\*@host; accepted: http://HOST:PORT"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "got grpc; accepted: http/protobuf"),
        ("OTEL_TRACES_EXPORTER", "zipkin", r"got zipkin; accepted: otlp \| none"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "9999999", "no traces are sent: "),
    ],
)
def test_what_cannot_be_used_is_a_warning(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:1")
    monkeypatch.setenv(name, value)
    with caplog.at_level(logging.WARNING):
        tracing.start()
    assert not tracing.on()
    (record,) = (r for r in caplog.records if r.name == "nas.tracing")
    assert re.search(said, record.getMessage())


@pytest.mark.parametrize(
    ("name", "value"), [("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")]
)
def test_the_standard_ways_to_switch_it_off(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:1")
    monkeypatch.setenv(name, value)
    tracing.start()
    assert not tracing.on()
