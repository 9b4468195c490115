"""The memory of keys and values: one tensor for all layers, cut into blocks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from services.model_worker.models.config import ModelConfig


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, keys and values."""
    return 2 * config.num_layers * block_size * config.num_kv_heads * config.head_dim * dtype.itemsize


def copied_rows(copies: Iterable[tuple[int, int, int]], block_size: int) -> tuple[list[int], list[int]]:
    """(block, new block, rows) to be copied → the cache rows to copy from and to, as `Ops.move_kv` takes them; filled up to a multiple
    of 16, as kernels are compiled again for other numbers."""
    sources = [block * block_size + row for block, _, rows in copies for row in range(rows)]
    targets = [block * block_size + row for _, block, rows in copies for row in range(rows)]
    missing = -len(sources) % 16
    return sources + [0] * missing, targets + [-1] * missing


class KVCache:
    """`data` [2, layers, blocks, block size, KV heads, head size]; `layers` the (keys, values) of each layer as views of it."""

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (2, config.num_layers, num_blocks, block_size, config.num_kv_heads, config.head_dim)
        # Zeroed: what was never written may be read under a mask, where NaN would get through.
        self.data = torch.zeros(shape, dtype=dtype, device=device)
        self.layers: list[tuple[Tensor, Tensor]] = list(zip(self.data[0], self.data[1], strict=True))
