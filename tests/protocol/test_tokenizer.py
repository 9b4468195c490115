"""The tokenizer stage on the in-memory bus, in virtual time."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import msgpack
import pytest

from services.tokenizer.model_files import ModelFiles, load_model_files
from services.tokenizer.service import TokenizerService
from services.tokenizer.settings import TokenizerSettings
from shared import codec, subjects
from shared import messages as m
from shared.bus import BucketSpec, Message
from shared.capabilities import KNOWN, Fields
from shared.memory_bus import Faults, MemoryBroker, MemoryBus
from shared.streams import stream_specs
from shared.structured import Matcher, Vocabulary, json_constraint
from tests.protocol.systems import lose_first_attempts
from tests.protocol.virtual import virtual

MODEL = "demo"
DEMO = Path(__file__).parents[2] / "models/demo"


@functools.cache
def demo_files() -> ModelFiles:
    return load_model_files(DEMO)


class World:
    """A broker, tokenizers, and a client with one inbox."""

    def __init__(self, faults: Faults | None = None) -> None:
        self.broker = MemoryBroker(seed=1, faults=faults)
        for spec in stream_specs(TokenizerSettings()):
            self.broker.ensure_stream(spec)
        self.bus = MemoryBus(self.broker)
        self.inbox: list[tuple[str, bytes]] = []
        self.services: list[TokenizerService] = []
        self.owned = True  # whether somebody owns the partitions

    async def start(self, model: str = MODEL, context: int = 1024, **settings: Any) -> TokenizerService:
        for bucket in (subjects.BUCKET_ASSIGN, subjects.BUCKET_SNAPSHOT):
            await self.bus.ensure_bucket(BucketSpec(bucket))
        if not self.services:
            await self.bus.subscribe("inbox.>", lambda message: self.inbox.append((message.subject, message.data)))
            await self.bus.subscribe(subjects.attach("*", "*"), self._own)  # type: ignore[arg-type]
        # No threads in virtual time.
        options = dict(model=model, name=f"t{len(self.services)}", inline_bytes=2**30, registry_grace=0.5)
        files = dataclasses.replace(demo_files(), context=context)
        service = TokenizerService(MemoryBus(self.broker), TokenizerSettings(**(options | settings)), files)
        self.services.append(service)
        await service.start()
        return service

    def _own(self, message: Message) -> None:
        """What a partition's owner does with an attach."""

        async def write() -> None:
            await self.bus.append(message.subject.replace("attach", "tok"), message.data)
            self.bus.publish(message.reply, b"+OK")

        if self.owned:
            self._writing = asyncio.get_running_loop().create_task(write())

    def send(self, body: dict[str, Any] | bytes, reply: str = "inbox.a", model: str = MODEL, door: str = "") -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.bus.publish(subjects.generate(model) + door, data, reply=reply)

    def events(self, reply: str | None = None) -> list[dict[str, Any]]:
        events = []
        for subject, data in self.inbox:
            if reply is None or subject == reply:
                event = json.loads(data) if data[:1] in b"{[" else msgpack.unpackb(data)
                events.extend(event if isinstance(event, list) else [event])
        return events

    async def ask(
        self, body: dict[str, Any] | bytes, model: str = MODEL, wait: float = 1.0, door: str = ""
    ) -> dict[str, Any]:
        """The one event that answers."""
        self.inbox.clear()
        self.send(body, model=model, door=door)
        await asyncio.sleep(wait)
        events = self.events()
        assert len(events) == 1, events
        return events[0]

    def stored(self, stream: str) -> list[m.Request | m.Attach]:
        return [codec.decode(message.data) for message in self.broker.streams[stream].messages.values()]

    def results(self, key: str) -> list[dict[str, Any]]:
        messages = self.broker.streams[subjects.STREAM_RESULTS].messages.values()
        return [json.loads(message.data) for message in messages if message.subject == subjects.results(key)]

    async def job(self, body: dict[str, Any] | bytes, wait: float = 1.0, door: str = "") -> int:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        appended = await self.bus.append(subjects.jobs(MODEL) + door, data)
        await asyncio.sleep(wait)
        return appended.seq

    async def stop(self) -> None:
        for service in self.services:
            await service.drain()
            await service.stop()


