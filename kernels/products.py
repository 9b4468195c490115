"""Reading a product whose spans along K are still to be added up (`kernels.ops.Sums`), or a whole one."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.ops import Product, Sums


@triton.jit
def load_product(pointers, mask, stride, SPANS: tl.constexpr, dtype: tl.constexpr):
    """The product's elements in f32, 0 outside the mask. SPANS > 0: f32 spans, `stride` apart, added from the first to the last and
    rounded to dtype as a whole product is."""
    x = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    if SPANS:
        for span in tl.static_range(1, SPANS):
            x += tl.load(pointers + span * stride, mask=mask, other=0.0)
        x = x.to(dtype).to(tl.float32)
    return x


def spans_of(product: Product) -> tuple[Tensor, int, int]:
    """(contiguous values, SPANS, stride) for `load_product`."""
    if isinstance(product, Sums):
        return product.parts, product.parts.shape[0], product.parts.stride(0)
    return product.contiguous(), 0, 0
