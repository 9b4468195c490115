"""What only a real server can do to the bus: stop answering, come late, close the connection for good, lose a message."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import time
import weakref
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
from nats.aio.client import Client
from nats.aio.msg import Msg

from shared import nats_bus, nats_connection, nats_pull
from shared.broker import Broker, free_port
from shared.bus import Appended, BucketSpec, BusError, BusTimeout, Message, Stored, StreamSpec
from shared.config import StageSettings
from shared.nats_bus import NatsBus
from shared.nats_pull import OrderedReader, Place
from tests.protocol.systems import until, until_equal
from tests.protocol.test_bus_contract import collect

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.timeout(60)


@pytest_asyncio.fixture
async def bus(nats_server: Broker) -> AsyncIterator[NatsBus]:
    bus = await NatsBus.connect(StageSettings(nats_url=nats_server.url))
    await bus.ensure_stream(StreamSpec("S", "s.>"))
    yield bus
    await bus.close()


async def test_who_waits_for_a_server_can_be_told_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where nats-py takes the cancellation for its own and goes on."""
    swallowed = 0

    async def connect(*args: object, **options: object) -> None:
        nonlocal swallowed
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                swallowed += 1
                if swallowed == 3:
                    raise

    monkeypatch.setattr(Client, "connect", connect)
    connecting = asyncio.create_task(NatsBus.connect(StageSettings()))
    await asyncio.sleep(0.01)
    connecting.cancel()
    done, _ = await asyncio.wait([connecting], timeout=5)
    assert done and connecting.cancelled() and swallowed == 3


async def test_a_burst_arrives_whole_and_no_subject_in_it_is_taken_for_a_command(bus: NatsBus) -> None:
    heard: list[tuple[str, bytes, str]] = []
    await bus.subscribe("t.>", lambda message: heard.append((message.subject, message.data, message.reply)))
    sent = [(f"t.{i % 3}", b"%d\r\n" % i, f"r.{i}" if i % 2 else "") for i in range(500)]
    dropped = bus.dropped
    for subject, data, reply in sent:
        bus.publish(subject, data, reply)
        for bad in ("", "t.x 1", "t.x\r\nPUB t.x", "t.x\tr"):
            bus.publish(bad, b"")
        bus.publish("t.y", b"1", "r 5\r\n12345\r\nPUB t.x")
    assert bus.dropped - dropped == 5 * len(sent)
    await until(lambda: len(heard) >= len(sent))
    assert heard == sent and bus.connected_for > 0


async def test_a_server_that_stops_for_two_seconds(nats_server: Broker, bus: NatsBus) -> None:
    """SIGSTOP: nothing is lost, and the silence is noticed as the link's own."""
    reader = await NatsBus.connect(StageSettings(nats_url=nats_server.url))
    reconnects: list[None] = []
    reader.on_reconnect(lambda: reconnects.append(None))
    followed: list[Stored] = []
    heard: list[bytes] = []
    collect(await reader.follow("S", "s.1", 1), followed)
    await reader.subscribe("x", lambda m: heard.append(m.data))
    for i in range(10):
        await bus.append("s.1", b"%d" % i)
    await until(lambda: len(followed) == 10 and reader.connected_for > 0)
    os.kill(nats_server.pid, signal.SIGSTOP)
    await until(lambda: psutil.Process(nats_server.pid).status() == psutil.STATUS_STOPPED)
    try:
        bus.publish("x", b"late, not lost")
        with pytest.raises(BusTimeout):
            await bus.append("s.1", b"10", msg_id="10", timeout=0.5)
        waiting = asyncio.get_running_loop().create_task(bus.append("s.1", b"11", timeout=20.0))
        await until(lambda: reader.connected_for == 0, 2.0)
        await asyncio.sleep(1.0)
    finally:
        os.kill(nats_server.pid, signal.SIGCONT)
    await waiting
    await bus.append("s.1", b"10", msg_id="10")
    await until(lambda: len(followed) == 12 and heard == [b"late, not lost"])
    assert [m.seq for m in followed] == list(range(1, 13))
    await until(lambda: 0 < reader.connected_for < 2)
    assert not reconnects
    await reader.close()


