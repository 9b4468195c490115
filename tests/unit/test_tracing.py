"""Trace contexts, the tracer that does nothing, and OpenTelemetry's."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from shared.config import StageSettings
from shared.otel import OtelTracer
from shared.traceparent import TraceContext, generate, parse, trace_id_of
from shared.tracing import SpanEvent, Tracer, open_tracer

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"

# A stage as it is by default, and what of the libraries for seeing inside has been imported then.
UNOBSERVED = """
import asyncio, sys
from services.detokenizer.service import DetokenizerService
from services.detokenizer.settings import DetokenizerSettings
from services.scheduler.service import SchedulerService
from shared.memory_bus import MemoryBroker, MemoryBus

async def main():
    service = DetokenizerService(MemoryBus(MemoryBroker()), DetokenizerSettings())
    await service.start()
    await service.stop()

asyncio.run(main())
print([m for m in sys.modules if m.startswith(("opentelemetry", "prometheus_client"))])
"""


@pytest.mark.parametrize(
    "wrong",
    [
        "", "00", PARENT[:-1], PARENT + "0", PARENT + "-more", f"ff-{TRACE}-{SPAN}-01", f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01", PARENT.upper(), f" {PARENT}", f"00-{TRACE[:-1]}g-{SPAN}-01", PARENT + "\n",
    ],
)  # fmt: skip
def test_what_is_no_traceparent(wrong: str) -> None:
    assert parse(wrong) is None
    assert trace_id_of(wrong) == ""


def test_traceparent() -> None:
    assert parse(PARENT) == TraceContext(TRACE, SPAN, 1)
    assert str(parse(PARENT)) == PARENT
    assert trace_id_of(PARENT) == TRACE
    later = parse(f"cc-{TRACE}-{SPAN}-00-what-the-future-brings")
    assert later == TraceContext(TRACE, SPAN, 0) and not later.sampled
    one, two = generate(), generate()
    assert parse(str(one)) == one != two


def test_without_a_collector_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    tracer = open_tracer(StageSettings(), "toy", "toy-1")
    assert type(tracer) is Tracer and not tracer.enabled
    span = tracer.begin("x", PARENT, request_id="t.r")
    span.event("e")
    span.set(a=1)
    span.end()
    assert span.traceparent == PARENT and tracer.record("y", PARENT, 1, 2).traceparent == PARENT
    done = subprocess.run([sys.executable, "-c", UNOBSERVED], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_collector_by_either_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_tracer(StageSettings(otlp_endpoint="http://127.0.0.1:1"), "toy", "toy-1"), OtelTracer)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    assert isinstance(open_tracer(StageSettings(), "toy", "toy-1"), OtelTracer)


async def test_spans() -> None:
    exporter = InMemorySpanExporter()
    tracer = OtelTracer(exporter, "toy", "m", "toy-1")
    outer = tracer.begin("outer", PARENT, 100.0, request_id="t.r", nothing=None)
    outer.event("happened", 100.5, worker="w")
    inner = tracer.record(
        "inner", outer.traceparent, 101.0, 102.0, events=[SpanEvent("first", 101.5)], error="bad", epoch=2
    )
    root = tracer.begin("root", "")
    root.end()
    silent = tracer.begin("silent", f"00-{TRACE}-{SPAN}-00")
    silent.end()
    tracer.begin("never ended", PARENT)
    outer.end(103.0)
    await tracer.close()
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert spans.keys() == {"outer", "inner", "root"}, "sampled and ended"
    o, i = spans["outer"], spans["inner"]
    assert o.parent is not None and f"{o.parent.span_id:016x}" == SPAN and f"{o.context.trace_id:032x}" == TRACE
    assert i.parent is not None and i.parent.span_id == o.context.span_id and i.context.trace_id == o.context.trace_id
    assert parse(inner.traceparent) == TraceContext(TRACE, f"{i.context.span_id:016x}", 1)
    assert (o.start_time, o.end_time, i.start_time, i.end_time) == tuple(x * 10**9 for x in (100, 103, 101, 102))
    assert dict(o.attributes or {}) == {"gorgon.request_id": "t.r"}
    assert [(e.name, e.timestamp, dict(e.attributes or {})) for e in o.events] == [
        ("happened", 100_500_000_000, {"gorgon.worker": "w"})
    ]
    assert (i.status.description, dict(i.attributes or {})) == ("bad", {"gorgon.epoch": 2})
    assert o.resource.attributes["service.name"] == "gorgon-toy"
    assert spans["root"].parent is None and f"{spans['root'].context.trace_id:032x}" != TRACE
    assert trace_id_of(silent.traceparent) == TRACE and silent.traceparent.endswith("-00")


async def test_a_collector_that_is_away_keeps_nobody() -> None:
    tracer = open_tracer(StageSettings(otlp_endpoint="http://127.0.0.1:1"), "toy", "toy-1")
    for _ in range(10):
        tracer.begin("x", "").end()
    began = time.monotonic()
    await tracer.close()
    assert time.monotonic() - began < 2
