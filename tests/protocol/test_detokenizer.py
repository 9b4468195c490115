"""The detokenizer stage on the in-memory bus, in virtual time: exact streams whatever is lost, and whoever owns a partition."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import msgpack
import pytest

from services.detokenizer import parts
from services.detokenizer.answer import Answer
from services.detokenizer.ownership import partitions_of
from services.detokenizer.service import DetokenizerService
from services.detokenizer.settings import DetokenizerSettings
from shared import codec, subjects
from shared import messages as m
from shared.broker import Broker
from shared.bus import HEADROOM, BusTimeout, Message
from shared.errors import ErrorCode, GorgonError
from shared.memory_bus import Faults
from shared.nats_bus import NatsBus
from shared.streams import ensure_streams
from tests.protocol.detokenizer_world import EOS, MODEL, STEP, Letters, Plan, World
from tests.protocol.virtual import until, virtual

LOSSY = dict(drop=0.03, duplicate=0.03, delay=0.05, max_delay=0.3, lose_append=0.02, lose_ack=0.02, late_append=0.01)


def letters(text: str) -> list[int]:
    return [ord(c) - ord("a") for c in text]


async def ask(world: World, key: str, **fields: Any) -> list[dict[str, Any]]:
    """A raw client's replay question in JSON; what comes within 0.3 s."""
    events: list[dict[str, Any]] = []
    inbox = f"_INBOX.raw{len(world.broker.clients)}-{asyncio.get_running_loop().time()}"
    subscription = await world.bus.subscribe(inbox, lambda message: events.append(json.loads(message.data)))
    tenant, request_id = subjects.split_request_key(key)
    question = json.dumps(dict(id=request_id, tenant=tenant) | fields).encode()
    world.bus.publish(subjects.replay(MODEL, world.backend.partition(key)), question, reply=inbox)
    await asyncio.sleep(0.3)
    await subscription.unsubscribe()
    return events


@virtual
async def test_a_stream_from_request_to_tombstone_and_archive():
    async with World() as world, world.client() as client:
        service = await world.detokenizer("a")
        await until(lambda: world.serving(service))
        plan = world.plan("r", choices=[[*letters("hello"), EOS]], finish="stop")
        stream = client.generate("x", id="r")
        await world.check(stream, plan)
        assert plan.expected(0) == ([*letters("hello"), EOS], "hello", "stop", EOS)
        result = await stream.result()
        assert result.metadata == {"note": "default.r"}
        assert result.timings["queue_ms"] == 3.0
        assert 3.0 <= result.timings["ttft_ms"] <= 3.0 + STEP * 1000
        assert result.timings["total_ms"] - result.timings["ttft_ms"] == pytest.approx(5 * STEP * 1000, abs=0.1)
        (partition,) = [p for p in service.partitions.values() if p.core.request("default.r")]
        await until(lambda: "default.r" in partition.core.archived)
        assert partition.core.answers == {}
        tombstone = await world.tombstone("default.r")
        assert tombstone == m.Tombstone(7, 1, "finished", b"", 6)
        # Only the archive knows the text now.
        tokens, finished = await ask(world, "default.r")
        assert (tokens["ids"], tokens["text"]) == ([*letters("hello"), EOS], "hello")
        assert finished["event"] == "finished" and finished["choices"][0]["chars"] == 5


@virtual
async def test_the_tombstone_keeps_the_body_hash_of_the_assignment():
    async with World() as world, world.client() as client:
        await world.detokenizer("a")
        bucket = await world.bus.bucket(subjects.BUCKET_ASSIGN)
        await bucket.create("default.r", codec.encode(m.Assignment(7, 1, "w", b"hash")))
        world.plan("r", choices=[[1, 2]])
        await client.generate("x", id="r").result()
        await asyncio.sleep(0.5)
        tombstone = await world.tombstone("default.r")
        assert tombstone is not None and tombstone.body_hash == b"hash"


@virtual
async def test_a_tombstone_replaces_the_assignment_that_open_names_without_a_look(monkeypatch: pytest.MonkeyPatch):
    async with World() as world, world.client() as client:
        await world.detokenizer("a")
        bucket = await world.bus.bucket(subjects.BUCKET_ASSIGN)
        looks: list[str] = []
        get = type(bucket).get

        async def counted(self: Any, key: str) -> Any:
            looks.append(key)
            return await get(self, key)

        monkeypatch.setattr(type(bucket), "get", counted)
        changed = {
            "as it was": None,
            "being migrated": m.Assignment(7, 2, "", b"hash"),
            "of a later request": m.Assignment(8, 1, "w", b"other"),
            "ended": m.Tombstone(7, 1, "cancelled", b"hash"),
        }
        for number, (case, value) in enumerate(changed.items()):
            key = f"default.{number}"
            world.backend.revisions[key] = await bucket.create(key, codec.encode(m.Assignment(7, 1, "w", b"hash")))
            if value is not None:
                await bucket.put(key, codec.encode(value))
            world.plan(str(number), choices=[[1, 2]])
            await client.generate("x", id=str(number)).result()
            await asyncio.sleep(0.5)
            looked = [k for k in looks if k == key]
            assert bool(looked) == (value is not None), case
            entry = await get(bucket, key)
            assert entry is not None
            left, ended = codec.decode(entry.value), m.Tombstone(7, 1, "finished", b"hash", 2)
            assert left == (value if case in ("of a later request", "ended") else ended), case


@pytest.mark.parametrize("seed", range(12))
@virtual
async def test_streams_are_exact_over_a_lossy_bus(seed):
    async with World(seed, Faults(**LOSSY)) as world, world.client(accept_timeout=60) as client:
        await world.detokenizer("a")
        await world.detokenizer("b")
        plans = {f"r{i}": world.random_plan(f"r{i}") for i in range(24)}
        streams = {name: client.generate("x", id=name, n=len(plan.choices)) for name, plan in plans.items()}
        await asyncio.gather(*(world.check(streams[name], plan) for name, plan in plans.items()))


