"""Penalties, filters and the choice of a token, without sorting. Oracle: `ReferenceOps.sample`, `.apply_penalties`.

The filters of a row end in one threshold on its scores. It is found by search: a pass over the row counts (or weighs) what
lies at or above three pivots, and the interval between two of them is searched next, until one token is left in it. Then the
vocabulary is cut over programs that each find their best score + noise, and the best of those is the choice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ops import SamplingBatch

PICK_CHUNK = 4096
SCAN_BLOCK = 4096
PENALTY_BLOCK = 1024


@triton.jit
def _penalty_kernel(
    logits_ptr,
    counts_ptr,
    prompt_mask_ptr,
    count_rows_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    V,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(count_rows_ptr + row).to(tl.int64)
    if slot < 0:
        return
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < V
    logits = tl.load(logits_ptr + row * V + token, mask=inside, other=0.0)
    count = tl.load(counts_ptr + slot * V + token, mask=inside, other=0)
    prompted = tl.load(prompt_mask_ptr + slot * V + token, mask=inside, other=0)
    repetition = tl.load(repetition_ptr + row)
    repeated = tl.where(logits < 0, logits * repetition, tl.div_rn(logits, repetition))
    logits = tl.where((count > 0) | (prompted != 0), repeated, logits)
    logits -= tl.load(frequency_ptr + row) * count.to(tl.float32)
    logits -= tl.where(count > 0, tl.load(presence_ptr + row), 0.0)
    tl.store(logits_ptr + row * V + token, logits, mask=inside)


@triton.jit
def _load_scores(row_ptr, token, V, temperature):
    """logits / temperature, rounded as torch rounds it: a threshold must compare equal to the score it was taken from."""
    logits = tl.load(row_ptr + token, mask=token < V, other=-float("inf")).to(tl.float32)
    return tl.div_rn(logits, temperature)


@triton.jit
def _survey(row_ptr, V, temperature, BLOCK: tl.constexpr):
    """(greatest, least finite score, number of finite scores) of a row."""
    greatest = tl.full([BLOCK], -float("inf"), tl.float32)
    least = tl.full([BLOCK], float("inf"), tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        scores = _load_scores(row_ptr, start + tl.arange(0, BLOCK), V, temperature)
        finite = scores > -float("inf")
        greatest = tl.maximum(greatest, scores)
        least = tl.minimum(least, tl.where(finite, scores, float("inf")))
        count += finite.to(tl.int32)
    return tl.max(greatest, 0), tl.min(least, 0), tl.sum(count, 0)


@triton.jit
def _above(row_ptr, V, temperature, best, pivot, BLOCK: tl.constexpr):
    """(number, mass) of the tokens of score ≥ pivot; a token's mass is exp(score - best)."""
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        scores = _load_scores(row_ptr, start + tl.arange(0, BLOCK), V, temperature)
        count += (scores >= pivot).to(tl.int32)
        mass += tl.where(scores >= pivot, tl.exp(scores - best), 0.0)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def _search(row_ptr, V, temperature, best, low, low_count, target, WEIGHED: tl.constexpr, BLOCK: tl.constexpr):
    """The greatest threshold with at least `target` tokens (WEIGHED: at least that mass) at or above it; `low` has that.

    The interval low..high is quartered until it holds one token, or ties between neighbouring floats.
    """
    high = best + tl.maximum(tl.abs(best) * 1e-6, 1.0)
    high_count = 0
    middle = low + (high - low) * 0.5
    while (low_count - high_count > 1) & (low < middle) & (middle < high):
        first = low + (high - low) * 0.25
        third = low + (high - low) * 0.75
        count_1 = tl.zeros([BLOCK], tl.int32)
        count_2 = tl.zeros([BLOCK], tl.int32)
        count_3 = tl.zeros([BLOCK], tl.int32)
        mass_1 = tl.zeros([BLOCK], tl.float32)
        mass_2 = tl.zeros([BLOCK], tl.float32)
        mass_3 = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            scores = _load_scores(row_ptr, start + tl.arange(0, BLOCK), V, temperature)
            count_1 += (scores >= first).to(tl.int32)
            count_2 += (scores >= middle).to(tl.int32)
            count_3 += (scores >= third).to(tl.int32)
            if WEIGHED:
                mass = tl.exp(scores - best)
                mass_1 += tl.where(scores >= first, mass, 0.0)
                mass_2 += tl.where(scores >= middle, mass, 0.0)
                mass_3 += tl.where(scores >= third, mass, 0.0)
        n_1, n_2, n_3 = tl.sum(count_1, 0), tl.sum(count_2, 0), tl.sum(count_3, 0)
        if WEIGHED:
            enough_1 = tl.sum(mass_1, 0) >= target
            enough_2 = tl.sum(mass_2, 0) >= target
            enough_3 = tl.sum(mass_3, 0) >= target
        else:
            enough_1, enough_2, enough_3 = n_1 >= target, n_2 >= target, n_3 >= target
        high = tl.where(enough_3, high, tl.where(enough_2, third, tl.where(enough_1, middle, first)))
        high_count = tl.where(enough_3, high_count, tl.where(enough_2, n_3, tl.where(enough_1, n_2, n_1)))
        low = tl.where(enough_3, third, tl.where(enough_2, middle, tl.where(enough_1, first, low)))
        low_count = tl.where(enough_3, n_3, tl.where(enough_2, n_2, tl.where(enough_1, n_1, low_count)))
        middle = low + (high - low) * 0.5
    return low, low_count


