"""Greedy ids of the engine equal those of transformers on the same weights, in fp32, however the work is cut up."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from services.model_worker.models.config import ModelError, parse_config
from services.model_worker.models.rope import _attention_factor, inverse_frequencies
from tests.unit.engine_harness import greedy, needs_weights, running, weights

transformers = pytest.importorskip("transformers")

FAMILIES = ("llama", "llama3_rope", "mistral", "qwen2", "qwen3", "phi3")
LENGTHS = (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 48, 64, 100, 127, 128, 200)
TOKENS = 64
BLOCK = 16
SHARED_PREFIX = 40


pytestmark = pytest.mark.usefixtures("one_thread")


def prompts() -> list[list[int]]:
    """16 prompts of mixed lengths; those long enough begin alike, so that a prefix cache has something to find."""
    generator = torch.Generator().manual_seed(7)
    common = torch.randint(20, 512, (SHARED_PREFIX,), generator=generator).tolist()
    drawn = [torch.randint(20, 512, (length,), generator=generator).tolist() for length in LENGTHS]
    return [common + ids[SHARED_PREFIX:] if len(ids) > SHARED_PREFIX else ids for ids in drawn]


class Oracle:
    """A saved tiny model and transformers' own greedy continuation of each prompt."""

    def __init__(self, folder: Path, model: Any) -> None:
        self.folder = folder
        model.save_pretrained(folder)
        self.expected = []
        with torch.inference_mode():
            for prompt in prompts():
                out = model.generate(
                    torch.tensor([prompt]),
                    max_new_tokens=TOKENS,
                    min_new_tokens=TOKENS,
                    do_sample=False,
                    eos_token_id=None,
                )
                self.expected.append(out[0, len(prompt) :].tolist())


@pytest.fixture(scope="module", params=FAMILIES)
def oracle(request: pytest.FixtureRequest, tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    model = tiny_models.make(request.param, max_position_embeddings=512)
    return Oracle(tmp_path_factory.mktemp(request.param), model)


# What must not matter: chunking, the prefix cache, overlap, preemption. `num_blocks` of the last two rows is too small for all.
VARIANTS = {
    "whole prompts": dict(prefix_cache=False),
    "chunked": dict(prefix_cache=False, max_batched_tokens=24),
    "chunked, prefix cache": dict(prefix_cache=True, max_batched_tokens=24),
    "no overlap": dict(prefix_cache=True, overlap=False),
    "preempted": dict(prefix_cache=False, num_blocks=40),
    "preempted, prefix cache, chunked": dict(prefix_cache=True, num_blocks=40, max_batched_tokens=56),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_ids_equal_transformers(oracle: Oracle, variant: str) -> None:
    with running(oracle.folder, block_size=BLOCK, **VARIANTS[variant]) as harness:
        requests = [greedy(f"r{index}", prompt, TOKENS) for index, prompt in enumerate(prompts())]
        first = harness.run(requests)
        assert [output.ids for output in first] == oracle.expected
        if "preempted" in variant and harness.engine.scheduler.limits.window == 0:
            assert harness.engine.stats().preemptions > 0
        if variant == "chunked, prefix cache":
            again = harness.run([greedy(f"again{index}", prompt, TOKENS) for index, prompt in enumerate(prompts())])
            assert [output.ids for output in again] == oracle.expected
            if harness.engine.scheduler.limits.window == 0:  # a window lets go of the prefix
                assert harness.engine.stats().prefix_hit_tokens >= sum((n - 1) // BLOCK * BLOCK for n in LENGTHS)


def test_the_other_families_are_refused_by_name(tiny_models: ModuleType) -> None:
    others = tiny_models.ALL.keys() - set(FAMILIES)
    assert len(others) == len(tiny_models.ALL) - len(FAMILIES) > 15
    for name in others:
        architecture, config, options = tiny_models.ALL[name]
        raw = {**getattr(transformers, config)(**options).to_dict(), "architectures": [architecture]}
        with pytest.raises(ModelError, match=architecture) as caught:
            parse_config(raw)
        assert caught.value.code == "unsupported_architecture"


def test_alone_equals_in_a_batch(oracle: Oracle) -> None:
    with running(oracle.folder, block_size=BLOCK) as harness:
        for index in (0, 7, 15):
            (output,) = harness.run([greedy(f"alone{index}", prompts()[index], TOKENS)])
            assert output.ids == oracle.expected[index]


def test_a_window_gives_back_its_blocks(tiny_models: ModuleType, tmp_path: Path) -> None:
    tiny_models.make("mistral", max_position_embeddings=512).save_pretrained(tmp_path)
    with running(tmp_path, block_size=8, num_blocks=64, prefix_cache=False, overlap=False) as harness:
        assert harness.engine.scheduler.limits.window == 8
        fewest = []
        harness.engine._on_step = lambda step, on_step=harness._on_step: (
            fewest.append(harness.engine.stats().blocks_free), on_step(step)
        )  # fmt: skip
        harness.run([greedy("long", range(20, 220), 100)])
        # 300 tokens fill 38 blocks; of them at most three lie in the window of 8 tokens, or ahead of it.
        assert min(fewest) >= 64 - 3


@needs_weights
@pytest.mark.parametrize("name", ["stories260K", "babyllama-tok361"])
@pytest.mark.parametrize("chunk", [2048, 16])
def test_golden_ids_of_trained_models(name: str, chunk: int) -> None:
    golden = json.loads((weights(name) / "golden.json").read_text())
    prompt, expected = golden["prompt_ids"], golden["greedy_ids"]
    with running(weights(name), max_batched_tokens=chunk) as harness:
        requests = [
            greedy("g", prompt, len(expected) - len(prompt)),
            *(greedy(f"o{n}", prompt[:n], 50) for n in (1, 3, 12)),
        ]
        assert prompt + harness.run(requests)[0].ids == expected


ROPES: list[dict[str, Any]] = [
    dict(rope_type="linear", rope_theta=10000.0, factor=4.0),
    dict(
        rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=64,
    ),
    dict(rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=64),
    dict(
        rope_type="yarn", rope_theta=1e4, factor=8.0, original_max_position_embeddings=64, beta_fast=16.0, beta_slow=2.0,
        truncate=False, mscale=1.0, mscale_all_dim=0.5,
    ),
    dict(rope_type="yarn", rope_theta=1e4, factor=8.0, original_max_position_embeddings=64, attention_factor=1.5),
]  # fmt: skip


@pytest.mark.parametrize("parameters", ROPES, ids=lambda p: p["rope_type"])
def test_rope_frequencies_equal_transformers(parameters: dict[str, Any]) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=512, rope_parameters=dict(parameters)
    )
    expected, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")
    raw = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "rope_parameters": parameters}
    rope = parse_config(raw).rope
    torch.testing.assert_close(inverse_frequencies(rope, 64), expected, rtol=1e-6, atol=0)
    assert _attention_factor(rope) == pytest.approx(factor)
