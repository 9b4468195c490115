"""Any process killed, stopped or told to go at any moment: every stream ends once, with what the uninterrupted run gave.

GORGON_CHAOS_SECONDS   how long faults are injected (default 60)
GORGON_CHAOS_SEED      of the plan of faults and of the streams (default 1)
"""

from __future__ import annotations

import os
import random
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.chaos.checker import Record, Reference, check, check_stored
from tests.chaos.deployment import COPIES, deployed
from tests.chaos.faults import make_plan
from tests.chaos.report import clients, disturb
from tests.chaos.workload import Body, Workload
from tests.pipeline.harness import needs_weights, weights

SECONDS = float(os.environ.get("GORGON_CHAOS_SECONDS", "60"))
SEED = int(os.environ.get("GORGON_CHAOS_SEED", "1"))
STREAMS = 64
# A lost stream never ends. One that waits for a worker to start anew does, though on a crowded machine not soon.
STREAM_LIMIT = 180.0
FAULT_EVERY = 0.8  # seconds

pytestmark = [pytest.mark.chaos, needs_weights]

PROMPTS = (
    "Once upon a time, there was a little",
    "One day, a little girl named Lily",
    "Tom and Sam went to the park.",
    "The old cat was very sleepy and",
    'Mom said, "Do not touch the',
    "A big dog lived in a small house.",
    "It was raining, so Tim",
    "There was a boy who loved to",
)
SAMPLED: tuple[Body, ...] = (
    dict(temperature=0.8, top_p=0.95),
    dict(temperature=1.0, top_k=40),
    dict(temperature=0.7, repetition_penalty=1.15),
    dict(temperature=0.9, presence_penalty=0.4, frequency_penalty=0.2),
    dict(temperature=1.2, min_p=0.05, logprobs=2),
    dict(temperature=0.8, n=2),
    dict(temperature=0.6, stop_token_ids=[410], ignore_eos=True),
    dict(temperature=1.0, ignore_eos=True),
)
LENGTHS = (30, 50, 70, 90, 110, 130, 160, 240)


def unstopped_requests() -> dict[str, Body]:
    greedy = {
        f"greedy-{i}": dict(prompt=prompt, max_tokens=LENGTHS[i], temperature=0) for i, prompt in enumerate(PROMPTS)
    }
    seeded = {
        f"seeded-{i}": dict(prompt=PROMPTS[i], max_tokens=LENGTHS[-1 - i], seed=1000 + i) | params
        for i, params in enumerate(SAMPLED)
    }
    return greedy | seeded


def unstopped(name: str) -> str:
    """The request without stop strings that `name` was made of."""
    kind, _, number = name.partition("-")
    return name if kind != "stop" else f"{'greedy' if int(number) % 2 else 'seeded'}-{number}"


def stopped_requests(references: dict[str, Record]) -> dict[str, Body]:
    """Stop strings out of the middle of what the model says, cut across tokens."""
    requests = {}
    for name in (f"stop-{i}" for i in range(8)):
        text = references[unstopped(name)].text[0]
        at = len(text) * 2 // 3
        requests[name] = unstopped_requests()[unstopped(name)] | dict(stop=[text[at : at + 7], "never to be seen"])
    return requests


@pytest.mark.timeout(SECONDS + 360)
async def test_no_fault_breaks_a_stream(tmp_path: Path) -> None:
    flags = ["--device", "cpu", "--threads", "1", "--max-seqs", "64"]
    async with deployed(tmp_path, weights("stories260K"), flags) as deployment, AsyncExitStack() as stack:
        requests = unstopped_requests()
        workload = Workload(deployment.bus, await clients(stack, deployment), requests, STREAM_LIMIT)
        references = await workload.references(requests)
        requests |= (stopped := stopped_requests(references))
        references |= await workload.references(stopped)

        def verdict(record: Record) -> list[str]:
            # A stream that is ended from outside gives away the text that might have become a stop string.
            name = record.request if record.end == "finished" else unstopped(record.request)
            wrong = check(record, Reference.of(references[name]))
            return wrong + (check_stored(record) if record.kind == "durable" else [])

        plan = make_plan(random.Random(SEED), SECONDS, FAULT_EVERY, COPIES)
        report = await disturb(deployment, workload, verdict, plan, seed=SEED, streams=STREAMS, seconds=SECONDS)
        assert not report.broken, str(report)
        assert await deployment.unrest() == []
        assert {record.kind for record in report.records} == set(workload.kinds)
        assert len({stage for stage, _ in report.faults}) == 5 or SECONDS < 60, "every stage and the server"
