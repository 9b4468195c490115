"""What the device knows of each running sequence, and how the host tells it of changes.

A sequence's *slot* is its row in every tensor here. A decode step needs nothing but the list of slots: its ids, positions, lengths,
block tables and sampling parameters are on the device already, left there by the step before. What does change (a new sequence, a
new block) goes there as a small difference, in one copy a step. So a step can be launched before the one before it is read back.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.ops import Ops
from services.model_worker.logit_edits import EditState, recent_tokens, remembers_tokens
from services.model_worker.sequence import Sequence
from services.model_worker.step_plan import SchedulerLimits
from shared.sampling import SamplingParams

Words = NDArray[np.int32]

# Rows of StepState.fields; the first FLOAT_FIELDS are f32, bit for bit.
FIELDS = (
    "temperature", "top_p", "min_p", "repetition", "presence", "frequency", "typical_p", "top_k", "choice", "prompt_len",
    "penalised", "edited", "rooted",
)  # fmt: skip
FLOAT_FIELDS = 7
_ALIGN = 4  # words; kernels are compiled for pointers aligned to 16 bytes, and again for others
_REMEMBERED = 1024  # words: so few are compared with what was sent before


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def field_row(params: SamplingParams, choice: int, prompt_len: int) -> Words:
    """A sequence's column of StepState.fields and, in two more words, its seed: int32 [len(FIELDS) + 2]. Raises ValueError,
    TypeError or OverflowError for parameters that cannot be represented."""
    row = np.zeros(len(FIELDS) + 2, dtype=np.int32)
    row[:FLOAT_FIELDS].view(np.float32)[:] = (
        params.temperature, params.top_p, params.min_p, params.repetition_penalty, params.presence_penalty,
        params.frequency_penalty, params.typical_p,
    )  # fmt: skip
    rooted = params.has_penalties or remembers_tokens(params)
    row[FLOAT_FIELDS : len(FIELDS)] = (params.top_k, choice, prompt_len, params.has_penalties, params.has_edits, rooted)
    row[len(FIELDS) :] = np.array([params.seed & (2**64 - 1)], dtype=np.uint64).view(np.int32)
    return row


class Staging:
    """Collects a step's small arrays in pinned memory and sends them in one copy.

    `put` returns the device's view of what it was given, valid after `upload` until the next one; nobody writes there. The pinned
    buffers go round, so that one is rewritten only after the step that sent it has retired: `in_flight` is how many steps may not have.
    """

    def __init__(self, words: int, device: torch.device, in_flight: int) -> None:
        pinned = device.type == "cuda"
        self._host = [torch.empty(words, dtype=torch.int32, pin_memory=pinned) for _ in range(in_flight + 1)]
        self._arrays = [buffer.numpy() for buffer in self._host]
        self.device_words = torch.zeros(words, dtype=torch.int32, device=device)
        self._current = 0
        self._used = 0
        self._sent = np.empty(0, dtype=np.int32)  # what the device has, if it is little

    def begin(self) -> None:
        self._current = (self._current + 1) % len(self._host)
        self._used = 0

    def put(self, values: Words | list[int]) -> Tensor:
        """int32 [n] → its place on the device; the first thing put after `begin` is always at the same address."""
        start, end = self._used, self._used + len(values)
        self._arrays[self._current][start:end] = values
        self._used = round_up(end, _ALIGN)
        return self.device_words[start:end]

    def upload(self) -> None:
        """Does nothing if the device has it already, as it has in steady decodes: a copy between two steps takes time."""
        words = self._arrays[self._current][: self._used]
        if np.array_equal(words, self._sent):
            return
        self.device_words[: self._used].copy_(self._host[self._current][: self._used], non_blocking=True)
        self._sent = words[: self._used if self._used <= _REMEMBERED else 0].copy()

    def send(self, values: Words) -> Tensor:
        """These alone: int32 [n] on the device."""
        self.begin()
        placed = self.put(values)
        self.upload()
        return placed


@dataclass(slots=True)
class DecodeInputs:
    """One row for each of n slots: ids int64 [n], positions, kv_slots, context_len int32 [n], block_table int32 [n, max_blocks]."""

    ids: Tensor
    positions: Tensor
    kv_slots: Tensor
    context_len: Tensor
    block_table: Tensor


class StepState:
    """Tensors by slot; the last slot, `null_slot`, belongs to nobody: padded rows point there.

    last_token    int64 [slots]            the newest token, not in the cache yet
    context       int32 [slots]            tokens in the cache
    block_table   int32 [slots, max_blocks]
    fields        int32 [len(FIELDS), slots], seed int64 [slots]: sampling parameters. `rooted`: what a token's logits are depends on
                  the tokens before it otherwise than through the model
    edits         bias and bans of single tokens, kept up only for sequences that are `edited`
    token_counts  int32 [slots, V], prompt_mask bool [slots, V]: for penalties, kept up only for sequences that have any
    """

    def __init__(self, limits: SchedulerLimits, vocab_size: int, device: torch.device) -> None:
        slots = limits.max_seqs + 1
        self.null_slot = limits.max_seqs
        self.block_size = limits.block_size
        self.max_blocks = limits.blocks_of(limits.max_model_len + limits.overshoot)
        self.last_token = torch.zeros(slots, dtype=torch.int64, device=device)
        self.context = torch.zeros(slots, dtype=torch.int32, device=device)
        self.block_table = torch.zeros(slots, self.max_blocks, dtype=torch.int32, device=device)
        self.fields = torch.zeros(len(FIELDS), slots, dtype=torch.int32, device=device)
        self.seed = torch.zeros(slots, dtype=torch.int64, device=device)
        self.token_counts = torch.zeros(slots, vocab_size, dtype=torch.int32, device=device)
        self.prompt_mask = torch.zeros(slots, vocab_size, dtype=torch.bool, device=device)
        self.edits = EditState(slots, device)
        self._no_depth = torch.zeros(1, dtype=torch.int32, device=device)

    def stage_admissions(self, staging: Staging, sequences: list[Sequence]) -> tuple[Tensor, ...]:
        """Puts what `apply_admissions` needs."""
        slots = [sequence.slot for sequence in sequences]
        edited = [sequence for sequence in sequences if sequence.edit_row is not None]
        rows = np.stack([sequence.device_row for sequence in sequences], axis=1)
        seeds = np.ascontiguousarray(rows[len(FIELDS) :].T)
        return (
            staging.put(slots),
            staging.put([sequence.tokens[-1] for sequence in sequences]),
            staging.put([sequence.cached for sequence in sequences]),
            staging.put(rows[: len(FIELDS)].ravel()).view(len(FIELDS), -1),
            staging.put(seeds.ravel()).view(torch.int64),
            *self._stage_edits(staging, edited),
        )

    @staticmethod
    def _stage_edits(staging: Staging, sequences: list[Sequence]) -> tuple[Tensor, ...]:
        if not sequences:
            return ()
        recent = [recent_tokens(np.frombuffer(sequence.tokens, np.int32)) for sequence in sequences]
        return (
            staging.put([sequence.slot for sequence in sequences]),
            staging.put(np.concatenate([sequence.edit_row for sequence in sequences])).view(len(sequences), -1),
            staging.put(np.concatenate(recent)).view(len(sequences), -1),
        )

    def apply_admissions(self, staged: tuple[Tensor, ...]) -> None:
        slots, tokens, cached, fields, seeds, *edits = staged
        slots = slots.long()
        self.context.index_copy_(0, slots, cached)
        if edits:
            edited, rows, recent = edits
            self.edits.write(edited.long(), rows, recent)
        self.last_token.index_copy_(0, slots, tokens.long())
        self.fields.index_copy_(1, slots, fields)
        self.seed.index_copy_(0, slots, seeds)

    def field(self, name: str, slots: Tensor) -> Tensor:
        """One of FIELDS of the sequences in `slots` int64 [n]: f32 or int32 [n]."""
        row = FIELDS.index(name)
        values = self.fields[row].index_select(0, slots)
        return values.view(torch.float32) if row < FLOAT_FIELDS else values

    def write_block_table(self, entries: Tensor, blocks: Tensor) -> None:
        """entries int32 [n]: slot × max_blocks + column."""
        self.block_table.view(-1).index_copy_(0, entries.long(), blocks)

    def reset_penalties(self, sequence: Sequence) -> None:
        """Counts the known tokens of a sequence that just got its slot."""
        tokens = torch.frombuffer(sequence.tokens, dtype=torch.int32).to(self.token_counts.device).long()
        prompt, generated = tokens[: sequence.prompt_len], tokens[sequence.prompt_len :]
        self.prompt_mask[sequence.slot].zero_()[prompt] = True
        self.token_counts[sequence.slot].zero_().index_add_(0, generated, torch.ones_like(generated, dtype=torch.int32))

    def decode_inputs(self, slots: Tensor, ops: Ops, advance: bool = False) -> DecodeInputs:
        """slots int64 [n]; padded ones get context_len 0 and kv slot -1. advance: `context` counts these rows from now on."""
        rows = ops.lay_out(
            slots, self._no_depth, self.context, self.last_token, self.block_table, self.block_size, advance
        )
        return DecodeInputs(rows.tokens, rows.positions, rows.kv_slots.flatten(), rows.context_len, rows.block_table)

    def kv_slots(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Cache slots int32 [T] of the positions [T] of the sequences in `slots` int64 [T]."""
        block = self.block_table[slots, (positions // self.block_size).long()]
        return block * self.block_size + positions % self.block_size


assert sys.byteorder == "little", "field_row splits seeds into words, low one first"
