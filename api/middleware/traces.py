"""Spans of requests, by what FastAPI tells OpenTelemetry of them."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from fastapi.telemetry import TelemetryConfig

from api.declared import declared_of
from api.middleware.prefix import path_of
from nas import tracing

#: Neither errors with what clients sent, nor numbers that `/metrics` tells, nor what FastAPI does
#: within a request.
_NOTHING_ELSE = TelemetryConfig(
    metrics=False, logs=False, operation_spans=False, auto_configure=False
)


def configured() -> TelemetryConfig:
    """What an application tells: the spans of requests to `/v1`, where traces are on."""
    provider = tracing.provider()
    if provider is None:
        return TelemetryConfig(tracing=False, **_NOTHING_ELSE)
    return TelemetryConfig(
        tracing=True, tracer_provider=provider, exclude=_is_left_out, **_NOTHING_ELSE
    )


def _is_left_out(scope: MutableMapping[str, Any]) -> bool:
    """Pages and probes are; and streams of events, which last as long as somebody looks."""
    path = path_of(scope)
    return declared_of(scope).probe or not path.startswith("/v1/") or path.endswith("/events")
