"""A stage's figures for Prometheus: read from its last heartbeat and its Meter when somebody scrapes, never before.

The server runs on a thread of its own (prometheus_client's) and reads only what the event loop leaves there: the last heartbeat is
immutable, the Meter's figures are single numbers. So a scrape costs the stage nothing but the interpreter's lock for a moment.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from shared.errors import StartError
from shared.messages import Heartbeat, WorkerHeartbeat
from shared.metrics import Histogram, Kind, Meter, metrics_of
from shared.metrics import Metric as Spec
from shared.presence import base_of

LABELS = ("stage", "model", "instance")


class Measured(Protocol):
    """What the exporter reads of a stage."""

    instance: str
    meter: Meter
    last_beat: Heartbeat | WorkerHeartbeat | None

    @property
    def stage(self) -> str: ...

    @property
    def model(self) -> str: ...

    def refresh_meter(self) -> None:
        """Brings gauges and totals that are kept elsewhere up to date. Called on the exporter's thread."""


class StageCollector(Collector):
    def __init__(self, service: Measured) -> None:
        self._service = service
        self._specs = metrics_of(service.stage)
        self._labels = [service.stage, service.model, service.instance]

    def collect(self) -> Iterator[Metric]:
        self._service.refresh_meter()
        beat, values = self._service.last_beat, list(self._service.meter.values.items())
        by_name: dict[str, list[tuple[str, float]]] = {}
        for (name, label), value in values:
            by_name.setdefault(name, []).append((label, value))
        for spec in self._specs:
            if spec.kind is Kind.HISTOGRAM:
                yield self._histogram(spec, self._service.meter.histogram(spec.name))
                continue
            found = by_name.get(spec.name, []) if not spec.source else _from_beat(spec, beat)
            yield self._family(spec, found)

    def _family(self, spec: Spec, values: Iterable[tuple[str, float]]) -> Metric:
        labels = [*LABELS, spec.label] if spec.label else list(LABELS)
        family: CounterMetricFamily | GaugeMetricFamily
        if spec.kind is Kind.COUNTER:
            family = CounterMetricFamily(spec.name, spec.help, labels=labels)
        else:
            family = GaugeMetricFamily(spec.name, spec.help, labels=labels)
        for label, value in values:
            family.add_metric([*self._labels, label] if spec.label else self._labels, value)
        return family

    def _histogram(self, spec: Spec, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(spec.name, spec.help, labels=LABELS)
        counts, total, cumulated = list(histogram.counts), 0, []
        for bound, count in zip((*histogram.bounds, "+Inf"), counts, strict=True):
            total += count
            cumulated.append((str(bound), total))
        family.add_metric(self._labels, buckets=cumulated, sum_value=histogram.sum)
        return family


def _from_beat(spec: Spec, beat: Heartbeat | WorkerHeartbeat | None) -> list[tuple[str, float]]:
    if beat is None:
        return []
    base = base_of(beat)
    where, _, key = spec.source.partition(".")
    if where == "beat":
        value = getattr(base, key, None)
        if value is None:
            value = getattr(beat, key, None)
        return [] if value is None else [("", float(value))]
    if key.endswith("*"):
        prefix = key[:-1]
        return [(name[len(prefix) :], float(v)) for name, v in base.detail.items() if name.startswith(prefix)]
    if (value := base.detail.get(key)) is None:
        return [("", 0.0)] if spec.kind is Kind.COUNTER else []  # it has counted nothing yet; a gauge is not known yet
    return [("", float(value))]


class LabelledCollector(Collector):
    """A stage's own registry, with the labels that tell the stage."""

    def __init__(self, registry: CollectorRegistry, service: Measured) -> None:
        self._registry = registry
        self._labels = dict(zip(LABELS, (service.stage, service.model, service.instance), strict=True))

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            family.samples = [sample._replace(labels=self._labels | sample.labels) for sample in family.samples]
            yield family


class MetricsExporter:
    """`start` serves GET / (any path) on host:port; `render` gives the same text to who has an HTTP server already.

    own   what a stage keeps in prometheus_client's objects besides
    """

    def __init__(self, service: Measured, own: CollectorRegistry | None = None) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(StageCollector(service))
        if own is not None:
            self._registry.register(LabelledCollector(own, service))
        ProcessCollector(registry=self._registry)
        self._server: Any = None

    def render(self) -> bytes:
        """The text exposition format, version 0.0.4."""
        return generate_latest(self._registry)

    def start(self, host: str, port: int) -> None:
        """Raises StartError if the port is taken."""
        try:
            self._server, _ = start_http_server(port, host, self._registry)
        except OSError as error:
            raise StartError("cannot_listen", f"metrics cannot be served on {host}:{port}: {error}") from None

    def stop(self) -> None:
        """Returns at once: the server notices within half a second, and a stage that must be gone does not wait for it."""
        if self._server is not None:
            threading.Thread(target=_close, args=(self._server,), name="close-metrics", daemon=True).start()
            self._server = None


def _close(server: Any) -> None:
    server.shutdown()
    server.server_close()