@virtual
async def test_accepted_in_both_encodings() -> None:
    world = World()
    await world.start()
    event = await world.ask({"id": "r1", "tenant": "t", "prompt": "Once upon", "seed": 5})
    partition = subjects.partition_of("t.r1", 8)
    assert event == {
        "event": "accepted", "id": "r1", "tenant": "t", "prompt_tokens": len(demo_files().encoder.encode("Once upon", True)),
        "seed": 5, "replay": f"llm.v1.replay.demo.{partition}",
    }  # fmt: skip
    [request] = world.stored(subjects.STREAM_REQ)
    assert isinstance(request, m.Request)
    assert (request.key, request.reply.subject, request.reply.encoding) == ("t.r1", "inbox.a", "json")
    event = await world.ask(msgpack.packb({"prompt": [5, 6], "batched": True}))
    assert (event["event"], event["prompt_tokens"]) == ("accepted", 2)
    assert isinstance(msgpack.unpackb(world.inbox[0][1]), list)
    assert len(event["id"]) == 32
    await world.stop()


@virtual
async def test_requests_of_a_tenant_go_to_its_class() -> None:
    world = World()
    await world.start()
    for tenant in "abcdef":
        await world.ask({"tenant": tenant, "prompt": "x"})
    for message in world.broker.streams[subjects.STREAM_REQ].messages.values():
        tenant = codec.decode_as(m.Request, message.data).key.split(".")[0]
        assert message.subject == subjects.req(MODEL, subjects.tenant_class_of(tenant, 4))
    await world.stop()


@virtual
async def test_the_same_id_again_attaches() -> None:
    world = World()
    await world.start()
    body = {"id": "r1", "prompt": "Once"}
    first = await world.ask(body)
    world.inbox.clear()
    world.send(body | {"stream": False}, reply="inbox.b")
    await asyncio.sleep(1)
    assert world.events("inbox.b") == [first]
    assert len(world.stored(subjects.STREAM_REQ)) == 1
    [attach] = world.stored(subjects.STREAM_TOK)
    assert attach == m.Attach("default.r1", m.ReplyTo("inbox.b", stream=False))
    [message] = world.broker.streams[subjects.STREAM_TOK].messages.values()
    assert message.subject == subjects.tok(MODEL, subjects.partition_of("default.r1", 8))
    # Under another tenant it is another request; with another body it is a conflict.
    assert (await world.ask(body | {"tenant": "t"}))["event"] == "accepted"
    conflict = await world.ask(body | {"prompt": "Twice"})
    assert (conflict["code"], conflict["id"], conflict["retryable"]) == ("id_conflict", "r1", False)
    assert len(world.stored(subjects.STREAM_TOK)) == 1
    await world.stop()


@virtual
async def test_without_an_owner_a_repetition_is_to_be_sent_again() -> None:
    world = World()
    await world.start()
    body = {"id": "r1", "prompt": "Once"}
    await world.ask(body)
    world.owned = False
    event = await world.ask(body, wait=10.0)
    assert (event["code"], event["retryable"], event["id"]) == ("unavailable", True, "r1")
    world.owned = True
    assert (await world.ask(body))["event"] == "accepted"
    await world.stop()


@virtual
async def test_whoever_comes_through_a_tenants_door_is_that_tenant() -> None:
    world = World()
    await world.start()
    event = await world.ask({"id": "r", "prompt": "x"}, door=".alice")
    assert (event["event"], event["tenant"]) == ("accepted", "alice")
    assert (await world.ask({"id": "r", "tenant": "alice", "prompt": "x"}, door=".alice"))["event"] == "accepted"
    for claimed in ("bob", "default"):
        event = await world.ask({"id": "r2", "tenant": claimed, "prompt": "x"}, door=".alice")
        assert event["code"] == "invalid_request"
        assert "alice" in event["message"]
    [request] = world.stored(subjects.STREAM_REQ)
    assert request.key == "alice.r"
    assert (await world.ask({"prompt": "x"}, model="nobody", wait=3.0, door=".alice"))["code"] == "unknown_model"
    await world.stop()


