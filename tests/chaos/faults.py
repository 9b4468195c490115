"""Faults: a plan drawn from one seed, and who carries it out on the processes of a supervisor."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from services.supervisor import Child, Supervisor

# (process, kind): how often. A stage's copies share its share.
STAGES = ("tokenizer", "scheduler", "model_worker", "detokenizer")
USUAL: Mapping[tuple[str, str], float] = {
    **{(stage, kind): weight for stage in STAGES for kind, weight in (("kill", 3.0), ("stop", 3.0), ("term", 2.0))},
    ("nats", "kill"): 1.5,
    ("nats", "stop"): 1.5,
}
FIRST = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP, "mute": signal.SIGUSR1}
LAST = {"stop": signal.SIGCONT, "mute": signal.SIGKILL}  # after some seconds
AT_ONCE = 0.25  # of the faults come with a second one


@dataclass(frozen=True)
class Fault:
    """`after` seconds from the one before (0: at once with it): "kill" (SIGKILL), "term" (SIGTERM), "stop" (SIGSTOP, and SIGCONT
    after `seconds`) or "mute" (for the worker of tests.chaos.mutants only: SIGUSR1, and SIGKILL after `seconds`)."""

    after: float
    target: str
    kind: str
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"after {self.after:5.2f} s  {self.kind} {self.target}" + (
            f" {self.seconds:.2f} s" if self.seconds else ""
        )


def faults(
    draw: random.Random,
    every: float,
    copies: int,
    weights: Mapping[tuple[str, str], float] = USUAL,
    lasting: tuple[float, float] = (0.2, 3.0),
) -> Iterator[Fault]:
    """About one in `every` seconds, two at once included, for ever."""
    while True:
        after = draw.expovariate(1 / (every * (1 + AT_ONCE)))
        for number in range(2 if draw.random() < AT_ONCE else 1):
            ((stage, kind),) = draw.choices(list(weights), list(weights.values()))
            target = stage if stage == "nats" else f"{stage}-{draw.randint(1, copies)}"
            lasts = draw.uniform(*lasting) if kind in LAST else 0.0
            yield Fault(0.0 if number else after, target, kind, lasts)


class Injector:
    """`done` counts the faults that found their process alive; `ended` has the processes that were told to die, by child."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.done: Counter[tuple[str, str]] = Counter()
        self.ended: dict[str, set[int]] = {}
        self._children = {child.name: child for child in supervisor.children()}

    async def carry_out(
        self, plan: Iterable[Fault], over: Callable[[], bool], all_stages_serve: Callable[[], Awaitable[None]]
    ) -> None:
        """Until all is over: the rest of the plan is left out. Each fault (or pair) waits until somebody serves in every stage:
        on a slow machine a worker would otherwise be killed each time before it has loaded, and nothing be tested but patience."""
        async with asyncio.TaskGroup() as under_way:
            for fault in plan:
                if fault.after:
                    await asyncio.sleep(fault.after)
                    await all_stages_serve()
                if over():
                    break
                under_way.create_task(self.inject(fault))

    async def inject(self, fault: Fault) -> bool:
        """False if there was no process to harm: it had died a moment ago."""
        child = self._children[fault.target]
        pid = child.pid
        if pid is None or not _signal(pid, FIRST[fault.kind]):
            return False
        self.done[child.name.rsplit("-", 1)[0], fault.kind] += 1
        if fault.kind in ("kill", "term"):
            self.ended.setdefault(child.name, set()).add(pid)
            return True
        try:
            await asyncio.sleep(fault.seconds)
        finally:
            # The process may have died meanwhile of another fault; a number is not given to a new process so soon.
            if _signal(pid, LAST[fault.kind]) and LAST[fault.kind] is signal.SIGKILL:
                self.ended.setdefault(child.name, set()).add(pid)
        return True

    def unexplained(self) -> list[str]:
        """Restarts that no fault accounts for, and deaths that were not followed by one."""
        wrong = []
        for child in self._children.values():
            ended = self.ended.get(child.name, set())
            if child.restarts != len(ended):
                itself = {pid: status for pid, status in child.deaths.items() if pid not in ended}
                wrong.append(
                    f"{child.name}: {child.restarts} restarts, told to die {len(ended)} times; by itself, with status: {itself}"
                )
        return wrong

    @property
    def settled(self) -> bool:
        """Everybody who was to die has, and lives again."""
        return all(_lives_anew(child, self.ended.get(child.name, set())) for child in self._children.values())


def _signal(pid: int, number: signal.Signals) -> bool:
    """False if the process is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _lives_anew(child: Child, ended: set[int]) -> bool:
    return child.pid is not None and child.pid not in ended
