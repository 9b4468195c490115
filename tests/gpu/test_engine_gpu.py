"""Every kind of request on the GPU, with graphs, overlapping steps and drafts, against the same engine on the CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from services.model_worker import train_heads
from services.model_worker.engine import EngineRequest, FinishReason
from shared.sampling import SamplingParams
from tests.unit.engine_harness import Collected, Harness, running, save_first_layers
from tests.unit.test_engine import KINDS
from tests.unit.test_search_engine import SEARCHES
from tests.unit.test_structured_engine import CASES, CONSTRAINTS, DEMO, PROMPT, all_requests, asked, conforms, text_of

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

TEXT = "It was a dark night, and the old captain looked at the sea. " * 12


@triton.jit
def _compiled_by_nobody_else(out_ptr, VALUE: tl.constexpr) -> None:
    tl.store(out_ptr, VALUE)


@pytest.fixture(scope="module")
def amateur(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("amateur")
    save_first_layers(DEMO, 2, folder)
    return folder


@contextmanager
def engine(amateur: Path, **options: Any) -> Iterator[Harness]:
    values: dict[str, Any] = {
        "dtype": "float32", "amateur": amateur, "memories": 4, "memory_tokens": 256, "max_seqs": 32,
        "gpu_memory_fraction": 0.3, **options,
    }  # fmt: skip
    with running(DEMO, **values) as started:
        yield started


def sampled() -> list[EngineRequest]:
    """Prompts of many lengths, with each kind of sampling and of search; some choices of one request; a prompt's log-probabilities."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode(TEXT).ids
    requests = []
    for number, (name, params) in enumerate((KINDS | SEARCHES).items()):
        values = {"max_tokens": 40, "temperature": 1.0, "ignore_eos": True, "seed": 1234} | params
        # Bans of this model's own frequent tokens, so that they matter.
        if name == "words":
            values["bad_words"] = ((ids[3],), (ids[5], ids[6]))
        requests.append(EngineRequest(name, 0, 1, ids[: 9 + 13 * number % 170], SamplingParams(**values)))
    for choice in range(3):
        params = SamplingParams(max_tokens=24, temperature=0.9, seed=4, prompt_logprobs=2)
        requests.append(EngineRequest("choices", choice, 1, ids[:77], params, prompt_done=0 if choice == 0 else None))
    return requests


def same_numbers(got: list[Any], expected: list[Any]) -> None:
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.top_ids == theirs.top_ids
        assert [ours.chosen, *ours.top] == pytest.approx([theirs.chosen, *theirs.top], abs=2e-3)


@pytest.mark.parametrize(
    "options",
    [{}, {"whole_prompts": False}, {"speculate": False, "cuda_graphs": False, "overlap": False}],
    ids=str,
)
def test_every_kind_of_request_is_answered_as_on_a_cpu(amateur: Path, options: dict[str, Any]) -> None:
    requests = sampled() + all_requests()
    with engine(amateur, device="cpu", speculate=False, overlap=False) as plain:
        expected = plain.run(requests)
        told = plain.prompts
    with engine(amateur, device="cuda", max_batched_tokens=256, **options) as harness:
        for _ in range(2):  # the second time with prompts from the prefix cache, and other steps
            outputs = harness.run(requests)
            different = [r.request_id for r, a, b in zip(requests, outputs, expected, strict=True) if a.ids != b.ids]
            assert not different
            for ours, theirs in zip(outputs, expected, strict=True):
                assert (ours.finish, ours.error) == (theirs.finish, theirs.error)
                same_numbers(ours.logprobs, theirs.logprobs)
            assert harness.prompts.keys() == told.keys()
            for name, prompt in harness.prompts.items():
                same_numbers(prompt.logprobs, told[name].logprobs)
            harness.prompts = {}
        if not options:
            assert harness.engine.runner.prompts is not None
            speculation = harness.engine.stats().speculation
            assert speculation is not None and speculation.accepted[0] > 0


