"""What the gateway costs: many server-sent streams of a worker that makes fixed tokens at a fixed pace.

    python benchmarks/gateway.py                     200 streams
    ... --stalled 20                                 and as many clients that ask for a lot and read nothing
    ... --gateways 2                                 the streams over so many gateways
    ... --out FILE                                   the same as JSON

Added latency: a tap, a raw NATS client, subscribes to the gateways' own reply inboxes. So it gets each message of tokens when they do,
and the difference between a token's arrival at the HTTP client and its arrival at the tap, in one process on one clock, is what
HTTP adds.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgpack
import psutil
import uvloop
from nats.aio.client import Client as Nats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from services.running import running  # noqa: E402
from services.supervisor import GATEWAY, STAGES, Plan, Supervisor  # noqa: E402
from shared.broker import free_port  # noqa: E402

MODEL = "bench"
WARM_UP = 10  # tokens of each stream that do not count


class Reader(asyncio.Protocol):
    """One stream: notes when each piece of it came, and looks at nothing before the end."""

    def __init__(self, request: bytes) -> None:
        self.pieces: list[tuple[float, bytes]] = []
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(self._request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.monotonic(), data))

    def connection_lost(self, error: Exception | None) -> None:
        self.closed.set_result(None)

    def arrivals(self) -> dict[tuple[str, int], float]:
        """(request, tokens so far) → when the event that says so was complete."""
        found: dict[tuple[str, int], float] = {}
        text = b""
        for at, data in self.pieces:
            text += data
            while (end := text.find(b"\n\n")) >= 0:
                block, text = text[:end], text[end + 2 :]
                start = block.find(b"\nid: ")
                if start >= 0:
                    request, _, cursor = block[start + 5 : block.index(b"\n", start + 1)].decode().split("~")
                    found.setdefault((request, int(cursor.split(".")[1])), at)
        return found

    @property
    def complete(self) -> bool:
        return b"data: [DONE]" in b"".join(data for _, data in self.pieces[-3:])


def request_of(port: int, body: dict[str, Any]) -> bytes:
    data = json.dumps(body | {"model": MODEL, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def stalled_client(port: int, number: int) -> socket.socket:
    """Asks for much, reads nothing, and has little room for what comes."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    body = dict(prompt=[3, number % 1000 + 3, 4], max_tokens=100_000, n=8, ignore_eos=True)
    client.sendall(request_of(port, body))
    return client


def cpu_seconds(processes: list[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return sum(t.user + t.system for t in times)


async def measure(args: argparse.Namespace, supervisor: Supervisor) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    port = supervisor.plan.http_port
    tapped: list[tuple[float, bytes]] = []

    async def on_tap(message: Any) -> None:
        tapped.append((time.monotonic(), message.data))

    tap = Nats()
    await tap.connect(supervisor.plan.nats_url)
    await tap.subscribe("_INBOX.*", cb=on_tap)
    stalled = [stalled_client(port, number) for number in range(args.stalled)]
    await asyncio.sleep(3.0 if stalled else 0.5)
    processes = [psutil.Process(supervisor.stages[f"{GATEWAY}-{n + 1}"].pid) for n in range(args.gateways)]
    before = cpu_seconds(processes)
    gc.disable()
    readers: list[Reader] = []
    began = time.monotonic()
    for number in range(args.streams):
        body = dict(
            prompt=[5, number % 1000 + 3, number // 1000 + 3], max_tokens=args.tokens, ignore_eos=True, seed=number
        )
        door = port + number % args.gateways
        _, reader = await loop.create_connection(lambda body=body: Reader(request_of(port, body)), "127.0.0.1", door)
        readers.append(reader)
        await asyncio.sleep(args.step / args.streams)  # steps hold requests of every age
    await asyncio.wait_for(asyncio.gather(*(reader.closed for reader in readers)), args.tokens * args.step * 5 + 60)
    seconds = time.monotonic() - began
    gc.enable()
    cpu = cpu_seconds(processes) - before
    for client in stalled:
        client.close()
    await tap.close()

    raw: dict[tuple[str, int], float] = {}
    for at, data in tapped:
        try:
            events = msgpack.unpackb(data)
        except ValueError:
            continue
        for event in events if isinstance(events, list) else []:
            if isinstance(event, dict) and event.get("event") == "tokens":
                raw.setdefault((event["id"], event["position"] + len(event["ids"])), at)
    added: list[float] = []
    worst: list[float] = []
    for reader in readers:
        times = reader.arrivals()
        late = [at - raw[key] for key, at in times.items() if key[1] > WARM_UP and key in raw]
        assert late, "a stream without tokens"
        added += late
        worst.append(max(late))
    added.sort()
    return dict(
        streams=args.streams,
        gateways=args.gateways,
        stalled=args.stalled,
        step_ms=args.step * 1e3,
        complete=sum(reader.complete for reader in readers),
        tokens_per_s=round(args.streams * args.tokens / seconds),
        compared=len(added),
        added_ms=dict(
            p50=round(statistics.median(added) * 1e3, 3),
            p90=round(added[int(len(added) * 0.9)] * 1e3, 3),
            p99=round(added[int(len(added) * 0.99)] * 1e3, 3),
            max=round(added[-1] * 1e3, 3),
        ),
        slowest_stream_worst_ms=round(max(worst) * 1e3, 3),
        gateway_cpu_us_per_token=round(cpu / (args.streams * args.tokens) * 1e6, 1),
    )


async def run(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="gorgon-bench-") as folder:
        vocabulary = json.loads((args.model_path / "config.json").read_text())["vocab_size"]
        fixed = ["--engine", "fixed", "--fixed.step-time", str(args.step), "--fixed.vocab-size", str(vocabulary)]
        flags = {"model_worker": [*fixed, "--max-seqs", "2048"]}
        copies = dict.fromkeys(STAGES, 1) | {GATEWAY: args.gateways}
        plan = Plan(Path(folder), MODEL, args.model_path, free_port(), copies, flags, http_port=free_port())
        async with running(plan) as (supervisor, _):
            await asyncio.sleep(1.5)  # the gateway hears who is there
            # In a thread of its own: uvloop is the faster client, but cannot start processes as the supervisor does.
            return await asyncio.to_thread(lambda: uvloop.run(measure(args, supervisor)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--stalled", type=int, default=0, help="clients that read nothing")
    parser.add_argument("--tokens", type=int, default=150, help="of each stream")
    parser.add_argument("--step", type=float, default=0.05, help="seconds")
    parser.add_argument("--model-path", type=Path, default=ROOT / "models/demo", help="whose tokenizer is used")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result = asyncio.run(run(args))
    result |= dict(cores=os.cpu_count(), python=platform.python_version(), load=os.getloadavg()[0])
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
