"""Contrastive search and contrastive decoding of the engine against the papers' formulas, written plainly on transformers' models."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

from kernels.philox import gumbel_noise
from kernels.reference import filter_scores
from services.model_worker.engine import EngineRequest, FinishReason, ModelError, RequestRejected
from services.model_worker.search.contrastive import guided_scores
from shared.sampling import SamplingParams
from tests.unit.engine_harness import Harness, dummy_model, greedy, needs_weights, running, save_first_layers, weights

transformers = pytest.importorskip("transformers")

PROMPTS = (
    [1, 403, 407, 261, 378],
    [1],
    [1, 432, 300, 419, 286, 280, 301, 337, 392, 410, 306, 262, 340, 311, 299, 350, 266, 318],
)
TOKENS = 48
EOS = 2


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def expert() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(weights("stories260K"), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def amateur(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("amateur")
    return folder, save_first_layers(weights("stories260K"), 2, folder)


@contextmanager
def searching(amateur: Path | None = None, **options: Any) -> Iterator[Harness]:
    with running(weights("stories260K"), amateur=amateur, **{"memories": 4, "memory_tokens": 256} | options) as harness:
        yield harness


def request_for(
    name: str, prompt: list[int], epoch: int = 1, generated: Any = (), choice: int = 0, **params: Any
) -> EngineRequest:
    values = {"max_tokens": TOKENS, "temperature": 0.0, "ignore_eos": True} | params
    return EngineRequest(name, choice, epoch, tuple(prompt), SamplingParams(**values), generated_ids=generated)


# ---------------------------------------------------------------- contrastive search


def states(model: Any, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits after the last token [V], final hidden states of all tokens [n, H])."""
    with torch.inference_mode():
        out = model(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    return out.logits[0, -1], out.hidden_states[-1][0]


def contrastive_search(model: Any, prompt: list[int], alpha: float, k: int, tokens: int = TOKENS) -> list[int]:
    """Su et al. 2022, eq. 5."""
    ids = list(prompt)
    for _ in range(tokens):
        logits, before = states(model, ids)
        probabilities, candidates = logits.softmax(-1).topk(k)
        scores = []
        for probability, candidate in zip(probabilities.tolist(), candidates.tolist(), strict=True):
            own = states(model, [*ids, candidate])[1][-1]
            penalty = max(cosine_similarity(own, earlier, dim=0).item() for earlier in before)
            scores.append((1 - alpha) * probability - alpha * penalty)
        ids.append(candidates[scores.index(max(scores))].item())
    return ids[len(prompt) :]


CASES = [(PROMPTS[0], 0.6, 4), (PROMPTS[1], 0.4, 5), (PROMPTS[2], 0.8, 2), (PROMPTS[0], 0.3, 4)]


@pytest.fixture(scope="module")
def searched(expert: Any) -> list[list[int]]:
    return [contrastive_search(expert, prompt, alpha, k) for prompt, alpha, k in CASES]


def searches(epoch: int = 1, generated: Any = None, **params: Any) -> list[EngineRequest]:
    return [
        request_for(f"c{n}", prompt, epoch, generated[n] if generated else (), penalty_alpha=alpha, top_k=k, **params)
        for n, (prompt, alpha, k) in enumerate(CASES)
    ]


@needs_weights
@pytest.mark.parametrize(
    "options",
    [{}, {"overlap": False, "block_size": 4}, {"max_batched_tokens": 76, "block_size": 8, "memories": 2}],
    ids=["overlap", "small blocks", "chunks, two memories"],
)
def test_contrastive_search_equals_the_formula(searched: list[list[int]], options: dict[str, Any]) -> None:
    with searching(max_seqs=12, **options) as harness:
        others = [greedy(f"g{n}", prompt, TOKENS) for n, prompt in enumerate(PROMPTS)]
        alone = harness.run(others)
        plain = [harness.submit(greedy(f"again{n}", prompt, TOKENS)) for n, prompt in enumerate(PROMPTS)]
        outputs = harness.run(searches())
        harness.wait(plain)
        assert [output.ids for output in outputs] == searched
        assert [output.ids for output in plain] == [output.ids for output in alone]
        assert searched[0] != alone[0].ids and searched[0] != searched[3], "the penalty changes nothing here"


@needs_weights
@pytest.mark.parametrize("done", [1, 7, TOKENS - 1, TOKENS])
def test_contrastive_search_survives_a_migration(searched: list[list[int]], done: int) -> None:
    with searching() as harness:
        outputs = harness.run(searches(2, [ids[:done] for ids in searched]))
        assert [output.ids for output in outputs] == [ids[done:] for ids in searched]


@needs_weights
def test_contrastive_search_ends_at_stops_and_is_preempted(searched: list[list[int]]) -> None:
    stop = searched[0][9]
    upto = searched[0].index(stop) + 1
    with searching(block_size=4, num_blocks=40, max_model_len=144, max_seqs=8) as harness:
        (output,) = harness.run([request_for("s", PROMPTS[0], penalty_alpha=0.6, top_k=4, stop_token_ids=(stop,))])
        assert (output.ids, output.finish, output.stop_token) == (searched[0][:upto], FinishReason.STOP_TOKEN, stop)
        plain = [harness.submit(greedy(f"g{n}", prompt, TOKENS)) for n, prompt in enumerate(PROMPTS)]
        outputs = harness.run(searches())
        harness.wait(plain)
        assert [output.ids for output in outputs] == searched
        assert harness.engine.stats().preemptions > 0


@needs_weights
def test_a_search_without_memory_waits_and_others_pass(searched: list[list[int]]) -> None:
    with searching(memories=1) as harness:
        harness.engine.pause_output(True)
        waiting = [harness.submit(request) for request in searches()]
        other = harness.submit(greedy("other", PROMPTS[0], 5))
        harness.engine.abort("c3", 1)
        harness.engine.pause_output(False)
        harness.wait([*waiting, other])
        assert [output.ids for output in waiting[:3]] == searched[:3]
        assert waiting[3].finish is FinishReason.ABORTED
        first = next(step.step for step in harness.steps if any(t.request_id == "c1" and t.ids for t in step.outputs))
        ended = next(
            step.step for step in harness.steps if any(t.request_id == "other" and t.finish for t in step.outputs)
        )
        assert ended < first


@needs_weights
@pytest.mark.parametrize(
    ("code", "params"),
    [
        ("context_length_exceeded", {"penalty_alpha": 0.5, "top_k": 4, "max_tokens": 100}),
        ("invalid_request", {"penalty_alpha": 0.5, "top_k": 1}),
        ("invalid_request", {"penalty_alpha": 0.5, "top_k": 17}),
        ("unsupported", {"cd_alpha": 0.5}),
    ],
)
def test_what_can_never_run_is_refused(code: str, params: dict[str, Any]) -> None:
    with searching(memory_tokens=64) as harness:
        with pytest.raises(RequestRejected) as caught:
            harness.engine.submit(request_for("bad", PROMPTS[0], **params))
        assert caught.value.error.code == code


# ---------------------------------------------------------------- contrastive decoding


def contrastive_decoding(
    expert: Any, amateur: Any, prompt: list[int], choice: int = 0, tokens: int = TOKENS, **params: Any
) -> list[int]:
    """Li et al. 2022, eq. 2 and 3; with cd_beta O'Brien & Lewis 2023, §2.2, on logits as there. Sampled with the engine's noise."""
    p = SamplingParams(**({"temperature": 0.0} | params))
    ids = list(prompt)
    for position in range(tokens):
        ours, theirs = states(expert, ids)[0], states(amateur, ids)[0]
        if p.cd_beta is None:
            plausible = ours.softmax(-1) >= p.cd_alpha * ours.softmax(-1).max()
            scores = ours.log_softmax(-1) - (theirs / p.cd_temperature).log_softmax(-1)
        else:
            plausible = ours >= math.log(p.cd_alpha) + ours.max()
            scores = (1 + p.cd_beta) * ours - p.cd_beta * theirs / p.cd_temperature
        scores = torch.where(plausible, scores, -torch.inf)
        if p.temperature:
            column = [torch.tensor([value]) for value in (p.top_k, p.top_p, p.min_p)]
            scores = filter_scores(scores[None] / p.temperature, *column)[0]
            noise = gumbel_noise(torch.tensor([p.seed]), torch.tensor([position]), torch.tensor([choice]), len(scores))
            scores = scores + noise[0]
        ids.append(int(scores.argmax()))
    return ids[len(prompt) :]


GUIDED: list[dict[str, Any]] = [
    {"cd_alpha": 0.1},
    {"cd_alpha": 0.1, "cd_temperature": 0.5},
    {"cd_alpha": 0.1, "cd_beta": 0.5},
    {"cd_alpha": 0.05, "cd_beta": 2.0, "cd_temperature": 1.5},
    {"cd_alpha": 0.02, "temperature": 0.8, "seed": 7},
    {"cd_alpha": 0.01, "cd_beta": 0.5, "temperature": 1.2, "top_k": 20, "top_p": 0.9, "seed": 99},
    {"cd_alpha": 1.0},
]


@pytest.fixture(scope="module")
def guided(expert: Any, amateur: tuple[Path, Any]) -> list[list[int]]:
    return [contrastive_decoding(expert, amateur[1], PROMPTS[n % 3], **params) for n, params in enumerate(GUIDED)]


def guided_requests(epoch: int = 1, generated: Any = None) -> list[EngineRequest]:
    return [
        request_for(f"d{n}", PROMPTS[n % 3], epoch, generated[n] if generated else (), **params)
        for n, params in enumerate(GUIDED)
    ]


@needs_weights
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"overlap": False, "block_size": 4},
        {"max_batched_tokens": 76, "block_size": 8},
        {"num_blocks": 24, "block_size": 8, "max_model_len": 96},
    ],
    ids=["overlap", "small blocks", "chunks", "preempted"],
)
def test_contrastive_decoding_equals_the_formula(
    amateur: tuple[Path, Any], guided: list[list[int]], options: dict[str, Any]
) -> None:
    with searching(amateur[0], max_seqs=12, **options) as harness:
        alone = harness.run([greedy(f"g{n}", prompt, TOKENS) for n, prompt in enumerate(PROMPTS)])
        plain = [harness.submit(greedy(f"again{n}", prompt, TOKENS)) for n, prompt in enumerate(PROMPTS)]
        outputs = harness.run(guided_requests())
        harness.wait(plain)
        assert [output.ids for output in outputs] == guided
        assert [output.ids for output in plain] == [output.ids for output in alone]
        assert guided[6] == alone[0].ids, "with cd_alpha 1 only the likeliest token is plausible"
        assert guided[0] != alone[0].ids
        assert (harness.engine.stats().preemptions > 0) == ("num_blocks" in options)


