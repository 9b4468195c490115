"""What the pipeline costs beside the model: real processes, a real nats-server, and a worker that makes fixed tokens at a fixed pace.

    python benchmarks/pipeline.py                   added time to first token, throughput, lateness of 1,024 streams
    python benchmarks/pipeline.py --scaling         throughput of 1, 2 and 4 tokenizers and detokenizers (needs 16 cores)
    ... --out FILE                                  the same as JSON

CPU seconds are those of the stage's processes. Where fewer cores than processes are at hand, tokens per CPU second say what a stage
could do with a core for itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import load  # noqa: E402
from services.bench.measure import spread  # noqa: E402
from services.running import running  # noqa: E402
from services.supervisor import Plan, Supervisor  # noqa: E402
from shared import presence  # noqa: E402
from shared.broker import free_port  # noqa: E402
from shared.nats_bus import NatsBus  # noqa: E402

MODEL = "bench"
STEP = 0.025
PARTITIONS = 16
START_TIMEOUT = 20
LOAD_TIMEOUT = 200  # a real engine compiles and captures graphs


@asynccontextmanager
async def deployment(
    args: argparse.Namespace,
    copies: dict[str, int],
    step_time: float = 0.0,
    engine: list[str] | None = None,
    env: dict[str, str] | None = None,
) -> AsyncIterator[Supervisor]:
    """Server and stages, ready, on data of their own. `engine`: flags of workers with a real engine instead of the fixed one; `env`: of
    all processes."""
    with tempfile.TemporaryDirectory(prefix="gorgon-bench-") as folder:
        vocab = json.loads((args.model_path / "config.json").read_text())["vocab_size"]
        fixed = ["--engine", "fixed", "--fixed.step-time", str(step_time), "--fixed.vocab-size", str(vocab)]
        # Nothing takes the accepted requests of `measure_tokenizer` further.
        flags = {"model_worker": engine or [*fixed, "--max-seqs", "2048"], "tokenizer": ["--max-waiting", "1000000"]}
        env = {"GORGON_PARTITIONS": str(PARTITIONS)} | (env or {})
        plan = Plan(Path(folder), MODEL, args.model_path, free_port(), copies, flags, env)
        async with running(plan, LOAD_TIMEOUT if engine else START_TIMEOUT) as (supervisor, bus):
            await asyncio.sleep(1.0)  # schedulers hear of the workers
            if "detokenizer" in copies:
                await partitions_settled(bus)
            yield supervisor


async def partitions_settled(bus: NatsBus) -> None:
    """Returns once each partition has one owner, and stayed with it for a second. Raises TimeoutError."""
    before: dict[str, int] = {}
    async with asyncio.timeout(START_TIMEOUT):
        while True:
            beats = map(presence.base_of, await presence.gather(bus, 0.3))
            owned = {beat.instance: beat.detail["serving"] for beat in beats if beat.stage == "detokenizer"}
            if owned == before and sum(owned.values()) == PARTITIONS:
                return
            before = owned
            await asyncio.sleep(1.0)


def cpu_seconds(supervisor: Supervisor) -> dict[str, float]:
    """CPU seconds used so far, by stage."""
    used: dict[str, float] = {}
    for child in supervisor.children():
        assert child.restarts == 0, f"{child.name} died; see {child.log_path}"
        if child.pid is not None:
            times = psutil.Process(child.pid).cpu_times()
            stage = child.name.rsplit("-", 1)[0]
            used[stage] = used.get(stage, 0.0) + times.user + times.system
    return used


class CpuMeter:
    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._before = cpu_seconds(supervisor)

    def used(self) -> dict[str, float]:
        return {stage: round(s - self._before[stage], 3) for stage, s in cpu_seconds(self._supervisor).items()}


async def run_loads(*loads: tuple[load.Load, tuple[Any, ...]]) -> list[Any]:
    return await asyncio.to_thread(load.run_together, list(loads))


def quantiles(values: list[float]) -> dict[str, float]:
    """Milliseconds."""
    return {name: round(value, 3) for name, value in spread(values).items()}


# ---------------------------------------------------------------- measurements


async def measure_ttft(args: argparse.Namespace) -> dict[str, Any]:
    """The worker answers at once, so that all there is to the time to first token is what the pipeline adds."""
    async with deployment(args, one_of_each()) as supervisor:
        url = supervisor.plan.nats_url
        await run_loads((load.time_to_first_token, (url, MODEL, 100, 4)))
        meter = CpuMeter(supervisor)
        (alone,) = await run_loads((load.time_to_first_token, (url, MODEL, args.requests, 1)))
        cpu = meter.used()
        (sixteen,) = await run_loads((load.time_to_first_token, (url, MODEL, args.requests, 16)))
    cpu_ms = {stage: round(s / args.requests * 1e3, 3) for stage, s in cpu.items()}
    return dict(one_at_a_time_ms=quantiles(alone), sixteen_at_a_time_ms=quantiles(sixteen), cpu_ms_per_request=cpu_ms)


async def measure_burst(args: argparse.Namespace, count: int = 256, prompt: int = 512) -> dict[str, Any]:
    """Requests that come all at once, of token ids, from four clients; the worker answers each with a token at once."""
    vocab = json.loads((args.model_path / "config.json").read_text())["vocab_size"]
    clients, bursts = 4, []
    async with deployment(args, one_of_each()) as supervisor:
        url = supervisor.plan.nats_url
        for burst in range(6):
            meter = CpuMeter(supervisor)
            prompts = [[3 + (i * 7919 + n * 31) % (vocab - 3) for i in range(prompt)] for n in range(count)]
            jobs = [
                (load.generate, (url, MODEL, prompts[c::clients], [1] * (count // clients), 0.0, f"burst{burst}-{c}"))
                for c in range(clients)
            ]
            done = await run_loads(*jobs)
            began = min(d["began"] for d in done)
            firsts = sorted(d["began"] - began + first for d in done for first in d["first"])
            bursts.append((firsts, meter.used()))
    bursts = bursts[2:]  # the first are for warming up
    firsts = [statistics.median(first[n] for first, _ in bursts) * 1e3 for n in range(count)]
    cpu = {stage: sum(used[stage] for _, used in bursts) / len(bursts) / count * 1e3 for stage in bursts[0][1]}
    return dict(
        requests=count,
        first_ms={n: round(firsts[n - 1], 2) for n in (1, count // 8, count // 2, count)},
        cpu_ms_per_request={stage: round(ms, 3) for stage, ms in cpu.items()},
    )


async def measure_detokenizer(
    args: argparse.Namespace, copies: int, clients: int, writers: int, batched: bool
) -> dict[str, Any]:
    """A token log written as fast as it is stored, read by `copies` detokenizers, events taken by `clients` processes."""
    vocab = json.loads((args.model_path / "config.json").read_text())["vocab_size"]
    async with deployment(args, {"detokenizer": copies}) as supervisor:
        url = supervisor.plan.nats_url
        results: dict[str, Any] = {}
        for tokens in (args.tokens // 5, args.tokens):  # the first is for warming up
            job = load.LogLoad(MODEL, 1024, tokens, PARTITIONS, clients, batched, vocab, uuid.uuid4().hex[:8])
            shares = [list(range(w, PARTITIONS, writers)) for w in range(writers)]
            meter = CpuMeter(supervisor)
            done = await run_loads(
                *((load.count_tokens, (url, job, client)) for client in range(clients)),
                *((load.write_log, (url, job, share, 64)) for share in shares),
            )
            counts, written = done[:clients], done[clients:]
            total = sum(c["tokens"] for c in counts)
            assert total == 1024 * tokens, f"{total} tokens of {1024 * tokens}"
            seconds = max(c["ended"] for c in counts) - min(c["first"] for c in counts)
            cpu = meter.used()
            results = dict(
                tokens=total,
                repeated=sum(c["repeated"] for c in counts),
                tokens_per_second=round(total / seconds),
                tokens_per_cpu_second=round(total / cpu["detokenizer"]),
                written_tokens_per_second=round(
                    total / (max(w["ended"] for w in written) - min(w["began"] for w in written))
                ),
                cpu_seconds=cpu,
                seconds=round(seconds, 3),
            )
    return results


async def measure_tokenizer(args: argparse.Namespace, copies: int, clients: int) -> dict[str, Any]:
    """Requests accepted a second; nothing runs behind the REQ stream but a scheduler that keeps the model known."""
    prompt = " ".join([load.PROMPT] * 20)
    async with deployment(
        args, {"tokenizer": copies, "scheduler": 1, "model_worker": 1, "detokenizer": 1}
    ) as supervisor:
        url = supervisor.plan.nats_url
        # Whoever takes accepted requests further would only compete for the cores.
        for name, child in supervisor.stages.items():
            if not name.startswith("tokenizer"):
                await child.stop()
        # So many under way that no tokenizer ever waits for a client.
        for each in (args.requests // 4, args.requests * 2):  # the first are for warming up
            meter = CpuMeter(supervisor)
            loads = [(load.accepted_rate, (url, MODEL, each, 512 * copies // clients, prompt)) for _ in range(clients)]
            done = await run_loads(*loads)
            cpu = meter.used()
    seconds = max(d["ended"] for d in done) - min(d["began"] for d in done)
    return dict(
        requests_per_second=round(each * clients / seconds),
        requests_per_cpu_second=round(each * clients / cpu["tokenizer"]),
        prompt_chars=len(prompt),
        cpu_seconds=cpu,
    )


async def measure_streams(args: argparse.Namespace) -> dict[str, Any]:
    """How much later than the beat of the steps tokens arrive, while all streams run. A stream's beat is that of its earliest token."""
    processes = 2
    async with deployment(args, one_of_each(), STEP) as supervisor:
        url = supervisor.plan.nats_url
        await run_loads((load.time_to_first_token, (url, MODEL, 50, 4)))
        meter = CpuMeter(supervisor)
        began = time.monotonic()
        share, connections = args.streams // processes, 8 // processes
        done = await run_loads(
            *((load.steady_streams, (url, MODEL, share, connections, args.stream_tokens)) for _ in range(processes))
        )
        seconds = time.monotonic() - began
        cpu = meter.used()
    arrivals = [times for part in done for times in part]
    window = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    late: list[float] = []
    for times in arrivals:
        beat = min(when - position * STEP for position, when in enumerate(times))
        late += [w - beat - p * STEP for p, w in enumerate(times) if window[0] <= w <= window[1]]
    return dict(
        streams=len(arrivals),
        connections=8,
        step_ms=STEP * 1e3,
        all_running_seconds=round(window[1] - window[0], 2),
        events=len(late),
        lateness_ms=quantiles(late),
        cpu_share={stage: round(s / seconds, 3) for stage, s in cpu.items()},
    )


