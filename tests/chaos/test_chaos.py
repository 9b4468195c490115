"""Any process killed, stopped or told to go at any moment: every stream ends once, with what the uninterrupted run gave.

Besides, of all messages between the server and stages and clients a share is lost, and another one late.

GORGON_CHAOS_SECONDS   how long faults are injected, at least (default 60)
GORGON_CHAOS_STREAMS   how many streams must have ended, too (default 0: as many as do in the time)
GORGON_CHAOS_FAULTS    how many faults must have struck, too
GORGON_CHAOS_SEED      of the plan of faults and of the streams (default 1)
GORGON_CHAOS_MODEL     stories260K (default), or demo: the model with Medusa heads, which speculates
"""

from __future__ import annotations

import os
import random
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.chaos.checker import Record, Reference, check, check_stored
from tests.chaos.deployment import COPIES, deployed
from tests.chaos.faults import faults
from tests.chaos.report import Goal, clients, disturb
from tests.chaos.workload import KINDS, Body, Workload
from tests.pipeline.harness import needs_weights, weights

DEMO = Path(__file__).resolve().parents[2] / "models/demo"
SECONDS = float(os.environ.get("GORGON_CHAOS_SECONDS", "60"))
SEED = int(os.environ.get("GORGON_CHAOS_SEED", "1"))
GOAL = Goal(
    SECONDS,
    int(os.environ.get("GORGON_CHAOS_STREAMS", "0")),
    int(os.environ.get("GORGON_CHAOS_FAULTS", "0")),
    at_most=4 * SECONDS,
)
MODEL = os.environ.get("GORGON_CHAOS_MODEL", "stories260K")
STREAMS = 64
# A lost stream never ends. One that waits for a worker to start anew does, though on a crowded machine not soon.
STREAM_LIMIT = 180.0
FAULT_EVERY = 0.4  # seconds
DROPPED, DELAYED = 0.002, 0.01  # of all messages

pytestmark = [pytest.mark.chaos, *([needs_weights] if MODEL != "demo" else [])]

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
EXPECTED = {
    *((kind, "finished") for kind in KINDS),
    ("cancelled", "cancelled"),
    ("deadline", "deadline_exceeded"),
}
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


@pytest.mark.timeout(GOAL.at_most + 360)
async def test_no_fault_breaks_a_stream(tmp_path: Path) -> None:
    flags = ["--device", "cpu", "--threads", "1", "--max-seqs", "64"]
    path = DEMO if MODEL == "demo" else weights(MODEL)
    async with (
        deployed(tmp_path, path, flags, losses=(SEED, DROPPED, DELAYED)) as deployment,
        AsyncExitStack() as stack,
    ):
        link = deployment.link
        assert link is not None
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

        link.begin_faults()
        plan = faults(random.Random(SEED), FAULT_EVERY, COPIES)
        report = await disturb(deployment, workload, verdict, plan, seed=SEED, streams=STREAMS, goal=GOAL)
        migrated = await deployment.migrated()
        print(f"{migrated} of the streams that ended lately were migrated")
        assert not report.broken, str(report)
        assert await deployment.unrest() == []
        # That nothing broke means something only if all of this happened.
        assert {(record.kind, record.end) for record in report.records} >= EXPECTED
        assert migrated > 0
        assert len({stage for stage, _ in report.faults}) == 5 or SECONDS < 60, "every stage and the server"
        assert len(report.records) >= GOAL.streams and sum(report.faults.values()) >= GOAL.faults, str(report)
    print(dict(link.done))
    assert link.done["dropped to the server"] > 10 and link.done["dropped to a client"] > 10