@triton.jit
def _threshold_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, threshold_ptr, V, BLOCK: tl.constexpr
):
    """The least score that a row's filters keep; -inf when it has none. One program a row."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * V
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    threshold = -float("inf")
    if (temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0)):
        best, least, count = _survey(row_ptr, V, temperature, BLOCK)
        low = least
        if (top_k > 0) & (top_k < count):
            low, count = _search(row_ptr, V, temperature, best, low, count, top_k, WEIGHED=False, BLOCK=BLOCK)
            threshold = low
        if top_p < 1:
            count, mass = _above(row_ptr, V, temperature, best, low, BLOCK)
            # A target of nothing still keeps the likeliest, whose mass is 1.
            target = tl.maximum(top_p * mass, 1e-30)
            low, count = _search(row_ptr, V, temperature, best, low, count, target, WEIGHED=True, BLOCK=BLOCK)
            threshold = low
        if min_p > 0:
            threshold = tl.maximum(threshold, best + tl.log(min_p))
        threshold = tl.minimum(threshold, best)
    tl.store(threshold_ptr + row, threshold)


@triton.jit
def _gumbel(word):
    """-log(-log1p(-v)) of v = (word + 0.5) × 2^-32; word uint32."""
    v = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    # 1 - v loses what v has beyond 2^-24: the ratio gives it back (Kahan's log1p). A tiny v is its own result.
    rest = 1.0 - v
    lost = 1.0 - rest
    exponential = tl.where(lost == 0, v, -tl.log(rest) * (v / tl.where(lost == 0, 1.0, lost)))
    return -tl.log(exponential)


@triton.jit
def _better(best, best_token, score, token):
    """The larger score with its token; the lower token of equals is `best_token`."""
    return tl.maximum(best, score), tl.where(score > best, token, best_token)


@triton.jit
def _pick_kernel(
    logits_ptr,
    temperature_ptr,
    threshold_ptr,
    seed_ptr,
    choice_ptr,
    position_ptr,
    best_ptr,
    token_ptr,
    V,
    RANDOM: tl.constexpr,
    FILTER: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Best score + noise and its token in one chunk of one row."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    row_ptr = logits_ptr + row * V
    quad = chunk * (CHUNK // 4) + tl.arange(0, CHUNK // 4)  # four tokens share a Philox counter
    temperature = 0.0
    if RANDOM:
        temperature = tl.load(temperature_ptr + row)
    if temperature > 0:
        score_0 = _load_scores(row_ptr, quad * 4, V, temperature)
        score_1 = _load_scores(row_ptr, quad * 4 + 1, V, temperature)
        score_2 = _load_scores(row_ptr, quad * 4 + 2, V, temperature)
        score_3 = _load_scores(row_ptr, quad * 4 + 3, V, temperature)
        if FILTER:
            threshold = tl.load(threshold_ptr + row)
            score_0 = tl.where(score_0 >= threshold, score_0, -float("inf"))
            score_1 = tl.where(score_1 >= threshold, score_1, -float("inf"))
            score_2 = tl.where(score_2 >= threshold, score_2, -float("inf"))
            score_3 = tl.where(score_3 >= threshold, score_3, -float("inf"))
        position = tl.load(position_ptr + row).to(tl.uint32, bitcast=True)
        choice = tl.load(choice_ptr + row).to(tl.uint32, bitcast=True)
        counter = quad.to(tl.uint32, bitcast=True)
        nothing = counter * 0
        word_0, word_1, word_2, word_3 = tl.philox(
            tl.load(seed_ptr + row), counter, nothing + position, nothing + choice, nothing
        )
        score_0 += _gumbel(word_0)
        score_1 += _gumbel(word_1)
        score_2 += _gumbel(word_2)
        score_3 += _gumbel(word_3)
    else:
        score_0 = _load_scores(row_ptr, quad * 4, V, 1.0)
        score_1 = _load_scores(row_ptr, quad * 4 + 1, V, 1.0)
        score_2 = _load_scores(row_ptr, quad * 4 + 2, V, 1.0)
        score_3 = _load_scores(row_ptr, quad * 4 + 3, V, 1.0)
    best, token = _better(score_0, quad * 4, score_1, quad * 4 + 1)
    best, token = _better(best, token, score_2, quad * 4 + 2)
    best, token = _better(best, token, score_3, quad * 4 + 3)
    greatest = tl.max(best, 0)
    # The lowest of the equals; a row of NaN gives a valid token all the same.
    lowest = tl.min(tl.where(best == greatest, token, V - 1), 0)
    tl.store(best_ptr + row * tl.num_programs(1) + chunk, greatest)
    tl.store(token_ptr + row * tl.num_programs(1) + chunk, tl.minimum(lowest, V - 1))


@triton.jit
def _combine_kernel(best_ptr, token_ptr, out_ptr, chunks, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, BLOCK)
    inside = chunk < chunks
    best = tl.load(best_ptr + row * chunks + chunk, mask=inside, other=-float("inf"))
    token = tl.load(token_ptr + row * chunks + chunk, mask=inside, other=2147483647)
    lowest = tl.min(tl.where(best == tl.max(best, 0), token, 2147483647), 0)
    # Only NaN compares equal to nothing.
    lowest = tl.where(lowest == 2147483647, tl.min(token, 0), lowest)
    tl.store(out_ptr + row, lowest.to(tl.int64))


def thresholds(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """f32 [R]: the least logit / temperature that each row's filters keep."""
    rows, vocabulary = logits.shape
    out = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _threshold_kernel[(rows,)](
        logits,
        batch.temperature,
        batch.top_k,
        batch.top_p,
        batch.min_p,
        out,
        vocabulary,
        BLOCK=min(SCAN_BLOCK, triton.next_power_of_2(vocabulary)),
        num_warps=16,
    )
    return out