@pytest.mark.parametrize("seed", range(8))
@virtual
async def test_owners_crash_and_come_back_under_load(seed):
    """Every stream exact, stop strings included, with snapshots, takeovers and moments of two owners."""
    async with World(seed, Faults(**LOSSY)) as world, world.client(accept_timeout=60) as client:
        for name in "abc":
            await world.detokenizer(name)
        plans = {f"r{i}": world.random_plan(f"r{i}") for i in range(24)}
        for plan in plans.values():
            plan.choices = [ids[:-1] * 3 + ids[-1:] for ids in plan.choices]
        streams = {name: client.generate("x", id=name, n=len(plan.choices)) for name, plan in plans.items()}
        checks = asyncio.gather(*(world.check(streams[name], plan) for name, plan in plans.items()))
        for round in range(4):
            await asyncio.sleep(world.random.uniform(0.1, 0.8))
            await world.crash(world.random.choice(world.services))
            await world.detokenizer(f"n{round}")
        await checks
        # All is settled: every request has its tombstone, whoever wrote it.
        for name in plans:
            await until_tombstone(world, f"default.{name}")


async def until_tombstone(world: World, key: str) -> m.Tombstone:
    async with asyncio.timeout(30):
        while (tombstone := await World.retry(lambda: world.tombstone(key))) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    return tombstone


@virtual
async def test_takeover_starts_from_the_snapshot_and_goes_on_without_waiting_for_the_client():
    async with World() as world, world.client() as client:
        first = await world.detokenizer("a")
        await until(lambda: world.serving(first))
        plan = world.plan("r", choices=[list(range(26)) * 8])
        stream = client.generate("x", id="r")
        await asyncio.sleep(2.0)
        await world.crash(first)
        number = world.backend.partition("default.r")
        bucket = await world.bus.bucket(subjects.BUCKET_SNAPSHOT)
        assert await bucket.get(subjects.snapshot_key(MODEL, number)) is not None
        events: list[dict[str, Any]] = []
        await world.bus.subscribe(client.inbox, lambda message: events.extend(msgpack.unpackb(message.data)))
        second = await world.detokenizer("b")
        read: list[int] = []
        fold = second.partitions
        await until(lambda: number in fold)
        partition = fold[number]
        inner = partition.fold
        partition.fold = lambda stored: (read.append(stored.seq), inner(stored))[1]  # type: ignore[method-assign]
        await world.check(stream, plan)
        entries = world.broker.stream(subjects.STREAM_TOK).count(subjects.tok(MODEL, number), 1)
        assert 0 < len(read) < entries - 50, "the new owner read everything from the beginning"
        assert events[0]["position"] > 50, "what had been sent long ago was sent again"


POISON = 60


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    feed = Letters.feed

    def raises(self: Letters, ids: Iterable[int]) -> str:
        if POISON in ids:
            raise RuntimeError("no such piece")
        return feed(self, ids)

    monkeypatch.setattr(Letters, "feed", raises)


@pytest.mark.parametrize("last", [False, True], ids=["in the middle", "in the entry of the end"])
@virtual
async def test_an_answer_that_cannot_be_made_fails_alone_and_with_every_owner(
    monkeypatch: pytest.MonkeyPatch, last: bool
) -> None:
    poison(monkeypatch)
    async with World(partitions=1) as world, world.client() as client:
        first = await world.detokenizer("a")
        await until(lambda: world.serving(first))
        good = world.plan("good", choices=[list(range(26)) * 8])
        world.plan("bad", choices=[[1, 2, 3, POISON] if last else [1, 2, 3, POISON, *[4] * 200]])
        streams = {name: client.generate("x", id=name) for name in ("good", "bad")}
        with pytest.raises(GorgonError) as failed:
            async for _ in streams["bad"]:
                pass
        assert failed.value.code == ErrorCode.INTERNAL and not failed.value.retryable
        state = await until(lambda: (s := world.backend.state("default.bad")) and s.terminal and s)
        assert state.terminal.reason == ("finished" if last else "error"), "what the log says first stands"
        await asyncio.sleep(1.0)
        told = await ask(world, "default.bad")
        await world.crash(first)
        second = await world.detokenizer("b")
        await until(lambda: world.serving(second))
        again = await ask(world, "default.bad")
        assert (
            [(e["event"], e["code"]) for e in told]
            == [(e["event"], e["code"]) for e in again]
            == [("error", "internal")]
        )
        await world.check(streams["good"], good)
        await until(lambda: "default.bad" in second.partitions[0].core.archived)
        assert [(e["event"], e["code"]) for e in await ask(world, "default.bad")] == [("error", "internal")]


