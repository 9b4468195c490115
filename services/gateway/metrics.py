"""What the gateway counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from shared.metrics_exporter import Measured, MetricsExporter

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """`registry` holds the gateway's own figures; `page` shows them beside those of every stage."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._exporter: MetricsExporter
        self.requests = Counter(
            "gorgon_gateway_requests",
            "Calls that generate, and errors of any route",
            ["route", "status"],
            registry=self.registry,
        )
        self.in_flight = Gauge("gorgon_gateway_in_flight", "requests that are followed", registry=self.registry)
        self.accepted_seconds = Histogram(
            "gorgon_gateway_accepted_seconds",
            "from an HTTP call to the pipeline's acceptance",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.disconnects = Counter(
            "gorgon_gateway_disconnects", "calls whose client went before the end", registry=self.registry
        )
        self.resumed = Counter("gorgon_gateway_resumed", "streams that were gone on with", registry=self.registry)

    def expose(self, service: Measured) -> None:
        self._exporter = MetricsExporter(service, self.registry)

    def page(self) -> bytes:
        return self._exporter.render()