@virtual
async def test_jobs_through_a_tenants_door() -> None:
    world = World()
    await world.start()
    seq = await world.job({"prompt": "x"}, door=".alice")
    await world.job({"id": "mine", "tenant": "bob", "prompt": "x"}, door=".alice")
    [request] = world.stored(subjects.STREAM_REQ)
    assert request.key == f"alice.job-{seq}"
    assert [event["event"] for event in world.results(f"alice.job-{seq}")] == ["accepted"]
    assert [(event["code"], event["refused"]) for event in world.results("alice.mine")] == [("invalid_request", True)]
    assert not world.results("bob.mine")
    assert not world.broker.streams[subjects.STREAM_JOBS].messages
    await world.stop()


@virtual
async def test_an_id_is_one_request_of_one_model() -> None:
    world = World()
    await world.start()
    await world.start(model="other")
    await asyncio.sleep(1)
    assert (await world.ask({"id": "r", "prompt": "x"}))["event"] == "accepted"
    assert (await world.ask({"id": "r", "prompt": "x"}, model="other"))["code"] == "id_conflict"
    await world.stop()


@virtual
async def test_the_same_id_after_the_end() -> None:
    """REQ is trimmed; the tombstone still knows the request."""
    world = World()
    await world.start()
    body = {"id": "r1", "prompt": "Once"}
    first = await world.ask(body)
    [request] = world.stored(subjects.STREAM_REQ)
    assert isinstance(request, m.Request)
    await world.bus.trim(subjects.STREAM_REQ, 2)
    forgotten = await world.ask(body)
    assert forgotten["code"] == "not_found"
    bucket = await world.bus.bucket(subjects.BUCKET_ASSIGN)
    await bucket.create(request.key, codec.encode(m.Tombstone(1, 1, "finished", request.body_hash)))
    assert await world.ask(body) == first
    assert [type(entry) for entry in world.stored(subjects.STREAM_TOK)] == [m.Attach]
    assert (await world.ask(body | {"n": 2}))["code"] == "id_conflict"
    await world.stop()


@pytest.mark.parametrize("fault", ["lose_append", "late_append", "lose_ack"])
@virtual
async def test_an_append_without_answer(fault: str) -> None:
    """Each request is stored once and answered once, or the client is told to repeat it under its id."""
    world = World(Faults(max_delay=0.05))
    await world.start()
    setattr(world.broker.faults, fault, 0.4)
    ids = [f"r{i}" for i in range(100)]
    for request_id in ids:
        world.send({"id": request_id, "prompt": "x"})
    await asyncio.sleep(10)
    answers = {event["id"]: event for event in world.events()}
    assert len(world.events()) == len(answers) == 100
    unsure = [i for i, event in answers.items() if event["event"] == "error"]
    assert {answers[i]["code"] for i in unsure} <= {"unavailable"}
    assert all(answers[i]["retryable"] and answers[i]["retry_after"] for i in unsure)
    assert len(unsure) < 20
    assert not world.stored(subjects.STREAM_TOK)
    world.broker.faults = Faults()
    for request_id in unsure:
        assert (await world.ask({"id": request_id, "prompt": "x"}))["event"] == "accepted"
    assert sorted(request.key for request in world.stored(subjects.STREAM_REQ)) == sorted(f"default.{i}" for i in ids)
    await world.stop()


@virtual
async def test_a_full_disk() -> None:
    world = World()
    await world.start()
    world.broker.disk_full = True
    event = await world.ask({"id": "r", "prompt": "x", "metadata": {"k": 1}})
    assert (event["code"], event["retryable"], event["metadata"]) == ("storage_full", True, {"k": 1})
    world.broker.disk_full = False
    assert (await world.ask({"id": "r", "prompt": "x"}))["event"] == "accepted"
    await world.stop()