@virtual
async def test_a_broken_answer_is_broken_in_a_snapshot_too_and_the_next_owner_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its owner dies before it could tell the log."""
    poison(monkeypatch)
    monkeypatch.setattr(Answer, "undeclared_failure", lambda self: None)
    async with World(partitions=1) as world, world.client() as client:
        first = await world.detokenizer("a")
        await until(lambda: world.serving(first))
        world.plan("bad", choices=[[1, 2, 3, POISON, *[4] * 20]])
        stream = client.generate("x", id="bad")
        await until(lambda: any(a.broken for a in first.partitions[0].core.answers.values()))
        assert not first.partitions[0].core.answers["default.bad"].ended
        world.backend.paused = True
        await first.partitions[0]._save()
        await world.crash(first)
        monkeypatch.undo()
        poison(monkeypatch)
        second = await world.detokenizer("b")
        await until(lambda: world.serving(second))
        with pytest.raises(GorgonError) as failed:
            await stream.result()
        assert failed.value.code == ErrorCode.INTERNAL
        assert world.backend.state("default.bad").terminal.reason == "error"


@virtual
async def test_a_snapshot_ahead_of_the_stream_is_discarded():
    """NATS came back with an older disk: the snapshot promises entries that do not exist any more."""
    async with World(partitions=1) as world, world.client() as client:
        first = await world.detokenizer("a")
        plan = world.plan("r", choices=[[1] * 60])
        stream = client.generate("x", id="r")
        await asyncio.sleep(1.5)
        await world.crash(first)
        tok = world.broker.stream(subjects.STREAM_TOK)
        for seq in [s for s in tok.messages if s > 10]:
            tok.delete(seq)
        tok.last_seq = 10
        world.backend.paused = True
        second = await world.detokenizer("b")
        await until(lambda: world.serving(second))
        core = second.partitions[0].core
        assert 10 <= core.seq <= 11
        assert len(core.answers["default.r"].state.choices[0].ids) == 9
        del stream, plan


async def crash_and_lose_the_log(world: World, detokenizer: DetokenizerService) -> None:
    """Request r is still live, and nothing of the log is there but what a snapshot holds."""
    await world.crash(detokenizer)
    assignments = await world.bus.bucket(subjects.BUCKET_ASSIGN)
    await assignments.create("default.r", codec.encode(m.Assignment(7, 1, "w", b"")))
    tok = world.broker.stream(subjects.STREAM_TOK)
    tok.trim(tok.last_seq + 1)


@virtual
async def test_a_snapshot_is_kept_when_the_log_before_it_is_trimmed():
    async with World(partitions=1) as world, world.client() as client:
        first = await world.detokenizer("a")
        plan = world.plan("r", choices=[[1] * 100])
        stream = client.generate("x", id="r")
        await asyncio.sleep(1.5)
        world.backend.paused = True
        await asyncio.sleep(1.0)
        await crash_and_lose_the_log(world, first)
        second = await world.detokenizer("b")
        await until(lambda: world.serving(second))
        world.backend.paused = False
        await world.check(stream, plan)


@virtual
async def test_a_snapshot_larger_than_a_message_is_stored_in_parts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shared.memory_bus.MAX_PAYLOAD", HEADROOM + 60_000)
        patch.setattr(parts, "PART_BYTES", 50_000)
        async with World(partitions=1) as world, world.client() as client:
            first = await world.detokenizer("a")
            ids = [i % 26 for i in range(6000)]
            plan = world.plan("r", choices=[ids], per_step=20)
            world.backend.open("default.r", m.ReplyTo(client.inbox, "msgpack", batched=True), False, logprobs=True)
            stream = client.generate("x", id="r")
            await asyncio.sleep(4.0)
            world.backend.paused = True
            await asyncio.sleep(4.0)
            await crash_and_lose_the_log(world, first)
            bucket = await world.bus.bucket(subjects.BUCKET_SNAPSHOT)
            assert len(await parts.get(bucket, subjects.snapshot_key(MODEL, 0)) or b"") > 60_000
            second = await world.detokenizer("b")
            await until(lambda: world.serving(second))
            world.backend.paused = False
            await world.check(stream, plan)
            # So is the archive.
            await until(lambda: "default.r" in second.partitions[0].core.archived)
            assert [i for e in await ask(world, "default.r") if e["event"] == "tokens" for i in e["ids"]] == ids


@virtual
async def test_parts_of_two_values_are_never_taken_for_one():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shared.memory_bus.MAX_PAYLOAD", HEADROOM + 60_000)
        patch.setattr(parts, "PART_BYTES", 50_000)
        async with World(partitions=1) as world:
            bucket = await world.bus.bucket(subjects.BUCKET_SNAPSHOT)
            assert await parts.get(bucket, "k") is None
            values = [bytes([n]) * size for n, size in enumerate((70_000, 200_000, 10, 130_000, 120_000))]
            for value in values:
                await parts.put(bucket, "k", value)
                assert await parts.get(bucket, "k") == value

            # A writer that dies half-way leaves the value as it is.
            class Dies:
                get, left = bucket.get, 2

                async def put(self, key: str, value: bytes, ttl: float | None = None) -> int:
                    if len(value) <= 60_000:
                        self.left -= 1
                    if not self.left:
                        raise BusTimeout("dead")
                    return await bucket.put(key, value, ttl)

            with pytest.raises(BusTimeout):
                await parts.put(Dies(), "k", b"x" * 200_000)  # type: ignore[arg-type]
            assert await parts.get(bucket, "k") == values[-1]
            (place,) = {e.key.split(".")[2] for e in await bucket.entries() if e.value == values[-1][:50_000]}
            await bucket.put(f"k.part.{place}.1", b"of another")
            with pytest.raises(ValueError, match="several values"):
                await parts.get(bucket, "k")


@virtual
async def test_what_ended_in_a_part_of_the_log_that_is_gone_ends_and_what_goes_on_goes_on():
    async with World(partitions=1) as world, world.client() as client:
        assignments = await world.bus.bucket(subjects.BUCKET_ASSIGN)
        first = await world.detokenizer("a", snapshot_interval=0.1)
        for name in ("ended", "forgotten", "lives"):
            world.plan(name, choices=[[1] * 5000])
            if name != "forgotten":
                await assignments.create(f"default.{name}", codec.encode(m.Assignment(7, 1, "w", b"")))
        streams = {name: client.generate("x", id=name) for name in ("ended", "forgotten", "lives")}
        await asyncio.sleep(2.0)
        await world.crash(first)
        await world.backend.append(m.End("default.ended", "cancelled"), 0)
        await world.backend.append(m.End("default.forgotten", "cancelled"), 0)
        await assignments.put("default.ended", codec.encode(m.Tombstone(7, 1, "cancelled", b"")))
        await asyncio.sleep(1.0)
        tok = world.broker.stream(subjects.STREAM_TOK)
        tok.trim(tok.last_seq + 1)
        await world.detokenizer("b")
        for name in ("ended", "forgotten"):
            with pytest.raises(GorgonError) as failed:
                async with asyncio.timeout(30):
                    await streams[name].result()
            assert failed.value.code == ErrorCode.INTERNAL
        assert not streams["lives"].done
        assert await world.tombstone("default.lives") is None


async def blind_after(world: World, change: Callable[[], Any]) -> None:
    """Followers that wake within a moment after the change see nothing for some seconds."""
    world.broker.faults.blind, world.broker.faults.max_blind = 1.0, 10.0
    change()
    await asyncio.sleep(2 * STEP)
    world.broker.faults.blind = 0.0


@virtual
async def test_an_owner_that_sees_nothing_denies_nothing():
    async with World(partitions=1) as world:
        service = await world.detokenizer("a")
        await until(lambda: world.serving(service))
        plan = world.plan("r", choices=[[1] * 20])
        await blind_after(world, lambda: world.backend.open("default.r", m.ReplyTo("nobody", "json"), durable=False))
        assert service.partitions[0].core.request("default.r") is None, "it is not blind"
        events: list[dict[str, Any]] = []
        await world.bus.subscribe("_INBOX.asker", lambda message: events.append(json.loads(message.data)))
        for key in ("r", "unknown"):
            world.bus.publish(subjects.replay(MODEL, 0), json.dumps({"id": key}).encode(), reply="_INBOX.asker")
        await asyncio.sleep(0.3)
        assert service.partitions[0].core.request("default.r") is None and events == []
        await until(lambda: len(events) >= 2)
        assert service.partitions[0].core.request("default.r") is not None
        assert [(e["id"], e["event"]) for e in events if e["id"] == "unknown"] == [("unknown", "error")]
        assert {e["event"] for e in events if e["id"] == "r"} == {"tokens", "finished"}
        assert [i for e in events if e["event"] == "tokens" for i in e["ids"]] == plan.choices[0]


@virtual
async def test_a_partition_is_given_up_only_to_an_owner_that_has_caught_up():
    """One that was cut off believes, when it is back, that it has been the owner all the time."""
    async with World(partitions=1) as world, world.client() as client:
        name, other = sorted("ab", key=lambda name: partitions_of(name, frozenset("ab"), MODEL, 1), reverse=True)
        service = await world.detokenizer(name)
        await until(lambda: world.serving(service))
        world.broker.disconnect(service.bus)  # type: ignore[arg-type]
        second = await world.detokenizer(other)
        await until(lambda: world.serving(second))
        plan = world.plan("r", choices=[[1] * 600])
        stream = client.generate("x", id="r")
        came: list[float] = []
        checked = asyncio.create_task(world.check(stream, plan))
        await asyncio.sleep(1.0)
        stream._on_change = lambda: came.append(asyncio.get_running_loop().time())
        await blind_after(world, lambda: world.broker.reconnect(service.bus))  # type: ignore[arg-type]
        assert service.partitions[0].serving and service.partitions[0].core.request("default.r") is None
        await until(lambda: not second.partitions)
        assert service.partitions[0].core.request("default.r") is not None, "it was given up to one that was behind"
        await checked
        assert max(b - a for a, b in itertools.pairwise(came)) < 0.5


@virtual
async def test_what_ends_as_its_partition_is_given_up_is_settled():
    """It is delivered by the last snapshot, which is saved when all tasks have been cancelled."""
    async with World(partitions=1, snapshot_interval=1000.0) as world, world.client() as client:
        service = await world.detokenizer("a")
        await until(lambda: world.serving(service))
        world.plan("r", choices=[[1] * 1000])
        stream = client.generate("x", id="r")
        await until(lambda: stream.cursors)
        partition = service.partitions[0]
        deliver, partition.deliver = partition.deliver, lambda: None  # type: ignore[method-assign]
        await world.backend.append(m.End("default.r", "cancelled"), 0)
        await until(lambda: partition.core.answers["default.r"].ended)
        partition.deliver = deliver  # type: ignore[method-assign]
        await service._give_up(0)
        assert (await stream.result()).status == "cancelled"
        await until_tombstone(world, "default.r")
        await asyncio.sleep(1.0)
        assert service.failed is not None and not service.failed.done()


@virtual
async def test_two_owners_at_once_harm_nobody():
    """Each sees itself alone: both own everything, all the time."""
    async with World(3) as world, world.client() as client:
        for name in "ab":
            service = await world.detokenizer(name)
            service._fleet.saw = lambda beat, now: None  # type: ignore[method-assign]
        plans = {f"r{i}": world.random_plan(f"r{i}") for i in range(16)}
        durable = Plan([list(range(26)) * 6])
        world.backend.plans["d"] = durable
        world.backend.open("default.d", m.ReplyTo("", "json"), durable=True)
        streams = {name: client.generate("x", id=name, n=len(plan.choices)) for name, plan in plans.items()}
        await until(lambda: all(world.serving(s) for s in world.services))
        await asyncio.gather(*(world.check(streams[name], plan) for name, plan in plans.items()))
        await check_durable(world, "default.d", durable)


async def check_durable(world: World, key: str, plan: Plan) -> None:
    """The stored events, as they lie there, are exact: no reader has to fold them."""
    await until(lambda: any(e["event"] == "finished" for e in stored(world, key)), within=120)
    await asyncio.sleep(5)
    events = stored(world, key)
    assert [e["event"] for e in events] == ["tokens"] * (len(events) - 1) + ["finished"]
    for index in range(len(plan.choices)):
        ids, text = [], ""
        for event in events[:-1]:
            if event["choice"] == index:
                assert (event["position"], event["offset"]) == (len(ids), len(text))
                ids += event["ids"]
                text += event["text"]
        assert (ids, text) == plan.expected(index)[:2]


def stored(world: World, key: str) -> list[dict[str, Any]]:
    messages = world.broker.stream(subjects.STREAM_RESULTS).messages.values()
    return [json.loads(s.data) for s in messages if s.subject == subjects.results(key)]


@pytest.mark.parametrize("seed", range(10))
@virtual
async def test_durable_results_are_stored_once_and_in_order_across_takeovers(seed):
    async with World(seed, Faults(**LOSSY), partitions=2) as world:
        await world.detokenizer("a")
        await world.detokenizer("b")
        plans = {}
        for i in range(6):
            plan = plans[f"default.d{i}"] = world.random_plan(f"d{i}")
            plan.choices = [ids[:-1] * 4 + ids[-1:] for ids in plan.choices]
            world.backend.open(f"default.d{i}", m.ReplyTo("", "json"), durable=True)
        for round in range(3):
            await asyncio.sleep(world.random.uniform(0.3, 1.0))
            await world.crash(world.random.choice(world.services))
            await world.detokenizer(f"n{round}")
        for key, plan in plans.items():
            await check_durable(world, key, plan)


@virtual
async def test_a_jobs_tombstone_lives_as_long_as_its_results():
    async with World(attach_window=5.0, results_max_age=1000.0) as world:
        await world.detokenizer("a")
        for name, durable in (("d", True), ("r", False)):
            world.plan(name, choices=[[1] * 5])
            world.backend.open(f"default.{name}", m.ReplyTo("", "json"), durable=durable)
            await until_tombstone(world, f"default.{name}")
        await asyncio.sleep(1000.0)
        assert await world.tombstone("default.d") is not None
        assert await world.tombstone("default.r") is None


@virtual
async def test_durable_tokens_share_stored_events():
    async with World() as world:
        await world.detokenizer("a")
        plan = world.plan("d", choices=[[1] * 500], per_step=8)
        world.backend.open("default.d", m.ReplyTo("", "json"), durable=True)
        await check_durable(world, "default.d", plan)
        assert len(stored(world, "default.d")) <= 500 / 64 + 4


@pytest.mark.parametrize("stored_first", [True, False])
@virtual
async def test_a_stop_string_whose_owner_dies_before_it_could_say_so(stored_first):
    """The old owner shows the text up to the stop string and dies with END unsent; the new one finds the same end."""
    async with World(partitions=1, snapshot_interval=0.1 if stored_first else 100) as world, world.client() as client:
        first = await world.detokenizer("a")
        await until(lambda: world.serving(first))
        first.partitions[0]._append = lambda entry: None  # type: ignore[method-assign]
        plan = world.plan("r", choices=[letters("abcdefxyz" + "q" * 200)], stops=("fx",))
        stream = client.generate("x", id="r")
        await until(lambda: first.partitions[0].core.answers.get("default.r", None))
        answer: Answer = first.partitions[0].core.answers["default.r"]
        await until(lambda: answer.streams[0].matched)
        await asyncio.sleep(0.3)
        assert world.backend.state("default.r").terminal is None
        await world.crash(first)
        await world.detokenizer("b")
        await world.check(stream, plan)
        assert world.backend.state("default.r").choices[0].finish == "stop_string"
        assert world.backend.state("default.r").choices[0].length == 7
        assert (await until_tombstone(world, "default.r")).completion_tokens == 7


@pytest.mark.parametrize("per_step", [1, 4, 100])
@virtual
async def test_length_in_the_entry_of_the_stop_string_is_told_as_stop(per_step):
    async with World() as world, world.client() as client:
        await world.detokenizer("a")
        plan = world.plan("r", choices=[letters("abcdez")], stops=("ez",), per_step=per_step)
        await world.check(client.generate("x", id="r"), plan)
        assert plan.expected(0)[2:] == ("stop", "ez")


async def watch_for_unserved(world: World) -> None:
    """Returns when a partition is served by nobody."""
    everything = set(range(world.partitions))
    while {n for s in world.services for n, p in s.partitions.items() if p.serving} == everything:  # noqa: ASYNC110
        await asyncio.sleep(0.001)


@virtual
async def test_drain_hands_over_without_a_gap():
    async with World() as world, world.client() as client:
        first = await world.detokenizer("a")
        await until(lambda: world.serving(first))
        asked: list[Message] = []
        for number in range(world.partitions):
            await world.bus.subscribe(subjects.replay(MODEL, number), asked.append)
        plans = {f"r{i}": world.plan(f"r{i}", choices=[[1] * 150]) for i in range(12)}
        streams = {name: client.generate("x", id=name) for name in plans}
        checks = asyncio.gather(*(world.check(streams[name], plan) for name, plan in plans.items()))
        await asyncio.sleep(0.5)
        loop = asyncio.get_running_loop()
        watching = loop.create_task(watch_for_unserved(world))
        second = await world.detokenizer("b")
        await until(lambda: world.serving(first, second))
        await first.drain()
        await first.stop()
        await until(lambda: world.serving(second))
        watching.cancel()
        assert not watching.done(), "there was a moment without an owner"
        await checks
        assert asked == [], "a client had to ask for what it missed"


@virtual
async def test_the_last_detokenizer_drains_at_once_and_leaves_its_state():
    async with World() as world, world.client() as client:
        first = await world.detokenizer("a", snapshot_interval=1000)
        plan = world.plan("r", choices=[[1] * 100])
        stream = client.generate("x", id="r")
        await asyncio.sleep(1.0)
        began = asyncio.get_running_loop().time()
        await first.drain()
        await first.stop()
        world.services.remove(first)
        assert asyncio.get_running_loop().time() - began < 0.2
        bucket = await world.bus.bucket(subjects.BUCKET_SNAPSHOT)
        assert await bucket.get(subjects.snapshot_key(MODEL, world.backend.partition("default.r"))) is not None
        await world.detokenizer("b")
        await world.check(stream, plan)


@virtual
async def test_silence_of_others_proves_nothing_while_the_own_link_is_down():
    async with World() as world:
        first, second = await world.detokenizer("a"), await world.detokenizer("b")
        await until(lambda: world.serving(first, second))
        owned = set(first.partitions)
        world.broker.disconnect(first.bus)  # type: ignore[arg-type]
        await asyncio.sleep(3.0)
        assert set(first.partitions) == owned
        await until(lambda: set(second.partitions) == set(range(world.partitions)))
        world.broker.reconnect(first.bus)  # type: ignore[arg-type]
        await asyncio.sleep(0.3)
        assert set(first.partitions) == owned
        await until(lambda: world.serving(first, second))


# ---------------------------------------------------------------- questions


@virtual
async def test_replay_from_a_cursor_of_running_ended_and_unknown_requests():
    async with World() as world:
        await world.detokenizer("a")
        world.plan("r", choices=[letters("abcdefghij")])
        world.backend.open("default.r", m.ReplyTo("nobody.there", "json"), durable=False)
        await asyncio.sleep(0.5)
        tokens, finished = await ask(world, "default.r", cursors=[dict(choice=0, position=4, offset=4)])
        assert (tokens["position"], tokens["ids"], tokens["offset"], tokens["text"]) == (
            4,
            letters("efghij"),
            4,
            "efghij",
        )
        assert finished["event"] == "finished"
        (finished,) = await ask(world, "default.r", stream=False)
        assert (finished["choices"][0]["text"], finished["choices"][0]["ids"]) == ("abcdefghij", letters("abcdefghij"))
        (unknown,) = await ask(world, "default.unknown")
        assert (unknown["event"], unknown["code"], unknown["id"]) == ("error", "not_found", "unknown")
        (bad,) = await ask(world, "default.r", cursor=3)
        assert bad["code"] == "invalid_request" and "cursor" in bad["message"]
        wrong = msgpack.packb(dict(id="r", cursor=3))  # refused in the question's own encoding
        answer = await world.bus.request(subjects.replay(MODEL, world.backend.partition("default.r")), wrong, 1.0)
        assert msgpack.unpackb(answer.data)["code"] == "invalid_request"
        world.plan("live", choices=[[1] * 1000])
        world.backend.open("default.live", m.ReplyTo("nobody.there", "json"), durable=False)
        await asyncio.sleep(0.1)
        world.backend.paused = True
        await asyncio.sleep(0.1)
        (first,) = await ask(world, "default.live")
        cursor = dict(choice=0, position=len(first["ids"]), offset=len(first["text"]))
        (alive,) = await ask(world, "default.live", cursors=[cursor])
        assert (alive["event"], alive["ids"], alive["text"], alive["position"]) == (
            "tokens",
            [],
            "",
            cursor["position"],
        )


@virtual
async def test_attach_moves_later_events_without_a_gap():
    async with World(faults=Faults(latency=0.03)) as world:  # ATTACH takes its time, tokens come meanwhile
        await world.detokenizer("a")
        world.plan("r", choices=[list(range(26)) * 2])
        world.backend.open("default.r", m.ReplyTo("nobody.there", "json"), durable=False)
        await asyncio.sleep(0.4)
        events: list[dict[str, Any]] = []
        await world.bus.subscribe("here", lambda message: events.append(json.loads(message.data)))
        question = json.dumps(dict(id="r", attach=True, cursors=[dict(position=3, offset=3)])).encode()
        world.bus.publish(subjects.replay(MODEL, world.backend.partition("default.r")), question, reply="here")
        await until(lambda: events and events[-1]["event"] == "finished")
        position = 3
        for event in events[:-1]:
            assert event["position"] == position, "a gap or something twice"
            position += len(event["ids"])
        assert position == 52


@virtual
async def test_whoever_repeats_a_request_gets_everything_from_the_beginning():
    """The scheduler writes ATTACH for a known id: its client may have lost all, and never asks for a replay."""
    async with World() as world:
        await world.detokenizer("a")
        world.plan("r", choices=[list(range(26)) * 2])
        world.backend.open("default.r", m.ReplyTo("nobody.there", "json"), durable=False)
        await asyncio.sleep(0.4)
        seen: dict[str, list[dict[str, Any]]] = {"early": [], "late": []}
        for name, events in seen.items():
            await world.bus.subscribe(name, lambda message, events=events: events.append(json.loads(message.data)))
        attach = m.Attach("default.r", m.ReplyTo("early", "json"))
        await world.backend.append(attach, world.backend.partition("default.r"))
        await asyncio.sleep(2.0)
        attach = m.Attach("default.r", m.ReplyTo("late", "json"))  # it has ended and is archived by now
        await world.backend.append(attach, world.backend.partition("default.r"))
        await asyncio.sleep(0.5)
        for events in seen.values():
            assert [i for e in events[:-1] for i in e["ids"]] == list(range(26)) * 2
            assert events[-1]["event"] == "finished"


@virtual
async def test_an_attach_is_answered_when_it_is_in_the_log():
    async with World() as world:
        await world.detokenizer("a")
        world.plan("r", choices=[list(range(26)) * 2])
        world.backend.open("default.r", m.ReplyTo("nobody.there", "json"), durable=False)
        await asyncio.sleep(0.4)
        events: list[dict[str, Any]] = []
        await world.bus.subscribe("here", lambda message: events.append(json.loads(message.data)))
        partition = world.backend.partition("default.r")
        attach = codec.encode(m.Attach("default.r", m.ReplyTo("here", "json")))
        await world.bus.request(subjects.attach(MODEL, partition), attach, 1.0)
        assert attach in [stored.data for stored in world.broker.streams[subjects.STREAM_TOK].messages.values()]
        await until(lambda: events and events[-1]["event"] == "finished")
        tokens = m.StepTokens("w", 1, (m.Tokens("default.r", 0, 9, 0, b""),))
        for wrong in (codec.encode(tokens), b"x"):  # a tokenizer writes no tokens
            before = len(world.broker.streams[subjects.STREAM_TOK].messages)
            world.bus.publish(subjects.attach(MODEL, partition), wrong, reply="there")
            await asyncio.sleep(0.5)
            assert len(world.broker.streams[subjects.STREAM_TOK].messages) == before


@virtual
async def test_a_tenants_door_shows_only_its_own_requests():
    async with World() as world:
        await world.detokenizer("a")
        for key in ("alice.r", "bob.r"):
            world.plan("r", choices=[list(range(26))])
            world.backend.open(key, m.ReplyTo("nobody.there", "json"), durable=False)
        await asyncio.sleep(2.0)

        async def ask(tenant: str | None, door: str) -> dict[str, Any]:
            key = f"{tenant or door}.r"
            subject = subjects.of_tenant(subjects.replay(MODEL, world.backend.partition(key)), door)
            body = dict(id="r") | ({"tenant": tenant} if tenant else {})
            return json.loads((await world.bus.request(subject, json.dumps(body).encode(), 1.0)).data)

        assert (await ask("alice", "alice"))["event"] == "tokens"
        assert (await ask(None, "alice"))["event"] == "tokens"
        assert (await ask("alice", "bob"))["code"] == "invalid_request"
        assert (await ask("carol", "carol"))["code"] == "not_found"


@virtual
async def test_prefix_is_answered_from_inside_the_fence():
    async with World(partitions=1) as world:
        service = await world.detokenizer("a")
        await until(lambda: world.serving(service))
        backend = world.backend
        backend.paused = True
        opened = m.Open("default.r", m.ReplyTo("x"), 1, 5, 100, ("zz",), choices=3)
        await backend.append(opened, 0)
        for entry in (
            m.Tokens("default.r", 0, 1, 0, codec.pack_ids([1, 2, 3])),
            m.Tokens("default.r", 1, 1, 0, codec.pack_ids([4]), "length"),
            m.Tokens("default.r", 2, 1, 0, codec.pack_ids([25, 25, 5])),
        ):
            await backend.append(m.StepTokens("w", 1, (entry,)), 0)

        async def query(epoch: int) -> m.PrefixReply:
            data = codec.encode(m.PrefixQuery("default.r", epoch))
            return codec.decode((await world.bus.request(subjects.prefix(MODEL, 0), data, 3.0)).data)

        loop = asyncio.get_running_loop()
        early = loop.create_task(query(2))
        await asyncio.sleep(0.3)
        assert not early.done(), "answered before the fence"
        await backend.append(m.Fence("default.r", 2), 0)
        late = m.Tokens("default.r", 0, 1, 3, codec.pack_ids([9]))
        await backend.append(m.StepTokens("w", 2, (late,)), 0)
        reply = await early
        expected = tuple(map(codec.pack_ids, ([1, 2, 3], [4], [25, 25, 5])))
        assert reply == m.PrefixReply("running", 2, expected, (1, 2))
        assert (await query(1)).state == "superseded"
        began = loop.time()
        assert (await query(7)).state == "pending"
        assert 0.9 < loop.time() - began < 1.2
        await backend.append(m.End("default.r", "cancelled"), 0)
        assert (await query(7)).state == "ended"


# ---------------------------------------------------------------- clients, bad entries, memory


@virtual
async def test_a_vanished_client_is_cancelled_and_a_silent_one_is_not():
    async with World(vanished_after=6.0) as world, world.client() as client:
        await world.detokenizer("a")
        for name in ("gone", "here", "durable"):
            world.plan(name, choices=[[1] * 1000])
        stream = client.generate("x", id="here")
        world.backend.open("default.gone", m.ReplyTo("nobody.there", "json"), durable=False)
        world.backend.open("default.durable", m.ReplyTo("", "json"), durable=True)
        began = asyncio.get_running_loop().time()
        await until(lambda: (state := world.backend.state("default.gone")) and state.terminal)
        assert 6.0 <= asyncio.get_running_loop().time() - began < 9.0
        assert world.backend.state("default.gone").terminal.reason == "cancelled"
        await asyncio.sleep(5)
        assert world.backend.state("default.here").terminal is None
        assert world.backend.state("default.durable").terminal is None
        del stream


@virtual
async def test_who_does_not_stream_gets_one_event_though_others_are_probed():
    async with World(partitions=1, vanished_after=6.0) as world:
        service = await world.detokenizer("a")
        await until(lambda: world.serving(service))
        world.plan("r", choices=[[1] * 200])  # 4 s, with a probe each second
        events: list[dict[str, Any]] = []
        await world.bus.subscribe("inbox.r", lambda message: events.append(json.loads(message.data)))
        world.backend.open("default.r", m.ReplyTo("inbox.r", stream=False), durable=False)
        await until(lambda: any(event["event"] == "finished" for event in events))
        assert [event["event"] for event in events] == ["finished"]


@virtual
async def test_a_cancelled_stream_ends_once_with_all_that_was_generated():
    async with World() as world, world.client() as client:
        await world.detokenizer("a")
        world.plan("r", choices=[[1] * 1000])
        stream = client.generate("x", id="r")
        await asyncio.sleep(0.5)
        await stream.cancel()
        result = await stream.result()
        assert result.status == "cancelled"
        assert result.usage["completion_tokens"] == len(result.choices[0].ids) == len(result.choices[0].text) > 10


@virtual
async def test_an_entry_that_nobody_understands_is_passed_over():
    async with World(partitions=1) as world, world.client() as client:
        await world.detokenizer("a")
        plan = world.plan("r", choices=[[1] * 30])
        stream = client.generate("x", id="r")
        await asyncio.sleep(0.2)
        for data in (b"", b"nonsense", codec.encode(m.Abort("default.r", 1))):
            await world.bus.append(subjects.tok(MODEL, 0), data)
        await world.check(stream, plan)


@virtual
async def test_not_streamed_requests_get_one_event_with_everything():
    async with World() as world:
        await world.detokenizer("a")
        world.plan("r", choices=[letters("abc"), letters("defg")])
        events: list[dict[str, Any]] = []
        await world.bus.subscribe("here", lambda message: events.append(json.loads(message.data)))
        world.backend.open("default.r", m.ReplyTo("here", "json", stream=False), durable=False, logprobs=True)
        await asyncio.sleep(1.0)
        (event,) = events
        assert [c["text"] for c in event["choices"]] == ["abc", "defg"]
        assert event["choices"][0]["logprobs"][0] == {"id": 0, "logprob": -0.5, "top": [[0, -0.5], [1, None]]}


@virtual
async def test_logprobs_survive_a_takeover():
    async with World(partitions=1) as world, world.client() as client:
        first = await world.detokenizer("a")
        world.plan("r", choices=[[1, 2, 3] * 30])
        body = client.generate("x", id="r")
        world.backend.open("default.q", m.ReplyTo("nobody.there", "msgpack"), durable=False, logprobs=True)
        world.backend.plans["q"] = world.backend.plans["r"]
        await asyncio.sleep(1.0)
        await world.crash(first)
        await world.detokenizer("b")
        await body.result()
        events = await ask(world, "default.q")
        rows = [row for event in events[:-1] for row in event["logprobs"]]
        assert [row["id"] for row in rows] == [1, 2, 3] * 30


@virtual
async def test_ended_requests_are_forgotten_after_the_attach_window():
    async with World(partitions=1, attach_window=5.0) as world, world.client() as client:
        service = await world.detokenizer("a")
        for i in range(20):
            world.plan(f"r{i}", choices=[[1] * 5])
        await asyncio.gather(*(client.generate("x", id=f"r{i}").result() for i in range(20)))
        core = service.partitions[0].core
        await until(lambda: len(core.archived) == 20 and not core.answers)
        assert all(not request.choices for request in core.fold.requests.values())
        # Stream time goes on with other requests only.
        world.plan("later", choices=[[1] * 7000], per_step=1)
        await client.generate("x", id="later").result()
        assert core.archived <= {"default.later"}
        assert core.fold.requests.keys() <= {"default.later"}
        (unknown,) = [e for e in await ask(world, "default.r0")]
        assert unknown["code"] == "not_found"


@pytest.mark.parametrize("taken_over", [False, True])
@virtual
async def test_an_id_is_free_again_though_nothing_was_written_since(taken_over):
    """Stream time stands still on a quiet partition, so nobody has forgotten the request that had the id before."""
    async with World(partitions=1, attach_window=5.0, snapshot_interval=1000.0) as world, world.client() as client:
        service = await world.detokenizer("a")
        await world.check(client.generate("x", id="r"), world.plan("r", choices=[letters("first")]))
        await until(lambda: "default.r" in service.partitions[0].core.archived)
        for again in ("second", "third"):
            await asyncio.sleep(200.0)
            assert await world.tombstone("default.r") is None
            world.backend.folds[0].requests.clear()
            world.backend._opened.clear()
            world.backend.req_seq += 1
            plan = world.plan("r", choices=[letters(again)])
            async with asyncio.timeout(30):
                await world.check(client.generate("x", id="r"), plan)
            await until_tombstone(world, "default.r")
        if taken_over:  # there is no snapshot: all three are folded again
            await world.crash(service)
            service = await world.detokenizer("b")
            await until(lambda: world.serving(service))
        events = await ask(world, "default.r")
        assert "".join(event.get("text", "") for event in events) == "third"


@virtual
async def test_a_cancel_of_long_ago_does_not_end_a_request_to_come():
    async with World(partitions=1, attach_window=5.0) as world, world.client() as client:
        await world.detokenizer("a")
        assert await client.cancel("r")
        await asyncio.sleep(200.0)
        world.backend.folds[0].requests.clear()
        async with asyncio.timeout(30):
            await world.check(client.generate("x", id="r"), world.plan("r", choices=[letters("hello")]))


@virtual
async def test_whoever_is_attached_to_an_ended_request_is_told_something_while_its_tombstone_lives():
    """Also when others kept stream time going, and when it was asked for before: that does not prolong its life."""
    async with World(partitions=1, attach_window=5.0) as world, world.client() as client:
        service = await world.detokenizer("a")
        await world.check(client.generate("x", id="r"), world.plan("r", choices=[letters("hello")]))
        ended = asyncio.get_running_loop().time()
        await until_tombstone(world, "default.r")
        world.plan("later", choices=[[1] * 9000])
        going_on = client.generate("x", id="later")
        told: list[dict[str, Any]] = []
        await world.bus.subscribe("here", lambda message: told.append(json.loads(message.data)))
        while await world.tombstone("default.r") is not None:
            told.clear()
            await world.backend.append(m.Attach("default.r", m.ReplyTo("here")), 0)
            await until(lambda: told)
            await asyncio.sleep(20.0)
        assert asyncio.get_running_loop().time() - ended > 120.0
        await asyncio.sleep(20.0)
        assert "default.r" not in service.partitions[0].core.fold.requests
        going_on.abandon()


@virtual
async def test_events_of_one_step_share_a_message_for_batched_clients():
    async with World(partitions=1) as world:
        await world.detokenizer("a")
        messages: list[bytes] = []
        await world.bus.subscribe("here", lambda message: messages.append(message.data))
        world.backend.paused = True
        for i in range(10):
            world.plan(f"r{i}", choices=[[1] * 20])
            world.backend.open(f"default.r{i}", m.ReplyTo("here", "json", batched=True), durable=False)
        await asyncio.sleep(0.5)
        world.backend.paused = False
        await asyncio.sleep(1.0)
        assert sum(len(json.loads(data)) for data in messages) == 10 * 21
        assert len(messages) == 20


async def test_a_partition_that_is_given_up_is_not_left_to_the_collector(nats_server: Broker):
    """With all that its requests were: it changes hands at each restart of another detokenizer."""
    settings = DetokenizerSettings(nats_url=nats_server.url, model=MODEL, partitions=1)
    bus = await NatsBus.connect(settings)
    await ensure_streams(bus, settings)
    service = DetokenizerService(bus, settings, Letters)
    await service.start()
    try:
        await until(lambda: 0 in service.partitions and service.partitions[0].serving)
        kept = weakref.ref(service.partitions[0])
        gc.disable()
        await service._give_up(0)
        await until(lambda: kept() is None, 2.0)
    finally:
        gc.enable()
        await service.stop()
        await bus.close()
