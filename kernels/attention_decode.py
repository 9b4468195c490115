"""Attention of decode rows and speculation trees over the paged cache, split over the context. Oracle: `ReferenceOps.attention`.

Flash decoding (Dao et al. 2023): a sequence's context is cut into spans that run on different programs, and a second kernel
merges them by their log-sum-exp. The grid follows from host bounds; the spans from the context length on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_tiles import TileConfig, cache_argument, load_tile, softmax_step, tma_fits
from kernels.dependent_launch import launch_options, start_next, wait_for_inputs
from kernels.ops import AttentionBatch

PROGRAMS_PER_SM = 4
MIN_SPAN = 64  # a shorter span costs more in merging than it saves; of wide tiles, twice as much
WIDE_TILE = 64  # rows of a tile
MAX_SPAN = 8192  # one long sequence in a full batch must not run alone at the end
MERGE_TILE = 16


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """How contexts are cut: into `fill` spans, or more so that none exceeds max_span, or fewer so that none is below min_span.

    splits: the grid's bound on the spans of a sequence.
    """

    splits: int
    fill: int
    min_span: int
    max_span: int


def plan_splits(
    programs: int, max_context: int, processors: int, fixed_split: int | None, min_span: int = MIN_SPAN
) -> SplitPlan:
    """programs: those of an unsplit grid. fixed_split: tokens of every span, so that a result does not depend on the batch."""
    if fixed_split is not None:
        return SplitPlan(max(1, triton.cdiv(max_context, fixed_split)), 1, fixed_split, fixed_split)
    fill = max(1, PROGRAMS_PER_SM * processors // programs)
    fill = min(fill, max(1, triton.cdiv(max_context, min_span)))
    return SplitPlan(max(fill, triton.cdiv(max_context, MAX_SPAN)), fill, min_span, MAX_SPAN)


@triton.jit
def _span(context, rows, WINDOW: tl.constexpr, FILL, MIN_SPAN, MAX_SPAN, BLOCK_N: tl.constexpr):
    """(first position to read, tokens in a span), both multiples of BLOCK_N."""
    begin = 0
    if WINDOW:
        begin = tl.maximum(context - rows - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    tokens = tl.minimum(tl.maximum(tl.cdiv(context - begin, FILL), MIN_SPAN), MAX_SPAN)
    return begin, tl.cdiv(tokens, BLOCK_N) * BLOCK_N


@triton.jit
def _count_bits(x):
    """Population count of int64 words (Warren, Hacker's Delight, 5-1)."""
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (x * 0x0101010101010101) >> 56


@triton.jit
def _attend(
    state,
    q,
    k_cache,
    v_cache,
    table_ptr,
    begin,
    end,
    context,
    rows,
    depth,
    word,
    kv_head,
    scale,
    HKV: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    TREE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Runs positions begin..end into state = (sums [M, D], totals [M], peaks [M])."""
    acc, total, peak = state
    for start in tl.range(begin, end, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        k = load_tile(k_cache, table_ptr, start, context, kv_head, HKV, D, BLOCK_D, PAGE, BLOCK_N, TMA, MASKED)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        n = start + tl.arange(0, BLOCK_N)
        if MASKED:
            node = (n - (context - rows))[None, :]  # index among the sequence's rows; negative: cached before this step
            earlier = node < 0
            if WINDOW:
                earlier &= node > depth[:, None] - WINDOW
            if TREE:
                own = ((word[:, None] >> tl.minimum(tl.maximum(node, 0), 63).to(tl.int64)) & 1) == 1
                seen = earlier | ((node >= 0) & (node < rows) & own)
            else:
                seen = earlier | ((node >= 0) & (node <= depth[:, None]))
            scores = tl.where(seen, scores, -float("inf"))
        weights, keep, peak, total = softmax_step(scores, peak, total, scale, GUARD=MASKED)
        v = load_tile(v_cache, table_ptr, start, context, kv_head, HKV, D, BLOCK_D, PAGE, BLOCK_N, TMA, MASKED)
        if MASKED and TMA:
            v = tl.where((n < context)[:, None], v, 0.0)  # a block's stale rows may hold NaN, and 0 × NaN is NaN
        acc = tl.dot(weights.to(v.dtype), v, acc * keep[:, None], input_precision=PRECISION)
    return acc, total, peak


@triton.jit(do_not_specialize=["fill"])
def _decode_kernel(
    q_ptr,
    k_cache,
    v_cache,
    out_ptr,
    partial_ptr,
    lse_ptr,
    context_len_ptr,
    block_table_ptr,
    table_stride,
    tree_ptr,
    tree_stride,
    rows,
    scale,
    fill,
    min_span,
    max_span,
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    TREE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    start_next(PDL)
    wait_for_inputs(PDL)
    split = tl.program_id(0)
    kv_head = tl.program_id(1) % HKV
    tile = tl.program_id(1) // HKV
    seq = tl.program_id(2)
    context = tl.load(context_len_ptr + seq)
    begin, tokens = _span(context, rows, WINDOW, fill, min_span, max_span, BLOCK_N)
    begin += split * tokens
    end = tl.minimum(begin + tokens, context)
    if SPLIT and begin >= end:
        return
    table_ptr = block_table_ptr + seq.to(tl.int64) * table_stride

    r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    lane = r // GROUP
    valid = lane < rows
    inside = valid[:, None] & (d < D)[None, :]
    head_row = (seq.to(tl.int64) * rows + lane) * (HKV * GROUP) + kv_head * GROUP + r % GROUP  # of [rows of all, Hq]
    offset = head_row[:, None] * D + d[None, :]
    q = tl.load(q_ptr + offset, mask=inside, other=0.0)
    depth = lane
    word = lane.to(tl.int64)
    if TREE:
        word = tl.load(tree_ptr + seq * tree_stride + lane, mask=valid, other=1)
        depth = (_count_bits(word) - 1).to(tl.int32)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    state = acc, total, peak
    whole_end = begin
    if not WINDOW:
        # Up to here every row sees every position: nothing to mask. The first row's own is among them where the rows follow one
        # another, but a tree's nodes need not have it as their ancestor.
        all_seen = context - rows if TREE else context - rows + 1
        whole_end = tl.maximum(tl.minimum(end, all_seen // BLOCK_N * BLOCK_N), begin)
        state = _attend(
            state, q, k_cache, v_cache, table_ptr, begin, whole_end, context, rows, depth, word, kv_head, scale,
            HKV, D, BLOCK_D, PAGE, WINDOW, TREE, BLOCK_N, TMA, PRECISION, MASKED=False,
        )  # fmt: skip
    state = _attend(
        state, q, k_cache, v_cache, table_ptr, whole_end, end, context, rows, depth, word, kv_head, scale,
        HKV, D, BLOCK_D, PAGE, WINDOW, TREE, BLOCK_N, TMA, PRECISION, MASKED=True,
    )  # fmt: skip
    acc, total, peak = state
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    if SPLIT:
        slot = head_row * tl.num_programs(0) + split
        tl.store(partial_ptr + slot[:, None] * D + d[None, :], acc, mask=inside)
        lse = tl.where(total == 0, -float("inf"), peak + tl.log2(total))
        tl.store(lse_ptr + slot, lse, mask=valid)
    else:
        tl.store(out_ptr + offset, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["fill", "splits"])
def _merge_kernel(
    partial_ptr,
    lse_ptr,
    out_ptr,
    context_len_ptr,
    rows,
    splits,
    fill,
    min_span,
    max_span,
    WINDOW: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a row and head. The tiles' shape is fixed, so the sum's order depends on the spans alone."""
    start_next(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0)
    head_row = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    context = tl.load(context_len_ptr + row // rows)
    begin, tokens = _span(context, rows, WINDOW, fill, min_span, max_span, BLOCK_N)
    spans = tl.cdiv(context - begin, tokens)
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    total = 0.0
    peak = -float("inf")
    for start in range(0, spans, TILE):
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
    tl.store(out_ptr + head_row * D + d, acc.to(out_ptr.dtype.element_ty), mask=d < D)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def decode_config(k_cache: Tensor, packed_rows: int, per_processor: float) -> TileConfig:
    """The tile shape by head size, data type, rows (tree nodes × query heads of a KV head), and sequences × KV heads by processors."""
    head_dim, narrow = k_cache.shape[-1], k_cache.element_size() == 2
    block_m = min(64 if narrow else 32, max(16, triton.next_power_of_2(packed_rows)))
    block_n = 64 if head_dim <= 128 and narrow else 32
    # Small programs, of which many fit beside each other and beside those of the kernels before and behind: in the steps of whole
    # models that gave more than deep pipelines, but for batches that fill the device several times.
    warps = 2 if block_m == 16 and per_processor < 1 else 4
    stages = 3 if head_dim > 128 else 5 if per_processor > 8 and block_m < 64 else 2
    return TileConfig(block_m, block_n, warps, stages, tma_fits(k_cache, block_n))


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int,
    out: Tensor,
    fixed_split: int | None = None,
    config: TileConfig | None = None,
) -> None:
    """Writes the rows of the first decode_seqs sequences to out [T, Hq, D].

    fixed_split: tokens of a span, whatever the batch: the result of a row is then the same bit by bit in every batch.
    """
    sequences, rows = batch.decode_seqs, batch.decode_rows
    if sequences == 0:
        return
    _, page, kv_heads, head_dim = k_cache.shape
    q_heads = q.shape[1]
    group = q_heads // kv_heads
    if config is None:
        # Where a result must not depend on the batch, neither may the tiles.
        load = 1.0 if fixed_split is not None else sequences * kv_heads / _processors(q.device)
        config = decode_config(k_cache, rows * group, load)
    tiles = triton.cdiv(rows * group, config.block_m)
    min_span = 2 * MIN_SPAN if config.block_m >= WIDE_TILE else MIN_SPAN
    plan = plan_splits(sequences * kv_heads * tiles, batch.max_context, _processors(q.device), fixed_split, min_span)
    partial = lse = out
    split = plan.splits > 1
    if split:
        partial = torch.empty(sequences * rows, q_heads, plan.splits, head_dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(sequences * rows, q_heads, plan.splits, dtype=torch.float32, device=q.device)
    tree = batch.tree_mask
    block_d = max(16, triton.next_power_of_2(head_dim))
    options = launch_options(q.device)
    _decode_kernel[(plan.splits, kv_heads * tiles, sequences)](
        q,
        cache_argument(k_cache, config.block_n, config.tma),
        cache_argument(v_cache, config.block_n, config.tma),
        out,
        partial,
        lse,
        batch.context_len,
        batch.block_table,
        batch.block_table.stride(0),
        batch.context_len if tree is None else tree,
        0 if tree is None or tree.numel() == rows else rows,
        rows,
        scale * 1.4426950408889634,  # log2(e)
        plan.fill,
        plan.min_span,
        plan.max_span,
        HKV=kv_heads,
        GROUP=group,
        D=head_dim,
        BLOCK_D=block_d,
        PAGE=page,
        WINDOW=window,
        TREE=tree is not None,
        SPLIT=split,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        TMA=config.tma,
        PRECISION="ieee",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **options,
    )
    if split:
        _merge_kernel[(sequences * rows, q_heads)](
            partial,
            lse,
            out,
            batch.context_len,
            rows,
            plan.splits,
            plan.fill,
            plan.min_span,
            plan.max_span,
            WINDOW=window,
            D=head_dim,
            BLOCK_D=block_d,
            BLOCK_N=config.block_n,
            TILE=MERGE_TILE,
            num_warps=1 if head_dim <= 128 else 2,
            **options,
        )
