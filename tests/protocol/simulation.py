"""A whole deployment in one deterministic program: the real services and clients on the in-memory bus, in virtual time, with seeded
faults. `run_seed(seed)` makes up a scenario, runs it, and raises Broken if any promise was not kept.

Only the model is not real. In half of the scenarios a token depends on all tokens before it and on nothing else, so that a stream must
equal the uninterrupted one. In the others it depends on the worker and the epoch as well: two epochs never agree, so any mixture shows.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, NamedTuple, cast

import msgpack
import structlog
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from services.detokenizer import service as detokenizer_service
from services.detokenizer.service import DetokenizerService
from services.detokenizer.settings import DetokenizerSettings
from services.detokenizer.snapshot import unpack_answer
from services.model_worker.fixed_engine import FixedEngine, FixedSequence, expected_ids, fixed_logprob
from services.model_worker.interface import EngineRequest
from services.model_worker.service import EngineDied, WorkerService
from services.model_worker.settings import Fault, FixedEngineSettings, WorkerSettings
from services.scheduler import service as scheduler_service
from services.scheduler.service import SchedulerService
from services.scheduler.settings import SchedulerSettings
from services.tokenizer.encoder import Encoder
from services.tokenizer.model_files import ModelFiles
from services.tokenizer.service import TokenizerService
from services.tokenizer.settings import TokenizerSettings
from shared import client as client_module
from shared import codec, subjects
from shared import messages as m
from shared.bus import Appended, BucketSpec, BusError, Message
from shared.client import Client
from shared.client_stream import Delta, Result, Stream
from shared.errors import GorgonError
from shared.memory_broker import BucketState, Faults, MemoryBroker
from shared.memory_bus import MemoryBus
from shared.service import Service
from shared.streams import stream_specs
from shared.tokenlog import Attached, Ended, PartitionFold, RequestState
from tests.protocol.simulated_processes import Process, SimulationLoop

MODEL, PARTITIONS, STEP, BEAT = "m", 2, 0.02, 0.3
VOCABULARY = 2**31 - 1
POISON = 7  # a token id that kills or breaks the worker, as the seed says
LATENCY = 0.001
LONGEST = 120.0  # virtual seconds that a scenario may take

COMMON: dict[str, Any] = dict(model=MODEL, partitions=PARTITIONS, tenant_classes=1, heartbeat_interval=BEAT)


class Broken(AssertionError):
    """A promise was not kept."""


# ---------------------------------------------------------------- settings: coarse times, so that a seed costs little


@cache
def settings_of(stage: str, fault: str = "") -> Any:
    match stage:
        case "tokenizer":
            return TokenizerSettings(**COMMON, append_timeout=0.3, backlog_interval=1.0)
        case "scheduler":
            return SchedulerSettings(
                **COMMON, silence=1.4, reconnect_grace=0.7, report_grace=1.0, stuck_grace=1.5, ack_wait=2.5, trim_interval=2.0,
                run_timeout=0.2, prefix_timeout=0.4,
            )  # fmt: skip
        case "detokenizer":
            return DetokenizerSettings(
                **COMMON, beacon_interval=0.3, silence_grace=1.0, snapshot_interval=0.4, durable_delay=0.1, vanished_after=0
            )  # fmt: skip
    faults = {POISON: Fault(kind=fault, position=3)} if fault else {}
    fixed = FixedEngineSettings(step_time=STEP, vocab_size=VOCABULARY, faults=faults)
    return WorkerSettings(**COMMON, engine="fixed", fixed=fixed, max_seqs=8, max_waiting=8, outbox_limit=8)


def _drop(*_: Any) -> Any:
    raise structlog.DropEvent


@contextlib.contextmanager
def cheap() -> Iterator[None]:
    """The pace at which services and clients look at the clock; no logs; and what many receive is decoded once."""
    changes: list[tuple[Any, str, Any]] = [
        (module, "TICK", 0.2) for module in (scheduler_service, detokenizer_service, client_module)
    ]
    changes.append((codec, "decode", lru_cache(256)(codec.decode)))
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    config = structlog.get_config()
    structlog.configure(processors=[_drop], wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    for module, name, value in changes:
        setattr(module, name, value)
    try:
        yield
    finally:
        structlog.configure(**config)
        for module, name, value in before:
            setattr(module, name, value)


# ---------------------------------------------------------------- the model


class Letters:
    """Decoding: each id is a letter."""

    def __init__(self, shown: tuple[str, ...] = ()) -> None: ...

    def feed(self, ids: Any) -> str:
        return "".join([chr(97 + token % 26) for token in ids])

    def flush(self) -> str:
        return ""


@cache
def encoder() -> Encoder:
    """Nobody's: prompts are ids."""
    return Encoder(Tokenizer(WordLevel({"?": 0}, unk_token="?")))


