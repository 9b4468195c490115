"""The catalogue of metrics against the documentation, the histogram, and what is shown to Prometheus."""

from __future__ import annotations

import asyncio
import re
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from services.gateway.metrics import Metrics
from shared.broker import free_port
from shared.config import StageSettings
from shared.errors import StartError
from shared.memory_bus import MemoryBroker, MemoryBus
from shared.messages import Heartbeat
from shared.metrics import ALL_STAGES, CATALOG, Histogram, Kind, Meter, metrics_of
from shared.metrics_exporter import MetricsExporter
from shared.service import Service

ROOT = Path(__file__).resolve().parents[2]


def test_names_follow_the_conventions() -> None:
    assert len({metric.name for metric in CATALOG}) == len(CATALOG)
    for metric in CATALOG:
        assert re.fullmatch(r"gorgon_[a-z0-9]+(_[a-z0-9]+)*", metric.name)
        assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER), metric.name
        assert metric.help.endswith(".") and "\n" not in metric.help
        assert bool(metric.buckets) == (metric.kind is Kind.HISTOGRAM), metric.name
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert ("*" in metric.source) <= bool(metric.label)
        if metric.kind is Kind.HISTOGRAM:
            assert metric.source == "" and metric.label == ""


def test_the_documentation_lists_exactly_the_metrics_that_there_are() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    rows = dict(re.findall(r"^\| `(gorgon_\w+)` \| (.*) \|$", text, re.MULTILINE))
    # The gateway has figures of its own, in prometheus_client's objects.
    gateway = {f.name + "_total" * (f.type == "counter") for f in Metrics().registry.collect()}
    assert gateway == {name for name in rows if name.startswith("gorgon_gateway_")}
    assert {name for name in rows if not name.startswith("gorgon_gateway_")} == {metric.name for metric in CATALOG}
    for metric in CATALOG:
        kind = f"{metric.kind}, by `{metric.label}`" if metric.label else str(metric.kind)
        assert rows[metric.name] == f"{kind} | {metric.help}", metric.name


def test_histogram() -> None:
    histogram = Histogram((1.0, 2.0, 5.0))
    for value in (0.5, 1.0, 1.5, 5.0, 6.0):
        histogram.observe(value)
    histogram.observe(1.7, times=10)
    assert histogram.counts == [2, 11, 1, 1]
    assert (histogram.count, histogram.sum) == (15, pytest.approx(14 + 17))


def test_meter_takes_only_what_the_stage_has() -> None:
    meter = Meter("scheduler")
    meter.count("gorgon_scheduler_cancelled_total")
    meter.count("gorgon_scheduler_migrations_total", "lost", by=2)
    assert meter.values["gorgon_scheduler_cancelled_total", ""] == 1
    assert meter.values["gorgon_scheduler_migrations_total", "lost"] == 2
    for wrong in (
        lambda: meter.count("gorgon_scheduler_cancelled_total", "why"),
        lambda: meter.count("gorgon_scheduler_migrations_total"),
        lambda: meter.count("gorgon_worker_tokens_total"),
        lambda: meter.count("gorgon_scheduler_waiting_requests"),  # the heartbeat's
        lambda: meter.histogram("gorgon_worker_step_seconds"),
    ):
        with pytest.raises(KeyError):
            wrong()


class Tokens(Service):
    stage = "tokenizer"
    detail: dict[str, Any] = {}  # noqa: RUF012

    def heartbeat(self) -> Heartbeat:
        return self.base_heartbeat(0.5, 3, **self.detail)


async def test_exposition() -> None:
    service = Tokens(MemoryBus(MemoryBroker()), StageSettings(model="m", name="t"))
    exporter = MetricsExporter(service)

    def samples() -> dict[str, float]:
        found = {}
        for family in text_string_to_metric_families(exporter.render().decode()):
            for sample in family.samples:
                labels = dict(sample.labels)
                if not sample.name.startswith("gorgon_"):
                    continue
                assert (labels.pop("stage"), labels.pop("model")) == ("tokenizer", "m")
                assert labels.pop("instance") == service.instance
                found[sample.name + "".join(f"{{{k}={v}}}" for k, v in labels.items())] = sample.value
        return found

    first = samples()
    assert first["gorgon_ready"] == 0
    assert "gorgon_load_ratio" not in first, "no heartbeat yet: it is not known"
    service.detail = {"accepted": 7, "refused_overloaded": 2, "refused_invalid_request": 1}
    service.beat_now()
    service.meter.histogram("gorgon_tokenizer_admission_seconds").observe(0.003, 4)
    endpoint = service.endpoint("generate", "s")
    endpoint.done(0.25)
    endpoint.done(0.25, "overloaded:later")
    second = samples()
    assert second["gorgon_load_ratio"] == 0.5
    assert second["gorgon_in_flight_requests"] == 3
    assert second["gorgon_tokenizer_accepted_total"] == 7
    assert second["gorgon_tokenizer_repeated_total"] == 0
    assert second["gorgon_tokenizer_refused_total{code=overloaded}"] == 2
    assert second["gorgon_tokenizer_refused_total{code=invalid_request}"] == 1
    assert second["gorgon_tokenizer_admission_seconds_count"] == 4
    assert second["gorgon_tokenizer_admission_seconds_sum"] == pytest.approx(0.012)
    assert second["gorgon_tokenizer_admission_seconds_bucket{le=0.0025}"] == 0
    assert second["gorgon_tokenizer_admission_seconds_bucket{le=0.005}"] == 4
    assert second["gorgon_tokenizer_admission_seconds_bucket{le=+Inf}"] == 4
    assert second["gorgon_endpoint_requests_total{endpoint=generate}"] == 2
    assert second["gorgon_endpoint_errors_total{endpoint=generate}"] == 1
    assert second["gorgon_endpoint_processing_seconds_total{endpoint=generate}"] == 0.5


def test_every_stage_has_the_common_ones() -> None:
    common = [metric for metric in CATALOG if metric.stage == ALL_STAGES]
    for stage in ("tokenizer", "scheduler", "model_worker", "detokenizer", "gateway"):
        assert metrics_of(stage)[: len(common)] == common


async def test_a_stage_serves_its_metrics_while_it_lives_and_goes_at_once() -> None:
    port = free_port()
    settings = StageSettings(model="m", name="t", metrics_port=port, metrics_host="127.0.0.1")
    url = f"http://127.0.0.1:{port}/metrics"
    service = Tokens(MemoryBus(MemoryBroker()), settings)
    await service.start()
    text = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=5).read().decode())
    assert f'gorgon_ready{{instance="{service.instance}",model="m",stage="tokenizer"}} 1.0' in text
    again = Tokens(MemoryBus(MemoryBroker()), settings)
    with pytest.raises(StartError, match=f"metrics cannot be served on 127.0.0.1:{port}"):
        await again.start()
    began = time.monotonic()
    await service.stop()
    assert time.monotonic() - began < 0.3
    async with asyncio.timeout(5):
        while True:
            try:
                await asyncio.to_thread(urllib.request.urlopen, url, timeout=5)
            except OSError:  # refused, or reset before it was taken
                break
            await asyncio.sleep(0.05)
