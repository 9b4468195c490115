"""Table and plots of a benchmark's results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from services.bench.measure import Timeline, throughput

COLUMNS = (
    "| workload | requests | failed | seconds | output tok/s | input tok/s | first token ms p50 / p90 / p99 "
    "| inter-token ms p50 / p90 / p99 |\n|---|---|---|---|---|---|---|---|"
)
POINTS = 50  # of the throughput over time


def row(result: dict[str, Any]) -> str:
    def three(values: dict[str, float]) -> str:
        return " / ".join(f"{values[p]:.1f}" for p in ("p50", "p90", "p99")) if values else "–"

    return (
        f"| {result['workload']} | {result['requests']} | {result['failed']} | {result['seconds']:.2f} "
        f"| {result['output_tokens_per_second']:,.0f} | {result['input_tokens_per_second']:,.0f} "
        f"| {three(result['first_token_ms'])} | {three(result['inter_token_ms'])} |"
    )


def write_json(path: Path, results: list[dict[str, Any]], setting: dict[str, Any]) -> None:
    path.write_text(json.dumps(dict(setting=setting, results=results), indent=1) + "\n")


def plot(path: Path, name: str, timelines: list[Timeline]) -> None:
    """Throughput over time, and the distributions of the time to the first token and between tokens, side by side as a PNG. Raises
    ImportError without matplotlib (extra `bench`)."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    over_time, first, between = figure.subplots(1, 3)
    last = max((t.events[-1][0] for t in timelines if t.events), default=1.0)
    points = throughput(timelines, max(last / POINTS, 1e-3))
    over_time.plot([time for time, _ in points], [rate for _, rate in points])
    over_time.set(title=f"{name}: output", xlabel="s", ylabel="tokens/s", ylim=(0, None))
    firsts = sorted(t.first_token * 1e3 for t in timelines if t.first_token is not None)
    gaps = sorted(gap * 1e3 for t in timelines for gap in t.gaps())
    for axes, values, title in ((first, firsts, "time to first token"), (between, gaps, "between tokens")):
        axes.set(title=title, xlabel="ms", ylabel="share", ylim=(0, 1))
        if values:
            axes.plot(values, [(n + 1) / len(values) for n in range(len(values))], drawstyle="steps-post")
            if values[0] > 0:
                axes.set_xscale("log")
    for axes in (over_time, first, between):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
