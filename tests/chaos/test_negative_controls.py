"""The suite finds what it is there for: with the epoch check off, and with replay off, the same checker reports broken streams."""

from __future__ import annotations

import random
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from services.model_worker.settings import FixedEngineSettings
from tests.chaos.checker import STALLED, Record, Reference, check, check_end
from tests.chaos.deployment import COPIES, deployed
from tests.chaos.faults import faults
from tests.chaos.mutants.model_worker import mixed_at
from tests.chaos.report import Goal, clients, disturb
from tests.chaos.workload import Body, RecordingClient, ReplaylessClient, Workload

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]

DEMO = Path(__file__).resolve().parents[2] / "models/demo"
STEP = 0.02
TOKENS = 200
GOAL = Goal(10.0, faults=4, at_most=60.0)  # on a slow machine it takes longer until all serve again
REQUESTS: dict[str, Body] = {
    f"fixed-{i}": dict(prompt=[10 + i, 11, 12], seed=i, max_tokens=TOKENS, ignore_eos=True) for i in range(4)
}
FLAGS = ["--engine", "fixed", "--fixed.step-time", str(STEP), "--max-seqs", "64"]


@pytest.mark.parametrize("epoch_check", [True, False])
async def test_without_the_epoch_check_epochs_are_mixed(tmp_path: Path, epoch_check: bool) -> None:
    """Heartbeats of a worker are lost for longer than it takes to give its requests to another one; then it dies."""
    modules = {"model_worker": "tests.chaos.mutants.model_worker"}
    if not epoch_check:
        modules["detokenizer"] = "tests.chaos.mutants.detokenizer"

    def mixed(record: Record) -> list[str]:
        request = REQUESTS[record.request]
        ids = record.ids.get(0, [])
        at = mixed_at(request["prompt"], request["seed"], ids, FixedEngineSettings.model_validate({}))
        return [] if at is None else [f"token {at} of {len(ids)} does not follow from those before it"]

    async with deployed(tmp_path, DEMO, FLAGS, modules) as deployment, AsyncExitStack() as stack:
        kinds = {"plain": 3, "attached": 1}
        workload = Workload(deployment.bus, await clients(stack, deployment), REQUESTS, 30.0, kinds)
        plan = faults(random.Random(1), 2.0, COPIES, {("model_worker", "mute"): 1.0}, lasting=(0.8, 1.6))
        report = await disturb(
            deployment,
            workload,
            lambda r: mixed(r) + (check_end(r) if epoch_check else []),
            plan,
            seed=1,
            streams=24,
            goal=GOAL,
        )
    assert bool(report.broken) is not epoch_check


@pytest.mark.parametrize("client", [RecordingClient, ReplaylessClient])
async def test_without_replay_streams_stall(tmp_path: Path, client: type[RecordingClient]) -> None:
    limit = 14.0 if client is ReplaylessClient else 60.0  # who stalls is waited for; who does not may be slow
    async with deployed(tmp_path, DEMO, FLAGS) as deployment, AsyncExitStack() as stack:
        workload = Workload(deployment.bus, await clients(stack, deployment, client), REQUESTS, limit, {"plain": 1})
        references = await workload.references(REQUESTS)
        plan = faults(random.Random(1), 3.0, COPIES, {("nats", "kill"): 1.0})
        report = await disturb(
            deployment,
            workload,
            lambda record: check(record, Reference.of(references[record.request])),
            plan,
            seed=1,
            streams=24,
            goal=GOAL,
        )
    if client is ReplaylessClient:
        assert STALLED in {record.end for record in report.records}
    else:
        assert not report.broken
