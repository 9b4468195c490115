"""Beam search of the engine gives transformers' ids on the same weights in fp32, whatever runs beside it."""

from __future__ import annotations

import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from services.model_worker.engine import EngineRequest, FinishReason, RequestRejected
from shared.sampling import SamplingParams
from tests.unit.engine_harness import Collected, Harness, dummy_model, greedy, needs_weights, running, weights

transformers = pytest.importorskip("transformers")

LENGTHS = (1, 5, 16, 33, 70)
TOKENS = 64
BEAMS = 4
BLOCK = 16
OPTIONS: list[dict[str, Any]] = [
    {},
    {"early_stopping": True, "length_penalty": 0.5},
    {"early_stopping": "never", "length_penalty": 2.0},
    {"early_stopping": False, "length_penalty": -1.0},
    {"early_stopping": True, "length_penalty": 0.0},
]


pytestmark = pytest.mark.usefixtures("one_thread")


def submit_beams(
    harness: Harness, name: str, prompt: list[int], max_tokens: int, choices: int = BEAMS, **params: Any
) -> list[Collected]:
    """A beam search; what is collected of each of its choices."""
    values = {"num_beams": BEAMS, "temperature": 0.0, "max_tokens": max_tokens} | params
    request = EngineRequest(name, 0, 1, tuple(prompt), SamplingParams(**values), choices=choices)
    outputs = [Collected(0) for _ in range(choices)]
    for choice, output in enumerate(outputs):
        harness.outputs[name, choice, 1] = output
    harness.engine.submit(request)
    return outputs


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(20, 512, (length,), generator=generator).tolist() for length in LENGTHS]


def expected_beams(
    model: Any, prompt: list[int], stops: list[int], max_tokens: int = TOKENS, beams: int = BEAMS, **options: Any
) -> list[list[int]]:
    """transformers' sequences without prompt and padding, best first."""
    with torch.inference_mode():
        rows = model.generate(
            torch.tensor([prompt]), num_beams=beams, num_return_sequences=beams, max_new_tokens=max_tokens,
            do_sample=False, eos_token_id=stops or None, pad_token_id=0, **options,
        )  # fmt: skip
    found = []
    for row in rows.tolist():
        ids = row[len(prompt) :]
        ends = [ids.index(stop) + 1 for stop in stops if stop in ids]
        found.append(ids[: min(ends, default=len(ids))])
    return found


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_beams_equal_transformers_in_a_mixed_batch(tiny_models: ModuleType, tmp_path: Path, family: str) -> None:
    """With and without stop ids; among greedy and sampled requests, in chunks, with few blocks and so with preemptions."""
    model = tiny_models.make(family, max_position_embeddings=512)
    model.save_pretrained(tmp_path)
    cases = []
    for index, prompt in enumerate(prompts()):
        options = OPTIONS[index]
        # Ids that a beam search meets, so that hypotheses end at all lengths.
        free = expected_beams(model, prompt, [], 24)
        stops = [[], [free[0][11]], [free[0][3], free[1][20]]][index % 3]
        cases.append((prompt, stops, options, expected_beams(model, prompt, stops, **options)))
    assert any(len(ids) < TOKENS for *_, expected in cases for ids in expected)
    config = {"block_size": BLOCK, "max_seqs": 16, "max_batched_tokens": 48}
    for variant in ({}, {"prefix_cache": False, "num_blocks": 44, "overlap": False}):
        with running(tmp_path, **config, **variant) as harness:
            others = [greedy(f"g{n}", prompt, TOKENS) for n, prompt in enumerate(prompts())]
            (alone,) = harness.run(others[2:3])
            plain = [harness.submit(request) for request in others]
            sampled = [
                harness.submit(
                    EngineRequest(f"s{n}", 0, 1, (7, 8, n + 9), SamplingParams(max_tokens=50, top_k=20, seed=n))
                )
                for n in range(3)
            ]
            beams = [
                submit_beams(harness, f"b{n}", prompt, TOKENS, stop_token_ids=tuple(stops), ignore_eos=True, **options)
                for n, (prompt, stops, options, _) in enumerate(cases)
            ]
            harness.wait([*plain, *sampled, *(output for outputs in beams for output in outputs)])
            assert plain[2].ids == alone.ids
            for outputs, (_, stops, _, expected) in zip(beams, cases, strict=True):
                assert [output.ids for output in outputs] == expected
                for output in outputs:
                    ended = output.ids[-1] in stops
                    assert output.finish is (FinishReason.STOP_TOKEN if ended else FinishReason.LENGTH)
                    assert output.stop_token == (output.ids[-1] if ended else None)
            if harness.engine.scheduler.limits.window == 0:  # a window needs few blocks
                assert (harness.engine.stats().preemptions > 0) == ("num_blocks" in variant)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return dummy_model(tmp_path / "dummy")


