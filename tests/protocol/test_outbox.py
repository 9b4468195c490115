"""The outbox stores everything, whatever is lost, in virtual time and with seeded faults."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar

import pytest

from shared.bus import HEADROOM, MAX_PAYLOAD, PayloadTooLarge, StreamSpec
from shared.config import StageSettings
from shared.memory_bus import Faults, MemoryBroker, MemoryBus
from shared.outbox import WINDOW, Outbox
from shared.service import Service
from shared.virtual_time import VirtualTimeLoop


class Stage(Service):
    stage: ClassVar[str] = "test"


class World:
    """A broker with a stream, a stage and its outbox."""

    def __init__(self, seed: int = 0, faults: Faults | None = None, limit: int = 100, max_bytes: int = 0) -> None:
        self.broker = MemoryBroker(seed, faults)
        self.bus = MemoryBus(self.broker)
        self.broker.ensure_stream(StreamSpec("S", "s.*", max_bytes=max_bytes))
        self.stage = Stage(self.bus, StageSettings())
        self.full: list[bool] = []
        self.storage: list[bool] = []
        self.outbox = Outbox(self.bus, limit=limit, on_full=self.full.append, on_storage_full=self.storage.append)

    async def start(self) -> None:
        await self.stage.start()
        self.outbox.start(self.stage)

    def stored(self, subject: str) -> list[bytes]:
        return [m.data for m in self.broker.streams["S"].messages.values() if m.subject == subject]


def run(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main())


def test_stored_in_order_without_faults() -> None:
    async def main() -> None:
        world = World()
        acked: list[int] = []
        for i in range(3):
            world.outbox.put("s.1", b"%d" % i, lambda i=i: acked.append(i))  # type: ignore[misc]
        assert len(world.outbox) == 3 and not world.stored("s.1")
        await world.start()
        for i in range(3, 50):
            world.outbox.put("s.1", b"%d" % i, lambda i=i: acked.append(i))  # type: ignore[misc]
        await world.outbox.flush()
        assert world.stored("s.1") == [b"%d" % i for i in range(50)]
        assert acked == list(range(50))
        assert len(world.outbox) == 0 and not world.outbox.retries
        await world.stage.stop()

    run(main)


def storm(seed: int) -> tuple[list[bytes], list[bytes], int, float]:
    """300 messages to each of two subjects through losses, late arrivals and two kills of the broker."""

    async def main() -> tuple[list[bytes], list[bytes], int, float]:
        faults = Faults(lose_append=0.1, late_append=0.05, lose_ack=0.1, latency=0.001)
        world = World(seed, faults)
        await world.start()
        acked: dict[str, list[int]] = {"s.1": [], "s.2": []}
        for i in range(300):
            for subject, seen in acked.items():

                def done(i: int = i, subject: str = subject, seen: list[int] = seen) -> None:
                    # Whoever is told so may rely on it: this message and all before it are stored.
                    assert {b"%d" % k for k in range(i + 1)} <= set(world.stored(subject))
                    seen.append(i)

                world.outbox.put(subject, b"%d" % i, done)
            if i in (100, 200):
                world.broker.kill()
                asyncio.get_running_loop().call_later(1.0, world.broker.restart)
            await asyncio.sleep(0.01)
        await world.outbox.flush()
        for seen in acked.values():
            assert seen == list(range(300)), "every callback once, and in order"
        await world.stage.stop()
        return world.stored("s.1"), world.stored("s.2"), world.outbox.retries, asyncio.get_running_loop().time()

    result: tuple[list[bytes], list[bytes], int, float] = run(main)
    return result


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_lost_in_a_storm(seed: int) -> None:
    first, second, retries, _ = storm(seed)
    assert {int(d) for d in first} == {int(d) for d in second} == set(range(300))
    assert retries > 50
    assert len(first) > 300, "the faults did store some message twice"


def test_a_storm_repeats_exactly() -> None:
    assert storm(3) == storm(3)
    assert storm(3) != storm(4)


def test_at_most_a_window_is_under_way() -> None:
    async def main() -> None:
        world = World(faults=Faults(lose_append=1.0))
        await world.start()
        for i in range(50):
            world.outbox.put("s.1", b"%d" % i)
        sent: list[bytes] = []
        append = world.bus.append

        async def spy(subject: str, data: bytes, **options: Any) -> Any:
            sent.append(data)
            return await append(subject, data, **options)

        world.bus.append = spy  # type: ignore[method-assign]
        await asyncio.sleep(10)
        assert set(sent) == {b"%d" % i for i in range(WINDOW)}
        world.broker.faults.lose_append = 0.0
        await world.outbox.flush()
        assert {int(d) for d in world.stored("s.1")} == set(range(50))
        await world.stage.stop()

    run(main)


def test_asks_for_a_pause_when_full() -> None:
    async def main() -> None:
        world = World(limit=20)
        await world.start()
        world.broker.kill()
        for i in range(19):
            world.outbox.put("s.1", b"%d" % i)
        assert world.full == []
        world.outbox.put("s.1", b"19")
        world.outbox.put("s.1", b"20")
        assert world.full == [True] and world.outbox.full and len(world.outbox) == 21
        world.broker.restart()
        await world.outbox.flush()
        assert world.full == [True, False] and not world.outbox.full
        assert len(world.stored("s.1")) == 21
        await world.stage.stop()

    run(main)


def test_a_full_disk_is_reported_and_outlasted() -> None:
    async def main() -> None:
        world = World()
        await world.start()
        world.broker.disk_full = True
        world.outbox.put("s.1", b"a")
        world.outbox.put("s.2", b"b")
        await asyncio.sleep(30)
        assert world.storage == [True] and world.outbox.storage_full and len(world.outbox) == 2
        assert world.outbox.retries < 100, "ever more slowly"
        world.broker.disk_full = False
        await world.outbox.flush()
        assert world.storage == [True, False]
        assert world.stored("s.1") == [b"a"] and world.stored("s.2") == [b"b"]
        await world.stage.stop()

    run(main)


def test_what_can_never_be_stored_fails_the_stage() -> None:
    async def main() -> None:
        world = World()
        await world.start()
        world.outbox.put("s.1", bytes(MAX_PAYLOAD - HEADROOM + 1))
        assert world.stage.failed is not None
        with pytest.raises(PayloadTooLarge):
            await asyncio.wait_for(world.stage.failed, 5)
        await world.stage.stop()

    run(main)


def test_ids_keep_what_was_stored_from_being_stored_again() -> None:
    async def main() -> None:
        world = World(seed=1, faults=Faults(lose_ack=0.5))
        await world.start()
        for i in range(50):
            world.outbox.put("s.1", b"%d" % i, msg_id=f"id-{i}")
        await world.outbox.flush()
        assert sorted(int(d) for d in world.stored("s.1")) == list(range(50))
        assert world.outbox.retries > 10
        await world.stage.stop()

    run(main)
