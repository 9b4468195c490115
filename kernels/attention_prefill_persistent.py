"""Prefill attention for Hopper as `attention_prefill_hopper`, by programs that stay: each takes one tile of rows after the other.

Of a short sequence the beginning and the end of each tile cost as much as its middle: the queries' load, the first scores, which
no product hides, and the last product, which hides nothing. Here a tile's queries are loaded by TMA while the one before is worked
on, and its first scores are computed beneath the last product of that one, its division by the sums, and its store.

The order is that of the other kernel's grid: the tiles of a head one after the other, the longest first, so that the programs read
the same keys and values at the same time.
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

from kernels import attention_prefill_hopper as hopper
from kernels.attention_prefill_hopper import (
    BLOCK_N,
    CONSUMERS,
    HALF,
    ROWS,
    STAGES,
    _clear_stale,
    _consume_tile,
    _load_tile,
    _softmax,
    _spread,
    _start_scores,
    cache_descriptor,
)
from kernels.ops import AttentionBatch


@gluon.jit
def _locate(number, query_start_ptr, context_len_ptr, first_seq, row_tiles, HKV: gl.constexpr, POSITIONS: gl.constexpr):
    """The tile of rows with this number: (its first row among the sequence's, KV head, sequence, the sequence's first row, how many it
    has, positions cached before them)"""
    pair = number // row_tiles
    first = (row_tiles - 1 - number % row_tiles) * POSITIONS
    seq = first_seq + pair // HKV
    query_start = gl.load(query_start_ptr + seq)
    rows = gl.load(query_start_ptr + seq + 1) - query_start
    before = gl.load(context_len_ptr + seq) - rows
    return first, pair % HKV, seq, query_start, rows, before


@gluon.jit
def _seek(
    number,
    total,
    step,
    query_start_ptr,
    context_len_ptr,
    first_seq,
    row_tiles,
    HKV: gl.constexpr,
    POSITIONS: gl.constexpr,
):
    """The first of number, number + step, … whose sequence has rows there; `total` or more: there is none."""
    searching = number < total
    while searching:
        first, _, _, _, rows, _ = _locate(
            number, query_start_ptr, context_len_ptr, first_seq, row_tiles, HKV, POSITIONS
        )
        empty = first >= rows
        number += step * empty.to(gl.int32)
        searching = empty & (number < total)
    return number


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, query_start_ptr, context_len_ptr, table_ptr, table_stride, q_smem, k_smem, v_smem,
    q_full, q_empty, k_full, k_empty, v_full, v_empty, first_seq, row_tiles, number, total, step,
    HKV: gl.constexpr, GROUP: gl.constexpr, PAGE: gl.constexpr, POSITIONS: gl.constexpr, ROWS: gl.constexpr,
    CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    n = 0
    turn = 0
    number = _seek(number, total, step, query_start_ptr, context_len_ptr, first_seq, row_tiles, HKV, POSITIONS)
    while number < total:
        first, kv_head, seq, query_start, rows, before = _locate(
            number, query_start_ptr, context_len_ptr, first_seq, row_tiles, HKV, POSITIONS
        )
        limit, tiles, _ = _spread(first, rows, before, POSITIONS, BLOCK_N)
        last_page = gl.maximum((limit - 1) // PAGE, 0)
        pages = table_ptr + seq.to(gl.int64) * table_stride
        buffer = turn % 2
        mbarrier.wait(q_empty.index(buffer), ((turn // 2) & 1) ^ 1)
        mbarrier.expect(q_full.index(buffer), CONSUMERS * ROWS * 2 * HALF * 2)
        for consumer in gl.static_range(CONSUMERS):
            for half in gl.static_range(2):
                q_target = q_smem.index((buffer * CONSUMERS + consumer) * 2 + half)
                place = [query_start + first + consumer * (ROWS // GROUP), kv_head * GROUP, half * HALF]
                tma.async_copy_global_to_shared(q_desc, place, q_full.index(buffer), q_target)
        for i in range(tiles):
            page = (tiles - 1 - i) * (BLOCK_N // PAGE)
            _load_tile(k_desc, pages, k_smem, k_full, k_empty, n, page, last_page, kv_head, PAGE, BLOCK_N, HALF, STAGES)
            _load_tile(v_desc, pages, v_smem, v_full, v_empty, n, page, last_page, kv_head, PAGE, BLOCK_N, HALF, STAGES)
            n += 1
        turn += 1
        number = _seek(
            number + step, total, step, query_start_ptr, context_len_ptr, first_seq, row_tiles, HKV, POSITIONS
        )


@gluon.jit
def _consume(
    CONSUMER: gl.constexpr, out_ptr, query_start_ptr, context_len_ptr, q_smem, k_smem, v_smem,
    q_full, q_empty, k_full, k_empty, v_full, v_empty, first_seq, row_tiles, number, total, step, scale,
    HKV: gl.constexpr, GROUP: gl.constexpr, POSITIONS: gl.constexpr, ROWS: gl.constexpr, CONSUMERS: gl.constexpr,
    BLOCK_N: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The rows CONSUMER * ROWS onwards of all tiles of this program."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    D: gl.constexpr = 2 * HALF
    dtype: gl.constexpr = out_ptr.dtype.element_ty

    n = 0  # KV tiles before this one's first
    turn = 0  # tiles of rows before this one
    number = _seek(number, total, step, query_start_ptr, context_len_ptr, first_seq, row_tiles, HKV, POSITIONS)
    mbarrier.wait(q_full.index(0), 0, pred=number < total)
    mbarrier.wait(k_full.index(0), 0, pred=number < total)
    first_low = q_smem.index(CONSUMER * 2).reshape([ROWS, HALF])
    first_high = q_smem.index(CONSUMER * 2 + 1).reshape([ROWS, HALF])
    scores = _start_scores(first_low, first_high, k_smem, 0, ROWS, BLOCK_N, S_LAYOUT)
    while number < total:
        first, kv_head, _, query_start, rows, before = _locate(
            number, query_start_ptr, context_len_ptr, first_seq, row_tiles, HKV, POSITIONS
        )
        limit, tiles, whole = _spread(first, rows, before, POSITIONS, BLOCK_N)
        own = ((turn % 2) * CONSUMERS + CONSUMER) * 2
        q_low = q_smem.index(own).reshape([ROWS, HALF])
        q_high = q_smem.index(own + 1).reshape([ROWS, HALF])
        r = CONSUMER * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))
        position = before + first + r // GROUP
        peak = gl.full([ROWS], -float("inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
        sums = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, S_LAYOUT))

        stage = n % STAGES
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(k_empty.index(stage))
        start = (tiles - 1) * BLOCK_N
        weights, _, peak, sums = _softmax(scores, peak, sums, position, start, scale, True, BLOCK_N, S_LAYOUT)
        weights = gl.convert_layout(weights.to(dtype), P_LAYOUT)
        mbarrier.wait(v_full.index(stage), (n // STAGES) & 1)
        if start + BLOCK_N > limit:
            _clear_stale(v_smem, stage, start, limit, BLOCK_N)

        low = gl.zeros([ROWS, HALF], gl.float32, O_LAYOUT)
        high = gl.zeros([ROWS, HALF], gl.float32, O_LAYOUT)
        state = low, high, weights, peak, sums
        masked = gl.maximum(tiles - whole, 1)
        for i in range(1, masked):
            state = _consume_tile(
                state, i, n + i, tiles, q_low, q_high, k_smem, v_smem, k_full, k_empty, v_full, v_empty, position, scale,
                True, ROWS, BLOCK_N, STAGES, S_LAYOUT, O_LAYOUT, P_LAYOUT,
            )  # fmt: skip
        for i in range(masked, tiles):
            state = _consume_tile(
                state, i, n + i, tiles, q_low, q_high, k_smem, v_smem, k_full, k_empty, v_full, v_empty, position, scale,
                False, ROWS, BLOCK_N, STAGES, S_LAYOUT, O_LAYOUT, P_LAYOUT,
            )  # fmt: skip
        low, high, weights, peak, sums = state
        mbarrier.arrive(q_empty.index(turn % 2))  # all of this tile's scores are there
        n += tiles
        turn += 1
        number = _seek(
            number + step, total, step, query_start_ptr, context_len_ptr, first_seq, row_tiles, HKV, POSITIONS
        )

        last = (n - 1) % STAGES
        mbarrier.wait(v_full.index(last), ((n - 1) // STAGES) & 1)
        low = warpgroup_mma(weights, v_smem.index(last * 2), low, is_async=True)
        high = warpgroup_mma(weights, v_smem.index(last * 2 + 1), high, is_async=True)
        # The next tile's first scores. After the last tile they are those of whatever lies there, and nobody looks at them.
        mbarrier.wait(q_full.index(turn % 2), (turn // 2) & 1, pred=number < total)
        mbarrier.wait(k_full.index(n % STAGES), (n // STAGES) & 1, pred=number < total)
        following = ((turn % 2) * CONSUMERS + CONSUMER) * 2
        next_low = q_smem.index(following).reshape([ROWS, HALF])
        next_high = q_smem.index(following + 1).reshape([ROWS, HALF])
        scores = _start_scores(next_low, next_high, k_smem, n % STAGES, ROWS, BLOCK_N, S_LAYOUT)
        low, high, weights = warpgroup_mma_wait(2, deps=[low, high, weights])
        mbarrier.arrive(v_empty.index(last))

        sums = gl.convert_layout(sums, gl.SliceLayout(1, O_LAYOUT))
        share = (1.0 / gl.where(sums == 0, 1.0, sums))[:, None]
        row = CONSUMER * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, O_LAYOUT))
        column = gl.arange(0, HALF, gl.SliceLayout(0, O_LAYOUT))[None, :]
        lane = first + row // GROUP
        inside = (lane < rows)[:, None]
        head_row = (query_start + lane).to(gl.int64) * (HKV * GROUP) + kv_head * GROUP + row % GROUP
        offset = head_row[:, None] * D + column
        gl.store(out_ptr + offset, (low * share).to(dtype), mask=inside)
        gl.store(out_ptr + offset + HALF, (high * share).to(dtype), mask=inside)
    warpgroup_mma_wait(0, deps=[scores])


@gluon.jit
def _prefill_persistent_kernel(
    q_desc,
    k_desc,
    v_desc,
    out_ptr,
    query_start_ptr,
    context_len_ptr,
    block_table_ptr,
    table_stride,
    first_seq,
    row_tiles,
    total,
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
    number = gl.program_id(0)
    step = gl.num_programs(0)
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    q_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_smem = gl.allocate_shared_memory(dtype, [2 * CONSUMERS * 2, ROWS // GROUP, GROUP, HALF], q_layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES * 2, BLOCK_N, HALF], layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES * 2, BLOCK_N, HALF], layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for buffer in gl.static_range(2):
        mbarrier.init(q_full.index(buffer), count=1)
        mbarrier.init(q_empty.index(buffer), count=CONSUMERS)
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
                0, out_ptr, query_start_ptr, context_len_ptr, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty,
                v_full, v_empty, first_seq, row_tiles, number, total, step, scale, HKV, GROUP, POSITIONS, ROWS, CONSUMERS,
                BLOCK_N, HALF, STAGES,
            )),
            (_consume, (
                1, out_ptr, query_start_ptr, context_len_ptr, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty,
                v_full, v_empty, first_seq, row_tiles, number, total, step, scale, HKV, GROUP, POSITIONS, ROWS, CONSUMERS,
                BLOCK_N, HALF, STAGES,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, query_start_ptr, context_len_ptr, block_table_ptr, table_stride, q_smem, k_smem,
                v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, first_seq, row_tiles, number, total, step, HKV,
                GROUP, PAGE, POSITIONS, ROWS, CONSUMERS, BLOCK_N, HALF, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def fits(q: Tensor, k_cache: Tensor, window: int) -> bool:
    """What `attention_prefill_hopper` takes, if a consumer's rows are whole positions."""
    group = q.shape[1] // k_cache.shape[-2]
    return hopper.fits(q, k_cache, window) and group <= ROWS and ROWS % group == 0


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def prefill_attention_persistent(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, scale: float, out: Tensor
) -> None:
    """As `prefill_attention`, for what `fits`, on a GPU of capability 9.0."""
    sequences = batch.context_len.shape[0] - batch.decode_seqs
    if sequences <= 0 or batch.max_query <= 0:
        return
    page, kv_heads, head_dim = k_cache.shape[1:]
    rows, heads, _ = q.shape
    group = heads // kv_heads
    k_desc, v_desc = cache_descriptor(k_cache), cache_descriptor(v_cache)
    q_layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    tile = [ROWS // group, group, HALF]
    q_desc = TensorDescriptor(q, [rows, heads, head_dim], [heads * head_dim, head_dim, 1], tile, q_layout)
    row_tiles = triton.cdiv(batch.max_query, CONSUMERS * ROWS // group)
    total = row_tiles * kv_heads * sequences
    _prefill_persistent_kernel[(min(total, _processors(q.device)),)](
        q_desc,
        k_desc,
        v_desc,
        out,
        batch.query_start,
        batch.context_len,
        batch.block_table,
        batch.block_table.stride(0),
        batch.decode_seqs,
        row_tiles,
        total,
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
