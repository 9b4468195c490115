"""Moves rows of the KV cache: the accepted nodes of a speculation tree into place. Oracle: `ReferenceOps.move_kv`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS_PER_STEP = 32
COLUMNS = 128


@triton.jit
def _move_kernel(
    k_ptr, v_ptr, source_ptr, target_ptr, count, layer_stride, WIDTH, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """One program for some columns of one layer's keys or values: it moves all rows, so no other program can be in its way."""
    layer = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    cache_ptr = (k_ptr if tl.program_id(2) == 0 else v_ptr) + layer * layer_stride
    for start in range(0, count, ROWS):
        index = start + tl.arange(0, ROWS)
        source = tl.load(source_ptr + index, mask=index < count, other=-1).to(tl.int64)
        target = tl.load(target_ptr + index, mask=index < count, other=-1).to(tl.int64)
        moved = (target >= 0)[:, None] & (column < WIDTH)[None, :]
        rows = tl.load(cache_ptr + source[:, None] * WIDTH + column[None, :], mask=moved)
        # A row of this step may be the target of a later row of the same step: all are read before any is written.
        tl.debug_barrier()
        tl.store(cache_ptr + target[:, None] * WIDTH + column[None, :], rows, mask=moved)
        tl.debug_barrier()


def move_kv(k_cache: Tensor, v_cache: Tensor, source: Tensor, target: Tensor) -> None:
    """See `Ops.move_kv`; both caches contiguous and alike."""
    count = source.shape[0]
    if count == 0:
        return
    width = k_cache.shape[-1] * k_cache.shape[-2]
    layer_stride = width * k_cache.shape[-3] * k_cache.shape[-4]
    layers = k_cache.numel() // layer_stride
    _move_kernel[(layers, triton.cdiv(width, COLUMNS), 2)](
        k_cache, v_cache, source, target, count, layer_stride, width, ROWS=ROWS_PER_STEP, COLUMNS=COLUMNS, num_warps=4
    )
