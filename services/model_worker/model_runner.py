"""Runs planned steps on the device: stages what changed, launches the model and the sampler, hands back a ticket for the ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from kernels.ops import AttentionBatch, Ops
from services.model_worker.batch_scheduler import SchedulerLimits, StepPlan
from services.model_worker.cuda_graphs import Graphs, padded_size, padded_sizes
from services.model_worker.interface import TokenLogprobs
from services.model_worker.kv_cache import KVCache
from services.model_worker.models.decoder import Decoder
from services.model_worker.sampler import CAPTURED_MODES, Sampled, SamplingMode, sample
from services.model_worker.step_state import Staging, StepState, round_up
from shared.sampling import MAX_LOGPROBS

STEPS_IN_FLIGHT = 2  # the one that the device works on and the one behind it


@dataclass(slots=True)
class StepResult:
    """For each of plan.sampled: its new token ids (one, or more with speculation), and their log-probabilities if wanted."""

    ids: list[list[int]]
    logprobs: list[list[TokenLogprobs] | None] | None


class Ticket:
    """A launched step. `result` waits for it, without the GIL."""

    __slots__ = ("_event", "_ids", "_logprobs", "plan")

    def __init__(
        self, plan: StepPlan, ids: Tensor, logprobs: tuple[Tensor, ...] | None, event: torch.cuda.Event | None
    ):
        self.plan = plan
        self._ids = ids
        self._logprobs = logprobs
        self._event = event

    def ready(self) -> bool:
        return self._event is None or self._event.query()

    def result(self) -> StepResult:
        if self._event is not None:
            self._event.synchronize()
        ids = self._ids.numpy()[:, None].tolist()
        if self._logprobs is None:
            return StepResult(ids, None)
        chosen, top, top_ids = (tensor.tolist() for tensor in self._logprobs)
        logprobs: list[list[TokenLogprobs] | None] = []
        for row, sequence in enumerate(self.plan.sampled):
            wanted = sequence.request.params.logprobs
            logprobs.append(
                None if wanted is None else [TokenLogprobs(chosen[row], top_ids[row][:wanted], top[row][:wanted])]
            )
        return StepResult(ids, logprobs)


class _Readback:
    """Pinned buffers for one step's ids and log-probabilities, used again when its ticket has been redeemed."""

    def __init__(self, rows: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.ids = torch.empty(rows, dtype=torch.int64, pin_memory=pinned)
        self.chosen = torch.empty(rows, dtype=torch.float32, pin_memory=pinned)
        self.top = torch.empty(rows * MAX_LOGPROBS, dtype=torch.float32, pin_memory=pinned)
        self.top_ids = torch.empty(rows * MAX_LOGPROBS, dtype=torch.int64, pin_memory=pinned)
        self.event = torch.cuda.Event() if pinned else None

    def fetch(self, plan: StepPlan, sampled: Sampled | None, rows: int) -> Ticket:
        def copy(target: Tensor, source: Tensor) -> Tensor:
            return target[: source.numel()].view(source.shape).copy_(source, non_blocking=True)

        logprobs = None
        ids = self.ids[:0]
        if sampled is not None:
            ids = copy(self.ids, sampled.ids[:rows])
            if sampled.logprobs is not None:
                targets = (self.chosen, self.top, self.top_ids)
                logprobs = tuple(copy(*pair) for pair in zip(targets, sampled.logprobs, strict=True))
        if self.event is not None:
            self.event.record()
        return Ticket(plan, ids, logprobs, self.event)


class ModelRunner:
    """Everything on the device. All methods belong to one thread at a time; only `Ticket`s leave it.

    At most STEPS_IN_FLIGHT steps may be launched and not redeemed.
    """

    def __init__(self, decoder: Decoder, ops: Ops, limits: SchedulerLimits, cache: KVCache) -> None:
        self.decoder = decoder
        self.ops = ops
        self.limits = limits
        self.cache = cache
        self.device = cache.data.device
        self.graphs: Graphs | None = None
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        with self.context():
            self.state = StepState(limits, decoder.config.vocab_size, self.device)
            self._row_starts = torch.arange(limits.max_seqs + 1, dtype=torch.int32, device=self.device)
            # Three arrays of rows, some of sequences, and at worst a whole block table for each new sequence.
            words = 3 * limits.max_batched_tokens + limits.max_seqs * (32 + 2 * self.state.max_blocks) + 256
            self._staging = Staging(words, self.device, STEPS_IN_FLIGHT)
            self._readbacks = [_Readback(limits.max_seqs, self.device) for _ in range(STEPS_IN_FLIGHT + 1)]
        self._sizes = padded_sizes(limits.max_seqs)
        self._launched = 0

    @contextmanager
    def context(self) -> Iterator[None]:
        """The calling thread's torch state for everything done here."""
        with torch.inference_mode():
            if self._stream is None:
                yield
            else:
                with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
                    yield

    # ---- one step

    def launch(self, plan: StepPlan) -> Ticket:
        """Starts the step and returns at once (on a CPU: when it is done). Call within `context`."""
        sampled_sequences = plan.sampled
        rows = len(sampled_sequences)
        mode = SamplingMode.union(sequence.sampling_mode for sequence in sampled_sequences)
        sampled = self._launch_mixed(plan, mode) if plan.chunks else self._launch_decodes(plan, mode)
        self._launched += 1
        return self._readbacks[self._launched % len(self._readbacks)].fetch(plan, sampled, rows)

    def _launch_decodes(self, plan: StepPlan, mode: SamplingMode) -> Sampled:
        """A row for each sequence, padded to a size that there is a graph of."""
        rows = len(plan.decodes)
        size = padded_size(self._sizes, rows) if self.graphs is not None else rows
        slots = [sequence.slot for sequence in plan.decodes]
        slots += [self.state.null_slot] * (round_up(size, 4) - rows)
        self._staging.begin()
        staged = self._staging.put(slots)
        self._upload_changes(plan)
        if self.graphs is None:
            hidden, padded, context_len = self._decode(staged, size, self._longest(plan))
        else:
            hidden, padded, context_len = self.graphs.replay(("decode", size))
            if mode.capturable:
                return self.graphs.replay((mode, size))
        return self._sample(hidden[:rows], padded, context_len[:rows], mode)

    def _launch_mixed(self, plan: StepPlan, mode: SamplingMode) -> Sampled | None:
        """Decodes and chunks of prompts in one forward pass, at their own sizes."""
        put, state = self._staging.put, self.state
        decodes, chunks = len(plan.decodes), plan.chunks
        self._staging.begin()
        slots = put([sequence.slot for sequence in plan.sequences])
        sampled = plan.sampled
        sampled_slots = put(
            [sequence.slot for sequence in sampled] + [state.null_slot] * (round_up(len(sampled), 4) - len(sampled))
        )
        lengths = np.array([chunk.rows for chunk in chunks], dtype=np.int32)
        ends = decodes + np.cumsum(lengths, dtype=np.int32)
        query_start = put(np.concatenate((np.arange(decodes + 1, dtype=np.int32), ends)))
        final = [index for index, chunk in enumerate(chunks) if chunk.final]
        each_decode = list(range(decodes))
        wanted = put(each_decode + [int(ends[index]) - 1 for index in final])
        sampled_of = put(each_decode + [decodes + index for index in final])
        chunk_context = put([chunk.start + chunk.rows for chunk in chunks])
        ids = put(np.concatenate([np.frombuffer(c.sequence.tokens, np.int32, c.rows, 4 * c.start) for c in chunks]))
        positions = put(np.concatenate([np.arange(c.start, c.start + c.rows, dtype=np.int32) for c in chunks]))
        row_slots = put(np.repeat(np.array([c.sequence.slot for c in chunks], dtype=np.int32), lengths))
        self._upload_changes(plan)

        slots = slots.long()
        ids, kv_slots, context_len = ids.long(), state.kv_slots(row_slots.long(), positions), chunk_context
        if decodes:
            decode = state.decode_inputs(slots[:decodes])
            ids = torch.cat((decode.ids, ids))
            positions = torch.cat((decode.positions, positions))
            kv_slots = torch.cat((decode.kv_slots, kv_slots))
            context_len = torch.cat((decode.context_len, context_len))
        batch = AttentionBatch(
            query_start=query_start,
            context_len=context_len,
            block_table=state.block_table.index_select(0, slots),
            decode_seqs=decodes,
            decode_rows=1,
            max_query=int(lengths.max()),
            max_context=max(self._longest(plan), *(chunk.start + chunk.rows for chunk in chunks)),
        )
        hidden = self.decoder.forward(ids, positions, kv_slots, batch, self.cache.layers, wanted)
        state.context.index_copy_(0, slots, context_len)
        if not sampled:
            return None
        return self._sample(hidden, sampled_slots.long(), context_len.index_select(0, sampled_of), mode)

    def _upload_changes(self, plan: StepPlan) -> None:
        """Ends the staging of a step: adds the plan's changes of state, sends all, and applies the changes."""
        state, admissions = self.state, None
        entries = blocks = None
        if plan.admitted:
            admissions = state.stage_admissions(self._staging, plan.admitted)
        if plan.table_slots:
            index = np.array(plan.table_slots, dtype=np.int32) * state.max_blocks + np.array(
                plan.table_columns, np.int32
            )
            entries, blocks = self._staging.put(index), self._staging.put(plan.table_blocks)
        self._staging.upload()
        if admissions is not None:
            state.apply_admissions(admissions)
            for sequence in plan.admitted:
                if sequence.sampling_mode.penalties:
                    state.reset_penalties(sequence)
        if entries is not None and blocks is not None:
            state.write_block_table(entries, blocks)

    def _decode(self, staged_slots: Tensor, size: int, max_context: int) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [size, H] of a decode step, its slots int64 [≥ size], its context lengths [size]."""
        padded = staged_slots.long()
        slots = padded[:size]
        inputs = self.state.decode_inputs(slots)
        batch = AttentionBatch(
            query_start=self._row_starts[: size + 1],
            context_len=inputs.context_len,
            block_table=inputs.block_table,
            decode_seqs=size,
            decode_rows=1,
            max_query=0,
            max_context=max_context,
        )
        hidden = self.decoder.forward(inputs.ids, inputs.positions, inputs.kv_slots, batch, self.cache.layers, None)
        self.state.context.index_copy_(0, slots, inputs.context_len)
        return hidden, padded, inputs.context_len

    def _sample(self, hidden: Tensor, padded: Tensor, context_len: Tensor, mode: SamplingMode) -> Sampled:
        """Chooses the tokens after `hidden` and leaves them where the next step finds them."""
        sampled = sample(self.ops, self.state, self.decoder.logits(hidden), padded, context_len, mode)
        self.state.last_token.index_copy_(0, padded[: hidden.shape[0]], sampled.ids)
        return sampled

    # ---- before the first step

    def profile(self) -> int:
        """Bytes that the largest steps take beside weights, cache and state, with graphs. Runs them on a CUDA device, reading and
        writing nothing that matters; leaves the allocator's cache empty."""
        limits, device = self.limits, self.device
        rows, longest = limits.max_batched_tokens, limits.max_model_len

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        def peak(step: Callable[[], object]) -> int:
            torch.cuda.synchronize(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            step()
            torch.cuda.synchronize(device)
            return torch.cuda.max_memory_allocated(device) - before

        def prefill() -> None:
            lengths = torch.full((-(-rows // longest),), longest, dtype=torch.int32, device=device)
            lengths[-1] = rows - longest * (len(lengths) - 1)
            starts = torch.cat((zeros(1), lengths.cumsum(0, dtype=torch.int32)))
            table = zeros(len(lengths), self.state.max_blocks)
            batch = AttentionBatch(starts, lengths, table, 0, 1, min(rows, longest), min(rows, longest))
            positions = torch.arange(rows, dtype=torch.int32, device=device) % longest
            wanted = self._row_starts[: limits.max_seqs]
            hidden = self.decoder.forward(
                positions.long() * 0, positions, zeros(rows) - 1, batch, self.cache.layers, wanted
            )
            everything = SamplingMode(random=True, filters=True, penalties=True, logprobs=MAX_LOGPROBS)
            self._sample(hidden, nobody, wanted, everything)

        def decode() -> None:
            hidden, padded, context_len = self._decode(nobody, limits.max_seqs, longest)
            self._sample(hidden, padded, context_len, CAPTURED_MODES[-1])

        with self.context():
            nobody = zeros(round_up(limits.max_seqs, 4)).long() + self.state.null_slot
            largest = peak(prefill)
            captured = peak(decode)
            torch.cuda.empty_cache()
        return largest + captured + len(self._sizes) * (8 << 20)

    def capture_graphs(self, graphs: Graphs, progress: Callable[[float], None]) -> None:
        """Captures decode steps of all sizes, largest first, so that the smaller ones fit into the memory of the largest."""
        with self.context():
            slots = self._staging.device_words[: round_up(self.limits.max_seqs, 4)].fill_(self.state.null_slot)
            longest = self.limits.max_model_len
            for done, size in enumerate(reversed(self._sizes)):
                progress(done / len(self._sizes))
                padded = slots[: round_up(size, 4)]
                hidden, padded, context_len = graphs.capture(
                    ("decode", size), partial(self._decode, padded, size, longest)
                )
                for mode in CAPTURED_MODES:
                    graphs.capture((mode, size), partial(self._sample, hidden, padded, context_len, mode))
        self.graphs = graphs

    @staticmethod
    def _longest(plan: StepPlan) -> int:
        return max((sequence.computed for sequence in plan.decodes), default=0)
