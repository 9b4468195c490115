"""`gorgon top`: what the heartbeats of a deployment say, as tables. Pure but for the terminal: beats and times are passed in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from services.supervisor import IN_ORDER
from shared.messages import Heartbeat, WorkerHeartbeat
from shared.presence import base_of

Beat = Heartbeat | WorkerHeartbeat

INSTANCE = 15  # characters of its name that are always shown: as many as tell "model_worker-1" from its sister
WINDOW = 2.0  # seconds over which rates are means
GONE_AFTER = 3.0  # seconds of silence, and at least so many intervals, after which an instance is not shown any more
# Of a stage's detail, the counter whose rate is shown, and its unit.
RATES = {"tokenizer": ("accepted", "req/s"), "model_worker": ("tokens", "tok/s"), "detokenizer": ("tokens", "tok/s")}
# What else of the detail is shown.
DETAIL = {
    "gateway": ("port",),
    "tokenizer": (),
    "scheduler": ("live", "waiting", "unplaced", "workers", "migrations"),
    "model_worker": ("waiting", "preemptions", "outbox"),
    "detokenizer": ("serving", "backlog"),
}


@dataclass
class Seen:
    """An instance: its last beat, and (time, count) pairs for its rate."""

    beat: Beat
    heard: float
    counts: list[tuple[float, float]] = field(default_factory=list)

    @property
    def base(self) -> Heartbeat:
        return base_of(self.beat)

    @property
    def rate(self) -> float | None:
        """Per second; None for a stage without one, or before two beats."""
        if len(self.counts) < 2:
            return None
        (t0, n0), (t1, n1) = self.counts[0], self.counts[-1]
        return max(0.0, n1 - n0) / (t1 - t0) if t1 > t0 else None


class View:
    """Everything heard lately."""

    def __init__(self) -> None:
        self.seen: dict[str, Seen] = {}

    def hear(self, beat: Beat, now: float) -> None:
        base = base_of(beat)
        seen = self.seen.get(base.instance)
        if seen is None:
            seen = self.seen[base.instance] = Seen(beat, now)
        seen.beat, seen.heard = beat, now
        if base.stage in RATES:
            seen.counts.append((now, float(base.detail.get(RATES[base.stage][0], 0))))
            while len(seen.counts) > 2 and seen.counts[1][0] <= now - WINDOW:
                seen.counts.pop(0)

    def live(self, now: float) -> list[Seen]:
        self.seen = {
            name: seen for name, seen in self.seen.items() if now - seen.heard < max(GONE_AFTER, 5 * seen.base.interval)
        }
        order = {stage: n for n, stage in enumerate(IN_ORDER)}
        return sorted(self.seen.values(), key=lambda s: (s.base.model, order.get(s.base.stage, 9), s.base.instance))

    def render(self, now: float) -> RenderableType:
        """A table for each model; a line that says so if there is none."""
        by_model: dict[str, list[Seen]] = {}
        for seen in self.live(now):
            by_model.setdefault(seen.base.model, []).append(seen)
        if not by_model:
            return Text("no stage answers")
        return Group(*(_model_table(model, seen) for model, seen in by_model.items()))


def _model_table(model: str, instances: list[Seen]) -> Table:
    title = Text(_summary(model, instances), style="bold")
    table = Table(title=title, title_justify="left", box=None, collapse_padding=True, pad_edge=False)
    table.add_column("stage", no_wrap=True)
    table.add_column("instance", min_width=INSTANCE)
    table.add_column("state", no_wrap=True)
    for name in ("load", "in flight", "rate", "batch", "kv", "accept"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("more")
    for seen in instances:
        base, beat = seen.base, seen.beat
        unit = RATES.get(base.stage, ("", ""))[1]
        detail = base.detail
        more = " ".join(f"{key}={detail[key]}" for key in DETAIL.get(base.stage, ()) if key in detail)
        table.add_row(
            base.stage,
            _may_be_cut(base.instance),
            "loading" if "loading" in detail else "draining" if base.draining else "ready",
            f"{base.load:.0%}",
            str(base.in_flight),
            "" if seen.rate is None else f"{seen.rate:,.0f} {unit}",
            f"{detail['batch']}/{beat.max_seqs}" if isinstance(beat, WorkerHeartbeat) else "",
            _percent(_kv_used([seen]), _kv_total([seen])),
            _acceptance([seen]),
            _may_be_cut(more),
        )
    return table


def _may_be_cut(text: str) -> Text:
    """One line; on a narrow terminal these make room, so that the figures stay whole."""
    return Text(text, no_wrap=True, overflow="ellipsis")


def _summary(model: str, instances: list[Seen]) -> str:
    """Totals of a model: what its workers do together, and how many requests live."""
    workers = [seen for seen in instances if isinstance(seen.beat, WorkerHeartbeat)]
    schedulers = [seen.base for seen in instances if seen.base.stage == "scheduler"]
    # Each scheduler knows all live requests, but only its own waiting ones.
    live = max((int(base.detail.get("live", 0)) for base in schedulers), default=0)
    waiting = sum(int(base.detail.get("waiting", 0)) for base in schedulers)
    tokens = sum(seen.rate or 0.0 for seen in workers)
    batch = sum(int(seen.base.detail["batch"]) for seen in workers)
    slots = sum(seen.beat.max_seqs for seen in workers if isinstance(seen.beat, WorkerHeartbeat))
    parts = [
        f"{model}: {live} live",
        f"{waiting} waiting",
        f"{tokens:,.0f} tok/s",
        f"batch {batch}/{slots}",
        f"kv {_percent(_kv_used(workers), _kv_total(workers)) or '-'}",
    ]
    if acceptance := _acceptance(workers):
        parts.append(f"acceptance {acceptance}")
    return " · ".join(parts)


def _kv_total(instances: Iterable[Seen]) -> int:
    return sum(s.beat.kv_tokens_total for s in instances if isinstance(s.beat, WorkerHeartbeat))


def _kv_used(instances: Iterable[Seen]) -> int:
    return sum(s.beat.kv_tokens_total - s.beat.kv_tokens_free for s in instances if isinstance(s.beat, WorkerHeartbeat))


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else ""


def _acceptance(instances: Iterable[Seen]) -> str:
    """Mean acceptance length of the workers that speculate: tokens of a sequence's step with guesses."""
    lengths = [float(s.base.detail["tokens_per_step"]) for s in instances if "tokens_per_step" in s.base.detail]
    return f"{sum(lengths) / len(lengths):.2f}" if lengths else ""
