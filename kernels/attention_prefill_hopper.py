"""Prefill attention for Hopper in Gluon: one producer warp feeds two warpgroups by TMA. Oracle: `ReferenceOps.attention`.

The plan is FlashAttention-3's (Shah et al. 2024, arXiv 2407.08608): each consumer warpgroup owns 64 rows, and multiplies the
next tile's keys while it takes the softmax of this one; the two start their products by turns. Rows are packed and tiles chosen as
in `attention_prefill`, but the tiles run from the diagonal backwards: those that need a mask come first.

Programs stay, and take one tile of rows after the other. Of a short sequence the beginning and the end of each tile cost as much as
its middle: the queries' load, the first scores, which no product hides, and the last product, which hides nothing. Here a tile's
queries are loaded while the one before is worked on, and its first scores are computed beneath the last product of that one, its
division by the sums, and its store. Who is done takes the next tile from a counter: those of a sequence follow one another, the
longest first, so that some programs read the same keys and values at the same time, and all end at about the same time.

A tile of 128 positions spans 128 / P blocks. Keys and values are kept as halves of 64 dimensions: a half's row is then one
swizzle line of 128 bytes, and a block's rows are a contiguous part of it which one TMA box can fill.
"""

from __future__ import annotations

from functools import cache

import torch
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

from kernels.attention_prefill_hopper_tiles import (
    clear_stale,
    consume_tile,
    load_tile,
    own_rows,
    pass_turn,
    read_job,
    softmax,
    spread,
    start_scores,
    store_queries,
    take_turn,
    tiles_of,
    write_job,
)
from kernels.ops import AttentionBatch

