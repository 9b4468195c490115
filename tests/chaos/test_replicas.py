"""Three servers that keep three copies: any one of them may die, with its disk."""

from __future__ import annotations

import asyncio
import shutil
import signal
from pathlib import Path

import pytest

from tests.chaos.deployment import deployed
from tests.chaos.test_situations import DEMO, FIXED, complaints, loaded, requests

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]

BETWEEN = 10.0  # seconds: a killed leader stalls publishing for up to six, and who comes back has to catch up


async def test_any_server_of_three_may_die_with_its_disk(tmp_path: Path) -> None:
    bodies = requests(4, 200)
    async with (
        deployed(tmp_path, DEMO, FIXED, servers=3) as deployment,
        loaded(deployment, bodies, {"plain": 4, "durable": 1, "attached": 1}) as workload,
    ):
        references = await workload.references(bodies)
        over = asyncio.Event()
        running = asyncio.create_task(workload.keep_running(1, 16, over.is_set))
        await asyncio.sleep(2.0)
        brokers = deployment.supervisor.brokers
        for broker in brokers:
            shutil.rmtree(
                tmp_path / broker.name / "jetstream"
            )  # its files are open: it notices nothing before it is killed
            broker.kill(signal.SIGKILL)
            await asyncio.sleep(BETWEEN)
            await deployment.until_ready()
        over.set()
        await running
        print("longest gaps:", sorted(round(record.longest_gap, 1) for record in workload.records)[-5:])
        assert complaints(workload, references) == {}
        assert [broker.restarts for broker in brokers] == [1, 1, 1]
        assert workload.ended > 16
        deployment.injector.ended = {broker.name: {-1} for broker in brokers}
        assert await deployment.unrest() == []
