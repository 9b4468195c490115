"""How long clients see nothing when a process fails: real processes, a real nats-server, two of each stage, and a worker that makes
fixed tokens at a fixed pace.

    python benchmarks/stalls.py                     table of all faults
    ... --faults "model_worker kill" "nats stop"    some of them
    ... --rounds 20 --streams 32 --out FILE         more of them; the same as JSON

A stall is the longest time between two consecutive tokens events of a stream that the fault concerns, from the moment of the fault
on: the streams that ran on the worker, those in the partitions of the detokenizer, else all. Without a fault it is about --step.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import sys
import tempfile
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import msgpack

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from services.bench.measure import percentile  # noqa: E402
from services.running import running  # noqa: E402
from services.supervisor import HEALTHY_AFTER, STAGES, Plan, Supervisor  # noqa: E402
from shared import presence, subjects  # noqa: E402
from shared.broker import free_port  # noqa: E402
from shared.bus import Message  # noqa: E402
from shared.client import Client  # noqa: E402
from shared.client_stream import Stream  # noqa: E402
from shared.messages import WorkerHeartbeat  # noqa: E402
from shared.nats_bus import NatsBus  # noqa: E402

MODEL = "stalls"
PARTITIONS = 8
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}
FAULTS = [f"{stage} {kind}" for stage in reversed(STAGES) for kind in SIGNALS] + ["nats kill", "nats stop"]
START_TIMEOUT = 60.0
SETTLE = 1.5  # seconds between a recovery and the next fault, so that one does not add to the other
STALLED = 5.0  # steps: a longer gap than that is one that a client notices


@dataclass
class Watched:
    """A stream and when its tokens came."""

    stream: Stream
    times: list[float] = field(default_factory=list)

    async def follow(self) -> None:
        loop = asyncio.get_running_loop()
        async for _ in self.stream:
            self.times.append(loop.time())

    def longest_gap(self, since: float, now: float) -> float:
        """Between two events, the last one before `since` included. A stream that has not gone on yet counts until `now`."""
        first = max(0, bisect_left(self.times, since) - 1)
        times = [*self.times[first:], now] if self.times[-1] < since else self.times[first:]
        return max((b - a for a, b in pairwise(times)), default=0.0)


class Bench:
    def __init__(self, args: argparse.Namespace, supervisor: Supervisor, bus: NatsBus, client: Client) -> None:
        self._args = args
        self._supervisor = supervisor
        self._bus = bus
        self._client = client
        self._owners: dict[int, str] = {}
        self._watched: list[Watched] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        for partition in range(PARTITIONS):

            def on_beacon(message: Message, partition: int = partition) -> None:
                self._owners[partition] = msgpack.unpackb(message.data)[0]

            await self._bus.subscribe(subjects.beacon(MODEL, partition), on_beacon)
        for number in range(self._args.streams):
            stream = self._client.generate([10 + number], seed=number, max_tokens=1_000_000, ignore_eos=True)
            self._watched.append(Watched(stream))
            self._tasks.append(asyncio.create_task(self._watched[-1].follow()))
        await self._until(lambda: all(len(w.times) > 20 for w in self._watched), "every stream runs")

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(self._client.cancel(w.stream.id) for w in self._watched))

    async def measure(self, fault: str) -> list[float]:
        """Stalls of the streams concerned, seconds."""
        stage, kind = fault.split()
        stalls: list[float] = []
        for number in range(self._args.rounds):
            await presence.wait_for_stages(self._bus, dict.fromkeys(STAGES, 2), MODEL, START_TIMEOUT)
            # A server that dies again and again is started ever later: that would be measured.
            await asyncio.sleep(HEALTHY_AFTER if fault == "nats kill" else SETTLE)
            name = "nats" if stage == "nats" else f"{stage}-{number % 2 + 1}"
            concerned = await self._concerned(stage, name)
            since = asyncio.get_running_loop().time()
            await self._inject(name, kind)
            await self._until(
                lambda concerned=concerned, since=since: all(w.times[-1] > since + 1.0 for w in concerned), fault
            )
            await asyncio.sleep(1.0)
            now = asyncio.get_running_loop().time()
            stalls += [w.longest_gap(since, now) for w in concerned]
        return stalls

    async def _concerned(self, stage: str, name: str) -> list[Watched]:
        if stage == "model_worker":
            beats = await presence.gather(self._bus, 1.0, lambda beats: len(beats) >= 2 * len(STAGES))
            running = {
                key
                for beat in beats
                if isinstance(beat, WorkerHeartbeat) and beat.base.instance.rpartition("-")[0] == name
                for key in beat.running
            }
            return [w for w in self._watched if subjects.request_key(self._client.tenant, w.stream.id) in running]
        if stage == "detokenizer":
            owned = {p for p, owner in self._owners.items() if owner.rpartition("-")[0] == name}
            return [w for w in self._watched if w.stream.partition in owned]
        return self._watched

    async def _inject(self, name: str, kind: str) -> None:
        (child,) = (c for c in self._supervisor.children() if c.name == name)
        pid = child.pid
        assert pid is not None, f"{name} is not running"
        os.kill(pid, SIGNALS[kind])
        if kind == "stop":
            await asyncio.sleep(self._args.stop_seconds)
            os.kill(pid, signal.SIGCONT)

    async def _until(self, condition: Callable[[], bool], what: str) -> None:
        try:
            async with asyncio.timeout(START_TIMEOUT):
                while not condition():  # noqa: ASYNC110 - what it looks at has no event
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise TimeoutError(f"after {START_TIMEOUT:.0f} s still waiting: {what}") from None


def summary(fault: str, stalls: list[float], step: float) -> dict[str, float | str]:
    ordered = sorted(stalls) or [0.0]
    noticed = sum(stall > STALLED * step for stall in stalls)
    return dict(
        fault=fault,
        streams=len(stalls),
        noticed=noticed,
        p50=round(percentile(ordered, 50), 3),
        p99=round(percentile(ordered, 99), 3),
        longest=round(ordered[-1], 3),
    )


async def run(args: argparse.Namespace, report: Callable[[dict[str, float | str]], None]) -> None:
    with tempfile.TemporaryDirectory(prefix="gorgon-stalls-") as folder:
        flags = {"model_worker": ["--engine", "fixed", "--fixed.step-time", str(args.step), "--max-seqs", "256"]}
        plan = Plan(Path(folder), MODEL, args.model_path, free_port(), dict.fromkeys(STAGES, 2), flags)
        async with running(plan) as (supervisor, bus), Client(plan.nats_url, MODEL) as client:
            bench = Bench(args, supervisor, bus, client)
            await bench.start()
            for fault in args.faults:
                report(summary(fault, await bench.measure(fault), args.step))
            await bench.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, default=ROOT / "models/demo")
    parser.add_argument("--faults", nargs="+", default=FAULTS, choices=FAULTS, metavar="FAULT")
    parser.add_argument("--rounds", type=int, default=6, help="of each fault")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--step", type=float, default=0.02, help="seconds a token takes")
    parser.add_argument("--stop-seconds", type=float, default=2.0, help="from SIGSTOP to SIGCONT")
    parser.add_argument("--out", type=Path, help="file for the results as JSON")
    args = parser.parse_args()
    rows: list[dict[str, float | str]] = []

    def report(row: dict[str, float | str]) -> None:
        rows.append(row)
        print(
            f"| {row['fault']:<18} | {row['streams']:>7} | {row['noticed']:>7} | {row['p50']:>8} | {row['p99']:>8} "
            f"| {row['longest']:>9} |",
            flush=True,
        )

    print(f"| fault              | streams | noticed | p50 (s)  | p99 (s)  | worst (s) |\n|{'---|' * 6}", flush=True)
    asyncio.run(run(args, report))
    if args.out is not None:
        setting = {name: getattr(args, name) for name in ("rounds", "streams", "step", "stop_seconds")}
        machine = dict(cpus=os.cpu_count(), load=os.getloadavg()[0], python=platform.python_version())
        args.out.write_text(json.dumps(dict(machine=machine, setting=setting, stalls=rows), indent=2) + "\n")


if __name__ == "__main__":
    main()
