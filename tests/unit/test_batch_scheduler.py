"""The batch scheduler with a model that needs no arithmetic: the next token is a function of the tokens before it."""

from __future__ import annotations

import dataclasses
import gc
import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.model_worker.batch_scheduler import BatchScheduler
from services.model_worker.block_pool import BlockPool
from services.model_worker.interface import EngineRequest, FinishReason, TokenOutput
from services.model_worker.sequence import Sequence, Status
from services.model_worker.step_plan import SchedulerLimits, StepPlan
from shared.sampling import SamplingParams

EOS = 0


def next_token(tokens: list[int]) -> int:
    return random.Random(str(tokens)).randrange(12)


def continuation(prompt: list[int], params: SamplingParams, max_model_len: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < min(len(prompt) + params.max_tokens, max_model_len):
        tokens.append(next_token(tokens))
        if tokens[-1] in params.stop_token_ids or (tokens[-1] == EOS and not params.ignore_eos):
            break
    return tokens[len(prompt) :]


@dataclass
class Device:
    """What the device would hold: block contents and, by slot, block table, context and tokens. Every read is checked."""

    limits: SchedulerLimits
    num_blocks: int
    cells: dict[tuple[int, int], list[int]] = field(default_factory=dict)  # (block, offset) → all tokens up to there
    tables: dict[int, dict[int, int]] = field(default_factory=dict)
    context: dict[int, int] = field(default_factory=dict)
    history: dict[int, list[int]] = field(default_factory=dict)  # the tokens that the slot's sequence really has

    def _write(self, slot: int, history: list[int], position: int) -> None:
        size, window = self.limits.block_size, self.limits.window
        table = self.tables[slot]
        self.cells[table[position // size], position % size] = history[: position + 1]
        first = max(0, position - window + 1) if window else 0
        for seen in range(first, position + 1):
            cell = self.cells.get((table[seen // size], seen % size))
            assert cell == history[: seen + 1], f"position {seen} of {history} holds {cell}"

    def run(self, plan: StepPlan) -> list[list[int]]:
        for sequence in plan.admitted:
            self.tables[sequence.slot] = {}
            self.context[sequence.slot] = next(c.start for c in plan.chunks if c.sequence is sequence)
            self.history[sequence.slot] = list(sequence.tokens)
        for slot, column, block in zip(plan.table_slots, plan.table_columns, plan.table_blocks, strict=True):
            self.tables[slot][column] = block
        ids = []
        assert len({s.slot for s in plan.sequences}) == len(plan.sequences)
        assert plan.rows <= self.limits.max_batched_tokens
        for sequence in plan.decodes:
            slot = sequence.slot
            history = self.history[slot]
            assert self.context[slot] == len(history) - 1, "a decode row must follow the cache"
            self._write(slot, history, self.context[slot])
            self.context[slot] += 1
            ids.append([self._sample(slot)])
        for chunk in plan.chunks:
            slot = chunk.sequence.slot
            assert self.context[slot] == chunk.start
            for position in range(chunk.start, chunk.start + chunk.rows):
                self._write(slot, self.history[slot], position)
            self.context[slot] += chunk.rows
            assert chunk.final == (self.context[slot] == len(self.history[slot]))
            if chunk.final:
                ids.append([self._sample(slot)])
        return ids

    def _sample(self, slot: int) -> int:
        token = next_token(self.history[slot])
        self.history[slot].append(token)
        return token


def retire(scheduler: BatchScheduler, plan: StepPlan, ids: list[list[int]], *rest: Any) -> list[TokenOutput]:
    """Gives the scheduler the new tokens of plan.chosen. All that it gives out, tokens of steady sequences as well."""
    count = len(plan.decodes)
    decoded = np.full((count, max(map(len, ids[:count]), default=1)), -1)
    for row, new in enumerate(ids[:count]):
        decoded[row, : len(new)] = new
    tokens, rows = scheduler.retire(plan, decoded, ids[count:], *rest)
    return [*tokens, *(rows or ())]


class World:
    """Scheduler and device, with steps in flight, as the engine drives them."""

    def __init__(
        self, limits: SchedulerLimits, num_blocks: int, prefix_cache: bool, depth: int, steady_from: int = 1
    ) -> None:
        self.scheduler = BatchScheduler(limits, BlockPool(num_blocks, prefix_cache), steady_from)
        self.device = Device(limits, num_blocks)
        self.depth = depth
        self.in_flight: deque[tuple[StepPlan, list[list[int]]]] = deque()
        self.outputs: dict[str, list[TokenOutput]] = {}

    def turn(self) -> bool:
        plan = self.scheduler.schedule()
        if plan is not None:
            self.in_flight.append((plan, self.device.run(plan)))
        idle = plan is None and not self.in_flight
        if len(self.in_flight) > (self.depth if plan is not None else 0):
            for output in retire(self.scheduler, *self.in_flight.popleft()):
                self.outputs.setdefault(output.request_id, []).append(output)
        assert self.scheduler.pool.check() == []
        return not idle

    def finish(self) -> None:
        for _ in range(5000):
            if not self.turn():
                break
        else:
            raise AssertionError("no end")
        assert self.scheduler.check_idle() == []


def ask(name: str, prompt: list[int], priority: int = 0, **params: object) -> EngineRequest:
    return EngineRequest(name, 0, 1, prompt, SamplingParams(**params), priority=priority)  # type: ignore[arg-type]


# What a request of `requests_strategy` is like.
Wanted = tuple[int, int, int, int, int | None, bool, int]
requests_strategy = st.lists(
    st.tuples(
        st.integers(1, 30),  # prompt length
        st.integers(1, 20),  # max_tokens
        st.integers(0, 2),  # priority
        st.integers(0, 12),  # turn at which it comes
        st.sampled_from([None, None, None, 3, 9]),  # turns after which it is aborted
        st.booleans(),  # ignore_eos
        st.integers(0, 2),  # which common beginning
    ),
    min_size=1,
    max_size=10,
)


def wish(index: int, wanted: Wanted) -> EngineRequest:
    """The request that is wanted. Those of one beginning share it as far as both go."""
    length, max_tokens, priority, _, _, ignore_eos, beginning = wanted
    prompt = [(beginning * 7 + position) % 11 + 1 for position in range(length)]
    return ask(str(index), prompt, priority, max_tokens=max_tokens, ignore_eos=ignore_eos)


# (turn at which they come, turns after which they are aborted, requests)
Arrival = tuple[int, int | None, list[EngineRequest]]


def arrivals(wanted: list[Wanted]) -> list[Arrival]:
    return [(one[3], one[4], [wish(index, one)]) for index, one in enumerate(wanted)]


def run_all(world: Any, arrivals: list[Arrival]) -> list[tuple[Sequence, int | None]]:
    """Until nothing is left. The sequences, as they came, and the turns after which each was aborted."""
    pending = deque(sorted(arrivals, key=lambda arrival: arrival[0]))
    sequences: list[tuple[Sequence, int, int | None]] = []
    turn = 0
    while pending or turn < 25:
        while pending and pending[0][0] <= turn:
            _, abort, requests = pending.popleft()
            sequences += [(world.scheduler.add(request), turn, abort) for request in requests]
        for sequence, since, abort in sequences:
            if abort is not None and turn == since + abort:
                world.scheduler.finish(sequence)
        world.turn()
        turn += 1
    world.finish()
    return [(sequence, abort) for sequence, _, abort in sequences]


@settings(max_examples=150, deadline=None)
@given(
    wanted=requests_strategy,
    num_blocks=st.integers(12, 40),
    max_seqs=st.integers(1, 6),
    budget=st.integers(6, 40),
    prefix_cache=st.booleans(),
    depth=st.integers(0, 1),
    window=st.sampled_from([0, 0, 5]),
)
def test_every_sequence_gets_its_own_tokens(
    wanted: list[Wanted], num_blocks: int, max_seqs: int, budget: int,
    prefix_cache: bool, depth: int, window: int,
) -> None:  # fmt: skip
    limits = SchedulerLimits(4, 40, max_seqs, budget, frozenset({EOS}), window)
    world = World(limits, num_blocks, prefix_cache, depth)
    for sequence, abort in run_all(world, arrivals(wanted)):
        outputs = world.outputs.get(sequence.request.request_id, [])
        got = [token for output in outputs for token in output.ids]
        expected = continuation(list(sequence.request.prompt_ids), sequence.request.params, limits.max_model_len)
        assert [output.position for output in outputs] == list(range(len(got)))
        if abort is None:
            assert got == expected
            assert [output.finish is not None for output in outputs] == [False] * (len(got) - 1) + [True]
        else:
            assert got == expected[: len(got)]


def limits(**changes: int) -> SchedulerLimits:
    values = {"block_size": 4, "max_model_len": 64, "max_seqs": 4, "max_batched_tokens": 16} | changes
    return SchedulerLimits(**values)  # type: ignore[arg-type]


def test_decodes_come_first_then_prompts_begun_then_the_waiting_by_priority() -> None:
    world = World(limits(max_batched_tokens=12), 64, False, 0)
    world.scheduler.add(ask("decoding", [1, 2], max_tokens=30, ignore_eos=True))
    world.turn()
    for name, length, priority in (("long", 20, 0), ("late", 4, 0), ("urgent", 4, 1)):
        world.scheduler.add(ask(name, list(range(1, length + 1)), priority, max_tokens=30))
    plan = world.scheduler.schedule()
    assert plan is not None
    assert [s.request.request_id for s in plan.decodes] == ["decoding"]
    assert [(c.sequence.request.request_id, c.rows) for c in plan.chunks] == [("urgent", 4), ("long", 7)]
    retire(world.scheduler, plan, world.device.run(plan))
    plan = world.scheduler.schedule()
    assert plan is not None
    assert [(c.sequence.request.request_id, c.rows) for c in plan.chunks] == [("long", 10)]


def test_the_lowest_and_latest_is_preempted() -> None:
    world = World(limits(max_batched_tokens=32, max_model_len=36), 9, False, 0)
    for name, priority in (("low", 0), ("high", 1), ("later", 0)):
        world.scheduler.add(ask(name, [1] * 8, priority, max_tokens=30, ignore_eos=True))
    waiting = {}
    for _ in range(12):
        world.turn()
        for name in ("low", "high", "later"):
            if name not in [s.request.request_id for s in world.scheduler.running]:
                waiting.setdefault(name, world.scheduler.steps)
    assert list(waiting) == ["later", "low"] and world.scheduler.preemptions == 2
    world.finish()


def test_a_prefix_is_computed_once() -> None:
    world = World(limits(max_batched_tokens=64), 64, True, 0)
    prompt = list(range(1, 17))
    for name in ("first", "second"):
        world.scheduler.add(ask(name, prompt, max_tokens=2, ignore_eos=True))
        world.finish()
    # All of the prompt is cached, yet its last block is computed again: the logits of the last token are wanted.
    assert (world.scheduler.prompt_tokens, world.scheduler.prefix_hit_tokens) == (32, 12)


def test_what_is_in_flight_is_released_when_it_retires() -> None:
    world = World(limits(), 64, False, 1)
    sequence = world.scheduler.add(ask("a", [1, 2, 3], max_tokens=30, ignore_eos=True))
    world.turn()
    world.turn()
    assert sequence.inflight == 1
    world.scheduler.finish(sequence)
    assert sequence.status is Status.FINISHED and world.scheduler.pool.free == 63 and world.scheduler.free_slots == 3
    assert not world.outputs.get("a", [])[1:]
    world.finish()


def test_nothing_is_held_by_those_that_ended_while_they_waited_for_a_sibling() -> None:
    world = World(limits(), 64, False, 0)
    first, second = (
        world.scheduler.add(dataclasses.replace(ask("a", [1] * 6, max_tokens=5), choice=choice)) for choice in (0, 1)
    )
    plan = world.scheduler.schedule()
    assert plan is not None and plan.participants == [first] and second.status is Status.WAITING
    world.scheduler.finish(first)
    world.scheduler.finish(second)
    retire(world.scheduler, plan, world.device.run(plan))
    assert world.scheduler.check_idle() == []  # no step is planned any more: the engine stops, or is paused


def test_deadlines() -> None:
    world = World(limits(), 64, False, 0)
    sequences = [
        world.scheduler.add(
            EngineRequest(name, 0, 1, [1], SamplingParams(max_tokens=30, ignore_eos=True), deadline=when)
        )
        for name, when in (("never", None), ("soon", 10.0), ("later", 20.0))
    ]
    world.turn()
    assert world.scheduler.next_deadline == 10.0
    assert world.scheduler.expired(9.9) == []
    assert world.scheduler.expired(10.0) == [sequences[1]]
    world.scheduler.finish(sequences[2])
    assert world.scheduler.next_deadline is None and world.scheduler.expired(99.0) == []
    world.finish()


@pytest.mark.parametrize("options", [{"deadline": 86_400.0}, {"priority": -1}])
def test_memory_does_not_grow_with_what_has_ended(options: dict[str, Any]) -> None:
    """Neither until its deadline, nor until its turn would have come."""
    world = World(SchedulerLimits(4, 32, 1, 8), 8, True, depth=0)
    world.scheduler.add(ask("runs", [3], max_tokens=30, ignore_eos=True))
    world.turn()
    waits = world.scheduler.add(ask("waits", [3]))
    for number in range(1000):
        late = dataclasses.replace(ask(str(number), [3]), **options)
        world.scheduler.finish(world.scheduler.add(late))
    gc.collect()
    assert sum(type(thing) is Sequence for thing in gc.get_objects()) < 200
    assert world.scheduler.waiting == 1 and waits.status is Status.WAITING
    world.finish()
    assert waits.status is Status.FINISHED


def test_why_it_ended() -> None:
    world = World(limits(eos_ids=frozenset({5})), 64, False, 0)  # type: ignore[arg-type]
    for name, params in (
        ("eos", {}),
        ("ignored", {"ignore_eos": True}),
        ("own", {"stop_token_ids": (5,)}),
        ("both", {"stop_token_ids": (5,), "ignore_eos": True}),
    ):
        world.scheduler.add(ask(name, [1], max_tokens=3, **params))
    plan = world.scheduler.schedule()
    assert plan is not None
    outputs = {o.request_id: (o.finish, o.stop_token) for o in retire(world.scheduler, plan, [[5]] * 4)}
    assert outputs == {
        "eos": (FinishReason.STOP, 5),
        "ignored": (None, None),
        "own": (FinishReason.STOP_TOKEN, 5),
        "both": (FinishReason.STOP_TOKEN, 5),
    }


def test_several_tokens_a_step_end_at_the_first_stop() -> None:
    world = World(limits(eos_ids=frozenset({5})), 64, False, 0)  # type: ignore[arg-type]
    world.scheduler.add(ask("a", [1], max_tokens=10))
    plan = world.scheduler.schedule()
    assert plan is not None
    (output,) = retire(world.scheduler, plan, [[3, 5, 7]])
    assert (output.ids, output.finish, output.stop_token) == ([3, 5], FinishReason.STOP, 5)
    assert world.scheduler.check_idle() == []


def test_a_budget_below_the_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="max_batched_tokens"):
        limits(max_batched_tokens=3)
