"""The kernels on one GPU: each is checked, then timed beside torch's own operators, at the shapes of an 8B and a 0.6B model.

    python benchmarks/kernels.py --out DIR [--only attention,sampling] [--resources]

Prints a table and writes DIR/kernels.json. Times are medians of CUDA-graph replays; inputs rotate through buffers larger than
the L2 cache where the kernel is bound by memory. A variant that fails is reported, and the rest goes on. --resources prints
registers and spills instead, which needs no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from kernels.attention_tiles import TileConfig
    from kernels.skinny_gemm import GemmConfig

BF16 = torch.bfloat16
Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
L2_BYTES = 50 * 1024 * 1024
PREFILL_REFERENCE = {
    "1x16384": 649,
    "4x8192": 619,
    "8x2048": 511,
    "32x512": 298,
}  # FlashAttention-3 on this GPU, TFLOP/s
DECODE_REFERENCE = {
    "1x8192": 1.36,
    "1x131072": 3.61,
    "8x16384": 3.72,
    "64x4096": 4.07,
    "256x1024": 3.78,
    "256x4096": 4.32,
}


@dataclass(slots=True)
class Measurement:
    """value in unit; microseconds of one call; error: relative L2 distance from the check's result."""

    family: str
    case: str
    variant: str
    microseconds: float
    value: float
    unit: str
    error: float | None = None


@dataclass(slots=True)
class Report:
    """Collects measurements and failures, and prints each at once."""

    measurements: list[Measurement] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)

    def add(
        self,
        family: str,
        case: str,
        variant: str,
        calls: list[Callable[[], object]],
        work: float,
        unit: str,
        check: Callable[[], float] | None = None,
    ) -> None:
        """work: FLOP or bytes of a call, reported as TFLOP/s or TB/s. `calls` are the same call on rotating buffers."""
        try:
            error = None if check is None else check()
            microseconds = time_calls(calls)
        except Exception as problem:  # a variant that does not compile must not end the run
            self.failures.append({"family": family, "case": case, "variant": variant, "problem": repr(problem)[:500]})
            print(f"{family:10} {case:22} {variant:34} FAILED {repr(problem)[:120]}", flush=True)
            return
        value = work / microseconds / 1e6 if work else microseconds
        m = Measurement(family, case, variant, microseconds, value, unit if work else "us", error)
        self.measurements.append(m)
        shown = "" if error is None else f"  error {error:.1e}"
        print(f"{family:10} {case:22} {variant:34} {microseconds:10.1f} us {m.value:8.2f} {m.unit}{shown}", flush=True)

    def note(self, family: str, case: str, text: str) -> None:
        print(f"{family:10} {case:22} {text}", flush=True)


def time_calls(calls: list[Callable[[], object]], target_ms: float = 4.0, replays: int = 7) -> float:
    """Microseconds of one call: median over replays of a CUDA graph that holds enough calls to last about target_ms, and each
    call at least once."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
        stream.synchronize()
        started = time.perf_counter()
        calls[-1]()
        stream.synchronize()
        estimate = (time.perf_counter() - started) * 1e3
    count = max(len(calls), min(100, int(target_ms / max(estimate, 1e-3))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in itertools.islice(itertools.cycle(calls), count):
            call()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / count)
    return statistics.median(times[1:])


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


def checked(call: Callable[[], object], out: torch.Tensor, expected: torch.Tensor) -> float:
    """Distance of what the call writes to out from what is expected."""
    out.fill_(float("nan"))
    call()
    return distance(out, expected)


def paged(sequences: int, context: int, page: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache [2, B, P, Hkv, D] for that many tokens, and a shuffled block table over all its blocks."""
    per_sequence = -(-context // page)
    cache = torch.randn(2, sequences * per_sequence, page, KV_HEADS, HEAD_DIM, device="cuda", dtype=BF16)
    table = torch.randperm(sequences * per_sequence, device="cuda").int().view(sequences, per_sequence)
    return cache, table


def contiguous(cache: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """One of the cache's tensors as [S, Hkv, L, D], for torch's operators."""
    return cache[table.long()].flatten(1, 2).transpose(1, 2)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: SDPBackend, **options: bool) -> torch.Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, **options)


