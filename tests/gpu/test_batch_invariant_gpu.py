"""The engine in its batch-invariant mode: in bf16, with CUDA graphs, a request's tokens depend on nothing but the request."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.workloads import SHAPES
from services.model_worker.engine import Engine, EngineConfig, EngineRequest
from shared.sampling import SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9:
    pytest.skip("needs a GPU of capability 9.0", allow_module_level=True)

OUTPUT = 48


class Collector:
    """Runs requests to their end."""

    def __init__(self, folder: Path, batch_invariant: bool) -> None:
        self.ids: dict[str, list[int]] = {}
        self._left = 0
        self._done = threading.Event()
        self._error: BaseException | None = None
        config = EngineConfig(
            folder,
            load_format="dummy",
            max_model_len=4096,
            max_seqs=64,
            max_batched_tokens=1024,
            gpu_memory_fraction=0.5,
            batch_invariant=batch_invariant,
        )
        self.engine = Engine(config, self._on_step, self._on_fatal)
        self.engine.load(lambda part, what: None)
        self.engine.start()

    def _on_step(self, step) -> None:
        for output in step.outputs:
            self.ids.setdefault(output.request_id, []).extend(output.ids)
            self._left -= output.finish is not None
        if self._left == 0:
            self._done.set()

    def _on_fatal(self, error: BaseException, *_: object) -> None:
        self._error = error
        self._done.set()

    def run(self, requests: list[EngineRequest]) -> dict[str, list[int]]:
        self.ids, self._left = {}, len(requests)
        self._done.clear()
        self.engine.submit(*requests)
        assert self._done.wait(240)
        if self._error is not None:
            raise self._error
        return self.ids


def request(number: int, prompt: list[int], generated: list[int] | None = None) -> EngineRequest:
    params = SamplingParams(
        max_tokens=OUTPUT, temperature=0.0 if number % 2 else 0.9, top_p=0.95, seed=number, ignore_eos=True
    )
    return EngineRequest(f"r{number}", 0, 1, prompt, params, generated or ())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["qwen3-0.6b"]))
    return tmp_path


def test_tokens_do_not_depend_on_batch_chunks_or_migration(folder: Path) -> None:
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 150_000, int(rng.integers(5, 1800))).tolist() for _ in range(48)]
    worker = Collector(folder, batch_invariant=True)
    try:
        together = {name: list(ids) for name, ids in worker.run([request(i, p) for i, p in enumerate(prompts)]).items()}
        for number in range(0, 48, 5):
            alone = worker.run([request(number, prompts[number])])
            assert alone[f"r{number}"] == together[f"r{number}"], "alone"
        half = OUTPUT // 2
        moved = worker.run([request(i, p, together[f"r{i}"][:half]) for i, p in enumerate(prompts)])
        assert moved == {name: ids[half:] for name, ids in together.items()}, "continued elsewhere"
    finally:
        worker.engine.stop(timeout=30)