def sample(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """See `Ops.sample`."""
    logits = logits.contiguous()
    rows, vocabulary = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return out
    filtered = batch.any_random and batch.any_filter
    threshold = thresholds(logits, batch) if filtered else batch.temperature
    chunk = min(PICK_CHUNK, max(16, triton.next_power_of_2(vocabulary)))
    chunks = triton.cdiv(vocabulary, chunk)
    best = torch.empty(rows, chunks, dtype=torch.float32, device=logits.device)
    token = torch.empty(rows, chunks, dtype=torch.int32, device=logits.device)
    _pick_kernel[(rows, chunks)](
        logits,
        batch.temperature,
        threshold,
        batch.seed,
        batch.choice,
        batch.position,
        best,
        token,
        vocabulary,
        RANDOM=batch.any_random,
        FILTER=filtered,
        CHUNK=chunk,
        num_warps=4,
    )
    _combine_kernel[(rows,)](best, token, out, chunks, BLOCK=triton.next_power_of_2(chunks), num_warps=1)
    return out


def apply_penalties(
    logits: Tensor,
    token_counts: Tensor,
    prompt_mask: Tensor,
    count_rows: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> Tensor:
    """See `Ops.apply_penalties`; logits must be contiguous."""
    rows, vocabulary = logits.shape
    if rows:
        _penalty_kernel[(rows, triton.cdiv(vocabulary, PENALTY_BLOCK))](
            logits,
            token_counts,
            prompt_mask,
            count_rows,
            repetition,
            presence,
            frequency,
            vocabulary,
            BLOCK=PENALTY_BLOCK,
            num_warps=4,
        )
    return logits