def chained_token(state: int, epoch: int, worker: int) -> int:
    return 3 + zlib.crc32(b"%d.%d.%d" % (state, epoch, worker)) % (VOCABULARY - 3)


class ChainedSequence(FixedSequence):
    """Tokens that tell which worker generated them in which epoch."""

    worker = 0

    def next_token(self, settings: FixedEngineSettings) -> int:
        token = chained_token(self.state, self.request.epoch, self.worker)
        self._absorb(token)
        self.generated += 1
        return token


class SimulatedEngine(FixedEngine):
    """`kill` is told of a request that would kill the process."""

    kill: Callable[[], None]

    def _strike(self, fault: Fault, *rest: Any) -> bool:
        if fault.kind == "kill":
            self.kill()
            return False
        return super()._strike(fault, *rest)


# ---------------------------------------------------------------- scenarios


class Ask(NamedTuple):
    """One request of a scenario. Times are seconds after the beginning."""

    id: str
    body: dict[str, Any]
    at: float
    client: int
    cancel_at: float | None = None
    attach_at: float | None = None  # another client follows it, too
    repeat_at: float | None = None  # another client sends it again
    durable: bool = False


class Event(NamedTuple):
    at: float
    what: str  # "kill", "stop", "cut" a process, or "broker"
    stage: str
    number: int
    duration: float


