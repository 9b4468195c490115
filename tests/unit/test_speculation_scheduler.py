"""The batch scheduler with trees: the host plans without knowing how many guesses the steps in flight accept."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.model_worker.batch_scheduler import BatchScheduler
from services.model_worker.block_pool import BlockPool
from services.model_worker.sequence import Sequence
from services.model_worker.speculation.tree import Tree, default_trees
from services.model_worker.step_plan import SchedulerLimits, StepPlan
from tests.unit.test_batch_scheduler import (
    EOS,
    Device,
    Wanted,
    World,
    arrivals,
    ask,
    continuation,
    requests_strategy,
    run_all,
    wish,
)

TREES = default_trees(3).trees[:4]
OVERSHOOT = max(tree.depth + tree.size for tree in TREES)


class TreeDevice(Device):
    """Writes all nodes of a tree behind the context, accepts some, and moves those."""

    seed: int

    def run(self, plan: StepPlan) -> list[list[int]]:
        before = {sequence.slot: self.context.get(sequence.slot) for sequence in plan.decodes}
        ids = super().run(plan)
        if plan.tree is None:
            return ids
        size = self.limits.block_size
        for row, sequence in enumerate(plan.decodes):
            slot = sequence.slot
            start = before[slot]
            assert start is not None
            for position in range(start + 1, start + plan.tree.size):
                self.cells[self.tables[slot][position // size], position % size] = []  # a guess
            # The same, whatever the slot and in whatever order the rows come.
            for _ in range(hash((self.seed, *self.history[slot])) % (plan.tree.depth + 1)):
                self._write(slot, self.history[slot], self.context[slot])
                self.context[slot] += 1
                ids[row].append(self._sample(slot))
        return ids


class TreeWorld(World):
    def __init__(
        self,
        limits: SchedulerLimits,
        num_blocks: int,
        prefix_cache: bool,
        depth: int,
        seed: int,
        steady_from: int = 1,
    ) -> None:
        super().__init__(limits, num_blocks, prefix_cache, depth, steady_from)
        self.rng = random.Random(seed)
        self.device = TreeDevice(limits, num_blocks)
        self.device.seed = seed
        self.with_tree = 0
        schedule = self.scheduler.schedule

        def scheduled() -> StepPlan | None:
            preempted = self.scheduler.preemptions
            plan = schedule(self.pick)
            if plan is not None and plan.tree is not None:
                self.with_tree += 1
                assert self.scheduler.preemptions == preempted, "guesses are worth no preemption"
            return plan

        self.scheduler.schedule = scheduled  # type: ignore[method-assign,assignment]

    def pick(self, ready: list[Sequence]) -> Tree | None:
        assert ready
        usable = [tree for tree in TREES if len(ready) * tree.size <= self.scheduler.limits.max_batched_tokens]
        return self.rng.choice([None, *usable])


WORLDS: dict[str, st.SearchStrategy[Any]] = dict(
    wanted=requests_strategy,
    num_blocks=st.integers(12, 60),
    max_seqs=st.integers(1, 6),
    budget=st.integers(6, 60),
    prefix_cache=st.booleans(),
    depth=st.integers(0, 1),
    window=st.sampled_from([0, 0, 5]),
    seed=st.integers(0, 2**32),
)


@settings(max_examples=200, deadline=None)
@given(**WORLDS)
def test_every_sequence_gets_its_own_tokens(
    wanted: list[Wanted], num_blocks: int, max_seqs: int, budget: int,
    prefix_cache: bool, depth: int, window: int, seed: int,
) -> None:  # fmt: skip
    limits = SchedulerLimits(4, 40, max_seqs, budget, frozenset({EOS}), window, OVERSHOOT)
    world = TreeWorld(limits, num_blocks, prefix_cache, depth, seed)
    for sequence, abort in run_all(world, arrivals(wanted)):
        outputs = world.outputs.get(sequence.request.request_id, [])
        got = [token for output in outputs for token in output.ids]
        expected = continuation(list(sequence.request.prompt_ids), sequence.request.params, limits.max_model_len)
        assert all(output.position == sum(len(o.ids) for o in outputs[:i]) for i, output in enumerate(outputs))
        if abort is None:
            assert got == expected
            assert [output.finish is not None for output in outputs] == [False] * (len(outputs) - 1) + [True]
        else:
            assert got == expected[: len(got)]
        assert sequence.slack == sequence.pending == 0


@settings(max_examples=100, deadline=None)
@given(**WORLDS, steady_from=st.integers(1, 3))
def test_steady_sequences_fare_like_those_gone_through_one_by_one(
    wanted: list[Wanted], num_blocks: int, max_seqs: int, budget: int,
    prefix_cache: bool, depth: int, window: int, seed: int, steady_from: int,
) -> None:  # fmt: skip
    """Turn by turn: the same tokens, the same rows planned, as many blocks free."""
    if prefix_cache:  # which cached block is given away first depends on the order within a step, which is not the same
        num_blocks += 1000
    limits = SchedulerLimits(4, 40, max_seqs, budget, frozenset({EOS}), window, OVERSHOOT)
    worlds = [TreeWorld(limits, num_blocks, prefix_cache, depth, seed, start) for start in (steady_from, 99)]
    ends: dict[int, list[list[Sequence]]] = {}
    for turn in range(400):
        for index, one in enumerate(wanted):
            come, abort = one[3:5]
            if come == turn:
                request = wish(index, one)
                added = [world.scheduler.add(request) for world in worlds]
                ends.setdefault(turn + abort if abort is not None else -1, []).append(added)
        for pair in ends.pop(turn, []):
            for world, sequence in zip(worlds, pair, strict=True):
                world.scheduler.finish(sequence)
        busy = [world.turn() for world in worlds]
        states = [
            (
                busy[i], world.scheduler.pool.free, world.scheduler.preemptions,
                [
                    (plan.step, plan.tree, sorted(s.request.request_id for s in plan.decodes), [(c.start, c.rows) for c in plan.chunks])
                    for plan, _ in world.in_flight
                ],
            )
            for i, world in enumerate(worlds)
        ]  # fmt: skip
        assert states[0] == states[1]
        if turn > 12 and not busy[0] and not ends.keys() - {-1}:
            break
    for world in worlds:
        world.finish()
    assert worlds[0].outputs == worlds[1].outputs


@pytest.mark.parametrize("depth", [0, 1])
def test_a_sequence_gets_blocks_for_all_that_may_be_accepted(depth: int) -> None:
    limits = SchedulerLimits(4, 60, 2, 64, frozenset(), 0, OVERSHOOT)
    world = TreeWorld(limits, 40, False, depth, 1)
    world.pick = lambda ready: TREES[3]  # type: ignore[method-assign]
    sequence = world.scheduler.add(ask("a", [1, 2, 3], max_tokens=50, ignore_eos=True))
    world.turn()
    while world.turn() and sequence.blocks:
        in_flight = [plan for plan, _ in world.in_flight]
        most = sequence.verified + sum(1 + (plan.tree.depth if plan.tree else 0) for plan in in_flight)
        assert sequence.computed + sequence.slack <= most
        assert len(sequence.blocks) * 4 >= sequence.verified + TREES[3].size * len(in_flight[-1:])
    world.finish()
    assert world.with_tree > 5


def test_no_room_no_tree() -> None:
    """With the cache to itself a sequence runs to the end in as many blocks as it has tokens."""
    world = TreeWorld(SchedulerLimits(4, 40, 2, 64, frozenset(), 0, OVERSHOOT), 10, False, 1, 3)
    world.pick = lambda ready: TREES[2]  # type: ignore[method-assign]
    world.scheduler.add(ask("a", [1, 2, 3], max_tokens=37, ignore_eos=True))
    world.finish()
    assert sum(len(output.ids) for output in world.outputs["a"]) == 37
    assert world.scheduler.preemptions == 0 and 0 < world.with_tree < world.scheduler.steps
    assert BatchScheduler(world.scheduler.limits, BlockPool(10)).schedule(world.pick) is None
