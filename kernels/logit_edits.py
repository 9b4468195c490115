"""Bias and bans of single tokens, some of them only behind other tokens. Oracle: `ReferenceOps.edit_logits`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.ops import LogitEdits


@triton.jit
def _edit_kernel(
    logits_ptr,
    ids_ptr,
    values_ptr,
    until_ptr,
    words_ptr,
    prefixes_ptr,
    edit_rows_ptr,
    position_ptr,
    recent_ptr,
    V,
    E,
    W,
    L: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(edit_rows_ptr + row).to(tl.int64)
    if slot < 0:
        return
    logits_ptr += row * V
    edit = tl.arange(0, BLOCK_E)
    token = tl.load(ids_ptr + slot * E + edit, mask=edit < E, other=-1)
    until = tl.load(until_ptr + slot * E + edit, mask=edit < E, other=0)
    value = tl.load(values_ptr + slot * E + edit, mask=edit < E, other=0.0)
    # A token may have a bias and be banned beside: sums come out the same in any order.
    tl.atomic_add(logits_ptr + token, value, mask=(token >= 0) & (tl.load(position_ptr + row) < until), sem="relaxed")
    word = tl.arange(0, BLOCK_W)
    last = tl.load(words_ptr + slot * W + word, mask=word < W, other=-1)
    place = tl.arange(0, L)
    recent = tl.load(recent_ptr + row * L + place)
    prefix = tl.load(prefixes_ptr + (slot * W + word[:, None]) * L + place[None, :], mask=(word < W)[:, None], other=-1)
    different = (prefix >= 0) & (prefix != recent[None, :])
    behind = tl.sum(different.to(tl.int32), 1) == 0
    ban = tl.full([BLOCK_W], -float("inf"), tl.float32)
    tl.atomic_add(logits_ptr + last, ban, mask=(last >= 0) & behind, sem="relaxed")


def edit_logits(logits: Tensor, edits: LogitEdits, edit_rows: Tensor, position: Tensor, recent: Tensor) -> Tensor:
    """See `Ops.edit_logits`; logits must be contiguous."""
    rows, vocabulary = logits.shape
    number, words = edits.ids.shape[1], edits.words.shape[1]
    if rows:
        _edit_kernel[(rows,)](
            logits,
            edits.ids,
            edits.values,
            edits.until,
            edits.words,
            edits.prefixes,
            edit_rows,
            position,
            recent,
            vocabulary,
            number,
            words,
            L=edits.prefixes.shape[2],
            BLOCK_E=triton.next_power_of_2(number),
            BLOCK_W=triton.next_power_of_2(words),
            num_warps=4,
        )
    return logits