@dataclass
class Scenario:
    chained: bool
    faults: Faults
    asks: list[Ask]
    events: list[Event]
    fault: str = ""  # what the poisonous request does
    copies: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, seed: int) -> Scenario:
        r = random.Random(seed)
        chained = r.random() < 0.5
        fault = r.choice(("raise", "kill", "hang", "error")) if r.random() < 0.04 else ""
        faults = Faults(latency=LATENCY, max_delay=0.15, max_reconnect=0.2)
        for name in ("drop", "duplicate", "delay"):
            setattr(faults, name, r.choice((0.0, 0.0, 0.01, 0.05)))
        for name in ("lose_append", "late_append", "lose_ack"):
            setattr(faults, name, r.choice((0.0, 0.0, 0.02, 0.1)))
        asks = [cls._ask(r, number, chained) for number in range(r.randint(3, 6))]
        if seed % 2:  # drawn apart, so that the others stay what they were
            asks = [cls._of_prompts(random.Random(f"{seed} {ask.id}"), ask) for ask in asks]
        if fault:
            several = random.Random(f"{seed} poison")  # drawn apart, too
            for number in range(several.choice((1, 1, 2, 3))):
                at = 0.1 + number * several.random() * 0.5
                asks.append(Ask(f"poison{number}", dict(prompt=[POISON, 1 + number], max_tokens=12), at, 0))
        copies = dict(tokenizer=r.choice((1, 2)), scheduler=2, model_worker=r.choice((2, 2, 3)), detokenizer=2)
        events = [cls._event(r, copies) for _ in range(r.choice((0, 1, 1, 2, 2, 3, 4)))]
        faults.blind = random.Random(f"{seed} blind").choice((0.0, 0.0, 0.02, 0.1))  # drawn apart, too
        return cls(chained, faults, asks, sorted(events), fault, copies)

    @staticmethod
    def _ask(r: random.Random, number: int, chained: bool) -> Ask:
        tokens = r.randint(4, 16)
        body: dict[str, Any] = dict(prompt=[r.randrange(100, 1000) for _ in range(r.randint(1, 5))], max_tokens=tokens)
        body |= dict(temperature=0) if r.random() < 0.5 else dict(seed=r.randrange(1000))
        at, dice = r.random() * 0.6, r.random()
        ask = Ask(f"r{number}", body, at, r.randrange(2))
        if dice < 0.2:
            body["stop"] = [r.choice("abcdefgh") + r.choice(("", "", "i")) for _ in range(2)]
        elif dice < 0.3:
            body["n"] = 2
        elif dice < 0.4:
            body["deadline"] = r.choice((0.05, 0.3, 2.0))
        elif dice < 0.5:
            return ask._replace(durable=True)
        dice = r.random()
        if dice < 0.15:
            return ask._replace(cancel_at=max(0.0, at + r.random() * 0.5 - 0.05))
        if dice < 0.25:
            return ask._replace(attach_at=at + r.random() * 0.6)
        if dice < 0.32:
            return ask._replace(repeat_at=at + r.random() * 0.6)
        return ask

    @staticmethod
    def _of_prompts(r: random.Random, ask: Ask) -> Ask:
        """What is told of the prompt, in several steps, or only of the best choices."""
        dice, body = r.random(), dict(ask.body)
        if dice < 0.2 and "stop" not in body:
            n = r.choice((1, 2))
            return ask._replace(body=body | dict(n=n, best_of=n + r.choice((1, 2))))
        if dice < 0.6:
            if dice < 0.5:
                body["prompt"] = [r.randrange(100, 1000) for _ in range(r.randint(1, 30))]
                body["prompt_logprobs"] = r.choice((0, 2))
                body["max_tokens"] = r.choice((0, 1, 2, body["max_tokens"]))
            if dice > 0.4:
                body["echo"] = True
        return ask._replace(body=body)

    @staticmethod
    def _event(r: random.Random, copies: dict[str, int]) -> Event:
        stage = r.choice(("model_worker", "model_worker", "scheduler", "detokenizer", "tokenizer", "client", "broker"))
        what = r.choice(("kill", "kill", "stop", "cut"))
        if stage in ("broker", "client"):
            what = stage if stage == "broker" else r.choice(("stop", "cut"))
        duration = r.choice((0.05, 0.3, 0.7, 1.5, 2.5)) * (0.5 + r.random())
        return Event(r.random() * 1.2, what, stage, r.randrange(copies.get(stage, 2)), duration)


# ---------------------------------------------------------------- the deployment


class TracedBroker(MemoryBroker):
    """`trace` is a hash of all that was sent, when, and in which order."""

    def __init__(self, seed: int, faults: Faults) -> None:
        super().__init__(seed, faults)
        self.trace = 0
        self.messages = 0
        self.requests: dict[str, m.Request] = {}  # by key: REQ is trimmed

    def _note(self, subject: str, size: int) -> None:
        now = asyncio.get_running_loop().time()
        self.trace = zlib.crc32(b"%.6f %s %d" % (now, subject.encode(), size), self.trace)
        self.messages += 1

    def route(self, message: Message) -> int:
        self._note(message.subject, len(message.data))
        return super().route(message)

    def append(self, subject: str, data: bytes, msg_id: str | None, expected: int | None) -> Appended:
        self._note(subject, len(data))
        if subject.startswith(subjects.req(MODEL, 0)):
            request = codec.decode_as(m.Request, data)
            self.requests.setdefault(request.key, request)
        return super().append(subject, data, msg_id, expected)


