"""RMS norm (Zhang and Sennrich 2019), alone and with the residual addition. Oracle: `ReferenceOps.rms_norm`, `.add_rms_norm`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import launch_options, start_next, wait_for_inputs
from kernels.ops import Product
from kernels.products import load_product, spans_of


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    eps,
    H,
    span_stride,
    ADD: tl.constexpr,
    SPANS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    start_next(PDL)
    row = tl.program_id(0).to(tl.int64) * H
    column = tl.arange(0, BLOCK)
    inside = column < H
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    x = load_product(x_ptr + row + column, inside, span_stride, SPANS, out_ptr.dtype.element_ty)
    if ADD:
        x += tl.load(residual_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + row + column, rounded, mask=inside)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / H + eps)
    # The row is rounded before it is scaled: that is the order of the models the weights were trained with.
    normalised = (x * scale).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row + column, (normalised * weight).to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm(x: Product, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """Norm of x [T, H], or of residual + x when a residual (updated in place) is given. One program a row."""
    values, spans, span_stride = spans_of(x)
    rows, width = values.shape[-2:]
    out = torch.empty(rows, width, dtype=x.dtype, device=values.device)
    if rows:
        block = triton.next_power_of_2(width)
        _rms_norm_kernel[(rows,)](
            values,
            out if residual is None else residual,
            weight,
            out,
            eps,
            width,
            span_stride,
            ADD=residual is not None,
            SPANS=spans,
            BLOCK=block,
            # The loads of all spans are on their way at once: few for each thread.
            num_warps=min(8, max(1, block // (128 if spans else 512))),
            **launch_options(values.device),
        )
    return out