async def test_whoever_waited_for_an_answer_in_vain_is_not_left_to_the_collector(bus: NatsBus) -> None:
    """A detokenizer asks its clients all the time, who do not answer: their texts were kept until a full collection."""

    async def ask(text: set[int]) -> None:
        with pytest.raises(BusTimeout):
            await bus.request("x", b"%d" % len(text), 0.01)

    await bus.subscribe("x", lambda message: None)
    gc.disable()
    try:
        text = {1, 2, 3}
        kept = weakref.ref(text)
        asking = asyncio.create_task(ask(text))
        del text
        await asking
        del asking
        await asyncio.sleep(0)
        assert kept() is None
    finally:
        gc.enable()


async def test_a_late_pong_that_nobody_waits_for_harms_nothing(
    nats_server: Broker, bus: NatsBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that begins anew drains its old subscription with a ping; the server stands still for longer than that waits."""
    monkeypatch.setattr(nats_bus, "DRAIN_TIMEOUT", 0.2)
    heard: list[bytes] = []
    subscription = await bus.subscribe("x", lambda m: heard.append(m.data))
    assert isinstance(subscription, nats_bus.CoreSubscription)
    await bus.subscribe("y", lambda m: heard.append(m.data))
    os.kill(nats_server.pid, signal.SIGSTOP)
    try:
        await subscription.drain()
    finally:
        os.kill(nats_server.pid, signal.SIGCONT)
    number = subscription._subscription._id
    assert number not in bus._nc._subs and number not in bus._nc._handlers
    began = asyncio.get_running_loop().time()
    bus.publish("y", b"heard")
    await until(lambda: heard == [b"heard"], 2.0)
    assert bus.connected_for > asyncio.get_running_loop().time() - began, "it was not connected anew"


async def test_a_server_that_never_answers_again_is_given_up(
    nats_server: Broker, bus: NatsBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_bus, "LINK_DEAD", 0.5)
    await asyncio.sleep(2 * nats_bus.PING_INTERVAL)  # until the ping with the old limit is answered
    waiting = asyncio.get_running_loop().create_task(bus.append("s.1", b"", timeout=30.0))
    await waiting
    os.kill(nats_server.pid, signal.SIGSTOP)
    try:
        waiting = asyncio.get_running_loop().create_task(bus.append("s.1", bytes(2**22), timeout=30.0))
        with pytest.raises(BusTimeout, match="lost"):
            await asyncio.wait_for(waiting, 5)
    finally:
        os.kill(nats_server.pid, signal.SIGCONT)
    assert (await bus.append("s.1", b"", timeout=10.0)).seq >= 2


async def test_connect_waits_for_the_server(tmp_path: Path) -> None:
    server = Broker(tmp_path, free_port())
    connecting = asyncio.get_running_loop().create_task(NatsBus.connect(StageSettings(nats_url=server.url)))
    await asyncio.sleep(0.3)
    assert not connecting.done()
    await server.start()
    bus = await asyncio.wait_for(connecting, 5)
    assert bus.connected_for >= 0
    await bus.close()
    await server.kill()


async def test_the_end_of_the_connection_is_told(bus: NatsBus) -> None:
    """The server closes it for good after a protocol error. Only a process that ends is safe then."""
    errors: list[BaseException] = []
    bus.on_closed(errors.append)
    bus._nc._max_payload = 2**30
    bus.publish("x", bytes(9 * 2**20))
    await until(lambda: errors)
    late: list[BaseException] = []
    bus.on_closed(late.append)
    assert late


async def test_a_lost_message_is_noticed(bus: NatsBus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the gap detection: the client loses every 50th message, and yet the follower sees all, once, in order."""
    deliver = OrderedReader._deliver
    lost = 0

    def lossy(self: OrderedReader, msg: Msg, at: Place, current: bool) -> bool:
        nonlocal lost
        if at.stream_seq % 50 == 0 and lost < at.stream_seq // 50:
            lost += 1
            return True
        return deliver(self, msg, at, current)

    monkeypatch.setattr(OrderedReader, "_deliver", lossy)
    followed: list[Stored] = []
    follower = await bus.follow("S", "s.1", 1)
    collect(follower, followed)
    for i in range(401):
        await bus.append("s.1", b"%d" % i)
    await until(lambda: len(followed) == 401)
    assert [m.seq for m in followed] == list(range(1, 402))
    assert lost == 8


async def test_a_lost_last_message_is_noticed_though_none_comes_after_it(
    bus: NatsBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's heartbeat says how far it has sent. A follower and the listing of a bucket would wait for ever otherwise."""
    deliver = OrderedReader._deliver
    lose = True

    def lossy(self: OrderedReader, msg: Msg, at: Place, current: bool) -> bool:
        nonlocal lose
        if current and at.pending == 0 and lose:
            lose = False
            return True
        return deliver(self, msg, at, current)

    for i in range(3):
        await bus.append("s.1", b"%d" % i)
    monkeypatch.setattr(OrderedReader, "_deliver", lossy)
    followed: list[Stored] = []
    collect(await bus.follow("S", "s.1", 1), followed)
    await until(lambda: len(followed) == 3)
    assert [m.seq for m in followed] == [1, 2, 3] and not lose

    await bus.ensure_bucket(BucketSpec("b"))
    bucket = await bus.bucket("b")
    await bucket.put("k", b"v")
    lose = True
    listed, seen = asyncio.Event(), []
    await bucket.watch(lambda entry: seen.append(entry.key), listed.set)
    await asyncio.wait_for(listed.wait(), 5.0)
    assert set(seen) == {"k"} and not lose


async def test_a_long_listing_comes_to_its_end_on_a_link_that_loses_messages(
    bus: NatsBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every 40th message is lost: a listing of 400 keys that began anew each time would never get past the first 40."""
    deliver, received, lost = OrderedReader._deliver, 0, 0

    def lossy(self: OrderedReader, msg: Msg, at: Place, current: bool) -> bool:
        nonlocal received, lost
        received += current
        if current and received % 40 == 0:
            lost += 1
            return True
        return deliver(self, msg, at, current)

    await bus.ensure_bucket(BucketSpec("long"))
    bucket = await bus.bucket("long")
    for i in range(400):
        await bucket.put(f"k{i}", b"%d" % i)
    monkeypatch.setattr(OrderedReader, "_deliver", lossy)
    listed = asyncio.Event()
    values: dict[str, bytes | None] = {}
    await bucket.watch(lambda entry: values.update({entry.key: entry.value}), listed.set)
    await asyncio.wait_for(listed.wait(), 20.0)
    assert values == {f"k{i}": b"%d" % i for i in range(400)}
    assert lost >= 10
    await bucket.put("k7", b"new")
    await bucket.delete("k8")
    await until(lambda: values["k7"] == b"new" and values["k8"] is None)


async def test_a_lost_answer_does_not_keep_a_reader_from_beginning(
    bus: NatsBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, asked = OrderedReader._create, 0

    async def lossy(self: OrderedReader) -> tuple[str, int]:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise BusTimeout("no answer in time")
        return await create(self)

    monkeypatch.setattr(OrderedReader, "_create", lossy)
    await bus.append("s.1", b"x")
    followed: list[Stored] = []
    collect(await bus.follow("S", "s.1", 1), followed)
    await until(lambda: len(followed) == 1)
    assert asked == 2


async def consumers(bus: NatsBus) -> list[str]:
    return (await bus.api("CONSUMER.NAMES.S"))["consumers"] or []


async def test_a_consumer_that_the_server_forgot_is_made_again(bus: NatsBus) -> None:
    followed: list[Stored] = []
    follower = await bus.follow("S", "s.1", 1)
    collect(follower, followed)
    await bus.append("s.1", b"")
    await until(lambda: len(followed) == 1)
    (name,) = await consumers(bus)
    await bus.api(f"CONSUMER.DELETE.S.{name}")
    await bus.append("s.1", b"")
    await until(lambda: len(followed) == 2, 5)
    assert [m.seq for m in followed] == [1, 2]
    await follower.close()
    await until_equal(lambda: consumers(bus), [])  # nothing is left behind


async def test_a_pull_that_expires_is_renewed(bus: NatsBus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pulls of one second; the same consumer serves on, and what comes in between is not late."""
    monkeypatch.setattr(nats_pull, "EXPIRES", 1.0)
    followed: list[Stored] = []
    collect(await bus.follow("S", "s.1", 1), followed)
    names = await consumers(bus)
    for i in range(25):
        await bus.append("s.1", b"")
        await until(lambda i=i: len(followed) == i + 1, 1.0)  # type: ignore[misc]
        await asyncio.sleep(0.1)
    assert await consumers(bus) == names


async def test_a_flood_that_is_handled_slowly_is_no_silence(
    nats_server: Broker, bus: NatsBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's answer to a ping stands behind the flood: late, but the connection must not be given up for that."""
    monkeypatch.setattr(nats_bus, "LINK_DEAD", 0.2)
    monkeypatch.setattr(nats_bus, "PING_INTERVAL", 0.01)
    reader = await NatsBus.connect(StageSettings(nats_url=nats_server.url))
    reconnects: list[None] = []
    reader.on_reconnect(lambda: reconnects.append(None))
    heard: list[int] = []

    def slowly(message: Message) -> None:
        time.sleep(0.02)
        heard.append(len(message.data))

    await reader.subscribe("flood", slowly)
    await bus.request("$JS.API.INFO", b"", 5.0)  # so that the server knows of the subscription
    for _ in range(60):
        bus.publish("flood", bytes(64 * 1024))
    await until(lambda: len(heard) == 60, 20.0)
    assert reconnects == []
    await reader.close()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed"),
        AttributeError("'NoneType' object has no attribute '_get_write_buffer_size'"),  # of TLS
    ],
)
async def test_a_transport_that_is_closed_before_anybody_has_noticed(bus: NatsBus, error: Exception) -> None:
    """What uvloop raises then: a core message is dropped, the rest gets a BusError, and what else the same turn of the loop
    had to say is lost without harm."""
    subscription = await bus.subscribe("y", lambda m: None)
    transport = bus._nc._transport
    assert transport is not None

    def refuse(_: object) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transport, "write", refuse)
        bus.publish("x", b"")
        assert bus.dropped == 1
        bus.publish("x", b"second of its turn")
        await asyncio.sleep(0)
        with pytest.raises(BusError):
            await bus.append("s.1", b"", timeout=0.5)
        await subscription.drain()  # type: ignore[attr-defined]
    await bus.append("s.1", b"and on", timeout=10.0)


async def test_what_a_turn_of_the_loop_publishes_arrives_in_order(nats_server: Broker, bus: NatsBus) -> None:
    """The first message is written at once, the others together, subscriptions of the same turn before what asks for their answers."""
    heard: list[bytes] = []
    listening = asyncio.ensure_future(bus.subscribe("turn", lambda m: heard.append(m.data)))
    await asyncio.sleep(0)
    for number in range(200):
        bus.publish("turn", str(number).encode(), "answers" if number % 3 else "")
    await until(lambda: len(heard) == 200)
    assert heard == [str(number).encode() for number in range(200)]
    await (await listening).unsubscribe()
    bus.publish("turn", b"to nobody")
    await bus.request("$JS.API.INFO", b"", 5.0)
    assert len(heard) == 200


async def test_a_reconnect_that_fails_as_it_is_cancelled_ends(
    nats_server: Broker, bus: NatsBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with `asyncio.wait_for` of Python 3.11, when the refusal is there before the cancelled task runs."""
    connecting = asyncio.Event()

    async def refused(server: object) -> None:
        connecting.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            connecting.clear()
            raise ConnectionRefusedError from None

    monkeypatch.setattr(bus._nc, "_connect_to_server", refused)
    await nats_server.stop()
    await asyncio.wait_for(connecting.wait(), 10.0)
    task = bus._nc._reconnection_task
    assert task is not None
    task.cancel()
    await asyncio.wait([task], timeout=3.0)
    assert task.done() and not connecting.is_set()


def writes_of(bus: NatsBus, monkeypatch: pytest.MonkeyPatch, long_turn: float) -> list[bytes]:
    """What the connection writes from now on."""
    written: list[bytes] = []
    write = bus._nc._transport.write
    monkeypatch.setattr(bus._nc._transport, "write", lambda data: (written.append(data), write(data)))
    monkeypatch.setattr(nats_connection, "LONG_TURN", long_turn)
    return written


@pytest.mark.parametrize(("long_turn", "writes"), [(60.0, 2), (-1.0, 5)])
async def test_the_first_of_a_long_turn_does_not_wait_for_its_last(
    bus: NatsBus, monkeypatch: pytest.MonkeyPatch, long_turn: float, writes: int
) -> None:
    """A turn that handles hundreds of requests; -1: every message comes after a long time."""
    heard: list[bytes] = []
    await bus.subscribe("long", lambda m: heard.append(m.data))
    await bus.request("$JS.API.INFO", b"", 5.0)
    await asyncio.sleep(0)
    written = writes_of(bus, monkeypatch, long_turn)
    for number in range(5):
        bus.publish("long", b"%d" % number)
    before_its_end = len(written)
    await until(lambda: len(heard) == 5)
    assert heard == [b"%d" % number for number in range(5)]
    assert (before_its_end, len(written)) == (1 if writes == 2 else 5, writes)


async def test_what_is_published_together_is_written_once(bus: NatsBus, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[bytes] = []
    await bus.subscribe("together", lambda m: heard.append(m.data))
    await bus.request("$JS.API.INFO", b"", 5.0)
    await asyncio.sleep(0)  # another turn: nothing has been published in this one
    written = writes_of(bus, monkeypatch, long_turn=60.0)
    with bus.together():
        for number in range(20):
            bus.publish("together", b"%d" % number)
        assert not written
    assert len(written) == 1
    bus.publish("together", b"20")  # is again the first of its turn
    assert len(written) == 2
    with bus.together():
        bus.publish("together", b"21")
    assert len(written) == 2
    await until(lambda: len(heard) == 22)
    assert heard == [b"%d" % number for number in range(22)] and len(written) == 3


async def test_appends_that_get_no_answer_are_told_each_in_time(bus: NatsBus, monkeypatch: pytest.MonkeyPatch) -> None:
    """One timer is for all of them, those that were answered among them."""
    monkeypatch.setattr(nats_bus, "APPEND_TIMEOUT", 0.4)
    told: dict[str, tuple[float, object]] = {}
    await bus.subscribe("deaf.>", lambda message: None)  # somebody is there, so the server does not say that nobody is
    loop = asyncio.get_running_loop()
    begun: dict[str, float] = {}

    def append(subject: str) -> None:
        begun[subject] = loop.time()
        assert bus.append_soon(subject, b"x", lambda outcome: told.update({subject: (loop.time(), outcome)}))

    for number in range(4):
        append(f"deaf.{number}")
        append(f"s.{number}")
        await asyncio.sleep(0.1)
    await until(lambda: len(told) == 8)
    for subject, (when, outcome) in told.items():
        if subject.startswith("deaf"):
            assert isinstance(outcome, BusTimeout) and 0.35 < when - begun[subject] < 2
        else:
            assert isinstance(outcome, Appended)
    assert not bus._waiting
    append("deaf.again")  # the timer has run out, and is wound up again
    await until(lambda: "deaf.again" in told)
    assert not bus._waiting and len(bus._appends) == 0


async def test_one_that_fails_when_told_keeps_no_other_from_being_told(
    bus: NatsBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_bus, "APPEND_TIMEOUT", 0.2)
    await bus.subscribe("deaf.>", lambda message: None)
    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context["exception"]))
    told: list[object] = []

    def fail(outcome: object) -> None:
        raise RuntimeError("no more")

    assert bus.append_soon("deaf.1", b"x", fail) and bus.append_soon("deaf.2", b"x", told.append)
    await until(lambda: len(told) == 1)
    assert bus.append_soon("deaf.3", b"x", told.append)
    await until(lambda: len(told) == 2)
    assert [str(failure) for failure in failures] == ["no more"]


async def test_appends_are_told_that_the_connection_was_lost(nats_server: Broker, bus: NatsBus) -> None:
    told: list[object] = []
    await bus.subscribe("deaf.>", lambda message: None)
    assert bus.append_soon("deaf.1", b"x", told.append)
    await nats_server.kill()
    await until(lambda: told)
    assert isinstance(told[0], BusTimeout) and len(told) == 1
    assert not bus.append_soon("deaf.1", b"x", told.append)


async def test_a_handler_that_fails_harms_no_other_message(nats_server: Broker, bus: NatsBus) -> None:
    def fail(_: object) -> None:
        raise KeyError("a defect")

    heard: list[bytes] = []
    await bus.subscribe("bad", fail)
    await bus.subscribe_raw("raw", fail)
    await bus.subscribe("good", lambda m: heard.append(m.data))
    for subject in ("bad", "raw", "good"):
        bus.publish(subject, b"x")
    await until(lambda: heard == [b"x"])
    assert bus.handler_errors == 1


async def test_a_header_cannot_smuggle_in_a_command(nats_server: Broker, bus: NatsBus) -> None:
    """Line breaks in a value are nats-py's to mend, as before; what follows is still heard."""
    await bus.append("s.1", b"one", msg_id="a\r\nPUB s.1 3\r\nbad", timeout=5.0)
    assert (await bus.append("s.1", b"two", timeout=5.0)).seq == 2


async def test_a_backlog_leaves_the_loop_to_others(nats_server: Broker, bus: NatsBus) -> None:
    """Whatever waits in the socket: timers run in between. (With uvloop, as in the stages; libuv reads up to 32 times in a turn.)"""
    script = f"""
import asyncio, time
from shared.config import StageSettings
from shared.nats_bus import NatsBus

async def main():
    bus = await NatsBus.connect(StageSettings(nats_url={nats_server.url!r}))
    heard, gaps = 0, []
    def slowly(message):
        nonlocal heard
        heard += 1
        end = time.process_time() + 20e-6
        while time.process_time() < end:
            pass
    await bus.subscribe("flood", slowly)
    await bus.request("$JS.API.INFO", b"", 5.0)
    print("ready", flush=True)
    last = time.process_time()  # of this process alone: others may keep it waiting
    while heard < 100_000:
        await asyncio.sleep(0.001)
        now = time.process_time()
        gaps.append(now - last)
        last = now
    print(max(gaps))
    await bus.close()

import uvloop
uvloop.run(main())
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=-1, cwd=ROOT)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    for _ in range(100):
        for _ in range(1000):
            bus.publish("flood", bytes(100))
        await asyncio.sleep(0)
    longest = float(await asyncio.wait_for(process.stdout.readline(), 60))
    await process.wait()
    assert longest < 0.5


async def test_draining_loses_nothing_that_the_server_has_sent(nats_server: Broker, bus: NatsBus) -> None:
    """Two share a queue group; one drains amid a flood, again and again: each message is heard by one of them."""
    heard: list[bytes] = []
    other = await NatsBus.connect(StageSettings(nats_url=nats_server.url))
    try:
        await other.subscribe("q", lambda m: heard.append(m.data), queue="group")
        await other.request("$JS.API.INFO", b"", 5.0)
        sent = 0
        for _ in range(40):
            subscription = await bus.subscribe("q", lambda m: heard.append(m.data), queue="group")
            await bus.request("$JS.API.INFO", b"", 5.0)
            for part in range(4):
                for _ in range(50):
                    other.publish("q", str(sent).encode())
                    sent += 1
                if part == 1:
                    draining = asyncio.ensure_future(subscription.drain())  # type: ignore[attr-defined]
                await asyncio.sleep(0)
            await draining
        await until(lambda: len(heard) >= sent, 5.0)
        assert sorted(map(int, heard)) == list(range(sent))
    finally:
        await other.close()


async def test_what_was_not_sent_is_not_sent_after_the_outage(nats_server: Broker, bus: NatsBus) -> None:
    """Whoever published it was told so: an order or an abort must not come late."""
    heard: list[bytes] = []
    await bus.subscribe("late", lambda m: heard.append(m.data))
    await bus.request("$JS.API.INFO", b"", 5.0)
    bus.publish("x", b"the first of its turn is written")
    bus.publish("late", b"still pending")
    bus._down()  # the loss is noticed in the same turn
    bus._up()
    bus.publish("late", b"after")
    await until(lambda: b"after" in heard)
    assert heard == [b"after"]