class Seat:
    """A place where a stage's process runs; whoever dies there is replaced."""

    def __init__(self, world: World, stage: str, number: int) -> None:
        self.world, self.stage, self.number = world, stage, number
        self.lives = 0
        self.process: Process
        self.service: Service

    def start(self) -> None:
        self.lives += 1
        name = f"{self.stage}-{self.number}-{self.lives}"
        self.process = self.world.process(name)
        self.service = self.process.call(self._make, self.process.bus)
        self.service.instance = name
        self.process.start(self._run(self.process, self.service))

    def _make(self, bus: MemoryBus) -> Service:
        settings = settings_of(self.stage, self.world.scenario.fault if self.stage == "model_worker" else "")
        match self.stage:
            case "tokenizer":
                return TokenizerService(bus, settings, ModelFiles(encoder(), None, VOCABULARY, None, {}))
            case "scheduler":
                return SchedulerService(bus, settings)
            case "detokenizer":
                return DetokenizerService(bus, settings, Letters)
        self.world.workers += 1
        number, process = self.world.workers, self.process

        def make_engine(settings: WorkerSettings, *callbacks: Any) -> SimulatedEngine:
            engine = SimulatedEngine(settings.fixed, settings.max_seqs, settings.max_waiting, *callbacks)
            if self.world.scenario.chained:
                engine.sequence = type("Numbered", (ChainedSequence,), {"worker": number, "__slots__": ()})
            engine.kill = lambda: self.world.fall(self, process, 0.2)
            return engine

        return WorkerService(bus, settings, make_engine)

    async def _run(self, process: Process, service: Service) -> None:
        while True:
            try:
                await service.start()
                break
            except Exception as error:
                if not isinstance(error, BusError):
                    self.world.complain(f"{process.name} did not start: {error!r}")
                self.world.fall(self, process, 0.1)
                return
        assert service.failed is not None
        try:
            await service.failed
        except EngineDied:
            pass
        except Exception as error:
            self.world.complain(f"{process.name} failed: {error!r}")
        await asyncio.sleep(0.05)
        self.world.fall(self, process, 0.2)


@dataclass
class Followed:
    """What one client saw of one request."""

    ask: Ask
    stream: Stream
    deltas: list[Delta] = field(default_factory=list)
    result: Result | None = None
    error: GorgonError | None = None


