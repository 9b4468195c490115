"""One trace a request, one span or more a stage. The context travels in the messages as a W3C traceparent (shared/traceparent.py).

Without an OpenTelemetry collector configured, `Tracer` is all there is: nothing is imported, a span is an object that passes its
parent on. With one, `open_tracer` returns shared/otel.py's, which needs the extra `trace`.

Times are seconds since the epoch, of this machine's clock or, where a figure is the log's, of NATS's.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from shared.config import StageSettings

STANDARD_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"


class SpanEvent(NamedTuple):
    name: str
    when: float
    attributes: dict[str, Any] = {}  # noqa: RUF012 - never mutated


class Span:
    """Work on a request that has begun. One that is never ended is never exported.

    traceparent   what the next stage's spans have for a parent: of this span, or of its own parent where nothing is traced
    """

    def __init__(self, traceparent: str) -> None:
        self.traceparent = traceparent

    def set(self, **attributes: Any) -> None:
        """Attributes, in the project's own namespace: `epoch` becomes gorgon.epoch."""

    def event(self, name: str, when: float | None = None, **attributes: Any) -> None: ...

    def end(self, when: float | None = None, error: str = "") -> None: ...


class Tracer:
    """Traces nothing. `enabled`: it is worth the while to work out what a span says."""

    enabled = False

    def begin(self, name: str, parent: str, start: float | None = None, **attributes: Any) -> Span:
        """`parent`: a traceparent; "" or an invalid one begins a new trace."""
        return Span(parent)

    def record(
        self,
        name: str,
        parent: str,
        start: float,
        end: float,
        *,
        events: Sequence[SpanEvent] = (),
        error: str = "",
        **attributes: Any,
    ) -> Span:
        """A span that is over already."""
        return Span(parent)

    async def close(self) -> None:
        """Exports what is left, if that goes quickly."""


def open_tracer(settings: StageSettings, stage: str, instance: str) -> Tracer:
    """Raises ImportError if a collector is configured and the extra `trace` is not installed."""
    endpoint = settings.otlp_endpoint or os.environ.get(STANDARD_VARIABLE, "")
    if not endpoint:
        return Tracer()
    from shared.otel import OtelTracer, otlp_exporter

    return OtelTracer(otlp_exporter(endpoint), stage, settings.model, instance)


def wall_clock(loop_time: float) -> float:
    """The epoch's seconds at which the running loop's clock showed `loop_time`."""
    return time.time() - (asyncio.get_running_loop().time() - loop_time)
