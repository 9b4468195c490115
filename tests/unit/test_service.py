"""The life of a stage: in virtual time on the in-memory bus, and as a process of its own on a real server."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, ClassVar

import pytest

from shared import codec, subjects
from shared.broker import Broker, free_port
from shared.bus import Message
from shared.config import StageSettings
from shared.memory_bus import MemoryBroker, MemoryBus
from shared.messages import Heartbeat
from shared.nats_bus import NatsBus
from shared.service import Service
from shared.streams import ensure_streams
from shared.virtual_time import VirtualTimeLoop
from tests.protocol.systems import until


class Toy(Service):
    stage: ClassVar[str] = "toy"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.events: list[str] = []
        self.drain_takes = 0.0
        self.start_fails = False

    async def on_start(self) -> None:
        if self.start_fails:
            raise RuntimeError("on purpose")
        self.events.append("start")

    async def on_drain(self) -> None:
        await asyncio.sleep(self.drain_takes)
        self.events.append("drain")

    async def on_stop(self) -> None:
        self.events.append("stop")

    def heartbeat(self) -> Heartbeat:
        return self.base_heartbeat(load=0.5, in_flight=2, answer=42)


class World:
    def __init__(self, **settings: Any) -> None:
        self.broker = MemoryBroker()
        self.bus, self.listener = MemoryBus(self.broker), MemoryBus(self.broker)
        self.toy = Toy(self.bus, StageSettings(name="t1", **settings))
        self.beats: list[Heartbeat] = []

    async def listen(self) -> None:
        def on_beat(message: Message) -> None:
            self.beats.append(codec.decode_as(Heartbeat, message.data))

        await self.listener.subscribe(subjects.heartbeats("toy"), on_beat)


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(main())


def test_heartbeats_and_ps() -> None:
    async def main() -> None:
        world = World(heartbeat_interval=0.5)
        await world.listen()
        await world.toy.start()
        await asyncio.sleep(5.1)
        assert [b.beat for b in world.beats] == list(range(1, 12))
        beat = world.beats[-1]
        assert (beat.stage, beat.instance, beat.interval, beat.load, beat.in_flight) == (
            "toy",
            world.toy.instance,
            0.5,
            0.5,
            2,
        )
        assert beat.detail == {"answer": 42}
        answer = await world.listener.request(subjects.PS, b"", 1.0)
        assert codec.decode_as(Heartbeat, answer.data).instance == world.toy.instance
        await world.toy.stop()
        count = len(world.beats)
        await asyncio.sleep(5)
        assert len(world.beats) == count
        assert world.toy.events == ["start", "stop"]

    run(main)


def test_drain_is_announced_and_limited() -> None:
    async def main() -> None:
        world = World(drain_timeout=2.0)
        await world.listen()
        await world.toy.start()
        world.toy.drain_takes = 100.0
        begin = asyncio.get_running_loop().time()
        await world.toy.drain()
        await world.toy.drain()
        assert asyncio.get_running_loop().time() - begin == pytest.approx(2.0)
        assert any(beat.draining for beat in world.beats)
        await world.toy.stop()
        assert world.toy.events == ["start", "stop"]

    run(main)


def test_a_task_that_dies_fails_the_stage() -> None:
    async def main() -> None:
        world = World()
        await world.toy.start()
        assert world.toy.failed is not None

        async def dies() -> None:
            await asyncio.sleep(1)
            raise ValueError("on purpose")

        async def returns() -> None:
            await asyncio.sleep(0.5)

        world.toy.spawn(returns(), "returns")
        world.toy.spawn(dies(), "dies")
        with pytest.raises(ValueError, match="on purpose"):
            await asyncio.wait_for(world.toy.failed, 5)
        await world.toy.stop()

    run(main)


def test_a_start_that_fails_can_be_stopped() -> None:
    async def main() -> None:
        world = World()
        world.toy.start_fails = True
        with pytest.raises(RuntimeError):
            await world.toy.start()
        await world.toy.stop()
        assert world.toy.events == ["stop"]

    run(main)


# ---------------------------------------------------------------- as a process

ROOT = Path(__file__).resolve().parents[2]
STAGE = """
import asyncio, sys
from typing import ClassVar
from shared.config import StageSettings
from shared.service import Service, run_stage

class ToySettings(StageSettings):
    stage: ClassVar[str] = "toy"
    die_after: float = 0.0

class Toy(Service):
    stage: ClassVar[str] = "toy"
    async def on_start(self):
        if self.settings.die_after:
            self.spawn(self.die(), "die")
    async def on_drain(self):
        self.log.info("handed_over")
    async def die(self):
        await asyncio.sleep(self.settings.die_after)
        raise ValueError("on purpose")

run_stage(Toy, ToySettings)
"""


class Process:
    """The toy stage as a child process; its log lines are read as they come."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.text = ""
        self._reading = asyncio.get_running_loop().create_task(self._read())

    @classmethod
    async def spawn(cls, url: str, *flags: str) -> Process:
        command = [sys.executable, "-c", STAGE, "--nats-url", url, "--log-format", "json", *flags]
        return cls(await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE, cwd=ROOT))

    async def _read(self) -> None:
        assert self.process.stderr is not None
        while line := await self.process.stderr.readline():
            self.text += line.decode()

    async def exit_status(self) -> int:
        try:
            status = await asyncio.wait_for(self.process.wait(), 20)
        except TimeoutError:
            self.process.kill()
            raise
        await self._reading
        return status


@pytest.mark.timeout(90)
async def test_a_stage_waits_for_nats_and_drains_at_sigterm(tmp_path: Path) -> None:
    server = Broker(tmp_path, free_port())
    stage = await Process.spawn(server.url)
    try:
        await until(lambda: "waiting_for_nats" in stage.text, 20)
        await server.start()
        await until(lambda: '"ready"' in stage.text, 20)
        bus = await NatsBus.connect(StageSettings(nats_url=server.url))
        answer = await bus.request(subjects.PS, b"", 2.0)
        assert codec.decode_as(Heartbeat, answer.data).stage == "toy"
        await bus.close()
        stage.process.send_signal(signal.SIGTERM)
        assert await stage.exit_status() == 0, stage.text
        assert [e in stage.text for e in ("draining", "handed_over", "stopped")] == [True] * 3
    finally:
        if stage.process.returncode is None:
            stage.process.kill()
        await server.kill()


@pytest.mark.timeout(90)
async def test_a_stage_that_cannot_go_on_ends_with_a_status(nats_server: Broker) -> None:
    bus = await NatsBus.connect(StageSettings(nats_url=nats_server.url))
    await ensure_streams(bus, StageSettings(partitions=4))
    await bus.close()
    dying = await Process.spawn(nats_server.url, "--partitions", "4", "--die-after", "0.05")
    refused = await Process.spawn(nats_server.url, "--partitions", "8")
    assert await dying.exit_status() == 1
    assert "on purpose" in dying.text and "task_died" in dying.text
    assert await refused.exit_status() == 1
    assert "cannot_start" in refused.text and "partitions=4, but partitions=8" in refused.text
    assert "Traceback" not in refused.text
