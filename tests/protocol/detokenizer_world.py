"""A deployment in which only the detokenizers and the clients are real: one actor stands for tokenizer, scheduler and worker, and
writes the token log itself. In virtual time, on the in-memory bus.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgpack

from services.detokenizer.service import DetokenizerService
from services.detokenizer.settings import DetokenizerSettings
from services.detokenizer.stream import StopMatcher
from shared import codec, subjects
from shared import messages as m
from shared.api import accepted_event, decode_body, encode_for
from shared.bus import BucketSpec, BusError, Message, StreamSpec
from shared.client import Client
from shared.client_stream import Stream
from shared.memory_bus import Faults, MemoryBroker, MemoryBus
from shared.tokenlog import PartitionFold

MODEL = "m"
STEP = 0.02
EOS = 99
PROMPT_TOKENS = 5


class Letters:
    """Decoding of the tests' vocabulary: ids 0..25 are letters, 26..51 pairs of letters; EOS would be seen if it were shown."""

    def __init__(self, shown: tuple[str, ...] = ()) -> None: ...

    def feed(self, ids: Iterable[int]) -> str:
        return "".join(map(piece, ids))

    def flush(self) -> str:
        return ""


def piece(token: int) -> str:
    if token == EOS:
        return "<eos>"
    letter = chr(ord("a") + token % 26)
    return letter if token < 26 else letter + letter


@dataclass
class Plan:
    """What the model would say: ids of each choice, and how it would finish if nothing stopped it."""

    choices: list[list[int]]
    finish: str = "length"
    stops: tuple[str, ...] = ()
    per_step: int = 1

    def expected(self, index: int) -> tuple[list[int], str, str, str | int | None]:
        """ids, text, finish reason and stop of one choice, by looking at the whole of it."""
        ids = self.choices[index]
        matcher = StopMatcher(self.stops)
        shown = ids[:-1] if self.finish == "stop" else ids
        text = ""
        for count, token in enumerate(shown, 1):
            text += matcher.feed(piece(token))
            if matcher.matched is not None:
                return ids[:count], text, "stop", matcher.matched
        text += matcher.flush()
        return ids, text, "length" if self.finish == "length" else "stop", EOS if self.finish == "stop" else None


@dataclass
class _Running:
    key: str
    plan: Plan
    done: list[int] = field(default_factory=list)  # tokens written of each choice


