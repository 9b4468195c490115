"""Workers with a real engine, several on one GPU (or on the CPU), killed again and again under load.

    python -m benchmarks.kill_workers --shape llama3.1-8b --kills 100 --out results/      random weights of a model's shape, one GPU
    ... --medusa 4 --worker-flag=--typical-acceptance=[0.3,0.3]                        with random heads, often right
    python -m benchmarks.kill_workers --model-path models/demo --kills 20                 a model, with its Medusa heads if it has any
    ... --worker-flag=--batch-invariant=true --exact                                      every stream must equal the undisturbed run
    ... --shape tiny --kills 6 --dtype float32 --exact                                    a try on a CPU

First the requests run undisturbed, twice: the second time tells how often streams differ by batch composition alone. Then workers are
killed (SIGKILL) in turn, as soon as the next one and another serve, while the requests are kept running. Reported: streams that are
broken (a position twice, missing, another length, no end), the share of streams that equal the undisturbed run, and the stall that
clients see of the streams that ran on the killed worker, and how long a start took, by what it did. Ends with status 1 if a stream is
broken or, with --exact, different.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.stalls import Watched, summary
from benchmarks.workloads import SHAPES
from services.model_worker.speculation.medusa import MedusaHeads, save_heads
from services.running import running
from services.supervisor import STAGES, Plan, Supervisor
from shared import codec, presence, subjects
from shared.broker import free_port
from shared.bus import Bucket, Message
from shared.client import Client
from shared.client_stream import Delta
from shared.errors import GorgonError
from shared.messages import Tombstone, WorkerHeartbeat
from shared.nats_bus import NatsBus

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared/data"
MODEL = "kills"
READY = 300.0  # seconds: loading, compiling, capturing graphs
STREAM_LIMIT = 300.0
SPECULATION = ("tokens_per_step", "plain_steps")  # of a worker's heartbeats
WATCHED_FOR = 3.0  # seconds after a kill within which a stall counts to it


@dataclass
class Run:
    """One stream: what came of which request."""

    request: int
    watched: Watched
    ids: list[int] = field(default_factory=list)
    broken: str = ""
    epoch: int = 1


class Load:
    """Keeps `streams` requests running, drawn from a fixed set."""

    def __init__(self, client: Client, bodies: list[dict[str, Any]], assignments: Bucket, name: str) -> None:
        self.runs: list[Run] = []
        self.live: dict[str, Run] = {}  # by key
        self._client = client
        self._bodies = bodies
        self._assignments = assignments
        self._name = name

    async def once_each(self, at_a_time: int) -> list[Run]:
        room = asyncio.Semaphore(at_a_time)

        async def one(number: int) -> None:
            async with room:
                await self.run(number)

        await asyncio.gather(*(one(number) for number in range(len(self._bodies))))
        return sorted(self.runs, key=lambda run: run.request)

    async def keep(self, streams: int, over: asyncio.Event, draw: random.Random) -> None:
        async def slot() -> None:
            while not over.is_set():
                await self.run(draw.randrange(len(self._bodies)))

        await asyncio.gather(*(slot() for _ in range(streams)))

    async def run(self, number: int) -> None:
        body = self._bodies[number]
        stream = self._client.generate(id=f"{self._name}-{len(self.runs)}", **body)
        run = Run(number, Watched(stream))
        key = subjects.request_key(self._client.tenant, stream.id)
        self.runs.append(run)
        self.live[key] = run
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(STREAM_LIMIT):
                async for delta in stream:
                    self._take(run, delta, loop.time())
                result = await stream.result()
            if not run.broken and (result.status, len(run.ids)) != ("finished", body["max_tokens"]):
                run.broken = f"{result.status} with {len(run.ids)} of {body['max_tokens']} tokens"
        except TimeoutError:
            run.broken = f"no end after {len(run.ids)} tokens"
            self._client.forget(stream)
        except GorgonError as error:
            run.broken = f"{error.code}: {error.message}"
        del self.live[key]
        entry = await self._assignments.get(key)
        if entry is not None and entry.value is not None and isinstance(end := codec.decode(entry.value), Tombstone):
            run.epoch = end.epoch

    def _take(self, run: Run, delta: Delta, now: float) -> None:
        if delta.position != len(run.ids):
            run.broken = f"position {delta.position} after {len(run.ids)}"
        run.ids += delta.ids
        run.watched.times.append(now)


class Fleet:
    """The workers' last heartbeats, by name."""

    def __init__(self) -> None:
        self.beats: dict[str, WorkerHeartbeat] = {}

    def on_beat(self, message: Message) -> None:
        beat = codec.decode(message.data)
        if isinstance(beat, WorkerHeartbeat):
            self.beats[beat.base.instance.rpartition("-")[0]] = beat