def one_of_each() -> dict[str, int]:
    return dict.fromkeys(("tokenizer", "scheduler", "model_worker", "detokenizer"), 1)


async def scaling(args: argparse.Namespace) -> dict[str, Any]:
    """Each number of copies in turn, `args.repeats` times over, as what else a machine does changes; speed-ups are of medians."""
    result: dict[str, Any] = {}
    for stage in ("tokenizer", "detokenizer"):
        if args.only and args.only not in stage:
            continue
        unit = "requests_per_second" if stage == "tokenizer" else "tokens_per_second"
        rows: dict[int, list[dict[str, Any]]] = {copies: [] for copies in (1, 2, 4)}
        for copies in list(rows) * args.repeats:
            if stage == "tokenizer":
                row = await measure_tokenizer(args, copies, args.clients)
            else:
                row = await measure_detokenizer(args, copies, clients=4, writers=4, batched=True)
            rows[copies].append(row)
            report(f"{copies} × {stage}", row)
        medians = {copies: statistics.median(row[unit] for row in runs) for copies, runs in rows.items()}
        speedup = {copies: round(median / medians[1], 2) for copies, median in medians.items()}
        report(f"{stage}: {unit}, medians", medians)
        report(f"{stage}: speed-up", speedup)
        result[stage] = dict(rows=rows, medians=medians, speedup=speedup)
    return result


