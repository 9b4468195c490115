"""The in-memory bus does what its faults say, and only that; and the same each time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from shared.bus import BucketSpec, BusTimeout, Stored, StreamSpec
from shared.memory_bus import Faults, MemoryBroker, MemoryBus
from shared.virtual_time import VirtualTimeLoop
from tests.protocol.test_bus_contract import collect

COUNT = 2000


def run(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main())


def received(seed: int, faults: Faults) -> list[int]:
    """What a subscriber gets of COUNT messages, one a millisecond."""

    async def main() -> list[int]:
        broker = MemoryBroker(seed, faults)
        sender, receiver = MemoryBus(broker), MemoryBus(broker)
        got: list[int] = []
        await receiver.subscribe("x", lambda m: got.append(int(m.data)))
        for i in range(COUNT):
            sender.publish("x", b"%d" % i)
            await asyncio.sleep(0.001)
        await asyncio.sleep(10)
        return got

    got: list[int] = run(main)
    return got


def test_core_messages_are_dropped_doubled_and_overtaken() -> None:
    assert received(1, Faults(latency=0.01)) == list(range(COUNT))
    dropped = received(1, Faults(drop=0.1))
    assert dropped == sorted(set(dropped))
    assert COUNT * 0.85 < len(dropped) < COUNT * 0.95
    doubled = received(1, Faults(duplicate=0.1))
    assert set(doubled) == set(range(COUNT))
    assert COUNT * 1.05 < len(doubled) < COUNT * 1.15
    late = received(1, Faults(delay=0.1, max_delay=0.05))
    assert late != sorted(late)
    assert sorted(late) == list(range(COUNT))
    everything = Faults(drop=0.1, duplicate=0.1, delay=0.1)
    assert received(1, everything) == received(1, everything) != received(2, everything)


@pytest.mark.parametrize(("fault", "stored"), [("lose_append", 0), ("lose_ack", 1), ("late_append", 1)])
def test_appends_of_unknown_outcome(fault: str, stored: int) -> None:
    async def main() -> None:
        broker = MemoryBroker(0, Faults(**{fault: 1.0}, max_delay=5.0))
        broker.ensure_stream(StreamSpec("S", "s.*"))
        bus = MemoryBus(broker)
        begin = asyncio.get_running_loop().time()
        with pytest.raises(BusTimeout):
            await bus.append("s.1", b"", timeout=2.0)
        assert asyncio.get_running_loop().time() - begin == pytest.approx(2.0)
        assert broker.streams["S"].last_seq == (0 if fault == "late_append" else stored)
        await asyncio.sleep(10)
        assert broker.streams["S"].last_seq == stored

    run(main)


def test_one_client_cut_off() -> None:
    """The others go on; what the cut-off one published is dropped, and it catches up when it is back."""

    async def main() -> None:
        broker = MemoryBroker()
        broker.ensure_stream(StreamSpec("S", "s.*"))
        broker.buckets.clear()
        alone, other = MemoryBus(broker), MemoryBus(broker)
        await other.ensure_bucket(BucketSpec("b"))
        heard: list[bytes] = []
        followed: list[Stored] = []
        seen: dict[str, bytes | None] = {}
        back: list[float] = []
        alone.on_reconnect(lambda: back.append(asyncio.get_running_loop().time()))
        await alone.subscribe("x", lambda m: heard.append(m.data))
        await other.subscribe("y", lambda m: heard.append(m.data))
        task = collect(await alone.follow("S", "s.1", 1), followed)
        await (await alone.bucket("b")).watch(lambda e: seen.update({e.key: e.value}), lambda: None)
        await (await other.bucket("b")).put("gone", b"1")
        await asyncio.sleep(1)
        broker.disconnect(alone)
        alone.publish("y", b"dropped")
        other.publish("x", b"missed")
        await other.append("s.1", b"")
        bucket = await other.bucket("b")
        await bucket.put("new", b"2")
        await bucket.delete("gone")
        await asyncio.sleep(1)
        assert (heard, followed, seen, alone.dropped, alone.connected_for) == ([], [], {"gone": b"1"}, 1, 0.0)
        broker.kill()
        broker.restart()
        await asyncio.sleep(1)
        assert not alone.connected_for and other.connected_for, "a restart does not bring it back"
        broker.reconnect(alone)
        await asyncio.sleep(1)
        other.publish("x", b"heard")
        await asyncio.sleep(1)
        assert heard == [b"heard"]
        assert [m.seq for m in followed] == [1]
        assert seen == {"gone": None, "new": b"2"}
        assert len(back) == 1
        task.cancel()

    run(main)


def test_a_client_that_dies_leaves_its_work_to_others() -> None:
    async def main() -> None:
        broker = MemoryBroker()
        broker.ensure_stream(StreamSpec("S", "s.*"))
        dying, other = MemoryBus(broker), MemoryBus(broker)
        taken: list[int] = []
        done: list[tuple[int, int]] = []

        async def take(delivery: Any) -> None:
            taken.append(delivery.message.seq)

        async def finish(delivery: Any) -> None:
            done.append((delivery.message.seq, delivery.attempt))
            await delivery.ack()

        await dying.consume("S", "d", "s.1", take, limit=2, ack_wait=5.0)
        for _ in range(4):
            await other.append("s.1", b"")
        await asyncio.sleep(0.1)
        dying.abort()
        await other.consume("S", "d", "s.1", finish, limit=10, ack_wait=5.0)
        await asyncio.sleep(1)
        assert (taken, done) == ([1, 2], [(3, 1), (4, 1)])
        await asyncio.sleep(5)
        assert done[2:] == [(1, 2), (2, 2)]

    run(main)
