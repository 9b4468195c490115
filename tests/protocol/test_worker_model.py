"""The worker with the real engine and a real (tiny) model, on the in-memory bus and the real clock."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

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
        await self.append(m.Open(run.key, m.ReplyTo("r"), 1, 1, run.sampling.max_tokens, choices=run.choices))

    async def until(self, key: str, tokens: int | None = None) -> RequestState:
        """Until the request has ended, or has that many tokens in its first choice."""
        async with asyncio.timeout(30):
            while True:
                self._changed.clear()
                state = self.fold.requests.get(key)
                if state and (state.terminal or (tokens is not None and len(state.choices[0].ids) >= tokens)):
                    return state
                await self._changed.wait()


def order(key: str, prompt: list[int], **sampling: float) -> m.Run:
    return m.Run(key, 1, codec.pack_ids(prompt), SamplingParams(**sampling))  # type: ignore[arg-type]


async def test_greedy_ids_equal_the_golden_ones_and_sampled_streams_survive_a_handover() -> None:
    golden = json.loads((FOLDER / "golden.json").read_text())
    prompt, greedy = golden["prompt_ids"], golden["greedy_ids"][len(golden["prompt_ids"]) :]
    world = World()
    reading = asyncio.create_task(world.read())
    worker = await world.start()
    sampling = {"max_tokens": 400, "temperature": 0.8, "seed": 11, "frequency_penalty": 0.3}
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


async def test_a_failing_step_is_reported_with_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    worker = await world.start()
    runner = worker.engine._engine.runner  # type: ignore[attr-defined]

    def fail(plan: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(runner, "launch", fail)
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
