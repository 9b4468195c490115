"""Greedy output that must not depend on how the work is cut up: CUDA graphs, overlap, chunks, prefix cache, the rest of the batch.

    python -m benchmarks.identity --model models/demo --dtype float32        exact: a difference is a defect, exit status 1
    python -m benchmarks.identity --model models/demo --dtype bfloat16       reports the share of outputs that are the same

Where the device is a GPU, the CPU's output in float32 is laid beside it, too.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.speculation import Client
from services.model_worker.engine import EngineConfig, EngineRequest
from shared.sampling import SamplingParams

LENGTHS = (1, 2, 7, 15, 16, 17, 63, 64, 65, 100, 127, 128, 129, 200, 300, 333)
SHARED_PREFIX = 96  # tokens with which the long prompts begin alike, for the prefix cache

VARIANTS: dict[str, dict[str, Any]] = {
    "whole prompts": {},
    "no graphs": {"cuda_graphs": False},
    "no overlap": {"overlap": False},
    "chunks of 48": {"max_batched_tokens": 48, "max_seqs": 16},
    "prefix cache": {"prefix_cache": True},
    "prefix cache, chunks of 48": {"prefix_cache": True, "max_batched_tokens": 48, "max_seqs": 16},
    "four at a time": {"max_seqs": 4},
    "one at a time": {"max_seqs": 1},
}


def requests(vocabulary: int, output: int, suffix: str) -> list[EngineRequest]:
    rng = np.random.default_rng(11)
    common = rng.integers(3, vocabulary, SHARED_PREFIX).tolist()
    found = []
    for index, length in enumerate(LENGTHS):
        ids = rng.integers(3, vocabulary, length).tolist()
        if length > SHARED_PREFIX:
            ids[:SHARED_PREFIX] = common
        params = SamplingParams(max_tokens=output, temperature=0.0, seed=index, ignore_eos=True)
        found.append(EngineRequest(f"{suffix}-{index}", 0, 1, ids, params))
    return found


def outputs(model: Path, output: int, **options: Any) -> list[list[int]]:
    """Of every prompt, twice with a prefix cache, so that the second time there is something in it."""
    defaults = {"speculate": False, "prefix_cache": False, "max_seqs": 32, "gpu_memory_fraction": 0.3}
    client = Client(EngineConfig(model, **(defaults | options)))
    try:
        vocabulary = client.engine.info.vocab_size
        got, _ = client.run(requests(vocabulary, output, "a"))
        if options.get("prefix_cache"):
            again, _ = client.run(requests(vocabulary, output, "b"))
            assert client.engine.stats().prefix_hit_tokens > 0, "nothing was found in the prefix cache"
            got = again
    finally:
        client.engine.stop(timeout=30)
    complaints = client.engine.check_idle()
    assert not complaints, complaints
    return got


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=int, default=64, help="tokens of each")
    parser.add_argument("--only", nargs="+", choices=[*VARIANTS], default=[*VARIANTS])
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"))
    args = parser.parse_args()
    common = {"device": args.device, "dtype": args.dtype}
    base = outputs(args.model, args.output, **common)
    variants = {name: VARIANTS[name] | common for name in args.only}
    if torch.cuda.is_available() and args.device != "cpu":
        variants["CPU in float32"] = {"device": "cpu", "dtype": "float32"}
    rows, exact = {}, True
    for name, options in variants.items():
        got = outputs(args.model, args.output, **options)
        same = sum(a == b for a, b in zip(base, got, strict=True))
        rows[name] = {"same": same, "of": len(base)}
        exact &= same == len(base)
        print(f"{name:28} {same} of {len(base)} outputs are the same", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"dtype": args.dtype, "model": str(args.model), "rows": rows}
    (args.out / f"identity-{args.dtype}.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0 if exact or args.dtype == "bfloat16" else 1


if __name__ == "__main__":
    sys.exit(main())
