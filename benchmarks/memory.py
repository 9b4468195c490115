"""Whether a process keeps something of every request: short requests, as many as the machine takes, and nothing that lives long.

    python benchmarks/memory.py                     nine minutes
    ... --minutes 20 --attach-window 5 --out FILE

What has ended is forgotten soon (`--attach-window`, and two minutes more for tombstones), so memory is steady after a quarter of the
time. Prints megabytes of each process; ends with status 1 if one has grown by more than a hundred bytes a request since, which at 700
requests a second is 42 MB in ten minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import load  # noqa: E402
from benchmarks.pipeline import MODEL, deployment, one_of_each, run_loads  # noqa: E402

KEPT = 100.0  # bytes of a request
STEADY = 180.0  # seconds, at least, until as much is forgotten as comes


async def run(args: argparse.Namespace) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Samples, and bytes a request by which each process grew after memory was steady."""
    samples: list[dict[str, float]] = []
    async with deployment(args, one_of_each(), env=load.forgetting_after(args.attach_window)) as supervisor:
        began, served = time.monotonic(), 0
        while (elapsed := time.monotonic() - began) < args.minutes * 60:
            await run_loads((load.time_to_first_token, (supervisor.plan.nats_url, MODEL, args.round, 16)))
            served += args.round
            resident = {c.name: psutil.Process(c.pid).memory_info().rss / 2**20 for c in supervisor.children()}
            samples.append(dict(seconds=round(elapsed, 1), requests=served) | resident)
            print(f"{elapsed:6.0f} s {served:8} ", *(f"{n} {mb:.1f}" for n, mb in resident.items()), flush=True)
    steady = [row for row in samples if row["seconds"] >= max(STEADY, args.minutes * 60 / 4)]
    if len(steady) < 4:
        raise SystemExit("too short: memory is not steady yet")
    half = len(steady) // 2
    requests = steady[-1]["requests"] - steady[0]["requests"]
    # The server's heap breathes: the highest of each half, not the ends.
    grown = {
        name: (max(row[name] for row in steady[half:]) - max(row[name] for row in steady[:half]))
        * 2**20
        / (requests / 2)
        for name in steady[0].keys() - {"seconds", "requests"}
    }
    return samples, grown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, default=ROOT / "models" / "demo", help="folder with the tokenizer")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--round", type=int, default=9000, help="requests between two samples")
    parser.add_argument("--attach-window", type=float, default=5.0, help="seconds")
    parser.add_argument("--out", type=Path, help="file")
    args = parser.parse_args()
    samples, grown = asyncio.run(run(args))
    print("bytes a request, since it was steady:", *(f"{name} {of:.0f}" for name, of in sorted(grown.items())))
    if args.out:
        args.out.write_text(json.dumps(dict(samples=samples, bytes_per_request=grown), indent=2) + "\n")
    return int(max(grown.values()) > KEPT)


if __name__ == "__main__":
    sys.exit(main())
