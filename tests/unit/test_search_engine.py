"""Searches beside everything else that a step can hold, on a random model; what the reference says is in the tests of each search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from services.model_worker.engine import EngineRequest
from services.model_worker.warm_up import warm_up
from shared.sampling import SamplingParams
from tests.unit.engine_harness import Harness, RepeatedFunctions, dummy_model, running
from tests.unit.test_speculation_engine import VOCABULARY, RandomPicks, random_heads

PROMPT = [5, 6, 7, 8, 9, 10, 11]
TOKENS = 24
SEARCHES: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3, "temperature": 0.0},
    "more beams": {"num_beams": 4, "temperature": 0.0, "length_penalty": 2.0, "early_stopping": "never"},
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4, "temperature": 0.0},
    "three candidates": {"penalty_alpha": 0.2, "top_k": 3, "temperature": 0.0},
    "contrastive decoding": {"cd_alpha": 0.1, "temperature": 0.0},
    "sampled": {"cd_alpha": 0.02, "cd_beta": 0.5, "temperature": 1.5, "top_p": 0.9, "typical_p": 0.9, "seed": 3},
}
PLAIN: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "filtered": {"temperature": 1.5, "top_k": 10, "seed": 5},
    "penalised": {"temperature": 0.0, "frequency_penalty": 1.0, "logprobs": 2},
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = dummy_model(tmp_path_factory.mktemp("dummy"), vocab_size=VOCABULARY)
    random_heads(folder / "medusa", 32)
    return folder


def options(model: Path) -> dict[str, Any]:
    """The amateur is the same shape with other random weights."""
    return {"load_format": "dummy", "amateur": model, "memories": 2, "memory_tokens": 128, "max_seqs": 16}


def run_all(harness: Harness, suffix: str = "", only: str | None = None) -> dict[str, list[int]]:
    kinds = {kind: params for kind, params in (SEARCHES | PLAIN).items() if only in (None, kind)}
    requests = [
        EngineRequest(kind + suffix, 0, 1, PROMPT, SamplingParams(max_tokens=TOKENS, ignore_eos=True, **params))
        for kind, params in kinds.items()
    ]
    return {kind: output.ids for kind, output in zip(kinds, harness.run(requests), strict=True)}


@pytest.fixture(scope="module")
def alone(model: Path) -> dict[str, list[int]]:
    """Each kind by itself, without guesses."""
    with running(model, speculate=False, **options(model)) as harness:
        found = {}
        for kind in SEARCHES | PLAIN:
            found |= run_all(harness, only=kind)
    assert len({tuple(ids) for ids in found.values()}) == len(found)
    return found


def test_beside_sequences_that_draft(model: Path, alone: dict[str, list[int]]) -> None:
    with running(model, **options(model)) as harness:
        RandomPicks(harness, plain=0.1)
        for round_ in range(2):
            assert run_all(harness, f" {round_}") == alone
        stats = harness.engine.stats().speculation
        assert stats is not None and stats.drafted > 10


@pytest.mark.parametrize("speculate", [True, False])
def test_beside_graphs(model: Path, alone: dict[str, list[int]], speculate: bool) -> None:
    with running(model, speculate=speculate, **options(model)) as harness:
        harness.engine.runner.capture_graphs(RepeatedFunctions(), lambda fraction: None)
        if speculate:
            RandomPicks(harness, plain=0.3)
        assert run_all(harness) == alone


def test_warming_up_and_rehearsing_leave_no_trace(model: Path, alone: dict[str, list[int]]) -> None:
    with running(model, **options(model)) as harness:
        runner, limits = harness.engine.runner, harness.engine.scheduler.limits
        with runner.context():
            runner.search.rehearse(torch.full((16,), runner.state.null_slot), runner.cache)
        assert warm_up(runner, limits, harness.engine.info.num_blocks) > 0
        assert run_all(harness) == alone


@pytest.mark.parametrize("blocks", [34, 44])
def test_preempted_by_each_other(model: Path, alone: dict[str, list[int]], blocks: int) -> None:
    few = {"block_size": 4, "num_blocks": blocks, "max_model_len": 48, "speculate": False, "memory_tokens": 48}
    with running(model, **options(model) | few) as harness:
        assert run_all(harness) == alone
        assert harness.engine.stats().preemptions > 0


def test_the_pass_with_the_most_memory_runs_without_an_amateur_too(model: Path) -> None:
    with running(model, load_format="dummy", max_seqs=3, max_batched_tokens=3, speculate=False) as harness:
        runner = harness.engine.runner
        with runner.context():
            runner.search.rehearse(torch.full((4,), runner.state.null_slot), runner.cache)
