"""QK-norm, rotary embedding (Su et al. 2021) and the write of k and v to the paged cache. Oracle: `ReferenceOps.rope_and_cache`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import launch_options, start_next, wait_for_inputs
from kernels.ops import Product
from kernels.products import load_product, spans_of

HEADS_PER_PROGRAM = 16


@triton.jit
def _normalise(first, second, weight_ptr, eps, D: tl.constexpr, half, inside, dtype):
    """RMS norm of heads given as two halves, rounded as `rms_norm` rounds."""
    scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / D + eps)[:, None]
    low = tl.load(weight_ptr + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    high = tl.load(weight_ptr + D // 2 + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    first = ((first * scale).to(dtype).to(tl.float32) * low).to(dtype).to(tl.float32)
    second = ((second * scale).to(dtype).to(tl.float32) * high).to(dtype).to(tl.float32)
    return first, second


@triton.jit
def _rope_cache_kernel(
    qkv_ptr,
    cos_sin_ptr,
    positions_ptr,
    slots_ptr,
    q_norm_ptr,
    k_norm_ptr,
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    eps,
    span_stride,
    SPANS: tl.constexpr,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    start_next(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    half = tl.arange(0, HALF)
    column = half[None, :]
    inside = half < D // 2
    tile = (head < HQ + 2 * HKV) & inside[None, :]
    dtype = q_ptr.dtype.element_ty

    source = qkv_ptr + row * (HQ + 2 * HKV) * D + head * D + column
    first = load_product(source, tile, span_stride, SPANS, dtype)
    second = load_product(source + D // 2, tile, span_stride, SPANS, dtype)
    is_q = head < HQ
    is_k = (head >= HQ) & (head < HQ + HKV)
    raw_first, raw_second = first, second
    if Q_NORM:
        low, high = _normalise(raw_first, raw_second, q_norm_ptr, eps, D, half, inside, dtype)
        first, second = tl.where(is_q, low, first), tl.where(is_q, high, second)
    if K_NORM:
        low, high = _normalise(raw_first, raw_second, k_norm_ptr, eps, D, half, inside, dtype)
        first, second = tl.where(is_k, low, first), tl.where(is_k, high, second)

    position = tl.maximum(tl.load(positions_ptr + row), 0).to(tl.int64)
    cos = tl.load(cos_sin_ptr + position * D + half, mask=inside, other=0.0)[None, :]
    sin = tl.load(cos_sin_ptr + position * D + D // 2 + half, mask=inside, other=0.0)[None, :]
    low = (first * cos - second * sin).to(dtype)
    high = (second * cos + first * sin).to(dtype)

    target = q_ptr + row * HQ * D + head * D + column
    tl.store(target, low, mask=tile & is_q)
    tl.store(target + D // 2, high, mask=tile & is_q)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    written = tile & (slot >= 0)
    target = k_cache_ptr + (slot * HKV + head - HQ) * D + column
    tl.store(target, low, mask=written & is_k)
    tl.store(target + D // 2, high, mask=written & is_k)
    target = v_cache_ptr + (slot * HKV + head - HQ - HKV) * D + column
    tl.store(target, raw_first.to(dtype), mask=written & (head >= HQ + HKV))
    tl.store(target + D // 2, raw_second.to(dtype), mask=written & (head >= HQ + HKV))


def rope_and_cache(
    qkv: Product,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    out: Tensor | None = None,
) -> Tensor:
    """See `Ops.rope_and_cache`. One program for a row and 16 of its heads."""
    values, spans, span_stride = spans_of(qkv)
    rows, head_dim = values.shape[-2], k_cache.shape[-1]
    q = torch.empty(rows, num_q_heads, head_dim, dtype=qkv.dtype, device=values.device) if out is None else out
    if rows:
        heads = num_q_heads + 2 * num_kv_heads
        _rope_cache_kernel[(rows, triton.cdiv(heads, HEADS_PER_PROGRAM))](
            values,
            cos_sin,
            positions,
            slots,
            q if q_norm is None else q_norm,
            q if k_norm is None else k_norm,
            q,
            k_cache,
            v_cache,
            eps,
            span_stride,
            SPANS=spans,
            HQ=num_q_heads,
            HKV=num_kv_heads,
            D=head_dim,
            Q_NORM=q_norm is not None,
            K_NORM=k_norm is not None,
            HEADS=HEADS_PER_PROGRAM,
            HALF=triton.next_power_of_2(head_dim // 2),
            num_warps=4,
            **launch_options(values.device),
        )
    return q
