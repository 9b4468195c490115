"""Processes that stood still (SIGSTOP), hear late or begin anew, on the in-memory bus in virtual time: none of them decides by what was
true before, and time in which it heard nothing proves nothing."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import msgpack

from services.detokenizer.ownership import partitions_of
from services.detokenizer.service import DetokenizerService
from services.scheduler.service import SchedulerService
from shared import api, codec, subjects
from shared import messages as m
from shared.bus import Message
from shared.client import Client
from shared.errors import ErrorCode, GorgonError
from shared.memory_broker import MemoryBroker
from shared.memory_bus import MemoryBus
from tests.protocol.detokenizer_world import MODEL, STEP, Letters, World
from tests.protocol.simulated_processes import Process
from tests.protocol.test_client import Script
from tests.protocol.test_scheduler import World as SchedulerWorld
from tests.protocol.virtual import until, virtual, with_processes

# ---------------------------------------------------------------- detokenizers


@with_processes
async def test_a_stale_owner_cancels_nobody_who_moved() -> None:
    """It finds that the client's process is gone, and is stopped; the client goes on elsewhere, of which the owner hears last."""
    async with World(partitions=1, vanished_after=6.0) as world:
        name, other = sorted("ab", key=lambda name: partitions_of(name, frozenset("ab"), MODEL, 1), reverse=True)
        process = Process(name, world.broker)
        service = process.call(lambda: DetokenizerService(process.bus, world.settings(name=name), Letters))
        process.start(service.start())
        await until(lambda: service.partitions and service.partitions[0].serving)
        plan = world.plan("r", choices=[[1] * 1500])
        first = world.client()
        await first.start()
        stream = first.generate("x", id="r")
        await until(lambda: stream.cursors)
        first._bus.abort()  # type: ignore[attr-defined]
        await until(lambda: "default.r" in service.partitions[0]._clients._silent)
        process.stop()
        second = await world.detokenizer(other)
        async with world.client() as client:
            again = client.attach("r")
            checked = asyncio.create_task(world.check(again, plan))
            await until(lambda: again.cursors and second.partitions[0].serving)
            await asyncio.sleep(8.0)
            world.broker.faults.blind, world.broker.faults.max_blind = 1.0, 2.0
            process.resume()
            await asyncio.sleep(2 * STEP)
            world.broker.faults.blind = 0.0
            await asyncio.wait_for(checked, 60)
        process.bury()


@virtual
async def test_who_asks_for_replays_has_not_vanished() -> None:
    """The log sends the events elsewhere: an ATTACH to the inbox of a gateway that has died came late."""
    async with World(partitions=1, vanished_after=6.0) as world, world.client() as client:
        service = await world.detokenizer("a")
        await until(lambda: world.serving(service))
        plan = world.plan("r", choices=[[1] * 1000])  # 20 s
        stream = client.generate("x", id="r")
        await until(lambda: stream.cursors)
        late = m.Attach("default.r", m.ReplyTo("_INBOX.of_a_gateway_that_died", "msgpack", True))
        await world.bus.request(subjects.attach(MODEL, 0), codec.encode(late), 1.0)
        await world.check(stream, plan)


@virtual
async def test_an_old_end_does_not_bury_a_new_request_of_the_same_id() -> None:
    """The owner folds the end of request 7 after its tombstone is gone; 8 has the id since."""
    async with World(partitions=1) as world:
        service = await world.detokenizer("a")
        await until(lambda: world.serving(service))
        world.plan("r", choices=[[1] * 20])
        bucket = await world.bus.bucket(subjects.BUCKET_ASSIGN)
        new = codec.encode(m.Assignment(8, 1, "w", b"hash"))
        await bucket.create("default.r", new)
        world.backend.open("default.r", m.ReplyTo("nobody", "json"), durable=False)  # as request 7
        await until(lambda: "default.r" in service.partitions[0].core.archived)
        entry = await bucket.get("default.r")
        assert entry is not None and entry.value == new


@virtual
async def test_a_late_repetition_of_an_open_opens_nothing_again() -> None:
    """Of a scheduler that stood still before it: the request has ended, and long ago."""
    async with World(partitions=1, attach_window=2.0, vanished_after=0) as world:
        service = await world.detokenizer("a")
        await until(lambda: world.serving(service))
        world.plan("r", choices=[[1] * 20])
        world.backend.open("default.r", m.ReplyTo("nobody", "json"), durable=False)
        await until(lambda: "default.r" in service.partitions[0].core.archived)
        await asyncio.sleep(3.0)
        entries = world.broker.streams[subjects.STREAM_TOK].messages.values()
        opened = next(e for e in map(codec.decode, (stored.data for stored in entries)) if isinstance(e, m.Open))
        await world.backend.append(opened, 0)
        await asyncio.sleep(1.0)
        assert "default.r" not in service.partitions[0].core.answers


