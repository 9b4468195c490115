"""The two systems that every test of the Bus's contract runs on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import pytest

from shared.broker import Broker
from shared.bus import Bus, BusTimeout
from shared.config import StageSettings
from shared.memory_bus import MemoryBroker, MemoryBucket, MemoryBus
from shared.nats_bus import NatsBus


def lose_first_attempts(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """From now on the in-memory bus loses what is first asked of JetStream about anything; returns, as they come, what was lost."""
    lost: set[str] = set()
    for cls, name in ((MemoryBus, "bucket"), (MemoryBus, "consume"), (MemoryBus, "follow"), (MemoryBucket, "watch")):
        monkeypatch.setattr(cls, name, _losing(getattr(cls, name), name, lost))
    return lost


def _losing(method: Callable[..., Awaitable[Any]], name: str, lost: set[str]) -> Callable[..., Awaitable[Any]]:
    async def attempt(self: Any, *args: Any, **options: Any) -> Any:
        what = " ".join([name, *(arg for arg in args if isinstance(arg, str))])
        if what not in lost:
            lost.add(what)
            raise BusTimeout(what)
        return await method(self, *args, **options)

    return attempt


class System(Protocol):
    async def connect(self) -> Bus: ...
    async def kill(self) -> None: ...
    async def restart(self) -> None: ...
    async def close(self) -> None: ...


class MemorySystem:
    def __init__(self) -> None:
        self.broker = MemoryBroker(seed=7)
        self.buses: list[MemoryBus] = []

    async def connect(self) -> MemoryBus:
        self.buses.append(MemoryBus(self.broker))
        return self.buses[-1]

    async def kill(self) -> None:
        self.broker.kill()

    async def restart(self) -> None:
        self.broker.restart()

    async def close(self) -> None:
        for bus in self.buses:
            await bus.close()


class NatsSystem:
    def __init__(self, server: Broker) -> None:
        self.server = server
        self.buses: list[NatsBus] = []

    async def connect(self) -> NatsBus:
        self.buses.append(await NatsBus.connect(StageSettings(nats_url=self.server.url)))
        return self.buses[-1]

    async def kill(self) -> None:
        await self.server.kill()

    async def restart(self) -> None:
        await self.server.start()

    async def close(self) -> None:
        for bus in self.buses:
            await bus.close()


async def until(condition: Callable[[], object], timeout: float = 10.0) -> None:
    """Waits for a condition; fails after `timeout` seconds."""
    try:
        async with asyncio.timeout(timeout):
            while not condition():  # noqa: ASYNC110 - the condition is anything
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise AssertionError(f"did not come true in {timeout:g} s") from None


async def until_equal(ask: Callable[[], Awaitable[object]], wanted: object, timeout: float = 10.0) -> None:
    """Asks again and again until the answer is the wanted one."""
    async with asyncio.timeout(timeout):
        while await ask() != wanted:  # noqa: ASYNC110 - the answer is somebody else's
            await asyncio.sleep(0.01)