PROMPT = [5, 6, 7, 8, 9, 10, 11]


def test_fewer_choices_than_beams_are_the_best_of_them(model: Path) -> None:
    with running(model, load_format="dummy", max_seqs=8) as harness:
        all_four = submit_beams(harness, "all", PROMPT, 20)
        best = submit_beams(harness, "best", PROMPT, 20, choices=1)
        harness.wait([*all_four, *best])
        assert best[0].ids == all_four[0].ids
        assert len({tuple(output.ids) for output in all_four}) == BEAMS


def test_abort_deadline_pause_and_a_newer_epoch(model: Path) -> None:
    with running(model, load_format="dummy", max_seqs=8, max_model_len=200) as harness:
        expected = submit_beams(harness, "expected", PROMPT, 20)
        harness.wait(expected)
        late = submit_beams(harness, "late", PROMPT, 190)
        (other,) = harness.submit_and_pause([greedy("other", PROMPT, 150)], 5)
        assert harness.engine.stats().running == {"late": 1, "other": 1}
        harness.engine.abort("late", 1)
        harness.engine.pause_output(False)
        harness.wait(late[:1])
        assert late[0].finish is FinishReason.ABORTED and late[0].ids == []
        past = EngineRequest(
            "past", 0, 1, tuple(PROMPT), SamplingParams(num_beams=3, temperature=0.0, max_tokens=190),
            deadline=time.monotonic() + 0.05, choices=3,
        )  # fmt: skip
        expired = harness.submit(past)
        harness.wait([expired])
        assert expired.finish is FinishReason.DEADLINE and expired.ids == []
        old = submit_beams(harness, "again", PROMPT, 20)
        harness.outputs["again", 0, 2] = new = Collected(0)
        harness.engine.submit(
            EngineRequest("again", 0, 2, tuple(PROMPT), SamplingParams(num_beams=BEAMS, temperature=0.0, max_tokens=20))
        )
        harness.wait([old[0], new, other])
        assert old[0].finish is FinishReason.ABORTED and new.ids == expected[0].ids


def test_all_steps_count_as_progress(model: Path) -> None:
    """Liveness is the step counter: a beam search that gives out nothing yet still moves it."""
    with running(model, load_format="dummy", max_seqs=8, max_model_len=200) as harness:
        outputs = submit_beams(harness, "a", PROMPT, 100, ignore_eos=True)
        harness.wait(outputs)
        assert harness.engine.stats().step >= 100 and sum(bool(step.tokens) for step in harness.steps) == 1


@pytest.mark.parametrize(
    ("code", "params"),
    [
        ("unsupported", {"num_beams": 9}),
        ("invalid_request", {"num_beams": 2, "max_tokens": 0}),
        ("invalid_request", {"num_beams": 8, "stop_token_ids": tuple(range(3, 67)), "max_tokens": 8}),
        ("context_length_exceeded", {"num_beams": 8, "max_tokens": 100}),
        ("unsupported", {"penalty_alpha": 0.6, "top_k": 4}),
        ("unsupported", {"cd_alpha": 0.1}),
    ],
)
def test_what_can_never_run_is_refused(model: Path, code: str, params: dict[str, Any]) -> None:
    small = dummy_model(model.parent / "small", vocab_size=70)
    with running(small, load_format="dummy", max_seqs=8, num_blocks=32) as harness:
        with pytest.raises(RequestRejected) as caught:
            harness.engine.submit(EngineRequest("bad", 0, 1, tuple(PROMPT), SamplingParams(**params)))
        assert caught.value.error.code == code
        (good,) = harness.run([greedy("good", PROMPT, 5)])
        assert len(good.ids) == 5


@needs_weights
def test_beams_of_a_trained_model_beside_speculation(tmp_path: Path) -> None:
    """Sequences with trees draft on; beams never do."""
    folder = weights("stories260K")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = [1, 403, 407, 261, 378]
    expected = expected_beams(model, prompt, [], 48)
    with running(folder) as harness:
        outputs = submit_beams(harness, "b", prompt, 48, ignore_eos=True)
        harness.wait(outputs)
        assert [output.ids for output in outputs] == expected
