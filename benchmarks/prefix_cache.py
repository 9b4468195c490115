"""Hit rates of the prefix cache on a trace of prompts, with the engine's own block pool, beside plain least-recently-used eviction of
the same size and beside what no policy can exceed.

    python -m benchmarks.prefix_cache --trace ../shared/data/traces/mooncake_synthetic.jsonl
    python -m benchmarks.prefix_cache --trace ... --workers 4        the same cache spread over workers: by overlap or in turn

Requests come one after the other in the order of the trace, each with its whole prompt. A block of the trace (512 tokens) is a block
of the pool; sizes are shares of all different blocks of the trace. `bound` evicts what is wanted again last (Belady 1966). With
workers, the scheduler's own placement chooses among them, while the newest RUNNING requests a worker count as its load.
"""

from __future__ import annotations

import argparse
import heapq
import json
from array import array
from bisect import bisect_right
from collections import OrderedDict, defaultdict, deque
from pathlib import Path

from services.model_worker.block_pool import BlockPool
from services.scheduler.fleet import Worker
from services.scheduler.ledger import Ledger
from services.scheduler.placement import Need, PrefixIndex, choose, prefix_chunks
from shared.messages import Assignment, Heartbeat, Tombstone, WorkerHeartbeat

Prompts = list[list[int]]


def read_trace(path: Path) -> Prompts:
    """`hash_ids` of each request: chained, so that equal ids mean equal prefixes."""
    return [json.loads(line)["hash_ids"] for line in path.read_text().splitlines()]


def serve(pool: BlockPool, ids: list[int]) -> int:
    """One prompt; how many of its blocks were found."""
    digests = [number.to_bytes(8, "little") for number in ids[: pool.num_blocks]]
    found = pool.match(digests)
    blocks = found + pool.allocate(len(digests) - len(found))
    for block, digest in zip(blocks, digests, strict=True):
        pool.register(block, digest)
    pool.release(reversed(blocks))
    return len(found)


def of_the_pool(prompts: Prompts, size: int) -> float:
    pool = BlockPool(size)
    hits = sum(serve(pool, ids) for ids in prompts)
    complaints = pool.check()
    assert not complaints, complaints
    return hits / sum(map(len, prompts))


CHUNKS_IN_BLOCK = 8  # of the placement's 64 tokens
RUNNING = 4


def of_workers(prompts: Prompts, size: int, workers: int, by_overlap: bool) -> tuple[float, float]:
    """(hit rate, share of the blocks that the busiest worker had, times the number of workers)"""
    pools = {f"w{n}": BlockPool(max(1, size // workers)) for n in range(workers)}
    seats = []
    for name in pools:
        beat = Heartbeat("model_worker", "m", name, 1, 0.1)
        free = 1 << 30
        seats.append(Worker(name, WorkerHeartbeat(beat, 0, 0.0, 1.0, {}, 2 * RUNNING, free, free, free, 1 << 20), 0.0))
    ledger, index, running = Ledger(), PrefixIndex(), deque[str]()
    hits, served = 0, dict.fromkeys(pools, 0)
    for number, ids in enumerate(prompts):
        chunks = prefix_chunks(b"".join(array("i", [block] * 64 * CHUNKS_IN_BLOCK).tobytes() for block in ids[:8]))
        if by_overlap:
            chosen = choose(seats, ledger, index, Need(1), chunks)
            assert chosen is not None
            name = chosen.instance
        else:
            name = f"w{number % workers}"
        index.placed(name, chunks)
        if len(running) == RUNNING * workers:
            ledger.apply(running.popleft(), Tombstone(1, 1, "finished", b""), 2 * number + 1, 0.0)
        ledger.apply(f"t.{number}", Assignment(1, 1, name, b""), 2 * number + 2, 0.0)
        running.append(f"t.{number}")
        hits += serve(pools[name], ids)
        served[name] += len(ids)
    total = sum(map(len, prompts))
    return hits / total, max(served.values()) / total * workers


def of_recency(prompts: Prompts, size: int) -> float:
    """Least recently used, of one prompt its end first."""
    cached: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for ids in prompts:
        found = next((place for place, number in enumerate(ids) if number not in cached), len(ids))
        hits += found
        for number in ids:
            cached.pop(number, None)
        while cached and len(cached) + len(ids) > size:
            cached.popitem(last=False)
        for number in reversed(ids[:size]):
            cached[number] = None
    return hits / sum(map(len, prompts))


def bound(prompts: Prompts, size: int) -> float:
    uses: dict[int, list[int]] = defaultdict(list)
    for time, ids in enumerate(prompts):
        for number in ids:
            uses[number].append(time)
    cached: dict[int, int] = {}  # minus the time of the next use
    heap: list[tuple[int, int]] = []
    hits = 0
    for time, ids in enumerate(prompts):
        hits += next((place for place, number in enumerate(ids) if number not in cached), len(ids))
        wanted = set(ids)
        others = len(cached) - sum(number in cached for number in ids)
        while heap and others + len(ids) > size:
            key, number = heapq.heappop(heap)
            if number not in wanted and cached.get(number) == key:
                del cached[number]
                others -= 1
        for place, number in enumerate(ids):
            after = bisect_right(uses[number], time)
            following = uses[number][after] if after < len(uses[number]) else len(prompts) + place
            cached[number] = -following
            heapq.heappush(heap, (-following, number))
    return hits / sum(map(len, prompts))


def spread(prompts: Prompts, distinct: int, shares: list[float], workers: int) -> None:
    print(
        f"{workers} workers\n\n| size of all caches | by overlap | busiest | in turn | busiest |\n|---|---|---|---|---|"
    )
    for share in shares:
        size = max(1, int(share * distinct))
        found = [figure for by_overlap in (True, False) for figure in of_workers(prompts, size, workers, by_overlap)]
        print(f"| {share:.0%} | " + " | ".join(f"{figure:.4f}" for figure in found) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.1, 0.25, 0.5, 1.0])
    parser.add_argument("--workers", type=int, help="over which the cache is spread")
    parser.add_argument("--out", type=Path, help="file for the results as JSON")
    args = parser.parse_args()
    prompts = read_trace(args.trace)
    distinct = len({number for ids in prompts for number in ids})
    print(f"{len(prompts)} prompts, {sum(map(len, prompts))} blocks, {distinct} of them different\n")
    if args.workers:
        spread(prompts, distinct, args.shares, args.workers)
        return
    print("| size of the cache | blocks | pool | least recently used | bound |\n|---|---|---|---|---|")
    rows = []
    for share in args.shares:
        size = max(1, int(share * distinct))
        rates = [policy(prompts, size) for policy in (of_the_pool, of_recency, bound)]
        rows.append(dict(zip(("share", "blocks", "pool", "lru", "bound"), (share, size, *rates), strict=True)))
        print(f"| {share:.0%} | {size} | " + " | ".join(f"{rate:.4f}" for rate in rates) + " |", flush=True)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
