"""Which kernel computes x [M, K] · weight [N, K]ᵀ: a choice that changes the time and never the result beyond rounding."""

from __future__ import annotations

from dataclasses import replace

from kernels.skinny_gemm import MAX_ROWS, GemmConfig

SMALL_WEIGHT = 8 << 20  # parameters; above it cuBLAS is as good for more than 16 rows
PROGRAMS = 264  # two for each of an H200's processors: enough to keep its memory busy

# (rows, N, K) → kernel, None for cuBLAS. Above 16 rows, what is missing is cuBLAS's. Measured on one H200 by `benchmarks/kernels.py
# --only gemm`, those of layers by `benchmarks/layers.py`.
MEASURED: dict[tuple[int, int, int], GemmConfig | None] = {
    (1, 1024, 2048): GemmConfig(2, 1024, 4),
    (1, 1024, 3072): GemmConfig(4, 1024, 4),
    (1, 4096, 1024): GemmConfig(4, 1024, 4),
    (1, 4096, 4096): GemmConfig(2, 1024, 4),
    (1, 4096, 14336): GemmConfig(4, 1024, 4),
    (1, 6144, 1024): GemmConfig(4, 1024, 2),
    (1, 6144, 4096): GemmConfig(8, 1024, 4),
    (1, 28672, 4096): GemmConfig(2, 1024, 4),
    (1, 128256, 4096): GemmConfig(2, 1024, 4),
    (1, 151936, 1024): GemmConfig(4, 1024, 2),
    (2, 1024, 2048): GemmConfig(4, 1024, 2),
    (2, 1024, 3072): GemmConfig(4, 1024, 4),
    (2, 4096, 1024): GemmConfig(4, 1024, 2),
    (2, 4096, 4096): GemmConfig(4, 1024, 4),
    (2, 4096, 14336): GemmConfig(4, 1024, 4),
    (2, 6144, 1024): GemmConfig(2, 512, 1),
    (2, 6144, 4096): GemmConfig(2, 512, 1),
    (2, 28672, 4096): None,
    (2, 128256, 4096): GemmConfig(2, 512, 1),
    (2, 151936, 1024): None,
    (4, 1024, 2048): GemmConfig(64, 256, 4, 4, 3, tma=True),
    (4, 1024, 3072): GemmConfig(64, 256, 4, 6, 3, tma=True),
    (4, 4096, 1024): GemmConfig(64, 256, 4, 2, 3, tma=True),
    (4, 4096, 4096): GemmConfig(64, 128, 4, 2, 3, tma=True),
    (4, 4096, 14336): GemmConfig(64, 256, 4, 2, 3, tma=True),
    (4, 6144, 1024): GemmConfig(32, 128, 2, 1, 6),
    (4, 6144, 4096): GemmConfig(64, 256, 4, 1, 3, tma=True),
    (4, 28672, 4096): None,
    (4, 128256, 4096): GemmConfig(32, 128, 2, 1, 6),
    (4, 151936, 1024): None,
    (8, 1024, 2048): GemmConfig(64, 256, 4, 4, 3, tma=True),
    (8, 1024, 3072): GemmConfig(64, 256, 4, 6, 3, tma=True),
    (8, 4096, 1024): GemmConfig(64, 256, 4, 2, 3, tma=True),
    (8, 4096, 4096): GemmConfig(64, 256, 4, 2, 3, tma=True),
    (8, 4096, 14336): GemmConfig(64, 256, 4, 2, 3, tma=True),
    (8, 6144, 1024): GemmConfig(64, 256, 4, 1, 3, tma=True),
    (8, 6144, 4096): GemmConfig(64, 256, 4, 1, 3, tma=True),
    (8, 28672, 4096): GemmConfig(64, 256, 4, 1, 3, tma=True),
    (8, 128256, 4096): None,
    (8, 151936, 1024): None,
    (16, 1024, 2048): GemmConfig(64, 256, 4, 4, 3, tma=True),
    (16, 1024, 3072): GemmConfig(64, 256, 4, 6, 3, tma=True),
    (16, 4096, 1024): GemmConfig(64, 256, 4, 2, 3, tma=True),
    (16, 4096, 4096): GemmConfig(64, 128, 4, 2, 4, tma=True),
    (16, 4096, 14336): GemmConfig(64, 256, 4, 2, 3, tma=True),
    (16, 6144, 1024): GemmConfig(64, 256, 4, 1, 3, tma=True),
    (16, 6144, 4096): GemmConfig(64, 256, 4, 1, 3, tma=True),
    (16, 28672, 4096): GemmConfig(64, 256, 4, 1, 3, tma=True),
    (16, 128256, 4096): GemmConfig(32, 128, 2, 1, 6),
    (16, 151936, 1024): None,
    (32, 1024, 2048): GemmConfig(64, 128, 4, 4, 4, tma=True),
    (32, 1024, 3072): GemmConfig(64, 256, 4, 4, 3, tma=True),
    (32, 4096, 1024): GemmConfig(64, 128, 4, 1, 4, tma=True),
    (32, 4096, 4096): GemmConfig(64, 256, 4, 2, 3, tma=True),
    (32, 4096, 14336): GemmConfig(64, 256, 4, 2, 3, tma=True),
    (32, 6144, 1024): GemmConfig(64, 128, 4, 1, 4, tma=True),
    (32, 6144, 4096): GemmConfig(64, 256, 4, 1, 3, tma=True),
    (32, 28672, 4096): GemmConfig(64, 256, 4, 1, 3, tma=True),
    (32, 128256, 4096): GemmConfig(64, 128, 4, 1, 4, tma=True),
    (64, 1024, 2048): GemmConfig(64, 128, 4, 4, 4, tma=True),
    (64, 1024, 3072): GemmConfig(64, 128, 4, 4, 4, tma=True),
    (64, 4096, 1024): GemmConfig(64, 256, 4, 1, 3, tma=True),
    (64, 4096, 4096): GemmConfig(64, 256, 4, 2, 3, tma=True),
    (64, 4096, 14336): GemmConfig(64, 256, 4, 2, 3, tma=True),
    (64, 6144, 1024): GemmConfig(64, 128, 4, 1, 4, tma=True),
    (64, 6144, 4096): GemmConfig(64, 256, 4, 1, 3, tma=True),
    (64, 28672, 4096): GemmConfig(128, 64, 4, 1, 5, tma=True),
    (64, 128256, 4096): GemmConfig(128, 64, 4, 1, 5, tma=True),
}