@virtual
async def test_a_dead_server_and_its_return() -> None:
    world = World()
    await world.start()
    world.send({"id": "r", "prompt": "x"})
    await asyncio.sleep(0)  # the request is on its way into REQ
    world.broker.kill()
    await asyncio.sleep(2)
    world.broker.restart()
    await asyncio.sleep(1)
    assert (await world.ask({"id": "r", "prompt": "x"}))["event"] == "accepted"
    assert len(world.stored(subjects.STREAM_REQ)) == 1
    await world.stop()


@pytest.mark.parametrize("apart", [0.05, 0.0], ids=["one after another", "at once"])
@virtual
async def test_overload_by_the_backlog(apart: float) -> None:
    world = World()
    service = await world.start(max_waiting=10, tenant_classes=1)
    await world.bus.consume(
        subjects.STREAM_REQ, subjects.consumer_req(MODEL, 0), subjects.req(MODEL, 0), lambda _: asyncio.sleep(0),
        limit=0, ack_wait=30,
    )  # fmt: skip
    for i in range(15):
        world.send({"id": f"r{i}", "prompt": "x"})
        await asyncio.sleep(apart)
    await asyncio.sleep(0.1)
    events = world.events()
    assert Counter(event["event"] for event in events) == {"accepted": 10, "error": 5}
    refused = [event for event in events if event["event"] == "error"][-1]
    assert (refused["code"], refused["retryable"], refused["retry_after"], refused["id"]) == (
        "overloaded",
        True,
        1.0,
        "r14",
    )
    assert service.heartbeat().detail == {"accepted": 10, "refused_overloaded": 5}
    # Jobs are not refused: they wait in their stream.
    await asyncio.sleep(0.5)
    seq = await world.job({"prompt": "x"})
    assert not world.results(f"default.job-{seq}")
    world.broker.streams[subjects.STREAM_REQ].consumers[subjects.consumer_req(MODEL, 0)].next_seq = 11
    await asyncio.sleep(1)
    assert [event["event"] for event in world.results(f"default.job-{seq}")] == ["accepted"]
    assert (await world.ask({"prompt": "x"}))["event"] == "accepted"
    await world.stop()


@virtual
async def test_overload_by_the_schedulers() -> None:
    world = World()
    await world.start(max_waiting=10)

    def beat(waiting: int) -> None:
        heartbeat = m.Heartbeat("scheduler", MODEL, "s", 1, 0.1, detail={"waiting": waiting})
        world.bus.publish(subjects.heartbeat("scheduler", MODEL, "s"), codec.encode(heartbeat))

    beat(11)
    await asyncio.sleep(0.6)
    assert (await world.ask({"prompt": "x"}, wait=0.1))["code"] == "overloaded"
    beat(9)
    await asyncio.sleep(0.6)
    assert (await world.ask({"prompt": "x"}, wait=0.1))["event"] == "accepted"
    await world.stop()


@virtual
async def test_too_many_at_a_time() -> None:
    world = World(Faults(latency=0.01))
    await world.start(max_in_flight=4)
    for i in range(10):
        world.send({"id": f"r{i}", "prompt": "x"})
    await asyncio.sleep(1)
    assert Counter(event["event"] for event in world.events()) == {"accepted": 4, "error": 6}
    assert (await world.ask({"prompt": "x"}))["event"] == "accepted"
    await world.stop()


@virtual
async def test_the_longest_sequence_is_that_of_the_workers() -> None:
    world = World()
    await world.start()
    assert (await world.ask({"prompt": [5] * 1100}))["code"] == "context_length_exceeded"
    base = m.Heartbeat("model_worker", MODEL, "w", 1, 0.1)
    beat = m.WorkerHeartbeat(base, 0, 0.0, 1.0, {}, 8, 64, 64, 2000, 4096)
    world.bus.publish(subjects.heartbeat("model_worker", MODEL, "w"), codec.encode(beat))
    await asyncio.sleep(0.5)
    assert (await world.ask({"prompt": [5] * 64}, wait=0.1))["code"] == "context_length_exceeded"
    assert (await world.ask({"prompt": [5] * 63}, wait=0.1))["event"] == "accepted"
    await world.stop()


