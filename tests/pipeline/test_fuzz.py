"""Malformed requests through real processes: every one has its end, nobody dies, and everything is given back.

GORGON_FUZZ=10000 for all of them; `make test` takes a sample.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from shared.errors import ErrorCode
from tests.pipeline.harness import RawClient, deployed, needs_weights, weights
from tests.protocol.test_fuzz import request

CASES = int(os.environ.get("GORGON_FUZZ", "600"))
AT_ONCE = 64


@needs_weights
@pytest.mark.timeout(120 + CASES // 10)
async def test_malformed_requests_kill_nobody(tmp_path: Path) -> None:
    chance = random.Random(int(os.environ.get("GORGON_FUZZ_SEED", "4")))
    gate = asyncio.Semaphore(AT_ONCE)
    ends: Counter[str] = Counter()
    async with (
        deployed(tmp_path, "m", weights("stories260K")) as deployment,
        RawClient(deployment.url, "m") as client,
    ):

        async def one(data: bytes) -> None:
            async with gate:
                answer = await client.ask(data)
            ends[answer.code or answer.names[-1]] += 1
            assert answer.code not in (ErrorCode.INTERNAL, ErrorCode.UNAVAILABLE), (data, answer.end)

        async with asyncio.TaskGroup() as group:
            for _ in range(CASES):
                group.create_task(one(request(chance)))
        assert ends.total() == CASES
        assert ends["invalid_request"] > CASES / 3 and ends["finished"] > CASES / 100, ends
        await deployment.until_idle()
        client.check()
        answer = await client.ask(dict(prompt="Once", max_tokens=3))
        assert answer.names[-1] == "finished"
