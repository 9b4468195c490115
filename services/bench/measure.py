"""Timelines of requests, and what they amount to. Pure. Times are seconds since the beginning of the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PERCENTILES = (50, 90, 99)


@dataclass(slots=True)
class Timeline:
    """One request: when it was due and when its tokens came (`events`: time and number of tokens). `error`: why it failed."""

    due: float
    prompt_tokens: int
    events: list[tuple[float, int]] = field(default_factory=list)
    ended: float | None = None
    error: str = ""

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.events)

    @property
    def first_token(self) -> float | None:
        """Seconds from when it was due."""
        return self.events[0][0] - self.due if self.events else None

    def gaps(self) -> list[float]:
        """Between one token and the next; those that came together share the time since the event before."""
        gaps: list[float] = []
        for (before, _), (now, count) in zip(self.events, self.events[1:], strict=False):
            gaps += [(now - before) / count] * count
        return gaps


def percentile(ordered: list[float], share: float) -> float:
    """Linear between neighbours; `ordered` is not empty."""
    place = (len(ordered) - 1) * share / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def spread(values: list[float]) -> dict[str, float]:
    """Milliseconds: p50, p90, p99, mean, max."""
    if not values:
        return {}
    ordered = sorted(values)
    found = {f"p{p}": percentile(ordered, p) * 1e3 for p in PERCENTILES}
    return found | {"mean": sum(ordered) / len(ordered) * 1e3, "max": ordered[-1] * 1e3}


def summary(name: str, timelines: list[Timeline]) -> dict[str, Any]:
    """`seconds` run from the first request's due time to the last end."""
    good = [t for t in timelines if not t.error]
    began = min(t.due for t in timelines)
    seconds = max([t.ended for t in timelines if t.ended is not None] or [began]) - began
    output, prompt = sum(t.tokens for t in timelines), sum(t.prompt_tokens for t in good)
    errors: dict[str, int] = {}
    for timeline in timelines:
        if timeline.error:
            errors[timeline.error] = errors.get(timeline.error, 0) + 1
    rate = 1 / seconds if seconds > 0 else 0.0
    return dict(
        workload=name,
        requests=len(timelines),
        failed=len(timelines) - len(good),
        errors=errors,
        seconds=seconds,
        output_tokens=output,
        input_tokens=prompt,
        output_tokens_per_second=output * rate,
        input_tokens_per_second=prompt * rate,
        requests_per_second=len(good) * rate,
        first_token_ms=spread([t.first_token for t in good if t.first_token is not None]),
        inter_token_ms=spread([gap for t in good for gap in t.gaps()]),
    )


def throughput(timelines: list[Timeline], width: float) -> list[tuple[float, float]]:
    """(time, output tokens a second) in windows of `width` seconds."""
    counts: dict[int, int] = {}
    for timeline in timelines:
        for time, count in timeline.events:
            counts[int(time / width)] = counts.get(int(time / width), 0) + count
    return [(n * width, counts.get(n, 0) / width) for n in range(max(counts, default=-1) + 1)]
