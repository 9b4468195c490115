"""Decides what each step of the model computes. Pure: no tensors, no clock, no threads.

Each step has one budget of rows. Sequences that decode come first, then prompts already begun, then waiting ones; priority before
arrival among each. Long prompts are computed in chunks (Agrawal et al. 2023, SARATHI, arXiv 2308.16369). When blocks run out, the
lowest and latest running sequence gives back all it holds and is recomputed later.

Steps may be planned while earlier ones are in flight; they retire in the order in which they were planned. What a finished or
preempted sequence holds is released when the last step that uses it retires.

Sequences with another strategy than sampling (services/model_worker/search) are planned by the same rules, in rows of their own.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceABC

import numpy as np
from numpy.typing import NDArray

from services.model_worker.block_pool import BlockPool
from services.model_worker.decode_table import DecodeTable, id_lists
from services.model_worker.interface import PROMPT, EngineRequest, TokenLogprobs, TokenOutput, TokenRows
from services.model_worker.search.beam import Candidates
from services.model_worker.search.beam_group import BeamGroup
from services.model_worker.search.strategy import Strategy
from services.model_worker.sequence import Sequence, Status
from services.model_worker.siblings import Siblings
from services.model_worker.speculation.tree import Tree
from services.model_worker.step_plan import Chunk, SchedulerLimits, StepPlan

# Most rows of a chunk whose log-probabilities are wanted, so that a step need not read back more.
REPORT_ROWS = 512
# Steady sequences from which on arrays are faster than going through them one by one.
STEADY_FROM = 16

# Ended sequences that a queue may still hold, beside as many as there are others: it would keep their tokens in memory.
STALE = 64

PickTree = Callable[[list[Sequence]], Tree | None]


def _decodes(sequence: Sequence) -> bool:
    """All its tokens but the newest (in contrastive search the newest, too) are in the cache, and more are wanted."""
    if sequence.group is not None:  # which beams go on must be known
        return sequence.computed >= sequence.prefill_end and not sequence.inflight
    known = len(sequence.tokens) + sequence.pending
    return sequence.computed == known - sequence.lag and known < sequence.limit


class BatchScheduler:
    def __init__(self, limits: SchedulerLimits, pool: BlockPool, steady_from: int = STEADY_FROM) -> None:
        if limits.blocks_of(limits.max_model_len) > pool.num_blocks:
            raise ValueError(f"{pool.num_blocks} blocks cannot hold a sequence of {limits.max_model_len} tokens")
        self.limits = limits
        self.pool = pool
        self.steps = 0
        self.preemptions = 0
        self.prompt_tokens = 0
        self.prefix_hit_tokens = 0
        self.running: list[Sequence] = []  # sorted: the last one is preempted first
        self._table = DecodeTable(limits, pool.prefix_cache)
        self._steady_from = steady_from
        self._waiting: list[Sequence] = []  # a heap; finished ones may stay until they come up
        self._siblings = Siblings()
        # Waiting, too, for a sibling to have computed their prompt, or for a memory.
        self._parked: list[Sequence] = []
        self._num_waiting = 0
        self._releasing: set[Sequence] = set()  # not running any more, but in a step in flight
        self._deadlines: list[tuple[float, Sequence]] = []
        self._isolated: deque[Sequence] = deque()
        self._slots = list(range(limits.max_seqs - 1, -1, -1))
        self._memories = list(range(limits.memories - 1, -1, -1))
        self._arrivals = 0

    # ---- what comes and goes

    @property
    def waiting(self) -> int:
        return self._num_waiting

    @property
    def free_slots(self) -> int:
        return len(self._slots)

    def add(self, request: EngineRequest) -> Sequence:
        """Queues a sequence. The caller has checked that it fits (its prompt leaves room for a token) and is not finished already."""
        self._arrivals += 1
        sequence = Sequence(request, self._arrivals, self.limits.eos_ids, self.limits.max_model_len)
        self._siblings.add(sequence)
        self._enqueue(sequence)
        if request.isolated:
            self._isolated.append(sequence)
        if request.deadline is not None:
            if len(self._deadlines) > 2 * (len(self.running) + self._num_waiting + len(self._releasing)) + STALE:
                self._deadlines = [entry for entry in self._deadlines if entry[1].status is not Status.FINISHED]
                heapq.heapify(self._deadlines)
            heapq.heappush(self._deadlines, (request.deadline, sequence))
        return sequence

    def finish(self, sequence: Sequence) -> None:
        """Ends a sequence from outside. Tokens still in flight are discarded. Harmless if it has ended already."""
        if sequence.status is Status.WAITING:
            self._num_waiting -= 1
        self._leave(sequence, Status.FINISHED)

    def expired(self, now: float) -> list[Sequence]:
        """Ends and returns the sequences whose deadline has passed."""
        late = []
        while self._deadlines and self._deadlines[0][0] <= now:
            sequence = heapq.heappop(self._deadlines)[1]
            if sequence.status is not Status.FINISHED:
                self.finish(sequence)
                late.append(sequence)
        return late

    @property
    def next_deadline(self) -> float | None:
        while self._deadlines and self._deadlines[0][1].status is Status.FINISHED:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        if len(self._waiting) > 2 * self._num_waiting + STALE:
            self._waiting = [other for other in self._waiting if other.status is Status.WAITING]
            heapq.heapify(self._waiting)
        heapq.heappush(self._waiting, sequence)
        self._num_waiting += 1

    def _leave(self, sequence: Sequence, status: Status) -> None:
        """A running (or preempted, or waiting) sequence stops; what it holds goes back now or when its last step retires."""
        if sequence.status is Status.FINISHED:
            return
        self._table.leave(sequence)
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        if status is Status.FINISHED:
            self._siblings.remove(sequence)
        sequence.status = status
        if sequence.inflight:
            self._releasing.add(sequence)
        else:
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._releasing.discard(sequence)
        self.pool.release(block for block in reversed(sequence.blocks) if block >= 0)
        sequence.blocks = []
        if sequence.group is not None:
            self._slots += sequence.group.release(self.pool)
        elif sequence.slot >= 0:
            self._slots.append(sequence.slot)
        sequence.slot = -1
        if sequence.memory >= 0:
            self._memories.append(sequence.memory)
            sequence.memory = -1
        if sequence.status is Status.PREEMPTED:
            sequence.reset(0)
            self._enqueue(sequence)

    # ---- planning

    def schedule(self, pick_tree: PickTree | None = None) -> StepPlan | None:
        """The next step, or None if nothing can run now (nothing to do, or blocks come free only when a step retires).

        pick_tree: asked what the sequences that will decode should guess; its tree's rows for all of them must fit into a step.
        """
        for sequence in self._parked:
            heapq.heappush(self._waiting, sequence)
        self._parked.clear()
        alone = self._alone()
        if alone is not None and not self._clear_for(alone):
            return None
        plan = StepPlan(self.steps)
        self._plan_decodes(plan, pick_tree)
        budget = self.limits.max_batched_tokens - plan.rows
        for sequence in self._unsteady():
            # A last known token alone makes a row of a decode.
            if not sequence.pending and budget and sequence.computed < len(sequence.tokens) - sequence.lag:
                budget -= self._plan_chunk(plan, sequence, budget)
        while budget and (admitted := self._admit(plan, alone)):
            if admitted.computed < admitted.prefill_end:
                budget -= self._plan_chunk(plan, admitted, budget)
            else:  # all but the last token of its prompt is in the cache already
                self._plan_search(plan, admitted)
                budget -= admitted.step_rows
        if not plan.rows:
            return None
        plan.contrasted.sort(key=lambda sequence: sequence.candidates)  # stable
        self.steps += 1
        return plan

    def _alone(self) -> str | None:
        """The request that must have the steps for itself, if there is one."""
        while self._isolated and self._isolated[0].is_proven:
            self._isolated.popleft()
        return self._isolated[0].request.request_id if self._isolated else None

    def _clear_for(self, alone: str) -> bool:
        """Preempts every other request; True once none is in a step any more. It costs their recomputation, but it is rare, and an
        isolated request can never be kept out by what the others hold."""
        for sequence in [s for s in self.running if s.request.request_id != alone]:
            self._leave(sequence, Status.PREEMPTED)
        return all(sequence.request.request_id == alone for sequence in self._releasing)

    def _plan_decodes(self, plan: StepPlan, pick_tree: PickTree | None) -> None:
        self._update_table()
        ready = [sequence for sequence in self._unsteady() if _decodes(sequence)]
        steady = self._table.rows.sequences
        plain = [sequence for sequence in ready if sequence.plain]
        room = self.limits.max_batched_tokens
        if len(plain) < len(ready):
            room -= sum(sequence.step_rows for sequence in ready if not sequence.plain)
        if pick_tree is not None and (plain or steady):
            tree = pick_tree(steady + plain)
            # Guesses are worth no preemption, and no search has to wait for them.
            if (
                tree is not None
                and self._all_missing(plain, tree.size) <= self.pool.free
                and (len(steady) + len(plain)) * tree.size <= room
            ):
                plan.tree = tree
        nodes, depth = plan.nodes, 0 if plan.tree is None else plan.tree.depth
        if steady and self._all_missing(plain, nodes) <= self.pool.free:
            self._plan_steady(plan, depth)
        elif steady:  # who gives way is decided one by one
            self._table.clear()
            ready = [sequence for sequence in self.running if _decodes(sequence)]
        for sequence in ready:
            # Preemption takes sequences from the end of the list, never one that this loop has passed.
            if sequence.status is not Status.RUNNING:
                continue
            if not sequence.plain:
                self._plan_search(plan, sequence)
                continue
            if (missing := self._missing(sequence, nodes)) and not self._grow(plan, sequence, missing):
                continue
            sequence.computed += 1
            sequence.pending += 1
            sequence.slack += depth
            sequence.inflight += 1
            plan.decodes.append(sequence)

    def _unsteady(self) -> list[Sequence]:
        """Running sequences that are gone through one by one."""
        if not self._table:
            return self.running
        if len(self._table) == len(self.running):
            return []
        return [sequence for sequence in self.running if sequence not in self._table]

    def _update_table(self) -> None:
        """Who can be steady in the next step is in the table, if that is worth it."""
        table = self._table
        if not table and len(self.running) < self._steady_from:
            return
        table.drop_ending()
        others = self._unsteady()
        newcomers = [sequence for sequence in others if _decodes(sequence) and table.accepts(sequence)]
        # A search may need the blocks of a sequence that has been planned already.
        if len(table) + len(newcomers) < self._steady_from or not all(sequence.plain for sequence in others):
            table.clear()
        elif len(self.running) <= self.pool.free:  # when blocks are short, somebody would have to leave at once
            for sequence in newcomers:
                table.enter(sequence)

    def _plan_steady(self, plan: StepPlan, depth: int) -> None:
        for sequence, count in self._table.missing(plan.nodes):
            self._grow(plan, sequence, count)
            self._table.grown(sequence, count)
        plan.steady = self._table.plan(depth)
        plan.decodes = list(plan.steady.sequences)

    def _all_missing(self, plain: list[Sequence], rows: int) -> int:
        """Blocks that so many more rows each of the steady sequences and of `plain` need."""
        return sum(count for _, count in self._table.missing(rows)) + sum(self._missing(s, rows) for s in plain)

    def _missing(self, sequence: Sequence, rows: int) -> int:
        """Blocks that so many more rows need, wherever the launched steps leave off."""
        return max(0, self.limits.blocks_of(sequence.computed + sequence.slack + rows) - len(sequence.blocks))

    def _plan_search(self, plan: StepPlan, sequence: Sequence) -> None:
        """The next row (rows, with beams or candidates) of a sequence with another strategy than sampling, if it can have them."""
        if sequence.group is not None:
            self._plan_beams(plan, sequence, sequence.group)
            return
        if (missing := self._missing(sequence, sequence.step_rows)) and not self._grow(plan, sequence, missing):
            return
        sequence.computed += 1
        sequence.pending += 1
        sequence.inflight += 1
        (plan.contrasted if sequence.strategy is Strategy.CONTRASTIVE_SEARCH else plan.guided).append(sequence)

    def _plan_beams(self, plan: StepPlan, sequence: Sequence, group: BeamGroup) -> None:
        if not group.beams:
            group.begin(sequence.blocks, sequence.tokens[-1])
            sequence.blocks = []
        context, size = sequence.computed, self.limits.block_size
        if (missing := group.missing(context, size)) and not self._make_room(sequence, missing):
            return
        plan.add_diff(group.fork(self.pool, context, size))
        sequence.computed += 1
        sequence.inflight += 1
        plan.beams.append(sequence)

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        """So many free blocks for a running sequence; False if it must sit this step out."""
        while self.pool.free < count:
            # Blocks are on their way already, or it will turn out that they are not needed.
            if self._releasing or sequence.slack:
                return False
            victim = self.running[-1]
            self.preemptions += 1
            self._leave(victim, Status.PREEMPTED)
            if victim is sequence:
                return False
        return True

    def _grow(self, plan: StepPlan, sequence: Sequence, count: int) -> bool:
        """More blocks for a running sequence; False if it must sit this step out."""
        if not self._make_room(sequence, count):
            return False
        blocks = self.pool.allocate(count)
        plan.add_blocks(sequence, len(sequence.blocks), blocks)
        sequence.blocks += blocks
        return True

    def _plan_chunk(self, plan: StepPlan, sequence: Sequence, budget: int) -> int:
        rows = min(budget, sequence.prefill_end - sequence.computed)
        if sequence.reports:
            rows = min(rows, REPORT_ROWS)
        end = sequence.computed + rows
        chunk = Chunk(sequence, sequence.computed, rows, end == len(sequence.tokens) and end < sequence.limit)
        if (known := min(end + 1, sequence.prompt_len)) > sequence.reported:
            chunk.reported = sequence.reported, known
            sequence.reported = known
        sequence.computed = end
        sequence.inflight += 1
        if sequence.strategy is Strategy.CONTRASTIVE_SEARCH:
            plan.contrasted_chunks.append(chunk)
        else:
            plan.chunks.append(chunk)
            sequence.pending += chunk.final
        return rows

    def _first_waiting(self, plan: StepPlan, alone: str | None) -> Sequence | None:
        """Whose turn it is. `alone`: the only request that may come now."""
        while self._waiting:
            first = self._waiting[0]
            if first.status is Status.WAITING:
                if self._can_begin(first, plan):
                    break
                self._parked.append(first)
            heapq.heappop(self._waiting)
        if alone is None:
            return self._waiting[0] if self._waiting else None
        mine = (s for s in self._waiting if s.request.request_id == alone and s.status is Status.WAITING)
        return min((s for s in mine if self._can_begin(s, plan)), default=None)

    def _can_begin(self, sequence: Sequence, plan: StepPlan) -> bool:
        has_memory = bool(self._memories) or sequence.strategy is not Strategy.CONTRASTIVE_SEARCH
        return has_memory and not self._siblings.is_awaited(sequence, plan)

    def _admit(self, plan: StepPlan, alone: str | None) -> Sequence | None:
        """Gives the first waiting sequence a slot and blocks for all its known tokens, if there are."""
        sequence = self._first_waiting(plan, alone)
        if sequence is None or len(self._slots) < sequence.width:
            return None
        size, length = self.limits.block_size, len(sequence.tokens)
        digests = sequence.hashes(sequence.reusable // size, size) if self.pool.prefix_cache else []
        blocks = self.pool.match(digests)
        cached, released, copied = len(blocks) * size, 0, None
        source = self._siblings.source(sequence, plan, self.limits)
        if source is not None and (common := self._siblings.common(sequence)) > cached:
            self.pool.release(reversed(blocks))
            blocks = self.pool.share(source.blocks[: common // size])
            cached, released = common, source.released
            if common % size:
                copied = source.blocks[common // size]
        missing = self.limits.blocks_of(length) - len(blocks)
        # Each running sequence wants another block soon. Without that reserve the newcomer would be preempted at once.
        reserve = sum(other.width for other in self.running) + sequence.width - 1
        if missing + reserve > self.pool.free and (self.running or self._releasing):
            self.pool.release(block for block in reversed(blocks) if block >= 0)
            return None
        if sequence is self._waiting[0]:
            heapq.heappop(self._waiting)
        else:
            self._waiting.remove(sequence)
            heapq.heapify(self._waiting)
        self._num_waiting -= 1
        sequence.status = Status.RUNNING
        slots = [self._slots.pop() for _ in range(sequence.width)]
        sequence.slot = slots[0]
        if sequence.group is not None:
            sequence.group.admit(slots)
        if sequence.strategy is Strategy.CONTRASTIVE_SEARCH:
            sequence.memory = self._memories.pop()
        sequence.blocks = blocks + self.pool.allocate(missing)
        sequence.reset(cached)
        sequence.registered, sequence.released = len(blocks), released
        insort(self.running, sequence)
        plan.admitted.append(sequence)
        plan.add_blocks(sequence, 0, sequence.blocks)
        if copied is not None:
            plan.copies.append((copied, sequence.blocks[cached // size], cached % size))
        self.prompt_tokens += length
        self.prefix_hit_tokens += cached
        return sequence

    # ---- retiring

    def retire(
        self,
        plan: StepPlan,
        decoded: NDArray[np.int64],
        ids: SequenceABC[SequenceABC[int]],
        logprobs: SequenceABC[list[TokenLogprobs] | None] | None = None,
        reports: SequenceABC[list[TokenLogprobs]] = (),
        candidates: SequenceABC[Candidates] = (),
    ) -> tuple[list[TokenOutput], TokenRows | None]:
        """Takes the new token ids of `plan.chosen` and what may follow the beams of `plan.beams`, and returns the tokens that belong to
        live sequences, after those of prompts; those of steady sequences apart.

        decoded     of plan.decodes, [n, W]: at least one each, more only with a tree; then -1
        ids         of the rest of plan.chosen
        reports     of plan.chunks: log-probabilities of the tokens reported
        """
        outputs: list[TokenOutput] = []
        for chunk in plan.contrasted_chunks:
            chunk.sequence.verified = chunk.start + chunk.rows
            self._settle(chunk.sequence)
        for index, chunk in enumerate(plan.chunks):
            chunk.sequence.verified = chunk.start + chunk.rows
            if chunk.reported[1] and chunk.sequence.status is not Status.FINISHED:
                outputs += self._report(chunk, reports[index])
            if not chunk.final:
                self._settle(chunk.sequence)
        depth = 0 if plan.tree is None else plan.tree.depth
        steady, left = self._retire_steady(plan, decoded, depth)
        new_ids: dict[int, SequenceABC[int]] = dict(zip(left, id_lists(decoded[left]), strict=True)) if left else {}
        new_ids.update(enumerate(ids, len(plan.decodes)))
        chosen = plan.chosen
        for row, new in new_ids.items():
            sequence = chosen[row]
            self._table.leave(sequence)
            if row < len(plan.decodes):
                sequence.computed += len(new) - 1
                sequence.slack -= depth
            sequence.pending -= 1
            if sequence.status is not Status.FINISHED:
                output = self._accept(sequence, new)
                if logprobs is not None and (of_row := logprobs[row]) is not None:
                    output.logprobs = of_row[: len(output.ids)]
                outputs.append(output)
            self._settle(sequence)
        for sequence, of_beams in zip(plan.beams, candidates, strict=True):
            if sequence.status is Status.RUNNING:  # one that was preempted begins anew
                outputs += self._advance(sequence, of_beams)
            self._settle(sequence)
        return outputs, steady

    def _retire_steady(
        self, plan: StepPlan, decoded: NDArray[np.int64], depth: int
    ) -> tuple[TokenRows | None, list[int]]:
        """Tokens taken all at once, and the rows of `plan.decodes` that are left."""
        if plan.steady is None:
            return None, list(range(len(plan.decodes)))
        count = plan.num_steady
        steady, left, due = self._table.retire(plan.steady, decoded[:count], depth)
        for sequence in due:
            self._register(sequence)
            if self.limits.window:
                self._release_before_window(sequence)
            self._table.set_due(sequence)
        return steady, [*left, *range(count, len(plan.decodes))]

    def _advance(self, sequence: Sequence, candidates: Candidates) -> list[TokenOutput]:
        """Beams stay what they are to the search alone until the last step, which gives out what it has found."""
        group, request = sequence.group, sequence.request
        assert group is not None
        group.advance(candidates)
        if group.search.done:
            self._leave(sequence, Status.FINISHED)
            return group.outputs()
        survived = request.isolated and group.steps == 1
        return [TokenOutput(request.request_id, request.choice, request.epoch, 0, [])] if survived else []

    def _accept(self, sequence: Sequence, ids: SequenceABC[int]) -> TokenOutput:
        """Appends new tokens up to the first that ends the sequence, or that its grammar's matcher cannot follow."""
        request = sequence.request
        output = TokenOutput(request.request_id, request.choice, request.epoch, sequence.num_generated, [])
        for token in ids:
            sequence.tokens.append(token)
            sequence.verified = len(sequence.tokens) - 1
            output.ids.append(token)
            if sequence.matcher is not None and not sequence.matcher.advance((token,)):
                break
            if (reason := sequence.finish_reason()) is not None:
                output.finish = reason
                output.stop_token = token if sequence.stops.get(token) is reason else None
                self._register(sequence)
                # The retiring step still counts as in flight, so nothing is released before `_settle`.
                self._leave(sequence, Status.FINISHED)
                break
        return output

    def _report(self, chunk: Chunk, logprobs: list[TokenLogprobs]) -> list[TokenOutput]:
        sequence, request, (first, end) = chunk.sequence, chunk.sequence.request, chunk.reported
        ids = sequence.tokens[first:end].tolist()
        outputs = [TokenOutput(request.request_id, PROMPT, request.epoch, first, ids, logprobs)]
        if not chunk.final and end == sequence.prompt_len and (reason := sequence.finish_reason()) is not None:
            # The prompt was all that was wanted.
            last = TokenOutput(request.request_id, request.choice, request.epoch, sequence.num_generated, [])
            last.finish = reason
            outputs.append(last)
            self._register(sequence)
            self._leave(sequence, Status.FINISHED)
        return outputs

    def _settle(self, sequence: Sequence) -> None:
        """A step with this sequence has retired."""
        self._table.leave(sequence)
        sequence.inflight -= 1
        if sequence.status is not Status.FINISHED:
            self._register(sequence)
        if sequence.status is not Status.RUNNING:
            if sequence.inflight == 0:
                self._release(sequence)
        elif self.limits.window:
            self._release_before_window(sequence)

    def _register(self, sequence: Sequence) -> None:
        size = self.limits.block_size
        if self.pool.prefix_cache and (full := sequence.verified // size) > sequence.registered:
            digests = sequence.hashes(full, size)
            for column in range(sequence.registered, full):
                if (block := sequence.blocks[column]) >= 0:
                    self.pool.register(block, digests[column])
            sequence.registered = full

    def _release_before_window(self, sequence: Sequence) -> None:
        # Rows not yet retired stand at `verified` or later, and see `window` positions including their own.
        in_beams = sequence.group is not None and bool(sequence.group.beams)
        earliest = sequence.computed if in_beams else sequence.verified
        end = max(0, earliest - self.limits.window + 1) // self.limits.block_size
        if end <= sequence.released:
            return
        if in_beams:
            assert sequence.group is not None
            sequence.group.release_before(self.pool, sequence.released, end)
        else:
            self.pool.release(reversed(sequence.blocks[sequence.released : end]))
            sequence.blocks[sequence.released : end] = [-1] * (end - sequence.released)
        sequence.released = end

    def check_idle(self) -> list[str]:
        """Complaints if, with nothing to do and nothing in flight, not everything is back."""
        complaints = self.pool.check()
        if self.running or self._num_waiting or self._releasing:
            complaints.append(
                f"{len(self.running)} running, {self._num_waiting} waiting, {len(self._releasing)} releasing"
            )
        if self.pool.free != self.pool.num_blocks:
            complaints.append(f"{self.pool.num_blocks - self.pool.free} KV blocks are not back")
        if sorted(self._slots) != list(range(self.limits.max_seqs)):
            complaints.append(f"{self.limits.max_seqs - len(self._slots)} slots are not back")
        if len(self._siblings):
            complaints.append(f"{len(self._siblings)} requests are remembered")
        if sorted(self._memories) != list(range(self.limits.memories)):
            complaints.append(f"{self.limits.memories - len(self._memories)} memories are not back")
        return complaints
