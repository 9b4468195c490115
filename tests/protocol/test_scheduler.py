"""The scheduler on the in-memory bus, in virtual time, with workers and a partition owner that do as they are told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import msgpack
import pytest

from services.scheduler.service import SchedulerService
from services.scheduler.settings import SchedulerSettings
from shared import codec, subjects
from shared import messages as m
from shared.api import decode_body, encoding_of
from shared.bus import Message
from shared.capabilities import KNOWN, Fields
from shared.memory_bus import Faults, MemoryBroker, MemoryBus
from shared.sampling import SamplingParams
from shared.streams import ensure_streams
from shared.tokenlog import Ended, Fenced, PartitionFold
from tests.protocol.systems import lose_first_attempts
from tests.protocol.virtual import until, virtual

MODEL, PARTITIONS, BEAT, STEP = "m", 2, 0.1, 0.02


def append(broker: MemoryBroker, entry: m.LogEntry, key: str) -> None:
    broker.append(subjects.tok(MODEL, subjects.partition_of(key, PARTITIONS)), codec.encode(entry), None, None)


class Actor:
    """Something with a bus of its own, and tasks that die with it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.bus = MemoryBus(world.broker)
        self.tasks: list[asyncio.Task[None]] = []

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self.tasks.append(asyncio.get_running_loop().create_task(coroutine))

    def die(self) -> None:
        for task in self.tasks:
            task.cancel()
        self.bus.abort()


