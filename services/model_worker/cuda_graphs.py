"""CUDA graphs of decode steps, at padded batch sizes, in one memory pool."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch


def padded_sizes(largest: int) -> list[int]:
    """1, 2, 4, then multiples of 8 up to `largest`, which is always among them."""
    sizes = [size for size in (1, 2, 4, *range(8, largest + 1, 8)) if size < largest]
    return [*sizes, largest]


def padded_size(sizes: list[int], rows: int) -> int:
    """The smallest of `sizes` (sorted) that holds `rows`."""
    return sizes[bisect.bisect_left(sizes, rows)]


class Graphs(Protocol):
    """Functions by key, to be run again without the host's work. A function reads its inputs from fixed addresses and returns
    tensors; these keep their addresses over replays."""

    def capture(self, key: Hashable, function: Callable[[], Any], rehearsed: bool = False) -> Any:
        """Runs `function` once for real, which compiles its kernels, then records it. Returns what it returns.

        rehearsed: one has run that launches the same kernels on other addresses. On a device that others use, too, waiting for hundreds
        of small runs would take most of the start."""

    def replay(self, key: Hashable) -> Any:
        """Does again what was recorded, on the current stream; returns the tensors that this fills."""


class CudaGraphs:
    """`Graphs` on the current stream. All share one pool: a graph's intermediate memory is used again by the next captured."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = {}

    def capture(self, key: Hashable, function: Callable[[], Any], rehearsed: bool = False) -> Any:
        graph = torch.cuda.CUDAGraph()
        if not rehearsed:
            function()
            torch.cuda.current_stream().synchronize()
        # `with torch.cuda.graph(...)` would collect garbage and empty the allocator's cache, 0.1 s each.
        # Other threads may call CUDA meanwhile: only this one must not do what a capture forbids.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            result = function()
        finally:
            graph.capture_end()
        self._graphs[key] = (graph, result)
        return result

    def replay(self, key: Hashable) -> Any:
        graph, result = self._graphs[key]
        graph.replay()
        return result
