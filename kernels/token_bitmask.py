"""Forbids tokens by bit sets, one for each row that has any. Oracle: `ReferenceOps.apply_token_bitmask`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BITMASK_BLOCK = 4096


@triton.jit
def _token_bitmask_kernel(logits_ptr, masks_ptr, mask_rows_ptr, V, WORDS, BLOCK: tl.constexpr):
    """Nothing is read of the logits: what is forbidden is written over."""
    row = tl.program_id(0).to(tl.int64)
    mask_row = tl.load(mask_rows_ptr + row).to(tl.int64)
    if mask_row < 0:
        return
    word = tl.program_id(1) * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
    words = tl.load(masks_ptr + mask_row * WORDS + word, mask=word < WORDS, other=0)
    bit = tl.arange(0, 32)
    allowed = (words[:, None] >> bit[None, :]) & 1
    token = word[:, None] * 32 + bit[None, :]
    lowest = tl.full((BLOCK // 32, 32), -float("inf"), logits_ptr.dtype.element_ty)
    tl.store(logits_ptr + row * V + token, lowest, mask=(token < V) & (allowed == 0))


def apply_token_bitmask(logits: Tensor, masks: Tensor, mask_rows: Tensor) -> Tensor:
    """See `Ops.apply_token_bitmask`; logits and masks must be contiguous."""
    rows, vocabulary = logits.shape
    if rows:
        _token_bitmask_kernel[(rows, triton.cdiv(vocabulary, BITMASK_BLOCK))](
            logits, masks, mask_rows, vocabulary, masks.shape[1], BLOCK=BITMASK_BLOCK, num_warps=4
        )
    return logits
