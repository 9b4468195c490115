"""The warp-specialised prefill kernel against the reference. A file of its own: a mistake in its barriers would wait for ever."""

import pytest
import torch

from kernels.reference import ReferenceOps
from tests.kernels.cases import attention_batch, random_cache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
    ),
]


@pytest.mark.parametrize("page", [16, 32, 64, 128])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(32, 8), (28, 4), (24, 8), (8, 8), (16, 8), (64, 1)])
def test_prefill(page, q_heads, kv_heads):
    """Chunks that end in and on tiles, a padded sequence, a decode before them, and NaN in what blocks hold past the context."""
    from kernels.attention_prefill_hopper import new_counters
    from kernels.triton_ops import TritonOps

    torch.manual_seed(0)
    contexts, rows = [500, 700, 128, 0, 1, 2048, 1000], [1, 500, 128, 3, 1, 2048, 33]
    blocks = 8 + sum(-(-c // page) for c in contexts)
    batch = attention_batch(contexts, rows, page, blocks, decode_seqs=1, device="cuda")
    caches = [random_cache(blocks, page, kv_heads, 128, torch.bfloat16, "cuda") for _ in "kv"]
    for s, context in enumerate(contexts):
        if context % page:
            for cache in caches:
                cache[batch.block_table[s, context // page].item(), context % page :] = float("nan")
    q = torch.randn(sum(rows), q_heads, 128, device="cuda").to(torch.bfloat16)
    counters = new_counters("cuda")
    got = TritonOps(hopper_counters=counters).attention(q, *caches, batch, 0.1)
    expected = ReferenceOps().attention(q.float(), *caches, batch, 0.1)
    error = (got.float() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1).clamp(min=1e-6)
    assert got.isfinite().all()
    assert error.max() < 0.01
    assert not counters.any()  # ready for the next launch
