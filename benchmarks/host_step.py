"""What a decode step costs the host: the engine's own loop over a device whose work is nothing, and the service behind it.

    python -m benchmarks.host_step --batches 1 8 64 256

Prompts run for real, on a tiny model on the CPU. Then a steady batch decodes with graphs whose replay gives prepared tokens: one a
sequence, or with a tree two to four. A line is microseconds of a step: the engine's thread as a whole, its parts, microseconds of a
sequence, and what the service takes in the event loop's thread to bring the step into a token log in memory.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import logging
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np
import structlog
import torch

from benchmarks.workloads import SHAPES
from services.model_worker.engine import Engine, EngineConfig, EngineRequest, StepOutput
from services.model_worker.engine_api import EngineLimits, OnFatal, OnSteps, Progress
from services.model_worker.interface import EngineStats
from services.model_worker.models.config import load_config
from services.model_worker.readback import Ticket
from services.model_worker.sampler import Sampled
from services.model_worker.service import WorkerService
from services.model_worker.settings import WorkerSettings
from services.model_worker.speculation.medusa import MedusaHeads, save_heads
from shared import codec, subjects
from shared import messages as m
from shared.bus import StreamSpec
from shared.memory_bus import MemoryBroker, MemoryBus
from shared.sampling import SamplingParams

PROMPT = 40
WARM_UP = 20  # steps


class IdleGraphs:
    """Replays give prepared ids: one for each row, or with `width` two to four."""

    def __init__(self, rows: int, width: int) -> None:
        rng = np.random.default_rng(0)
        self._prepared = []
        for _ in range(8):
            ids = rng.integers(10, 500, (rows, width))
            if width > 1:
                ids[np.arange(width) >= rng.integers(2, 5, (rows, 1))] = -1
            self._prepared.append(torch.from_numpy(ids))
        self._next = itertools.cycle(self._prepared)

    def replay(self, key: Hashable) -> Any:
        return Sampled(next(self._next))


class Clock:
    """Seconds by part, of functions that it wraps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def wrap(self, owner: Any, name: str, part: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - start

        setattr(owner, name, timed)


def make_engine(folder: Path, batch: int, tree: bool, on_step: Callable[[StepOutput], None]) -> Engine:
    (folder / "config.json").write_text(json.dumps(SHAPES["tiny"]))
    if tree:
        model = load_config(folder)
        save_heads(MedusaHeads.initial(4, 1, model.hidden_size), folder / "medusa", torch.float32, {})
    engine = Engine(
        EngineConfig(
            folder, load_format="dummy", device="cpu", max_model_len=4096, max_seqs=batch, num_blocks=batch * 256, overlap=True,
            speculate=tree, max_batched_tokens=16_384,
        ),
        on_step,
    )  # fmt: skip
    engine.load()
    return engine


def requests(batch: int) -> list[EngineRequest]:
    rng = np.random.default_rng(1)
    params = SamplingParams(max_tokens=4000, temperature=0.0, stop_token_ids=(3,))
    # Lengths differ, so that blocks fill up in different steps.
    return [
        EngineRequest(f"t.{i}", 0, 1, rng.integers(10, 500, PROMPT + i % 16).tolist(), params) for i in range(batch)
    ]


def engine_steps(batch: int, tree: bool, steps: int) -> tuple[dict[str, float], list[StepOutput]]:
    """Microseconds of a step by part, and what the steps gave out."""
    outputs: list[StepOutput] = []
    with tempfile.TemporaryDirectory() as name:
        engine = make_engine(Path(name), batch, tree, outputs.append)
    engine._accepting = True
    engine.submit(*requests(batch))
    clock = Clock()
    with engine.runner.context():
        while len(engine.scheduler.running) < batch or any(f.plan.chunks for f in engine._in_flight):
            engine._turn()
        width = 1
        if engine.trees is not None:
            picked = next(t for t in engine.trees.trees if t.depth >= 3 and t.size * batch <= 4096)
            width, pick = picked.depth + 1, engine.trees.pick
            engine.trees.pick = lambda *batch: (pick(*batch), picked)[1]  # type: ignore[method-assign]
        engine.runner.graphs = IdleGraphs(batch, width)  # type: ignore[assignment]
        for _ in range(WARM_UP):
            engine._turn()
        outputs.clear()
        gc.collect()
        gc.freeze()
        start = time.perf_counter()
        for _ in range(steps):
            engine._turn()
        whole = time.perf_counter() - start
        clock.wrap(engine.scheduler, "schedule", "schedule")
        clock.wrap(engine.runner, "forward", "launch")
        clock.wrap(engine.runner, "choose", "launch")
        clock.wrap(engine.scheduler, "retire", "retire")
        clock.wrap(engine, "_on_step", "output")
        result = Ticket.result
        clock.wrap(Ticket, "result", "readback")
        for _ in range(steps):
            engine._turn()
        Ticket.result = result  # type: ignore[method-assign]
    parts = {part: seconds / steps * 1e6 for part, seconds in clock.seconds.items()}
    gc.unfreeze()
    return {"whole": whole / steps * 1e6, **parts}, outputs


class NoEngine:
    """Takes every order; the steps come from elsewhere."""

    limits = EngineLimits(4096, 512, 256, 16)

    def __init__(self, settings: WorkerSettings, on_steps: OnSteps, on_fatal: OnFatal) -> None:
        self.on_steps = on_steps

    async def load(self, progress: Progress) -> None:
        progress("nothing", 1.0)

    def submit(self, requests: Any) -> None: ...
    def abort(self, request_id: str, epoch: int) -> None: ...
    def pause(self, paused: bool) -> None: ...
    async def stop(self) -> None: ...
    def check_idle(self) -> list[str]:
        return []

    def stats(self) -> EngineStats:
        return EngineStats(1, None, 1.0, {}, 0, 0, 8, 8, 8, 8, 0, 0, 0, 0)


async def service_steps(batch: int, steps: list[StepOutput]) -> dict[str, float]:
    """Microseconds of a step: `encode`, until the outbox has it, and `publish`, until the token log has."""
    broker = MemoryBroker(seed=1)
    broker.ensure_stream(StreamSpec(subjects.STREAM_TOK, subjects.STREAM_SUBJECTS[subjects.STREAM_TOK]))
    worker = WorkerService(MemoryBus(broker), WorkerSettings(engine="fixed", model="m", name="w"), NoEngine)
    await worker.start()
    for request in requests(batch):
        worker._accept(m.Run(request.request_id, 1, codec.pack_ids(request.prompt_ids), request.params, 1))
    encode, publish = [], []
    for step in steps:
        start = time.perf_counter()
        worker._on_steps([step])
        encoded = time.perf_counter()
        await worker.outbox.flush()
        encode.append(encoded - start)
        publish.append(time.perf_counter() - encoded)
    await worker.stop()
    return {"encode": statistics.mean(encode) * 1e6, "publish": statistics.mean(publish) * 1e6}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    names = ["whole", "schedule", "launch", "readback", "retire", "output", "encode", "publish"]
    print("| batch | " + " | ".join(names) + " | engine, a sequence | service, a sequence |")
    print("|---|" + "---|" * (len(names) + 2))
    for tree, batch in itertools.product((False, True), arguments.batches):
        parts, outputs = engine_steps(batch, tree, arguments.steps)
        parts |= asyncio.run(service_steps(batch, outputs))
        service = (parts["encode"] + parts["publish"]) / batch
        cells = [*(f"{parts[name]:.0f}" for name in names), f"{parts['whole'] / batch:.2f}", f"{service:.2f}"]
        print(f"| {batch}{', tree' if tree else ''} | " + " | ".join(cells) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
