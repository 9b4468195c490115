"""Attention whose result for a row has the same bits in every batch: decode rows and prefill rows, however a prompt is cut into chunks.
Oracle: `ReferenceOps.attention`.

Flash decoding (Dao et al. 2023) with spans at fixed places: positions s × SPAN to (s + 1) × SPAN - 1 of the sequence are one span for
every row that sees any of them, and a row's spans are merged in their order. Within a span tiles begin at multiples of BLOCK_N. One
kernel of one shape does it for all rows, and every tile takes the masked path, so that a row meets the same instructions whoever
shares its tile. What other rows bring along (tiles after its own position, or before its window) adds exact zeros.

Trees are not for this: a node's ancestors do not lie at their positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_tiles import TileConfig, cache_argument, load_tile, softmax_step, tma_fits
from kernels.ops import AttentionBatch

SPAN = 512
MERGE_TILE = 16
NOBODY = tl.constexpr(-(2**31))  # a row of no sequence that the launch is about
WORKSPACE_BYTES = 256 << 20  # of the spans' results; more rows than have room in it are taken in turn


@triton.jit(do_not_specialize=["table_stride", "first_seq", "row_begin", "row_end"])
def _span_kernel(
    q_ptr,
    k_cache,
    v_cache,
    partial_ptr,
    lse_ptr,
    position_ptr,
    query_start_ptr,
    context_len_ptr,
    block_table_ptr,
    table_stride,
    first_seq,
    row_begin,
    row_end,
    scale,
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One span of one tile of rows, of which those from row_begin to row_end count."""
    POSITIONS: tl.constexpr = BLOCK_M // GROUP
    span = tl.program_id(0)
    kv_head = tl.program_id(1) % HKV
    first = tl.program_id(1) // HKV * POSITIONS
    seq = first_seq + tl.program_id(2)
    query_start = tl.load(query_start_ptr + seq)
    rows = tl.load(query_start_ptr + seq + 1) - query_start
    top = query_start + first
    if first >= rows or top >= row_end or top + POSITIONS <= row_begin:
        return
    before = tl.load(context_len_ptr + seq) - rows  # positions cached before these rows; negative for a padded sequence

    r = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    lane = first + r // GROUP
    row = query_start + lane
    valid = (r < POSITIONS * GROUP) & (lane < rows) & (row >= row_begin) & (row < row_end)
    position = before + lane
    if span == 0 and kv_head == 0:
        tl.store(position_ptr + row - row_begin, position, mask=valid & (r % GROUP == 0))

    last = before + tl.minimum(first + POSITIONS, rows) - 1
    begin = span * SPAN
    end = tl.minimum(begin + SPAN, last + 1)
    if WINDOW:
        begin = tl.maximum(begin, tl.maximum(before + first - WINDOW + 1, 0) // BLOCK_N * BLOCK_N)
    if begin >= end:
        return
    table_ptr = block_table_ptr + seq.to(tl.int64) * table_stride
    inside = valid[:, None] & (d < D)[None, :]
    head = kv_head * GROUP + r % GROUP
    offset = (row.to(tl.int64) * (HKV * GROUP) + head) * D
    q = tl.load(q_ptr + offset[:, None] + d[None, :], mask=inside, other=0.0)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    for start in tl.range(begin, end, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        k = load_tile(k_cache, table_ptr, start, end, kv_head, HKV, D, BLOCK_D, PAGE, BLOCK_N, TMA, True)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        n = start + tl.arange(0, BLOCK_N)
        seen = n[None, :] <= position[:, None]
        if WINDOW:
            seen &= n[None, :] > position[:, None] - WINDOW
        scores = tl.where(seen, scores, -float("inf"))
        weights, keep, peak, total = softmax_step(scores, peak, total, scale, GUARD=True)
        v = load_tile(v_cache, table_ptr, start, end, kv_head, HKV, D, BLOCK_D, PAGE, BLOCK_N, TMA, True)
        if TMA:
            v = tl.where((n < end)[:, None], v, 0.0)  # a block's stale rows may hold NaN, and 0 × NaN is NaN
        acc = tl.dot(weights.to(v.dtype), v, acc * keep[:, None], input_precision=PRECISION)
    slot = ((row - row_begin).to(tl.int64) * (HKV * GROUP) + head) * tl.num_programs(0) + span
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(partial_ptr + slot[:, None] * D + d[None, :], acc, mask=inside)
    tl.store(lse_ptr + slot, tl.where(total == 0, -float("inf"), peak + tl.log2(total)), mask=valid)


@triton.jit(do_not_specialize=["row_begin", "splits"])
def _merge_spans_kernel(
    partial_ptr,
    lse_ptr,
    position_ptr,
    out_ptr,
    row_begin,
    splits,
    WINDOW: tl.constexpr,
    SPAN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program a row and head: the spans from the first that the row sees to its own, TILE at a time."""
    row = tl.program_id(0)
    position = tl.load(position_ptr + row)
    if position == NOBODY:
        return  # of no sequence that this launch is about
    head_row = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    first = 0
    if WINDOW:
        first = tl.maximum(position - WINDOW + 1, 0) // SPAN
    spans = tl.where(position < 0, 0, position // SPAN + 1)
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    total = 0.0
    peak = -float("inf")
    for start in range(first, spans, TILE):
        index = start + tl.arange(0, TILE)
        slot = head_row * splits + index
        lse = tl.load(lse_ptr + slot, mask=index < spans, other=-float("inf"))
        inside = (index < spans)[:, None] & (d < D)[None, :]
        part = tl.load(partial_ptr + slot[:, None] * D + d[None, :], mask=inside, other=0.0)
        new_peak = tl.maximum(peak, tl.max(lse, 0))
        base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        weights = tl.math.exp2(lse - base)
        keep = tl.math.exp2(peak - base)
        acc = acc * keep + tl.sum(weights[:, None] * part, 0)
        total = total * keep + tl.sum(weights, 0)
        peak = new_peak
    acc = acc / tl.where(total == 0, 1.0, total)
    out_row = (row_begin + row).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(out_ptr + out_row * D + d, acc.to(out_ptr.dtype.element_ty), mask=d < D)


def invariant_config(k_cache: Tensor, group: int) -> TileConfig:
    """The tile shape by head size and data type, and by nothing else."""
    head_dim, narrow = k_cache.shape[-1], k_cache.element_size() == 2
    block_m = max(64 if narrow else 16, triton.next_power_of_2(group))
    block_n = 64 if head_dim <= 128 and narrow else 32
    return TileConfig(block_m, block_n, 4, 3, tma_fits(k_cache, block_n))


def invariant_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int,
    out: Tensor,
    *,
    decodes: bool = True,
    span: int = SPAN,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> None:
    """Writes all rows of the batch to out [T, Hq, D]; without `decodes` those of the prefill sequences only.

    span: a multiple of 64; workspace_bytes: at most, for the spans' results, but room for 16 rows there always is."""
    sequences = batch.context_len.shape[0]
    if decodes and batch.decode_seqs:
        rows = batch.decode_seqs * batch.decode_rows
        _launch(q, k_cache, v_cache, batch, scale, window, out, (0, batch.decode_seqs), batch.decode_rows, (0, rows), span,
                workspace_bytes)  # fmt: skip
    if sequences > batch.decode_seqs and batch.max_query > 0:
        first = batch.decode_seqs * batch.decode_rows
        _launch(q, k_cache, v_cache, batch, scale, window, out, (batch.decode_seqs, sequences), batch.max_query,
                (first, q.shape[0]), span, workspace_bytes)  # fmt: skip


def _launch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int,
    out: Tensor,
    sequences: tuple[int, int],
    longest: int,
    rows: tuple[int, int],
    span: int,
    workspace_bytes: int,
) -> None:
    """For the sequences and rows (first, end): each sequence has at most `longest` of them."""
    _, page, kv_heads, head_dim = k_cache.shape
    q_heads = q.shape[1]
    group = q_heads // kv_heads
    config = invariant_config(k_cache, group)
    splits = max(1, triton.cdiv(batch.max_context, span))
    tiles = triton.cdiv(longest, config.block_m // group)
    block_d = max(16, triton.next_power_of_2(head_dim))
    at_once = max(16, workspace_bytes // (q_heads * splits * head_dim * 4))
    for begin in range(rows[0], rows[1], at_once):
        end = min(begin + at_once, rows[1])
        partial = torch.empty(end - begin, q_heads, splits, head_dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(end - begin, q_heads, splits, dtype=torch.float32, device=q.device)
        position = torch.full((end - begin,), NOBODY.value, dtype=torch.int32, device=q.device)
        _span_kernel[(splits, kv_heads * tiles, sequences[1] - sequences[0])](
            q,
            cache_argument(k_cache, config.block_n, config.tma),
            cache_argument(v_cache, config.block_n, config.tma),
            partial,
            lse,
            position,
            batch.query_start,
            batch.context_len,
            batch.block_table,
            batch.block_table.stride(0),
            sequences[0],
            begin,
            end,
            scale * 1.4426950408889634,  # log2(e)
            HKV=kv_heads,
            GROUP=group,
            D=head_dim,
            BLOCK_D=block_d,
            PAGE=page,
            WINDOW=window,
            SPAN=span,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            TMA=config.tma,
            PRECISION="ieee",
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        _merge_spans_kernel[(end - begin, q_heads)](
            partial,
            lse,
            position,
            out,
            begin,
            splits,
            WINDOW=window,
            SPAN=span,
            D=head_dim,
            BLOCK_D=block_d,
            TILE=MERGE_TILE,
            num_warps=1 if head_dim <= 128 else 2,
        )