@pytest.mark.parametrize("head_dim", [64, 128])
def test_nothing_is_compiled_while_requests_wait(
    tmp_path: Path, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton compiles a kernel anew for an integer argument of 1 or of a multiple of 16: seconds in the middle of a stream. Prompts and
    decodes in many numbers and lengths, together and apart."""
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": head_dim, "vocab_size": 512,
        "max_position_embeddings": 8192,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    compiled: list[str] = []
    values: dict[str, Any] = {
        "load_format": "dummy", "device": "cuda", "dtype": "bfloat16", "max_seqs": 48, "gpu_memory_fraction": 0.2,
        "max_batched_tokens": 2048, "prefix_cache": False,
    }  # fmt: skip
    lengths = [1, 15, 16, 17, 33, 100, 128, 129, 300, 512, 700, 1024, 2000, 2048, 3000, 6000]
    with running(tmp_path, **values) as harness:
        monkeypatch.setattr(
            triton.knobs.runtime, "jit_post_compile_hook", lambda **told: compiled.append(told["fn"].name)
        )
        for together in (1, 2, 3, 5, 16, 17, 31, 48):
            waiting = []
            for n in range(together):
                ids = [1 + n % 500] * lengths[(n * 7 + together) % len(lengths)]
                params = SamplingParams(max_tokens=9 + n % 23, temperature=float(n % 2), ignore_eos=True)
                waiting.append(harness.submit(EngineRequest(f"{together} {n}", 0, 1, ids, params)))
                if n % 5 == 0:
                    harness.wait_for(lambda so_far=tuple(waiting): all(output.ids for output in so_far))
            harness.wait(waiting)
            assert all(output.error is None for output in waiting)
        assert compiled == []
        _compiled_by_nobody_else[(1,)](torch.zeros(1, device="cuda"), VALUE=head_dim)
        assert compiled  # the hook would have told of one


def test_masks_are_in_time(amateur: Path) -> None:
    """In bf16 nothing can be compared, but a mask that comes too late, or to the wrong row, lets forbidden tokens through."""
    with engine(amateur, device="cuda", dtype="bfloat16", max_seqs=64) as harness:
        for round_ in range(3):
            requests = [
                asked(f"{name} {kind} {n} {round_}", CONSTRAINTS[name], temperature=1.0, seed=97 * n + round_)
                for n in range(12)
                for name, kind in CASES
            ]
            free = [
                EngineRequest(f"free {n} {round_}", 0, 1, PROMPT[: 2 + n % 9], SamplingParams(max_tokens=48, seed=n))
                for n in range(32)
            ]
            both = [
                request for pair in zip(requests, [*free, *requests[len(free) :]], strict=False) for request in pair
            ]
            distinct = list({request.request_id: request for request in [*both, *requests]}.values())
            outputs: dict[str, Collected] = {}
            for start in range(0, len(distinct), 64):
                part = distinct[start : start + 64]
                outputs |= dict(zip((r.request_id for r in part), harness.run(part), strict=True))
            ended = 0
            for request in requests:
                output = outputs[request.request_id]
                assert output.error is None, output.error
                if output.finish is FinishReason.STOP:
                    conforms(request.request_id.split()[0], text_of(output))
                    ended += 1
            assert ended > len(requests) // 2


def test_heads_of_a_small_vocabulary_are_trained_and_used(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT * 40)
    config = train_heads.TrainConfig(
        DEMO,
        (tmp_path / "text.txt",),
        tmp_path / "heads",
        heads=2,
        tied=True,
        vocabulary=500,
        rows=8,
        length=64,
        steps=60,
    )
    from rich.console import Console

    train_heads.train(config, Console(quiet=True))
    with running(DEMO, device="cuda", heads=tmp_path / "heads", gpu_memory_fraction=0.3) as harness:
        trees = harness.engine.trees
        assert trees is not None
        trees.pick = lambda *_: trees.trees[-1]  # type: ignore[method-assign]  # heads so poor are soon given up
        harness.run([EngineRequest("a", 0, 1, PROMPT, SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True))])
        speculation = harness.engine.stats().speculation
        assert speculation is not None and speculation.accepted[0] > 0