def make_bodies(args: argparse.Namespace, vocabulary: int) -> list[dict[str, Any]]:
    """Half of them greedy, half sampled with a seed."""
    draw = random.Random(args.seed)
    bodies = []
    for number in range(args.requests):
        prompt = [draw.randrange(3, vocabulary) for _ in range(draw.randint(*args.prompt))]
        body = dict(prompt=prompt, max_tokens=draw.randint(*args.output), ignore_eos=True)
        bodies.append(body | (dict(temperature=0) if number % 2 else dict(temperature=0.8, top_p=0.95, seed=number)))
    return bodies


def tokenizer_for(vocabulary: int) -> Path:
    """The folder of the largest tokenizer that has no id which the model has not. It is only for the text of the events."""
    from tokenizers import Tokenizer

    found = {}
    for path in [ROOT / "models/demo/tokenizer.json", *sorted(SHARED.rglob("tokenizer.json"))]:
        size = Tokenizer.from_file(str(path)).get_vocab_size()
        if size <= vocabulary:
            found[size] = path.parent
    if not found:
        raise SystemExit(f"no tokenizer of at most {vocabulary} ids in {SHARED}: name one by --tokenizer")
    return found[max(found)]


def model_folder(args: argparse.Namespace, folder: Path) -> tuple[Path, int, list[str]]:
    """(folder, vocabulary, flags that a worker needs to load it)"""
    if args.model_path is not None:
        return args.model_path, json.loads((args.model_path / "config.json").read_text())["vocab_size"], []
    config = SHAPES[args.shape]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    source = args.tokenizer or tokenizer_for(config["vocab_size"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (source / name).is_file():
            (folder / name).write_bytes((source / name).read_bytes())
    if args.medusa:
        shape = (1, args.medusa, config["hidden_size"])
        heads = MedusaHeads(torch.randn(*shape, config["hidden_size"]) * 0.02, torch.zeros(shape))
        save_heads(heads, folder / "medusa", torch.bfloat16, {})
    return folder, config["vocab_size"], ["--load-format", "dummy"]


async def serves(bus: NatsBus, worker: str) -> None:
    """Returns once this worker and another are ready. Raises TimeoutError."""
    async with asyncio.timeout(READY):
        while True:
            beats = map(presence.base_of, await presence.gather(bus, 0.2))
            ready = {
                beat.instance.rpartition("-")[0] for beat in beats if beat.stage == "model_worker" and not beat.draining
            }
            if worker in ready and len(ready) > 1:
                return


async def kill(
    args: argparse.Namespace, supervisor: Supervisor, bus: NatsBus, load: Load, fleet: Fleet
) -> tuple[dict[Path, list[float]], list[float]]:
    """(when each worker was killed, by its log, in seconds since the epoch; stalls)"""
    loop = asyncio.get_running_loop()
    until = loop.time() + args.seconds
    workers = [child for name, child in supervisor.stages.items() if name.startswith("model_worker")]
    stalls: list[float] = []
    killed: dict[Path, list[float]] = defaultdict(list)
    kills = 0
    while kills < args.kills and loop.time() < until:
        child = workers[kills % len(workers)]
        await serves(bus, child.name)
        await asyncio.sleep(args.settle)
        beat = fleet.beats.get(child.name)
        victims = [load.live[key] for key in (beat.running if beat else ()) if key in load.live]
        victims = [run for run in victims if run.watched.times]
        since = loop.time()
        child.kill(signal.SIGKILL)
        killed[child.log_path].append(time.time())
        kills += 1
        await asyncio.sleep(WATCHED_FOR)
        now = loop.time()
        stalls += [run.watched.longest_gap(since, now) for run in victims]
        if kills % 10 == 0:
            broken = sum(bool(run.broken) for run in load.runs)
            print(
                f"{kills} kills, {len(load.runs)} streams, {broken} broken, longest stall {max(stalls):.2f} s",
                flush=True,
            )
    return killed, stalls


def starts(log: Path, killed: list[float]) -> list[dict[str, float]]:
    """Seconds that each start after a kill took: until the first line of the log, then by what the worker said it was doing."""
    found: list[dict[str, float]] = []
    phases: list[tuple[float, str]] = []
    for text in log.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # a warning, or cut off
            continue
        when = datetime.fromisoformat(line["ts"]).timestamp()
        if line["event"] == "loading" and (not phases or line["what"] != phases[-1][1]):
            phases.append((when, line["what"]))
        if line["event"] == "ready":
            before = max((moment for moment in killed if moment < when), default=None)
            if before is not None:
                spans = zip([(before, "until it says something"), *phases], [*phases, (when, "")], strict=True)
                found.append({what: then - since for (since, what), (then, _) in spans})
            phases = []
    return found


def medians(found: list[dict[str, float]]) -> dict[str, float]:
    whole = {"in all": statistics.median(sum(start.values()) for start in found)} if found else {}
    names = dict.fromkeys(name for start in found for name in start)
    by_phase = {name: statistics.median(start.get(name, 0.0) for start in found) for name in names}
    return {name: round(seconds, 2) for name, seconds in (whole | by_phase).items()}


def equality(runs: list[Run], reference: list[Run]) -> dict[str, float]:
    """Streams that equal the undisturbed run, and where those that do not begin to differ (share of their length, mean)."""
    whole = [run for run in runs if not run.broken]
    differing = [run for run in whole if run.ids != reference[run.request].ids]
    at = [
        next(i for i, (a, b) in enumerate(zip(run.ids, reference[run.request].ids, strict=True)) if a != b)
        / len(run.ids)
        for run in differing
    ]
    return dict(
        streams=len(whole),
        equal=round(1 - len(differing) / max(1, len(whole)), 4),
        differ_at=round(sum(at) / len(at), 3) if at else 1.0,
    )


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="gorgon-kills-") as name:
        folder = Path(name)
        path, vocabulary, load_flags = model_folder(args, folder / "model")
        share = 0.88 / args.workers
        worker = ["--device", args.device, "--dtype", args.dtype, "--gpu-memory-fraction", f"{share:.3f}"]
        worker += ["--max-seqs", str(args.max_seqs), *load_flags, *args.worker_flag]
        copies = dict.fromkeys(STAGES, 1) | {"model_worker": args.workers}
        plan = Plan(folder, MODEL, path, free_port(), copies, {"model_worker": worker})
        async with running(plan, READY) as (supervisor, bus):
            fleet = Fleet()
            await bus.subscribe(subjects.heartbeats("model_worker", MODEL), fleet.on_beat)
            assignments = await bus.bucket(subjects.BUCKET_ASSIGN)
            bodies = make_bodies(args, vocabulary)
            async with Client(plan.nats_url, MODEL) as client:
                reference = await Load(client, bodies, assignments, "reference").once_each(args.streams)
                again = await Load(client, bodies, assignments, "again").once_each(max(1, args.streams // 3))
                broken = [run.broken for run in [*reference, *again] if run.broken]
                assert not broken, f"broken though undisturbed: {broken[:5]}"
                load = Load(client, bodies, assignments, "run")
                over = asyncio.Event()
                keeping = asyncio.create_task(load.keep(args.streams, over, random.Random(args.seed)))
                await asyncio.sleep(args.settle)
                killed, stalls = await kill(args, supervisor, bus, load, fleet)
                speculation = [
                    {k: v for k, v in b.base.detail.items() if k in SPECULATION} for b in fleet.beats.values()
                ]
                over.set()
                await keeping
            kills = sum(map(len, killed.values()))
            started = [start for log, moments in killed.items() for start in starts(log, moments)]
    migrated = [run for run in load.runs if run.epoch > 1]
    tell = Counter(run.broken for run in load.runs if run.broken)
    return dict(
        machine=dict(cpus=os.cpu_count(), load=os.getloadavg()[0], python=platform.python_version()),
        setting={k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        kills=kills,
        streams=len(load.runs),
        migrated=len(migrated),
        broken=sum(tell.values()),
        what=dict(tell.most_common(10)),
        speculation=speculation,
        start_seconds=medians(started),
        undisturbed_again=equality(again, reference),
        not_migrated=equality([run for run in load.runs if run.epoch == 1], reference),
        migrated_streams=equality(migrated, reference),
        stalls=summary("model_worker kill", stalls, args.noticed / 5),
    )


def pair(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    return int(low), int(high or low)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--shape", choices=sorted(SHAPES))
    which.add_argument("--model-path", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="folder; default: the largest of ../shared/data that fits")
    parser.add_argument("--medusa", type=int, default=0, metavar="HEADS", help="give the shape tied random heads")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=540.0, help="for the kills, at most")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--requests", type=int, default=64, help="different ones")
    parser.add_argument("--prompt", type=pair, default=(100, 512), metavar="LOW-HIGH")
    parser.add_argument("--output", type=pair, default=(128, 512), metavar="LOW-HIGH")
    parser.add_argument("--max-seqs", type=int, default=64)
    parser.add_argument("--settle", type=float, default=1.0, help="seconds that all serve before a kill")
    parser.add_argument("--noticed", type=float, default=0.25, help="seconds from which a stall counts as noticed")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--worker-flag", action="append", default=[], help="a further flag of the workers")
    parser.add_argument(
        "--exact", action="store_true", help="a stream that differs from the undisturbed run is an error"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for the figures as JSON")
    args = parser.parse_args()
    figures = asyncio.run(measure(args))
    print(json.dumps(figures, indent=2))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        name = args.shape or args.model_path.name
        (args.out / f"kill-workers-{name}.json").write_text(json.dumps(figures, indent=2) + "\n")
    different = min(figures["migrated_streams"]["equal"], figures["not_migrated"]["equal"]) < 1
    return bool(figures["broken"] or (args.exact and different))


if __name__ == "__main__":
    sys.exit(main())
