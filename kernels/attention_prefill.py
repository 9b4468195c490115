"""Causal attention of prefill chunks of any length over the paged cache. Oracle: `ReferenceOps.attention`.

The query heads that share a KV head are packed into the rows of one tile, so short chunks fill it as well and each KV tile is
read once for the group. Tiles that no row sees (after the diagonal, before the window) are never read.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_tiles import TileConfig, cache_argument, load_tile, softmax_step, tma_fits
from kernels.ops import AttentionBatch


@triton.jit
def _attend(
    state,
    q,
    k_cache,
    v_cache,
    table_ptr,
    begin,
    end,
    limit,
    position,
    kv_head,
    scale,
    HKV: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Runs positions begin..end into state = (sums [M, D], totals [M], peaks [M])."""
    acc, total, peak = state
    for start in tl.range(begin, end, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        k = load_tile(k_cache, table_ptr, start, limit, kv_head, HKV, D, BLOCK_D, PAGE, BLOCK_N, TMA, MASKED)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        n = start + tl.arange(0, BLOCK_N)
        if MASKED:
            seen = n[None, :] <= position[:, None]
            if WINDOW:
                seen &= n[None, :] > position[:, None] - WINDOW
            scores = tl.where(seen, scores, -float("inf"))
        weights, keep, peak, total = softmax_step(scores, peak, total, scale, GUARD=MASKED and WINDOW > 0)
        v = load_tile(v_cache, table_ptr, start, limit, kv_head, HKV, D, BLOCK_D, PAGE, BLOCK_N, TMA, MASKED)
        if MASKED and TMA:
            v = tl.where((n < limit)[:, None], v, 0.0)  # a block's stale rows may hold NaN, and 0 × NaN is NaN
        acc = tl.dot(weights.to(v.dtype), v, acc * keep[:, None], input_precision=PRECISION)
    return acc, total, peak


@triton.jit(do_not_specialize=["first_seq"])
def _prefill_kernel(
    q_ptr,
    k_cache,
    v_cache,
    out_ptr,
    query_start_ptr,
    context_len_ptr,
    block_table_ptr,
    table_stride,
    first_seq,
    scale,
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    POSITIONS: tl.constexpr = BLOCK_M // GROUP
    # Last tiles have the most to read: they start first, so that the short ones fill the end.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * POSITIONS
    kv_head = tl.program_id(1)
    seq = first_seq + tl.program_id(2)
    query_start = tl.load(query_start_ptr + seq)
    rows = tl.load(query_start_ptr + seq + 1) - query_start
    if first >= rows:
        return
    before = tl.load(context_len_ptr + seq) - rows  # positions cached before this chunk
    table_ptr = block_table_ptr + seq.to(tl.int64) * table_stride

    r = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    lane = first + r // GROUP
    inside = ((r < POSITIONS * GROUP) & (lane < rows))[:, None] & (d < D)[None, :]
    offset = ((query_start + lane).to(tl.int64) * (HKV * GROUP) + kv_head * GROUP + r % GROUP) * D
    offset = offset[:, None] + d[None, :]
    q = tl.load(q_ptr + offset, mask=inside, other=0.0)

    position = before + lane
    last = tl.minimum(first + POSITIONS, rows) - 1
    limit = before + last + 1
    begin = 0
    whole_begin = 0  # whole_begin..whole_end: tiles that every row sees from end to end
    whole_end = (before + first + 1) // BLOCK_N * BLOCK_N
    if WINDOW:
        begin = tl.maximum(before + first - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        whole_begin = tl.cdiv(tl.maximum(before + last - WINDOW + 1, 0), BLOCK_N) * BLOCK_N

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    state = acc, total, peak
    if WINDOW:
        state = _attend(
            state, q, k_cache, v_cache, table_ptr, begin, tl.minimum(whole_begin, limit), limit, position, kv_head, scale,
            HKV, D, BLOCK_D, PAGE, WINDOW, BLOCK_N, TMA, PRECISION, MASKED=True,
        )  # fmt: skip
    state = _attend(
        state, q, k_cache, v_cache, table_ptr, whole_begin, whole_end, limit, position, kv_head, scale,
        HKV, D, BLOCK_D, PAGE, WINDOW, BLOCK_N, TMA, PRECISION, MASKED=False,
    )  # fmt: skip
    state = _attend(
        state, q, k_cache, v_cache, table_ptr, tl.maximum(whole_begin, whole_end), limit, limit, position, kv_head, scale,
        HKV, D, BLOCK_D, PAGE, WINDOW, BLOCK_N, TMA, PRECISION, MASKED=True,
    )  # fmt: skip
    acc, total, peak = state
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]  # a padded sequence sees nothing and gets zeros
    tl.store(out_ptr + offset, acc.to(out_ptr.dtype.element_ty), mask=inside)


def prefill_config(k_cache: Tensor, group: int) -> TileConfig:
    """The tile shape by head size and data type; the figures behind it are in benchmarks/kernels.py's reports."""
    head_dim = k_cache.shape[-1]
    block_m = max(128 if k_cache.element_size() == 2 else 32, triton.next_power_of_2(group))
    block_n = 64 if head_dim <= 128 and k_cache.element_size() == 2 else 32
    return TileConfig(block_m, block_n, 8, 3 if head_dim <= 128 else 2, tma_fits(k_cache, block_n))


def prefill_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int,
    out: Tensor,
    config: TileConfig | None = None,
) -> None:
    """Writes the rows of the sequences after the first decode_seqs to out [T, Hq, D]. The grid depends on host bounds only."""
    sequences = batch.context_len.shape[0] - batch.decode_seqs
    if sequences <= 0 or batch.max_query <= 0:
        return
    _, page, kv_heads, head_dim = k_cache.shape
    group = q.shape[1] // kv_heads
    config = config or prefill_config(k_cache, group)
    tiles = triton.cdiv(batch.max_query, config.block_m // group)
    _prefill_kernel[(tiles, kv_heads, sequences)](
        q,
        cache_argument(k_cache, config.block_n, config.tma),
        cache_argument(v_cache, config.block_n, config.tma),
        out,
        batch.query_start,
        batch.context_len,
        batch.block_table,
        batch.block_table.stride(0),
        batch.decode_seqs,
        scale * 1.4426950408889634,  # log2(e)
        HKV=kv_heads,
        GROUP=group,
        D=head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        PAGE=page,
        WINDOW=window,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        TMA=config.tma,
        PRECISION="ieee",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
