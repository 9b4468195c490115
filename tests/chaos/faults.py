"""Faults: a plan drawn from one seed, and who carries it out on the processes of a supervisor."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.supervisor import Child, Supervisor

# (process, kind): how often. A stage's copies share its share.
STAGES = ("tokenizer", "scheduler", "model_worker", "detokenizer")
USUAL: Mapping[tuple[str, str], float] = {
    **{(stage, kind): weight for stage in STAGES for kind, weight in (("kill", 3.0), ("stop", 3.0), ("term", 2.0))},
    ("nats", "kill"): 1.5,
    ("nats", "stop"): 1.5,
}
AT_ONCE = 0.25  # of the faults come with a second one


@dataclass(frozen=True)
class Fault:
    """At `at` seconds: "kill" (SIGKILL), "term" (SIGTERM), or "stop" (SIGSTOP, and SIGCONT after `seconds`), "mute"
    (the worker of tests.chaos.mutants only: SIGUSR1, and SIGKILL after `seconds`)."""

    at: float
    target: str
    kind: str
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.at:7.2f} s  {self.kind} {self.target}" + (f" {self.seconds:.2f} s" if self.seconds else "")


def make_plan(
    draw: random.Random,
    seconds: float,
    every: float,
    copies: int,
    weights: Mapping[tuple[str, str], float] = USUAL,
    lasting: tuple[float, float] = (0.2, 3.0),
) -> list[Fault]:
    """Faults of about one in `every` seconds, two at once included."""
    plan: list[Fault] = []
    at = draw.uniform(0, every)
    while at < seconds:
        for _ in range(2 if draw.random() < AT_ONCE else 1):
            ((stage, kind),) = draw.choices(list(weights), list(weights.values()))
            target = stage if stage == "nats" else f"{stage}-{draw.randint(1, copies)}"
            plan.append(Fault(at, target, kind, draw.uniform(*lasting) if kind in ("stop", "mute") else 0.0))
        at += draw.expovariate(1 / (every * (1 + AT_ONCE)))
    return plan


class Injector:
    """`done` counts the faults that found their process alive; `ended` has the processes that were told to die, by child."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.done: Counter[tuple[str, str]] = Counter()
        self.ended: dict[str, set[int]] = {}
        self._children = {child.name: child for child in supervisor.children()}

    async def carry_out(self, plan: Sequence[Fault]) -> None:
        await asyncio.gather(*(self._later(fault) for fault in plan))

    async def _later(self, fault: Fault) -> None:
        await asyncio.sleep(fault.at)
        await self.inject(fault)

    async def inject(self, fault: Fault) -> bool:
        """False if there was no process to harm: it had died a moment ago."""
        child = self._children[fault.target]
        if (pid := child.pid) is None:
            return False
        self.done[child.name.rsplit("-", 1)[0], fault.kind] += 1
        if fault.kind == "stop":
            os.kill(pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(fault.seconds)
            finally:
                if child.pid == pid:
                    os.kill(pid, signal.SIGCONT)
        elif fault.kind == "mute":
            os.kill(pid, signal.SIGUSR1)
            await asyncio.sleep(fault.seconds)
            if child.pid == pid:
                self.ended.setdefault(child.name, set()).add(pid)
                os.kill(pid, signal.SIGKILL)
        else:
            self.ended.setdefault(child.name, set()).add(pid)
            os.kill(pid, signal.SIGKILL if fault.kind == "kill" else signal.SIGTERM)
        return True

    def unexplained(self) -> list[str]:
        """Restarts that no fault accounts for, and deaths that were not followed by one."""
        return [
            f"{child.name}: {child.restarts} restarts, told to die {len(self.ended.get(child.name, ()))} times"
            for child in self._children.values()
            if child.restarts != len(self.ended.get(child.name, ()))
        ]

    @property
    def settled(self) -> bool:
        """Everybody who was to die has, and lives again."""
        return all(_lives_anew(child, self.ended.get(child.name, set())) for child in self._children.values())


def _lives_anew(child: Child, ended: set[int]) -> bool:
    return child.pid is not None and child.pid not in ended
