"""The choice of a token under typical sampling, behind the other filters. Oracle: `ReferenceOps.sample`.

Typical sampling keeps the tokens whose surprise -log p is within some distance of the entropy, so an interval of logits. One program a
row finds the least distance whose tokens have the mass, by a search over the floats' bits, and chooses among them: some twenty passes
over the row, which stays in the L2 cache. Rows that do not ask for it cost nothing but the program's start.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.filtered_sampling import search_row
from kernels.ops import SamplingBatch
from kernels.token_scores import inverse_temperature, load_quads, noisy_best

BLOCK = 4096
INFINITY_BITS = tl.constexpr(0x7F800000)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _scaled(logits, lowest, best, scale):
    """Scores relative to the best of the logits ≥ lowest; -inf for others."""
    return tl.where(logits >= lowest, (logits - best) * scale, -float("inf"))


@triton.jit
def _distances(logits, lowest, best, scale, surprise_of_best, entropy):
    """|-log p - entropy|, inf for the logits below lowest and those of no probability."""
    scores = _scaled(logits, lowest, best, scale)
    return tl.abs(surprise_of_best - scores - entropy)


@triton.jit
def _typical_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    typical_p_ptr,
    seed_ptr,
    choice_ptr,
    position_ptr,
    out_ptr,
    V,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    temperature, typical_p = tl.load(temperature_ptr + row), tl.load(typical_p_ptr + row)
    if (temperature <= 0) | (typical_p >= 1):
        return
    row_ptr = logits_ptr + row * V
    scale = inverse_temperature(temperature)
    top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    greatest = tl.full([BLOCK], -float("inf"), tl.float32)
    for start in range(0, V, BLOCK):
        token = start + tl.arange(0, BLOCK)
        greatest = tl.maximum(greatest, tl.load(row_ptr + token, mask=token < V, other=-float("inf")).to(tl.float32))
    best = tl.max(greatest, 0)
    best = tl.where(best == -float("inf"), 0.0, best)
    lowest = -float("inf")
    if ((top_k > 0) & (top_k < V)) | (top_p < 1):
        lowest = search_row(row_ptr, V, scale, best, tl.where(top_k > 0, top_k, V), top_p, BLOCK)
    if min_p > 0:
        lowest = tl.maximum(lowest, best + tl.log(min_p) * temperature)
    lowest = tl.minimum(lowest, best)

    mass = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        token = start + tl.arange(0, BLOCK)
        logits = tl.load(row_ptr + token, mask=token < V, other=-float("inf")).to(tl.float32)
        scores = _scaled(logits, lowest, best, scale)
        weights = tl.math.exp2(scores * LOG2E)
        mass += weights
        weighted += tl.where(weights > 0, weights * scores, 0.0)
    total = tl.sum(mass, 0)
    surprise_of_best = tl.math.log2(total) * LN2
    entropy = surprise_of_best - tl.sum(weighted, 0) / total

    # The least distance whose tokens have the mass; bits of floats ≥ 0 are ordered as they are.
    target = typical_p * total
    low = tl.load(top_k_ptr + row) * 0
    high = low + INFINITY_BITS
    while low < high:
        quarter = (high - low) // 4  # a sum of both would overflow
        first, middle, third = low + quarter, low + (high - low) // 2, high - quarter - 1
        mass_1 = tl.zeros([BLOCK], tl.float32)
        mass_2 = tl.zeros([BLOCK], tl.float32)
        mass_3 = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            token = start + tl.arange(0, BLOCK)
            logits = tl.load(row_ptr + token, mask=token < V, other=-float("inf")).to(tl.float32)
            scores = _scaled(logits, lowest, best, scale)
            weights = tl.math.exp2(scores * LOG2E)
            distance = tl.abs(surprise_of_best - scores - entropy)
            mass_1 += tl.where(distance <= first.to(tl.float32, bitcast=True), weights, 0.0)
            mass_2 += tl.where(distance <= middle.to(tl.float32, bitcast=True), weights, 0.0)
            mass_3 += tl.where(distance <= third.to(tl.float32, bitcast=True), weights, 0.0)
        enough_1, enough_2 = tl.sum(mass_1, 0) >= target, tl.sum(mass_2, 0) >= target
        enough_3 = tl.sum(mass_3, 0) >= target
        low = tl.where(enough_1, low, tl.where(enough_2, first + 1, tl.where(enough_3, middle + 1, third + 1)))
        high = tl.where(enough_1, first, tl.where(enough_2, middle, tl.where(enough_3, third, high)))
    distance = low.to(tl.float32, bitcast=True)

    seed, choice, position = tl.load(seed_ptr + row), tl.load(choice_ptr + row), tl.load(position_ptr + row)
    best_score = -float("inf")
    chosen = V - 1
    for start in range(0, V, BLOCK):
        quad = start // 4 + tl.arange(0, BLOCK // 4)
        logits_0, logits_1, logits_2, logits_3 = load_quads(row_ptr, quad, V)
        near_0 = _distances(logits_0, lowest, best, scale, surprise_of_best, entropy) <= distance
        near_1 = _distances(logits_1, lowest, best, scale, surprise_of_best, entropy) <= distance
        near_2 = _distances(logits_2, lowest, best, scale, surprise_of_best, entropy) <= distance
        near_3 = _distances(logits_3, lowest, best, scale, surprise_of_best, entropy) <= distance
        logits_0 = tl.where(near_0, logits_0, -float("inf"))
        logits_1 = tl.where(near_1, logits_1, -float("inf"))
        logits_2 = tl.where(near_2, logits_2, -float("inf"))
        logits_3 = tl.where(near_3, logits_3, -float("inf"))
        score, candidate = noisy_best(
            quad, logits_0, logits_1, logits_2, logits_3, lowest, scale, seed, position, choice, V
        )
        chosen = tl.where(score > best_score, candidate, chosen)
        best_score = tl.maximum(best_score, score)
    tl.store(out_ptr + row, chosen.to(tl.int64))


def choose_typical(logits: Tensor, batch: SamplingBatch, out: Tensor) -> None:
    """Overwrites the choices out int64 [R] of the rows with typical_p < 1; logits [R, V] contiguous, R > 0."""
    rows, vocabulary = logits.shape
    _typical_kernel[(rows,)](
        logits,
        batch.temperature,
        batch.top_k,
        batch.top_p,
        batch.min_p,
        batch.typical_p,
        batch.seed,
        batch.choice,
        batch.position,
        out,
        vocabulary,
        BLOCK=min(BLOCK, max(16, triton.next_power_of_2(vocabulary))),
        num_warps=8,
    )