async def overhead(args: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {}
    steps = {
        "added time to first token": lambda: measure_ttft(args),
        "a burst of requests": lambda: measure_burst(args),
        "one detokenizer, batched replies": lambda: measure_detokenizer(args, 1, 1, 1, True),
        "one detokenizer, a reply subject each": lambda: measure_detokenizer(args, 1, 1, 1, False),
        "one tokenizer": lambda: measure_tokenizer(args, 1, 1),
        "streams at a steady beat": lambda: measure_streams(args),
    }
    for name, measure in steps.items():
        if args.only and args.only not in name:
            continue
        result[name] = await measure()
        report(name, result[name])
    return result


def report(name: str, values: dict[Any, Any]) -> None:
    print(name, flush=True)
    for key, value in values.items():
        shown = "  ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        print(f"    {key!s:28} {shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, default=ROOT / "models" / "demo", help="folder with the tokenizer")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--only", default="", help="only measurements whose name contains this")
    parser.add_argument("--repeats", type=int, default=3, help="of each number of copies, with --scaling")
    parser.add_argument("--clients", type=int, default=4, help="processes that ask tokenizers, with --scaling")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument(
        "--tokens", type=int, default=250, help="of each of the 1,024 requests in the detokenizer's log"
    )
    parser.add_argument("--streams", type=int, default=1024)
    parser.add_argument("--stream-tokens", type=int, default=800)
    parser.add_argument("--out", type=Path, help="file")
    args = parser.parse_args()
    args.model_path = args.model_path.resolve()
    result = asyncio.run(scaling(args) if args.scaling else overhead(args))
    if args.out:
        machine = dict(
            cores=os.cpu_count(), cpu=platform.processor() or platform.machine(), python=platform.python_version()
        )
        args.out.write_text(json.dumps(dict(machine=machine, **result), indent=2) + "\n")


if __name__ == "__main__":
    main()
