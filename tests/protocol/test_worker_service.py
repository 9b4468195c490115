"""The worker's I/O side on the in-memory bus, in virtual time, with the engine that needs no model."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from services.model_worker.__main__ import make_engine
from services.model_worker.engine_api import EngineLimits, OnFatal, OnSteps, Progress
from services.model_worker.fixed_engine import expected_ids
from services.model_worker.interface import EngineRequest, EngineStats, FinishReason, SlotGiven, StepOutput, TokenOutput
from services.model_worker.log_entries import MAX_ENTRIES, Batch
from services.model_worker.service import REMEMBER_ENDED, EndedRuns, EngineDied, StallWatch, WorkerService
from services.model_worker.settings import Fault, FixedEngineSettings, WorkerSettings
from shared import codec, subjects
from shared import messages as m
from shared.bus import MAX_PAYLOAD, Message, StreamSpec
from shared.errors import ErrorCode
from shared.memory_bus import Faults, MemoryBroker, MemoryBus
from shared.sampling import SamplingParams
from shared.tokenlog import PartitionFold, RequestState
from shared.tracing import Span, Tracer
from shared.virtual_time import VirtualTimeLoop
from tests.protocol.virtual import virtual

MODEL = "m"
STEP = 0.02
POISON = 77  # a token id that brings a fault with it


class World:
    """A broker, one worker, and somebody who gives it orders and reads the token log."""

    def __init__(self, fault: Fault | None = None, faults: Faults | None = None, **settings: Any) -> None:
        fixed = FixedEngineSettings(
            step_time=STEP, max_model_len=settings.pop("max_model_len", 1000), faults={POISON: fault} if fault else {}
        )
        self.settings = WorkerSettings(engine="fixed", fixed=fixed, model=MODEL, name="w", partitions=4, **settings)
        self.broker = MemoryBroker(seed=1, faults=faults)
        self.bus = MemoryBus(self.broker)
        self.broker.ensure_stream(StreamSpec(subjects.STREAM_TOK, subjects.STREAM_SUBJECTS[subjects.STREAM_TOK]))
        self.beats: list[m.WorkerHeartbeat] = []

    async def start(self) -> WorkerService:
        await self.bus.subscribe(subjects.heartbeats(), self._on_beat)
        self.worker = WorkerService(MemoryBus(self.broker), self.settings, make_engine)
        await self.worker.start()
        return self.worker

    def _on_beat(self, message: Message) -> None:
        beat = codec.decode(message.data)
        if isinstance(beat, m.WorkerHeartbeat):
            self.beats.append(beat)

    async def order(self, run: m.Run, worker: WorkerService | None = None) -> m.RunReply:
        subject = subjects.worker_run((worker or self.worker).instance)
        return codec.decode_as(m.RunReply, (await self.bus.request(subject, codec.encode(run), 5.0)).data)

    def abort(self, key: str, epoch: int) -> None:
        self.bus.publish(subjects.worker_abort(self.worker.instance), codec.encode(m.Abort(key, epoch)))

    async def append(self, entry: m.Open | m.Fence) -> None:
        subject = subjects.tok(MODEL, subjects.partition_of(entry.key, 4))
        self.broker.append(subject, codec.encode(entry), None, None)

    async def open(self, run: m.Run) -> None:
        opened = m.Open(
            run.key, m.ReplyTo("r"), 1, len(run.prompt_ids) // 4, run.sampling.max_tokens, choices=run.choices
        )
        await self.append(opened._replace(prompt_logprobs=run.sampling.prompt_logprobs is not None))

    def entries(self) -> list[tuple[str, Any]]:
        stored = self.broker.streams[subjects.STREAM_TOK].messages
        return [(stored[seq].subject, codec.decode(stored[seq].data)) for seq in sorted(stored)]

    def tokens_of(self, key: str) -> list[m.Tokens]:
        steps = [entry for _, entry in self.entries() if isinstance(entry, m.StepTokens)]
        return [tokens for step in steps for tokens in step.entries if tokens.key == key]

    def state(self, key: str) -> RequestState:
        fold = PartitionFold()
        for subject, entry in self.entries():
            if subject == subjects.tok(MODEL, subjects.partition_of(key, 4)):
                fold.apply(entry, 0.0)
        return fold.requests[key]

    async def ended(self, key: str, within: float = 60.0) -> RequestState:
        await until(lambda: self.state(key).terminal is not None, within)
        return self.state(key)

    async def idle(self) -> None:
        await until(lambda: not self.worker._runs and not self.worker.outbox)
        assert self.worker.engine.check_idle() == []


async def until(condition: Callable[[], bool], within: float = 60.0) -> None:
    async with asyncio.timeout(within):
        while not condition():  # noqa: ASYNC110 - conditions on the state of a whole world
            await asyncio.sleep(STEP / 4)


def order_for(
    key: str, epoch: int = 1, *, tokens: int = 10, prompt: tuple[int, ...] = (5, 6, 7), n: int = 1, **rest: Any
) -> m.Run:
    wanted = {name: rest.pop(name, None) for name in ("logprobs", "prompt_logprobs")}
    sampling = SamplingParams(max_tokens=tokens, seed=42, **wanted)
    return m.Run(key, epoch, codec.pack_ids(prompt), sampling, n, **rest)


def expected(run: m.Run, world: World, choice: int = 0) -> list[int]:
    request = EngineRequest(run.key, choice, 1, codec.unpack_ids(run.prompt_ids), run.sampling)
    return expected_ids(request, world.settings.fixed)


@virtual
async def test_generated_tokens_reach_the_log_in_one_message_a_step_and_partition() -> None:
    world = World()
    worker = await world.start()
    runs = [order_for(f"t.{i}", n=2, prompt=(i, 9), logprobs=2) for i in range(8)]
    for run in runs:
        await world.open(run)
        assert await world.order(run) == m.RunReply(True)
    for run in runs:
        state = await world.ended(run.key)
        assert state.terminal is not None
        assert state.terminal.reason == "finished"
        assert [c.ids for c in state.choices] == [expected(run, world, 0), expected(run, world, 1)]
        assert state.choices[0].ids != state.choices[1].ids
        assert [c.finish for c in state.choices] == ["length", "length"]
        assert all(t.logprobs is not None and len(t.logprobs[0].top) == 2 for t in world.tokens_of(run.key))
    steps = [(subject, entry.step) for subject, entry in world.entries() if isinstance(entry, m.StepTokens)]
    assert len(steps) == len(set(steps))
    assert all(entry.worker == worker.instance for _, entry in world.entries() if isinstance(entry, m.StepTokens))
    await world.idle()
    await worker.stop()


@virtual
async def test_a_repeated_run_changes_nothing() -> None:
    world = World()
    worker = await world.start()
    run = order_for("t.a")
    await world.open(run)
    for _ in range(3):
        assert (await world.order(run)).accepted
        await asyncio.sleep(2 * STEP)
    await world.ended("t.a")
    await world.idle()
    assert (await world.order(run)).accepted, "also when it has ended"
    await asyncio.sleep(1)
    assert [t.position for t in world.tokens_of("t.a")] == list(range(10))
    await asyncio.sleep(REMEMBER_ENDED)
    assert (await world.order(run)).accepted
    await world.idle()
    await asyncio.sleep(1)
    assert len(world.tokens_of("t.a")) == 20, "another request of that name, by now"
    await worker.stop()


@virtual
async def test_a_higher_epoch_replaces_and_continues_and_lower_ones_are_refused() -> None:
    world = World()
    worker = await world.start()
    run = order_for("t.a", tokens=30)
    await world.open(run)
    await world.order(run)
    await until(lambda: len(world.tokens_of("t.a")) == 7)
    await world.append(m.Fence("t.a", 3))
    prefix = world.state("t.a").choices[0].ids
    assert (await world.order(run._replace(epoch=3, generated=(codec.pack_ids(prefix),)))).accepted
    assert (await world.order(run._replace(epoch=2))).code == "stale_epoch"
    # What a step that was in flight still brings of the old epoch.
    worker._on_steps([StepOutput(99, [TokenOutput("t.a", 0, 1, 7, [9], finish=FinishReason.LENGTH)])])
    state = await world.ended("t.a")
    assert state.choices[0].ids == expected(run, world)
    assert [t.epoch for t in world.tokens_of("t.a")] == [1] * 7 + [3] * 23
    await world.idle()
    assert (await world.order(run)).code == "stale_epoch", "remembered after the end"
    await worker.stop()


def told(state: RequestState) -> list[int]:
    assert state.prompt is not None
    return state.prompt.ids


@virtual
async def test_the_prompt_is_told_once_whenever_its_worker_goes() -> None:
    """Handed over at every step of it; the rest is told by the next, in pieces of another size."""
    prompt = tuple(range(100, 130))
    for steps in range(1, 9):
        world = World()
        worker = await world.start()
        run = order_for("t.a", n=2, tokens=4, prompt=prompt, prompt_logprobs=2)
        await world.open(run)
        await world.order(run)
        await until(lambda world=world, steps=steps: len(world.tokens_of("t.a")) >= steps)
        await worker.drain()
        await worker.stop()
        await world.append(m.Fence("t.a", 2))
        state = world.state("t.a")
        world.settings = world.settings.model_copy(
            update={"name": "w2", "fixed": world.settings.fixed.model_copy(update={"prompt_rows": 5})}
        )
        worker = await world.start()
        if state.terminal is None:
            done = tuple(i for i, choice in enumerate(state.choices) if choice.finish is not None)
            generated = tuple(map(codec.pack_ids, state.prefix))
            again = run._replace(epoch=2, generated=generated, done=done, prompt_done=state.prompt_done)
            assert (await world.order(again)).accepted
        state = await world.ended("t.a")
        assert told(state) == list(prompt)
        assert [c.ids for c in state.choices] == [expected(run, world, 0), expected(run, world, 1)]
        accepted = [t for t in world.tokens_of("t.a") if t.choice == m.PROMPT]
        assert all(len(t.logprobs or ()) == len(t.ids) // 4 for t in accepted)
        assert len(accepted[0].logprobs[0].top) == 0 and len(accepted[-1].logprobs[-1].top) == 2  # type: ignore[index]
        await world.idle()
        await worker.stop()


@virtual
async def test_nothing_to_generate() -> None:
    world = World()
    worker = await world.start()
    for key, wanted in (("t.a", 0), ("t.b", None)):
        run = order_for(key, tokens=0, n=2, prompt_logprobs=wanted)
        await world.open(run)
        await world.order(run)
        state = await world.ended(key)
        assert [(c.ids, c.finish) for c in state.choices] == [([], "length")] * 2
        assert state.prompt is None or state.prompt.ids == [5, 6, 7]
    await world.idle()
    await worker.stop()


def test_messages_are_cut_by_entries_and_by_bytes() -> None:
    row = m.TokenLogprobs(-12.345678, codec.pack_ids(range(20)), tuple(-1.1 * i for i in range(20)))

    def entry(ids: int) -> m.Tokens:
        key = "t" * 64 + "." + "r" * 64  # the longest
        return m.Tokens(key, m.PROMPT, 1, 0, codec.pack_ids(range(ids)), logprobs=(row,) * ids)

    sizes = [512] * 20 + [1] * 2500 + [512]
    batch = Batch()
    for size in sizes:
        batch.add(entry(size))
    parts = batch.messages()
    assert [len(t[4]) // 4 for part in parts for t in part] == sizes
    assert all(len(part) <= MAX_ENTRIES for part in parts)
    lengths = [len(codec.encode(m.StepTokens("w", 1, part))) for part in parts]  # type: ignore[arg-type]
    assert max(lengths) < MAX_PAYLOAD / 4


@virtual
async def test_finished_choices_of_a_migrated_request_are_not_run_again() -> None:
    world = World()
    worker = await world.start()
    run = order_for("t.a", n=2)
    await world.open(run)
    done, half = expected(run, world, 0), expected(run, world, 1)[:4]
    await world.order(run._replace(epoch=2, generated=(codec.pack_ids(done), codec.pack_ids(half)), done=(0,)))
    await world.idle()
    tokens = world.tokens_of("t.a")
    assert {t.choice for t in tokens} == {1}
    assert [i for t in tokens for i in codec.unpack_ids(t.ids)] == expected(run, world, 1)[4:]
    assert tokens[0].position == 4
    await worker.stop()


@virtual
async def test_abort_ends_this_and_lower_epochs_even_if_it_comes_first() -> None:
    world = World()
    worker = await world.start()
    run = order_for("t.a", tokens=500)
    await world.open(run)
    await world.order(run)
    await until(lambda: len(world.tokens_of("t.a")) >= 3)
    world.abort("t.a", 1)
    await world.idle()
    before = len(world.tokens_of("t.a"))
    assert (await world.order(run)).code == "stale_epoch"
    world.abort("t.b", 2)
    await asyncio.sleep(0)
    assert (await world.order(order_for("t.b", 2))).code == "stale_epoch"
    assert (await world.order(order_for("t.b", 3))).accepted
    await world.idle()
    assert len(world.tokens_of("t.a")) == before
    assert not any(t.finish == "aborted" for t in world.tokens_of("t.a"))
    await worker.stop()


@pytest.mark.parametrize("how", ["broker killed", "disk full", "acks lost"])
@virtual
async def test_a_stalled_log_pauses_the_engine_and_loses_nothing(how: str) -> None:
    world = World(outbox_limit=8)
    worker = await world.start()
    runs = [order_for(f"t.{i}", tokens=200) for i in range(6)]
    for run in runs:
        await world.open(run)
        await world.order(run)
    await asyncio.sleep(10 * STEP)
    match how:
        case "broker killed":
            world.broker.kill()
        case "disk full":
            world.broker.disk_full = True
        case "acks lost":
            world.broker.faults.lose_append = 1.0
    await asyncio.sleep(4.0)
    stalled = worker.engine.stats().step
    assert len(worker.outbox) <= 8 + 2 * 4, "bounded: the limit, and what the steps in flight still bring"
    await asyncio.sleep(6.0)
    assert worker.engine.stats().step == stalled, "paused"
    assert worker.heartbeat().base.in_flight == 6
    match how:
        case "broker killed":
            world.broker.restart()
        case "disk full":
            world.broker.disk_full = False
        case "acks lost":
            world.broker.faults.lose_append = 0.0
    for run in runs:
        assert (await world.ended(run.key)).choices[0].ids == expected(run, world)
    await world.idle()
    await worker.stop()


@virtual
async def test_lossy_appends_still_give_whole_streams() -> None:
    world = World(faults=Faults(lose_append=0.05, lose_ack=0.05, late_append=0.02, latency=0.001))
    worker = await world.start()
    runs = [order_for(f"t.{i}", tokens=60) for i in range(10)]
    for run in runs:
        await world.open(run)
        await world.order(run)
    for run in runs:
        assert (await world.ended(run.key)).choices[0].ids == expected(run, world)
    await world.idle()
    await worker.stop()


@virtual
async def test_a_request_is_reported_until_its_finish_is_stored() -> None:
    world = World()
    worker = await world.start()
    run = order_for("t.a", tokens=3)
    await world.open(run)
    await world.order(run)
    world.broker.faults.lose_append = 1.0
    await asyncio.sleep(3.0)
    assert worker.engine.check_idle() == [], "the engine is through"
    assert world.beats[-1].running == {"t.a": 1}
    world.broker.faults.lose_append = 0.0
    await world.ended("t.a")
    await until(lambda: world.beats[-1].running == {})
    await worker.stop()


@virtual
async def test_a_run_between_two_heartbeats_is_reported_once() -> None:
    world = World(heartbeat_interval=1.0)
    worker = await world.start()
    await asyncio.sleep(0.1)
    run = order_for("t.a", tokens=3)
    await world.open(run)
    await world.order(run)
    await world.ended("t.a", within=0.5)
    await asyncio.sleep(5.0)
    assert [beat.running for beat in world.beats] == [{}, {"t.a": 1}, *[{}] * (len(world.beats) - 2)]
    assert [beat.base.in_flight for beat in world.beats] == [0] * len(world.beats)
    await worker.stop()


@virtual
async def test_drain_puts_everything_generated_into_the_log_and_reports_nothing_more() -> None:
    world = World(faults=Faults(latency=0.003))
    worker = await world.start()
    runs = [order_for(f"t.{i}", tokens=100, n=1 + i % 2) for i in range(12)]
    for run in runs:
        await world.open(run)
        await world.order(run)
    await asyncio.sleep(20 * STEP)
    world.broker.disk_full = True
    await asyncio.sleep(10 * STEP)
    world.broker.disk_full = False
    assert worker.outbox, "there is something to flush"
    loop = asyncio.get_running_loop()
    began = loop.time()
    draining = asyncio.create_task(worker.drain())
    await asyncio.sleep(0)
    assert (await world.order(order_for("t.late"))).code == "draining"
    await draining
    await asyncio.sleep(0.01)
    assert loop.time() - began < 1.0
    assert world.beats[-1].base.draining
    assert world.beats[-1].running == {}
    generated = worker.engine.stats().tokens_generated
    assert sum(len(world.tokens_of(run.key)) for run in runs) == generated > 0
    await worker.stop()
    world.worker = successor = await World.start(world)
    for run in runs:
        await world.append(m.Fence(run.key, 2))
        prefix = tuple(codec.pack_ids(ids) for ids in world.state(run.key).prefix)
        assert (await world.order(run._replace(epoch=2, generated=prefix))).accepted
    for run in runs:
        state = await world.ended(run.key)
        assert [c.ids for c in state.choices] == [expected(run, world, c) for c in range(run.choices)]
    await successor.stop()


@virtual
async def test_drain_does_not_wait_for_a_log_that_is_gone() -> None:
    world = World()
    worker = await world.start()
    await world.order(order_for("t.a", tokens=500))
    await asyncio.sleep(5 * STEP)
    world.broker.kill()
    await asyncio.sleep(5 * STEP)
    began = asyncio.get_running_loop().time()
    await worker.drain()
    assert asyncio.get_running_loop().time() - began < 1.0
    await worker.stop()


@virtual
async def test_an_error_fails_its_request_only_and_all_its_choices() -> None:
    world = World(Fault(kind="error", position=4))
    worker = await world.start()
    bad, good = order_for("t.bad", n=2, tokens=50, prompt=(1, POISON)), order_for("t.good", tokens=50)
    for run in (bad, good):
        await world.open(run)
        await world.order(run)
    state = await world.ended("t.bad")
    assert state.terminal == ("error", m.Failure("internal", "injected fault"))
    assert [len(c.ids) for c in state.choices] == [4, 4]
    errors = [t for t in world.tokens_of("t.bad") if t.finish == "error"]
    assert [(t.choice, t.position) for t in errors] == [(0, 4)]
    assert (await world.ended("t.good")).choices[0].ids == expected(good, world)
    await world.idle()
    await worker.stop()


@virtual
async def test_a_deadline_ends_the_request_with_its_own_code() -> None:
    world = World()
    worker = await world.start()
    run = order_for("t.a", tokens=500, n=2, deadline=0.5)
    await world.open(run)
    await world.order(run)
    state = await world.ended("t.a", within=1.0)
    assert state.terminal is not None
    assert state.terminal.failure is not None
    assert state.terminal.failure.code == "deadline_exceeded"
    assert 15 <= len(state.choices[0].ids) <= 25
    await world.idle()
    await worker.stop()


@virtual
async def test_refusals_have_codes_and_leave_nothing_behind() -> None:
    world = World(max_seqs=2, max_waiting=2, max_model_len=50)
    worker = await world.start()
    assert (await world.order(order_for("t.long", prompt=(1,) * 50))).code == "context_length_exceeded"
    assert (await world.order(order_for("t.odd", prompt=(1, 5000)))).code == "invalid_request"
    assert (await world.order(order_for("t.a", n=3))).accepted
    assert (await world.order(order_for("t.b", n=2))).code == "overloaded"
    assert (await world.order(order_for("t.c"))).accepted
    assert set(worker.heartbeat().running) == {"t.a", "t.c"}  # type: ignore[union-attr]
    answer = await world.bus.request(subjects.worker_run(worker.instance), b"\x93\x14rubbish", 1.0)
    assert not codec.decode_as(m.RunReply, answer.data).accepted
    world.bus.publish(subjects.worker_abort(worker.instance), b"rubbish")
    await world.idle()
    assert (await world.order(order_for("t.b", n=2))).accepted, "a refused order can come again"
    await world.idle()
    await worker.stop()


@virtual
async def test_a_failing_step_names_its_requests_and_ends_the_process() -> None:
    world = World(Fault(kind="raise", position=3), max_seqs=2)
    worker = await world.start()
    for name, prompt in (("a", (1,)), ("b", (1, POISON)), ("waiting", (1,))):
        await world.order(order_for(f"t.{name}", prompt=prompt))
    assert worker.failed is not None
    with pytest.raises(EngineDied):
        await asyncio.wait_for(worker.failed, 5.0)
    await asyncio.sleep(0)
    assert world.beats[-1].suspects == ("t.a", "t.b")
    assert world.beats[-1].running == {"t.a": 1, "t.b": 1, "t.waiting": 1}
    assert (await world.order(order_for("t.c"))).code == "draining"
    await worker.stop()


@virtual
async def test_an_isolated_request_shares_no_step_until_it_has_come_further() -> None:
    world = World(Fault(kind="raise", position=0))
    worker = await world.start()
    other = order_for("t.a", tokens=100)
    await world.open(other)
    await world.order(other)
    await until(lambda: bool(world.tokens_of("t.a")))
    await world.order(order_for("t.harmless", tokens=100, n=2, isolated=True))
    assert worker.heartbeat().isolated == ("t.harmless",)  # type: ignore[union-attr]
    await until(lambda: not worker.heartbeat().isolated)  # type: ignore[union-attr]
    assert {tokens.choice for tokens in world.tokens_of("t.harmless")} == {0, 1}
    before = len(world.tokens_of("t.a"))
    await asyncio.sleep(5 * STEP)
    assert len(world.tokens_of("t.a")) > before, "they share steps again"
    await world.order(order_for("t.suspect", prompt=(1, POISON), isolated=True))
    assert worker.failed is not None
    with pytest.raises(EngineDied):
        await asyncio.wait_for(worker.failed, 5.0)
    await asyncio.sleep(0)
    assert world.beats[-1].suspects == ("t.suspect",)
    await worker.stop()


@virtual
async def test_a_second_suspect_is_refused_until_the_first_has_a_token_in_the_log() -> None:
    """Two schedulers may send one each. Who waits behind poison would die with it, as often as it takes to be taken for poison, too."""
    world = World(faults=Faults(latency=STEP / 2))
    worker = await world.start()
    first, second = (order_for(f"t.{name}", tokens=100, isolated=True) for name in ("first", "second"))
    await world.open(first)
    assert (await world.order(first)).accepted
    unstored = 0
    while worker.heartbeat().isolated:  # type: ignore[union-attr]
        assert worker._accept(second).code == ErrorCode.OVERLOADED
        unstored += worker._runs["t.first"].lengths[0] > 0
        await asyncio.sleep(STEP / 10)
    assert unstored and world.tokens_of("t.first"), "a token proves nothing before it is in the log"
    assert (await world.order(second)).accepted
    await worker.stop()


@pytest.mark.parametrize("choices", [1, 2])
@virtual
async def test_a_suspect_that_has_come_through_steps_is_cleared_though_the_log_takes_nothing(choices: int) -> None:
    """Else whatever happens to the worker while the log stands still would count against it."""
    world = World()
    worker = await world.start()
    world.broker.disk_full = True
    assert (await world.order(order_for("t.a", tokens=100, n=choices, isolated=True))).accepted
    lengths = worker._runs["t.a"].lengths
    await until(lambda: bool(world.beats[-1].cleared))
    assert world.beats[-1].cleared == world.beats[-1].isolated == ("t.a",) and min(lengths) >= 3
    assert not world.tokens_of("t.a")
    world.broker.disk_full = False
    await world.open(order_for("t.a", tokens=100, n=choices))
    await until(lambda: not world.beats[-1].isolated and not world.beats[-1].cleared)
    await worker.stop()


@virtual
async def test_only_what_each_choice_has_come_through_clears_a_suspect() -> None:
    """Neither what is told of its prompt nor what another of its choices does."""
    world = World()
    worker = await world.start()
    world.broker.disk_full = True
    worker.engine.submit = lambda requests: None  # type: ignore[method-assign]
    assert (await world.order(order_for("t.a", tokens=100, n=2, isolated=True))).accepted
    run = worker._runs["t.a"]

    def come(choice: int, position: int, ids: list[int]) -> bool:
        output = TokenOutput("t.a", choice, run.epoch, position, ids)
        worker._on_steps([StepOutput(position, [output], seconds=0.1)])
        return run.cleared

    assert not any(come(m.PROMPT, 512 * piece, [1] * 512) for piece in range(4))
    assert not any(come(0, position, [1]) for position in range(6))
    assert [come(1, position, [1]) for position in range(3)] == [False, False, True]
    await worker.stop()


@pytest.mark.parametrize("position", [0, 1, 2])
@virtual
async def test_poison_is_not_cleared_by_the_steps_before_it(position: int) -> None:
    world = World(Fault(kind="raise", position=position))
    worker = await world.start()
    world.broker.disk_full = True
    await world.order(order_for("t.suspect", prompt=(1, POISON), isolated=True))
    assert worker.failed is not None
    with pytest.raises(EngineDied):
        await asyncio.wait_for(worker.failed, 5.0)
    await asyncio.sleep(0)
    assert world.beats[-1].suspects == ("t.suspect",) and not any(beat.cleared for beat in world.beats)
    await worker.stop()


@virtual
async def test_a_suspect_is_refused_while_others_take_their_first_step() -> None:
    """Poison that was moved there and whose first step is under way would take it along. Those that wait for a slot are kept apart."""
    world = World(max_seqs=1)
    worker = await world.start()
    suspect = order_for("t.suspect", isolated=True)
    await world.open(first := order_for("t.first", epoch=2, tokens=100))
    await world.append(m.Fence("t.first", 2))
    assert (await world.order(first)).accepted
    while not world.tokens_of("t.first"):
        refused = worker._accept(suspect)
        assert (refused.code, refused.only_this) == (ErrorCode.OVERLOADED, True)
        await asyncio.sleep(STEP / 10)
    assert (await world.order(order_for("t.waits"))).accepted
    assert (await world.order(suspect)).accepted
    await worker.stop()


@virtual
async def test_new_requests_keep_no_suspect_waiting() -> None:
    world = World()
    worker = await world.start()
    assert (await world.order(order_for("t.new"))).accepted
    assert worker._accept(order_for("t.suspect", isolated=True)).accepted
    await worker.stop()


@virtual
async def test_a_hung_step_is_visible_at_once_and_ends_the_process_in_the_end() -> None:
    world = World(Fault(kind="hang", position=2))
    worker = await world.start()
    await world.order(order_for("t.a", prompt=(POISON,)))
    await asyncio.sleep(1.5)
    assert (await world.order(order_for("t.late"))).accepted
    beat = worker.heartbeat()
    assert isinstance(beat, m.WorkerHeartbeat)
    assert beat.step_age > beat.step_bound
    assert beat.running == {"t.a": 1, "t.late": 1}
    assert beat.behind == ("t.late",)
    assert worker.failed is not None
    with pytest.raises(EngineDied):
        await asyncio.wait_for(worker.failed, 5.0)
    await worker.stop()


@virtual
async def test_stopped_time_is_no_stall() -> None:
    world = World()
    worker = await world.start()
    await world.order(order_for("t.a"))
    stats = worker.engine.stats()
    assert stats.step_started is not None
    watch = StallWatch()
    assert watch.observe(100.0, stats, 0.2) == 0.0
    assert watch.observe(100.1, stats, 0.2) == pytest.approx(0.1)
    assert watch.observe(500.0, stats, 0.2) == pytest.approx(0.3), "the process was stopped in between"
    await worker.stop()


def test_ended_runs_are_remembered_within_bounds() -> None:
    ended = EndedRuns(3)
    ended.add("a", 2, True, 1.0)
    ended.add("a", 1, False, 2.0)
    assert ended.completed("a", 2)
    assert ended.epoch("a") == 2
    for key in "bcd":
        ended.add(key, 1, True, 3.0)
    assert ended.epoch("a") == 0
    assert [ended.epoch(key) for key in "bcd"] == [1, 1, 1]
    ended.add("d", 2, True, 4.0)
    ended.add("d", 1, True, 3.5 + REMEMBER_ENDED)
    assert [ended.epoch(key) for key in "bcd"] == [0, 0, 2], "the time is over for the first two"
    ended.add("d", 1, True, 4.5 + REMEMBER_ENDED)
    assert not ended.completed("d", 2)


@virtual
async def test_loading_is_reported_and_orders_are_taken_only_when_ready() -> None:
    world = World()
    loading = asyncio.Event()

    def slow_engine(settings: WorkerSettings, *callbacks: Any) -> Any:
        engine = make_engine(settings, *callbacks)

        async def load(progress: Callable[[str, float], None]) -> None:
            progress("weights", 0.25)
            await loading.wait()

        engine.load = load  # type: ignore[method-assign]
        return engine

    plain: list[m.Heartbeat] = []
    await world.bus.subscribe(subjects.heartbeats(), lambda message: plain.append(codec.decode(message.data)))
    worker = WorkerService(MemoryBus(world.broker), world.settings, slow_engine)
    starting: Awaitable[None] = asyncio.ensure_future(worker.start())
    await asyncio.sleep(1.0)
    assert isinstance(plain[-1], m.Heartbeat)
    assert plain[-1].detail == {"loading": "weights", "load": 0.25}
    loading.set()
    await starting
    await asyncio.sleep(0.2)
    assert isinstance(plain[-1], m.WorkerHeartbeat)
    await worker.stop()


class ScriptedEngine:
    """Takes everything and gives out what the test says."""

    limits = EngineLimits(1000, 512, 8, 16)

    def __init__(self, on_steps: OnSteps) -> None:
        self.on_steps = on_steps
        self.submitted: list[EngineRequest] = []
        self.aborted: list[tuple[str, int]] = []

    async def load(self, progress: Progress) -> None:
        progress("nothing", 1.0)

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        self.submitted += requests

    def abort(self, request_id: str, epoch: int) -> None:
        self.aborted.append((request_id, epoch))

    def pause(self, paused: bool) -> None:
        pass

    async def stop(self) -> None:
        pass

    def stats(self) -> EngineStats:
        return EngineStats(1, None, 1.0, {}, 0, 0, 8, 8, 8, 8, 0, 0, 0, 0)

    def check_idle(self) -> list[str]:
        return []


@virtual
async def test_a_beam_search_is_one_sequence_that_begins_anew() -> None:
    world = World(heartbeat_interval=0.1)
    engines: list[ScriptedEngine] = []

    def scripted(settings: WorkerSettings, on_steps: OnSteps, on_fatal: OnFatal) -> ScriptedEngine:
        engines.append(ScriptedEngine(on_steps))
        return engines[-1]

    await world.bus.subscribe(subjects.heartbeats(), world._on_beat)
    world.worker = WorkerService(MemoryBus(world.broker), world.settings, scripted)
    await world.worker.start()
    (engine,) = engines
    sampling = SamplingParams(max_tokens=10, num_beams=4, temperature=0.0)
    # Migrated, isolated, and the first choice had been stored before the old worker died.
    run = m.Run("t.a", 3, codec.pack_ids([5, 6]), sampling, 3, (codec.pack_ids([7, 8]), b"", b""), (0,), isolated=True)
    await world.open(run)
    await world.append(m.Fence("t.a", 3))
    assert (await world.order(run)).accepted
    (request,) = engine.submitted
    assert (request.choice, request.choices, list(request.generated_ids)) == (1, 3, [])
    await until(lambda: world.beats[-1].isolated == ("t.a",))
    engine.on_steps([StepOutput(1, [TokenOutput("t.a", 1, 3, 0, [])])])
    await until(lambda: world.beats[-1].running == {"t.a": 3} and not world.beats[-1].isolated)
    assert not world.tokens_of("t.a")
    found = [[7, 8], [9, 9, 9], [4]]
    outputs = [TokenOutput("t.a", c, 3, 0, ids, finish=FinishReason.LENGTH) for c, ids in enumerate(found)]
    engine.on_steps([StepOutput(9, outputs)])
    await world.idle()
    stored = world.tokens_of("t.a")
    assert [(t.choice, t.position, codec.unpack_ids(t.ids)) for t in stored] == [(1, 0, [9, 9, 9]), (2, 0, [4])]
    assert [tokens.finish for tokens in stored] == ["length", "length"]


@virtual
async def test_a_failed_or_late_beam_search_fails_all_choices() -> None:
    world = World()
    engines: list[ScriptedEngine] = []
    world.worker = WorkerService(
        MemoryBus(world.broker),
        world.settings,
        lambda s, on_steps, f: engines.append(ScriptedEngine(on_steps)) or engines[-1],
    )
    await world.worker.start()
    (engine,) = engines
    run = m.Run("t.a", 1, codec.pack_ids([5]), SamplingParams(num_beams=2), 2, deadline=1.0)
    await world.open(run)
    assert (await world.order(run)).accepted
    engine.on_steps([StepOutput(4, [TokenOutput("t.a", 0, 1, 0, [], finish=FinishReason.DEADLINE)])])
    await world.idle()
    assert (await world.ended("t.a")).terminal is not None
    (tokens,) = world.tokens_of("t.a")
    assert tokens.failure is not None and tokens.failure.code == "deadline_exceeded"


class SpanRecorder(Tracer):
    """Keeps when each span began and ended."""

    enabled = True

    def __init__(self) -> None:
        self.times: dict[str, tuple[float, float]] = {}

    def record(self, name: str, parent: str, start: float, end: float, **rest: Any) -> Span:
        self.times[name] = start, end
        return Span(parent)


@pytest.mark.parametrize(("late", "took"), [(0.003, STEP), (0.0, -0.0004)])
@virtual
async def test_the_phases_of_a_run_follow_one_another(late: float, took: float) -> None:
    """late: from the slot, given within `submit`, to the end of `submit`. took: from the slot to the tokens; below 0 where the
    engine's clock is finer than the loop's."""
    world = World()
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    engines: list[AtOnce] = []

    class AtOnce(ScriptedEngine):
        def submit(self, requests: Sequence[EngineRequest]) -> None:
            super().submit(requests)
            self.slot = SlotGiven("t.a", 0, 1, loop.time() + max(0.0, -took))
            loop._now += late

    world.worker = WorkerService(
        MemoryBus(world.broker),
        world.settings,
        lambda s, on_steps, f: engines.append(AtOnce(on_steps)) or engines[-1],
    )
    world.worker.tracer = recorder = SpanRecorder()
    await world.worker.start()
    (engine,) = engines
    await asyncio.sleep(1.0)
    await world.open(run := order_for("t.a", tokens=1))
    assert (await world.order(run)).accepted
    loop._now = max(loop.time(), engine.slot.when + took)
    tokens = TokenOutput("t.a", 0, 1, 0, [7], finish=FinishReason.LENGTH)
    # What an earlier epoch of the request was given, is not this run's.
    earlier = SlotGiven("t.a", 0, 0, engine.slot.when - 0.5)
    engine.on_steps([StepOutput(1, [tokens], admitted=[earlier, engine.slot])])
    await world.idle()
    await world.worker.stop()
    generate, *phases = (recorder.times[name] for name in ("generate", "queue", "prefill", "decode"))
    assert generate[0] == phases[0][0]
    assert all(began <= ended for began, ended in (generate, *phases))
    assert [ended for _, ended in phases[:-1]] == [began for began, _ in phases[1:]]
    lengths = [ended - began for began, ended in phases]
    assert lengths == pytest.approx([max(0.0, -took), max(0.0, took), 0.0], abs=1e-5)
