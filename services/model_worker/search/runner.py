"""The forward passes of searches. They run beside that of plain sequences: their rows are of another kind, and what they want to know
of the logits is another thing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.ops import AttentionBatch, Ops
from services.model_worker.kv_cache import KVCache
from services.model_worker.models.decoder import Decoder
from services.model_worker.sampler import Sampled, SamplingMode, choose
from services.model_worker.search.contrastive import (
    Amateur,
    Memories,
    best_candidate,
    degeneration,
    direction,
    guided_scores,
)
from services.model_worker.sequence import Sequence
from services.model_worker.step_plan import Chunk, SchedulerLimits, StepPlan
from services.model_worker.step_state import Staging, StepState, round_up
from shared.sampling import MAX_BEAMS, MAX_CONTRASTIVE, MAX_LOGPROBS


class _ChunkRows(NamedTuple):
    """Staged chunks of prompts: ids, positions, row_slots int32 [T]; query_start int32 [S + 1], context_len and slots int32 [S]."""

    ids: Tensor
    positions: Tensor
    row_slots: Tensor
    query_start: Tensor
    context_len: Tensor
    slots: Tensor
    max_query: int
    max_context: int


class SearchRunner:
    """One for a model runner, with the same state and stream.

    amateur    for contrastive decoding;  memories: for contrastive search. Who needs what is not there is refused before
    in_flight  as in `Staging`
    """

    def __init__(
        self,
        decoder: Decoder,
        ops: Ops,
        limits: SchedulerLimits,
        state: StepState,
        in_flight: int,
        amateur: Amateur | None = None,
        memories: Memories | None = None,
    ) -> None:
        self.amateur = amateur
        self.memories = memories
        self._max_seqs = limits.max_seqs
        self._decoder = decoder
        self._ops = ops
        self._state = state
        device = state.context.device
        # Three arrays of the rows of prompts, once for the memories and once for the amateur; some of sequences and beams.
        words = 6 * limits.max_batched_tokens + 64 * limits.max_seqs + 256
        self._staging = Staging(words, device, in_flight)
        self._row_starts = torch.arange(limits.max_batched_tokens + 1, dtype=torch.int32, device=device)

    def launch(self, plan: StepPlan, cache: KVCache) -> tuple[list[Sampled], list[Sampled]]:
        """Call when the step's changes of state are on their way to the device. Returns what is chosen for plan.contrasted and then for
        plan.guided, and what may follow the beams: a row of log-probabilities for each, in order."""
        self._staging.begin()
        chosen: list[Callable[[], Sampled]] = []
        candidates: list[Callable[[], Sampled]] = []
        others: list[Callable[[], None]] = []
        if plan.beams:
            candidates.append(self._stage_beams(plan.beams, cache))
        if plan.contrasted_chunks:
            others.append(self._stage_memories(plan.contrasted_chunks, cache))
        for _, group in groupby(plan.contrasted, key=lambda sequence: sequence.candidates):
            chosen.append(self._stage_contrasted(list(group), cache))
        if plan.amateur_chunks:
            others.append(partial(self._run_amateur, self._stage_chunks(plan.amateur_chunks)))
        if plan.guided:
            chosen.append(self._stage_guided(plan.guided, cache))
        self._staging.upload()
        for run in others:
            run()
        return [run() for run in chosen], [run() for run in candidates]

    def rehearse(self, nobody: Tensor, cache: KVCache) -> None:
        """What takes the most memory, on slots that are nobody's, int64. Writes nothing that matters before the first step."""
        rows = self._max_seqs
        zeros = torch.zeros(3 * rows, dtype=torch.int32, device=nobody.device)
        if self.amateur is None:
            wanted = min(MAX_BEAMS, self._decoder.config.vocab_size)
            self._run_beams(nobody[:rows], zeros[:rows], zeros[:rows], 1, wanted, cache)
        else:
            everything = SamplingMode(random=True, filters=True, logprobs=MAX_LOGPROBS, typical=True)
            self._run_guided(nobody, zeros, rows, 1, everything, cache)
        if self.memories is not None:
            longest = self.memories.directions[0]
            degeneration(longest, zeros[:1], longest[:MAX_CONTRASTIVE])

    # ---- beams

    def _stage_beams(self, sequences: list[Sequence], cache: KVCache) -> Callable[[], Sampled]:
        put = self._staging.put
        slots: list[int] = []
        tokens: list[int] = []
        positions: list[int] = []
        wanted = 0
        for sequence in sequences:
            assert sequence.group is not None
            beams = sequence.group.beams
            slots += [beam.slot for beam in beams]
            tokens += [beam.token for beam in beams]
            positions += [sequence.computed - 1] * len(beams)
            wanted = max(wanted, sequence.group.search.candidates)
        return partial(self._run_beams, put(slots), put(tokens), put(positions), max(positions) + 1, wanted, cache)

    def _run_beams(
        self, slots: Tensor, tokens: Tensor, positions: Tensor, max_context: int, wanted: int, cache: KVCache
    ) -> Sampled:
        """The host knows all about beams, so nothing of the device's state is used but the block tables."""
        state, rows = self._state, slots.long()
        batch = self._decode_batch(positions + 1, state.block_table.index_select(0, rows), 1, max_context)
        hidden = self._decoder.forward(
            tokens.long(), positions, state.kv_slots(rows, positions), batch, cache.layers, None
        )
        ids = tokens.long()
        return Sampled(ids[:, None], self._ops.logprobs(self._decoder.logits(hidden), ids, wanted))

    # ---- contrastive search

    def _stage_memories(self, chunks: list[Chunk], cache: KVCache) -> Callable[[], None]:
        put = self._staging.put
        ends = np.cumsum([chunk.rows for chunk in chunks])
        of_rows = put(np.repeat([chunk.sequence.memory for chunk in chunks], [chunk.rows for chunk in chunks]))
        final = [index for index, chunk in enumerate(chunks) if chunk.final]
        last = put([int(ends[index]) - 1 for index in final])
        of_final = put([chunks[index].sequence.memory for index in final])
        return partial(self._run_memories, self._stage_chunks(chunks), of_rows, last, of_final, cache)

    def _run_memories(self, rows: _ChunkRows, of_rows: Tensor, last: Tensor, of_final: Tensor, cache: KVCache) -> None:
        assert self.memories is not None
        hidden = self._forward_chunks(self._decoder, rows, cache, None)
        self._state.context.index_copy_(0, rows.slots.long(), rows.context_len)
        self.memories.remember(of_rows.long(), rows.positions.long(), direction(hidden))
        if len(last):
            self.memories.propose(of_final.long(), self._decoder.logits(hidden.index_select(0, last)))

    def _stage_contrasted(self, sequences: list[Sequence], cache: KVCache) -> Callable[[], Sampled]:
        put = self._staging.put
        alpha = np.array([sequence.request.params.penalty_alpha for sequence in sequences], np.float32)
        return partial(
            self._run_contrasted,
            put([sequence.slot for sequence in sequences]),
            put([sequence.memory for sequence in sequences]),
            put(alpha.view(np.int32)),
            sequences[0].candidates,
            [sequence.memory for sequence in sequences],
            max(sequence.computed for sequence in sequences),
            cache,
        )

    def _run_contrasted(
        self,
        slots: Tensor,
        memory: Tensor,
        alpha: Tensor,
        count: int,
        memories: list[int],
        longest: int,
        cache: KVCache,
    ) -> Sampled:
        """Each candidate's row stands at the position after the context and sees the context and itself. The chosen one's stays.

        memories: `memory`, for the host; longest: at least the context of each, this step's token included."""
        kept, state = self.memories, self._state
        assert kept is not None
        slots, memory = slots.long(), memory.long()
        context = state.context.index_select(0, slots)
        tokens = kept.candidates[memory, :count]
        lanes = torch.arange(count, dtype=torch.int32, device=slots.device)
        places = context[:, None] + lanes
        kv_slots = state.kv_slots(slots.repeat_interleave(count), places.flatten())
        batch = self._decode_batch(
            context + count, state.block_table.index_select(0, slots), count, longest - 1 + count, 1 << lanes.long()
        )
        hidden = self._decoder.forward(
            tokens.flatten(), context.repeat_interleave(count), kv_slots, batch, cache.layers, None
        )
        directions = direction(hidden).view(*tokens.shape, -1)
        penalties = torch.stack([
            degeneration(kept.directions[index, :longest], context[row : row + 1], directions[row])
            for row, index in enumerate(memories)
        ])  # fmt: skip
        best = best_candidate(kept.probabilities[memory, :count], penalties, alpha.view(torch.float32))
        rows = torch.arange(len(memories), device=slots.device)
        chosen = rows * count + best
        source, first = kv_slots.index_select(0, chosen), kv_slots[::count]
        self._ops.move_kv(cache.data[0], cache.data[1], source, torch.where(best == 0, -1, first))
        kept.remember(memory, context.long(), directions[rows, best])
        kept.propose(memory, self._decoder.logits(hidden.index_select(0, chosen)))
        state.context.index_copy_(0, slots, context + 1)
        return Sampled(tokens[rows, best][:, None])

    # ---- contrastive decoding

    def _run_amateur(self, rows: _ChunkRows) -> None:
        """The prompts that the expert computes in the same step among those of plain sequences."""
        assert self.amateur is not None
        self._forward_chunks(self.amateur.decoder, rows, self.amateur.cache, self._row_starts[:1])

    def _stage_guided(self, sequences: list[Sequence], cache: KVCache) -> Callable[[], Sampled]:
        put, count = self._staging.put, len(sequences)
        params = [sequence.request.params for sequence in sequences]
        numbers = np.array(
            [
                [p.cd_alpha for p in params],
                [-1.0 if p.cd_beta is None else p.cd_beta for p in params],
                [p.cd_temperature for p in params],
            ],
            np.float32,
        )
        padding = [self._state.null_slot] * (round_up(count, 4) - count)
        return partial(
            self._run_guided,
            put([sequence.slot for sequence in sequences] + padding),
            put(numbers.view(np.int32).ravel()),
            count,
            max(sequence.computed for sequence in sequences),
            SamplingMode.union(sequence.sampling_mode for sequence in sequences),
            cache,
        )

    def _run_guided(
        self, padded: Tensor, numbers: Tensor, count: int, longest: int, mode: SamplingMode, cache: KVCache
    ) -> Sampled:
        assert self.amateur is not None
        state, padded = self._state, padded.long()
        slots = padded[:count]
        inputs = state.decode_inputs(slots, self._ops, advance=True)
        batch = self._decode_batch(inputs.context_len, inputs.block_table, 1, longest)
        both = []
        for decoder, of_model in ((self._decoder, cache), (self.amateur.decoder, self.amateur.cache)):
            hidden = decoder.forward(inputs.ids, inputs.positions, inputs.kv_slots, batch, of_model.layers, None)
            both.append(decoder.logits(hidden))
        expert, amateur = both
        alpha, beta, temperature = numbers.view(torch.float32).view(3, count)
        scores = guided_scores(expert, amateur, alpha, beta, temperature)
        ids = choose(self._ops, state, scores, padded, inputs.context_len, mode)
        self._ops.keep_chosen(slots, ids, state.last_token, None, None)
        logprobs = self._ops.logprobs(expert, ids, mode.logprobs) if mode.logprobs >= 0 else None
        return Sampled(ids[:, None], logprobs)

    # ---- rows

    def _decode_batch(
        self, context_len: Tensor, block_table: Tensor, rows: int, max_context: int, mask: Tensor | None = None
    ) -> AttentionBatch:
        """Sequences with `rows` rows each."""
        count = len(context_len)
        return AttentionBatch(
            query_start=self._row_starts[: count + 1] * rows,
            context_len=context_len,
            block_table=block_table,
            decode_seqs=count,
            decode_rows=rows,
            max_query=0,
            max_context=max_context,
            tree_mask=mask,
        )

    def _stage_chunks(self, chunks: list[Chunk]) -> _ChunkRows:
        put = self._staging.put
        lengths = [chunk.rows for chunk in chunks]
        tokens = [np.frombuffer(c.sequence.tokens, np.int32, c.rows, 4 * c.start) for c in chunks]
        positions = [np.arange(c.start, c.start + c.rows, dtype=np.int32) for c in chunks]
        contexts = [chunk.start + chunk.rows for chunk in chunks]
        slots = [chunk.sequence.slot for chunk in chunks]
        return _ChunkRows(
            put(np.concatenate(tokens)),
            put(np.concatenate(positions)),
            put(np.repeat(np.array(slots, np.int32), lengths)),
            put(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)),
            put(contexts),
            put(slots),
            max(lengths),
            max(contexts),
        )

    def _forward_chunks(self, decoder: Decoder, rows: _ChunkRows, cache: KVCache, wanted: Tensor | None) -> Tensor:
        state = self._state
        batch = AttentionBatch(
            query_start=rows.query_start,
            context_len=rows.context_len,
            block_table=state.block_table.index_select(0, rows.slots),
            decode_seqs=0,
            decode_rows=1,
            max_query=rows.max_query,
            max_context=rows.max_context,
        )
        kv_slots = state.kv_slots(rows.row_slots.long(), rows.positions)
        return decoder.forward(rows.ids.long(), rows.positions, kv_slots, batch, cache.layers, wanted)
