"""The pieces that `attention_prefill_hopper` is made of: where a tile of rows lies, its loads, its scores, its softmax."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def tiles_of(query_start_ptr, seq, POSITIONS: gl.constexpr):
    """(the sequence's first row, how many it has, the tiles that they make)"""
    query_start = gl.load(query_start_ptr + seq)
    rows = gl.load(query_start_ptr + seq + 1) - query_start
    return query_start, rows, (rows + POSITIONS - 1) // POSITIONS


@gluon.jit
def write_job(job_smem, job_full, buffer, first, kv_head, query_start, rows, before):
    """Tells the consumers of a tile of rows: its first row among the sequence's (-1: there are no more tiles), its KV head, the
    sequence's first row, how many it has, and the positions cached before them."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([8], [32], [1], [0])
    field = gl.arange(0, 8, LAYOUT)
    job = gl.where(field == 0, first, gl.where(field == 1, kv_head, gl.where(field == 2, query_start, rows)))
    job_smem.index(buffer).store(gl.where(field == 4, before, job))
    gl.thread_barrier()
    mbarrier.arrive(job_full.index(buffer), count=1)


@gluon.jit
def read_job(job_smem, buffer):
    """(first, kv_head, query_start, rows, before) as `write_job` was given them"""
    LAYOUT: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])  # every thread has all
    job = job_smem.index(buffer).load(LAYOUT)
    field = gl.arange(0, 8, LAYOUT)
    first = gl.sum(gl.where(field == 0, job, 0), 0)
    kv_head = gl.sum(gl.where(field == 1, job, 0), 0)
    query_start = gl.sum(gl.where(field == 2, job, 0), 0)
    rows = gl.sum(gl.where(field == 3, job, 0), 0)
    return first, kv_head, query_start, rows, gl.sum(gl.where(field == 4, job, 0), 0)


@gluon.jit
def spread(first, rows, before, POSITIONS: gl.constexpr, BLOCK_N: gl.constexpr):
    """(end of the positions that a tile of rows sees, its KV tiles, those of them that need no mask). A padded sequence, whose end is
    ≤ 0, takes one tile, of which it sees nothing."""
    limit = before + gl.minimum(first + POSITIONS, rows)
    return limit, gl.maximum((limit + BLOCK_N - 1) // BLOCK_N, 1), (before + first + 1) // BLOCK_N


@gluon.jit
def load_tile(
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
def start_scores(q_low, q_high, k_smem, stage, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, layout: gl.constexpr):
    """Starts Q·Kᵀ of a tile; to be waited for."""
    scores = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
    low, high = k_smem.index(stage * 2), k_smem.index(stage * 2 + 1)
    scores = warpgroup_mma(q_low, low.permute((1, 0)), scores, use_acc=False, is_async=True)
    return warpgroup_mma(q_high, high.permute((1, 0)), scores, is_async=True)


@gluon.jit
def softmax(
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
def take_turn(order, n, CONSUMER: gl.constexpr):
    """Waits until this consumer may start its n-th products: the two start theirs by turns, so that while one takes the softmax, the
    other's products have the tensor cores to themselves."""
    mbarrier.wait(order.index(CONSUMER), (n & 1) ^ (1 - CONSUMER))


@gluon.jit
def pass_turn(order, CONSUMER: gl.constexpr):
    mbarrier.arrive(order.index(1 - CONSUMER))


@gluon.jit
def own_rows(
    CONSUMER: gl.constexpr, first, rows, query_start, kv_head, HKV: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """(rows of [rows of all, Hq] that are a consumer's of this tile, which of them there are)"""
    row = gl.arange(0, ROWS, layout)
    lane = first + CONSUMER * (ROWS // GROUP) + row // GROUP
    inside = (row < ROWS // GROUP * GROUP) & (lane < rows)
    return (query_start + lane).to(gl.int64) * (HKV * GROUP) + kv_head * GROUP + row % GROUP, inside


@gluon.jit
def store_queries(
    q_ptr, q_smem, place, CONSUMER: gl.constexpr, first, rows, query_start, kv_head, HKV: gl.constexpr, GROUP: gl.constexpr,
    ROWS: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """A consumer's own queries, for groups of heads that no TMA box of whole positions holds."""
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    head_row, inside = own_rows(CONSUMER, first, rows, query_start, kv_head, HKV, GROUP, ROWS, gl.SliceLayout(1, LOAD))
    offset = head_row[:, None] * (2 * HALF) + gl.arange(0, HALF, gl.SliceLayout(0, LOAD))[None, :]
    for half in gl.static_range(2):
        queries = gl.load(q_ptr + offset + half * HALF, mask=inside[:, None], other=0.0)
        q_smem.index(place + half).reshape([ROWS, HALF]).store(queries)
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def clear_stale(v_smem, stage, start, limit, BLOCK_N: gl.constexpr):
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
def consume_tile(
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
    order,
    position,
    scale,
    CONSUMER: gl.constexpr,
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
    take_turn(order, n - 1, CONSUMER)
    scores = start_scores(q_low, q_high, k_smem, stage, ROWS, BLOCK_N, S_LAYOUT)
    before = (n - 1) % STAGES
    mbarrier.wait(v_full.index(before), ((n - 1) // STAGES) & 1)
    low = warpgroup_mma(weights, v_smem.index(before * 2), low, is_async=True)
    high = warpgroup_mma(weights, v_smem.index(before * 2 + 1), high, is_async=True)
    pass_turn(order, CONSUMER)
    scores = warpgroup_mma_wait(2, deps=[scores])
    mbarrier.arrive(k_empty.index(stage))
    next_weights, keep, peak, total = softmax(
        scores, peak, total, position, (tiles - 1 - i) * BLOCK_N, scale, MASKED, BLOCK_N, S_LAYOUT
    )
    low, high, weights = warpgroup_mma_wait(0, deps=[low, high, weights])
    mbarrier.arrive(v_empty.index(before))
    keep = gl.convert_layout(keep, gl.SliceLayout(1, O_LAYOUT))[:, None]
    weights = gl.convert_layout(next_weights.to(weights.dtype), P_LAYOUT)
    return low * keep, high * keep, weights, peak, total
