"""What a decode step does beside the model, each in one launch instead of several: where its rows stand and what is in them, what is
kept of it, and which guesses are. Oracle: `ReferenceOps.lay_out`, `.embed`, `.keep_chosen`, `.accept_tree`.

A program takes one sequence or row. These kernels move a few hundred bytes: their time is their launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import launch_options, start_next, wait_for_inputs
from kernels.ops import AcceptedTree, RowLayout, TreeTables

TABLE_BLOCK = 256
HIDDEN_BLOCK = 1024


@triton.jit
def _lay_out_kernel(
    slots_ptr,
    depths_ptr,
    context_ptr,
    last_token_ptr,
    table_ptr,
    tokens_ptr,
    positions_ptr,
    kv_slots_ptr,
    context_len_ptr,
    rows_table_ptr,
    null_slot,
    ADVANCE: tl.constexpr,
    WIDTH: tl.constexpr,
    NODES: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    TABLE_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    start_next(PDL)
    wait_for_inputs(PDL)
    sequence = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + sequence)
    context = tl.load(context_ptr + slot)
    real = slot < null_slot
    table_ptr += slot * WIDTH
    node = tl.arange(0, BLOCK)
    inside = node < NODES
    place = context + node
    block = tl.load(table_ptr + place // PAGE, mask=inside & real, other=0)
    row = sequence * NODES + node
    tl.store(kv_slots_ptr + row, tl.where(real, block * PAGE + place % PAGE, -1), mask=inside)
    tl.store(positions_ptr + row, context + tl.load(depths_ptr + node, mask=inside, other=0), mask=inside)
    tl.store(tokens_ptr + sequence, tl.load(last_token_ptr + slot))
    context_len = tl.where(real, context + NODES, 0)
    tl.store(context_len_ptr + sequence, context_len)
    if ADVANCE:
        tl.store(context_ptr + slot, context_len)  # nobody's stays 0
    for start in range(0, WIDTH, TABLE_BLOCK):
        column = start + tl.arange(0, TABLE_BLOCK)
        entries = tl.load(table_ptr + column, mask=column < WIDTH, other=0)
        tl.store(rows_table_ptr + sequence * WIDTH + column, entries, mask=column < WIDTH)


def lay_out(
    slots: Tensor,
    depths: Tensor,
    context: Tensor,
    last_token: Tensor,
    block_table: Tensor,
    block_size: int,
    advance: bool = False,
) -> RowLayout:
    """See `Ops.lay_out`."""
    count, nodes, width = slots.shape[0], depths.shape[0], block_table.shape[1]

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=slots.device)

    tokens = last_token.new_empty(count)
    rows = RowLayout(tokens, empty(count * nodes), empty(count, nodes), empty(count), empty(count, width))
    if count:
        _lay_out_kernel[(count,)](
            slots,
            depths,
            context,
            last_token,
            block_table,
            rows.tokens,
            rows.positions,
            rows.kv_slots,
            rows.context_len,
            rows.block_table,
            context.shape[0] - 1,
            ADVANCE=advance,
            WIDTH=width,
            NODES=nodes,
            PAGE=block_size,
            BLOCK=triton.next_power_of_2(nodes),
            TABLE_BLOCK=TABLE_BLOCK,
            num_warps=4,
            **launch_options(slots.device),
        )
    return rows


@triton.jit
def _embed_kernel(ids_ptr, weight_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    start_next(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    source = weight_ptr + tl.load(ids_ptr + row).to(tl.int64) * WIDTH
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        tl.store(out_ptr + row * WIDTH + column, tl.load(source + column, mask=column < WIDTH), mask=column < WIDTH)


def embed(ids: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """See `Ops.embed`."""
    rows, width = ids.shape[0], weight.shape[1]
    out = weight.new_empty(rows, width) if out is None else out
    if rows:
        block = min(HIDDEN_BLOCK, triton.next_power_of_2(width))
        _embed_kernel[(rows,)](ids, weight, out, WIDTH=width, BLOCK=block, num_warps=4, **launch_options(ids.device))
    return out


@triton.jit
def _keep_kernel(
    slots_ptr,
    chosen_ptr,
    last_token_ptr,
    hidden_ptr,
    kept_ptr,
    KEPT: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    start_next(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    tl.store(last_token_ptr + slot, tl.load(chosen_ptr + row))
    if KEPT:
        for start in range(0, HIDDEN, HIDDEN_BLOCK):
            column = start + tl.arange(0, HIDDEN_BLOCK)
            values = tl.load(hidden_ptr + row * HIDDEN + column, mask=column < HIDDEN)
            tl.store(kept_ptr + slot * HIDDEN + column, values, mask=column < HIDDEN)


def keep_chosen(
    slots: Tensor, chosen: Tensor, last_token: Tensor, hidden: Tensor | None, kept_hidden: Tensor | None
) -> None:
    """See `Ops.keep_chosen`."""
    kept = hidden is not None and kept_hidden is not None
    if len(slots):
        _keep_kernel[(len(slots),)](
            slots,
            chosen.contiguous(),
            last_token,
            hidden.contiguous() if kept else chosen,
            kept_hidden if kept else last_token,
            KEPT=kept,
            HIDDEN=hidden.shape[1] if kept else 1,
            HIDDEN_BLOCK=HIDDEN_BLOCK,
            num_warps=4,
            **launch_options(slots.device),
        )


@triton.jit
def _accept_kernel(
    slots_ptr,
    tokens_ptr,
    chosen_ptr,
    kv_slots_ptr,
    parents_ptr,
    words_ptr,
    paths_ptr,
    hidden_ptr,
    context_len_ptr,
    context_ptr,
    last_token_ptr,
    kept_ptr,
    ids_ptr,
    source_ptr,
    target_ptr,
    null_slot,
    HIDDEN: tl.constexpr,
    NODES: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PATH_BLOCK: tl.constexpr,
    HIDDEN_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    start_next(PDL)
    wait_for_inputs(PDL)
    sequence = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + sequence)
    row = sequence * NODES
    node = tl.arange(0, BLOCK)
    inside = node < NODES
    token = tl.load(tokens_ptr + row + node, mask=inside, other=-1)
    parent = tl.load(parents_ptr + node, mask=inside, other=0)
    wanted = tl.load(chosen_ptr + row + parent, mask=inside, other=-2)
    matches = inside & ((token == wanted) | (node == 0))
    one = tl.full([BLOCK], 1, tl.int64)
    # A sum of distinct bits is their union.
    union = tl.sum(tl.where(matches, one << node.to(tl.int64), 0), 0)
    word = tl.load(words_ptr + node, mask=inside, other=-1)
    accepted = inside & ((union & word) == word)
    # The deepest, of equals the first. A path's length is the number of its entries.
    step = tl.arange(0, PATH_BLOCK)
    paths = tl.load(
        paths_ptr + node[:, None] * (DEPTH + 1) + step[None, :],
        mask=inside[:, None] & (step <= DEPTH)[None, :],
        other=-1,
    )
    length = tl.sum((paths >= 0).to(tl.int32), 1)
    rank = tl.where(accepted, length * BLOCK + (BLOCK - 1 - node), -1)
    best = tl.max(rank, 0)
    last = BLOCK - 1 - best % BLOCK
    count = best // BLOCK

    on_path = step < count
    path = tl.load(paths_ptr + last * (DEPTH + 1) + step, mask=on_path, other=0)
    token = tl.load(chosen_ptr + row + path, mask=on_path, other=-1)
    tl.store(ids_ptr + sequence * (DEPTH + 1) + step, token, mask=step <= DEPTH)
    moved = on_path & (step > 0) & (path != step)
    source = tl.load(kv_slots_ptr + row + path, mask=on_path, other=0)
    target = tl.load(kv_slots_ptr + row + step, mask=moved, other=-1)
    out = sequence * DEPTH + step - 1
    written = (step > 0) & (step <= DEPTH)
    tl.store(source_ptr + out, source, mask=written)
    tl.store(target_ptr + out, target, mask=written)

    before = tl.load(context_len_ptr + sequence) - NODES
    tl.store(context_ptr + slot, tl.where(slot < null_slot, before + count, 0))
    tl.store(last_token_ptr + slot, tl.load(chosen_ptr + row + last))
    for start in range(0, HIDDEN, HIDDEN_BLOCK):
        column = start + tl.arange(0, HIDDEN_BLOCK)
        values = tl.load(hidden_ptr + (row + last) * HIDDEN + column, mask=column < HIDDEN)
        tl.store(kept_ptr + slot * HIDDEN + column, values, mask=column < HIDDEN)


def accept_tree(
    tree: TreeTables,
    slots: Tensor,
    tokens: Tensor,
    chosen: Tensor,
    kv_slots: Tensor,
    hidden: Tensor,
    context_len: Tensor,
    context: Tensor,
    last_token: Tensor,
    kept_hidden: Tensor,
) -> AcceptedTree:
    """See `Ops.accept_tree`."""
    count, nodes = tokens.shape
    depth = tree.paths.shape[1] - 1
    ids = torch.empty(count, depth + 1, dtype=torch.int64, device=tokens.device)
    source, target = torch.empty(2, count * depth, dtype=torch.int32, device=tokens.device)
    if count:
        _accept_kernel[(count,)](
            slots,
            tokens.contiguous(),
            chosen.contiguous(),
            kv_slots.contiguous(),
            tree.parents,
            tree.words,
            tree.paths,
            hidden.contiguous(),
            context_len,
            context,
            last_token,
            kept_hidden,
            ids,
            source,
            target,
            context.shape[0] - 1,
            HIDDEN=hidden.shape[1],
            NODES=nodes,
            DEPTH=depth,
            BLOCK=max(2, triton.next_power_of_2(nodes)),
            PATH_BLOCK=max(2, triton.next_power_of_2(depth + 1)),
            HIDDEN_BLOCK=HIDDEN_BLOCK,
            num_warps=4,
            **launch_options(tokens.device),
        )
    return AcceptedTree(ids, source, target)
