"""What Medusa heads do in a step: residual blocks of all heads, and from their logits the tokens of a tree's nodes.
Oracle: `ReferenceOps.residual_block`, `.linear_each`, `.guess_tokens`.

The heads' likeliest tokens come without a sort: a warp takes the best of its chunk of the vocabulary one after the other, a second
kernel does the same with what the chunks found. Tokens are compared as 64-bit keys, logit before id, so no two are equal.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import launch_options, start_next, wait_for_inputs
from kernels.eight_bit import EightBit
from kernels.skinny_gemm import PREFETCH_BYTES, prefetch
from kernels.token_scores import ordered_key

BLOCK_N = 32
CHUNK = 1024
NO_KEY = tl.constexpr(-(1 << 63))


@triton.jit(do_not_specialize=["R"])
def _heads_kernel(
    x_ptr,
    slots_ptr,
    weight_ptr,
    factors_ptr,
    bias_ptr,
    out_ptr,
    R,
    N,
    K,
    head_stride,
    GATHER: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile of one head's weight [N, K] × x; with RESIDUAL x + SiLU of it plus a bias, N = K. EIGHT_BIT: the weight's rows are whole
    numbers, exact in 16 bits, times a factor each."""
    start_next(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(2).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    weight_row = weight_ptr + (head * N + tl.minimum(n, N - 1).to(tl.int64)) * K
    if PDL and PREFETCH:
        prefetch(weight_row, tl.minimum(K * (1 if EIGHT_BIT else 2), PREFETCH))
    wait_for_inputs(PDL)
    row = m.to(tl.int64)
    if GATHER:
        row = tl.load(slots_ptr + m, mask=m < R, other=0)
    x_row = x_ptr + head * head_stride + row * K
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=4):
        inside = (start + k < K)[None, :]
        weight = tl.load(weight_row[:, None] + (start + k)[None, :], mask=inside, other=0.0)
        x = tl.load(x_row[:, None] + (start + k)[None, :], mask=inside & (m < R)[:, None], other=0.0)
        if EIGHT_BIT:
            weight = weight.to(tl.float32).to(x.dtype)
        acc = tl.dot(weight, x.T, acc, input_precision="ieee")
    if EIGHT_BIT:
        acc *= tl.load(factors_ptr + head * N + n, mask=n < N, other=0.0)[:, None]
    stored = (n < N)[:, None] & (m < R)[None, :]
    if RESIDUAL:
        acc += tl.load(bias_ptr + head * N + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        x = tl.load(x_row[None, :] + n[:, None], mask=stored, other=0.0).to(tl.float32)
        acc = x + acc / (1 + tl.exp(-acc))
    out = out_ptr + (head * R + m)[None, :] * N + n[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=stored)


def _each_head(x: Tensor, weight: Tensor | EightBit, bias: Tensor | None, slots: Tensor | None) -> Tensor:
    eight_bit = isinstance(weight, EightBit)
    values = (weight.values if eight_bit else weight).contiguous()
    factors = weight.factors.contiguous() if eight_bit else values
    heads, width, depth = values.shape
    rows = x.shape[1] if slots is None else slots.shape[0]
    out = x.new_empty(heads, rows, width)
    if rows:
        x = x.contiguous()
        block_m = min(64, max(16, triton.next_power_of_2(rows)))
        block_n, block_k, warps = BLOCK_N, 256 // x.element_size(), 4
        # Chosen by time on an H200: weights that are converted in registers want few warps with much in flight each.
        if eight_bit:
            block_n, block_k, warps = 64, 256 if block_m == 16 else 128, 2 if block_m <= 32 else 4
        _heads_kernel[(triton.cdiv(width, block_n), triton.cdiv(rows, block_m), heads)](
            x,
            x if slots is None else slots,
            values,
            factors,
            factors if bias is None else bias,
            out,
            rows,
            width,
            depth,
            x.stride(0) if x.shape[0] > 1 else 0,
            GATHER=slots is not None,
            RESIDUAL=bias is not None,
            EIGHT_BIT=eight_bit,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            PREFETCH=PREFETCH_BYTES if depth * values.element_size() % 16 == 0 and values.element_size() <= 2 else 0,
            num_warps=warps,
            **launch_options(x.device),
        )
    return out


def residual_block(x: Tensor, weight: Tensor | EightBit, bias: Tensor, slots: Tensor | None) -> Tensor:
    """See `Ops.residual_block`."""
    return _each_head(x, weight, bias, slots)


def linear_each(x: Tensor, weight: Tensor | EightBit) -> Tensor:
    """See `Ops.linear_each`."""
    return _each_head(x, weight, None, None)


@triton.jit
def _next_best(keys):
    """(the greatest key, the others)."""
    best = tl.max(keys, 0)
    return best, tl.where(keys == best, NO_KEY, keys)


@triton.jit
def _chunk_kernel(logits_ptr, keys_ptr, V, WIDTH: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr):
    """The WIDTH greatest keys of a chunk: the ordered logit in the high word, below it what is greater for a lower token."""
    start_next(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = token < V
    logits = tl.load(logits_ptr + row * V + token, mask=inside, other=0.0).to(tl.float32)
    keys = (ordered_key(logits).to(tl.int64) << 32) | (2147483647 - token).to(tl.int64)
    keys = tl.where(inside, keys, NO_KEY)
    keys_ptr += (row * tl.num_programs(1) + tl.program_id(1)) * WIDTH
    for rank in tl.static_range(WIDTH):
        best, keys = _next_best(keys)
        tl.store(keys_ptr + rank, best)


@triton.jit
def _nodes_kernel(
    keys_ptr,
    token_map_ptr,
    slots_ptr,
    last_token_ptr,
    sources_ptr,
    tokens_ptr,
    R,
    chunks,
    MAPPED: tl.constexpr,
    NODES: tl.constexpr,
    NODES_BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    KEYS_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """The tokens that one head guesses for one sequence, written to the nodes that want them; the first head also writes the root."""
    start_next(PDL)
    wait_for_inputs(PDL)
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    index = tl.arange(0, KEYS_BLOCK)
    count = chunks * WIDTH
    keys = tl.load(keys_ptr + (head.to(tl.int64) * R + sequence) * count + index, mask=index < count, other=NO_KEY)
    rank = tl.arange(0, WIDTH_BLOCK)
    ranked = tl.zeros([WIDTH_BLOCK], tl.int64)
    for wanted in tl.static_range(WIDTH):
        best, keys = _next_best(keys)
        ranked = tl.where(rank == wanted, 2147483647 - (best & 0xFFFFFFFF), ranked)
    if MAPPED:
        ranked = tl.load(token_map_ptr + ranked)
    node = tl.arange(0, NODES_BLOCK)
    source = tl.load(sources_ptr + node - 1, mask=(node > 0) & (node < NODES), other=-1).to(tl.int32)
    token = tl.sum(tl.where((source % WIDTH)[:, None] == rank[None, :], ranked[None, :], 0), 1)
    tokens_ptr += sequence.to(tl.int64) * NODES
    tl.store(tokens_ptr + node, token, mask=(source >= 0) & (source // WIDTH == head))
    if head == 0:
        tl.store(tokens_ptr, tl.load(last_token_ptr + tl.load(slots_ptr + sequence)))


def guess_tokens(
    logits: Tensor, token_map: Tensor | None, slots: Tensor, last_token: Tensor, sources: Tensor, width: int
) -> Tensor:
    """See `Ops.guess_tokens`."""
    depth, rows, vocabulary = logits.shape
    nodes, chunks = sources.shape[0] + 1, triton.cdiv(vocabulary, CHUNK)
    tokens = torch.empty(rows, nodes, dtype=torch.int64, device=logits.device)
    if rows:
        options = launch_options(logits.device)
        keys = torch.empty(depth * rows, chunks * width, dtype=torch.int64, device=logits.device)
        _chunk_kernel[(depth * rows, chunks)](
            logits.contiguous(), keys, vocabulary, WIDTH=width, CHUNK=CHUNK, num_warps=1, **options
        )
        keys_block = triton.next_power_of_2(chunks * width)
        _nodes_kernel[(rows, depth)](
            keys,
            sources if token_map is None else token_map,
            slots,
            last_token,
            sources,
            tokens,
            rows,
            chunks,
            MAPPED=token_map is not None,
            NODES=nodes,
            NODES_BLOCK=triton.next_power_of_2(nodes),
            WIDTH=width,
            WIDTH_BLOCK=triton.next_power_of_2(width),
            KEYS_BLOCK=keys_block,
            num_warps=min(8, max(1, keys_block // 1024)),
            **options,
        )
    return tokens
