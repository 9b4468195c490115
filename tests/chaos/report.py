"""A run of streams under faults, and its verdict."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass

from tests.chaos.checker import Record
from tests.chaos.deployment import MODEL, Deployment
from tests.chaos.faults import Fault
from tests.chaos.workload import RecordingClient, Workload

LAST_EVENTS = 25  # of a broken stream are shown


@dataclass(frozen=True)
class Goal:
    """How long it goes on: for so many seconds and until so many streams ended and faults struck, but at most for `at_most`."""

    seconds: float
    streams: int = 0
    faults: int = 0
    at_most: float = 0.0

    def reached(self, seconds: float, streams: int, faults: int) -> bool:
        if seconds < self.seconds:
            return False
        return seconds >= self.at_most or (streams >= self.streams and faults >= self.faults)


@dataclass
class Report:
    """`broken`: complaints by stream; `traces`: what is known of the first of these."""

    records: list[Record]
    broken: dict[str, list[str]]
    faults: Counter[tuple[str, str]]
    traces: list[str]

    def __str__(self) -> str:
        ends = Counter((record.kind, record.end) for record in self.records)
        tokens = sum(len(ids) for record in self.records for ids in record.ids.values())
        lines = [
            f"{len(self.records)} streams ({tokens} tokens), {sum(self.faults.values())} faults, {len(self.broken)} broken",
            "  ends:   " + ", ".join(f"{kind} {end} {count}" for (kind, end), count in sorted(ends.items())),
            "  faults: " + ", ".join(f"{kind} {stage} {count}" for (stage, kind), count in sorted(self.faults.items())),
        ]
        for name, complaints in list(self.broken.items())[:20]:
            lines.append(f"  {name}: " + "; ".join(complaints[:4]))
        return "\n".join(lines + self.traces)


def traces(records: Iterable[Record], deployment: Deployment, began: float) -> Iterator[str]:
    """What the clients heard last of each stream, and what was logged of it."""
    for record in records:
        for event in record.events[-LAST_EVENTS:]:
            yield f"  {event.get('heard', began) - began:6.2f} s: {str(event)[:300]}"
        of_it = re.compile(rf"\.{re.escape(record.id)}\b")
        for child in deployment.supervisor.children():
            if child.log_path.exists():
                lines = [line for line in child.log_path.read_text().splitlines() if of_it.search(line)]
                yield from (f"  {child.name}: {line[:300]}" for line in lines[-LAST_EVENTS:])


async def disturb(
    deployment: Deployment,
    workload: Workload,
    check: Callable[[Record], list[str]],
    plan: Iterable[Fault],
    *,
    seed: int,
    streams: int,
    goal: Goal,
) -> Report:
    """Runs the streams while the plan is carried out, until the goal is reached; the last streams end in peace."""
    loop = asyncio.get_running_loop()
    began = loop.time()

    def over() -> bool:
        return goal.reached(loop.time() - began, workload.ended, sum(deployment.injector.done.values()))

    def told() -> Iterator[Fault]:
        for fault in plan:
            print(f"  {loop.time() - began:6.1f} s: {fault}")
            yield fault

    print(f"seed {seed}; each fault is drawn at the time in front of it:")
    await asyncio.gather(
        workload.keep_running(seed, streams, over),
        deployment.injector.carry_out(told(), over, deployment.until_every_stage_serves),
    )
    checked = [(record, complaints) for record in workload.records if (complaints := check(record))]
    broken = {f"{r.id} ({r.kind}, {r.request})": complaints for r, complaints in checked}
    told_of = list(traces([record for record, _ in checked[:3]], deployment, began))
    report = Report(workload.records, broken, deployment.injector.done, told_of)
    print(report)
    return report


async def clients(
    stack: AsyncExitStack, deployment: Deployment, kind: type[RecordingClient] = RecordingClient, count: int = 2
) -> list[RecordingClient]:
    """On a connection each."""
    return [await stack.enter_async_context(kind(deployment.url, MODEL)) for _ in range(count)]
