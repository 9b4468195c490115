"""Runs planned steps on the device: stages what changed, launches the model and the sampler, hands back a ticket for the ids."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.ops import AttentionBatch, Ops
from services.model_worker.cuda_graphs import Graphs, padded_size, padded_sizes
from services.model_worker.kv_cache import KVCache, copied_rows
from services.model_worker.logit_edits import ROW_WORDS
from services.model_worker.models.decoder import Decoder
from services.model_worker.prompt_graphs import PromptGraphs, prompt_sizes, whole_shapes
from services.model_worker.prompt_logprobs import Logprobs, ReportedRows
from services.model_worker.readback import Readback, Ticket
from services.model_worker.sampler import CAPTURED_MODES, RowMasks, Sampled, SamplingMode, sample
from services.model_worker.search.contrastive import Amateur, Memories
from services.model_worker.search.runner import SearchRunner
from services.model_worker.speculation.verify import Speculation, TreeRows, Verifier
from services.model_worker.step_plan import Chunk, SchedulerLimits, SteadyRows, StepPlan
from services.model_worker.step_state import Staging, StepState, round_up
from services.model_worker.token_masks import TokenMasks
from shared.sampling import MAX_LOGPROBS

STEPS_IN_FLIGHT = 2  # the one that the device works on and the one behind it
# Steps of at most so many sequences are a graph each, from the guesses to the choice: between graphs a small step's device waits.
WHOLE_STEPS = 8
# Rows of a step with prompts from which on its last layer is computed for the rows alone that somebody wants. On a GPU that is launched
# from the host, which has to be ahead by then.
LAST_ROWS_FROM = {"cpu": 32, "cuda": 1024}


@dataclass(slots=True)
class DecodeStep:
    """A forward pass of decodes alone: hidden [rows, H], slots int64 [≥ sequences], context_len int32 [sequences], and with a tree its
    rows."""

    hidden: Tensor
    slots: Tensor
    context_len: Tensor
    tree_rows: TreeRows | None


class Guesses:
    """The tokens of a step's trees on their way to the host, while the forward pass that checks them runs."""

    def __init__(self, rows: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._host = torch.empty(rows, dtype=torch.int64, pin_memory=pinned)
        self._event = torch.cuda.Event() if pinned else None
        self._shape = (0, 1)

    def fetch(self, tokens: Tensor) -> None:
        """tokens int64 [R, n], see TreeRows."""
        self._shape = (tokens.shape[0], tokens.shape[1])
        self._host[: tokens.numel()].view(tokens.shape).copy_(tokens, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def result(self) -> list[list[int]]:
        """By sequence and node. Waits for them, without the GIL."""
        if self._event is not None:
            self._event.synchronize()
        rows, nodes = self._shape
        tokens: list[list[int]] = self._host[: rows * nodes].view(rows, nodes).tolist()
        return tokens


# What was sampled for plan.sampled, in that order, and the log-probabilities of the rows that are reported.
Chosen = tuple[list[Sampled], list[Logprobs]]


@dataclass(slots=True)
class Forward:
    """A launched forward pass. `choose` launches the choice of its tokens; guesses: of the decodes' trees, if some of them have a
    matcher."""

    plan: StepPlan
    choose: Callable[[RowMasks | None], Chosen]
    guesses: Guesses | None


class ModelRunner:
    """Everything on the device. All methods belong to one thread at a time; only `Ticket`s leave it.

    At most STEPS_IN_FLIGHT steps may be launched and not redeemed.
    """

    def __init__(
        self,
        decoder: Decoder,
        ops: Ops,
        limits: SchedulerLimits,
        cache: KVCache,
        speculation: Speculation | None = None,
        amateur: Amateur | None = None,
        memories: Memories | None = None,
        whole_prompts: bool = False,
    ) -> None:
        self.decoder = decoder
        self.ops = ops
        self.limits = limits
        self.cache = cache
        self.device = cache.data.device
        self.graphs: Graphs | None = None
        self.prompts: PromptGraphs | None = None
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        with self.context():
            self.state = StepState(limits, decoder.config.vocab_size, self.device)
            # Five arrays of rows, some of sequences, and at worst a block table, edits and half a block for each new sequence.
            words = 5 * limits.max_batched_tokens + 512
            words += limits.max_seqs * (64 + 2 * self.state.max_blocks + ROW_WORDS + 2 * limits.block_size)
            self._staging = Staging(words, self.device, STEPS_IN_FLIGHT)
            self.verifier: Verifier | None = None
            if speculation is not None:
                self.verifier = Verifier(speculation, self.state, ops, decoder)
            starts = torch.arange(limits.max_seqs + 1, dtype=torch.int32, device=self.device)
            # By the rows of a sequence.
            self._row_starts = {n: starts * n for n in (1, *(self.verifier.trees if self.verifier is not None else ()))}
            self.search = SearchRunner(decoder, ops, limits, self.state, STEPS_IN_FLIGHT, amateur, memories)
            tokens = limits.max_seqs * (1 if speculation is None else speculation.depth + 1)
            self._readbacks = [
                Readback(tokens, limits.max_batched_tokens, self.device) for _ in range(STEPS_IN_FLIGHT + 1)
            ]
            # Of a step with prompts: ids, positions, places in the cache.
            self._rows = torch.zeros(3, round_up(limits.max_batched_tokens, 4), dtype=torch.int32, device=self.device)
            self._guesses = Guesses(0 if speculation is None else speculation.max_rows, self.device)
        self._sizes = padded_sizes(limits.max_seqs)
        self._whole_prompts = whole_prompts
        self._max_tree_rows = 0 if speculation is None else speculation.max_rows
        self.last_rows_from = LAST_ROWS_FROM[self.device.type]
        self._launched = 0
        # What was worked out for the last steady rows.
        self._steady: SteadyRows | None = None
        self._steady_mode = SamplingMode()

    @contextmanager
    def context(self) -> Iterator[None]:
        """The calling thread's torch state for everything done here."""
        with torch.inference_mode():
            if self._stream is None:
                yield
            else:
                with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
                    yield

    def token_masks(self, special_ids: Collection[int]) -> TokenMasks:
        """Tables for the masks of the largest step."""
        with self.context():
            rows = max(2, self.limits.max_seqs + self._max_tree_rows)
            return TokenMasks(rows, self.decoder.config.vocab_size, self.device, special_ids)

    # ---- one step

    def launch(self, plan: StepPlan) -> Ticket:
        """Starts the step and returns at once (on a CPU: when it is done). Call within `context`."""
        return self.choose(self.forward(plan), None)

    def forward(self, plan: StepPlan) -> Forward:
        """The first half of `launch`, for whoever knows only later which tokens the step may choose."""
        mode = self._mode(plan)
        if plan.chunks:
            return self._forward_prompts(plan, mode) or self._forward_mixed(plan, mode)
        if plan.decodes:
            return self._forward_decodes(plan, mode)
        self._staging.begin()
        self._upload_changes(plan)
        return Forward(plan, lambda masks: ([], []), None)

    def _mode(self, plan: StepPlan) -> SamplingMode:
        modes = [sequence.sampling_mode for sequence in plan.unsteady]
        if plan.steady is not None:
            if plan.steady is not self._steady:
                self._steady = plan.steady
                self._steady_mode = SamplingMode.union(s.sampling_mode for s in plan.steady.sequences)
            modes.append(self._steady_mode)
        return SamplingMode.union(modes)

    def choose(self, forward: Forward, masks: RowMasks | None) -> Ticket:
        """The second half. masks: of all rows that are sampled, the trees' nodes among them; None: every token is allowed."""
        plan = forward.plan
        parts, prompts = forward.choose(masks)
        searched, candidates = self.search.launch(plan, self.cache) if plan.has_search else ([], [])
        self._launched += 1
        readback = self._readbacks[self._launched % len(self._readbacks)]
        return readback.fetch(plan, parts, prompts, searched, candidates)

    def _forward_decodes(self, plan: StepPlan, mode: SamplingMode) -> Forward:
        """A row, or a tree's rows, for each sequence, padded to a size that there is a graph of."""
        rows, nodes = len(plan.decodes), plan.nodes
        size = padded_size(self._sizes, rows) if self.graphs is not None else rows
        self._staging.begin()
        staged = self._staging.put(self._padded(plan.decode_slots, size))
        self._upload_changes(plan)
        graphs, guesses, tree_rows = self.graphs, None, None
        unmasked = all(sequence.matcher is None for sequence in plan.decodes)
        if graphs is not None and size <= WHOLE_STEPS and mode.capturable and unmasked:
            whole: Sampled = graphs.replay(("step", mode, size, nodes))
            return Forward(plan, lambda masks: ([whole], []), None)
        if nodes > 1:
            tree_rows = (
                graphs.replay(("draft", size, nodes)) if graphs is not None else self._draft(staged, size, nodes)
            )
            guesses = self._fetch_guesses(plan, tree_rows)
        if graphs is None:
            step = self._decode(staged, size, self._longest(plan), tree_rows)
        else:
            step = graphs.replay(("decode", size, nodes))

        def choose(masks: RowMasks | None) -> Chosen:
            if graphs is not None and masks is None and mode.capturable:
                return [graphs.replay((mode, size, nodes))], []
            return [self._sample_decode(step, rows, mode, masks)], []

        return Forward(plan, choose, guesses)

    def _fetch_guesses(self, plan: StepPlan, tree_rows: TreeRows) -> Guesses | None:
        """Where the host must know them: what may follow a guess depends on it."""
        if all(sequence.matcher is None for sequence in plan.decodes):
            return None
        self._guesses.fetch(tree_rows.tokens[: len(plan.decodes)])
        return self._guesses

    def _forward_prompts(self, plan: StepPlan, mode: SamplingMode) -> Forward | None:
        """A step of few prompts and nothing else; None, and nothing is done, if it is another. The device has nothing to do until
        such a step comes: its forward pass is launched before all that only the choice of tokens, or a later step, needs."""
        chunks = plan.chunks
        if plan.decodes or plan.copies or plan.has_search or any(chunk.report_rows for chunk in chunks):
            return None
        if self.prompts is None:
            return None
        shape = self.prompts.whole_shape(sum(chunk.rows for chunk in chunks), len(chunks))
        if shape is None:
            return None
        contexts = [chunk.start + chunk.rows for chunk in chunks]
        hidden = self.prompts.forward_prompts(
            shape,
            self._rows_of_chunks(chunks),
            np.cumsum([chunk.rows for chunk in chunks], dtype=np.int32),
            contexts,
            [chunk.sequence.blocks for chunk in chunks],
        )
        put, sampled = self._staging.put, plan.sampled
        self._staging.begin()
        slots = put([chunk.sequence.slot for chunk in chunks])
        context_len = put(contexts)
        final = put([index for index, chunk in enumerate(chunks) if chunk.final])
        sampled_slots = put(self._padded([sequence.slot for sequence in sampled], len(sampled)))
        self._upload_changes(plan)
        self.state.context.index_copy_(0, slots.long(), context_len)
        last_rows = hidden.index_select(0, final)

        def choose(masks: RowMasks | None) -> Chosen:
            if not sampled:
                return [], []
            lengths_after = context_len.index_select(0, final)
            return [self._sample(last_rows, sampled_slots.long(), lengths_after, mode, masks)], []

        return Forward(plan, choose, None)

    def _forward_mixed(self, plan: StepPlan, mode: SamplingMode) -> Forward:
        """Decodes and chunks of prompts in one forward pass, at their own sizes."""
        put, state = self._staging.put, self.state
        decodes, chunks, nodes = len(plan.decodes), plan.chunks, plan.nodes
        decode_rows = decodes * nodes
        # The decodes are sampled with the final chunks, those with trees apart.
        together = decodes if nodes == 1 else 0
        self._staging.begin()
        slots = put([sequence.slot for sequence in plan.sequences])
        decode_slots = put(self._padded(plan.decode_slots, decodes))
        sampled = plan.sampled[decodes - together :]
        sampled_slots = put(self._padded([sequence.slot for sequence in sampled], len(sampled)))
        lengths = np.array([chunk.rows for chunk in chunks], dtype=np.int32)
        ends = decode_rows + np.cumsum(lengths, dtype=np.int32)
        query_start = put(np.concatenate((np.arange(0, decode_rows + 1, nodes, dtype=np.int32), ends)))
        final = [index for index, chunk in enumerate(chunks) if chunk.final]
        report = ReportedRows.of(chunks, ends - lengths)
        count = int(ends[-1])
        few = count >= max(self.last_rows_from, 4 * (decode_rows + len(final))) and not report.rows
        if few:  # where the rows that are wanted begin when there are no others
            last_start = put([*range(0, decode_rows, nodes), *range(decode_rows, decode_rows + len(final) + 1)])
        wanted = put([*range(decode_rows), *(int(ends[index]) - 1 for index in final), *report.rows])
        targets = put(report.targets)
        wanted_seqs = put([*range(decodes), *(decodes + index for index in final)])
        sampled_of = wanted_seqs[decodes - together :]
        context_len = put([chunk.start + chunk.rows for chunk in chunks])
        chunk_rows = put(self._rows_of_chunks(chunks).ravel()).view(len(self._rows), -1)
        self._upload_changes(plan)

        slots = slots.long()
        rows = self._rows[:, :count]
        rows[:, decode_rows:].copy_(chunk_rows)
        tree_rows, guesses = None, None
        if decodes:
            if nodes > 1:
                tree_rows = self._draft(decode_slots, decodes, nodes)
                guesses = self._fetch_guesses(plan, tree_rows)
            decode = state.decode_inputs(slots[:decodes], self.ops) if tree_rows is None else tree_rows.inputs()
            for row, values in zip(rows, (decode.ids, decode.positions, decode.kv_slots), strict=True):
                row[:decode_rows].copy_(values)
            context_len = torch.cat((decode.context_len, context_len))
        batch = AttentionBatch(
            query_start=query_start,
            context_len=context_len,
            block_table=state.block_table.index_select(0, slots),
            decode_seqs=decodes,
            decode_rows=nodes,
            max_query=int(lengths.max()),
            max_context=max(self._longest(plan), *(chunk.start + chunk.rows for chunk in chunks)),
            tree_mask=None if tree_rows is None else tree_rows.tree.words,
        )
        last = None
        if few:
            last = AttentionBatch(
                query_start=last_start,
                context_len=context_len.index_select(0, wanted_seqs),
                block_table=batch.block_table.index_select(0, wanted_seqs),
                decode_seqs=len(wanted_seqs) if nodes == 1 else decodes,
                decode_rows=nodes,
                max_query=1 if nodes > 1 and final else 0,
                max_context=batch.max_context,
                tree_mask=batch.tree_mask,
            )
        if self.prompts is not None and self.prompts.fits(count):
            sequences = wanted_seqs if nodes == 1 and not report.rows else None
            hidden = self.prompts.forward(count, batch, wanted, last, sequences)
        else:
            ids, positions, kv_slots = rows
            hidden = self.decoder.forward(ids, positions, kv_slots, batch, self.cache.layers, wanted, last)
        state.context.index_copy_(0, slots, context_len)
        guessed = 0 if tree_rows is None else decode_rows

        def choose(masks: RowMasks | None) -> Chosen:
            parts = []
            if tree_rows is not None:
                of_trees = None if masks is None else masks.part(0, guessed)
                parts.append(self._verify(hidden[:guessed], tree_rows, mode, of_trees))
            if sampled:
                lengths_after = context_len if mode.logits_alone else context_len.index_select(0, sampled_of)
                others = None if masks is None else masks.part(guessed, guessed + len(sampled))
                last_rows = hidden[guessed : guessed + len(sampled)]
                parts.append(self._sample(last_rows, sampled_slots.long(), lengths_after, mode, others))
            reported = hidden[guessed + len(sampled) :]
            return parts, report.logprobs(reported, targets.long(), self.decoder.logits, self.ops)

        return Forward(plan, choose, guesses)

    def _rows_of_chunks(self, chunks: list[Chunk]) -> NDArray[np.int32]:
        """Their part of `_rows`."""
        size = self.limits.block_size
        parts = []
        for chunk in chunks:
            end, first = chunk.start + chunk.rows, chunk.start // size
            ids = np.frombuffer(chunk.sequence.tokens, np.int32, chunk.rows, 4 * chunk.start)
            positions = np.arange(chunk.start, end, dtype=np.int32)
            blocks = np.array(chunk.sequence.blocks[first : -(-end // size)], dtype=np.int32)
            parts.append(np.stack((ids, positions, blocks[positions // size - first] * size + positions % size)))
        return np.concatenate(parts, axis=1)

    def _padded(self, slots: NDArray[np.int32] | list[int], size: int) -> NDArray[np.int32]:
        """These slots, and nobody's up to `size` and to a multiple of four."""
        padded = np.full(round_up(size, 4), self.state.null_slot, dtype=np.int32)
        padded[: len(slots)] = slots
        return padded

    def _upload_changes(self, plan: StepPlan) -> None:
        """Ends the staging of a step: adds the plan's changes of state, sends all, and applies the changes."""
        state, admissions = self.state, None
        entries = blocks = None
        copies = None
        if plan.copies:
            copies = [self._staging.put(rows) for rows in copied_rows(plan.copies, self.limits.block_size)]
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
        if copies is not None:
            sources, targets = copies
            for cache in [self.cache] if self.search.amateur is None else [self.cache, self.search.amateur.cache]:
                self.ops.move_kv(cache.data[0], cache.data[1], sources, targets)

    def _whole_step(self, staged_slots: Tensor, size: int, nodes: int, max_context: int, mode: SamplingMode) -> Sampled:
        rows = self._draft(staged_slots, size, nodes) if nodes > 1 else None
        return self._sample_decode(self._decode(staged_slots, size, max_context, rows), size, mode)

    def _decode(
        self,
        staged_slots: Tensor,
        size: int,
        max_context: int,
        tree_rows: TreeRows | None,
        layers: int | None = None,
    ) -> DecodeStep:
        """The forward pass of `size` sequences, with a row each or their trees' rows. layers: only so many, to rehearse."""
        padded = staged_slots.long() if tree_rows is None else tree_rows.slots
        slots = padded[:size]
        nodes = 1 if tree_rows is None else tree_rows.tree.tree.size
        inputs = self.state.decode_inputs(slots, self.ops, advance=True) if tree_rows is None else tree_rows.inputs()
        batch = AttentionBatch(
            query_start=self._row_starts[nodes][: size + 1],
            context_len=inputs.context_len,
            block_table=inputs.block_table,
            decode_seqs=size,
            decode_rows=nodes,
            max_query=0,
            max_context=max_context,
            tree_mask=None if tree_rows is None else tree_rows.tree.words,
        )
        caches = self.cache.layers[:layers]
        hidden = self.decoder.forward(inputs.ids, inputs.positions, inputs.kv_slots, batch, caches, None)
        return DecodeStep(hidden, padded, inputs.context_len, tree_rows)

    def _sample_decode(self, step: DecodeStep, rows: int, mode: SamplingMode, masks: RowMasks | None = None) -> Sampled:
        """The new tokens of the first `rows` sequences."""
        if step.tree_rows is None:
            return self._sample(step.hidden[:rows], step.slots, step.context_len[:rows], mode, masks)
        tree_rows = step.tree_rows.first(rows)
        return self._verify(step.hidden[: tree_rows.tokens.numel()], tree_rows, mode, masks)

    def _draft(self, staged_slots: Tensor, count: int, nodes: int) -> TreeRows:
        """The rows of `count` sequences with the tree that has so many nodes, the guessed tokens in them."""
        assert self.verifier is not None
        return self.verifier.rows(staged_slots.long(), count, self.verifier.trees[nodes])

    def _verify(self, hidden: Tensor, rows: TreeRows, mode: SamplingMode, masks: RowMasks | None) -> Sampled:
        """Accepts what the nodes guessed right and leaves the tokens where the next step finds them."""
        assert self.verifier is not None
        return self.verifier.accept(rows, hidden, self.decoder.logits(hidden), mode, self.cache.data, masks)

    def _sample(
        self,
        hidden: Tensor,
        padded: Tensor,
        context_len: Tensor,
        mode: SamplingMode,
        masks: RowMasks | None = None,
    ) -> Sampled:
        """Chooses the tokens after `hidden` and leaves them where the next step finds them."""
        sampled = sample(self.ops, self.state, self.decoder.logits(hidden), padded, context_len, mode, masks)
        slots = padded[: hidden.shape[0]]
        kept = None if self.verifier is None else self.verifier.hidden
        self.ops.keep_chosen(slots, sampled.ids.squeeze(1), self.state.last_token, hidden, kept)
        return sampled

    # ---- before the first step

    def profile(self) -> int:
        """Bytes that the largest steps take beside weights, cache and state, with graphs. Runs them on a CUDA device, reading and
        writing nothing that matters; leaves the allocator's cache empty."""
        limits, device = self.limits, self.device
        rows, longest = limits.max_batched_tokens, limits.max_model_len
        size, nodes = self.decode_shapes()[0]  # of all kinds of decode steps the one with the most rows

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
            wanted = self._row_starts[1][: limits.max_seqs]
            hidden = self.decoder.forward(
                positions.long() * 0, positions, zeros(rows) - 1, batch, self.cache.layers, wanted
            )
            everything = SamplingMode(True, True, True, MAX_LOGPROBS, typical=True, edits=True, recent=True)
            self._sample(hidden, nobody, wanted, everything)

        def verify() -> None:
            # Trees beside prompts, and where masks or log-probabilities are wanted, are checked outside graphs.
            if nodes > 1:
                rows = self._draft(nobody, size, nodes)
                embedding = self.decoder.weights.embedding
                hidden = embedding.new_zeros(size * nodes, embedding.shape[1])
                self._verify(hidden, rows, SamplingMode(True, True, True, MAX_LOGPROBS, edits=True), None)

        with self.context():
            nobody = zeros(round_up(limits.max_seqs, 4)).long() + self.state.null_slot
            largest = max(peak(prefill), peak(verify), peak(lambda: self.search.rehearse(nobody, self.cache)))
            captured = peak(lambda: self._whole_step(nobody, size, nodes, longest, CAPTURED_MODES[-1]))
            graphs = len(self.decode_shapes()) * (8 << 20)
            if sizes := self.prompt_sizes():
                captured += peak(lambda: self._prompt_graphs(sizes).rehearse())
                graphs += len(sizes) * (len(self.cache.layers) + 1) * (256 << 10)
                graphs += len(whole_shapes(sizes)) * (8 << 20) if self._whole_prompts else 0
            torch.cuda.empty_cache()
        return largest + captured + graphs

    def decode_shapes(self) -> list[tuple[int, int]]:
        """(padded batch size, nodes of each sequence) of all decode steps that there can be, by falling rows."""
        trees = [1] if self.verifier is None else [1, *self.verifier.trees]
        shapes = [(s, n) for s in self._sizes for n in trees if n == 1 or s * n <= self._max_tree_rows]
        return sorted(shapes, key=lambda shape: -shape[0] * shape[1])

    def capture_graphs(self, graphs: Graphs, progress: Callable[[float], None]) -> None:
        """Captures decode steps of all sizes, largest first, so that the smaller ones fit into the memory of the largest; then the
        pieces of steps with prompts."""
        with self.context():
            slots = self._staging.send(self._padded([], self.limits.max_seqs))
            longest = self.limits.max_model_len + self.limits.overshoot
            shapes = self.decode_shapes()
            for done, (size, nodes) in enumerate(shapes):
                progress(done / (2 * len(shapes)))
                padded = slots[: round_up(size, 4)]
                rows = None
                if nodes > 1:  # apart, so that the guesses can be read back while they are checked
                    rows = graphs.capture(("draft", size, nodes), partial(self._draft, padded, size, nodes))
                decode = partial(self._decode, padded, size, longest, rows)
                rehearsal = decode(self.decoder.rehearsal_layers)
                step = graphs.capture(("decode", size, nodes), decode, rehearsed=True)
                for mode in CAPTURED_MODES:
                    self._sample_decode(rehearsal, size, mode)
                    if size <= WHOLE_STEPS:  # its parts are for steps with masks, whose choice is no graph
                        whole = partial(self._whole_step, padded, size, nodes, longest, mode)
                        graphs.capture(("step", mode, size, nodes), whole, rehearsed=True)
                    else:
                        choice = partial(self._sample_decode, step, size, mode)
                        graphs.capture((mode, size, nodes), choice, rehearsed=True)
            if sizes := self.prompt_sizes():
                self.prompts = self._prompt_graphs(sizes)
                self.prompts.capture(graphs, lambda part: progress(0.5 + 0.5 * part))
        self.graphs = graphs

    def _prompt_graphs(self, sizes: list[int]) -> PromptGraphs:
        max_blocks = self.state.max_blocks if self._whole_prompts else None
        return PromptGraphs(self.decoder, self.cache.layers, self._rows, sizes, max_blocks, STEPS_IN_FLIGHT)

    def prompt_sizes(self) -> list[int]:
        """Rows of the steps with prompts that are captured."""
        layers = self.decoder.weights.layers
        parameters = sum(w.numel() for layer in layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down))
        return prompt_sizes(parameters, self.limits.max_batched_tokens)

    def time_graph(self, size: int, nodes: int, times: int) -> list[float]:
        """Seconds that each of some replays of a captured decode step takes, greedy sampling included, on nobody's slots."""
        assert self.graphs is not None
        self._staging.send(self._padded([], size))
        seconds = []
        for _ in range(times + 1):
            torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            if size <= WHOLE_STEPS:
                self.graphs.replay(("step", CAPTURED_MODES[0], size, nodes))
            else:
                if nodes > 1:
                    self.graphs.replay(("draft", size, nodes))
                self.graphs.replay(("decode", size, nodes))
                self.graphs.replay((CAPTURED_MODES[0], size, nodes))
            torch.cuda.synchronize(self.device)
            seconds.append(time.perf_counter() - start)
        return seconds[1:]

    def _longest(self, plan: StepPlan) -> int:
        """An upper bound of the decodes' context lengths with this step's rows."""
        return self.limits.block_size * max((len(sequence.blocks) for sequence in plan.decodes), default=0)
