"""Penalties, and the choice of a token without sorting. Oracle: `ReferenceOps.sample`, `.apply_penalties`.

The vocabulary is cut over programs that each find their best score + noise, and the best of those is the choice. Filters:
`kernels.filtered_sampling`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import launch_options, start_next, wait_for_inputs
from kernels.filtered_sampling import sample_filtered
from kernels.ops import SamplingBatch
from kernels.token_scores import best_of_parts, best_of_quads, inverse_temperature, load_quads, noisy_best
from kernels.typical_sampling import choose_typical

PICK_CHUNK = 4096
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
def _pick_kernel(
    logits_ptr,
    temperature_ptr,
    seed_ptr,
    choice_ptr,
    position_ptr,
    best_ptr,
    token_ptr,
    V,
    RANDOM: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Best score + noise and its token in one chunk of one row."""
    start_next(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    quad = chunk * (CHUNK // 4) + tl.arange(0, CHUNK // 4)
    logits_0, logits_1, logits_2, logits_3 = load_quads(logits_ptr + row * V, quad, V)
    temperature = 0.0
    if RANDOM:
        temperature = tl.load(temperature_ptr + row)
    if temperature > 0:
        seed, position, choice = tl.load(seed_ptr + row), tl.load(position_ptr + row), tl.load(choice_ptr + row)
        scale, lowest = inverse_temperature(temperature), -float("inf")
        best, token = noisy_best(quad, logits_0, logits_1, logits_2, logits_3, lowest, scale, seed, position, choice, V)
    else:
        best, token = best_of_quads(quad, logits_0, logits_1, logits_2, logits_3, V)
    tl.store(best_ptr + row * tl.num_programs(1) + chunk, best)
    tl.store(token_ptr + row * tl.num_programs(1) + chunk, token)


@triton.jit
def _combine_kernel(best_ptr, token_ptr, out_ptr, chunks, BLOCK: tl.constexpr, PDL: tl.constexpr):
    start_next(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    _, token = best_of_parts(best_ptr + row * chunks, token_ptr + row * chunks, chunks, BLOCK)
    tl.store(out_ptr + row, token.to(tl.int64))


def sample(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """See `Ops.sample`."""
    logits = logits.contiguous()
    rows, vocabulary = logits.shape
    if rows and batch.any_random and batch.any_filter:
        chosen = sample_filtered(logits, batch)
        if batch.typical_p is not None:
            choose_typical(logits, batch, chosen)
        return chosen
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return out
    chunk = min(PICK_CHUNK, max(16, triton.next_power_of_2(vocabulary)))
    chunks = triton.cdiv(vocabulary, chunk)
    best = torch.empty(rows, chunks, dtype=torch.float32, device=logits.device)
    token = torch.empty(rows, chunks, dtype=torch.int32, device=logits.device)
    options = launch_options(logits.device)
    _pick_kernel[(rows, chunks)](
        logits,
        batch.temperature,
        batch.seed,
        batch.choice,
        batch.position,
        best,
        token,
        vocabulary,
        RANDOM=batch.any_random,
        CHUNK=chunk,
        num_warps=4,
        **options,
    )
    _combine_kernel[(rows,)](best, token, out, chunks, BLOCK=triton.next_power_of_2(chunks), num_warps=1, **options)
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