class Backend:
    """Tokenizer, scheduler and worker in one: accepts requests, opens them, writes their tokens step by step, cancels them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.bus = MemoryBus(world.broker)
        self.plans: dict[str, Plan] = {}  # by request id
        self.running: dict[str, _Running] = {}
        self.asked: list[str] = []
        self.paused = False
        self.queue_time = 0.0
        self.req_seq = 7
        self.folds: dict[int, PartitionFold] = {}
        self._opened: set[str] = set()
        self.revisions: dict[str, int] = {}  # of assignments, that OPEN names
        self._tasks: set[asyncio.Task[None]] = set()
        self._step = 0

    async def start(self) -> None:
        await self.bus.subscribe(subjects.generate(MODEL), self._on_request)
        await self.bus.subscribe(subjects.cancel(MODEL), self._on_cancel)
        for partition in range(self.world.partitions):
            self.spawn(self._follow(partition))
        self.spawn(self._generate())

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def stop(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def append(self, entry: m.LogEntry, partition: int) -> None:
        while True:
            try:
                await self.bus.append(subjects.tok(MODEL, partition), codec.encode(entry), timeout=0.2)
                return
            except BusError:
                await asyncio.sleep(0.02)

    def partition(self, key: str) -> int:
        return subjects.partition_of(key, self.world.partitions)

    def _on_request(self, message: Message) -> None:
        body, encoding = decode_body(message.data)
        key = subjects.request_key(body["tenant"], body["id"])
        self.asked.append(body["id"])
        reply = m.ReplyTo(message.reply, encoding, body.get("batched", False), body.get("stream", True))
        self.open(key, reply, durable=False)
        replay = subjects.replay(MODEL, self.partition(key))
        event = accepted_event(
            body["id"], body["tenant"], prompt_tokens=PROMPT_TOKENS, seed=0, replay=replay, results=None
        )
        for data in encode_for(reply, [event]):
            self.bus.publish(message.reply, data)

    def open(self, key: str, reply: m.ReplyTo, durable: bool, logprobs: bool = False) -> None:
        if key not in self._opened:
            self._opened.add(key)
            self.spawn(self._open(key, reply, durable, logprobs))

    async def _open(self, key: str, reply: m.ReplyTo, durable: bool, logprobs: bool) -> None:
        await asyncio.sleep(self.queue_time)
        plan = self.plans[subjects.split_request_key(key)[1]]
        opened = m.Open(
            key,
            reply,
            self.req_seq,
            PROMPT_TOKENS,
            max(map(len, plan.choices)),
            plan.stops,
            len(plan.choices),
            logprobs,
            durable,
            {"note": key},
            queue_ms=3.0,
            revision=self.revisions.get(key, 0),
            body_hash=b"hash",
        )
        await self.append(opened, self.partition(key))
        self.running[key] = _Running(key, plan, [0] * len(plan.choices))

    def _on_cancel(self, message: Message) -> None:
        body, _ = decode_body(message.data)
        key = subjects.request_key(body["tenant"], body["id"])
        self.spawn(self.append(m.End(key, "cancelled"), self.partition(key)))
        self.bus.publish(message.reply, msgpack.packb({"ok": True, "request": "live"}))

    async def _follow(self, partition: int) -> None:
        fold = self.folds[partition] = PartitionFold()
        async for stored in await self.bus.follow(subjects.STREAM_TOK, subjects.tok(MODEL, partition), 1):
            try:
                entry = codec.decode(stored.data)
            except codec.CodecError:
                continue
            fold.apply(entry, stored.stamp)

    def state(self, key: str) -> Any:
        return self.folds[self.partition(key)].requests.get(key)

    async def _generate(self) -> None:
        while True:
            await asyncio.sleep(STEP)
            if self.paused:
                continue
            self._step += 1
            batches: dict[int, list[m.Tokens]] = {}
            for running in list(self.running.values()):
                batches.setdefault(self.partition(running.key), []).extend(self._next(running))
            for partition, entries in batches.items():
                if entries:
                    self.spawn(self.append(m.StepTokens("w", self._step, tuple(entries)), partition))

    def _next(self, running: _Running) -> Iterable[m.Tokens]:
        state = self.state(running.key)
        if state is not None and state.terminal is not None:
            self.running.pop(running.key, None)
            return
        for index, ids in enumerate(running.plan.choices):
            start = running.done[index]
            if start >= len(ids) or (state and state.choices and state.choices[index].finish is not None):
                continue
            end = running.done[index] = min(len(ids), start + running.plan.per_step)
            finish = running.plan.finish if end == len(ids) else None
            yield self.tokens(running.key, index, start, ids[start:end], finish)

    def tokens(self, key: str, index: int, start: int, ids: list[int], finish: str | None) -> m.Tokens:
        stop = EOS if finish == "stop" else None
        state = self.state(key)
        rows = None
        if state is not None and state.opened is not None and state.opened.logprobs:
            rows = tuple(m.TokenLogprobs(-0.5, codec.pack_ids([token, 1]), (-0.5, float("-inf"))) for token in ids)
        return m.Tokens(key, index, 1, start, codec.pack_ids(ids), finish, stop, rows)


class _Settings(DetokenizerSettings):
    def incarnation(self) -> str:
        return self.name  # a world is the same each time


class World:
    """Names of detokenizers must not be used twice."""

    def __init__(self, seed: int = 0, faults: Faults | None = None, partitions: int = 4, **settings: Any) -> None:
        self.random = random.Random(seed)
        self.broker = MemoryBroker(seed, faults)
        self.partitions = partitions
        self._settings = dict(model=MODEL, partitions=partitions) | settings
        for name, subject in subjects.STREAM_SUBJECTS.items():
            self.broker.ensure_stream(StreamSpec(name, subject))
        self.bus = MemoryBus(self.broker)
        self.backend = Backend(self)
        self.services: list[DetokenizerService] = []

    async def __aenter__(self) -> World:
        for name in (subjects.BUCKET_ASSIGN, subjects.BUCKET_SNAPSHOT):
            await self.retry(lambda name=name: self.bus.ensure_bucket(BucketSpec(name)))
        await self.backend.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.backend.stop()
        for service in list(self.services):
            await self.crash(service)

    @staticmethod
    async def retry(operation: Callable[[], Awaitable[Any]]) -> Any:
        while True:
            try:
                return await operation()
            except BusError:
                await asyncio.sleep(0.05)

    def settings(self, **more: Any) -> DetokenizerSettings:
        return _Settings(**(self._settings | more))

    async def detokenizer(self, name: str, **settings: Any) -> DetokenizerService:
        service = DetokenizerService(MemoryBus(self.broker), self.settings(name=name, **settings), Letters)
        self.services.append(service)
        await service.start()
        return service

    async def crash(self, service: DetokenizerService) -> None:
        """kill -9."""
        self.services.remove(service)
        service.bus.abort()  # type: ignore[attr-defined]
        tasks = list(service._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def serving(self, *services: DetokenizerService) -> bool:
        """Whether each partition is served, by one of these only, and none of these is idle."""
        owners = [[number for number, p in s.partitions.items() if p.serving] for s in services]
        return all(owners) and sorted(number for numbers in owners for number in numbers) == list(
            range(self.partitions)
        )

    def client(self, **options: Any) -> Client:
        return Client(MemoryBus(self.broker), MODEL, partitions=self.partitions, **options)

    def plan(self, request_id: str, **fields: Any) -> Plan:
        plan = self.backend.plans[request_id] = Plan(**fields)
        return plan

    def random_plan(self, request_id: str) -> Plan:
        """Mixed kinds: several choices, stop strings that may or may not come, several tokens in a step."""
        r = self.random
        finish = r.choice(["length", "stop"])
        choices = [[r.randrange(52) for _ in range(r.randint(1, 60))] for _ in range(r.choice([1, 1, 1, 3]))]
        if finish == "stop":
            for ids in choices:
                ids.append(EOS)
        stops = tuple(
            "".join(r.choice("abcdefgh") for _ in range(r.randint(1, 3))) for _ in range(r.choice([0, 0, 1, 3]))
        )
        return self.plan(request_id, choices=choices, finish=finish, stops=stops, per_step=r.choice([1, 1, 2, 7]))

    async def check(self, stream: Stream, plan: Plan) -> None:
        """The stream gives every token once, in order, and ends once, as planned."""
        deltas: dict[int, list[Any]] = {}
        async for delta in stream:
            deltas.setdefault(delta.choice, []).append(delta)
        result = await stream.result()
        assert result.status == "finished"
        counted = 0
        for index, choice in enumerate(result.choices):
            ids, text, reason, stop = plan.expected(index)
            assert (choice.ids, choice.text, choice.finish_reason, choice.stop) == (ids, text, reason, stop)
            assert [i for d in deltas.get(index, []) for i in d.ids] == ids
            assert "".join(d.text for d in deltas.get(index, [])) == text
            counted += len(ids)
        assert len(result.choices) == len(plan.choices)
        assert result.usage == {
            "prompt_tokens": PROMPT_TOKENS,
            "completion_tokens": counted,
            "total_tokens": PROMPT_TOKENS + counted,
            "cached_tokens": 0,
        }

    async def tombstone(self, key: str) -> m.Tombstone | None:
        bucket = await self.bus.bucket(subjects.BUCKET_ASSIGN)
        entry = await bucket.get(key)
        value = codec.decode(entry.value) if entry is not None and entry.value is not None else None
        return value if isinstance(value, m.Tombstone) else None

    async def results(self, key: str) -> list[dict[str, Any]]:
        stream = self.broker.stream(subjects.STREAM_RESULTS)
        return [decode_body(s.data)[0] for s in stream.messages.values() if s.subject == subjects.results(key)]
