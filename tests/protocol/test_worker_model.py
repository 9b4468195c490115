"""The worker with the real engine and a real (tiny) model, on the in-memory bus and the real clock."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from services.model_worker.__main__ import make_engine
from services.model_worker.service import EngineDied, WorkerService
from services.model_worker.settings import WorkerSettings
from shared import codec, subjects
from shared import messages as m
from shared.bus import Message, StreamSpec
from shared.memory_bus import MemoryBroker, MemoryBus
from shared.sampling import SamplingParams
from shared.tokenlog import PartitionFold, RequestState

FOLDER = Path(__file__).resolve().parents[3] / "shared/data/weights/stories260K"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="../shared/data/weights is not here")
MODEL = "stories"


class World:
    """A worker on the model, and a reader of its one partition of the token log."""

    def __init__(self) -> None:
        self.settings = WorkerSettings(
            model=MODEL, model_path=str(FOLDER), name="w", partitions=1, device="cpu", threads=1, max_seqs=16
        )
        self.broker = MemoryBroker()
        self.broker.ensure_stream(StreamSpec(subjects.STREAM_TOK, subjects.STREAM_SUBJECTS[subjects.STREAM_TOK]))
        self.bus = MemoryBus(self.broker)
        self.fold = PartitionFold()
        self.beats: list[m.Heartbeat | m.WorkerHeartbeat] = []
        self._changed = asyncio.Event()

    async def start(self) -> WorkerService:
        await self.bus.subscribe(subjects.heartbeats(), self._on_beat)
        worker = WorkerService(MemoryBus(self.broker), self.settings, make_engine)
        await worker.start()
        return worker

    def _on_beat(self, message: Message) -> None:
        self.beats.append(codec.decode(message.data))

    async def read(self) -> None:
        """Folds the log for ever."""
        follower = await self.bus.follow(subjects.STREAM_TOK, subjects.tok(MODEL, 0), 1)
        async for stored in follower:
            self.fold.apply(codec.decode(stored.data), stored.stamp)
            self._changed.set()

    async def append(self, entry: m.Open | m.Fence) -> None:
        await self.bus.append(subjects.tok(MODEL, 0), codec.encode(entry))

    async def run(self, worker: WorkerService, run: m.Run) -> m.RunReply:
        answer = await self.bus.request(subjects.worker_run(worker.instance), codec.encode(run), 5.0)
        return codec.decode_as(m.RunReply, answer.data)

    async def open(self, run: m.Run) -> None:
        opened = m.Open(
            run.key, m.ReplyTo("r"), 1, len(run.prompt_ids) // 4, run.sampling.max_tokens, choices=run.choices
        )
        await self.append(opened._replace(prompt_logprobs=run.sampling.prompt_logprobs is not None))

    async def until(self, key: str, tokens: int | None = None) -> RequestState:
        """Until the request has ended, or has that many tokens in its first choice."""
        async with asyncio.timeout(30):
            while True:
                self._changed.clear()
                state = self.fold.requests.get(key)
                if state and (state.terminal or (tokens is not None and len(state.choices[0].ids) >= tokens)):
                    return state
                await self._changed.wait()


def order(key: str, prompt: list[int], **sampling: Any) -> m.Run:
    return m.Run(key, 1, codec.pack_ids(prompt), SamplingParams(**sampling))


async def test_greedy_ids_equal_the_golden_ones_and_sampled_streams_survive_a_handover() -> None:
    golden = json.loads((FOLDER / "golden.json").read_text())
    prompt, greedy = golden["prompt_ids"], golden["greedy_ids"][len(golden["prompt_ids"]) :]
    world = World()
    reading = asyncio.create_task(world.read())
    worker = await world.start()
    sampling = {
        "max_tokens": 400, "temperature": 0.8, "seed": 11, "frequency_penalty": 0.3, "typical_p": 0.95, "min_tokens": 390,
        "logit_bias": ((400, -5.0), (410, 2.0)), "bad_words": ((261, 378), (403, 407, 261), (300,)),
    }  # fmt: skip
    first = order("t.greedy", prompt, max_tokens=len(greedy), temperature=0.0)
    whole = order("t.whole", prompt, **sampling)
    moved = [order(f"t.moved{i}", prompt, **sampling) for i in range(4)]
    for run in (first, whole, *moved):
        await world.open(run)
        assert (await world.run(worker, run)).accepted
    assert (await world.until("t.greedy")).choices[0].ids == greedy
    for at, run in zip((60, 100, 140, 180), moved, strict=True):
        await world.until(run.key, tokens=at)
    began = time.monotonic()
    await worker.drain()
    assert time.monotonic() - began < 1.0
    await asyncio.sleep(0.01)
    last = world.beats[-1]
    assert isinstance(last, m.WorkerHeartbeat)
    assert last.running == {}
    assert last.base.draining
    await worker.stop()

    worker = await world.start()
    for run in (*moved, whole):
        await world.append(m.Fence(run.key, 2))
        await asyncio.sleep(0.01)
        prefix = world.fold.requests[run.key].prefix
        assert len(prefix[0]) >= 60, "the handover kept what was generated"
        again = run._replace(epoch=2, generated=tuple(map(codec.pack_ids, prefix)))
        assert (await world.run(worker, again)).accepted
    # The uninterrupted run, with other neighbours in its batches.
    control = order("t.control", prompt, **sampling)
    await world.open(control)
    await world.run(worker, control)
    expected = (await world.until("t.control")).choices[0].ids
    assert len(expected) > 180
    for run in (*moved, whole):
        assert (await world.until(run.key)).choices[0].ids == expected
    async with asyncio.timeout(5):
        while worker.heartbeat().base.in_flight or worker.engine.check_idle():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await worker.stop()
    reading.cancel()


async def test_a_prompt_is_told_by_two_workers() -> None:
    """The first is handed over in the middle; what the second says is what one alone would have said."""
    prompt = [1, *(3 + (11 * i * i) % 500 for i in range(400))]
    world = World()
    world.settings = world.settings.model_copy(update={"max_batched_tokens": 16})
    reading = asyncio.create_task(world.read())
    told: dict[str, list[m.TokenLogprobs]] = {}
    committed = world.fold._commit

    def commit(request: RequestState, choice: Any, tokens: m.Tokens, effects: Any) -> None:
        if tokens.choice == m.PROMPT:
            told.setdefault(request.key, []).extend(tokens.logprobs or ())
        committed(request, choice, tokens, effects)

    world.fold._commit = commit  # type: ignore[method-assign]
    worker = await world.start()
    engine = worker.engine._engine  # type: ignore[attr-defined]
    forward, steps = engine.runner.forward, 0

    def pausing(plan: Any) -> Any:
        """Stops in the middle of the prompt, however slow this thread is to notice."""
        nonlocal steps
        steps += 1
        engine.pause_output(steps >= 8)
        return forward(plan)

    engine.runner.forward = pausing
    run = order("t.moved", prompt, max_tokens=20, temperature=0.0, prompt_logprobs=3)._replace(choices=2)
    await world.open(run)
    await world.run(worker, run)
    async with asyncio.timeout(10):
        while len(told.get(run.key, ())) < 100:  # noqa: ASYNC110
            await asyncio.sleep(0)
    await worker.drain()
    await worker.stop()
    await world.append(m.Fence(run.key, 2))
    await asyncio.sleep(0.01)
    state = world.fold.requests[run.key]
    assert 100 <= state.prompt_done < len(prompt) and state.prefix == ([], [])
    worker = await world.start()
    again = run._replace(epoch=2, generated=(b"", b""), prompt_done=state.prompt_done)
    assert (await world.run(worker, again)).accepted
    moved = await world.until(run.key)
    control = run._replace(key="t.control")
    await world.open(control)
    await world.run(worker, control)
    alone = await world.until(control.key)
    assert moved.prompt is not None and moved.prompt.ids == prompt
    assert [c.ids for c in moved.choices] == [c.ids for c in alone.choices]
    assert len(told[run.key]) == len(told[control.key]) == len(prompt)
    for got, wanted in zip(told[run.key], told[control.key], strict=True):
        assert got.chosen == pytest.approx(wanted.chosen, abs=1e-4) and got.top_ids == wanted.top_ids
    await worker.stop()
    reading.cancel()


async def test_a_failing_step_is_reported_with_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    worker = await world.start()
    runner = worker.engine._engine.runner  # type: ignore[attr-defined]

    def fail(plan: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(runner, "forward", fail)
    assert (await world.run(worker, order("t.a", [1, 2, 3], max_tokens=4))).accepted
    assert worker.failed is not None
    with pytest.raises(EngineDied):
        await asyncio.wait_for(worker.failed, 10)
    await asyncio.sleep(0.01)
    last = world.beats[-1]
    assert isinstance(last, m.WorkerHeartbeat)
    assert last.suspects == ("t.a",)
    await worker.stop()


async def test_bad_orders_are_refused_by_the_engine_with_a_code() -> None:
    world = World()
    worker = await world.start()
    assert (await world.run(worker, order("t.long", [5] * 600))).code == "context_length_exceeded"
    refused = await world.run(worker, order("t.odd", [5, 100_000]))
    assert not refused.accepted
    assert refused.code not in {"overloaded", "draining", "stale_epoch"}
    await worker.stop()