@virtual
async def test_what_nobody_would_honour_yet_is_refused() -> None:
    """In a rolling upgrade: any scheduler and detokenizer, and of the workers at least one, must know all that a request says."""
    world = World()
    await world.start()
    body = {"prompt": "x", "bad_words": ["y"], "echo": True}

    def beat(stage: str, name: str, known: Fields) -> None:
        base = m.Heartbeat(stage, MODEL, name, 1, 60.0, knows=known)
        beat = base if stage != "model_worker" else m.WorkerHeartbeat(base, 0, 0.0, 1.0, {}, 8, 64, 64, 2000, 4096)
        world.bus.publish(subjects.heartbeat(stage, MODEL, name), codec.encode(beat))

    for stage, several in (("model_worker", True), ("scheduler", False), ("detokenizer", False)):
        beat(stage, "old", {})
        refused = await world.ask(body, wait=0.5)
        assert (refused["code"], refused["retryable"]) == ("unavailable", True) and stage in refused["message"]
        assert (await world.ask({"prompt": "x"}, wait=0.5))["event"] == "accepted"
        beat(stage, "new", KNOWN)
        event = await world.ask(body, wait=0.5)
        assert (event["event"] == "accepted") is several
        beat(stage, "old", KNOWN)
        assert (await world.ask(body, wait=0.5))["event"] == "accepted"
    await world.stop()


@virtual
async def test_large_requests_are_refused_unread() -> None:
    world = World()
    await world.start(max_request_bytes=5000)
    event = await world.ask({"id": "r", "prompt": "x" * 6000})
    assert event["code"] == "payload_too_large"
    await world.stop()


@virtual
async def test_without_a_reply_subject_nothing_happens() -> None:
    world = World()
    service = await world.start()
    world.send({"id": "r", "prompt": "x"}, reply="")
    world.send({"id": "r", "prompt": "x"}, reply=subjects.tok(MODEL, 0))
    world.send({"id": "r", "prompt": "x"}, reply="$JS.API.STREAM.DELETE.REQ")
    await asyncio.sleep(1)
    assert not world.stored(subjects.STREAM_REQ)
    assert not world.stored(subjects.STREAM_TOK)
    assert service.heartbeat().detail == {"dropped": 3}
    await world.stop()


@virtual
async def test_an_unknown_model_is_answered_at_once_and_once() -> None:
    world = World()
    await world.start()
    await world.start()
    await world.start(model="other")
    await asyncio.sleep(1)
    event = await world.ask({"id": "r", "prompt": "x"}, model="nobody", wait=0.2)
    assert (event["code"], event["id"], event["retryable"]) == ("unknown_model", "r", False)
    assert (await world.ask({"prompt": "x"}, model="other"))["event"] == "accepted"
    assert (await world.ask(msgpack.packb({"id": "r"}), model="nobody"))["code"] == "unknown_model"
    assert (await world.ask(b"\xff", model="nobody"))["id"] is None
    await world.stop()


@virtual
async def test_a_model_is_not_called_unknown_while_it_starts_or_restarts() -> None:
    world = World()
    await world.start()
    # Too early to know: it answers when it has listened long enough.
    assert (await world.ask({"prompt": "x"}, model="nobody"))["code"] == "unknown_model"
    for _ in range(20):
        world.inbox.clear()
        world.send({"prompt": "x"}, model="other")  # nobody there yet, or just now
        service = await world.start(model="other")
        for _ in range(20):
            world.send({"prompt": "x"}, model="other")
        await asyncio.sleep(0.5)
        events = [event["event"] for event in world.events()]
        assert 20 <= events.count("accepted") == len(events) <= 21
        await service.drain()
        await service.stop()
        await service.bus.close()
    await asyncio.sleep(2)
    gone = await world.ask({"prompt": "x"}, model="other")
    assert (gone["code"], gone["retryable"]) == ("unavailable", True)
    await world.stop()