def describe(config: TileConfig) -> str:
    c = config
    return f"{c.block_m}x{c.block_n} w{c.num_warps} s{c.num_stages} {'tma' if c.tma else 'ptr'}"


def bench_prefill(report: Report) -> None:
    for sequences, length in ((1, 16384), (4, 8192), (8, 2048), (32, 512)):
        prefill_case(report, sequences, length)


def prefill_case(report: Report, sequences: int, length: int) -> None:
    from kernels.attention_prefill import prefill_attention
    from kernels.attention_tiles import TileConfig
    from kernels.ops import AttentionBatch

    variants = {
        64: [
            TileConfig(128, 64, 8, 3, True),
            TileConfig(128, 64, 8, 2, True),
            TileConfig(64, 64, 4, 3, True),
            TileConfig(128, 128, 8, 2, False),
            TileConfig(128, 128, 8, 3, False),
        ],
        128: [TileConfig(128, 128, 8, 2, True), TileConfig(128, 128, 8, 3, True)],
        16: [TileConfig(128, 64, 8, 3, False), TileConfig(128, 128, 8, 3, False)],
    }
    case = f"{sequences}x{length}"
    flop = 2 * sequences * Q_HEADS * HEAD_DIM * length * length  # two products, half of them masked
    scale = HEAD_DIM**-0.5
    q = torch.randn(sequences * length, Q_HEADS, HEAD_DIM, device="cuda", dtype=BF16)
    starts = torch.arange(sequences + 1, device="cuda", dtype=torch.int32) * length
    lengths = torch.full((sequences,), length, device="cuda", dtype=torch.int32)
    heads_first = q.view(sequences, length, Q_HEADS, HEAD_DIM).transpose(1, 2).contiguous()
    for page, configs in variants.items():
        cache, table = paged(sequences, length, page)
        k, v = (contiguous(c, table).repeat_interleave(Q_HEADS // KV_HEADS, dim=1) for c in cache)
        if page == 64:
            for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
                call = partial(sdpa, heads_first, k, v, backend, is_causal=True)
                report.add("prefill", case, f"torch {backend.name}", [call], flop, "TFLOP/s")
        expected = sdpa(heads_first, k, v, SDPBackend.FLASH_ATTENTION, is_causal=True).transpose(1, 2).reshape(q.shape)
        del k, v
        batch = AttentionBatch(starts, lengths, table, 0, 1, length, length)
        out = torch.empty_like(q)
        for config in configs:
            call = partial(prefill_attention, q, *cache, batch, scale, 0, out, config)
            name = f"P{page} {describe(config)}"
            report.add("prefill", case, name, [call], flop, "TFLOP/s", partial(checked, call, out, expected))
    report.note("prefill", case, f"FlashAttention-3: {PREFILL_REFERENCE[case]} TFLOP/s")


def bench_hopper(report: Report) -> None:
    for sequences, length in ((1, 16384), (4, 8192), (8, 2048), (32, 512)):
        hopper_case(report, sequences, length)
    # The second half of a long prompt, with as many heads as an 8B model has, and as the 0.6B model has.
    for q_heads in (Q_HEADS, Q_HEADS // 2):
        hopper_case(report, 1, 16384, before=8192, q_heads=q_heads)


def hopper_case(report: Report, sequences: int, length: int, before: int = 0, q_heads: int = Q_HEADS) -> None:
    from kernels.attention_prefill import prefill_attention
    from kernels.attention_prefill_hopper import new_counters, prefill_attention_hopper
    from kernels.ops import AttentionBatch

    rows = length - before
    case = f"{sequences}x{length}" + (f" from {before}, {q_heads} heads" if before else "")
    flop = 2 * sequences * q_heads * HEAD_DIM * (length * length - before * before)
    scale = HEAD_DIM**-0.5
    q = torch.randn(sequences * rows, q_heads, HEAD_DIM, device="cuda", dtype=BF16)
    starts = torch.arange(sequences + 1, device="cuda", dtype=torch.int32) * rows
    lengths = torch.full((sequences,), length, device="cuda", dtype=torch.int32)
    out, expected, counters = torch.empty_like(q), torch.empty_like(q), new_counters("cuda")
    for page in (128, 64, 16):
        cache, table = paged(sequences, length, page)
        batch = AttentionBatch(starts, lengths, table, 0, 1, rows, length)
        prefill_attention(q, *cache, batch, scale, 0, expected)
        call = partial(prefill_attention_hopper, q, *cache, batch, scale, out, counters)
        report.add("hopper", case, f"P{page}", [call], flop, "TFLOP/s", partial(checked, call, out, expected))


def bench_decode(report: Report) -> None:
    for sequences, context in ((1, 8192), (1, 131072), (8, 16384), (64, 4096), (256, 1024), (256, 4096)):
        decode_case(report, sequences, context)
    for sequences, nodes in ((1, 16), (1, 64), (8, 16), (8, 64), (32, 16)):
        tree_case(report, sequences, nodes, 4096)


def decode_case(report: Report, sequences: int, context: int) -> None:
    from kernels import attention_decode
    from kernels.attention_tiles import TileConfig
    from kernels.ops import AttentionBatch

    variants = {  # with programs per SM that the split aims at
        64: [
            (TileConfig(16, 64, 2, 2, True), 4),
            (TileConfig(16, 64, 2, 3, True), 4),
            (TileConfig(16, 64, 4, 2, True), 4),
            (TileConfig(16, 64, 4, 3, True), 4),
            (TileConfig(16, 64, 4, 5, True), 4),
            (TileConfig(16, 64, 4, 5, True), 2),
            (TileConfig(16, 64, 4, 5, True), 8),
            (TileConfig(16, 64, 8, 5, True), 4),
            (TileConfig(16, 32, 4, 5, True), 4),
            (TileConfig(16, 64, 4, 5, False), 4),
        ],
        16: [
            (TileConfig(16, 64, 2, 2, False), 4),
            (TileConfig(16, 64, 4, 5, False), 4),
            (TileConfig(16, 32, 4, 5, False), 4),
        ],
    }
    case = f"{sequences}x{context}"
    size = 2 * sequences * context * KV_HEADS * HEAD_DIM * 2
    scale, default = HEAD_DIM**-0.5, attention_decode.PROGRAMS_PER_SM
    q = torch.randn(sequences, Q_HEADS, HEAD_DIM, device="cuda", dtype=BF16)
    starts = torch.arange(sequences + 1, device="cuda", dtype=torch.int32)
    lengths = torch.full((sequences,), context, device="cuda", dtype=torch.int32)
    out = torch.empty_like(q)
    for page, configs in variants.items():
        buffers = [paged(sequences, context, page) for _ in range(max(1, -(-L2_BYTES * 3 // size)))]
        cache, table = buffers[0]
        k, v = (contiguous(c, table) for c in cache)
        expected = sdpa(q[:, :, None], k, v, SDPBackend.FLASH_ATTENTION, enable_gqa=True)[:, :, 0]
        del k, v, cache
        for config, per_sm in configs:
            attention_decode.PROGRAMS_PER_SM = per_sm
            calls = []
            for cache, table in buffers:
                batch = AttentionBatch(starts, lengths, table, sequences, 1, 0, context)
                calls.append(partial(attention_decode.decode_attention, q, *cache, batch, scale, 0, out, config=config))
            check = partial(checked, calls[0], out, expected)
            report.add("decode", case, f"P{page} {describe(config)} {per_sm}/SM", calls, size, "TB/s", check)
        attention_decode.PROGRAMS_PER_SM = default
        del buffers, calls, cache, table, batch, check
    report.note("decode", case, f"FlashAttention-3: {DECODE_REFERENCE[case]} TB/s")


def tree_case(report: Report, sequences: int, nodes: int, context: int) -> None:
    from kernels import select_ops
    from kernels.ops import AttentionBatch

    cache, table = paged(sequences, context, 64)
    q = torch.randn(sequences * nodes, Q_HEADS, HEAD_DIM, device="cuda", dtype=BF16)
    starts = torch.arange(sequences + 1, device="cuda", dtype=torch.int32) * nodes
    lengths = torch.full((sequences,), context, device="cuda", dtype=torch.int32)
    chain = torch.tensor([(1 << (j + 1)) - 1 if j < 63 else -1 for j in range(nodes)], device="cuda")
    batch = AttentionBatch(starts, lengths, table, sequences, nodes, 0, context, chain)
    size = 2 * sequences * context * KV_HEADS * HEAD_DIM * 2
    call = partial(select_ops("cuda").attention, q, *cache, batch, HEAD_DIM**-0.5)
    report.add("tree", f"{sequences}x{nodes} nodes, {context}", "default", [call], size, "TB/s")


def bench_elementwise(report: Report) -> None:
    shapes = ((4096, 14336, 32, False), (1024, 3072, 16, True))
    for rows, (hidden, intermediate, q_heads, normed) in itertools.product((1, 64, 256, 8192), shapes):
        elementwise_case(report, rows, hidden, intermediate, q_heads, normed)


def elementwise_case(report: Report, rows: int, hidden: int, intermediate: int, q_heads: int, normed: bool) -> None:
    from kernels import select_ops
    from kernels.reference import ReferenceOps

    case = f"{rows} rows, H {hidden}"
    x = torch.randn(rows, hidden, device="cuda", dtype=BF16)
    residual, weight = torch.zeros_like(x), x[0].clone()
    gate_up = torch.randn(rows, 2 * intermediate, device="cuda", dtype=BF16)
    qkv = torch.randn(rows, (q_heads + 2 * KV_HEADS) * HEAD_DIM, device="cuda", dtype=BF16)
    table = torch.randn(8192, HEAD_DIM, device="cuda")
    positions = torch.arange(rows, device="cuda", dtype=torch.int32)
    caches = torch.zeros(2, -(-rows // 64), 64, KV_HEADS, HEAD_DIM, device="cuda", dtype=BF16)
    norm = qkv[0, :HEAD_DIM].clone() if normed else None
    for ops, name in ((select_ops("cuda"), "triton"), (ReferenceOps(), "torch eager")):
        add_norm = partial(ops.add_rms_norm, x, residual, weight, 1e-6)
        report.add("norm", case, name, [add_norm], 4 * x.numel() * 2, "TB/s")
        report.add("silu_mul", case, name, [partial(ops.silu_mul, gate_up)], 3 * gate_up.numel(), "TB/s")
        if name == "triton":  # torch's reads the slots back to the host: it cannot be in a graph
            heads = (q_heads, KV_HEADS, norm, norm, 1e-6)
            rope = partial(ops.rope_and_cache, qkv, table, positions, positions, *caches, *heads)
            report.add("rope", case, name, [rope], 4 * qkv.numel(), "TB/s")


def bench_sampling(report: Report) -> None:
    for rows in (1, 64, 256):
        sampling_case(report, rows, 151_936)


def sampling_case(report: Report, rows: int, vocabulary: int) -> None:
    from kernels import select_ops
    from kernels.ops import LogitEdits, SamplingBatch

    ops = select_ops("cuda")
    logits = torch.randn(rows, vocabulary, device="cuda")
    size = logits.numel() * 4
    i32 = torch.int32

    def whole(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((rows,), value, device="cuda", dtype=dtype)

    def batch(top_k: int, top_p: float, least_p: float = 0.0, **bounds: bool) -> SamplingBatch:
        floats = [whole(value, torch.float32) for value in (0.6, top_p, least_p)]
        position = torch.arange(rows, device="cuda", dtype=i32)
        temperature, nucleus, min_p = floats
        seed = whole(5, torch.int64)
        return SamplingBatch(temperature, whole(top_k, i32), nucleus, min_p, seed, whole(0, i32), position, **bounds)

    def softmax_and_race() -> torch.Tensor:
        return (logits / 0.6).softmax(-1).div_(torch.empty_like(logits).exponential_(1)).argmax(-1)

    typical = batch(0, 1.0)
    typical.typical_p = whole(0.9, torch.float32)
    no_choice = whole(0, i32)
    edits = LogitEdits(
        ids=torch.arange(512, device="cuda", dtype=i32)[None].contiguous(),
        values=torch.zeros(1, 512, device="cuda"),
        until=torch.ones(1, 512, device="cuda", dtype=i32),
        words=torch.arange(256, device="cuda", dtype=i32)[None].contiguous(),
        prefixes=torch.zeros(1, 256, 16, device="cuda", dtype=i32),
    )
    recent = torch.ones(rows, 16, device="cuda", dtype=i32)

    cases = {
        "greedy": partial(ops.sample, logits, batch(0, 1.0, any_random=False)),
        "temperature": partial(ops.sample, logits, batch(0, 1.0, any_filter=False)),
        "top-k 20": partial(ops.sample, logits, batch(20, 1.0)),
        "top-p 0.95": partial(ops.sample, logits, batch(0, 0.95)),
        "top-k 20, top-p 0.95": partial(ops.sample, logits, batch(20, 0.95)),
        "top-p 0.5": partial(ops.sample, logits, batch(0, 0.5)),
        "min-p 0.05": partial(ops.sample, logits, batch(0, 1.0, 0.05)),
        "top-k 200": partial(ops.sample, logits, batch(200, 1.0)),
        "typical-p 0.9": partial(ops.sample, logits, typical),
        "512 edits, 256 words": partial(ops.edit_logits, logits.clone(), edits, no_choice, no_choice, recent),
        "torch argmax": partial(logits.argmax, -1),
        "torch temperature": softmax_and_race,
        "torch sort": partial(logits.sort, -1),
    }
    for name, call in cases.items():
        report.add("sampling", f"{rows} rows", name, [call], size, "TB/s")


GEMM_SHAPES = {  # N, K
    "8B qkv": (6144, 4096),
    "8B o": (4096, 4096),
    "8B gate_up": (28672, 4096),
    "8B down": (4096, 14336),
    "8B head": (128256, 4096),
    "0.6B qkv": (4096, 1024),
    "0.6B o": (1024, 2048),
    "0.6B gate_up": (6144, 1024),
    "0.6B down": (1024, 3072),
    "0.6B head": (151936, 1024),
}
GEMM_SECONDS = 110


def gemm_variants(rows: int, width: int, depth: int) -> list[GemmConfig]:
    from kernels.skinny_gemm import GEMV_ROWS, GemmConfig

    found = []
    if rows <= GEMV_ROWS:
        found = [
            GemmConfig(4, 1024, 4),
            GemmConfig(2, 1024, 4),
            GemmConfig(8, 1024, 4),
            GemmConfig(4, 1024, 2),
            GemmConfig(2, 512, 1),
        ]
    tiles = [(64, 128, 4, 4, True), (64, 64, 4, 6, True), (128, 64, 4, 4, True)]  # block_n, block_k, warps, stages, tma
    if rows <= 16:
        tiles += [(64, 256, 4, 3, True), (64, 128, 4, 4, False), (32, 128, 2, 6, False)]
    elif rows >= 64:
        tiles += [(128, 128, 8, 3, True)]
    for block_n, block_k, warps, stages, tma in tiles:
        wide, long = -(-width // block_n), depth // block_k
        for programs in (132, 264, 528) if rows > GEMV_ROWS else (264,):
            split = max(1, min(16, long // 2, round(programs / wide)))
            config = GemmConfig(block_n, block_k, warps, split, stages, tma)
            if config not in found:
                found.append(config)
    return found


def name_of(config: GemmConfig | None) -> str:
    if config is None:
        return "cuBLAS"
    c = config
    if c.split == 0:
        return f"gemv {c.block_n}x{c.block_k} w{c.num_warps}"
    return f"dot {c.block_n}x{c.block_k} w{c.num_warps} k/{c.split} s{c.stages} {'tma' if c.tma else 'ptr'}"


def bench_gemm(report: Report) -> None:
    """Each product follows an RMS norm of its input, as in a model: a kernel that starts early has something to overlap with.

    The times are those of both. Ends with the table of choices for `kernels/gemm_choice.py`.
    """
    from kernels import dependent_launch

    started = time.perf_counter()
    choices: dict[tuple[int, int, int], str] = {}
    print("us of norm + product; TB/s of the weights over it; gain over cuBLAS", flush=True)
    for rows in (1, 8, 16, 4, 64, 32, 2, 128):
        for shape, (width, depth) in GEMM_SHAPES.items():
            if time.perf_counter() - started > GEMM_SECONDS:
                report.note("gemm", f"{shape} M {rows}", "left out: time is up")
                continue
            best = gemm_case(report, shape, rows, width, depth)
            if best is not None:
                choices[rows, width, depth] = best
    dependent_launch.ENABLED = False
    print("without dependent launch:", flush=True)
    for shape in ("8B o", "0.6B gate_up", "0.6B o"):
        gemm_case(report, shape, 1, *GEMM_SHAPES[shape], suffix=" alone")
    dependent_launch.ENABLED = True
    print(
        "MEASURED = {", *(f"    {key}: {value}," for key, value in sorted(choices.items())), "}", sep="\n", flush=True
    )


def gemm_case(report: Report, shape: str, rows: int, width: int, depth: int, suffix: str = "") -> str | None:
    """Measures every variant and prints the two best; returns the source text of the best, None if nothing ran."""
    from kernels.norm import rms_norm
    from kernels.skinny_gemm import skinny_linear

    case, size = f"{shape} M {rows}{suffix}", width * depth * 2
    weights = [torch.randn(width, depth, device="cuda", dtype=BF16) for _ in range(max(1, -(-L2_BYTES * 3 // size)))]
    x, norm = torch.randn(rows, depth, device="cuda", dtype=BF16), torch.ones(depth, device="cuda", dtype=BF16)
    expected = rms_norm(x, norm, 1e-6).float() @ weights[0].float().T
    times: dict[GemmConfig | None, float] = {}

    def product(weight: torch.Tensor, config: GemmConfig | None) -> torch.Tensor:
        y = rms_norm(x, norm, 1e-6)
        return F.linear(y, weight) if config is None else skinny_linear(y, weight, None, config)

    for config in (None, *gemm_variants(rows, width, depth)):
        try:
            error = distance(product(weights[0], config), expected)
            if not error < 5e-3:
                raise ValueError(f"relative error {error:.1e}")
            times[config] = time_calls([partial(product, w, config) for w in weights], target_ms=1.0, replays=5)
        except Exception as problem:
            report.failures.append(
                {"family": "gemm", "case": case, "variant": name_of(config), "problem": repr(problem)[:500]}
            )
            print(f"gemm       {case:20} {name_of(config)} FAILED {repr(problem)[:120]}", flush=True)
            continue
        value = size / times[config] / 1e6
        report.measurements.append(Measurement("gemm", case, name_of(config), times[config], value, "TB/s", error))
    if not times:
        return None
    ranked = sorted(times, key=times.__getitem__)
    theirs = times.get(None, float("nan"))
    shown = [f"{name_of(c):28} {times[c]:7.1f} us {size / times[c] / 1e6:5.2f}" for c in ranked[:2]]
    gain = theirs / times[ranked[0]]
    print(f"{case:20} cuBLAS {theirs:7.1f} {size / theirs / 1e6:5.2f} | {' | '.join(shown)} | x{gain:.2f}", flush=True)
    return repr(ranked[0]) if gain > 1.02 else "None"


FAMILIES = {
    "prefill": bench_prefill,
    "decode": bench_decode,
    "elementwise": bench_elementwise,
    "sampling": bench_sampling,
    "gemm": bench_gemm,
    "hopper": bench_hopper,  # last: the one with barriers of its own, whose mistakes would be endless waits
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--only", default=",".join(FAMILIES), help="families, separated by commas")
    parser.add_argument("--resources", action="store_true", help="compile for sm_90 and report; needs no GPU")
    arguments = parser.parse_args()
    if arguments.resources:
        sys.argv = sys.argv[:1]
        from kernels.resources import main as resources

        return resources()
    report = Report()
    torch.manual_seed(0)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for family in arguments.only.split(","):
        started = time.perf_counter()
        try:
            FAMILIES[family](report)
        except Exception as problem:  # out of memory, say: the other families can still be measured
            report.failures.append({"family": family, "problem": repr(problem)[:500]})
            print(f"{family} FAILED {problem!r}", flush=True)
        torch.cuda.empty_cache()
        print(f"-- {family}: {time.perf_counter() - started:.0f} s", flush=True)
        results = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "failures": report.failures}
        results["measurements"] = [asdict(m) for m in report.measurements]
        (arguments.out / "kernels.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
