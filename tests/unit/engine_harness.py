"""Runs requests through a real engine on the CPU and collects what comes out."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from services.model_worker.engine import (
    Engine,
    EngineConfig,
    EngineRequest,
    FinishReason,
    RequestError,
    StepOutput,
    TokenLogprobs,
    TokenOutput,
)
from services.model_worker.interface import PROMPT
from services.model_worker.model_runner import ModelRunner
from services.model_worker.step_plan import StepPlan
from shared.sampling import SamplingParams

SHARED = Path(__file__).resolve().parents[3] / "shared"
TIMEOUT = 60.0

needs_weights = pytest.mark.skipif(not (SHARED / "data/weights").is_dir(), reason="../shared/data/weights is not here")


def weights(name: str) -> Path:
    return SHARED / "data/weights" / name


def save_first_layers(source: Path, layers: int, folder: Path) -> Any:
    """A smaller model of the same vocabulary: transformers' model in `source` without its last layers, which it returns, in f32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype="float32").eval()
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:layers]
    model.save_pretrained(folder)
    return model


@dataclass
class Collected:
    """One sequence's output, checked to come without gaps as it is collected."""

    start: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: FinishReason | None = None
    stop_token: int | None = None
    error: RequestError | None = None

    def add(self, output: TokenOutput) -> None:
        assert self.finish is None, "an output after the finish"
        assert output.position == self.start + len(self.ids)
        self.ids += output.ids
        self.logprobs += output.logprobs or []
        self.finish, self.stop_token = output.finish, output.stop_token


class Harness:
    def __init__(self, config: EngineConfig) -> None:
        self.engine = Engine(config, self._on_step, self._on_fatal)
        self.fatal: tuple[BaseException, list[tuple[str, int]]] | None = None
        self.outputs: dict[tuple[str, int, int], Collected] = {}
        self.prompts: dict[tuple[str, int], Collected] = {}  # what was told of prompts, by request and epoch
        self.steps: list[StepOutput] = []
        self._changed = threading.Condition()
        self._pause_after: int | None = None

    def _on_step(self, step: StepOutput) -> None:
        with self._changed:
            self.steps.append(step)
            for token in step.outputs:
                if token.choice == PROMPT:
                    name = token.request_id, token.epoch
                    self.prompts.setdefault(name, Collected(token.position)).add(token)
                else:
                    self.outputs[token.request_id, token.choice, token.epoch].add(token)
            for error in step.errors:
                self.outputs[error.request_id, error.choice, error.epoch].error = error
            if self._pause_after is not None:
                self._pause_after -= sum(len(token.ids) for token in step.outputs)
                if self._pause_after <= 0:
                    self._pause_after = None
                    self.engine.pause_output(True)
            self._changed.notify_all()

    def _on_fatal(self, error: BaseException, suspects: list[tuple[str, int]]) -> None:
        with self._changed:
            self.fatal = error, suspects
            self._changed.notify_all()

    def submit(self, request: EngineRequest) -> Collected:
        collected = Collected(len(request.generated_ids))
        self.outputs[request.request_id, request.choice, request.epoch] = collected
        self.engine.submit(request)
        return collected

    def submit_and_pause(self, requests: Iterable[EngineRequest], tokens: int) -> list[Collected]:
        """Lets the engine come to that many tokens and pauses it there, however slow this thread is to notice."""
        self._pause_after = tokens
        self.engine.pause_output(False)
        outputs = [self.submit(request) for request in requests]
        self.wait_for(lambda: self._pause_after is None)
        return outputs

    def wait_for(self, condition: Any, timeout: float = TIMEOUT) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: condition() or self.fatal, timeout), "timed out"
        if self.fatal is not None:
            raise self.fatal[0]

    def wait(self, outputs: Iterable[Collected]) -> None:
        outputs = list(outputs)
        self.wait_for(lambda: all(o.finish is not None or o.error is not None for o in outputs))

    def run(self, requests: Iterable[EngineRequest]) -> list[Collected]:
        outputs = [self.submit(request) for request in requests]
        self.wait(outputs)
        return outputs

    def settle(self) -> None:
        """Drains and stops; everything must be back."""
        self.engine.stop(drain=True, timeout=TIMEOUT)
        assert self.fatal is None, self.fatal
        assert self.engine.check_idle() == []


@contextmanager
def running(model: Path, **options: Any) -> Iterator[Harness]:
    """An engine on the CPU with overlap on, as on a GPU; on leaving, drained and checked to be empty."""
    options = {"device": "cpu", "overlap": True, "max_seqs": 16, "cpu_cache_bytes": 16 << 20, **options}
    harness = Harness(EngineConfig(model, **options))
    harness.engine.load()
    harness.engine.start()
    try:
        yield harness
    except BaseException:
        harness.engine.stop(timeout=TIMEOUT)
        raise
    harness.settle()


def launched_plans(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> list[StepPlan]:
    """What the runner launches from now on."""
    plans: list[StepPlan] = []
    launch = runner.launch
    monkeypatch.setattr(runner, "launch", lambda plan: (plans.append(plan), launch(plan))[1])
    return plans


class RepeatedFunctions:
    """Stands in for CUDA graphs on a CPU: a replay runs the function again and fills the tensors that the capture returned."""

    def __init__(self) -> None:
        self.captured: dict[Hashable, tuple[Callable[[], Any], Any]] = {}
        self.replayed: set[Hashable] = set()

    def capture(self, key: Hashable, function: Callable[[], Any], rehearsed: bool = False) -> Any:
        self.captured[key] = function, function()
        return self.captured[key][1]

    def replay(self, key: Hashable) -> Any:
        self.replayed.add(key)
        function, outputs = self.captured[key]
        for old, new in zip(_tensors(outputs), _tensors(function()), strict=True):
            old.copy_(new)
        return outputs


def _tensors(result: Any) -> Iterator[Tensor]:
    """The tensors in a dataclass of dataclasses."""
    if isinstance(result, Tensor):
        yield result
    elif dataclasses.is_dataclass(result):
        for entry in dataclasses.fields(result):
            yield from _tensors(getattr(result, entry.name))


def greedy(name: str, prompt: Iterable[int], max_tokens: int = 64, **options: Any) -> EngineRequest:
    """A greedy request that only max_tokens ends, unless `params` in options says otherwise."""
    params = {"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True, **options.pop("params", {})}
    return EngineRequest(name, 0, 1, tuple(prompt), SamplingParams(**params), **options)


def dummy_model(folder: Path, **changes: Any) -> Path:
    """A folder with the config.json of a small Llama, to be loaded with load_format="dummy"."""
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 256, "eos_token_id": 2,
    } | changes  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
