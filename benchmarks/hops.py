"""Where the time to first token goes: one request after the other through the real pipeline, seen from a tap on every subject.

    python benchmarks/hops.py                              a short prompt
    python benchmarks/hops.py --prompt-ids 2048            token ids, as MessagePack (--json: as JSON)
    ... --shape qwen3-0.6b --tokenizer DIR                 a real engine with random weights

Without a shape the worker answers at once, so all there is to it is the pipeline. A line is a message of the request's way and the
median time, in milliseconds, from the client's publication until the tap has it, and since the line before. The tap reads what the
server sends to everybody, so it costs some time itself; `without the tap` is what a client sees when it is not there.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import msgpack  # noqa: E402
from nats.aio.msg import Msg  # noqa: E402

from benchmarks import load  # noqa: E402
from benchmarks.pipeline import MODEL, deployment, one_of_each, quantiles, run_loads  # noqa: E402
from benchmarks.serving import random_model  # noqa: E402
from benchmarks.workloads import SHAPES  # noqa: E402
from shared import subjects  # noqa: E402


class Tap:
    """Remembers which subject was seen when, from the request's publication on."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, str, int]] = []

    async def on_message(self, msg: Msg) -> None:
        self._seen.append((time.monotonic(), msg.subject, len(msg.data)))

    def take(self) -> list[tuple[float, str, int]]:
        seen, self._seen = self._seen, []
        return seen


def stage_of(subject: str, inbox: str) -> str | None:
    """What a message of a request's way is called here; None for heartbeats, logs and whatever else there is."""
    kinds = {
        subjects.generate(MODEL): "request at the door",
        f"{subjects.ROOT}.req.": "REQ published",
        "$KV.assign.": "assignment published",
        f"{subjects.ROOT}.worker.": "run ordered",
        f"{subjects.ROOT}.tok.": "entry of the token log published",
        inbox: "event to the client",
    }
    return next((name for start, name in kinds.items() if subject.startswith(start)), None)


async def trace(url: str, body: bytes, msgpacked: bool, requests: int) -> tuple[list[dict[str, Any]], list[float]]:
    """Rows of the way, and seconds to the first token seen by the client itself while the tap is there."""
    tapped, client = await load.connect(url), await load.connect(url)
    tap = Tap()
    await tapped.subscribe(">", cb=tap.on_message, pending_msgs_limit=-1, pending_bytes_limit=-1)
    await tapped.flush()
    decode = msgpack.unpackb if msgpacked else json.loads
    times: dict[tuple[str, int], list[float]] = defaultdict(list)
    order: dict[tuple[str, int], int] = {}
    firsts = []
    for number in range(requests):
        inbox = client.new_inbox()
        done = asyncio.get_running_loop().create_future()
        first: list[float] = []

        async def on_event(msg: Msg, done: asyncio.Future[None] = done, first: list[float] = first) -> None:
            event = decode(msg.data)
            if event["event"] == "tokens" and not first:
                first.append(time.monotonic())
            elif event["event"] == "finished":
                done.set_result(None)
            elif event["event"] == "error":
                done.set_exception(RuntimeError(event["message"]))

        subscription = await client.subscribe(inbox, cb=on_event)
        await client.flush()
        tap.take()
        began = time.monotonic()
        await client.publish(subjects.generate(MODEL), body, reply=inbox)
        await done
        await asyncio.sleep(0.02)  # the tap has it all; what follows the end is over
        await subscription.unsubscribe()
        if number < 5:
            continue  # the first of a process are slow
        firsts.append(first[0] - began)
        counts: dict[str, int] = defaultdict(int)
        for when, subject, _ in tap.take():
            if (name := stage_of(subject, inbox)) is not None:
                counts[name] += 1
                place = name, counts[name]
                order.setdefault(place, len(order))
                times[place].append(when - began)
    for nc in (tapped, client):
        await nc.close()
    rows = [
        dict(message=f"{name} {count}" if times.get((name, 2)) else name, ms=statistics.median(values) * 1e3)
        for (name, count), values in times.items()
        if len(values) > len(firsts) // 2
    ]
    return sorted(rows, key=lambda row: row["ms"]), firsts


async def run(args: argparse.Namespace) -> dict[str, Any]:
    body: dict[str, Any] = dict(prompt=load.PROMPT, max_tokens=args.max_tokens, temperature=0)
    if args.prompt_ids:
        body["prompt"] = [3 + i * 7919 % 400 for i in range(args.prompt_ids)]
    msgpacked = bool(args.prompt_ids) and not args.json
    data = msgpack.packb(body) if msgpacked else json.dumps(body).encode()
    async with contextlib.AsyncExitStack() as stack:
        engine = None
        if args.shape is not None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gorgon-hops-")))
            args.model_path, engine = random_model(folder / "model", args.shape, args.tokenizer)
        supervisor = await stack.enter_async_context(deployment(args, one_of_each(), engine=engine))
        url = supervisor.plan.nats_url
        await run_loads((load.time_to_first_token, (url, MODEL, 100, 4, data)))
        (plain,) = await run_loads((load.time_to_first_token, (url, MODEL, args.requests, 1, data)))
        rows, tapped = await trace(url, data, msgpacked, args.requests)
    before = 0.0
    print(f"{'message':42} {'at, ms':>8} {'since the last':>15}")
    for row in rows:
        print(f"{row['message']:42} {row['ms']:8.3f} {row['ms'] - before:15.3f}")
        before = row["ms"]
    print("with the tap, ms   ", quantiles(tapped))
    print("without the tap, ms", quantiles(plain))
    return dict(rows=rows, tapped_ms=quantiles(tapped), plain_ms=quantiles(plain), bytes=len(data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, default=ROOT / "models" / "demo", help="folder with the tokenizer")
    parser.add_argument("--shape", choices=sorted(SHAPES))
    parser.add_argument("--tokenizer", type=Path, help="folder, for --shape")
    parser.add_argument("--prompt-ids", type=int, default=0, help="a prompt of so many token ids instead of text")
    parser.add_argument("--json", action="store_true", help="with --prompt-ids: JSON instead of MessagePack")
    parser.add_argument("--max-tokens", type=int, default=4)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.model_path = args.model_path.resolve()
    result = asyncio.run(run(args))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
