"""What the prefill and the decode kernel share: reading a tile of the paged cache, and one step of online softmax.

Online softmax over tiles: Milakov and Gimelshein 2018, Dao et al. 2022 (FlashAttention). Logits are kept in powers of two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def load_tile(
    cache,
    table_ptr,
    start,
    limit,
    kv_head,
    HKV: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Positions start..start + BLOCK_N of a sequence: [BLOCK_N, BLOCK_D]. MASKED: those at `limit` or later read as zero.

    With TMA the tile lies in one block and `cache` is a descriptor of [B * P, Hkv * D]; else it is a pointer and the tile may
    span any number of blocks. A block id of -1 (given up: it is before the window) reads as zero. TMA does not mask.
    """
    if TMA:
        page = tl.load(table_ptr + start // PAGE)
        tile = cache.load([page * PAGE + start % PAGE, kv_head * D])
    else:
        n = start + tl.arange(0, BLOCK_N)
        d = tl.arange(0, BLOCK_D)
        if MASKED:
            page = tl.load(table_ptr + n // PAGE, mask=n < limit, other=-1).to(tl.int64)
            inside = (page >= 0)[:, None] & (d < D)[None, :]
        else:
            page = tl.load(table_ptr + n // PAGE).to(tl.int64)
            inside = (d < D)[None, :]
        row = (page * PAGE + n % PAGE) * (HKV * D) + kv_head * D
        if MASKED or BLOCK_D != D:
            tile = tl.load(cache + row[:, None] + d[None, :], mask=inside, other=0.0)
        else:
            tile = tl.load(cache + row[:, None] + d[None, :])
    return tile


@triton.jit
def softmax_step(scores, peak, total, scale, GUARD: tl.constexpr):
    """Takes scores [M, N] (times `scale`: log2 units) into the running maximum and sum of the rows.

    Returns the tile's weights, the factor for what was summed before, the new maximum and sum. GUARD: a row may have seen
    nothing yet, and must not become NaN.
    """
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    base = tl.where(new_peak == -float("inf"), 0.0, new_peak) if GUARD else new_peak
    weights = tl.math.exp2(scores * scale - base[:, None])
    keep = tl.math.exp2(peak - base)
    return weights, keep, new_peak, total * keep + tl.sum(weights, 1)


@dataclass(frozen=True, slots=True)
class TileConfig:
    """How an attention kernel is cut up: rows and positions of a tile, warps of a program, depth of the load pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool


def tma_fits(cache: Tensor, block_n: int) -> bool:
    """Whether a tile of block_n positions is one box of a tensor descriptor: it needs 16-bit data and to lie within a block."""
    page, _, head_dim = cache.shape[-3:]
    fits = head_dim in (64, 128, 256) and page % block_n == 0 and cache.element_size() == 2
    return fits and (not cache.is_cuda or torch.cuda.get_device_capability(cache.device)[0] >= 9)


def cache_argument(cache: Tensor, block_n: int, tma: bool) -> object:
    """The kernel's argument for one layer's cache [B, P, Hkv, D]: a tensor descriptor made on the host, or the tensor."""
    if not tma:
        return cache
    from triton.tools.tensor_descriptor import TensorDescriptor

    blocks, page, heads, head_dim = cache.shape
    return TensorDescriptor(cache, [blocks * page, heads * head_dim], [heads * head_dim, 1], [block_n, head_dim])
