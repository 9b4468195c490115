"""A request that is suspected of killing its worker has the engine's steps for itself until it has come a token further."""

from __future__ import annotations

from collections import deque
from itertools import takewhile

import pytest

from services.model_worker.batch_scheduler import BatchScheduler
from services.model_worker.block_pool import BlockPool
from services.model_worker.interface import EngineRequest
from services.model_worker.step_plan import SchedulerLimits, StepPlan
from shared.sampling import SamplingParams
from tests.unit.test_batch_scheduler import retire


def request(name: str, choice: int = 0, *, isolated: bool = False, tokens: int = 6, prompt: int = 5) -> EngineRequest:
    ids = range(100, 100 + prompt)
    return EngineRequest(name, choice, 1, list(ids), SamplingParams(max_tokens=tokens), isolated=isolated)


def scheduler(slots: int, blocks: int) -> BatchScheduler:
    limits = SchedulerLimits(block_size=4, max_model_len=24, max_seqs=slots, max_batched_tokens=8)
    return BatchScheduler(limits, BlockPool(blocks, prefix_cache=False))


def run(batches: BatchScheduler, depth: int, in_flight: deque[StepPlan], limit: int = 200) -> list[set[str]]:
    """Runs to the end with up to `depth` steps launched ahead; returns the requests of each step."""
    steps = []
    for _ in range(limit):
        plan = batches.schedule()
        if plan is not None:
            in_flight.append(plan)
            steps.append({s.request.request_id for s in plan.sequences})
        if in_flight and (plan is None or len(in_flight) > depth):
            retiring = in_flight.popleft()
            retire(batches, retiring, [[7]] * len(retiring.sampled))
        elif plan is None:
            return steps
    raise AssertionError("it does not come to an end")


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(("slots", "blocks"), [(4, 64), (2, 6)])
def test_an_isolated_request_shares_no_step(depth: int, slots: int, blocks: int) -> None:
    batches = scheduler(slots, blocks)
    in_flight: deque[StepPlan] = deque()
    for name in ("a", "b"):
        batches.add(request(name))
    for _ in range(2):
        plan = batches.schedule()
        assert plan is not None
        retire(batches, plan, [[7]] * len(plan.sampled))
    suspects = [batches.add(request("suspect", choice, isolated=True)) for choice in range(2)]
    other = batches.add(request("other suspect", isolated=True))
    batches.add(request("c"))
    steps = run(batches, depth, in_flight)
    # It does not wait for those that run. Its prompt is one chunk; with a step launched ahead, one more is its own.
    alone = list(takewhile({"suspect"}.__eq__, steps))
    then = list(takewhile({"other suspect"}.__eq__, steps[len(alone) :]))
    assert 1 <= len(then) <= len(alone) <= 3
    rest = steps[len(alone) + len(then) :]
    assert {"a", "b", "c", "suspect", "other suspect"} == set().union(*rest), (
        "proven harmless, they meet the others again"
    )
    assert any(len(step) > 1 and "suspect" in step for step in rest)
    assert all(s.num_generated == 6 for s in (*suspects, other))
    assert batches.check_idle() == []


def test_others_go_on_when_the_isolated_request_is_aborted() -> None:
    batches = scheduler(2, 64)
    batches.add(request("a"))
    suspect = batches.add(request("suspect", isolated=True))
    plan = batches.schedule()
    assert plan is not None
    assert [s.request.request_id for s in plan.sequences] == ["suspect"]
    batches.finish(suspect)
    retire(batches, plan, [[7]])
    assert run(batches, 0, deque())[0] == {"a"}
    assert batches.check_idle() == []