@virtual
async def test_copies_share_the_work() -> None:
    world = World()
    for _ in range(3):
        await world.start()
    for i in range(60):
        world.send({"id": f"r{i}", "prompt": "x"})
    await asyncio.sleep(1)
    assert len({event["id"] for event in world.events()}) == len(world.events()) == 60
    assert all(service.heartbeat().detail["accepted"] > 5 for service in world.services)
    await world.stop()


@virtual
async def test_drain_finishes_what_it_has_and_takes_nothing_more() -> None:
    world = World(Faults(latency=0.05))
    service = await world.start()
    for i in range(5):
        world.send({"id": f"r{i}", "prompt": "x"})
    await asyncio.sleep(0.06)
    assert service.heartbeat().in_flight == 5
    await service.drain()
    assert service.heartbeat().in_flight == 0
    world.send({"id": "late", "prompt": "x"})
    await asyncio.sleep(1)
    assert sorted(event["id"] for event in world.events()) == [f"r{i}" for i in range(5)]
    await service.stop()


# ---------------------------------------------------------------- the durable door


@virtual
async def test_a_job() -> None:
    world = World()
    await world.start()
    seq = await world.job({"prompt": "x", "seed": 3})
    [request] = world.stored(subjects.STREAM_REQ)
    assert isinstance(request, m.Request)
    assert (request.key, request.durable, request.reply.subject) == (f"default.job-{seq}", True, "")
    [event] = world.results(f"default.job-{seq}")
    assert (event["event"], event["seed"], event["results"]) == ("accepted", 3, f"llm.v1.results.default.job-{seq}")
    assert not world.broker.streams[subjects.STREAM_JOBS].messages
    await world.job({"id": "mine", "tenant": "t", "prompt": "x"})
    assert [event["id"] for event in world.results("t.mine")] == ["mine"]
    assert not world.inbox
    await world.stop()


@virtual
async def test_wrong_jobs() -> None:
    world = World()
    service = await world.start()
    seq = await world.job(b"{")
    assert [(e["event"], e["code"], e["id"]) for e in world.results(f"default.job-{seq}")] == [
        ("error", "invalid_request", None)
    ]
    await world.job({"id": "bad", "prompt": "x", "temperature": -1})
    assert [e["code"] for e in world.results("default.bad")] == ["invalid_request"]
    # The id of another: its results are left alone.
    await world.job({"id": "taken", "prompt": "x"})
    for body in ({"id": "taken", "prompt": "y"}, {"id": "taken"}):
        seq = await world.job(body)
        assert len(world.results(f"default.job-{seq}")) == 1
    assert [e["event"] for e in world.results("default.taken")] == ["accepted"]
    # Taken by a request of the other door: the results are this job's own.
    await world.ask({"id": "online", "prompt": "x"})
    await world.job({"id": "online", "prompt": "x"})
    assert [e.get("code", e["event"]) for e in world.results("default.online")] == ["accepted", "id_conflict"]
    assert not world.broker.streams[subjects.STREAM_JOBS].messages
    assert service.heartbeat().detail["refused_invalid_request"] == 3
    await world.stop()


@virtual
async def test_a_job_never_passes_for_an_earlier_one_with_its_id() -> None:
    """However long ago that was: JetStream remembers message ids for two minutes only."""
    world = World()
    await world.start()
    await world.job({"id": "night", "prompt": "x"})
    [first] = world.stored(subjects.STREAM_REQ)
    assert isinstance(first, m.Request)
    await asyncio.sleep(200)
    # Nobody knows yet who has the id: the scheduler decides, and tells a refusal where it harms nobody's results.
    seq = await world.job({"id": "night", "prompt": "y"})
    assert [(r.key, r.refused_as) for r in world.stored(subjects.STREAM_REQ)[1:]] == [(first.key, f"job-{seq}")]  # type: ignore[union-attr]
    await asyncio.sleep(200)
    bucket = await world.bus.bucket(subjects.BUCKET_ASSIGN)
    await bucket.create(first.key, codec.encode(m.Tombstone(1, 1, "finished", first.body_hash)))
    seq = await world.job({"id": "night", "prompt": "z"})
    assert [e["code"] for e in world.results(f"default.job-{seq}")] == ["id_conflict"]
    assert [e["event"] for e in world.results("default.night")] == ["accepted"]
    assert len(world.stored(subjects.STREAM_REQ)) == 2
    assert not world.broker.streams[subjects.STREAM_JOBS].messages
    await world.stop()


