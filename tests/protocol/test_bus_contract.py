"""What services may rely on, on both implementations of the Bus alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from shared import subjects
from shared.broker import Broker
from shared.bus import (
    APPEND_TIMEOUT,
    HEADROOM,
    MAX_PAYLOAD,
    Appended,
    BucketSpec,
    Bus,
    BusError,
    BusTimeout,
    Delivery,
    Entry,
    Follower,
    IncompatibleStream,
    Message,
    NoResponders,
    PayloadTooLarge,
    StorageFull,
    Stored,
    StreamSpec,
    WrongRevision,
)
from shared.config import StageSettings
from shared.streams import ensure_streams
from tests.protocol.systems import MemorySystem, NatsSystem, System, until, until_equal

pytestmark = pytest.mark.timeout(60)


@pytest_asyncio.fixture(params=["memory", "nats"])
async def system(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[System]:
    if request.param == "memory":
        memory = MemorySystem()
        yield memory
        await memory.close()
        return
    server = Broker(tmp_path / "nats")
    await server.start()
    system = NatsSystem(server)
    yield system
    await system.close()
    await server.kill()


@pytest_asyncio.fixture
async def bus(system: System) -> Bus:
    bus = await system.connect()
    await bus.ensure_stream(StreamSpec("S", "s.>"))
    await bus.ensure_bucket(BucketSpec("b"))
    return bus


def collect(follower: Follower, into: list[Stored]) -> asyncio.Task[None]:
    async def run() -> None:
        async for message in follower:
            into.append(message)

    return asyncio.get_running_loop().create_task(run())


def acker(into: list[Delivery]) -> Callable[[Delivery], Awaitable[None]]:
    async def handle(delivery: Delivery) -> None:
        into.append(delivery)
        await delivery.ack()

    return handle


def keeper(into: list[Delivery]) -> Callable[[Delivery], Awaitable[None]]:
    async def handle(delivery: Delivery) -> None:
        into.append(delivery)

    return handle


async def settle(bus: Bus) -> None:
    """A round trip, and time for what came with it to be handled."""
    with pytest.raises(NoResponders):
        await bus.request("nobody.is.there", b"", 2.0)
    await asyncio.sleep(0.02)


# ---------------------------------------------------------------- core


async def test_messages_arrive_in_order_at_every_subscriber_that_matches(system: System, bus: Bus) -> None:
    other = await system.connect()
    exact: list[bytes] = []
    star: list[bytes] = []
    rest: list[bytes] = []
    await other.subscribe("a.b", lambda m: exact.append(m.data))
    await other.subscribe("a.*", lambda m: star.append(m.data))
    subscription = await bus.subscribe("a.>", lambda m: rest.append(m.data))
    await settle(other)
    for i in range(200):
        bus.publish("a.b", b"%d" % i)
    bus.publish("a.b.c", b"deep")
    await until(lambda: len(exact) == len(star) == 200 and len(rest) == 201)
    assert exact == star == rest[:200] == [b"%d" % i for i in range(200)]
    await subscription.unsubscribe()
    bus.publish("a.b", b"after")
    await until(lambda: exact[-1] == b"after")
    assert rest[-1] == b"deep"


async def test_one_of_a_queue_group_gets_each_message(system: System, bus: Bus) -> None:
    got: list[tuple[int, bytes]] = []
    for member in range(3):
        peer = await system.connect()
        await peer.subscribe("work", lambda m, member=member: got.append((member, m.data)), "group")  # type: ignore[misc]
        await settle(peer)
    for i in range(300):
        bus.publish("work", b"%d" % i)
    await until(lambda: len(got) == 300)
    await settle(bus)
    assert sorted(int(data) for _, data in got) == list(range(300))
    assert {member for member, _ in got} == {0, 1, 2}


async def test_request(system: System, bus: Bus) -> None:
    other = await system.connect()
    await other.subscribe("echo", lambda m: other.publish(m.reply, m.data.upper()))
    await other.subscribe("silent", lambda m: None)
    await settle(other)
    answers = await asyncio.gather(*(bus.request("echo", b"q%d" % i, 2.0) for i in range(20)))
    assert [a.data for a in answers] == [b"Q%d" % i for i in range(20)]
    with pytest.raises(NoResponders):
        await bus.request("nobody", b"", 2.0)
    with pytest.raises(BusTimeout):
        await bus.request("silent", b"", 0.1)


async def test_a_handler_that_raises_does_not_end_its_subscription(bus: Bus) -> None:
    got: list[bytes] = []

    def handle(message: Message) -> None:
        got.append(message.data)
        if message.data == b"bad":
            raise ValueError("on purpose")

    await bus.subscribe("x", handle)
    await settle(bus)
    for data in (b"1", b"bad", b"2"):
        bus.publish("x", data)
    await until(lambda: got == [b"1", b"bad", b"2"])


async def test_payload_limit(bus: Bus) -> None:
    largest = bytes(MAX_PAYLOAD - HEADROOM)
    assert (await bus.append("s.large", largest, msg_id="m" * 100)).seq == 1
    with pytest.raises(PayloadTooLarge):
        await bus.append("s.large", largest + b"x")
    with pytest.raises(PayloadTooLarge):
        bus.publish("x", largest + b"x")
    with pytest.raises(PayloadTooLarge):
        await bus.request("x", largest + b"x", 1.0)
    with pytest.raises(PayloadTooLarge):
        await (await bus.bucket("b")).put("k", largest + b"x")
    assert await bus.last_seq("S", "s.large") == 1


# ---------------------------------------------------------------- streams


async def test_append_read_last_and_trim(bus: Bus) -> None:
    assert await bus.last_seq("S", "s.1") == 0
    seqs = [(await bus.append(f"s.{i % 2}", b"%d" % i)).seq for i in range(10)]
    assert seqs == list(range(1, 11))
    stored = await bus.read("S", 4)
    assert stored is not None
    assert (stored.seq, stored.subject, stored.data) == (4, "s.1", b"3")
    first, last = await bus.read("S", 1), await bus.read("S", 10)
    assert first is not None and last is not None and 0 <= last.stamp - first.stamp < 5
    assert await bus.last_seq("S", "s.0") == 9
    await bus.trim("S", 9)
    assert await bus.read("S", 8) is None
    assert await bus.read("S", 9) is not None
    assert await bus.read("S", 11) is None
    assert await bus.last_seq("S", "s.0") == 9
    await bus.trim("S", 11)
    assert await bus.last_seq("S", "s.0") == 0
    assert (await bus.append("s.0", b"")).seq == 11
    with pytest.raises(BusError):
        await bus.append("no.stream", b"")
    with pytest.raises(BusError):
        await bus.read("NO_STREAM", 1)


async def test_append_soon_says_later_what_came_of_it(system: System, bus: Bus) -> None:
    await bus.ensure_stream(StreamSpec("F", "f", max_bytes=2000))
    told: list[Appended | BusError] = []
    for data in (b"0", b"1", b"2"):
        assert bus.append_soon("s.a", data, told.append)
    assert told == [], "not from within the call"
    await until(lambda: len(told) == 3)
    assert [outcome.seq for outcome in told if isinstance(outcome, Appended)] == [1, 2, 3]
    assert [stored.data for seq in (1, 2, 3) if (stored := await bus.read("S", seq))] == [b"0", b"1", b"2"]
    for _ in range(2):
        assert bus.append_soon("s.b", b"once", told.append, msg_id="id")
    assert bus.append_soon("f", bytes(3000), told.append)
    assert bus.append_soon("nowhere", b"", told.append)
    await until(lambda: len(told) == 7)
    assert sorted(o.duplicate for o in told[3:] if isinstance(o, Appended)) == [False, True]
    refused = [outcome for outcome in told if isinstance(outcome, BusError)]
    assert len(refused) == 2 and sum(isinstance(error, StorageFull) for error in refused) == 1
    assert not bus.append_soon("s.a", bytes(MAX_PAYLOAD), told.append), "append says why"
    assert bus.append_soon("s.a", b"last", told.append)
    await system.kill()
    await until(lambda: len(told) == 8, timeout=APPEND_TIMEOUT - 0.5)
    await until(lambda: not bus.connected_for)
    assert not bus.append_soon("s.a", b"", told.append), "append waits"


async def test_duplicates_and_expected_sequence(bus: Bus) -> None:
    assert await bus.append("s.1", b"a", msg_id="one") == (1, False)
    assert await bus.append("s.1", b"a", msg_id="one") == (1, True)
    assert await bus.append("s.2", b"b", expected_last_subject_seq=0) == (2, False)
    with pytest.raises(WrongRevision):
        await bus.append("s.2", b"c", expected_last_subject_seq=0)
    with pytest.raises(WrongRevision):
        await bus.append("s.2", b"c", expected_last_subject_seq=1)
    assert await bus.append("s.2", b"c", expected_last_subject_seq=2) == (3, False)


async def test_a_full_stream_refuses_and_keeps_what_it_has(bus: Bus) -> None:
    await bus.ensure_stream(StreamSpec("SMALL", "small.*", max_bytes=3000))
    stored = 0
    with pytest.raises(StorageFull):
        while True:
            await bus.append("small.1", bytes(500))
            stored += 1
    assert stored > 0
    assert await bus.read("SMALL", 1) is not None
    await bus.trim("SMALL", 3)
    await bus.append("small.1", bytes(500))


async def test_trimming_one_subject_below_what_is_acked(bus: Bus) -> None:
    for i in range(6):
        await bus.append(f"s.{i % 2}", b"%d" % i)
    assert await bus.acked_below("S", "nobody") == 1
    taken: list[Delivery] = []

    async def take(delivery: Delivery) -> None:
        taken.append(delivery)

    await bus.consume("S", "durable", "s.1", take, limit=10, ack_wait=30)
    await until(lambda: len(taken) == 3)
    assert await bus.acked_below("S", "durable") <= 2
    first, second, third = sorted(taken, key=lambda delivery: delivery.message.seq)
    await third.ack()
    await first.ack()

    async def all_acked_below(seq: int) -> bool:
        return await bus.acked_below("S", "durable") > seq

    await until_equal(lambda: all_acked_below(first.message.seq), True)
    assert await bus.acked_below("S", "durable") <= second.message.seq
    await second.ack()
    await until_equal(lambda: all_acked_below(third.message.seq), True)
    await bus.trim("S", 5, "s.1")
    assert [await bus.read("S", seq) is not None for seq in range(1, 7)] == [True, False, True, False, True, True]


async def test_messages_grow_too_old(bus: Bus) -> None:
    await bus.ensure_stream(StreamSpec("OLD", "old.*", max_age=0.5))
    await bus.append("old.1", b"")
    assert await bus.last_seq("OLD", "old.1") == 1
    await until_equal(lambda: bus.last_seq("OLD", "old.1"), 0)


async def test_ensure_streams_is_idempotent_and_guards_the_partitions(system: System, bus: Bus) -> None:
    settings = StageSettings(partitions=4)
    await asyncio.gather(ensure_streams(bus, settings), ensure_streams(await system.connect(), settings))
    await ensure_streams(bus, StageSettings(partitions=4, results_max_age=5))
    for subject in (subjects.tok("m", 3), subjects.req("m", 0), subjects.jobs("m"), subjects.results("t.1")):
        assert (await bus.append(subject, b"")).seq == 1
    with pytest.raises(IncompatibleStream, match="partitions=4"):
        await ensure_streams(bus, StageSettings(partitions=8))


async def test_follow_reads_one_subject_from_a_sequence_on(bus: Bus) -> None:
    for i in range(6):
        await bus.append(f"s.{i % 2}", b"%d" % i)
    got: list[Stored] = []
    follower = await bus.follow("S", "s.1", 3)
    task = collect(follower, got)
    await until(lambda: len(got) == 2)
    assert [(m.seq, m.subject, m.data, m.pending) for m in got] == [(4, "s.1", b"3", 1), (6, "s.1", b"5", 0)]
    await bus.append("s.0", b"not followed")
    await bus.append("s.1", b"live")
    await until(lambda: len(got) == 3)
    assert (got[2].seq, got[2].data) == (8, b"live")
    await follower.close()
    await asyncio.wait_for(task, 2)


async def test_follow_a_long_log(system: System, bus: Bus) -> None:
    """More than any batch, while it still grows, and by a reader that begins before what was trimmed."""
    await asyncio.gather(*(bus.append("s.1", b"%d" % i) for i in range(2000)))
    await bus.trim("S", 11)
    got: list[Stored] = []
    collect(await (await system.connect()).follow("S", "s.1", 1), got)
    await asyncio.gather(*(bus.append("s.1", b"%d" % i) for i in range(500)))
    await until(lambda: len(got) == 2490)
    assert [m.seq for m in got] == list(range(11, 2501))


async def test_close_ends_everything_that_reads(system: System, bus: Bus) -> None:
    other = await system.connect()
    got: list[Stored] = []
    task = collect(await other.follow("S", "s.1", 1), got)
    await asyncio.sleep(0)
    await other.close()
    await asyncio.wait_for(task, 2)


# ---------------------------------------------------------------- durable consumers


async def test_members_share_a_durable_consumer(system: System, bus: Bus) -> None:
    first: list[Delivery] = []
    second: list[Delivery] = []
    other = await system.connect()
    assert await bus.backlog("S", "d") == 0
    await bus.consume("S", "d", "s.1", acker(first), limit=10, ack_wait=5.0)
    await other.consume("S", "d", "s.1", acker(second), limit=10, ack_wait=5.0)
    for i in range(200):
        await bus.append(f"s.{i % 2}", b"%d" % i)
    await until(lambda: len(first) + len(second) == 100)
    await asyncio.sleep(0.05)
    assert sorted(d.message.seq for d in first + second) == list(range(2, 201, 2))
    assert first and second
    assert {d.attempt for d in first + second} == {1}


async def test_what_is_not_acked_comes_again(bus: Bus) -> None:
    attempts: dict[int, list[int]] = {1: [], 2: [], 3: []}
    loop = asyncio.get_running_loop()
    times: list[float] = []

    async def handle(delivery: Delivery) -> None:
        attempts[delivery.message.seq].append(delivery.attempt)
        match delivery.message.seq, delivery.attempt:
            case 1, 1:
                times.append(loop.time())
                raise ValueError("on purpose")
            case 1, _:
                times.append(loop.time())
            case 2, 1:
                await delivery.nak(delay=0.05)
                return
            case 3, _:
                while len(times) < 2:  # that is for longer than ack_wait
                    await delivery.in_progress()
                    await asyncio.sleep(0.1)
        await delivery.ack()

    for _ in range(3):
        await bus.append("s.1", b"")
    await bus.consume("S", "d", "s.*", handle, limit=10, ack_wait=1.5)
    await until(lambda: len(attempts[2]) == 2)
    assert len(attempts[1]) == 1
    await until(lambda: len(attempts[1]) == 2)
    await asyncio.sleep(0.2)
    assert attempts == {1: [1, 2], 2: [1, 2], 3: [1]}
    assert times[1] - times[0] > 1.4


async def test_limit_and_backlog(bus: Bus) -> None:
    got: list[Delivery] = []
    consumer = await bus.consume("S", "d", "s.*", keeper(got), limit=2, ack_wait=30.0)
    for _ in range(10):
        await bus.append("s.1", b"")
    await until(lambda: len(got) == 2)
    await asyncio.sleep(0.05)
    assert len(got) == 2
    assert await bus.backlog("S", "d") == 8
    await got[0].ack()
    await until(lambda: len(got) == 3)
    consumer.set_limit(5)
    await until(lambda: len(got) == 6)  # five open, one acked
    consumer.set_limit(0)
    for delivery in got[1:]:
        await delivery.ack()
    await asyncio.sleep(0.05)
    assert (len(got), await bus.backlog("S", "d")) == (6, 4)
    consumer.set_limit(100)
    await until(lambda: len(got) == 10)
    assert [(d.message.seq, d.attempt) for d in got] == [(seq, 1) for seq in range(1, 11)]


async def test_a_paused_member_leaves_new_messages_to_the_others(system: System, bus: Bus) -> None:
    """Pausing takes back what the member had asked the server for."""
    mine: list[Delivery] = []
    others: list[Delivery] = []
    paused = await bus.consume("S", "d", "s.*", acker(mine), limit=100, ack_wait=30.0)
    await settle(bus)
    paused.set_limit(0)
    await asyncio.sleep(0.1)
    for _ in range(20):
        await bus.append("s.1", b"")
    await asyncio.sleep(0.05)
    assert (len(mine), await bus.backlog("S", "d")) == (0, 20)
    await (await system.connect()).consume("S", "d", "s.*", acker(others), limit=3, ack_wait=30.0)
    await until(lambda: len(others) == 20)
    assert {d.attempt for d in others} == {1} and not mine


async def test_a_stopped_member_takes_nothing_but_may_still_ack(bus: Bus) -> None:
    got: list[Delivery] = []
    consumer = await bus.consume("S", "d", "s.*", keeper(got), limit=1, ack_wait=30.0)
    for _ in range(2):
        await bus.append("s.1", b"")
    await until(lambda: len(got) == 1)
    await consumer.stop()
    await got[0].ack()
    await asyncio.sleep(0.1)
    assert len(got) == 1
    rest: list[Delivery] = []
    await bus.consume("S", "d", "s.*", acker(rest), limit=10, ack_wait=30.0)
    await until(lambda: len(rest) == 1)
    assert rest[0].message.seq == 2


async def test_a_work_queue_forgets_what_is_acked(bus: Bus) -> None:
    await bus.ensure_stream(StreamSpec("W", "w.*", work_queue=True))
    got: list[Delivery] = []
    await bus.consume("W", "d", "w.*", acker(got), limit=10, ack_wait=5.0)
    await bus.append("w.1", b"")
    await until(lambda: len(got) == 1)
    await until_equal(lambda: bus.read("W", 1), None)


# ---------------------------------------------------------------- key-value


async def test_compare_and_swap(bus: Bus) -> None:
    bucket = await bus.bucket("b")
    assert await bucket.get("k.1") is None
    first = await bucket.create("k.1", b"a")
    with pytest.raises(WrongRevision):
        await bucket.create("k.1", b"b")
    second = await bucket.update("k.1", b"b", first)
    with pytest.raises(WrongRevision):
        await bucket.update("k.1", b"c", first)
    with pytest.raises(WrongRevision):
        await bucket.update("k.2", b"c", second)
    assert await bucket.get("k.1") == Entry("k.1", b"b", second)
    third = await bucket.put("k.1", b"c")
    assert third > second > first
    await bucket.delete("k.1")
    assert await bucket.get("k.1") is None
    with pytest.raises(WrongRevision):
        await bucket.update("k.1", b"d", third)
    again = await bucket.create("k.1", b"e")
    assert again > third
    await bucket.put("k.2", b"f")
    assert sorted(await bucket.entries()) == [Entry("k.1", b"e", again), Entry("k.2", b"f", again + 1)]
    with pytest.raises(BusError):
        await bus.bucket("unknown")


async def test_one_of_many_wins_the_creation(system: System, bus: Bus) -> None:
    buckets = [await (await system.connect()).bucket("b") for _ in range(4)]
    results = await asyncio.gather(*(b.create("k", b"%d" % i) for i, b in enumerate(buckets)), return_exceptions=True)
    assert sum(isinstance(r, int) for r in results) == 1
    assert sum(isinstance(r, WrongRevision) for r in results) == 3


async def test_keys_expire_and_watches_hear_of_it(system: System, bus: Bus) -> None:
    bucket = await bus.bucket("b")
    events: list[Entry] = []
    await (await (await system.connect()).bucket("b")).watch(events.append, lambda: None)
    await bucket.put("short", b"1", ttl=1.0)
    await bucket.put("renewed", b"1", ttl=1.0)
    swapped = await bucket.put("swapped", b"1")
    await bucket.update("swapped", b"2", swapped, ttl=1.0)
    await bucket.put("renewed", b"2")
    await until(lambda: sorted(e.key for e in events if e.value is None) == ["short", "swapped"])
    assert await bucket.get("short") is None and await bucket.get("swapped") is None
    assert [e.key for e in await bucket.entries()] == ["renewed"]


async def test_watch(system: System, bus: Bus) -> None:
    bucket = await bus.bucket("b")
    revision = await bucket.put("old", b"1")
    await bucket.put("gone", b"1")
    await bucket.delete("gone")
    events: list[Any] = []
    other = await (await system.connect()).bucket("b")
    watch = await other.watch(events.append, lambda: events.append("ready"))
    await until(lambda: "ready" in events)
    assert events == [Entry("old", b"1", revision), "ready"]
    new = await bucket.create("new", b"2")
    await bucket.delete("old")
    await until(lambda: len(events) == 4)
    assert events[2] == Entry("new", b"2", new)
    assert (events[3].key, events[3].value) == ("old", None)
    await watch.unsubscribe()
    await bucket.put("new", b"3")
    await asyncio.sleep(0.05)
    assert len(events) == 4


async def test_watch_of_an_empty_bucket_is_ready(bus: Bus) -> None:
    ready = asyncio.Event()
    await (await bus.bucket("b")).watch(lambda entry: None, ready.set)
    await asyncio.wait_for(ready.wait(), 2)


# ---------------------------------------------------------------- outages


async def append_until_stored(bus: Bus, subject: str, data: bytes) -> None:
    while True:
        try:
            await bus.append(subject, data, msg_id=data.decode())
            return
        except BusTimeout:
            await asyncio.sleep(0.01)


async def test_everything_goes_on_after_a_kill(system: System, bus: Bus) -> None:
    """kill -9 and a restart on the same disk, three times: nothing is lost, and a follower sees nothing twice."""
    reader = await system.connect()
    followed: list[Stored] = []
    delivered: list[Delivery] = []
    values: dict[str, bytes | None] = {}
    heard: list[bytes] = []
    reconnects: list[float] = []
    reader.on_reconnect(lambda: reconnects.append(reader.connected_for))
    collect(await reader.follow("S", "s.1", 1), followed)
    await reader.consume("S", "d", "s.1", acker(delivered), limit=4, ack_wait=1.0)
    await (await reader.bucket("b")).watch(lambda e: values.update({e.key: e.value}), lambda: None)
    await reader.subscribe("x", lambda m: heard.append(m.data))
    stop = False
    count = 0

    async def append_forever() -> None:
        nonlocal count
        while not stop:
            await append_until_stored(bus, "s.1", b"%d" % count)
            count += 1
            await asyncio.sleep(0.001)

    appending = asyncio.get_running_loop().create_task(append_forever())
    bucket = await bus.bucket("b")
    for life in range(3):
        await until(lambda life=life: len(followed) >= 50 * (life + 1))  # type: ignore[misc]
        await bucket.put(f"k{life}", b"before")
        await system.kill()
        await until(lambda: bus.connected_for == 0 == reader.connected_for)
        bus.publish("x", b"lost")
        before = len(followed)
        await system.restart()
        await until(lambda before=before: len(followed) > before + 5, 5)  # type: ignore[misc]
        await bucket.put(f"k{life}", b"after")
        await until(lambda life=life: values.get(f"k{life}") == b"after", 5)  # type: ignore[misc]
        assert len(reconnects) == life + 1
    stop = True
    await appending
    await until(lambda: len(followed) >= count)
    await until(lambda: {int(d.message.data) for d in delivered} == set(range(count)))
    assert [m.seq for m in followed] == list(range(1, len(followed) + 1))
    assert sorted({int(m.data) for m in followed}) == list(range(count))
    async with asyncio.timeout(5):
        while not heard:
            bus.publish("x", b"heard")
            await asyncio.sleep(0.01)
    assert set(heard) == {b"heard"}


async def test_what_vanished_during_an_outage_is_told(system: System, bus: Bus) -> None:
    bucket = await bus.bucket("b")
    await bucket.put("short", b"1", ttl=1.0)
    await bucket.put("long", b"1")
    events: list[Entry] = []
    await bucket.watch(events.append, lambda: None)
    await until(lambda: len(events) == 2)
    await system.kill()
    await asyncio.sleep(1.2)
    await system.restart()
    await until(lambda: len(events) == 3)
    assert (events[2].key, events[2].value) == ("short", None)


async def test_without_a_connection(system: System, bus: Bus) -> None:
    await until(lambda: bus.connected_for > 0)
    await system.kill()
    await until(lambda: bus.connected_for == 0)
    bus.publish("x", b"dropped")
    with pytest.raises(BusTimeout):
        await bus.append("s.1", b"never", timeout=0.1)
    with pytest.raises(BusTimeout):
        await bus.request("x", b"", 0.1)
    waiting = asyncio.gather(*(bus.append("s.1", b"%d" % i, timeout=20) for i in range(5)))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await system.restart()
    assert [a.seq for a in await waiting] == [1, 2, 3, 4, 5]
    assert [stored and stored.data for stored in [await bus.read("S", i) for i in (1, 5)]] == [b"0", b"4"]
    assert 0 < bus.connected_for < 20


async def test_a_request_under_way_fails_when_the_connection_is_lost(system: System, bus: Bus) -> None:
    other = await system.connect()
    await other.subscribe("silent", lambda m: None)
    await settle(other)
    asking = asyncio.get_running_loop().create_task(bus.request("silent", b"", 30.0))
    await asyncio.sleep(0.05)
    await system.kill()
    with pytest.raises(BusTimeout, match="lost"):
        await asyncio.wait_for(asking, 5)
    await system.restart()
