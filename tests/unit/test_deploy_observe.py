"""The configuration for seeing inside: it parses, and asks only for what the stages have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from services.gateway.metrics import Metrics
from shared.metrics import CATALOG, Kind

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/gorgon.json").read_text())
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
OBSERVE = {name: service for name, service in COMPOSE["services"].items() if service.get("profiles") == ["observe"]}


def known_samples() -> dict[str, set[str]]:
    """Every name that may stand in an expression, with its labels."""
    common = {"stage", "model", "instance", "job"}
    known: dict[str, set[str]] = {}
    for metric in CATALOG:
        labels = common | ({metric.label} if metric.label else set())
        if metric.kind is Kind.HISTOGRAM:
            known |= {
                f"{metric.name}_bucket": labels | {"le"},
                f"{metric.name}_sum": labels,
                f"{metric.name}_count": labels,
            }
        else:
            known[metric.name] = labels
    for family in Metrics().registry.collect():
        labels = common | {"route", "status", "le"}
        if family.type == "histogram":
            known |= {f"{family.name}_{suffix}": labels for suffix in ("bucket", "sum", "count")}
        else:
            known[family.name + "_total" * (family.type == "counter")] = labels
    return known | {f"process_{what}": {"instance", "job"} for what in ("cpu_seconds_total", "resident_memory_bytes")}


KNOWN = known_samples()


def selectors(expression: Any) -> Iterator[Any]:
    """All vector selectors of a parsed expression."""
    if isinstance(expression, promql_parser.VectorSelector):
        yield expression
    for name in ("expr", "lhs", "rhs", "vs", "vector_selector"):
        if (child := getattr(expression, name, None)) is not None:
            yield from selectors(child)
    for child in getattr(expression, "args", None) or ():
        yield from selectors(child)


def check(expression: str) -> None:
    """Raises if it is no PromQL, or names a metric or a label that there is not."""
    plain = expression.replace("$__rate_interval", "5m")
    parsed = promql_parser.parse(plain)
    found = list(selectors(parsed))
    assert found, f"no metric in {expression}"
    labels: set[str] = set()
    for selector in found:
        assert selector.name in KNOWN, f"{selector.name} in {expression}"
        labels |= KNOWN[selector.name]
        for matcher in selector.matchers.matchers:
            assert matcher.name in KNOWN[selector.name], f"{matcher.name} of {selector.name} in {expression}"
    for group in re.findall(r"\bby \(([^)]*)\)", plain):
        assert {name.strip() for name in group.split(",")} <= labels, f"by ({group}) in {expression}"


@pytest.mark.parametrize("panel", [p for p in DASHBOARD["panels"] if p["type"] != "row"], ids=lambda p: p["title"])
def test_every_panel_asks_for_metrics_that_there_are(panel: dict[str, Any]) -> None:
    assert panel["targets"]
    for target in panel["targets"]:
        check(target["expr"])


@pytest.mark.parametrize(
    "wrong", ["sum(", "sum(gorgon_no_such_metric)", 'gorgon_ready{colour="red"}', "sum by (code) (gorgon_ready)"]
)
def test_the_check_finds_mistakes(wrong: str) -> None:
    with pytest.raises((AssertionError, ValueError)):
        check(wrong)


def test_the_dashboard_shows_what_matters() -> None:
    text = json.dumps(DASHBOARD)
    shown = [metric.name for metric in CATALOG if metric.name in text]
    assert len(shown) > 0.7 * len(CATALOG)
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
    assert all(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in DASHBOARD["panels"])


def test_examples_in_the_docs_are_valid() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    examples = re.findall(r"`((?:histogram_quantile|sum|count|increase|1 [-+])[^`]*)`", text)
    assert len(examples) >= 6
    for example in examples:
        check(example)


def test_the_observe_profile_fits_together() -> None:
    assert {"prometheus", "grafana", "otel-collector"} <= OBSERVE.keys()
    for service in OBSERVE.values():
        assert re.fullmatch(r"[\w./-]+:v?\d[\w.]*", service["image"]), "a named version"
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (ROOT / source).exists() if source.startswith("./") else source in COMPOSE["volumes"]
    sources = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/gorgon.yaml").read_text())["datasources"]
    used = set(re.findall(r'"type": "prometheus", "uid": "(\w+)"', json.dumps(DASHBOARD)))
    assert used == {"prometheus"} <= {source["uid"] for source in sources}
    for source in sources:
        assert re.match(r"http://([\w-]+):", source["url"])[1] in OBSERVE  # type: ignore[index]
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/gorgon.yaml").read_text())["providers"]
    assert any(v.split(":")[1] == provider["options"]["path"] for v in OBSERVE["grafana"]["volumes"])


def test_prometheus_finds_every_stage() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    port = int(COMPOSE["x-stage"]["environment"]["GORGON_METRICS_PORT"])
    scraped: set[str] = set()
    for job in config["scrape_configs"]:
        assert job["honor_labels"] is True
        (discovery,) = job["dns_sd_configs"]
        assert discovery["port"] == (8000 if discovery["names"] == ["gateway"] else port)
        scraped |= set(discovery["names"])
    built = {name for name, service in COMPOSE["services"].items() if "build" in service}
    assert scraped == built


def test_the_collector_takes_what_the_stages_send() -> None:
    config = yaml.safe_load((DEPLOY / "otel/collector.yaml").read_text())
    pipeline = config["service"]["pipelines"]["traces"]
    for kind in ("receivers", "processors", "exporters"):
        assert set(pipeline[kind]) == config[kind].keys()
    assert config["receivers"]["otlp"]["protocols"]["http"]["endpoint"].endswith(":4318")
    assert config["exporters"]["otlp/jaeger"]["endpoint"].split(":")[0] in OBSERVE