class World:
    def __init__(self, seed: int) -> None:
        self.scenario = Scenario.of(seed)
        self.broker = TracedBroker(seed, self.scenario.faults)
        self.complaints: list[str] = []
        self.workers = 0  # incarnations
        self.seats = [Seat(self, s, n) for s, count in self.scenario.copies.items() for n in range(count)]
        self.processes: list[Process] = []
        self.clients: list[tuple[Process, Client]] = []
        self.followed: list[Followed] = []
        self._tasks: list[asyncio.Task[Any]] = []

    def process(self, name: str) -> Process:
        self.processes.append(Process(name, self.broker))
        return self.processes[-1]

    def complain(self, text: str) -> None:
        self.complaints.append(text)

    def fall(self, seat: Seat, process: Process, downtime: float) -> None:
        """The process dies, and is replaced after a time."""
        if process.alive:
            process.kill()
            asyncio.get_running_loop().call_later(downtime, seat.start, context=self.broker.context)

    # ------------------------------------------------ the run

    async def run(self) -> None:
        for spec in stream_specs(settings_of("scheduler")):
            self.broker.ensure_stream(spec)
        for name in (subjects.BUCKET_ASSIGN, subjects.BUCKET_SNAPSHOT):
            self.broker.buckets[name] = BucketState(BucketSpec(name))
        for seat in self.seats:
            seat.start()
        for number in range(2):
            await self._start_client(number)
        loop = asyncio.get_running_loop()
        for event in self.scenario.events:
            loop.call_later(event.at, self._strike, event)
        try:
            async with asyncio.timeout(LONGEST):
                await asyncio.gather(*(self._ask(ask) for ask in self.scenario.asks))
                self._calm()
                await self._rest()
        except TimeoutError:
            raise Broken(f"not over after {LONGEST:g} s: {self._unfinished()}") from None
        self._check()

    async def _start_client(self, number: int) -> None:
        process = self.process(f"client-{number}")
        client = Client(process.bus, MODEL, partitions=PARTITIONS)
        client.inbox = f"_INBOX.c{number}"
        await process.start(client.start())
        self.clients.append((process, client))

    def _strike(self, event: Event) -> None:
        loop = asyncio.get_running_loop()
        if event.stage == "broker":
            if self.broker.up:
                self.broker.kill()
                loop.call_later(event.duration, self.broker.restart)
            return
        seat = None
        if event.stage == "client":
            process = self.clients[event.number][0]
        else:
            seat = next(s for s in self.seats if (s.stage, s.number) == (event.stage, event.number))
            process = seat.process
        match event.what:
            case "kill":
                assert seat is not None
                self.fall(seat, process, event.duration)
            case "stop":
                process.stop()
                loop.call_later(event.duration, process.resume)
            case "cut" if process.alive and not process.bus.partitioned:
                self.broker.disconnect(process.bus)
                loop.call_later(event.duration, lambda: process.alive and self.broker.reconnect(process.bus))

    def _calm(self) -> None:
        """No more faults; what has been stopped or cut off comes back by itself."""
        faults = self.scenario.faults
        faults.drop = faults.duplicate = faults.delay = faults.lose_append = faults.late_append = faults.lose_ack = 0.0
        faults.blind = 0.0

    # ------------------------------------------------ clients

    async def _ask(self, ask: Ask) -> None:
        await asyncio.sleep(ask.at)
        if ask.durable:
            await self._publish_job(ask)
            return
        client = self.clients[ask.client]
        jobs = [self._follow(ask, client, lambda: client[1].generate(id=ask.id, **ask.body))]
        other = self.clients[1 - ask.client]
        if ask.repeat_at is not None:
            jobs.append(
                self._later(ask.repeat_at - ask.at, ask, other, lambda: other[1].generate(id=ask.id, **ask.body))
            )
        if ask.attach_at is not None:
            jobs.append(self._attach(ask, other))
        if ask.cancel_at is not None:
            jobs.append(self._cancel(ask, client))
        await asyncio.gather(*jobs)

    async def _later(self, delay: float, ask: Ask, client: tuple[Process, Client], begin: Callable[[], Stream]) -> None:
        await asyncio.sleep(max(0.0, delay))
        await self._follow(ask, client, begin)

    async def _follow(self, ask: Ask, client: tuple[Process, Client], begin: Callable[[], Stream]) -> None:
        followed = Followed(ask, client[0].call(begin))
        self.followed.append(followed)

        async def read() -> None:
            try:
                async for delta in followed.stream:
                    followed.deltas.append(delta)
                followed.result = await followed.stream.result()
            except GorgonError as error:
                followed.error = error

        await client[0].start(read())

    async def _attach(self, ask: Ask, client: tuple[Process, Client]) -> None:
        assert ask.attach_at is not None
        first = next(f for f in self.followed if f.ask is ask)
        await asyncio.sleep(max(0.0, ask.attach_at - ask.at))
        while not first.deltas and not first.stream.done:  # noqa: ASYNC110 - virtual time
            await asyncio.sleep(0.05)
        if first.error is None:
            await self._follow(ask, client, lambda: client[1].attach(ask.id))

    async def _cancel(self, ask: Ask, client: tuple[Process, Client]) -> None:
        assert ask.cancel_at is not None
        await asyncio.sleep(max(0.0, ask.cancel_at - ask.at))
        stream = next(f for f in self.followed if f.ask is ask).stream
        await client[0].start(stream.cancel())

    async def _publish_job(self, ask: Ask) -> None:
        body = msgpack.packb(dict(id=ask.id, **ask.body))
        self.broker.append(subjects.jobs(MODEL), body, None, None)
        while not any(event["event"] != "tokens" and event["event"] != "accepted" for event in self._results(ask)):  # noqa: ASYNC110
            await asyncio.sleep(0.1)

    def _results(self, ask: Ask) -> list[dict[str, Any]]:
        subject = subjects.results(subjects.request_key("default", ask.id))
        stored = self.broker.streams[subjects.STREAM_RESULTS].messages.values()
        return [msgpack.unpackb(s.data) for s in stored if s.subject == subject]

    # ------------------------------------------------ rest

    async def _rest(self) -> None:
        """Until every pool is empty."""
        while self._busy():  # noqa: ASYNC110 - virtual time
            await asyncio.sleep(0.2)

    def _busy(self) -> list[str]:
        busy = []
        for seat in self.seats:
            service, name = seat.service, seat.process.name
            if not seat.process.alive or seat.process.stopped or not seat.process.bus.connected:
                busy.append(f"{name} is not there")
            elif isinstance(service, WorkerService):
                if service._runs or len(service.outbox) or service.engine.check_idle():
                    busy.append(
                        f"{name}: {list(service._runs)}, outbox {len(service.outbox)}, {service.engine.check_idle()}"
                    )
            elif isinstance(service, SchedulerService):
                if service.ledger.live or service.check_idle():
                    busy.append(f"{name}: {list(service.ledger.live.values())}, {service.check_idle()}")
            elif isinstance(service, DetokenizerService):
                for number, partition in service.partitions.items():
                    if not partition.serving or partition.core.answers or partition._settling or partition._held:
                        busy.append(
                            f"{name}.{number}: {list(partition.core.answers)}, {partition._settling}, {partition._held}"
                        )
            elif isinstance(service, TokenizerService) and service._in_flight:
                busy.append(f"{name}: {service._in_flight}")
        owned = [p for s in self.seats if isinstance(s.service, DetokenizerService) for p in s.service.partitions]
        if sorted(owned) != list(range(PARTITIONS)):
            busy.append(f"partitions {owned} are owned")
        for stream in self.broker.streams.values():
            for name, consumer in stream.consumers.items():
                if consumer.unacked or stream.count(consumer.subject, consumer.next_seq):
                    busy.append(f"{name}: {list(consumer.unacked)}")
        return busy

    def _unfinished(self) -> str:
        streams = [
            f"{f.ask.id}@{f.stream._client.inbox}" for f in self.followed if f.result is None and f.error is None
        ]
        return f"streams {streams}, {self._busy()}"

    # ------------------------------------------------ promises

    def _check(self) -> None:
        for process in self.processes:
            if process.bus.handler_errors:
                self.complain(f"{process.name}: a handler raised")
        truth = self._fold()
        tombstones = self.broker.buckets[subjects.BUCKET_ASSIGN].values
        for key, state in truth.items():
            if state.opened is None:
                continue
            if state.terminal is None:
                self.complain(f"{key} never ended")
            elif (
                not isinstance(value := codec.decode(tombstones[key][0]), m.Tombstone)
                or value.reason != state.terminal.reason
            ):
                self.complain(f"{key}: {value}, but it ended as {state.terminal}")
        for ask in self.scenario.asks:
            state = truth.get(subjects.request_key("default", ask.id))
            if state is None:
                self.complain(f"{ask.id} is not in the log")
            else:
                self._check_request(ask, state)
        if self.complaints:
            raise Broken("; ".join(self.complaints))

    def _fold(self) -> dict[str, RequestState]:
        """The log as it is to be read, by the rules and not by any service."""
        folds = [PartitionFold() for _ in range(PARTITIONS)]
        self.last_replies: dict[str, list[m.ReplyTo | None]] = {}  # when the request ended, and after that
        for stored in self.broker.streams[subjects.STREAM_TOK].messages.values():
            fold = folds[int(stored.subject.rsplit(".", 1)[1])]
            for effect in fold.apply(codec.decode(stored.data), stored.stamp):
                if isinstance(effect, Ended):
                    self.last_replies[effect.key] = [fold.requests[effect.key].reply]
                elif isinstance(effect, Attached) and effect.key in self.last_replies:
                    self.last_replies[effect.key].append(effect.reply)
        return {key: state for fold in folds for key, state in fold.requests.items()}

    def _check_request(self, ask: Ask, state: RequestState) -> None:
        if state.terminal is None:
            return
        reason, code = state.terminal.reason, state.terminal.failure.code if state.terminal.failure else ""
        allowed = {("finished", "")}
        if ask.cancel_at is not None:
            allowed.add(("cancelled", ""))
        if "deadline" in ask.body:
            allowed.add(("error", "deadline_exceeded"))
        if ask.id.startswith("poison"):
            allowed = {("error", "internal" if self.scenario.fault == "error" else "quarantined")}
        if (reason, code) not in allowed:
            self.complain(f"{ask.id} ended as {reason} {code} {state.terminal.failure}")
        for choice, committed in enumerate(state.choices):
            self._check_ids(ask, choice, committed.ids, state)
        self._check_archive(state)
        if ask.durable:
            self._check_durable(ask, state)
        for followed in self.followed:
            if followed.ask is ask:
                self._check_followed(followed, state)

    def _check_archive(self, state: RequestState) -> None:
        """What is kept for those that attach later is what the log says."""
        stored, _ = self.broker.buckets[subjects.BUCKET_SNAPSHOT].values[subjects.archive_key(MODEL, state.key)]
        kept = unpack_answer(stored, Letters).state
        said = [
            (known.terminal, [(c.ids, c.finish, c.stop, c.length) for c in known.choices]) for known in (kept, state)
        ]
        if said[0] != said[1]:
            self.complain(f"{state.key} is kept as {kept}, but the log says {state}")
        replies = self.last_replies[state.key]  # it may have been attached to between its end and its archive
        if kept.reply not in replies:
            self.complain(f"{state.key}: its client was taken to be at {kept.reply}, not at {replies}")

    def _check_ids(self, ask: Ask, choice: int, ids: list[int], state: RequestState) -> None:
        """Every committed token has been generated by someone who knew exactly those before it."""
        request = self.broker.requests[state.key]
        prompt = codec.unpack_ids(request.prompt_ids)
        engine_request = EngineRequest(state.key, choice, 1, prompt, request.sampling)
        fixed = settings_of("model_worker").fixed
        if not self.scenario.chained:
            if ids != expected_ids(engine_request, fixed)[: len(ids)]:
                self.complain(f"{ask.id}.{choice}: {ids} is not what the model says")
            return
        sequence = FixedSequence(engine_request, (0, 0), fixed)
        authors = [(epoch, worker) for epoch in range(1, state.epoch + 1) for worker in range(1, self.workers + 1)]
        epoch, author = 0, (0, 0)
        for position, token in enumerate(ids):
            if position == 0 or token != chained_token(sequence.state, *author):
                found = [a for a in authors if token == chained_token(sequence.state, *a) and a[0] > epoch]
                if not found:
                    self.complain(
                        f"{ask.id}.{choice}: token {position} belongs to another stream, or worker, than {author}"
                    )
                    return
                epoch, author = found[0][0], found[0]
            sequence._absorb(token)

    def _check_followed(self, followed: Followed, state: RequestState) -> None:
        name = f"{followed.ask.id} at {followed.stream._client.inbox}"
        assert state.terminal is not None
        seen: dict[int, tuple[list[int], str]] = {}
        for delta in followed.deltas:
            ids, text = seen.get(delta.choice, ([], ""))
            if (delta.position, delta.offset) != (len(ids), len(text)):
                self.complain(f"{name}: an event at {delta.position}, {delta.offset} after {len(ids)}, {len(text)}")
            seen[delta.choice] = (ids + delta.ids, text + delta.text)
        if followed.error is not None:
            expected = state.terminal.failure.code if state.terminal.failure is not None else state.terminal.reason
            if followed.error.code != expected:
                self.complain(
                    f"{name}: error {followed.error.code} {followed.error.message!r}, but it ended as {expected}"
                )
        elif followed.result is None:
            self.complain(f"{name}: no end")
        elif followed.result.status != state.terminal.reason:
            self.complain(f"{name}: {followed.result.status}, but it ended as {state.terminal.reason}")
        told = [(e["id"], e["logprob"]) for d in followed.deltas if d.choice == m.PROMPT for e in d.logprobs or ()]
        self._check_told(name, followed.ask, state, seen, told)

    def _check_told(
        self, name: str, ask: Ask, state: RequestState, seen: dict[int, tuple[list[int], str]], logprobs: list[Any]
    ) -> None:
        """seen: ids and text by choice, PROMPT too; logprobs: (id, log-probability) of the prompt."""
        assert state.terminal is not None
        ended, body = state.terminal.reason == "finished", ask.body
        numbers = {n: n for n in range(len(state.choices))}
        if "best_of" in body:
            means = [sum(map(fixed_logprob, c.ids)) / max(1, len(c.ids)) for c in state.choices]
            best = sorted(numbers, key=lambda n: -means[n])[: body["n"]]
            numbers = dict(enumerate(best)) if ended else {}
        if ended and sorted(numbers if body["max_tokens"] else ()) != sorted(n for n in seen if n != m.PROMPT):
            self.complain(f"{name}: told of choices {sorted(seen)}, not of {sorted(numbers)}")
        for number, (ids, text) in seen.items():
            if number != m.PROMPT:
                self._compare(name, ids, text, state.choices[numbers[number]].ids, body.get("stop", ()), ended)
        prompt, (ids, text) = body["prompt"], seen.get(m.PROMPT, ([], ""))
        whole = prompt if "echo" in body or "prompt_logprobs" in body else []
        shown = Letters().feed(whole) if "echo" in body else ""
        if ids != whole[: len(ids)] or not shown.startswith(text) or (ended and (ids, text) != (whole, shown)):
            self.complain(f"{name}: {ids} {text!r} was told of the prompt {prompt}")
        if "prompt_logprobs" in body and logprobs != [(t, fixed_logprob(t) if i else None) for i, t in enumerate(ids)]:
            self.complain(f"{name}: {logprobs} was told of the prompt {prompt}")

    def _compare(self, name: str, ids: list[int], text: str, committed: list[int], stops: Any, ended: bool) -> None:
        whole = Letters().feed(committed)
        cut, shown = len(whole), len(committed)
        for end in range(1, len(whole) + 1):
            hits = [stop for stop in stops if whole[:end].endswith(stop)]
            if hits:
                cut, shown = end - max(map(len, hits)), end
                break
        if ended and (ids, text) != (committed[:shown], whole[:cut]):
            self.complain(f"{name}: {ids} {text!r}, but {committed[:shown]} {whole[:cut]!r} was generated")
        if ids != committed[: len(ids)] or not whole.startswith(text):
            self.complain(f"{name}: {ids} {text!r} is no beginning of {committed} {whole!r}")

    def _check_durable(self, ask: Ask, state: RequestState) -> None:
        events = self._results(ask)
        names = [event["event"] for event in events]
        if names[0] != "accepted" or names[-1] != cast(Any, state.terminal).reason or set(names[1:-1]) - {"tokens"}:
            self.complain(f"{ask.id}: results {names}")
        seen: dict[int, tuple[list[int], str]] = {}
        logprobs = []
        for event in events[1:-1]:
            ids, text = seen.get(event["choice"], ([], ""))
            if (event["position"], event["offset"]) != (len(ids), len(text)):
                self.complain(f"{ask.id}: results go on at {event['position']} after {len(ids)}")
            seen[event["choice"]] = (ids + event["ids"], text + event["text"])
            if event["choice"] == m.PROMPT:
                logprobs += [(entry["id"], entry["logprob"]) for entry in event.get("logprobs", ())]
        self._check_told(f"{ask.id}, stored", ask, state, seen, logprobs)


class Outcome(NamedTuple):
    """`seconds` of virtual time; `trace` is the same whenever and wherever the seed is run."""

    trace: int
    messages: int
    seconds: float


def run_seed(seed: int) -> Outcome:
    """Raises Broken with the seed's number in it."""

    async def main() -> Outcome:
        world = World(seed)
        try:
            await world.run()
        finally:
            for process in world.processes:
                process.bury()
        return Outcome(world.broker.trace, world.broker.messages, asyncio.get_running_loop().time())

    collecting = gc.isenabled()
    gc.disable()
    try:
        with asyncio.Runner(loop_factory=SimulationLoop) as runner:
            return runner.run(main())
    except Broken as broken:
        raise Broken(f"seed {seed}: {broken}") from None
    finally:
        if collecting:
            gc.enable()