@virtual
async def test_a_partition_that_is_to_be_kept_is_not_given_up() -> None:
    """Decided while another was being given up, to be done when that is through: by then the new owner is dead."""
    async with World(partitions=8) as world:
        service = await world.detokenizer("a")
        await until(lambda: world.serving(service))
        taken: Counter[int] = Counter()
        take = service._take

        def count(number: int) -> None:
            taken[number] += 1
            take(number)

        service._take = count  # type: ignore[method-assign]

        async def keep_busy() -> None:  # so that there is something to save
            while True:
                for number in range(8):
                    await world.backend.append(m.StepTokens("", 0, ()), number)
                await asyncio.sleep(0.05)

        going = asyncio.create_task(keep_busy())
        await asyncio.sleep(1.0)
        second = await world.detokenizer("b")
        write = service.bus.write_to_broker  # type: ignore[attr-defined]

        async def slowly(*arguments: Any) -> Any:
            await asyncio.sleep(0.8)
            return await write(*arguments)

        service.bus.write_to_broker = slowly  # type: ignore[attr-defined]
        await until(service._changing.locked)
        await asyncio.sleep(0.25)
        await world.crash(second)
        await asyncio.sleep(20.0)
        going.cancel()
        assert world.serving(service)
        assert max(taken.values(), default=0) <= 1, taken


# ---------------------------------------------------------------- schedulers


@virtual
async def test_a_deadline_counts_while_there_was_no_scheduler() -> None:
    world = await SchedulerWorld(schedulers=0).start(workers=0)
    key = world.submit("a", deadline=10.0)
    await asyncio.sleep(30.0)
    began = asyncio.get_running_loop().time()
    await world.scheduler()
    await world.ended(key, within=60)
    assert world.failure(key) == "deadline_exceeded"
    assert asyncio.get_running_loop().time() - began < 2.0
    await world.stop()


@with_processes
async def test_a_refusal_that_is_heard_late_ends_nothing_that_runs_elsewhere() -> None:
    world = SchedulerWorld(schedulers=0)
    await world.start(workers=1)
    process = Process("stale", world.broker)
    stale = process.call(lambda: SchedulerService(process.bus, world.settings))
    stale.instance = "stale"
    process.start(stale.start())
    await asyncio.sleep(4.0)

    def refuse(run: m.Run) -> m.RunReply:
        process.stop()
        return m.RunReply(False, "context_length_exceeded", "too long for this one")

    world.workers[0].answer = refuse
    key = world.submit("a", tokens=300)
    await until(lambda: world.workers[0].orders)
    world.workers[0].answer = lambda run: m.RunReply(False, "overloaded", "")
    await world.scheduler()
    await world.worker()
    await until(lambda: key in world.workers[1].runs)
    await asyncio.sleep(1.0)
    process.resume()
    await world.ended(key)
    assert world.reason(key) == "finished", world.failure(key)
    process.bury()
    await world.stop()


# ---------------------------------------------------------------- clients


@virtual
async def test_a_late_refusal_ends_no_accepted_stream() -> None:
    """One tokenizer took its time over a constraint, another one took the repetition: the first one's refusal comes last."""
    async with Script() as script:
        script.on_request = lambda: script.accept() if len(script.asked) == 2 else None
        stream = script.client.generate("x", id="r")
        await until(lambda: stream.accepted)
        script.send(script.tokens(0, 2))
        refusal = api.error_event("r", GorgonError(ErrorCode.INVALID_REQUEST, "not compiled within 2 s"))
        script.send(refusal | {"refused": True})
        script.send(script.tokens(2, 4), script.finished(4))
        assert await stream.text() == "abcd"


@with_processes
async def test_what_came_while_a_client_stood_still_is_heard_first() -> None:
    broker = MemoryBroker(1)
    bus = MemoryBus(broker)
    event = api.accepted_event("r", "default", prompt_tokens=1, seed=0, replay=subjects.replay(MODEL, 0), results=None)

    def on_request(message: Message) -> None:
        accept = lambda: bus.publish(message.reply, msgpack.packb([event]))  # noqa: E731
        asyncio.get_running_loop().call_later(1.0, accept)

    await bus.subscribe(subjects.generate(MODEL), on_request)
    process = Process("client", broker)
    client = Client(process.bus, MODEL, partitions=1, accept_timeout=10.0)
    await process.start(client.start())
    stream = process.call(client.generate, "x", id="r")
    await asyncio.sleep(0.2)
    process.stop()
    await asyncio.sleep(11.0)
    process.resume()
    await until(lambda: stream.accepted or stream.done)
    assert not stream.done, stream.ending
    process.bury()
