"""The torch engine, which runs steps on a thread of its own, as an engine_api.Engine for the event loop."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from services.model_worker.engine import Engine, EngineConfig
from services.model_worker.engine_api import EngineLimits, OnFatal, OnSteps, Progress
from services.model_worker.interface import EngineRequest, EngineStats, StepOutput
from services.model_worker.settings import WorkerSettings


def engine_config(settings: WorkerSettings) -> EngineConfig:
    return EngineConfig(
        model=Path(settings.model_path),
        load_format=settings.load_format,
        device=settings.device,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        max_seqs=settings.max_seqs,
        max_batched_tokens=settings.max_batched_tokens,
        block_size=settings.block_size,
        num_blocks=settings.num_blocks,
        gpu_memory_fraction=settings.gpu_memory_fraction,
        cpu_cache_bytes=settings.cpu_cache_bytes,
        speculate=settings.speculate,
        eight_bit_drafts=settings.eight_bit_drafts,
        batch_invariant=settings.batch_invariant,
        heads=None if settings.heads is None else Path(settings.heads),
        max_tree_rows=settings.max_tree_rows,
        typical_acceptance=settings.typical_acceptance,
        amateur=None if settings.amateur is None else Path(settings.amateur),
        memories=settings.memories,
        memory_tokens=settings.memory_tokens,
        prefix_cache=settings.prefix_cache,
        cuda_graphs=settings.cuda_graphs,
        max_waiting=settings.max_waiting,
        min_step_bound=settings.min_step_bound,
        first_step_bound=settings.first_step_bound,
    )


# Seconds after which a thread that wants the interpreter gets it. The engine's thread gives it away with each of the many small
# operations that a step with prompts is launched by, and waits so long for each to get it back while the event loop's takes in a
# burst of requests: with Python's 5 ms it would hardly come to launching.
SWITCH_INTERVAL = 0.0001
# Seconds for the step in flight to end when the worker must go.
STOP_TIMEOUT = 0.5


class ThreadedEngine:
    """See engine_api.Engine."""

    def __init__(self, settings: WorkerSettings, on_steps: OnSteps, on_fatal: OnFatal) -> None:
        sys.setswitchinterval(SWITCH_INTERVAL)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self._engine = Engine(engine_config(settings), self._step_retired, self._died)
        self._on_steps = on_steps
        self._on_fatal = on_fatal
        self._loop: asyncio.AbstractEventLoop
        # Steps on their way to the loop. One wake-up takes all that have gathered.
        self._retired: deque[StepOutput] = deque()
        self._woken = False

    @property
    def limits(self) -> EngineLimits:
        info = self._engine.info
        return EngineLimits(info.max_model_len, info.vocab_size, self._engine.config.max_seqs, info.block_size)

    async def load(self, progress: Progress) -> None:
        self._loop = loop = asyncio.get_running_loop()

        def report(fraction: float, what: str) -> None:
            loop.call_soon_threadsafe(progress, what, fraction)

        def load_and_start() -> None:
            self._engine.load(report)
            self._engine.start()

        await _in_thread(load_and_start, "load")

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        self._engine.submit(*requests)

    def abort(self, request_id: str, epoch: int) -> None:
        self._engine.abort(request_id, epoch)

    def pause(self, paused: bool) -> None:
        self._engine.pause_output(paused)

    async def stop(self) -> None:
        await _in_thread(lambda: self._engine.stop(timeout=STOP_TIMEOUT), "stop")
        self._take_retired()

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def check_idle(self) -> list[str]:
        return self._engine.check_idle()

    # ------------------------------------------------ from the engine's thread

    def _step_retired(self, step: StepOutput) -> None:
        self._retired.append(step)
        if not self._woken:
            self._woken = True
            self._loop.call_soon_threadsafe(self._take_retired)

    def _died(self, error: BaseException, suspects: Sequence[tuple[str, int]]) -> None:
        ids = list(dict.fromkeys(request_id for request_id, _ in suspects))
        self._loop.call_soon_threadsafe(self._on_fatal, error, ids)

    # ------------------------------------------------ on the loop

    def _take_retired(self) -> None:
        self._woken = False  # before looking: a step that retires from now on wakes the loop again
        steps = [self._retired.popleft() for _ in range(len(self._retired))]
        if steps:
            self._on_steps(steps)


async def _in_thread(function: Callable[[], Any], name: str) -> None:
    """Runs a blocking function on a daemon thread, which does not keep the process from exiting as an executor's would."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def run() -> None:
        error = None
        try:
            function()
        except BaseException as raised:
            error = raised
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, error)

    threading.Thread(target=run, name=f"engine-{name}", daemon=True).start()
    await done
