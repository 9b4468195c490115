"""SwiGLU's element-wise part (Shazeer 2020): silu(gate) × up. Oracle: `ReferenceOps.silu_mul`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import launch_options, start_next, wait_for_inputs
from kernels.ops import Product
from kernels.products import load_product, spans_of

BLOCK = 1024


@triton.jit
def silu_product(gate, up, dtype):
    """silu(gate) × up in dtype. Both are rounded first, and silu before the product: as the separate operators of the models do it."""
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    silu = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32)
    return (silu * up).to(dtype)


@triton.jit
def _silu_mul_kernel(
    gate_up_ptr, out_ptr, WIDTH, span_stride, SPANS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    start_next(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    dtype = out_ptr.dtype.element_ty
    source = gate_up_ptr + row * 2 * WIDTH + column
    gate = load_product(source, inside, span_stride, SPANS, dtype)
    up = load_product(source + WIDTH, inside, span_stride, SPANS, dtype)
    tl.store(out_ptr + row * WIDTH + column, silu_product(gate, up, dtype), mask=inside)


def silu_mul(gate_up: Product) -> Tensor:
    """[T, 2I] → [T, I]."""
    values, spans, span_stride = spans_of(gate_up)
    rows, width = values.shape[-2], values.shape[-1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=values.device)
    if rows:
        _silu_mul_kernel[(rows, triton.cdiv(width, BLOCK))](
            values,
            out,
            width,
            span_stride,
            SPANS=spans,
            BLOCK=BLOCK,
            num_warps=4,
            **launch_options(values.device),
        )
    return out