@pytest.mark.parametrize("fault", ["lose_append", "late_append", "lose_ack", "drop"])
@virtual
async def test_jobs_are_neither_lost_nor_doubled(fault: str) -> None:
    world = World(Faults(max_delay=0.05))
    await world.start()
    bodies = [{"id": f"j{i}", "prompt": "x"} if i % 3 else {"id": f"j{i}", "prompt": "x", "n": 0} for i in range(60)]
    for body in bodies:
        await world.bus.append(subjects.jobs(MODEL), json.dumps(body).encode())
    setattr(world.broker.faults, fault, 0.3)
    await asyncio.sleep(60)
    world.broker.faults = Faults()
    await asyncio.sleep(60)
    assert not world.broker.streams[subjects.STREAM_JOBS].messages
    for i, body in enumerate(bodies):
        assert [e["event"] for e in world.results(f"default.{body['id']}")] == ["accepted" if i % 3 else "error"]
    keys = [request.key for request in world.stored(subjects.STREAM_REQ)]
    assert sorted(keys) == sorted(f"default.j{i}" for i in range(60) if i % 3)
    assert not world.stored(subjects.STREAM_TOK)
    await world.stop()


@virtual
async def test_jobs_wait_while_the_disk_is_full() -> None:
    world = World()
    await world.start()
    broker = world.broker
    broker.append(subjects.jobs(MODEL), b'{"id": "j", "prompt": "x"}', None, None)
    broker.disk_full = True
    await asyncio.sleep(5)
    assert not world.stored(subjects.STREAM_REQ)
    broker.disk_full = False
    await asyncio.sleep(5)
    assert [request.key for request in world.stored(subjects.STREAM_REQ)] == ["default.j"]
    assert [e["event"] for e in world.results("default.j")] == ["accepted"]
    await world.stop()


# ---------------------------------------------------------------- with threads, in real time


async def test_a_long_prompt_stalls_nobody() -> None:
    world = World()
    await world.start(context=10**7, inline_bytes=8192)
    world.send({"id": "long", "prompt": " ".join(f"word{i}" for i in range(150_000))})
    for i in range(20):
        world.send({"id": f"r{i}", "prompt": "x"})
    async with asyncio.timeout(30):
        while len(world.inbox) < 21:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert [event["id"] for event in world.events()][-1] == "long"
    assert {event["event"] for event in world.events()} == {"accepted"}
    await world.stop()


async def test_starting_without_the_model(tmp_path: Path) -> None:
    service = TokenizerService(MemoryBus(MemoryBroker()), TokenizerSettings(model_path=str(tmp_path / "none")))
    with pytest.raises(Exception, match="missing_file"):
        await service.start()
    await service.stop()


@virtual
async def test_it_starts_though_the_first_answers_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    lost = lose_first_attempts(monkeypatch)
    await world.start()
    assert {what.split()[0] for what in lost} == {"bucket", "consume"}
    assert (await world.ask({"id": "r", "prompt": "x"}))["event"] == "accepted"
    await world.stop()


# ---------------------------------------------------------------- structured output (with threads, so in real time)


async def answer_to(world: World, body: dict[str, Any], reply: str = "inbox.a") -> dict[str, Any]:
    world.send(body, reply=reply)
    async with asyncio.timeout(20):
        while not (events := world.events(reply)):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return events[0]


