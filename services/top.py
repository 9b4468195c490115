"""`gorgon top`: what the heartbeats of a deployment say, as tables. Pure but for the terminal: beats and times are passed in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from services.supervisor import IN_ORDER
from shared.messages import Heartbeat, WorkerHeartbeat
from shared.presence import base_of

Beat = Heartbeat | WorkerHeartbeat

# Columns that make room on a narrow terminal, so that figures stay whole, and what is always shown of them: of an instance's name as
# many characters as tell "model_worker-1" from its sister. On a still narrower one columns are left out, in this order.
MAY_BE_CUT = {"instance": 15, "more": 10}
DISPENSABLE = ("more", "accept", "load", "kv", "in flight")
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
        return Group(*(_ModelTable(model, seen) for model, seen in by_model.items()))


@dataclass
class _ModelTable:
    """With as many of its columns as the terminal is wide enough for."""

    model: str
    instances: list[Seen]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        tables = (_table(self.model, self.instances, DISPENSABLE[:n]) for n in range(len(DISPENSABLE) + 1))
        for table in tables:
            if _least_width(table) <= options.max_width:
                break
        yield table


def _least_width(table: Table) -> int:
    columns = ((column, [str(cell) for cell in (column.header, *column.cells)]) for column in table.columns)
    return sum((column.min_width or max(map(cell_len, cells))) + 1 for column, cells in columns) - 1


def _table(model: str, instances: list[Seen], left_out: tuple[str, ...]) -> Table:
    title = Text(_summary(model, instances), style="bold")
    table = Table(title=title, title_justify="left", box=None, collapse_padding=True, pad_edge=False)
    rows = [_cells(seen) for seen in instances]
    for name in rows[0]:
        if name in left_out:
            continue
        if name in MAY_BE_CUT:
            table.add_column(name, min_width=MAY_BE_CUT[name])
        else:
            table.add_column(name, justify="left" if name in ("stage", "state") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell for name, cell in row.items() if name not in left_out))
    return table


def _cells(seen: Seen) -> dict[str, str | Text]:
    """An instance's row, by column."""
    base, beat, detail = seen.base, seen.beat, seen.base.detail
    unit = RATES.get(base.stage, ("", ""))[1]
    more = " ".join(f"{key}={detail[key]}" for key in DETAIL.get(base.stage, ()) if key in detail)
    return {
        "stage": base.stage,
        "instance": _may_be_cut(base.instance),
        "state": "loading" if "loading" in detail else "draining" if base.draining else "ready",
        "load": f"{base.load:.0%}",
        "in flight": str(base.in_flight),
        "rate": "" if seen.rate is None else f"{seen.rate:,.0f} {unit}",
        "batch": f"{detail['batch']}/{beat.max_seqs}" if isinstance(beat, WorkerHeartbeat) else "",
        "kv": _percent(_kv_used([seen]), _kv_total([seen])),
        "accept": _acceptance([seen]),
        "more": _may_be_cut(more),
    }


def _may_be_cut(text: str) -> Text:
    """One line."""
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