# The same for gates and values in one kernel, within steps of one H200; None: a product, and a kernel that gates.
MEASURED_GATED: dict[tuple[int, int, int], GemmConfig | None] = {
    (1, 28672, 4096): GemmConfig(2, 1024, 4),
    (2, 28672, 4096): None,
    (4, 28672, 4096): GemmConfig(64, 128, 4, 1, 2, tma=True),
    (8, 6144, 1024): GemmConfig(64, 256, 4, 1, 3, tma=True),
    (8, 28672, 4096): GemmConfig(64, 128, 4, 1, 3, tma=True),
    (16, 6144, 1024): GemmConfig(64, 256, 4, 1, 3, tma=True),
    (16, 28672, 4096): GemmConfig(64, 128, 4, 1, 3, tma=True),
    (64, 28672, 4096): GemmConfig(64, 128, 4, 1, 2, tma=True),
}


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
    if rows <= 2:  # with more, tensor cores were faster wherever it was measured
        return GemmConfig(4, 1024, 4)
    if rows <= 16:
        return _by_weight(width, depth)
    # Of small weights the launch and the first bytes cost more than the product: what the measured ones have in common.
    return _by_weight(width, depth, PROGRAMS // 2, 4) if rows <= 64 and width * depth <= SMALL_WEIGHT else None


def choose_gated(rows: int, width: int, depth: int) -> GemmConfig | None:
    """As `choose` for a product that is gated in the same kernel (width: of gates and values). None: by two."""
    key = bucket(rows), width, depth
    if key in MEASURED_GATED:
        return MEASURED_GATED[key]
    if rows <= 2:
        return GemmConfig(2, 512, 1) if width * depth <= SMALL_WEIGHT else GemmConfig(4, 1024, 4)
    return GemmConfig(64, 128, 4, 1, 4, tma=True) if rows <= 64 else None


def invariant(width: int, depth: int) -> GemmConfig:
    """A choice that does not depend on the rows, the shape of their tile included, so that a row's result has the same bits in every
    batch. 64 rows: a tile of as many weights is still bound by memory, and a prefill by less than it would be by 16."""
    return replace(_by_weight(width, depth), block_m=64)


def _by_weight(width: int, depth: int, programs: int = PROGRAMS, most_splits: int = PROGRAMS) -> GemmConfig:
    tiles, steps = -(-width // 64), depth // 128
    split = max(1, min(programs // tiles, steps // 2, most_splits))
    return GemmConfig(64, 128, 4, split, 4, tma=True)