ROWS = 64  # of a consumer: the M of a warpgroup's product
CONSUMERS = 2
BLOCK_N = 128
HALF = 64
HEAD_DIM = 128
STAGES = 2


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, query_start_ptr, context_len_ptr, table_ptr, counter_ptr, table_stride, job_smem, q_smem, k_smem,
    v_smem, job_full, q_full, q_empty, k_full, k_empty, v_full, v_empty, first_seq, sequences, HKV: gl.constexpr,
    GROUP: gl.constexpr, PAGE: gl.constexpr, POSITIONS: gl.constexpr, ROWS: gl.constexpr, CONSUMERS: gl.constexpr,
    BLOCK_N: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Takes one tile of rows after the other, tells of it, and loads what it needs."""
    n = 0
    turn = 0
    seq = first_seq
    end = first_seq + sequences
    earlier = 0  # tiles of the sequences before seq, times KV heads
    number = gl.program_id(0)
    query_start, rows, row_tiles = tiles_of(query_start_ptr, seq, POSITIONS)
    going = True
    while going:
        while (number - earlier >= row_tiles * HKV) & (seq < end):
            earlier += row_tiles * HKV
            seq += 1
            query_start, rows, row_tiles = tiles_of(query_start_ptr, gl.minimum(seq, end - 1), POSITIONS)
        going = seq < end
        buffer = turn % 2
        mbarrier.wait(q_empty.index(buffer), ((turn // 2) & 1) ^ 1)
        if going:
            first = (row_tiles - 1 - (number - earlier) // HKV) * POSITIONS
            kv_head = (number - earlier) % HKV
            before = gl.load(context_len_ptr + seq) - rows
            write_job(job_smem, job_full, buffer, first, kv_head, query_start, rows, before)
            limit, tiles, _ = spread(first, rows, before, POSITIONS, BLOCK_N)
            last_page = gl.maximum((limit - 1) // PAGE, 0)
            pages = table_ptr + seq.to(gl.int64) * table_stride
            if ROWS % GROUP == 0:
                mbarrier.expect(q_full.index(buffer), CONSUMERS * ROWS * 2 * HALF * 2)
                for consumer in gl.static_range(CONSUMERS):
                    for half in gl.static_range(2):
                        q_target = q_smem.index((buffer * CONSUMERS + consumer) * 2 + half)
                        place = [query_start + first + consumer * (ROWS // GROUP), kv_head * GROUP, half * HALF]
                        tma.async_copy_global_to_shared(q_desc, place, q_full.index(buffer), q_target)
            for i in range(tiles):
                page = (tiles - 1 - i) * (BLOCK_N // PAGE)
                load_tile(
                    k_desc, pages, k_smem, k_full, k_empty, n, page, last_page, kv_head, PAGE, BLOCK_N, HALF, STAGES
                )
                load_tile(
                    v_desc, pages, v_smem, v_full, v_empty, n, page, last_page, kv_head, PAGE, BLOCK_N, HALF, STAGES
                )
                n += 1
            turn += 1
            number = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1)
        else:
            write_job(job_smem, job_full, buffer, -1, 0, 0, -1, 0)  # of no rows: whoever stores its queries loads none
    # The last to leave makes the counters ready for the next launch: everybody has taken its last number by then.
    if gl.atomic_add(counter_ptr + 1, 1) == gl.num_programs(0) - 1:
        gl.store(counter_ptr, 0)
        gl.store(counter_ptr + 1, 0)


@gluon.jit
def _consume(
    CONSUMER: gl.constexpr, q_ptr, out_ptr, job_smem, q_smem, k_smem, v_smem, job_full, q_full, q_empty, k_full, k_empty,
    v_full, v_empty, order, scale, HKV: gl.constexpr, GROUP: gl.constexpr, POSITIONS: gl.constexpr, ROWS: gl.constexpr,
    CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """This consumer's rows of all tiles of this program, see own_rows."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    D: gl.constexpr = 2 * HALF
    BY_TMA: gl.constexpr = ROWS % GROUP == 0
    dtype: gl.constexpr = out_ptr.dtype.element_ty

    n = 0  # KV tiles before this one's first
    turn = 0  # tiles of rows before this one
    mbarrier.wait(job_full.index(0), 0)
    first, kv_head, query_start, rows, before = read_job(job_smem, 0)
    if BY_TMA:
        mbarrier.wait(q_full.index(0), 0, pred=first >= 0)
    else:
        store_queries(q_ptr, q_smem, CONSUMER * 2, CONSUMER, first, rows, query_start, kv_head, HKV, GROUP, ROWS, HALF)
    mbarrier.wait(k_full.index(0), 0, pred=first >= 0)
    first_low = q_smem.index(CONSUMER * 2).reshape([ROWS, HALF])
    first_high = q_smem.index(CONSUMER * 2 + 1).reshape([ROWS, HALF])
    scores = start_scores(first_low, first_high, k_smem, 0, ROWS, BLOCK_N, S_LAYOUT)
    while first >= 0:
        limit, tiles, whole = spread(first, rows, before, POSITIONS, BLOCK_N)
        own = ((turn % 2) * CONSUMERS + CONSUMER) * 2
        q_low = q_smem.index(own).reshape([ROWS, HALF])
        q_high = q_smem.index(own + 1).reshape([ROWS, HALF])
        r = gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))
        position = before + first + CONSUMER * (ROWS // GROUP) + r // GROUP
        peak = gl.full([ROWS], -float("inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
        sums = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, S_LAYOUT))

        stage = n % STAGES
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(k_empty.index(stage))
        start = (tiles - 1) * BLOCK_N
        weights, _, peak, sums = softmax(scores, peak, sums, position, start, scale, True, BLOCK_N, S_LAYOUT)
        weights = gl.convert_layout(weights.to(dtype), P_LAYOUT)
        mbarrier.wait(v_full.index(stage), (n // STAGES) & 1)
        if start + BLOCK_N > limit:
            clear_stale(v_smem, stage, start, limit, BLOCK_N)

        low = gl.zeros([ROWS, HALF], gl.float32, O_LAYOUT)
        high = gl.zeros([ROWS, HALF], gl.float32, O_LAYOUT)
        state = low, high, weights, peak, sums
        masked = gl.maximum(tiles - whole, 1)
        for i in range(1, masked):
            state = consume_tile(
                state, i, n + i, tiles, q_low, q_high, k_smem, v_smem, k_full, k_empty, v_full, v_empty, order, position,
                scale, CONSUMER, True, ROWS, BLOCK_N, STAGES, S_LAYOUT, O_LAYOUT, P_LAYOUT,
            )  # fmt: skip
        for i in range(masked, tiles):
            state = consume_tile(
                state, i, n + i, tiles, q_low, q_high, k_smem, v_smem, k_full, k_empty, v_full, v_empty, order, position,
                scale, CONSUMER, False, ROWS, BLOCK_N, STAGES, S_LAYOUT, O_LAYOUT, P_LAYOUT,
            )  # fmt: skip
        low, high, weights, peak, sums = state
        mbarrier.arrive(q_empty.index(turn % 2))  # all of this tile's scores are there, and its job was read
        n += tiles
        turn += 1
        mbarrier.wait(job_full.index(turn % 2), (turn // 2) & 1)
        next_first, next_head, next_start, next_rows, next_before = read_job(job_smem, turn % 2)

        last = (n - 1) % STAGES
        mbarrier.wait(v_full.index(last), ((n - 1) // STAGES) & 1)
        take_turn(order, n - 1, CONSUMER)
        low = warpgroup_mma(weights, v_smem.index(last * 2), low, is_async=True)
        high = warpgroup_mma(weights, v_smem.index(last * 2 + 1), high, is_async=True)
        # The next tile's first scores. After the last tile they are those of whatever lies there, and nobody looks at them.
        following = ((turn % 2) * CONSUMERS + CONSUMER) * 2
        if BY_TMA:
            mbarrier.wait(q_full.index(turn % 2), (turn // 2) & 1, pred=next_first >= 0)
        else:
            store_queries(
                q_ptr, q_smem, following, CONSUMER, next_first, next_rows, next_start, next_head, HKV, GROUP, ROWS, HALF
            )
        mbarrier.wait(k_full.index(n % STAGES), (n // STAGES) & 1, pred=next_first >= 0)
        next_low = q_smem.index(following).reshape([ROWS, HALF])
        next_high = q_smem.index(following + 1).reshape([ROWS, HALF])
        scores = start_scores(next_low, next_high, k_smem, n % STAGES, ROWS, BLOCK_N, S_LAYOUT)
        pass_turn(order, CONSUMER)
        low, high, weights = warpgroup_mma_wait(2, deps=[low, high, weights])
        mbarrier.arrive(v_empty.index(last))

        sums = gl.convert_layout(sums, gl.SliceLayout(1, O_LAYOUT))
        share = (1.0 / gl.where(sums == 0, 1.0, sums))[:, None]
        head_row, inside = own_rows(
            CONSUMER, first, rows, query_start, kv_head, HKV, GROUP, ROWS, gl.SliceLayout(1, O_LAYOUT)
        )
        offset = head_row[:, None] * D + gl.arange(0, HALF, gl.SliceLayout(0, O_LAYOUT))[None, :]
        gl.store(out_ptr + offset, (low * share).to(dtype), mask=inside[:, None])
        gl.store(out_ptr + offset + HALF, (high * share).to(dtype), mask=inside[:, None])
        first, kv_head, query_start, rows, before = next_first, next_head, next_start, next_rows, next_before
    warpgroup_mma_wait(0, deps=[scores])


@gluon.jit(do_not_specialize=["table_stride", "first_seq", "sequences"])
def _prefill_hopper_kernel(
    q_ptr,
    q_desc,
    k_desc,
    v_desc,
    out_ptr,
    query_start_ptr,
    context_len_ptr,
    block_table_ptr,
    counter_ptr,
    table_stride,
    first_seq,
    sequences,
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
    POSITIONS: gl.constexpr = CONSUMERS * (ROWS // GROUP)
    BY_TMA: gl.constexpr = ROWS % GROUP == 0
    Q_HEADS: gl.constexpr = GROUP if BY_TMA else 1
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    q_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_smem = gl.allocate_shared_memory(dtype, [2 * CONSUMERS * 2, ROWS // Q_HEADS, Q_HEADS, HALF], q_layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES * 2, BLOCK_N, HALF], layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES * 2, BLOCK_N, HALF], layout)
    job_smem = gl.allocate_shared_memory(gl.int32, [2, 8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    job_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    order = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for buffer in gl.static_range(2):
        mbarrier.init(job_full.index(buffer), count=1)
        mbarrier.init(q_full.index(buffer), count=1)
        mbarrier.init(q_empty.index(buffer), count=CONSUMERS)
    for consumer in gl.static_range(CONSUMERS):
        mbarrier.init(order.index(consumer), count=1)
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
                0, q_ptr, out_ptr, job_smem, q_smem, k_smem, v_smem, job_full, q_full, q_empty, k_full, k_empty, v_full,
                v_empty, order, scale, HKV, GROUP, POSITIONS, ROWS, CONSUMERS, BLOCK_N, HALF, STAGES,
            )),
            (_consume, (
                1, q_ptr, out_ptr, job_smem, q_smem, k_smem, v_smem, job_full, q_full, q_empty, k_full, k_empty, v_full,
                v_empty, order, scale, HKV, GROUP, POSITIONS, ROWS, CONSUMERS, BLOCK_N, HALF, STAGES,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, query_start_ptr, context_len_ptr, block_table_ptr, counter_ptr, table_stride, job_smem,
                q_smem, k_smem, v_smem, job_full, q_full, q_empty, k_full, k_empty, v_full, v_empty, first_seq, sequences, HKV,
                GROUP, PAGE, POSITIONS, ROWS, CONSUMERS, BLOCK_N, HALF, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def fits(q: Tensor, k_cache: Tensor, window: int) -> bool:
    """Whether this kernel takes the case: 16-bit heads of 128, blocks of 8 to 128 tokens, no window, a small enough group."""
    page, kv_heads, head_dim = k_cache.shape[-3:]
    narrow = head_dim == HEAD_DIM and k_cache.element_size() == 2 and window == 0
    return narrow and 8 <= page <= BLOCK_N and BLOCK_N % page == 0 and q.shape[1] // kv_heads <= ROWS


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def new_counters(device: torch.device | str) -> Tensor:
    """Zeros [2] int32 between launches: the tiles taken beyond the first of each program, and the programs that have ended. For
    launches that follow one another. Not to be made while a graph is captured, whose own memory is used for other things."""
    return torch.zeros(2, dtype=torch.int32, device=device)


def _cache_descriptor(cache: Tensor) -> TensorDescriptor:
    """Keys or values [B, P, Hkv, D] as rows of all heads, in boxes of half a head's dimensions of one block."""
    blocks, page, kv_heads, head_dim = cache.shape
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    width = kv_heads * head_dim
    return TensorDescriptor(cache, [blocks * page, width], [width, 1], [page, HALF], layout)


def _query_descriptor(q: Tensor, group: int) -> TensorDescriptor:
    """Queries [N, Hq, D], in boxes of half the dimensions of a consumer's rows; of a group that does not divide them none is loaded."""
    rows, heads, head_dim = q.shape
    group = group if ROWS % group == 0 else 1
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    tile = [ROWS // group, group, HALF]
    return TensorDescriptor(q, [rows, heads, head_dim], [heads * head_dim, head_dim, 1], tile, layout)


def prefill_attention_hopper(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    out: Tensor,
    counters: Tensor,
) -> None:
    """As `prefill_attention`, for what `fits`, on a GPU of capability 9.0. counters: see `new_counters`."""
    sequences = batch.context_len.shape[0] - batch.decode_seqs
    if sequences <= 0 or batch.max_query <= 0:
        return
    page, kv_heads = k_cache.shape[1:3]
    group = q.shape[1] // kv_heads
    most = triton.cdiv(batch.max_query, CONSUMERS * (ROWS // group)) * kv_heads * sequences
    _prefill_hopper_kernel[(min(most, _processors(q.device)),)](
        q,
        _query_descriptor(q, group),
        _cache_descriptor(k_cache),
        _cache_descriptor(v_cache),
        out,
        batch.query_start,
        batch.context_len,
        batch.block_table,
        counters,
        batch.block_table.stride(0),
        batch.decode_seqs,
        sequences,
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