@needs_weights
@pytest.mark.parametrize("done", [1, 9, TOKENS - 1])
def test_contrastive_decoding_survives_a_migration(
    amateur: tuple[Path, Any], guided: list[list[int]], done: int
) -> None:
    with searching(amateur[0]) as harness:
        outputs = harness.run(guided_requests(2, [ids[:done] for ids in guided]))
        assert [output.ids for output in outputs] == [ids[done:] for ids in guided]


@needs_weights
def test_the_prefix_cache_is_shared_only_among_those_that_the_amateur_has_seen(
    expert: Any, amateur: tuple[Path, Any]
) -> None:
    prompt = PROMPTS[2] * 2
    expected = contrastive_decoding(expert, amateur[1], prompt, tokens=12, cd_alpha=0.1)
    with searching(amateur[0], block_size=4) as harness:
        harness.run([greedy("plain", prompt, 12)])
        for name, hits in (("first", 0), ("second", (len(prompt) - 1) // 4 * 4)):
            before = harness.engine.stats().prefix_hit_tokens
            (output,) = harness.run([request_for(name, prompt, max_tokens=12, cd_alpha=0.1)])
            assert output.ids == expected
            assert harness.engine.stats().prefix_hit_tokens - before == hits
        # All but one token cached: the very first row is that of the decode.
        shorter = prompt[: (len(prompt) - 1) // 4 * 4 + 1]
        (output,) = harness.run([request_for("all cached", shorter, max_tokens=12, cd_alpha=0.1)])
        assert output.ids == contrastive_decoding(expert, amateur[1], shorter, tokens=12, cd_alpha=0.1)
        (plain,) = harness.run([greedy("plain again", prompt, 12)])
        (alone,) = harness.run([greedy("plain alone", prompt, 12)])
        assert plain.ids == alone.ids


@needs_weights
def test_choices_and_logprobs_of_contrastive_decoding(expert: Any, amateur: tuple[Path, Any]) -> None:
    params: dict[str, Any] = {"cd_alpha": 0.05, "temperature": 1.0, "seed": 3}
    with searching(amateur[0]) as harness:
        requests = [request_for("n", PROMPTS[0], choice=c, max_tokens=12, logprobs=3, **params) for c in range(3)]
        for choice, output in enumerate(harness.run(requests)):
            assert output.ids == contrastive_decoding(expert, amateur[1], PROMPTS[0], choice, tokens=12, **params)
            for index, entry in enumerate(output.logprobs):
                raw = states(expert, [*PROMPTS[0], *output.ids[:index]])[0].log_softmax(-1)
                assert entry.chosen == pytest.approx(raw[output.ids[index]].item(), abs=1e-4)
                assert entry.top_ids == raw.topk(3).indices.tolist()


def test_implausible_tokens_are_out_whatever_the_amateur_says() -> None:
    expert = torch.tensor([[4.0, 3.9, 0.0, -torch.inf]])
    amateur = torch.tensor([[9.0, 1.0, -50.0, -torch.inf]])
    one, none = torch.ones(1), torch.full((1,), -1.0)
    scores = guided_scores(expert, amateur, one * 0.1, none, one)[0]
    assert scores.argmax() == 1 and scores.isneginf().tolist() == [False, False, True, True]
    assert guided_scores(expert, amateur, one, none, one)[0].isneginf().tolist() == [False, True, True, True]
    # Divided by so little the amateur's logits would be infinite.
    assert guided_scores(expert, amateur, one * 0.1, none, one * 1e-40)[0].argmax() == 1


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"vocab_size": 64}, "tokens"),
        ({"max_position_embeddings": 64}, "positions"),
        ({"tokenizer": {"a": 0}}, "tokenizer"),
    ],
)
def test_an_amateur_that_does_not_fit_is_refused_at_load(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    model = dummy_model(tmp_path / "model")
    tokenizer = changes.pop("tokenizer", None)
    other = dummy_model(tmp_path / "amateur", **changes)
    if tokenizer is not None:
        for folder, vocabulary in ((model, {"b": 0}), (other, tokenizer)):
            (folder / "tokenizer.json").write_text(
                f'{{"model": {{"vocab": {str(vocabulary).replace(chr(39), chr(34))}}}}}'
            )
    with pytest.raises(ModelError, match=match) as caught, running(model, load_format="dummy", amateur=other):
        pass
    assert caught.value.code == "amateur_mismatch"
