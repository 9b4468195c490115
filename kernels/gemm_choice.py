"""Which kernel computes x [M, K] · weight [N, K]ᵀ: a choice that changes the time and never the result beyond rounding."""

from __future__ import annotations

from kernels.skinny_gemm import GEMV_ROWS, MAX_ROWS, GemmConfig

PROGRAMS = 264  # two for each of an H200's processors: enough to keep its memory busy

# Measured on one H200 by `benchmarks/kernels.py --only gemm`: (rows, N, K) → kernel, None for cuBLAS.
MEASURED: dict[tuple[int, int, int], GemmConfig | None] = {}


def bucket(rows: int) -> int:
    """The power of two that a number of rows is measured as."""
    return 1 << (rows - 1).bit_length()


def choose(rows: int, width: int, depth: int) -> GemmConfig | None:
    """rows = M ≥ 1, width = N, depth = K (a multiple of 128). None: cuBLAS."""
    if rows > MAX_ROWS:
        return None
    key = bucket(rows), width, depth
    if key in MEASURED:
        return MEASURED[key]
    if rows <= GEMV_ROWS:
        return GemmConfig(4, 1024, 4)
    return invariant(width, depth) if rows <= 16 else None


def invariant(width: int, depth: int) -> GemmConfig:
    """A choice that does not depend on the rows, so that a row's result has the same bits in every batch."""
    tiles, steps = -(-width // 64), depth // 128
    split = max(1, min(PROGRAMS // tiles, steps // 2))
    return GemmConfig(64, 128, 4, split, 4, tma=True)
