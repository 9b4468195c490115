"""Traces by the OpenTelemetry SDK, exported by OTLP over HTTP (the extra `trace`). See shared/tracing.py."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter

from shared.micro import gorgon_version
from shared.subjects import micro_name
from shared.traceparent import TraceContext, parse
from shared.tracing import Span, SpanEvent, Tracer

EXPORT_DELAY = 1.0  # seconds that a span waits for company
EXPORT_TIMEOUT = 5.0  # seconds for the collector's answer
CLOSE_TIMEOUT = 0.5  # a stage must be gone within a second of SIGTERM


def otlp_exporter(endpoint: str) -> SpanExporter:
    """`endpoint`: the collector's base, as in OTEL_EXPORTER_OTLP_ENDPOINT."""
    return OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_TIMEOUT)


class OtelSpan(Span):
    def __init__(self, span: trace.Span) -> None:
        context = span.get_span_context()
        flags = int(context.trace_flags)
        super().__init__(str(TraceContext(f"{context.trace_id:032x}", f"{context.span_id:016x}", flags)))
        self._span = span

    def set(self, **attributes: Any) -> None:
        self._span.set_attributes(_named(attributes))

    def event(self, name: str, when: float | None = None, **attributes: Any) -> None:
        self._span.add_event(name, _named(attributes), _nanoseconds(when))

    def end(self, when: float | None = None, error: str = "") -> None:
        if error:
            self._span.set_status(trace.StatusCode.ERROR, error)
        self._span.end(_nanoseconds(when))


class OtelTracer(Tracer):
    """Spans go out in batches on a thread of the SDK's; what it cannot get rid of it drops, and says so in the log."""

    enabled = True

    def __init__(self, exporter: SpanExporter, stage: str, model: str, instance: str) -> None:
        resource = Resource.create(
            {
                "service.name": micro_name(stage),
                "service.namespace": "gorgon",
                "service.instance.id": instance,
                "service.version": gorgon_version(),
                "gorgon.model": model,
            }
        )
        # The default sampler does what the parent's "sampled" flag says, and samples what has no parent.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=EXPORT_DELAY * 1e3))
        self._tracer = self._provider.get_tracer("gorgon", gorgon_version())

    def begin(self, name: str, parent: str, start: float | None = None, **attributes: Any) -> OtelSpan:
        return OtelSpan(
            self._tracer.start_span(
                name, _context(parent), attributes=_named(attributes), start_time=_nanoseconds(start)
            )
        )

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
    ) -> OtelSpan:
        span = self.begin(name, parent, start, **attributes)
        for event in events:
            span.event(event.name, event.when, **event.attributes)
        span.end(max(start, end), error)
        return span

    async def close(self) -> None:
        # A daemon thread: a collector that does not answer must not keep the process.
        closing = threading.Thread(target=self._provider.shutdown, name="close-traces", daemon=True)
        closing.start()
        deadline = asyncio.get_running_loop().time() + CLOSE_TIMEOUT
        while closing.is_alive() and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def _context(traceparent: str) -> Context:
    parent = parse(traceparent)
    if parent is None:
        return Context()
    remote = trace.SpanContext(
        int(parent.trace_id, 16), int(parent.span_id, 16), is_remote=True, trace_flags=trace.TraceFlags(parent.flags)
    )
    return trace.set_span_in_context(trace.NonRecordingSpan(remote), Context())


def _named(attributes: dict[str, Any]) -> dict[str, Any]:
    return {f"gorgon.{name}": value for name, value in attributes.items() if value is not None}


def _nanoseconds(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds * 1e9)
