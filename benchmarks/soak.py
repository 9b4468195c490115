"""Half an hour under the Azure conversation trace with a fault every ten seconds: every stream is checked token by token, and the
memory of every process is watched.

    python benchmarks/soak.py                              30 minutes, the trace compressed two times
    ... --minutes 5 --attach-window 30 --warm-up 2         a short one: what has ended is forgotten sooner, so memory is steady sooner
    ... --out FILE                                         the figures as JSON, samples included

Real processes and a real nats-server, two of each stage, and workers that make fixed tokens at a fixed pace: what they give to a
request is known, so each stream is held against what it must be. Faults: the second process of each stage is killed, told to go or
stopped; the first one and the server are stopped, but live throughout, so that there is somebody whose memory can be followed
(--kill-all: no such mercy). Ends with status 1 if a stream was lost or wrong, if something is still held at the end, or if a process
that lived throughout grew by more than 1 % in ten minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import load  # noqa: E402
from services.model_worker.fixed_engine import expected_ids  # noqa: E402
from services.model_worker.interface import EngineRequest  # noqa: E402
from services.model_worker.settings import FixedEngineSettings  # noqa: E402
from services.running import running  # noqa: E402
from services.supervisor import STAGES, Plan, Supervisor  # noqa: E402
from shared import presence  # noqa: E402
from shared.broker import free_port  # noqa: E402
from shared.bus import BusError  # noqa: E402
from shared.client import Client  # noqa: E402
from shared.errors import GorgonError  # noqa: E402
from shared.nats_bus import NatsBus  # noqa: E402
from shared.sampling import SamplingParams  # noqa: E402
from tests.chaos.faults import Fault, Injector  # noqa: E402

MODEL = "soak"
TRACE = ROOT.parent / "shared/data/traces/AzureLLMInferenceTrace_conv.csv"
START_TIMEOUT = 60.0
STREAM_LIMIT = 180.0  # seconds after which a stream counts as lost
SAMPLE_EVERY = 2.0
TENANTS = 8
GROWTH = 0.01  # of resident memory in ten minutes
BLOCK = 120.0  # seconds; cycles of a collector are shorter
CONTEXT = 32_768


@dataclass(frozen=True)
class Arrival:
    at: float  # seconds from the beginning of the trace
    prompt: int
    output: int


def read_trace(path: Path) -> list[Arrival]:
    """The Azure LLM inference trace of 2023 (Splitwise, ISCA 2024): TIMESTAMP, ContextTokens, GeneratedTokens."""
    rows = list(csv.DictReader(path.open()))
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows]
    return [
        Arrival(time - times[0], int(row["ContextTokens"]), max(1, int(row["GeneratedTokens"])))
        for time, row in zip(times, rows, strict=True)
    ]


@dataclass
class Streams:
    """The load and what became of it."""

    client: Client
    fixed: FixedEngineSettings
    done: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    longest_gap: float = 0.0

    async def run(self, number: int, arrival: Arrival) -> None:
        prompt = [3 + zlib.crc32(b"%d.%d" % (number, i)) % 200 for i in range(min(arrival.prompt, CONTEXT // 2))]
        count = min(arrival.output, CONTEXT // 2)
        params = SamplingParams(max_tokens=count, seed=number, ignore_eos=True)
        must = expected_ids(EngineRequest("", 0, 1, prompt, params), self.fixed)
        stream = self.client.generate(prompt, id=f"s{number}", max_tokens=count, seed=number, ignore_eos=True)
        got: list[int] = []
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(STREAM_LIMIT):
                last = None
                async for delta in stream:
                    now = loop.time()
                    self.longest_gap = max(self.longest_gap, now - last if last is not None else 0.0)
                    last = now
                    got += delta.ids
                result = await stream.result()
        except TimeoutError:
            self._lost(number, f"no end after {len(got)} of {count} tokens")
            self.client.forget(stream)
        except GorgonError as error:
            self._lost(number, f"{error.code}: {error.message}")
        else:
            self.tokens += len(got)
            self.done[result.status] += 1
            if got != must or result.usage["completion_tokens"] != count:
                self._lost(number, f"{len(got)} tokens, and not the right ones")

    def _lost(self, number: int, why: str) -> None:
        self.done["lost"] += 1
        self.wrong.append(f"s{number}: {why}")


@dataclass
class Memory:
    """Resident bytes by (process, pid): (seconds, bytes)."""

    samples: dict[tuple[str, int], list[tuple[float, int]]] = field(default_factory=dict)

    async def watch(self, supervisor: Supervisor, began: float) -> None:
        loop = asyncio.get_running_loop()
        while True:
            for child in supervisor.children():
                if child.pid is not None:
                    try:
                        resident = psutil.Process(child.pid).memory_info().rss
                    except psutil.Error:
                        continue
                    self.samples.setdefault((child.name, child.pid), []).append((loop.time() - began, resident))
            await asyncio.sleep(SAMPLE_EVERY)

    def growth(self, warm_up: float, end: float) -> dict[str, dict[str, float]]:
        """Of those that lived from the warm-up to the end: megabytes, growth in ten minutes by the least-squares line, and half of its
        95 % interval, by residuals of means over BLOCK seconds: one sample is much like the next."""
        found = {}
        for (name, _), samples in self.samples.items():
            kept = [(at, float(resident)) for at, resident in samples if at >= warm_up]
            if samples[0][0] > warm_up or kept[-1:] == [] or kept[-1][0] < end - 5 * SAMPLE_EVERY or len(kept) < 10:
                continue
            line = statistics.linear_regression(*zip(*kept, strict=True))
            first = line.intercept + line.slope * warm_up
            found[name] = dict(
                first_mb=round(first / 2**20, 2),
                last_mb=round((line.intercept + line.slope * kept[-1][0]) / 2**20, 2),
                growth_per_10_min=round(line.slope * 600 / first, 5),
                give_or_take=round(uncertainty(kept, line.slope, line.intercept) * 600 / first, 5),
            )
        return found


def uncertainty(samples: list[tuple[float, float]], slope: float, intercept: float) -> float:
    """Half of the 95 % interval of a slope, residuals within BLOCK seconds counted as one. inf if there are too few blocks."""
    blocks: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for at, value in samples:
        blocks[int(at // BLOCK)].append((at, value - intercept - slope * at))
    means = [(statistics.fmean(at for at, _ in b), statistics.fmean(r for _, r in b)) for b in blocks.values()]
    if len(means) < 4:
        return math.inf
    middle = statistics.fmean(at for at, _ in means)
    spread = sum((at - middle) ** 2 for at, _ in means)
    return 2.3 * math.sqrt(sum(r * r for _, r in means) / (len(means) - 2) / spread)


def faults(draw: random.Random, kill_all: bool) -> list[Fault]:
    """One for each turn, in a shuffled order, so that every kind comes as often."""
    copies = ("1", "2") if kill_all else ("2",)
    plan = [
        Fault(0.0, f"{stage}-{copy}", kind, 0.0) for stage in STAGES for kind in ("kill", "term") for copy in copies
    ]
    plan += [Fault(0.0, f"{stage}-{copy}", "stop", draw.uniform(0.3, 3.0)) for stage in STAGES for copy in ("1", "2")]
    plan += [Fault(0.0, "nats", "kill" if kill_all else "stop", draw.uniform(0.3, 3.0))]
    draw.shuffle(plan)
    return plan


async def inject(injector: Injector, bus: NatsBus, every: float, draw: random.Random, kill_all: bool) -> None:
    while True:
        for fault in faults(draw, kill_all):
            await asyncio.sleep(every)
            await injector.inject(fault)


async def soak(args: argparse.Namespace) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    seconds, warm_up = 60 * args.minutes, 60 * args.warm_up
    arrivals = read_trace(args.trace)
    draw = random.Random(args.seed)
    fixed = FixedEngineSettings(step_time=args.step, max_model_len=CONTEXT, kv_tokens=64 * CONTEXT)
    worker = ["--engine", "fixed", "--max-seqs", str(args.max_seqs)]
    for name in ("step_time", "max_model_len", "kv_tokens"):
        worker += [f"--fixed.{name.replace('_', '-')}", str(getattr(fixed, name))]
    env = load.forgetting_after(args.attach_window) if args.attach_window else {}
    with tempfile.TemporaryDirectory(prefix="gorgon-soak-") as folder:
        model = model_with_context(args.model_path, Path(folder) / "model")
        plan = Plan(Path(folder), MODEL, model, free_port(), dict.fromkeys(STAGES, 2), {"model_worker": worker}, env)
        memory = Memory()
        async with running(plan) as (supervisor, bus):
            injector = Injector(supervisor)
            tenants = [Client(plan.nats_url, MODEL, tenant=f"t{number}") for number in range(TENANTS)]
            for client in tenants:
                await client.start()
            loads = [Streams(client, fixed) for client in tenants]
            began = loop.time()
            watching = [
                asyncio.create_task(memory.watch(supervisor, began)),
                asyncio.create_task(inject(injector, bus, args.fault_every, draw, args.kill_all)),
            ]
            streams = 0
            async with asyncio.TaskGroup() as under_way:
                for round_start, arrival in repeated(arrivals):
                    at = (round_start + arrival.at) / args.compress
                    if at >= seconds:
                        break
                    await asyncio.sleep(max(0.0, began + at - loop.time()))
                    under_way.create_task(loads[streams % TENANTS].run(streams, arrival))
                    streams += 1
                    if streams % 200 == 0:
                        report_progress(loop.time() - began, loads, injector)
                await asyncio.sleep(max(0.0, began + seconds - loop.time()))
                ended = loop.time() - began
                watching[1].cancel()
            watching[0].cancel()
            await asyncio.gather(*watching, return_exceptions=True)
            unrest = await idle(bus, supervisor)
            for client in tenants:
                await client.close()
    wrong = [text for load in loads for text in load.wrong]
    return dict(
        machine=dict(cpus=os.cpu_count(), load=os.getloadavg()[0], python=platform.python_version()),
        setting={k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        streams=streams,
        tokens=sum(load.tokens for load in loads),
        faults={f"{kind} {stage}": count for (stage, kind), count in sorted(injector.done.items())},
        lost=len(wrong),
        wrong=wrong[:20],
        longest_gap=round(max(load.longest_gap for load in loads), 3),
        not_idle=unrest,
        memory=memory.growth(warm_up, ended),
        samples={f"{name} {pid}": rows[:: max(1, len(rows) // 200)] for (name, pid), rows in memory.samples.items()},
    )


def model_with_context(source: Path, folder: Path) -> Path:
    """The model's tokenizer, and a configuration whose context holds the trace's prompts: workers make tokens without a model."""
    folder.mkdir()
    for path in source.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text()) | {"max_position_embeddings": CONTEXT}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def repeated(arrivals: list[Arrival]) -> Any:
    """(when the round began, arrival), again and again."""
    start = 0.0
    while True:
        for arrival in arrivals:
            yield start, arrival
        start += arrivals[-1].at + 1.0


def report_progress(seconds: float, loads: list[Streams], injector: Injector) -> None:
    done: Counter[str] = sum((load.done for load in loads), Counter())
    print(f"{seconds:7.1f} s  {dict(done)}  faults {sum(injector.done.values())}", flush=True)


async def idle(bus: NatsBus, supervisor: Supervisor) -> list[str]:
    """What is still held when all streams have ended; empty as soon as nothing is."""
    from tests.pipeline.harness import complaints

    for _ in range(60):
        try:
            await presence.wait_for_stages(bus, supervisor.plan.copies, MODEL, START_TIMEOUT)
            beats = await presence.gather(bus, 1.0, lambda beats: len(beats) >= len(supervisor.stages))
            left = [complaint for beat in beats for complaint in complaints(beat)]
        except (BusError, TimeoutError) as error:
            left = [repr(error)]
        if not left:
            return []
        await asyncio.sleep(0.5)
    return left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--warm-up", type=float, default=10.0, help="minutes after which memory must not grow")
    parser.add_argument("--compress", type=float, default=2.0, help="times that the trace is played faster")
    parser.add_argument("--fault-every", type=float, default=10.0, help="seconds")
    parser.add_argument("--kill-all", action="store_true", help="also kill who would live throughout")
    parser.add_argument("--attach-window", type=float, default=0.0, help="seconds; 0: the default")
    parser.add_argument("--step", type=float, default=0.02, help="seconds a token takes")
    parser.add_argument("--max-seqs", type=int, default=128)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--trace", type=Path, default=TRACE)
    parser.add_argument("--model-path", type=Path, default=ROOT / "models/demo")
    parser.add_argument("--out", type=Path, help="file for the figures as JSON")
    args = parser.parse_args()
    figures = asyncio.run(soak(args))
    samples = figures.pop("samples")
    print(json.dumps(figures, indent=2))
    if args.out is not None:
        args.out.write_text(json.dumps(figures | {"samples": samples}, indent=2) + "\n")
    grown = {name: row for name, row in figures["memory"].items() if row["growth_per_10_min"] > GROWTH}
    print(f"{figures['streams']} streams, {figures['lost']} lost; grown: {sorted(grown) or 'none'}")
    return bool(figures["lost"] or figures["not_idle"] or grown)


if __name__ == "__main__":
    sys.exit(main())
