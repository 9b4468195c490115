"""x [M, K] · weight [N, K]ᵀ (+ bias) of few rows, M ≤ 128: bound by reading the weights once. Oracle: torch's linear in float64.

Two kernels. In one, for M ≤ 4 (chosen for M ≤ 2), a program multiplies whole rows of the weights in f32 and needs no other program.
In the other the weights are the left operand of a tensor-core product (weights · xᵀ: few rows of x then waste little of an
instruction), K is cut over programs until enough of them stream, and a second kernel adds their f32 sums in a fixed order. Neither
uses atomics: the same call gives the same bits, and with a given `GemmConfig` a row's bits do not depend on M.

Weights are read before the kernels ahead have finished (`kernels.dependent_launch`): they must not change while a model runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.activation import silu_product
from kernels.dependent_launch import launch_options, start_next, wait_for_inputs
from kernels.ops import Product, Sums

MAX_ROWS = 128
GEMV_ROWS = 4
REDUCE_BLOCK = 1024
PREFETCH_BYTES = 2048  # of each row of a program's weights, into the L2 cache, while the kernel ahead still runs
GATED_PREFETCH_BYTES = 256  # the same of gates, and of values


@dataclass(frozen=True, slots=True)
class GemmConfig:
    """block_n, block_k: a tile of the weights. split: programs along K; 0: the kernel without tensor cores (M ≤ 4).

    stages: depth of the load pipeline. tma: tiles (of x, too) are fetched by tensor descriptors, not by pointers. block_m: rows of x
    in a tile; 0: as few as hold them all.
    """

    block_n: int
    block_k: int
    num_warps: int
    split: int = 0
    stages: int = 1
    tma: bool = False
    block_m: int = 0


@triton.jit
def _gemv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    N,
    K,
    M: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program for BLOCK_N rows of the weights and every row of x. The next tile of weights is always on its way. GATED: the rows
    are those of N / 2 gates and of their N / 2 values; neighbours belong together."""
    start_next(PDL)
    index = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = index // 2 + index % 2 * (N // 2) if GATED else index
    k = tl.arange(0, BLOCK_K)
    rows = weight_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
    inside_n = (index < N)[:, None]
    coming = tl.load(rows, mask=inside_n & (k < K)[None, :], other=0.0, eviction_policy="evict_first")
    wait_for_inputs(PDL)
    sums = ()
    for _ in tl.static_range(M):
        sums = sums + (tl.zeros([BLOCK_N, BLOCK_K // 8], tl.float32),)  # noqa: RUF005 - Triton cannot unpack here
    for start in range(0, K, BLOCK_K):
        weight = coming.to(tl.float32)
        following = start + BLOCK_K
        mask = inside_n & (following + k < K)[None, :]
        coming = tl.load(rows + following, mask=mask, other=0.0, eviction_policy="evict_first")
        added = ()
        for m in tl.static_range(M):
            x = tl.load(x_ptr + m * K + start + k, mask=start + k < K, other=0.0).to(tl.float32)
            # A thread holds 8 neighbours, one load of 16 bytes: they are added up in registers.
            products = tl.reshape(weight * x[None, :], [BLOCK_N, BLOCK_K // 8, 8])
            added = added + (sums[m] + tl.sum(products, 2),)  # noqa: RUF005
        sums = added
    for m in tl.static_range(M):
        out = tl.sum(sums[m], 1)
        if BIAS:
            out += tl.load(bias_ptr + n, mask=index < N, other=0.0).to(tl.float32)
        if GATED:
            gate, up = tl.split(tl.reshape(out, [BLOCK_N // 2, 2]))
            column = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            product = silu_product(gate, up, out_ptr.dtype.element_ty)
            tl.store(out_ptr + m * (N // 2) + column, product, mask=column < N // 2)
        else:
            tl.store(out_ptr + m * N + n, out.to(out_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def prefetch(pointers, size):
    """Asks for `size` bytes (a multiple of 16) at each pointer to be brought into the L2 cache."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [pointers.to(tl.int64), size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["M"])
def _dot_kernel(
    x,
    weight,
    weight_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile of outputs' sum over a span of K: out [spans, M, N]. The bias belongs to the first span. GATED: N gates, and as many
    values behind them in the weights; K is not cut."""
    start_next(PDL)
    first_n = tl.program_id(0) * BLOCK_N
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    n = first_n + tl.arange(0, BLOCK_N)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    span = tl.cdiv(tl.cdiv(K, BLOCK_K), splits) * BLOCK_K
    begin = split * span
    end = tl.minimum(begin + span, K)
    row = n.to(tl.int64) * K
    if PDL and PREFETCH:
        first = tl.minimum(n, N - 1).to(tl.int64) * K + begin
        size = tl.minimum(tl.maximum(end - begin, 0) * 2, PREFETCH)
        prefetch(weight_ptr + first, size)
        if GATED:
            prefetch(weight_ptr + first + tl.cast(N, tl.int64) * K, size)
    wait_for_inputs(PDL)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        if TMA:
            tile = weight.load([first_n, start])
        else:
            pointers = weight_ptr + row[:, None] + (start + k)[None, :]
            tile = tl.load(pointers, mask=(n < N)[:, None], other=0.0, eviction_policy="evict_first")
        if TMA:
            rows = x.load([tl.program_id(2) * BLOCK_M, start])
        else:
            rows = tl.load(x + m[:, None] * K + (start + k)[None, :], mask=(m < M)[:, None], other=0.0)
        acc = tl.dot(tile, rows.T, acc)
        if GATED:
            if TMA:
                tile = weight.load([N + first_n, start])
            else:
                pointers = weight_ptr + (row + tl.cast(N, tl.int64) * K)[:, None] + (start + k)[None, :]
                tile = tl.load(pointers, mask=(n < N)[:, None], other=0.0, eviction_policy="evict_first")
            up = tl.dot(tile, rows.T, up)
    inside = (n < N)[:, None] & (m < M)[None, :]
    offset = m.to(tl.int64)[None, :] * N + n[:, None]
    if BIAS:
        shift = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        acc += tl.where(split == 0, shift, 0.0)
    if GATED:
        if BIAS:
            up += tl.load(bias_ptr + N + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        acc = silu_product(acc, up, out_ptr.dtype.element_ty)
    tl.store(out_ptr + split.to(tl.int64) * M * N + offset, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _reduce_kernel(
    partial_ptr,
    out_ptr,
    SIZE,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Adds the spans' sums [SPLIT, M * N] up, from the first to the last."""
    start_next(PDL)
    wait_for_inputs(PDL)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < SIZE
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLIT):
        total += tl.load(partial_ptr + split * SIZE + index, mask=inside, other=0.0)
    tl.store(out_ptr + index, total.to(out_ptr.dtype.element_ty), mask=inside)


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels may be used: on Hopper or later, 16-bit data, aligned rows, and nobody wants gradients."""
    if not x.is_cuda or x.shape[0] == 0 or torch.cuda.get_device_capability(x.device)[0] < 9:
        return False
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    aligned = weight.is_contiguous() and weight.shape[1] % 128 == 0
    return weight.element_size() == 2 and x.dtype == weight.dtype and aligned and not wanted


def invariant_fits(weight: Tensor) -> bool:
    """Whether the batch-invariant mode has a product for the weight [N, K]: there is no other kernel to fall back to."""
    return weight.is_contiguous() and weight.element_size() == 2 and weight.shape[1] % 128 == 0


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None, config: GemmConfig) -> Tensor:
    """x [M, K], weight [N, K], bias [N] → [M, N]; any M, at a cost that grows with it beyond 128 rows (4 without tensor cores)."""
    return add_up(skinny_product(x, weight, bias, config))


def add_up(product: Product) -> Tensor:
    """[M, N], from the first span to the last."""
    if not isinstance(product, Sums):
        return product
    spans, rows, width = product.parts.shape
    out = torch.empty(rows, width, dtype=product.dtype, device=product.parts.device)
    _reduce_kernel[(triton.cdiv(out.numel(), REDUCE_BLOCK),)](
        product.parts,
        out,
        out.numel(),
        SPLIT=spans,
        BLOCK=REDUCE_BLOCK,
        num_warps=4,
        **launch_options(out.device),
    )
    return out


def skinny_gated_product(x: Tensor, weight: Tensor, bias: Tensor | None, config: GemmConfig) -> Tensor:
    """silu(gate) × up of the product with weight [2I, K], gates first → [M, I]. config.split is at most 1."""
    if config.split > 1:
        raise ValueError("a gated product's sums along K are not cut")
    return _launch(x, weight, bias, config, gated=True)


def skinny_product(x: Tensor, weight: Tensor, bias: Tensor | None, config: GemmConfig) -> Product:
    """As `skinny_linear`, without adding up what `config.split` has cut."""
    out = _launch(x, weight, bias, config, gated=False)
    return Sums(out, x.dtype) if config.split > 1 and out.dim() == 3 else out


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, config: GemmConfig, gated: bool) -> Tensor:
    x = x.contiguous()
    rows, depth = x.shape
    width = weight.shape[0] // 2 if gated else weight.shape[0]
    split = config.split > 1 and rows > 0
    out = torch.empty(config.split, rows, width, device=x.device) if split else x.new_empty(rows, width)
    if rows == 0:
        return out
    options = launch_options(x.device)
    bias_or_any = weight if bias is None else bias
    if config.split == 0:
        _gemv_kernel[(triton.cdiv(weight.shape[0], config.block_n),)](
            x,
            weight,
            bias_or_any,
            out,
            weight.shape[0],
            depth,
            M=rows,
            BIAS=bias is not None,
            GATED=gated,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            **options,
        )
        return out
    block_m = config.block_m or min(128, max(16, triton.next_power_of_2(rows)))
    tile = [config.block_n, config.block_k]
    _dot_kernel[(triton.cdiv(width, config.block_n), config.split, triton.cdiv(rows, block_m))](
        TensorDescriptor(x, [rows, depth], [depth, 1], [block_m, config.block_k]) if config.tma else x,
        TensorDescriptor(weight, list(weight.shape), [depth, 1], tile) if config.tma else weight,
        weight,
        bias_or_any,
        out,
        rows,
        width,
        depth,
        BIAS=bias is not None,
        GATED=gated,
        TMA=config.tma,
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        STAGES=config.stages,
        PREFETCH=GATED_PREFETCH_BYTES if gated else PREFETCH_BYTES,
        num_warps=config.num_warps,
        **options,
    )
    return out
