"""Prefill attention for Hopper in Gluon: one producer warp feeds two warpgroups by TMA. Oracle: `ReferenceOps.attention`.

The plan is FlashAttention-3's (Shah et al. 2024, arXiv 2407.08608): each consumer warpgroup owns 64 rows, and multiplies the
next tile's keys while it takes the softmax of this one; the two run free of each other, so that one's softmax hides behind the
other's products. Rows are packed and tiles chosen as in `attention_prefill`, but the tiles run from the diagonal backwards:
those that need a mask come first.

A tile of 128 positions spans 128 / P blocks. Keys and values are kept as halves of 64 dimensions: a half's row is then one
swizzle line of 128 bytes, and a block's rows are a contiguous part of it which one TMA box can fill.
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.ops import AttentionBatch

ROWS = 64  # of a consumer: the M of a warpgroup's product
CONSUMERS = 2
BLOCK_N = 128
HALF = 64
HEAD_DIM = 128
STAGES = 2


@gluon.jit
def _spread(first, rows, before, POSITIONS: gl.constexpr, BLOCK_N: gl.constexpr):
    """(end of the positions that a tile of rows sees, its KV tiles, those of them that need no mask). A padded sequence, whose end is
    ≤ 0, takes one tile, of which it sees nothing."""
    limit = before + gl.minimum(first + POSITIONS, rows)
    return limit, gl.maximum((limit + BLOCK_N - 1) // BLOCK_N, 1), (before + first + 1) // BLOCK_N


@gluon.jit
def _load_tile(
    desc,
    pages,
    smem,
    full,
    empty,
    n,
    first_page,
    last_page,
    kv_head,
    PAGE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    HALF: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Starts the loads of the n-th tile of keys or values, once its place is free."""
    stage = n % STAGES
    # The first round waits for a phase that counts as done: the buffers are empty.
    mbarrier.wait(empty.index(stage), ((n // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(stage), 2 * BLOCK_N * HALF * 2)
    for j in gl.static_range(BLOCK_N // PAGE):
        row = gl.load(pages + gl.minimum(first_page + j, last_page)) * PAGE
        for half in gl.static_range(2):
            target = smem.index(stage * 2 + half).slice(j * PAGE, PAGE, 0)
            column = kv_head * 2 * HALF + half * HALF
            tma.async_copy_global_to_shared(desc, [row, column], full.index(stage), target)


@gluon.jit
def _produce(
    k_desc,
    v_desc,
    table_ptr,
    k_smem,
    v_smem,
    k_full,
    k_empty,
    v_full,
    v_empty,
    tiles,
    last_page,
    kv_head,
    PAGE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    HALF: gl.constexpr,
    STAGES: gl.constexpr,
):
    for i in range(tiles):
        page = (tiles - 1 - i) * (BLOCK_N // PAGE)
        _load_tile(k_desc, table_ptr, k_smem, k_full, k_empty, i, page, last_page, kv_head, PAGE, BLOCK_N, HALF, STAGES)
        _load_tile(v_desc, table_ptr, v_smem, v_full, v_empty, i, page, last_page, kv_head, PAGE, BLOCK_N, HALF, STAGES)


@gluon.jit
def _start_scores(q_low, q_high, k_smem, stage, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, layout: gl.constexpr):
    """Starts Q·Kᵀ of a tile; to be waited for."""
    scores = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
    low, high = k_smem.index(stage * 2), k_smem.index(stage * 2 + 1)
    scores = warpgroup_mma(q_low, low.permute((1, 0)), scores, use_acc=False, is_async=True)
    return warpgroup_mma(q_high, high.permute((1, 0)), scores, is_async=True)


@gluon.jit
def _softmax(
    scores, peak, total, position, start, scale, MASKED: gl.constexpr, BLOCK_N: gl.constexpr, layout: gl.constexpr
):
    """As attention_tiles.softmax_step; masks what lies after a row's position."""
    if MASKED:
        n = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
        scores = gl.where(n[None, :] <= position[:, None], scores, -float("inf"))
    new_peak = gl.maximum(peak, gl.max(scores, 1) * scale)
    base = new_peak
    if MASKED:
        base = gl.where(new_peak == -float("inf"), 0.0, new_peak)
    weights = gl.exp2(scores * scale - base[:, None])
    keep = gl.exp2(peak - base)
    return weights, keep, new_peak, total * keep + gl.sum(weights, 1)


@gluon.jit
def _clear_stale(v_smem, stage, start, limit, BLOCK_N: gl.constexpr):
    """Zeroes the values of a tile behind `limit`: a block's stale rows may hold NaN, and 0 × NaN is NaN. Both consumers write the same,
    so it matters not who is first."""
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    n = start + gl.arange(0, BLOCK_N, gl.SliceLayout(1, LOAD))
    for half in gl.static_range(2):
        v = v_smem.index(stage * 2 + half)
        v.store(gl.where((n < limit)[:, None], v.load(LOAD), 0.0))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _consume_tile(
    state,
    i,
    n,
    tiles,
    q_low,
    q_high,
    k_smem,
    v_smem,
    k_full,
    k_empty,
    v_full,
    v_empty,
    position,
    scale,
    MASKED: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    S_LAYOUT: gl.constexpr,
    O_LAYOUT: gl.constexpr,
    P_LAYOUT: gl.constexpr,
):
    """Scores and softmax of tile i, during which tile i - 1's weights are multiplied with its values. n: tiles before it."""
    low, high, weights, peak, total = state
    stage = n % STAGES
    mbarrier.wait(k_full.index(stage), (n // STAGES) & 1)
    scores = _start_scores(q_low, q_high, k_smem, stage, ROWS, BLOCK_N, S_LAYOUT)
    before = (n - 1) % STAGES
    mbarrier.wait(v_full.index(before), ((n - 1) // STAGES) & 1)
    low = warpgroup_mma(weights, v_smem.index(before * 2), low, is_async=True)
    high = warpgroup_mma(weights, v_smem.index(before * 2 + 1), high, is_async=True)
    scores = warpgroup_mma_wait(2, deps=[scores])
    mbarrier.arrive(k_empty.index(stage))
    next_weights, keep, peak, total = _softmax(
        scores, peak, total, position, (tiles - 1 - i) * BLOCK_N, scale, MASKED, BLOCK_N, S_LAYOUT
    )
    low, high, weights = warpgroup_mma_wait(0, deps=[low, high, weights])
    mbarrier.arrive(v_empty.index(before))
    keep = gl.convert_layout(keep, gl.SliceLayout(1, O_LAYOUT))[:, None]
    weights = gl.convert_layout(next_weights.to(weights.dtype), P_LAYOUT)
    return low * keep, high * keep, weights, peak, total


@gluon.jit
def _consume(
    CONSUMER: gl.constexpr,
    q_ptr,
    out_ptr,
    q_smem,
    k_smem,
    v_smem,
    k_full,
    k_empty,
    v_full,
    v_empty,
    tiles,
    whole,
    limit,
    before,
    first,
    rows,
    query_start,
    kv_head,
    scale,
    HKV: gl.constexpr,
    GROUP: gl.constexpr,
    POSITIONS: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    HALF: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The tile's rows CONSUMER * ROWS onwards, from their load to their store."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    D: gl.constexpr = 2 * HALF

    r = CONSUMER * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LOAD))
    column = gl.arange(0, HALF, gl.SliceLayout(0, LOAD))[None, :]
    lane = first + r // GROUP
    inside = ((r < POSITIONS * GROUP) & (lane < rows))[:, None]
    offset = ((query_start + lane).to(gl.int64) * (HKV * GROUP) + kv_head * GROUP + r % GROUP)[:, None] * D + column
    q_low = q_smem.index(CONSUMER * 2)
    q_high = q_smem.index(CONSUMER * 2 + 1)
    q_low.store(gl.load(q_ptr + offset, mask=inside, other=0.0))
    q_high.store(gl.load(q_ptr + offset + HALF, mask=inside, other=0.0))
    fence_async_shared()
    gl.thread_barrier()

    r = CONSUMER * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))
    position = before + first + r // GROUP
    peak = gl.full([ROWS], -float("inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
    total = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, S_LAYOUT))

    mbarrier.wait(k_full.index(0), 0)
    scores = _start_scores(q_low, q_high, k_smem, 0, ROWS, BLOCK_N, S_LAYOUT)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_empty.index(0))
    start = (tiles - 1) * BLOCK_N
    weights, _, peak, total = _softmax(scores, peak, total, position, start, scale, True, BLOCK_N, S_LAYOUT)
    weights = gl.convert_layout(weights.to(q_ptr.dtype.element_ty), P_LAYOUT)
    mbarrier.wait(v_full.index(0), 0)
    if start + BLOCK_N > limit:
        _clear_stale(v_smem, 0, start, limit, BLOCK_N)

    low = gl.zeros([ROWS, HALF], gl.float32, O_LAYOUT)
    high = gl.zeros([ROWS, HALF], gl.float32, O_LAYOUT)
    state = low, high, weights, peak, total
    masked = gl.maximum(tiles - whole, 1)
    for i in range(1, masked):
        state = _consume_tile(
            state, i, i, tiles, q_low, q_high, k_smem, v_smem, k_full, k_empty, v_full, v_empty, position, scale,
            True, ROWS, BLOCK_N, STAGES, S_LAYOUT, O_LAYOUT, P_LAYOUT,
        )  # fmt: skip
    for i in range(masked, tiles):
        state = _consume_tile(
            state, i, i, tiles, q_low, q_high, k_smem, v_smem, k_full, k_empty, v_full, v_empty, position, scale,
            False, ROWS, BLOCK_N, STAGES, S_LAYOUT, O_LAYOUT, P_LAYOUT,
        )  # fmt: skip
    low, high, weights, peak, total = state
    last = (tiles - 1) % STAGES
    mbarrier.wait(v_full.index(last), ((tiles - 1) // STAGES) & 1)
    low = warpgroup_mma(weights, v_smem.index(last * 2), low, is_async=True)
    high = warpgroup_mma(weights, v_smem.index(last * 2 + 1), high, is_async=True)
    low, high = warpgroup_mma_wait(0, deps=[low, high])

    total = gl.convert_layout(total, gl.SliceLayout(1, O_LAYOUT))
    share = (1.0 / gl.where(total == 0, 1.0, total))[:, None]
    r = CONSUMER * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, O_LAYOUT))
    column = gl.arange(0, HALF, gl.SliceLayout(0, O_LAYOUT))[None, :]
    lane = first + r // GROUP
    inside = ((r < POSITIONS * GROUP) & (lane < rows))[:, None]
    offset = ((query_start + lane).to(gl.int64) * (HKV * GROUP) + kv_head * GROUP + r % GROUP)[:, None] * D + column
    gl.store(out_ptr + offset, (low * share).to(out_ptr.dtype.element_ty), mask=inside)
    gl.store(out_ptr + offset + HALF, (high * share).to(out_ptr.dtype.element_ty), mask=inside)


@gluon.jit
def _prefill_hopper_kernel(
    q_ptr,
    k_desc,
    v_desc,
    out_ptr,
    query_start_ptr,
    context_len_ptr,
    block_table_ptr,
    table_stride,
    first_seq,
    scale,
    HKV: gl.constexpr,
    GROUP: gl.constexpr,
    PAGE: gl.constexpr,
    ROWS: gl.constexpr,
    CONSUMERS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    HALF: gl.constexpr,
    STAGES: gl.constexpr,
):
    POSITIONS: gl.constexpr = CONSUMERS * ROWS // GROUP
    first = (gl.num_programs(0) - 1 - gl.program_id(0)) * POSITIONS
    kv_head = gl.program_id(1)
    seq = first_seq + gl.program_id(2)
    query_start = gl.load(query_start_ptr + seq)
    rows = gl.load(query_start_ptr + seq + 1) - query_start
    if first >= rows:
        return
    before = gl.load(context_len_ptr + seq) - rows
    table_ptr = block_table_ptr + seq.to(gl.int64) * table_stride
    limit, tiles, whole = _spread(first, rows, before, POSITIONS, BLOCK_N)
    last_page = gl.maximum((limit - 1) // PAGE, 0)

    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    q_smem = gl.allocate_shared_memory(dtype, [CONSUMERS * 2, ROWS, HALF], layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES * 2, BLOCK_N, HALF], layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES * 2, BLOCK_N, HALF], layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=CONSUMERS)
        mbarrier.init(v_empty.index(stage), count=CONSUMERS)
    fence_async_shared()
    gl.thread_barrier()

    gl.warp_specialize(
        [
            (_consume, (
                0, q_ptr, out_ptr, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, tiles, whole, limit, before,
                first, rows, query_start, kv_head, scale, HKV, GROUP, POSITIONS, ROWS, BLOCK_N, HALF, STAGES,
            )),
            (_consume, (
                1, q_ptr, out_ptr, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, tiles, whole, limit, before,
                first, rows, query_start, kv_head, scale, HKV, GROUP, POSITIONS, ROWS, BLOCK_N, HALF, STAGES,
            )),
            (_produce, (
                k_desc, v_desc, table_ptr, k_smem, v_smem, k_full, k_empty, v_full, v_empty, tiles, last_page, kv_head,
                PAGE, BLOCK_N, HALF, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def fits(q: Tensor, k_cache: Tensor, window: int) -> bool:
    """Whether this kernel takes the case: 16-bit heads of 128, blocks of 8 to 128 tokens, no window, a small enough group."""
    page, kv_heads, head_dim = k_cache.shape[-3:]
    narrow = head_dim == HEAD_DIM and k_cache.element_size() == 2 and window == 0
    return narrow and 8 <= page <= BLOCK_N and BLOCK_N % page == 0 and q.shape[1] // kv_heads <= CONSUMERS * ROWS


def cache_descriptor(cache: Tensor) -> TensorDescriptor:
    """Keys or values [B, P, Hkv, D] as rows of all heads, in boxes of half a head's dimensions of one block."""
    blocks, page, kv_heads, head_dim = cache.shape
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    width = kv_heads * head_dim
    return TensorDescriptor(cache, [blocks * page, width], [width, 1], [page, HALF], layout)


def prefill_attention_hopper(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, scale: float, out: Tensor
) -> None:
    """As `prefill_attention`, for what `fits`, on a GPU of capability 9.0."""
    sequences = batch.context_len.shape[0] - batch.decode_seqs
    if sequences <= 0 or batch.max_query <= 0:
        return
    page, kv_heads = k_cache.shape[1:3]
    group = q.shape[1] // kv_heads
    k_desc, v_desc = cache_descriptor(k_cache), cache_descriptor(v_cache)
    tiles = triton.cdiv(batch.max_query, CONSUMERS * ROWS // group)
    _prefill_hopper_kernel[(tiles, kv_heads, sequences)](
        q,
        k_desc,
        v_desc,
        out,
        batch.query_start,
        batch.context_len,
        batch.block_table,
        batch.block_table.stride(0),
        batch.decode_seqs,
        scale * 1.4426950408889634,  # log2(e)
        HKV=kv_heads,
        GROUP=group,
        PAGE=page,
        ROWS=ROWS,
        CONSUMERS=CONSUMERS,
        BLOCK_N=BLOCK_N,
        HALF=HALF,
        STAGES=STAGES,
        num_warps=4,
    )
