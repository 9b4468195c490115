"""What a tenant notices of another one that floods the deployment: time to first token, alone and beside the flood.

    python benchmarks/fairness.py [--flood 400] [--seconds 20] [--weight 1] [--out FILE]

Real processes and a real nats-server; workers that make fixed tokens at a fixed pace. The quiet tenant sends a short request now and
then. The flooding one keeps --flood requests in the system, many times what the workers have slots for. Ends with status 1 if the quiet
tenant's p99 beside the flood is more than 1.5 times what it is alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from services.bench.measure import percentile  # noqa: E402
from services.running import running  # noqa: E402
from services.supervisor import STAGES, Plan  # noqa: E402
from shared.broker import free_port  # noqa: E402
from shared.client import Client  # noqa: E402
from shared.errors import GorgonError  # noqa: E402

MODEL = "fairness"
MOST = 1.5  # times the p99 alone


class Tenant:
    """Sends requests and notes the seconds to the first token of each."""

    def __init__(self, client: Client, tokens: int, label: str) -> None:
        self.first: list[float] = []
        self.tokens = 0
        self.refused = 0
        self._client = client
        self._length = tokens
        self._label = label
        self._count = 0
        self._draw = random.Random(label)

    async def one(self) -> None:
        self._count += 1
        loop = asyncio.get_running_loop()
        began = loop.time()
        name = f"{self._label}-{self._count}"
        length = round(self._length * self._draw.uniform(0.5, 1.5))
        stream = self._client.generate([11, 12, 13], id=name, seed=1, max_tokens=length, ignore_eos=True)
        first = None
        try:
            async for delta in stream:
                if first is None:
                    first = loop.time() - began
                self.tokens += len(delta.ids)
            await stream.result()
        except GorgonError:
            self.refused += 1
        if first is not None:
            self.first.append(first)

    async def now_and_then(self, seconds: float, every: float) -> None:
        """An open loop: a slow answer delays no later request."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with asyncio.TaskGroup() as group:
            for number in range(int(seconds / every)):
                await asyncio.sleep(max(0.0, began + number * every - loop.time()))
                group.create_task(self.one())

    async def flood(self, at_a_time: int, over: asyncio.Event) -> None:
        async def slot() -> None:
            while not over.is_set():
                await self.one()

        await asyncio.gather(*(slot() for _ in range(at_a_time)))


def quantiles(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {f"p{share}_ms": round(1e3 * percentile(ordered, share), 1) for share in (50, 90, 99)}


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="gorgon-fairness-") as folder:
        flags = {
            "model_worker": ["--engine", "fixed", "--fixed.step-time", str(args.step), "--max-seqs", str(args.slots)],
            "scheduler": ["--tenant-weights", json.dumps({"quiet": args.weight})],
        }
        copies = dict.fromkeys(STAGES, 1) | {"model_worker": args.workers}
        plan = Plan(Path(folder), MODEL, args.model_path, free_port(), copies, flags)
        async with (
            running(plan),
            Client(plan.nats_url, MODEL, tenant="quiet") as quiet,
            Client(plan.nats_url, MODEL, tenant="loud", accept_timeout=600.0) as loud,
        ):
            await Tenant(quiet, args.tokens, "warm").now_and_then(2.0, args.every)
            alone = Tenant(quiet, args.tokens, "alone")
            await alone.now_and_then(args.seconds, args.every)
            over = asyncio.Event()
            noise = Tenant(loud, args.flood_tokens, "loud")
            flooding = asyncio.create_task(noise.flood(args.flood, over))
            await asyncio.sleep(3.0)
            beside = Tenant(quiet, args.tokens, "beside")
            await beside.now_and_then(args.seconds, args.every)
            over.set()
            flooding.cancel()
            await asyncio.gather(flooding, return_exceptions=True)
    return dict(
        machine=dict(cpus=os.cpu_count(), load=os.getloadavg()[0], python=platform.python_version()),
        setting={k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        alone=quantiles(alone.first) | dict(requests=len(alone.first), refused=alone.refused),
        beside_the_flood=quantiles(beside.first) | dict(requests=len(beside.first), refused=beside.refused),
        flood=quantiles(noise.first) | dict(tokens=noise.tokens, refused=noise.refused),
        p99_ratio=round(quantiles(beside.first)["p99_ms"] / quantiles(alone.first)["p99_ms"], 2),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each of the two measurements")
    parser.add_argument("--every", type=float, default=0.1, help="seconds between requests of the quiet tenant")
    parser.add_argument("--tokens", type=int, default=20, help="of a request of the quiet tenant, on average")
    parser.add_argument("--flood", type=int, default=400, help="requests of the other one in the system")
    parser.add_argument("--flood-tokens", type=int, default=200)
    parser.add_argument("--weight", type=float, default=1.0, help="of the quiet tenant; the other one's is 1")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--slots", type=int, default=32, help="of each worker")
    parser.add_argument("--step", type=float, default=0.02, help="seconds a token takes")
    parser.add_argument("--model-path", type=Path, default=ROOT / "models/demo")
    parser.add_argument("--out", type=Path, help="file for the figures as JSON")
    args = parser.parse_args()
    figures = asyncio.run(measure(args))
    print(json.dumps(figures, indent=2))
    if args.out is not None:
        args.out.write_text(json.dumps(figures, indent=2) + "\n")
    return figures["p99_ratio"] > MOST


if __name__ == "__main__":
    sys.exit(main())
