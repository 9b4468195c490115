"""What is measured: a running deployment through NATS, or the engine alone in this process."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
from pydantic import TypeAdapter

from services.bench.measure import Timeline
from services.bench.workloads import Planned
from shared import presence, subjects
from shared.bus import Bus, Message
from shared.messages import WorkerHeartbeat
from shared.sampling import SamplingParams

DRIFT = 0.0005  # seconds: what is due sooner than this is sent at once


class Run:
    """The requests under way of one run. A target calls `tokens` and `end` as they come."""

    def __init__(self, planned: list[Planned]) -> None:
        self._loop = asyncio.get_running_loop()
        self.began = self._loop.time()
        self.timelines = [Timeline(request.at, len(request.prompt)) for request in planned]
        self._open = len(planned)
        self._done = asyncio.Event()

    def now(self) -> float:
        return self._loop.time() - self.began

    def tokens(self, number: int, count: int, time: float) -> None:
        if count:
            self.timelines[number].events.append((time, count))

    def end(self, number: int, time: float, error: str = "") -> None:
        timeline = self.timelines[number]
        if timeline.ended is None:
            timeline.ended, timeline.error = time, error
            self._open -= 1
            if not self._open:
                self._done.set()

    async def send(self, planned: list[Planned], send: Callable[[int], None], timeout: float) -> list[Timeline]:
        """Each request in its time; returns when all have ended, or gives up on those that have not."""
        for number, request in sorted(enumerate(planned), key=lambda pair: pair[1].at):
            if (wait := request.at - self.now()) > DRIFT:
                await asyncio.sleep(wait)
            send(number)
        try:
            await asyncio.wait_for(self._done.wait(), timeout)
        except TimeoutError:
            for number in range(len(self.timelines)):
                self.end(number, self.now(), "no end in time")
        return self.timelines


class Pipeline:
    """A deployment, asked for arrays of events in MessagePack, as a gateway would. `begin` learns what its workers hold."""

    def __init__(self, bus: Bus, model: str) -> None:
        self._bus = bus
        self._model = model
        self.vocabulary = self.context = 0

    async def begin(self) -> None:
        """Raises LookupError if no worker of the model answers."""
        beats = [b for b in await presence.gather(self._bus, 1.0) if isinstance(b, WorkerHeartbeat)]
        mine = [beat for beat in beats if beat.base.model == self._model]
        if not mine:
            raise LookupError(f"no worker serves {self._model!r}")
        self.vocabulary = min(beat.vocab_size for beat in mine)
        self.context = min(beat.max_model_len for beat in mine)

    async def run(self, planned: list[Planned], timeout: float) -> list[Timeline]:
        name = uuid.uuid4().hex[:12]
        inbox = self._bus.new_inbox()
        bodies = [self._body(f"{name}-{number}", request) for number, request in enumerate(planned)]
        run = Run(planned)

        def on_message(message: Message) -> None:
            now = run.now()
            for event in msgpack.unpackb(message.data) if message.data else ():
                number = int(event["id"].rpartition("-")[2])
                match event["event"]:
                    case "tokens":
                        run.tokens(number, len(event["ids"]), now)
                    case "finished":
                        run.end(number, now)
                    case "error":
                        run.end(number, now, event["code"])
                    case "cancelled":
                        run.end(number, now, "cancelled")

        subscription = await self._bus.subscribe(inbox, on_message)
        try:
            run.began = asyncio.get_running_loop().time()
            subject = subjects.generate(self._model)
            return await run.send(
                planned, lambda number: self._bus.publish(subject, bodies[number], reply=inbox), timeout
            )
        finally:
            await subscription.unsubscribe()

    def _body(self, request_id: str, request: Planned) -> bytes:
        body: dict[str, Any] = dict(
            id=request_id,
            prompt=request.prompt,
            max_tokens=request.output,
            temperature=request.temperature,
            seed=1,
            ignore_eos=True,
            batched=True,
        )
        data: bytes = msgpack.packb(body)
        return data


class EngineAlone:
    """The model worker's engine in this process, token ids in and out; needs torch. `options`: fields of its EngineConfig."""

    def __init__(self, model_path: Path, **options: Any) -> None:
        """Raises TypeError for options that there are not, ValueError for values that do not fit them."""
        from services.model_worker.engine import Engine, EngineConfig

        EngineConfig(model_path, **options)  # names; pydantic overlooks those that it does not know
        config = TypeAdapter(EngineConfig).validate_python(dict(model=model_path, **options))
        self._engine = Engine(config, self._on_step, self._on_fatal)
        self._run: Run | None = None
        self._loop: asyncio.AbstractEventLoop
        self._error: BaseException | None = None
        self._runs = 0
        self.vocabulary = self.context = 0

    def load(self, progress: Callable[[float, str], None]) -> None:
        """Raises ModelError; blocks."""
        self._engine.load(progress)
        self._engine.start()
        self.vocabulary, self.context = self._engine.info.vocab_size, self._engine.info.max_model_len

    def stop(self) -> None:
        self._engine.stop(timeout=30)

    def _on_step(self, step: Any) -> None:
        """On the engine's thread: takes the time, the rest is done on the loop."""
        if (run := self._run) is not None:
            self._loop.call_soon_threadsafe(self._take, run, step, run.now())

    def _take(self, run: Run, step: Any, now: float) -> None:
        for output in step.outputs:
            name, number = output.request_id.split("-")
            if name == str(self._runs):
                run.tokens(int(number), len(output.ids), now)
                if output.finish is not None:
                    run.end(int(number), now)
        for error in step.errors:
            run.end(int(error.request_id.split("-")[1]), now, error.code)

    def _on_fatal(self, error: BaseException, suspects: Any) -> None:
        self._error = error
        self._loop.call_soon_threadsafe(self._give_up)

    def _give_up(self) -> None:
        if self._run is not None:
            for number in range(len(self._run.timelines)):
                self._run.end(number, self._run.now(), "the engine has died")

    async def run(self, planned: list[Planned], timeout: float) -> list[Timeline]:
        from services.model_worker.engine import EngineRequest

        if self._error is not None:
            raise RuntimeError("the engine has died") from self._error
        self._loop = asyncio.get_running_loop()
        self._runs += 1
        requests = [
            EngineRequest(
                f"{self._runs}-{number}",
                0,
                1,
                request.prompt,
                SamplingParams(
                    max_tokens=request.output, temperature=request.temperature, seed=number, ignore_eos=True
                ),
            )
            for number, request in enumerate(planned)
        ]
        run = self._run = Run(planned)
        timelines = await run.send(planned, lambda number: self._engine.submit(requests[number]), timeout)
        self._run = None
        return timelines
