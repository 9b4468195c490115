"""Few-row products within decode steps: what `kernels/gemm_choice.py` is chosen by.

    python -m benchmarks.layers --shape llama3.1-8b --batches 1 8 64 --context 600 --out results/

A product alone, its weights rotated through the cache, says little about the step it is in: kernels start while the one before still
runs, and what fits beside it on a processor counts as much as its own time. So whole layers are captured in a CUDA graph, and each
candidate takes its place in them. Prints µs a layer, and leaves the best of each product in place for the next one. Needs a CUDA
device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.workloads import CONTEXT, SHAPES
from kernels import gemm_choice
from kernels.ops import AttentionBatch
from kernels.skinny_gemm import GemmConfig
from kernels.triton_ops import TritonOps
from services.model_worker.models.config import ModelConfig, load_config
from services.model_worker.models.decoder import Decoder, dummy_weights, parameter_shapes

BLOCK_SIZE = 64
REPLAYS, ROUNDS, WARM = 40, 3, 5
PRODUCTS = "gate_up", "down", "qkv", "o"
# block_n, block_k, warps, stages of tiles that are fetched by TMA
TILES = (64, 128, 4, 4), (64, 128, 4, 3), (64, 128, 4, 2), (64, 256, 4, 3), (64, 64, 4, 6)
WIDE_TILES = (128, 64, 4, 5), (128, 128, 8, 3)
WITHOUT_TENSOR_CORES = (2, 512, 1), (2, 1024, 4), (4, 1024, 4), (8, 1024, 4), (4, 1024, 2)


def small_model(shape: str, layers: int) -> ModelConfig:
    with tempfile.TemporaryDirectory() as folder:
        config = SHAPES[shape] | {"num_hidden_layers": layers, "vocab_size": 8192}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return load_config(Path(folder))


def step(decoder: Decoder, sequences: int, nodes: int, context: int) -> Callable[[], object]:
    """A forward pass of `sequences` with a row or a tree's rows each, at a context of so many tokens."""
    config, device = decoder.config, decoder.weights.embedding.device
    blocks, rows = -(-context // BLOCK_SIZE), sequences * nodes
    shape = sequences * blocks, BLOCK_SIZE, config.num_kv_heads, config.head_dim

    def ints(values: torch.Tensor) -> torch.Tensor:
        return values.to(device, torch.int32)

    table = ints(torch.arange(sequences * blocks).view(sequences, blocks))
    places = ints(context - nodes + torch.arange(nodes)).repeat(sequences, 1)
    slots = table.gather(1, (places // BLOCK_SIZE).long()) * BLOCK_SIZE + places % BLOCK_SIZE
    wide = torch.tensor([(1 << node | 1) - (1 << 64) * (node == 63) for node in range(nodes)], device=device)
    batch = AttentionBatch(
        ints(torch.arange(0, rows + 1, nodes)),
        ints(torch.full((sequences,), context)),
        table,
        decode_seqs=sequences,
        decode_rows=nodes,
        max_query=0,
        max_context=CONTEXT,  # as in the engine's graphs
        tree_mask=wide if nodes > 1 else None,
    )
    ids = torch.randint(0, config.vocab_size, (rows,), device=device)

    def cache() -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    caches = [(cache(), cache()) for _ in range(config.num_layers)]
    positions = places.flatten()
    return lambda: decoder.forward(ids, positions, slots.flatten(), batch, caches, None)


def microseconds(run: Callable[[], object]) -> float:
    """Of a replay, the median of several rounds; inf if it cannot be compiled or launched."""
    torch.cuda.synchronize()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(stream):
            run()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                run()
    except Exception as problem:
        print(f"    failed: {repr(problem)[:150]}", flush=True)
        return float("inf")
    for _ in range(WARM):
        graph.replay()
    times = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / REPLAYS * 1e3)
    return statistics.median(times)


def candidates(product: str, rows: int, width: int, depth: int) -> Iterator[GemmConfig | None]:
    """None: cuBLAS, and for gates a kernel behind it."""
    yield None
    if rows <= 4:
        yield from (GemmConfig(*shape) for shape in WITHOUT_TENSOR_CORES)
    if rows <= 2:
        return
    for block_n, block_k, warps, stages in (*TILES, *(WIDE_TILES if rows > 16 else ())):
        tiles, spans = -(-width // block_n), depth // block_k
        splits = {1} if product == "gate_up" else {max(1, min(8, spans // 2, round(n / tiles))) for n in (96, 132, 264)}
        for split in sorted(splits):
            yield GemmConfig(block_n, block_k, warps, split, stages, tma=True)


def tune(decoder: Decoder, sequences: int, nodes: int, context: int, products: list[str]) -> dict[str, object]:
    rows, layers = sequences * nodes, decoder.config.num_layers
    run, shapes = step(decoder, sequences, nodes, context), parameter_shapes(decoder.config)
    best = before = microseconds(run) / layers
    print(f"{sequences} × {nodes} rows, context {context}: {before:.2f} µs a layer", flush=True)
    chosen: dict[str, object] = {}
    for product in products:
        width, depth = shapes[f"layers.0.{product}"]
        table = gemm_choice.MEASURED_GATED if product == "gate_up" else gemm_choice.MEASURED
        choose = gemm_choice.choose_gated if product == "gate_up" else gemm_choice.choose
        key = gemm_choice.bucket(rows), width, depth
        present = choose(rows, width, depth)
        times: dict[GemmConfig | None, float] = {}
        for config in candidates(product, rows, width, depth):
            table[key] = config
            times[config] = microseconds(run) / layers
        ranked = sorted(times, key=times.__getitem__)
        table[key] = ranked[0] if times[ranked[0]] < best else present
        best = min(best, times[ranked[0]])
        chosen[f"{product} {key}"] = repr(table[key])
        print(f"  {product} {key}, now {present}", flush=True)
        for config in ranked[:3]:
            print(f"    {times[config]:8.2f}  {config}", flush=True)
    after = microseconds(run) / layers
    print(f"  → {after:.2f}", flush=True)
    return {"rows": [sequences, nodes], "context": context, "before": before, "after": after, "chosen": chosen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES], default="llama3.1-8b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--nodes", type=int, default=1, help="rows of each sequence, at most 64")
    parser.add_argument("--context", type=int, default=600)
    parser.add_argument("--products", nargs="+", choices=PRODUCTS, default=[*PRODUCTS])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    config, device = small_model(arguments.shape, arguments.layers), torch.device("cuda")
    results = []
    with torch.inference_mode():
        decoder = Decoder(config, dummy_weights(config, torch.bfloat16, device), TritonOps(), CONTEXT)
        for batch in arguments.batches:
            results.append(tune(decoder, batch, arguments.nodes, arguments.context, arguments.products))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / f"layers-{arguments.shape}.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
