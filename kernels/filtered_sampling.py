"""The choice of a token under top-k, top-p and min-p, without sorting. Oracle: `ReferenceOps.sample`.

A filter is a threshold on the logits, and the choice is the best logit / temperature + noise at or above it. Few passes over
the logits decide it, spread over programs:

1. `_survey_kernel`: of each chunk of a row, the greatest logit of each group of 128 tokens; for rows without top-k also the
   mass, and the best noisy token as if there were no filter.
2. `_check_kernel`, rows with top-p but no top-k: the mass above that token's logit. If it is less than top_p the token is kept
   by the filter, and being the best of all it is the best of the kept: no threshold is needed. This holds with probability
   top_p at least.
3. `_resolve_kernel`, one program a row. If the token was not kept, no token of its logit or less is: the best noisy token above
   it is the next to be checked, and so on (the rejection of FlashInfer's sampler, Ye et al. 2025, with the noise held fixed:
   the result is the threshold's). With top-k, the k-th greatest of the groups' maxima bounds the threshold from below, so the
   kept tokens lie in the few groups that reach it. What fits neither (k > 64, many ties) is searched pass by pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import launch_options, start_next, wait_for_inputs
from kernels.ops import SamplingBatch
from kernels.token_scores import (
    best_of_parts,
    best_of_quads,
    inverse_temperature,
    load_quads,
    noisy_best,
    ordered_key,
)

CHUNK = 4096
GROUP = 128
MAX_GROUPS = 64  # groups that a program can hold: the limit of top-k here
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _filters(top_k_ptr, top_p_ptr, min_p_ptr, row, V):
    """(top_k or 0, top_p, min_p) of a row."""
    top_k = tl.load(top_k_ptr + row)
    return tl.where(top_k < V, tl.maximum(top_k, 0), 0), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)


@triton.jit
def _mass(logits, lowest, best, scale):
    """exp(score - best score) of the logits ≥ lowest, 0 of others."""
    return tl.where(logits >= lowest, tl.math.exp2((logits - best) * (scale * LOG2E)), 0.0)


@triton.jit
def _survey_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    choice_ptr,
    position_ptr,
    best_ptr,
    token_ptr,
    maxima_ptr,
    mass_ptr,
    V,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    start_next(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    part = row * tl.num_programs(1) + chunk
    quad = chunk * (CHUNK // 4) + tl.arange(0, CHUNK // 4)
    logits_0, logits_1, logits_2, logits_3 = load_quads(logits_ptr + row * V, quad, V)
    temperature = tl.load(temperature_ptr + row)
    top_k, top_p, min_p = _filters(top_k_ptr, top_p_ptr, min_p_ptr, row, V)
    if temperature > 0:
        scale = inverse_temperature(temperature)
        if (top_k > 0) | (top_p < 1) | (min_p > 0):
            greatest = tl.maximum(tl.maximum(logits_0, logits_1), tl.maximum(logits_2, logits_3))
            maxima = tl.max(tl.reshape(greatest, [CHUNK // GROUP, GROUP // 4]), 1)
            tl.store(maxima_ptr + part * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP), maxima)
            best = tl.max(maxima, 0)
            best = tl.where(best == -float("inf"), 0.0, best)
            lowest = -float("inf")
            mass = _mass(logits_0, lowest, best, scale) + _mass(logits_1, lowest, best, scale)
            mass += _mass(logits_2, lowest, best, scale) + _mass(logits_3, lowest, best, scale)
            tl.store(mass_ptr + part, tl.sum(mass, 0))
        if top_k == 0:
            seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + row)
            score, token = noisy_best(
                quad, logits_0, logits_1, logits_2, logits_3, -float("inf"), scale, seed, position,
                tl.load(choice_ptr + row), V,
            )  # fmt: skip
            tl.store(best_ptr + part, score)
            tl.store(token_ptr + part, token)
    else:
        score, token = best_of_quads(quad, logits_0, logits_1, logits_2, logits_3, V)
        tl.store(best_ptr + part, score)
        tl.store(token_ptr + part, token)


@triton.jit
def _row_best(maxima_ptr, row, parts, BLOCK: tl.constexpr, GROUPS: tl.constexpr):
    """The greatest logit of each part [BLOCK], and of the row (0 for one of nothing but -inf)."""
    part = tl.arange(0, BLOCK)
    group = tl.arange(0, GROUPS)
    pointers = maxima_ptr + (row * parts + part[:, None]) * GROUPS + group[None, :]
    maxima = tl.max(tl.load(pointers, mask=(part < parts)[:, None], other=-float("inf")), 1)
    best = tl.max(maxima, 0)
    return maxima, tl.where(best == -float("inf"), 0.0, best)


@triton.jit
def _check_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    best_ptr,
    token_ptr,
    maxima_ptr,
    above_ptr,
    V,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Mass of a chunk's tokens above the logit of the row's noisy best."""
    start_next(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    parts = tl.num_programs(1)
    temperature = tl.load(temperature_ptr + row)
    top_k, top_p, _min_p = _filters(top_k_ptr, top_p_ptr, min_p_ptr, row, V)
    if (temperature > 0) & (top_k == 0) & (top_p < 1):
        row_ptr = logits_ptr + row * V
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        logits = tl.load(row_ptr + token, mask=token < V, other=-float("inf")).to(tl.float32)
        _score, chosen = best_of_parts(best_ptr + row * parts, token_ptr + row * parts, parts, PARTS)
        pivot = tl.load(row_ptr + chosen).to(tl.float32)
        _part_best, best = _row_best(maxima_ptr, row, parts, PARTS, CHUNK // GROUP)
        above = tl.where(logits > pivot, _mass(logits, pivot, best, inverse_temperature(temperature)), 0.0)
        tl.store(above_ptr + row * parts + chunk, tl.sum(above, 0))


@triton.jit
def _scan_above(row_ptr, V, scale, best, pivot, BLOCK: tl.constexpr):
    """Mass of a row's tokens above a logit."""
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        token = start + tl.arange(0, BLOCK)
        logits = tl.load(row_ptr + token, mask=token < V, other=-float("inf")).to(tl.float32)
        mass += tl.where(logits > pivot, _mass(logits, pivot, best, scale), 0.0)
    return tl.sum(mass, 0)


@triton.jit
def _scan_best(row_ptr, V, lowest, above, scale, seed, position, choice, BLOCK: tl.constexpr):
    """The noisy best token of a row among those with lowest ≤ logit and above < logit."""
    best = -float("inf")
    token = V - 1
    for start in range(0, V, BLOCK):
        quad = start // 4 + tl.arange(0, BLOCK // 4)
        logits_0, logits_1, logits_2, logits_3 = load_quads(row_ptr, quad, V)
        greatest = tl.max(tl.maximum(tl.maximum(logits_0, logits_1), tl.maximum(logits_2, logits_3)), 0)
        if (greatest >= lowest) & (greatest > above):  # else the noise would be for nothing
            logits_0 = tl.where(logits_0 > above, logits_0, -float("inf"))
            logits_1 = tl.where(logits_1 > above, logits_1, -float("inf"))
            logits_2 = tl.where(logits_2 > above, logits_2, -float("inf"))
            logits_3 = tl.where(logits_3 > above, logits_3, -float("inf"))
            score, candidate = noisy_best(
                quad, logits_0, logits_1, logits_2, logits_3, lowest, scale, seed, position, choice, V
            )
            token = tl.where(score > best, candidate, token)
            best = tl.maximum(best, score)
    return token


@triton.jit
def _search(row_ptr, V, scale, best, low, low_count, target, WEIGHED: tl.constexpr, BLOCK: tl.constexpr):
    """The greatest logit with at least `target` tokens (WEIGHED: at least that mass) at or above it; `low` has that.

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
            token = start + tl.arange(0, BLOCK)
            logits = tl.load(row_ptr + token, mask=token < V, other=-float("inf")).to(tl.float32)
            count_1 += (logits >= first).to(tl.int32)
            count_2 += (logits >= middle).to(tl.int32)
            count_3 += (logits >= third).to(tl.int32)
            if WEIGHED:
                mass_1 += _mass(logits, first, best, scale)
                mass_2 += _mass(logits, middle, best, scale)
                mass_3 += _mass(logits, third, best, scale)
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
def search_row(row_ptr, V, scale, best, top_k, top_p, BLOCK: tl.constexpr):
    """The threshold of a row's top_k (> 0) and top_p, whatever they are, by passes over the row."""
    least = tl.full([BLOCK], float("inf"), tl.float32)
    finite = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        token = start + tl.arange(0, BLOCK)
        logits = tl.load(row_ptr + token, mask=token < V, other=-float("inf")).to(tl.float32)
        finite += (logits > -float("inf")).to(tl.int32)
        least = tl.minimum(least, tl.where(logits > -float("inf"), logits, float("inf")))
    low, count = tl.min(least, 0), tl.sum(finite, 0)
    if top_k < count:
        low, count = _search(row_ptr, V, scale, best, low, count, top_k, WEIGHED=False, BLOCK=BLOCK)
    if top_p < 1:
        mass = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            token = start + tl.arange(0, BLOCK)
            logits = tl.load(row_ptr + token, mask=token < V, other=-float("inf")).to(tl.float32)
            mass += _mass(logits, low, best, scale)
        target = tl.maximum(top_p * tl.sum(mass, 0), 1e-30)
        low, count = _search(row_ptr, V, scale, best, low, count, target, WEIGHED=True, BLOCK=BLOCK)
    return low


@triton.jit
def _count4(key_0, key_1, key_2, key_3, pivot):
    count = (key_0 >= pivot).to(tl.int32) + (key_1 >= pivot).to(tl.int32)
    return tl.sum(count + (key_2 >= pivot).to(tl.int32) + (key_3 >= pivot).to(tl.int32), 0)


@triton.jit
def _middle(low, high):
    """Of two int32 of any signs, rounded up."""
    return (low | high) - ((low ^ high) >> 1)


@triton.jit
def _resolve_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    choice_ptr,
    position_ptr,
    best_ptr,
    token_ptr,
    maxima_ptr,
    mass_ptr,
    above_ptr,
    groups_ptr,
    out_ptr,
    V,
    parts,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    MAX_GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    start_next(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * V
    temperature = tl.load(temperature_ptr + row)
    top_k, top_p, min_p = _filters(top_k_ptr, top_p_ptr, min_p_ptr, row, V)
    chosen = 0
    if (temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0)):
        scale = inverse_temperature(temperature)
        seed, choice, position = tl.load(seed_ptr + row), tl.load(choice_ptr + row), tl.load(position_ptr + row)
        part_best, best = _row_best(maxima_ptr, row, parts, PARTS, CHUNK // GROUP)
        lowest = -float("inf")
        if min_p > 0:
            lowest = tl.minimum(best + tl.log(min_p) * temperature, best)
        if top_k == 0:
            _score, chosen = best_of_parts(best_ptr + row * parts, token_ptr + row * parts, parts, PARTS)
            part = tl.arange(0, PARTS)
            inside = part < parts
            mass = tl.load(mass_ptr + row * parts + part, mask=inside, other=0.0)
            mass *= tl.math.exp2((tl.where(part_best == -float("inf"), 0.0, part_best) - best) * (scale * LOG2E))
            target = tl.maximum(top_p * tl.sum(tl.where(inside, mass, 0.0), 0), 1e-30)
            pivot = tl.load(row_ptr + chosen).to(tl.float32)
            above = 0.0
            if top_p < 1:
                above = tl.sum(tl.load(above_ptr + row * parts + part, mask=inside, other=0.0), 0)
            # NaN compares false: it ends the loop. So does -inf, which is chosen only where there is nothing else: a grammar and
            # bans can forbid all that a row has.
            while (((top_p < 1) & (above >= target)) | (pivot < lowest)) & (pivot > -float("inf")):
                # The next pool leaves out what min-p does, and what has as little as the one refused by top-p.
                bound = -float("inf")
                if (top_p < 1) & (above >= target):
                    bound = pivot
                chosen = _scan_best(row_ptr, V, lowest, bound, scale, seed, position, choice, BLOCK)
                pivot = tl.load(row_ptr + chosen).to(tl.float32)
                if top_p < 1:
                    above = _scan_above(row_ptr, V, scale, best, pivot, BLOCK)
        else:
            group = tl.arange(0, PARTS * (CHUNK // GROUP))
            maxima = tl.load(
                maxima_ptr + row * parts * (CHUNK // GROUP) + group,
                mask=group < parts * (CHUNK // GROUP),
                other=-float("inf"),
            )
            maxima = ordered_key(maxima)
            low = ordered_key(tl.full([1], -float("inf"), tl.float32))
            low = tl.sum(low, 0)
            high = tl.maximum(tl.max(maxima, 0), low)
            # The greatest key that at least top_k groups reach. With fewer groups of any finite logit it is that of -inf.
            while (low < high) & (top_k <= MAX_GROUPS):
                middle = _middle(low, high)
                enough = tl.sum((maxima >= middle).to(tl.int32), 0) >= top_k
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle - 1)
            reaching = maxima >= low
            count = tl.sum(reaching.to(tl.int32), 0)
            if (top_k > MAX_GROUPS) | (count > MAX_GROUPS):
                threshold = search_row(row_ptr, V, scale, best, top_k, top_p, BLOCK)
                lowest = tl.minimum(tl.maximum(threshold, lowest), best)
                chosen = _scan_best(row_ptr, V, lowest, -float("inf"), scale, seed, position, choice, BLOCK)
            else:
                place = tl.cumsum(reaching.to(tl.int32), 0) - 1
                tl.store(groups_ptr + row * MAX_GROUPS + place, group, mask=reaching)
                tl.debug_barrier()  # what other threads of this program stored is read next
                index = tl.arange(0, MAX_GROUPS * (GROUP // 4))
                member = index // (GROUP // 4)
                held = tl.load(groups_ptr + row * MAX_GROUPS + member, mask=member < count, other=V)
                # A group too few to fill the tile is one after the vocabulary.
                quad = tl.where(member < count, held * (GROUP // 4) + index % (GROUP // 4), V // 4 + 1)
                logits_0, logits_1, logits_2, logits_3 = load_quads(row_ptr, quad, V)
                key_0, key_1 = ordered_key(logits_0), ordered_key(logits_1)
                key_2, key_3 = ordered_key(logits_2), ordered_key(logits_3)
                high = tl.maximum(tl.max(maxima, 0), low)
                while low < high:
                    middle = _middle(low, high)
                    enough = _count4(key_0, key_1, key_2, key_3, middle) >= top_k
                    low = tl.where(enough, middle, low)
                    high = tl.where(enough, high, middle - 1)
                if top_p < 1:
                    all_mass = -float("inf")
                    mass_0, mass_1 = _mass(logits_0, all_mass, best, scale), _mass(logits_1, all_mass, best, scale)
                    mass_2, mass_3 = _mass(logits_2, all_mass, best, scale), _mass(logits_3, all_mass, best, scale)
                    mass = tl.where(key_0 >= low, mass_0, 0.0) + tl.where(key_1 >= low, mass_1, 0.0)
                    mass += tl.where(key_2 >= low, mass_2, 0.0) + tl.where(key_3 >= low, mass_3, 0.0)
                    target = tl.maximum(top_p * tl.sum(mass, 0), 1e-30)
                    high = tl.maximum(tl.max(maxima, 0), low)
                    while low < high:
                        middle = _middle(low, high)
                        mass = tl.where(key_0 >= middle, mass_0, 0.0) + tl.where(key_1 >= middle, mass_1, 0.0)
                        mass += tl.where(key_2 >= middle, mass_2, 0.0) + tl.where(key_3 >= middle, mass_3, 0.0)
                        enough = tl.sum(mass, 0) >= target
                        low = tl.where(enough, middle, low)
                        high = tl.where(enough, high, middle - 1)
                logits_0 = tl.where(key_0 >= low, logits_0, -float("inf"))
                logits_1 = tl.where(key_1 >= low, logits_1, -float("inf"))
                logits_2 = tl.where(key_2 >= low, logits_2, -float("inf"))
                logits_3 = tl.where(key_3 >= low, logits_3, -float("inf"))
                _score, chosen = noisy_best(
                    quad, logits_0, logits_1, logits_2, logits_3, lowest, scale, seed, position, choice, V
                )
    else:
        _score, chosen = best_of_parts(best_ptr + row * parts, token_ptr + row * parts, parts, PARTS)
    tl.store(out_ptr + row, chosen.to(tl.int64))


def sample_filtered(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """As `Ops.sample`, of contiguous logits [R, V] with R > 0; rows may have filters, none, or be greedy."""
    rows, vocabulary = logits.shape
    device = logits.device
    chunk = min(CHUNK, max(GROUP, triton.next_power_of_2(vocabulary)))
    parts = triton.cdiv(vocabulary, chunk)
    padded = triton.next_power_of_2(parts)
    floats = torch.empty(3, rows, parts, dtype=torch.float32, device=device)
    best, mass, above = floats.unbind()
    maxima = torch.empty(rows, parts, chunk // GROUP, dtype=torch.float32, device=device)
    token = torch.empty(rows, parts, dtype=torch.int32, device=device)
    groups = torch.empty(rows, MAX_GROUPS, dtype=torch.int32, device=device)
    out = torch.empty(rows, dtype=torch.int64, device=device)
    filters = batch.temperature, batch.top_k, batch.top_p, batch.min_p
    noise = batch.seed, batch.choice, batch.position
    sizes = {"CHUNK": chunk, "GROUP": GROUP}
    options = launch_options(device)
    _survey_kernel[(rows, parts)](
        logits, *filters, *noise, best, token, maxima, mass, vocabulary, **sizes, num_warps=4, **options
    )
    _check_kernel[(rows, parts)](
        logits, *filters, best, token, maxima, above, vocabulary, **sizes, PARTS=padded, num_warps=4, **options
    )
    _resolve_kernel[(rows,)](
        logits,
        *filters,
        *noise,
        best,
        token,
        maxima,
        mass,
        above,
        groups,
        out,
        vocabulary,
        parts,
        **sizes,
        PARTS=padded,
        MAX_GROUPS=MAX_GROUPS,
        BLOCK=chunk,
        num_warps=8,
        **options,
    )
    return out