async def test_a_constraint_is_compiled_before_the_request_is_accepted() -> None:
    world = World()
    await world.start()
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    good = await answer_to(world, dict(prompt="x", structured={"json_schema": schema}), "inbox.good")
    assert good["event"] == "accepted"
    (stored,) = world.stored(subjects.STREAM_REQ)
    assert isinstance(stored, m.Request) and stored.constraint == json_constraint(schema)
    bad = {
        "regex": ({"regex": "(["}, "regex"),
        "schema": ({"json_schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        "grammar": ({"grammar": "start: missing"}, "missing"),
        "two": ({"regex": "a", "json_object": True}, "exactly one"),
        "large": ({"regex": "a" * 70_000}, "bytes"),
    }
    for name, (structured, reason) in bad.items():
        event = await answer_to(world, dict(prompt="x", structured=structured), f"inbox.{name}")
        assert (event["event"], event["code"]) == ("error", "invalid_request")
        assert reason in event["message"]
    assert len(world.stored(subjects.STREAM_REQ)) == 1
    await world.stop()


async def test_a_slow_constraint_stalls_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both threads are taken by constraints that do not end in time; others are accepted, or told that there are too many."""
    compile_, go = Vocabulary.compile, threading.Event()

    def compiled(self: Vocabulary, constraint: str) -> Matcher:
        if "slow" in constraint:
            assert go.wait(60)
        return compile_(self, constraint)

    monkeypatch.setattr(Vocabulary, "compile", compiled)
    world = World()
    await world.start(constraint_timeout=1.0, max_constraints=3)
    choice = {"choice": ["quick"]}
    assert (await answer_to(world, dict(prompt="x", structured=choice), "inbox.first"))["event"] == "accepted"
    for name in ("s1", "s2"):
        world.send(dict(prompt="x", structured={"choice": [f"slow {name}"]}), reply=f"inbox.{name}")
    plain = await answer_to(world, dict(prompt="x"), "inbox.plain")
    assert plain["event"] == "accepted"
    known = await answer_to(world, dict(prompt="y", structured=choice), "inbox.known")
    assert known["event"] == "accepted", "what was found good is not compiled again"
    for name in ("s1", "s2"):
        async with asyncio.timeout(20):
            while not (events := world.events(f"inbox.{name}")):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert events[0]["code"] == "invalid_request" and "1 s" in events[0]["message"]
    order = [subject for subject, _ in world.inbox]
    assert max(order.index("inbox.plain"), order.index("inbox.known")) < min(
        order.index("inbox.s1"), order.index("inbox.s2")
    )
    third = await answer_to(world, dict(prompt="x", structured={"choice": ["other"]}), "inbox.third")
    assert third["code"] == "overloaded" and third["retryable"], "it waits for a thread in vain"
    # Of three places to wait in a tenant has two.
    waiting = ["default", "default", "other"]
    for number, tenant in enumerate(waiting):
        world.send(dict(prompt="x", tenant=tenant, structured={"choice": [f"w{number}"]}), reply=f"inbox.w{number}")
    for tenant in ("default", "other"):
        body = dict(prompt="x", tenant=tenant, structured={"choice": ["one too many"]})
        refused = await answer_to(world, body, f"inbox.{tenant}")
        assert refused["code"] == "overloaded" and refused["retryable"]
    go.set()
    for number in range(len(waiting)):
        async with asyncio.timeout(20):
            while not (events := world.events(f"inbox.w{number}")):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert events[0]["event"] == "accepted"
    await world.stop()


async def test_an_error_of_a_constraint_names_the_field_that_it_came_from() -> None:
    world = World()
    await world.start(tool_format="hermes")
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    for name, strict, choice in (("tool_choice", False, "required"), ("tools", True, "auto")):
        tools = [{"name": "f", "parameters": schema, "strict": strict}]
        body = dict(messages=[dict(role="user", content="x")], tools=tools, tool_choice=choice)
        event = await answer_to(world, body, f"inbox.{name}")
        assert event["code"] == "invalid_request" and event["message"].startswith(f"{name}: "), event
        assert "uniqueItems" in event["message"]
    await world.stop()
