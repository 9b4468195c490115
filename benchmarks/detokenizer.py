"""How many tokens a second one detokenizer carries, and how long a step's events take on their way.

    python benchmarks/detokenizer.py core       fold, text, events and their encoding, without messaging
    python benchmarks/detokenizer.py pipeline   through a real nats-server: token log in, events out, latency of each token's event
    python benchmarks/detokenizer.py metrics    what recording latencies for Prometheus costs: `core` with and without, in turns
    python benchmarks/detokenizer.py profile    cProfile of `core`

Tokens are those of a text, in one message a step and partition as a worker writes them.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import itertools
import json
import multiprocessing
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import psutil
from tokenizers import Tokenizer

from services.detokenizer.decoding import decoder_for
from services.detokenizer.partition import Partition
from services.detokenizer.recorder import Recorder
from services.detokenizer.settings import DetokenizerSettings
from shared import codec, subjects
from shared import messages as m
from shared.bus import Message, Stored
from shared.metrics import Meter
from shared.micro import Endpoint
from shared.tracing import Tracer

TEXT = (
    "The quick brown fox jumps over the lazy dog, and then it stops to think about why foxes are always quick in such sentences. "
    "Nobody knows. \u201cPerhaps,\u201d said the dog, \u201cit is because they were written by foxes.\u201d\n\n"
)
MODEL = "bench"


class Sink:
    """The part of a bus that a partition needs while nothing goes wrong."""

    def __init__(self) -> None:
        self.messages = 0
        self.bytes = 0

    def publish(self, subject: str, data: bytes, reply: str = "") -> None:
        self.messages += 1
        self.bytes += len(data)


def replies(kind: str, streams: int) -> list[m.ReplyTo]:
    """json: an inbox each, an event a message. batched: 8 clients that take arrays of events."""
    if kind == "json":
        return [m.ReplyTo(f"_INBOX.{i}", "json") for i in range(streams)]
    return [m.ReplyTo(f"_INBOX.{i % 8}", kind.removesuffix("-batched"), True) for i in range(streams)]


def opened(i: int, reply: m.ReplyTo, stops: tuple[str, ...]) -> m.Open:
    return m.Open(f"default.{i:032x}", reply, i, 10, 10**6, stops)


def steps(ids: list[int], streams: int) -> Iterator[m.StepTokens]:
    """One token of each stream a step, for ever."""
    for step in itertools.count():
        yield m.StepTokens(
            "w",
            step,
            tuple(
                m.Tokens(f"default.{i:032x}", 0, 1, step, codec.pack_ids([ids[(step + i) % len(ids)]]))
                for i in range(streams)
            ),
        )


def core(
    tokenizer: Tokenizer, kind: str, streams: int, stops: tuple[str, ...], count: int, measured: bool = True
) -> tuple[float, Sink]:
    """Tokens a second of CPU time from a stored entry to encoded messages."""
    sink = Sink()
    endpoints = [Endpoint(name, name) for name in ("replay", "prefix", "attach")]
    recorder = Recorder(Meter("detokenizer"), Tracer(), *endpoints)
    settings, decoding = DetokenizerSettings(), decoder_for(tokenizer)
    partition = Partition(sink, settings, 0, decoding, _no_task, recorder)  # type: ignore[arg-type]
    partition.core.recorder = recorder if measured else None
    ids = tokenizer.encode(TEXT).ids
    for i, reply in enumerate(replies(kind, streams)):
        partition.fold(Stored(i + 1, "", codec.encode(opened(i, reply, stops)), 1.0))
    data = [codec.encode(entry) for entry in itertools.islice(steps(ids, streams), count // streams)]
    began = time.process_time()
    for seq, entry in enumerate(data, streams + 1):
        partition.fold(Stored(seq, "", entry, 1.0 + seq / 64))
        partition.deliver()
    if measured:
        assert recorder.inter_token.count == (len(data) - 1) * streams
    return len(data) * streams / (time.process_time() - began), sink


def _no_task(coroutine: Any, name: str) -> Any:
    raise AssertionError(f"{name}: nothing ends in this benchmark")


def run_core(tokenizer: Tokenizer) -> None:
    print(f"{'replies':16} {'streams':>8} {'stops':>6} {'tokens/s':>10} {'messages':>9} {'bytes/token':>12}")
    for kind in ("json", "json-batched", "msgpack-batched"):
        for streams in (64, 1024):
            for stops in ((), ("</s>", "\n\nUser:")):
                count = 200_000
                rate, sink = core(tokenizer, kind, streams, stops, count)
                print(
                    f"{kind:16} {streams:8} {len(stops):6} {rate:10,.0f} {sink.messages:9,} {sink.bytes / count:12.0f}"
                )


def run_metrics(tokenizer: Tokenizer, rounds: int = 15, count: int = 100_000) -> None:
    """Pairs of runs, in alternating order: what the machine does besides hits both alike."""
    print(
        f"{'streams':>8} {'without':>10} {'with':>10} {'cost':>8}   (tokens/s, medians; cost: median of the pairs, quartiles)"
    )
    for streams in (64, 1024):
        rates: dict[bool, list[float]] = {False: [], True: []}
        costs: list[float] = []
        for number in range(rounds):
            for measured in (False, True) if number % 2 else (True, False):
                rates[measured].append(core(tokenizer, "msgpack-batched", streams, (), count, measured)[0])
            costs.append(rates[False][-1] / rates[True][-1] - 1)
        low, middle, high = statistics.quantiles(costs, n=4)
        without, with_ = statistics.median(rates[False]), statistics.median(rates[True])
        print(f"{streams:8} {without:10,.0f} {with_:10,.0f} {middle:8.1%}   {low:.1%} .. {high:.1%}")


# ---------------------------------------------------------------- through NATS


def detokenizer(url: str, folder: str, partitions: int) -> None:
    import gc
    import sys

    import uvloop

    from services.detokenizer.service import DetokenizerService
    from shared.service import _serve

    gc.set_threshold(100_000, 50, 100)  # as __main__ does
    settings = DetokenizerSettings(
        nats_url=url, model=MODEL, model_path=folder, partitions=partitions, log_level="warning", vanished_after=0
    )
    sys.exit(uvloop.run(_serve(DetokenizerService, settings)))


async def pipeline(url: str, process: psutil.Process, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    from shared.config import StageSettings
    from shared.nats_bus import NatsBus
    from shared.streams import ensure_streams

    settings = StageSettings(nats_url=url, model=MODEL, partitions=args.partitions)
    writer = await NatsBus.connect(settings)
    await ensure_streams(writer, settings)
    served: set[str] = set()
    for partition in range(args.partitions):
        await writer.subscribe(subjects.beacon(MODEL, partition), lambda message: served.add(message.subject))
    while len(served) < args.partitions:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    clients = [await NatsBus.connect(settings) for _ in range(8)]
    written: list[float] = []
    latencies: list[float] = []
    received = 0

    def receive(message: Message, decode: Callable[[bytes], Any]) -> None:
        nonlocal received
        events = decode(message.data)
        now = time.perf_counter()
        for event in events if isinstance(events, list) else [events]:
            received += len(event["ids"])
            latencies.extend(
                now - written[position] for position in range(event["position"], event["position"] + len(event["ids"]))
            )

    decode = json.loads if args.replies.startswith("json") else msgpack.unpackb
    kinds = replies(args.replies, args.streams)
    for subject in {reply.subject for reply in kinds}:
        client = clients[int(subject.rsplit(".", 1)[1]) % 8]
        await client.subscribe(subject, lambda message: receive(message, decode))
    keys = [f"default.{i:032x}" for i in range(args.streams)]
    partition_of = {key: subjects.partition_of(key, args.partitions) for key in keys}
    for i, (key, reply) in enumerate(zip(keys, kinds, strict=True)):
        await writer.append(subjects.tok(MODEL, partition_of[key]), codec.encode(opened(i, reply, ())))
    acks: list[asyncio.Task[Any]] = []
    cpu = sum(process.cpu_times()[:2])
    began = time.perf_counter()
    for step, entry in enumerate(itertools.islice(steps(tokenizer.encode(TEXT).ids, args.streams), args.steps)):
        due = began + step * args.interval
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        by_partition: dict[int, list[m.Tokens]] = {}
        for tokens in entry.entries:
            by_partition.setdefault(partition_of[tokens.key], []).append(tokens)
        written.append(time.perf_counter())
        for partition, entries in by_partition.items():
            data = codec.encode(m.StepTokens("w", step, tuple(entries)))
            acks.append(asyncio.ensure_future(writer.append(subjects.tok(MODEL, partition), data, timeout=30)))
        if args.interval == 0:
            await asyncio.gather(*acks)
            acks.clear()
    await asyncio.gather(*acks)
    total = args.steps * args.streams
    while received < total and time.perf_counter() - began < 120:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    elapsed = time.perf_counter() - began
    latencies.sort()
    at = {p: latencies[int(len(latencies) * p / 100) - 1] * 1000 for p in (50, 90, 99)}
    print(
        f"{args.replies}: {received:,} of {total:,} tokens of {args.streams} streams, {received / elapsed:,.0f} tokens/s"
    )
    cpu = sum(process.cpu_times()[:2]) - cpu
    print(
        f"detokenizer: {received / cpu:,.0f} tokens per second of its CPU time, {100 * cpu / elapsed:.0f} % of a core"
    )
    print(f"from log to client: p50 {at[50]:.1f}, p90 {at[90]:.1f}, p99 {at[99]:.1f} ms")
    for bus in (*clients, writer):
        await bus.close()


async def with_broker(folder: Path, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    from shared.broker import Broker

    broker = Broker(folder)
    await broker.start()
    process = multiprocessing.get_context("spawn").Process(
        target=detokenizer, args=(broker.url, str(args.tokenizer.parent), args.partitions)
    )
    process.start()
    try:
        assert process.pid is not None
        await pipeline(broker.url, psutil.Process(process.pid), tokenizer, args)
    finally:
        process.terminate()
        process.join()
        await broker.stop()


def run_pipeline(tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(with_broker(Path(folder), tokenizer, args))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["core", "pipeline", "metrics", "profile"])
    parser.add_argument("--tokenizer", type=Path, default=Path("models/demo/tokenizer.json"))
    parser.add_argument("--replies", choices=["json", "json-batched", "msgpack-batched"], default="msgpack-batched")
    parser.add_argument("--streams", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--interval", type=float, default=0.025, help="seconds between steps; 0: as fast as the log takes them"
    )
    parser.add_argument("--partitions", type=int, default=8)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    if args.what == "core":
        run_core(tokenizer)
    elif args.what == "metrics":
        run_metrics(tokenizer)
    elif args.what == "pipeline":
        run_pipeline(tokenizer, args)
    else:
        with cProfile.Profile() as profile:
            core(tokenizer, args.replies, args.streams, (), 200_000)
        pstats.Stats(profile).sort_stats("tottime").print_stats(20)


if __name__ == "__main__":
    main()