class Worker(Actor):
    """Generates a token of each run every STEP, `ids[i] = i`. `answer(run)` may refuse; `poison` kills it at a position."""

    def __init__(self, world: World, name: str, max_seqs: int = 16, knows: Fields = KNOWN) -> None:
        super().__init__(world)
        self.name = name
        self.knows = knows
        self.max_seqs = max_seqs
        self.orders: list[m.Run] = []
        self.runs: dict[str, tuple[m.Run, int]] = {}  # by key: the order, tokens so far
        self.alone: dict[str, int] = {}  # suspects that still run apart: until that length
        self.answer: Callable[[m.Run], m.RunReply | None] = lambda run: m.RunReply(True)
        self.draining = False
        self.working = True
        self.suspects: tuple[str, ...] = ()
        self.hung: float | None = None  # when the step began that does not end
        self.behind: list[str] = []

    def hang(self) -> None:
        self.working, self.hung = False, asyncio.get_running_loop().time()

    async def start(self) -> Worker:
        await self.bus.subscribe(subjects.worker_run(self.name), self._on_run)
        await self.bus.subscribe(subjects.worker_abort(self.name), self._on_abort)
        self.spawn(self._beat())
        self.spawn(self._generate())
        return self

    def _on_run(self, message: Message) -> None:
        run = codec.decode_as(m.Run, message.data)
        self.orders.append(run)
        reply = self.answer(run)
        if reply is None:
            return
        if reply.accepted:
            self.runs[run.key] = (run, len(run.generated[0]) // 4 if run.generated else 0)
            if self.hung is not None:
                self.behind.append(run.key)
            if run.isolated:
                self.alone[run.key] = self.runs[run.key][1] + 3
        self.bus.publish(message.reply, codec.encode(reply))

    def _on_abort(self, message: Message) -> None:
        abort = codec.decode_as(m.Abort, message.data)
        if abort.key in self.runs and self.runs[abort.key][0].epoch <= abort.epoch:
            del self.runs[abort.key]

    def beat_now(self) -> None:
        base = m.Heartbeat("model_worker", MODEL, self.name, 1, BEAT, self.draining, knows=self.knows)
        running = {key: run.epoch for key, (run, _) in self.runs.items()}
        age = 0.0 if self.hung is None else asyncio.get_running_loop().time() - self.hung
        room = (self.max_seqs, 10**6, 10**6, 10**6, 99)
        beat = m.WorkerHeartbeat(
            base, 1, age, 1.0, running, *room, self.suspects, tuple(self.alone), tuple(self.behind)
        )
        self.bus.publish(subjects.heartbeat("model_worker", MODEL, self.name), codec.encode(beat))

    async def _beat(self) -> None:
        while True:
            self.beat_now()
            await asyncio.sleep(BEAT)

    async def _generate(self) -> None:
        while True:
            await asyncio.sleep(STEP)
            batch = [key for key in self.runs if key in self.alone][:1] or list(self.runs)
            if not self.working or not self.bus.connected:
                continue
            if any(self.world.is_fatal(key, self.runs[key][1]) for key in batch):
                self.world.deaths.append((self.name, tuple(batch)))
                self.die()
                return
            for key in batch:
                run, length = self.runs[key]
                last = length + 1 >= run.sampling.max_tokens
                tokens = m.Tokens(key, 0, run.epoch, length, codec.pack_ids([length]), "length" if last else None)
                append(self.world.broker, m.StepTokens(self.name, 1, (tokens,)), key)
                self.runs[key] = (run, length + 1)
                if length + 1 >= self.alone.get(key, 0):
                    self.alone.pop(key, None)
                if last:
                    del self.runs[key]


class Owner(Actor):
    """Folds both partitions; answers for prefixes and writes tombstones."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.folds = [PartitionFold() for _ in range(PARTITIONS)]
        self.fenced: list[tuple[str, int]] = []
        self.ended: list[tuple[str, str]] = []

    async def start(self) -> None:
        self.assign = await self.bus.bucket(subjects.BUCKET_ASSIGN)
        for partition in range(PARTITIONS):
            self.spawn(self._follow(partition))
            await self.bus.subscribe(subjects.prefix(MODEL, partition), self._on_query)

    def state(self, key: str) -> Any:
        return self.folds[subjects.partition_of(key, PARTITIONS)].requests.get(key)

    async def _follow(self, partition: int) -> None:
        async for stored in await self.bus.follow(subjects.STREAM_TOK, subjects.tok(MODEL, partition), 1):
            for effect in self.folds[partition].apply(codec.decode(stored.data), stored.stamp):
                if isinstance(effect, Fenced):
                    self.fenced.append((effect.key, effect.epoch))
                elif isinstance(effect, Ended):
                    state = self.folds[partition].requests[effect.key]
                    self.ended.append((effect.key, effect.terminal.reason))
                    tombstone = m.Tombstone(state.opened.req_seq, state.epoch, effect.terminal.reason, b"h")  # type: ignore[union-attr]
                    await self.assign.put(effect.key, codec.encode(tombstone), 1000.0)

    def _on_query(self, message: Message) -> None:
        query = codec.decode_as(m.PrefixQuery, message.data)
        state = self.state(query.key)
        if state is None or state.opened is None or state.epoch < query.epoch:
            reply = m.PrefixReply("pending")
        elif state.terminal is not None:
            reply = m.PrefixReply("ended", state.epoch)
        elif state.epoch > query.epoch:
            reply = m.PrefixReply("superseded", state.epoch)
        else:
            reply = m.PrefixReply("running", state.epoch, tuple(codec.pack_ids(ids) for ids in state.prefix))
        self.bus.publish(message.reply, codec.encode(reply))


class World:
    def __init__(self, schedulers: int = 1, faults: Faults | None = None, **settings: Any) -> None:
        self.broker = MemoryBroker(seed=1, faults=faults or Faults(latency=0.0005))
        self.settings = SchedulerSettings(model=MODEL, partitions=PARTITIONS, tenant_classes=1, **settings)
        self.fatal: dict[str, int] = {}  # keys that kill their worker, and at which position
        self.deaths: list[tuple[str, tuple[str, ...]]] = []
        self.schedulers: list[SchedulerService] = []
        self.workers: list[Worker] = []
        self._wanted = schedulers
        self.client = MemoryBus(self.broker)
        self.events: list[dict[str, Any]] = []

    def is_fatal(self, key: str, position: int) -> bool:
        return self.fatal.get(key) == position

    async def start(self, workers: int = 2, **options: Any) -> World:
        await ensure_streams(self.client, self.settings)
        await self.client.subscribe("inbox.>", lambda message: self.events.append(msgpack.unpackb(message.data)))
        self.owner = Owner(self)
        await self.owner.start()
        for _ in range(self._wanted):
            await self.scheduler()
        for _ in range(workers):
            await self.worker(**options)
        await asyncio.sleep(4.0)  # the links are proven
        return self

    async def scheduler(self) -> SchedulerService:
        scheduler = SchedulerService(MemoryBus(self.broker), self.settings)
        scheduler.instance = f"s{len(self.schedulers)}"
        self.schedulers.append(scheduler)
        await scheduler.start()
        return scheduler

    async def worker(self, **options: Any) -> Worker:
        self.workers.append(await Worker(self, f"w{len(self.workers)}", **options).start())
        return self.workers[-1]

    def kill(self, scheduler: SchedulerService) -> None:
        """kill -9."""
        scheduler.bus.abort()  # type: ignore[attr-defined]
        for task in list(scheduler._tasks):
            task.cancel()
        self.schedulers.remove(scheduler)

    def submit(self, name: str, *, tokens: int = 5, body: bytes = b"h", tenant: str = "t", **fields: Any) -> str:
        key = f"{tenant}.{name}"
        reply = m.ReplyTo(f"inbox.{name}", "msgpack")
        request = m.Request(
            key, MODEL, body, codec.pack_ids([1, 2, 3]), SamplingParams(max_tokens=tokens), reply, **fields
        )
        self.broker.append(subjects.req(MODEL, 0), codec.encode(request), None, None)
        return key

    async def ended(self, *keys: str, within: float = 30.0) -> None:
        """Waits until the requests are over, and checks that each has one end and all its tokens."""
        await until(
            lambda: all(state and state.opened and state.terminal for state in map(self.owner.state, keys)), within
        )
        for key in keys:
            ids = self.owner.state(key).choices[0].ids
            assert ids == list(range(len(ids)))
            assert [k for k, _ in self.owner.ended].count(key) == 1

    def reason(self, key: str) -> str:
        reason: str = self.owner.state(key).terminal.reason
        return reason

    def failure(self, key: str) -> str:
        code: str = self.owner.state(key).terminal.failure.code
        return code

    def orders(self, key: str) -> list[tuple[str, int]]:
        """(worker, epoch) of the orders to run it, by epoch."""
        found = [(w.name, run.epoch) for w in self.workers for run in w.orders if run.key == key]
        return sorted(found, key=lambda row: row[1])

    def entries(self, kind: type[Any], key: str) -> Iterator[Any]:
        for stored in self.broker.streams[subjects.STREAM_TOK].messages.values():
            entry = codec.decode(stored.data)
            if isinstance(entry, kind) and entry.key == key:
                yield entry

    async def idle(self) -> None:
        """Everything comes to rest, and every pool is empty."""
        await asyncio.sleep(self.settings.ack_wait + 1)
        for scheduler in self.schedulers:
            assert not scheduler.ledger.live
            assert scheduler.check_idle() == []
            assert scheduler.failed is not None and not scheduler.failed.done()
            assert scheduler.bus.handler_errors == 0  # type: ignore[attr-defined]
        (consumer,) = self.broker.streams[subjects.STREAM_REQ].consumers.values()
        assert not consumer.unacked

    async def stop(self) -> None:
        for actor in (self.owner, *self.workers):
            actor.die()
        for scheduler in self.schedulers:
            await scheduler.stop()


@virtual
async def test_a_request_is_opened_run_and_forgotten() -> None:
    world = await World().start()
    key = world.submit("a")
    await world.ended(key)
    assert world.orders(key) == [("w0", 1)]
    (opened,) = world.entries(m.Open, key)
    assert (opened.prompt_tokens, opened.max_tokens, opened.req_seq) == (3, 5, 1)
    assert not list(world.entries(m.Fence, key))
    await world.idle()
    await world.stop()


@virtual
async def test_it_starts_though_the_first_answers_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    world = await World(schedulers=0).start()
    lost = lose_first_attempts(monkeypatch)
    await world.scheduler()
    assert {what.split()[0] for what in lost} == {"bucket", "watch", "consume"}
    await world.ended(world.submit("a"))
    await world.stop()


@virtual
async def test_a_worker_of_an_older_version_gets_nothing_that_it_would_not_honour() -> None:
    world = await World().start(workers=1, knows={})
    plain, constrained = world.submit("plain"), world.submit("constrained", tokens=200, constraint="start: x")
    await world.ended(plain)
    await asyncio.sleep(5)
    assert world.schedulers[0].heartbeat().detail["waiting"] == 1
    new = await world.worker()
    await until(lambda: constrained in new.runs)
    new.die()
    await asyncio.sleep(5)
    assert world.schedulers[0].heartbeat().detail["unplaced"] == 1, "it waits, though the old worker has room"
    await world.worker()
    await world.ended(constrained)
    assert [worker for worker, _ in world.orders(constrained)] == ["w1", "w2"]
    assert [worker for worker, _ in world.orders(plain)] == ["w0"]
    await world.stop()


@virtual
async def test_many_requests_through_two_schedulers() -> None:
    world = await World(schedulers=2).start(workers=3)
    keys = [world.submit(f"r{i}", tenant=f"t{i % 3}") for i in range(60)]
    await world.ended(*keys)
    assert all(len(world.orders(key)) == 1 for key in keys)
    assert max(len(w.orders) for w in world.workers) <= 30, (
        "evenly, as far as two can that do not see what the other one is about to place"
    )
    await world.idle()
    await world.stop()


@virtual
async def test_cancel_before_open_while_waiting_and_while_running() -> None:
    world = await World(schedulers=2).start(workers=0)
    body = msgpack.packb(dict(id="early", tenant="t"))
    answer = await world.client.request(subjects.cancel(MODEL), body, 1.0)
    assert msgpack.unpackb(answer.data) == {"ok": True, "request": "unknown"}
    waiting, early = world.submit("waiting"), world.submit("early")
    await asyncio.sleep(0.1)
    await world.client.request(subjects.cancel(MODEL), msgpack.packb(dict(id="waiting", tenant="t")), 1.0)
    await world.ended(waiting)
    worker = await world.worker()
    await world.ended(early)
    running = world.submit("running", tokens=1000)
    await until(lambda: running in worker.runs)
    answer = await world.client.request(subjects.cancel(MODEL), msgpack.packb(dict(id="running", tenant="t")), 1.0)
    assert msgpack.unpackb(answer.data) == {"ok": True, "request": "live"}
    await world.ended(running)
    assert {world.reason(key) for key in (waiting, early, running)} == {"cancelled"}
    await until(lambda: not worker.runs, within=1)
    assert world.orders(waiting) == []
    await world.idle()
    late = await world.client.request(subjects.cancel(MODEL), msgpack.packb(dict(id="running", tenant="t")), 1.0)
    assert msgpack.unpackb(late.data) == {"ok": True, "request": "ended"}
    assert len(list(world.entries(m.End, running))) == 1, "nothing is remembered for a request to come"
    await world.stop()


@virtual
async def test_a_tenants_door_cancels_only_its_own() -> None:
    world = await World().start()
    running = world.submit("running", tokens=1000)
    await until(lambda: world.orders(running))
    for door, body in (("u", dict(id="running", tenant="t")), ("u", dict(id="running"))):
        await world.client.request(subjects.of_tenant(subjects.cancel(MODEL), door), msgpack.packb(body), 1.0)
    await asyncio.sleep(1)
    assert not list(world.entries(m.End, running))
    await world.client.request(subjects.of_tenant(subjects.cancel(MODEL), "t"), msgpack.packb(dict(id="running")), 1.0)
    await world.ended(running)
    await world.stop()


@virtual
async def test_a_bad_cancel_is_told_so() -> None:
    world = await World().start()
    for body in (b"\xc1", b'{"id": 5}', b'{"id": "a", "more": 1}', b'{"id": "a.b"}'):
        answer = await world.client.request(subjects.cancel(MODEL), body, 1.0)
        assert decode_body(answer.data)[0]["code"] == "invalid_request"
        assert encoding_of(answer.data) == encoding_of(body)
    await world.idle()
    await world.stop()


@virtual
async def test_the_same_id_again_attaches_and_another_body_is_a_conflict() -> None:
    world = await World().start()
    key = world.submit("a", tokens=50)
    await until(lambda: world.orders(key))
    world.submit("a", tokens=50)
    world.submit("a", body=b"other", metadata={"n": 1})
    await until(lambda: world.events)
    assert [(e["event"], e["id"], e["code"]) for e in world.events] == [("error", "a", "id_conflict")]
    await world.ended(key)
    assert len(list(world.entries(m.Attach, key))) == 1
    assert len(world.orders(key)) == 1
    world.submit("a", body=b"other", durable=True)
    await until(lambda: world.broker.streams[subjects.STREAM_RESULTS].messages)
    world.submit("a", body=b"other", durable=True, refused_as="job-7")
    results = world.broker.streams[subjects.STREAM_RESULTS].messages
    await until(lambda: len(results) == 2)
    assert [s.subject for s in results.values()] == [subjects.results(key), subjects.results("t.job-7")]
    await world.idle()
    await world.stop()


@virtual
async def test_deadline_in_the_queue() -> None:
    world = await World().start(workers=0)
    key = world.submit("a", deadline=2.0)
    begin = asyncio.get_running_loop().time()
    await world.ended(key)
    assert 1.9 < asyncio.get_running_loop().time() - begin < 2.3
    assert (world.reason(key), world.failure(key)) == ("error", "deadline_exceeded")
    await world.idle()
    await world.stop()


@virtual
async def test_a_deadline_counts_from_acceptance_for_a_scheduler_that_comes_later_too() -> None:
    world = await World(schedulers=0).start(workers=0)
    key = world.submit("a", deadline=10.0)
    await asyncio.sleep(7)
    await world.scheduler()
    await asyncio.sleep(1)
    worker = await world.worker()
    await until(lambda: worker.orders)
    deadline = worker.orders[0].deadline
    assert deadline is not None and 0 < deadline < 2.1
    await world.ended(key)
    await world.stop()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_deadline_ends_what_workers_had_that_all_died_at_once(workers: int) -> None:
    async def test() -> None:
        world = await World(schedulers=2).start(workers=workers)
        key = world.submit("a", tokens=10_000, deadline=5.0)
        await until(lambda: world.orders(key))
        for worker in world.workers:
            worker.die()
        await world.ended(key, within=15)
        assert (world.reason(key), world.failure(key)) == ("error", "deadline_exceeded")
        await world.idle()
        await world.stop()

    virtual(test)()


@virtual
async def test_a_dead_workers_requests_go_on_elsewhere_with_their_prefix() -> None:
    world = await World(schedulers=2).start()
    keys = [world.submit(f"r{i}", tokens=60) for i in range(8)]
    await asyncio.sleep(0.3)
    begin = asyncio.get_running_loop().time()
    world.workers[0].die()
    await until(lambda: len(world.workers[1].orders) >= 8)
    assert asyncio.get_running_loop().time() - begin < 0.7
    await world.ended(*keys)
    moved = [key for key in keys if len(world.orders(key)) == 2]
    assert len(moved) == 4
    for key in moved:
        assert world.orders(key) == [("w0", 1), ("w1", 2)]
        (run,) = [run for run in world.workers[1].orders if run.key == key]
        assert len(run.generated[0]) // 4 > 5 and not run.isolated
    await world.idle()
    await world.stop()


@virtual
async def test_without_a_worker_they_wait_for_the_next() -> None:
    world = await World().start(workers=1)
    key = world.submit("a", tokens=60)
    await asyncio.sleep(0.3)
    world.workers[0].die()
    await asyncio.sleep(20)
    assert world.schedulers[0].heartbeat().detail["unplaced"] == 1
    assert world.schedulers[0].heartbeat().detail["migrations"] == 1, "it waits in one and the same epoch"
    await world.worker()
    await world.ended(key)
    await world.idle()
    await world.stop()


@virtual
async def test_a_request_whose_open_is_no_longer_in_the_log_is_opened_again() -> None:
    """Nobody folded the log before it was trimmed."""
    world = await World().start(workers=1)
    key = world.submit("a", tokens=60)
    await until(lambda: world.orders(key))
    await until(lambda: world.owner.state(key) and world.owner.state(key).opened)
    del world.owner.folds[subjects.partition_of(key, PARTITIONS)].requests[key]
    world.workers[0].die()
    await world.worker()
    await world.ended(key)
    assert world.reason(key) == "finished"
    await world.idle()
    await world.stop()


@virtual
async def test_a_lost_answer_to_an_order_costs_an_epoch_and_nothing_else() -> None:
    world = await World().start()
    mute = world.workers[0]

    def once(run: m.Run) -> None:
        mute.answer = lambda run: m.RunReply(True)
        mute.runs[run.key] = (run, 0)

    mute.answer = once  # type: ignore[assignment]
    key = world.submit("a", tokens=60)
    await world.ended(key)
    assert world.orders(key) == [("w0", 1), ("w1", 2)]
    await until(lambda: not mute.runs, within=1)
    await world.idle()
    await world.stop()


@virtual
async def test_a_run_that_never_arrived_is_found_by_the_reports() -> None:
    world = await World().start(workers=1)
    forgetful = world.workers[0]
    forgetful.answer = lambda run: forgetful.bus.publish("nowhere", b"") if run.epoch > 1 else m.RunReply(True)  # type: ignore[func-returns-value]
    key = world.submit("a", tokens=60)
    await until(lambda: key in forgetful.runs)
    del forgetful.runs[key]
    forgetful.answer = lambda run: m.RunReply(True)
    await world.ended(key, within=5)
    assert world.orders(key) == [("w0", 1), ("w0", 2)]
    await world.idle()
    await world.stop()


@virtual
async def test_a_draining_worker_hands_over_at_once() -> None:
    world = await World().start(workers=1)
    old = world.workers[0]
    key = world.submit("a", tokens=100)
    await asyncio.sleep(0.3)
    new = await world.worker()
    await asyncio.sleep(0.2)
    old.draining, old.working = True, False
    old.beat_now()
    late = world.submit("b")
    await asyncio.sleep(0.05)
    assert not new.runs.get(key), "it still reports it"
    old.runs.clear()
    old.beat_now()
    await until(lambda: key in new.runs, within=0.1)
    await world.ended(key, late)
    assert world.orders(late) == [("w1", 1)]
    await world.idle()
    await world.stop()


@pytest.mark.parametrize("code", ["overloaded", "draining"])
def test_who_refuses_is_left_alone_for_a_while(code: str) -> None:
    async def test() -> None:
        world = await World().start(workers=1)
        busy = world.workers[0]
        busy.answer = lambda run: m.RunReply(False, code, "not now")
        key = world.submit("a")
        await asyncio.sleep(2.0)
        assert len(busy.orders) <= 6, "asked ever more seldom"
        free = await world.worker()
        await world.ended(key, within=1)
        assert len(free.orders) == 1
        busy.answer = free.answer
        key = world.submit("b", tokens=200)
        await asyncio.sleep(0.2)
        world.workers[1].die()
        await world.ended(key)
        await world.idle()
        await world.stop()

    virtual(test)()


@virtual
async def test_a_refusal_of_one_request_closes_its_worker_to_no_other() -> None:
    world = await World().start(workers=1)
    world.workers[0].answer = lambda run: m.RunReply(run.key != "t.a", "overloaded", only_this=True)
    refused = world.submit("a")
    await until(lambda: len(world.orders(refused)) > 3)
    for i in range(5):
        await world.ended(world.submit(f"b{i}"), within=0.5)
    world.workers[0].answer = lambda run: m.RunReply(True)
    await world.ended(refused, within=2)
    await world.idle()
    await world.stop()


@virtual
async def test_a_final_refusal_ends_the_request() -> None:
    world = await World().start()
    for worker in world.workers:
        worker.answer = lambda run: m.RunReply(False, "context_length_exceeded", "too long")
    key = world.submit("a")
    await world.ended(key)
    assert (world.reason(key), world.failure(key)) == ("error", "context_length_exceeded")
    assert len(world.orders(key)) == 1
    await world.idle()
    await world.stop()


@virtual
async def test_a_scheduler_dies_between_any_two_steps() -> None:
    """Of a start and of a migration: after each message that it has sent, in turn."""
    broken = []
    for migrating in (False, True):
        for nth in range(1, 12):
            world = await World(schedulers=1).start()
            victim = world.schedulers[0]
            if migrating:
                key = world.submit("a", tokens=100)
                await asyncio.sleep(0.3)
            bus, left = victim.bus, nth
            assert isinstance(bus, MemoryBus)
            for name in ("write_to_broker", "request"):
                original = getattr(bus, name)

                async def counted(
                    *args: Any, original: Any = original, victim: Any = victim, world: Any = world
                ) -> Any:
                    nonlocal left
                    left -= 1
                    if left == 0:
                        asyncio.get_running_loop().call_soon(world.kill, victim)
                    return await original(*args)

                setattr(bus, name, counted)
            if migrating:
                world.workers[0].die()
            else:
                key = world.submit("a", tokens=100)
            await asyncio.sleep(1.0)
            if victim in world.schedulers:
                world.kill(victim)
            await world.scheduler()
            try:
                await world.ended(key, within=40)
            except (TimeoutError, AssertionError) as error:
                broken.append((migrating, nth, repr(error)))
            await world.idle()
            await world.stop()
    assert not broken


@virtual
async def test_the_peer_takes_over_within_seconds() -> None:
    world = await World(schedulers=2).start()
    keys = [world.submit(f"r{i}", tokens=300) for i in range(8)]
    await asyncio.sleep(0.3)
    world.kill(world.schedulers[0])
    world.workers[0].die()
    await until(lambda: len(world.workers[1].orders) >= 8, within=2.0)
    await world.ended(*keys)
    await world.idle()
    await world.stop()


@pytest.mark.parametrize("stall", [0.3, 0.6, 1.2, 6.0])
def test_a_stall_of_nats_fences_nobody(stall: float) -> None:
    async def test() -> None:
        world = await World(schedulers=2, faults=Faults(latency=0.0005, max_reconnect=1.0)).start(workers=3)
        keys = [world.submit(f"r{i}", tokens=200) for i in range(12)]
        await asyncio.sleep(0.25)
        world.broker.kill()
        await asyncio.sleep(stall)
        world.broker.restart()
        await world.ended(*keys)
        assert world.owner.fenced == []
        await world.idle()
        await world.stop()

    virtual(test)()


@virtual
async def test_a_scheduler_cut_off_alone_does_no_harm() -> None:
    world = await World(schedulers=2).start()
    keys = [world.submit(f"r{i}", tokens=400) for i in range(8)]
    await asyncio.sleep(0.3)
    lonely = world.schedulers[0].bus
    assert isinstance(lonely, MemoryBus)
    world.broker.disconnect(lonely)
    await asyncio.sleep(4)
    world.broker.reconnect(lonely)
    await world.ended(*keys)
    assert world.owner.fenced == []
    await world.idle()
    await world.stop()


async def _keep_workers(world: World) -> None:
    """A supervisor: who dies is replaced."""
    while True:
        await asyncio.sleep(0.5)
        for _ in range(2 - sum(w.name not in [name for name, _ in world.deaths] for w in world.workers)):
            await world.worker(max_seqs=8)


@pytest.mark.parametrize("position", [0, 7])
def test_poison_is_quarantined_and_its_neighbours_survive(position: int) -> None:
    async def test() -> None:
        world = await World(schedulers=2).start(workers=2, max_seqs=8)
        keeper = asyncio.get_running_loop().create_task(_keep_workers(world))
        innocent = [world.submit(f"r{i}", tokens=150) for i in range(6)]
        await asyncio.sleep(0.1)
        world.fatal["t.poison"] = position
        poison = world.submit("poison", tokens=50)
        innocent += [world.submit(f"late{i}", tokens=150) for i in range(4)]
        await world.ended(poison, *innocent, within=120)
        assert (world.reason(poison), world.failure(poison)) == ("error", "quarantined")
        assert {world.reason(key) for key in innocent} == {"finished"}
        assert 4 <= len(world.deaths) <= 6
        assert [batch for _, batch in world.deaths[-2:]] == [(poison,)] * 2, "the last two deaths were its own"
        (letter,) = world.broker.streams[subjects.STREAM_DEAD].messages.values()
        evidence = msgpack.unpackb(letter.data)
        assert codec.decode(evidence["request"]).key == poison and evidence["generated"] == [
            codec.pack_ids(range(position))
        ]
        keeper.cancel()
        await world.idle()
        await world.stop()

    virtual(test)()


@virtual
async def test_kills_from_outside_quarantine_nobody() -> None:
    world = await World(schedulers=2).start(workers=2, max_seqs=8)
    keeper = asyncio.get_running_loop().create_task(_keep_workers(world))
    keys = [world.submit(f"r{i}", tokens=300) for i in range(12)]
    for _ in range(12):
        await asyncio.sleep(1.1)
        victim = next((w for w in world.workers if w.name not in [name for name, _ in world.deaths]), None)
        if victim is not None:
            world.deaths.append((victim.name, ()))
            victim.die()
    await world.ended(*keys, within=120)
    assert {world.reason(key) for key in keys} == {"finished"}
    assert not world.broker.streams[subjects.STREAM_DEAD].messages
    keeper.cancel()
    await world.idle()
    await world.stop()


@virtual
async def test_a_suspect_whose_order_was_never_sent_does_not_die_with_the_worker() -> None:
    """A write of unknown outcome may be stored after its scheduler has given it up."""
    world = await World(schedulers=2).start()
    bucket = await world.client.bucket(subjects.BUCKET_ASSIGN)
    late = m.Assignment(1, 2, "w0", b"h", suspect=3, died_at=0, model=MODEL)
    await bucket.create("t.a", codec.encode(late))
    key = world.submit("a")
    await asyncio.sleep(0.3)
    world.workers[0].die()
    await world.ended(key)
    assert (world.reason(key), world.orders(key)) == ("finished", [("w1", 3)])
    assert world.workers[1].orders[0].isolated
    await world.idle()
    await world.stop()


@virtual
async def test_who_comes_behind_a_step_that_hangs_is_no_suspect() -> None:
    world = await World(schedulers=2).start(workers=0)
    key = world.submit("a", tokens=5)
    for _ in range(5):
        hanging = await world.worker()
        hanging.hang()
        await until(lambda hanging=hanging: key in hanging.runs)
        await asyncio.sleep(0.9)
    await world.worker()
    await world.ended(key)
    assert world.reason(key) == "finished"
    assert [worker for worker, _ in world.orders(key)] == [f"w{number}" for number in range(6)]
    assert not any(run.isolated for worker in world.workers for run in worker.orders)
    await world.idle()
    await world.stop()


@virtual
async def test_a_worker_that_names_its_suspects_clears_the_others() -> None:
    world = await World().start(workers=2, max_seqs=8)
    keys = [world.submit(f"r{i}", tokens=100) for i in range(8)]
    await asyncio.sleep(0.3)
    dying = world.workers[0]
    named, *others = list(dying.runs)
    dying.suspects, dying.working, dying.draining = (named,), False, True
    dying.beat_now()
    await until(lambda: len(world.workers[1].orders) >= 8)
    dying.die()
    assert {run.key for run in world.workers[1].orders if run.isolated} == {named}
    assert len(others) == 3
    await world.ended(*keys)
    await world.idle()
    await world.stop()


@virtual
async def test_one_tenants_flood_is_fair_to_the_others() -> None:
    world = await World(max_waiting=64).start(workers=1)
    flood = [world.submit(f"f{i}", tokens=10, tenant="flood") for i in range(200)]
    await asyncio.sleep(1)
    calm = [world.submit(f"c{i}", tokens=10, tenant="calm") for i in range(5)]
    await world.ended(*calm, within=6)
    left = sum(world.owner.state(key) is None for key in flood)
    assert left > 100
    await world.ended(*flood, within=200)
    await world.idle()
    await world.stop()


@virtual
async def test_a_tenant_that_comes_now_and_then_finds_a_place_at_once_beside_a_flood() -> None:
    world = await World(max_waiting=256).start(workers=2)
    first = world.submit("first", tokens=4, tenant="calm")
    await world.ended(first)
    flood = [world.submit(f"f{i}", tokens=40, tenant="flood") for i in range(150)]
    await asyncio.sleep(1)
    for number in range(10):
        key = world.submit(f"c{number}", tokens=4, tenant="calm")
        await asyncio.sleep(0.15)
        live = [order for worker in world.workers for order in worker.orders if order.key == key]
        assert live, "it has a worker"
        await world.ended(key)
    await world.ended(*flood, within=200)
    await world.idle()
    await world.stop()


@virtual
async def test_draining_gives_back_what_waits() -> None:
    world = await World(schedulers=2).start(workers=0)
    keys = [world.submit(f"r{i}") for i in range(20)]
    await asyncio.sleep(0.2)
    first = world.schedulers.pop(0)
    begin = asyncio.get_running_loop().time()
    late = world.submit("late")
    await first.drain()
    assert asyncio.get_running_loop().time() - begin < 0.5
    await first.stop()
    await first.bus.close()
    await world.worker()
    await world.ended(*keys, late)
    await world.idle()
    await world.stop()


@virtual
async def test_req_is_trimmed_below_what_lives_and_other_models_are_left_alone() -> None:
    world = await World(schedulers=2, trim_interval=5.0).start(workers=1)
    other = m.Request("t.o", "other", b"h", b"", SamplingParams(), m.ReplyTo("inbox.o"))
    world.broker.append(subjects.req("other", 0), codec.encode(other), None, None)
    keys = [world.submit(f"r{i}") for i in range(5)]
    await world.ended(*keys)
    world.workers[0].working = False
    live = world.submit("live", tokens=1000)
    await asyncio.sleep(30)
    req = world.broker.streams[subjects.STREAM_REQ].messages
    assert [codec.decode(stored.data).key for stored in req.values()] == ["t.o", live]
    world.workers[0].working = True
    await world.ended(live)
    await asyncio.sleep(20)
    assert [codec.decode(stored.data).key for stored in req.values()] == ["t.o"]
    await world.idle()
    await world.stop()


@virtual
async def test_requests_of_another_model_are_none_of_its_business() -> None:
    world = await World().start(workers=1)
    bucket = await world.client.bucket(subjects.BUCKET_ASSIGN)
    foreign = m.Assignment(1, 1, "a-worker-of-that-model", b"h", model="other")
    await bucket.create("t.foreign", codec.encode(foreign))
    await asyncio.sleep(10)
    entry = await bucket.get("t.foreign")
    assert entry is not None and codec.decode(entry.value or b"") == foreign
    assert not world.schedulers[0].ledger.live
    await world.stop()
