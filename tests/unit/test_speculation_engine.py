"""Speculation in the engine: whatever is guessed, and however steps are mixed, the output is that of plain decoding."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from services.model_worker.engine import EngineConfig, EngineRequest, FinishReason, ModelError
from services.model_worker.model_runner import ModelRunner
from services.model_worker.models.config import load_config
from services.model_worker.speculation.medusa import MedusaHeads, save_heads
from services.model_worker.speculation.tree import Tree
from services.model_worker.warm_up import warm_up
from shared.sampling import SamplingParams
from tests.unit.engine_harness import (
    Collected,
    Harness,
    RepeatedFunctions,
    dummy_model,
    greedy,
    launched_plans,
    needs_weights,
    running,
    weights,
)

VOCABULARY = 24  # so few that the ten candidates of a random head are often right


pytestmark = pytest.mark.usefixtures("one_thread")


def random_heads(folder: Path, hidden: int, heads: int = 4, scale: float = 0.3) -> Path:
    generator = torch.Generator().manual_seed(9)
    shape = (1, heads, hidden)
    drawn = MedusaHeads(
        torch.randn(*shape, hidden, generator=generator) * scale, torch.randn(shape, generator=generator) * scale
    )
    save_heads(drawn, folder, torch.float32, {})
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = dummy_model(tmp_path_factory.mktemp("dummy"), vocab_size=VOCABULARY)
    random_heads(folder / "medusa", 32)
    return folder


class RandomPicks:
    """In place of the controller's choice: any tree that fits, or none; the engine must not depend on which."""

    def __init__(self, harness: Harness, plain: float = 0.2) -> None:
        self.trees = harness.engine.trees
        assert self.trees is not None
        self.plain = plain
        self.rng = random.Random(4)
        self.trees.pick = self.pick  # type: ignore[method-assign]

    def pick(self, count: int, places: Any) -> Tree | None:
        assert self.trees is not None
        usable = [tree for tree in self.trees.trees if count * tree.size <= self.trees._max_rows]
        return None if not usable or self.rng.random() < self.plain else self.rng.choice(usable)


@contextmanager
def speculating(model: Path, plain: float = 0.2, **options: Any) -> Iterator[Harness]:
    with running(model, load_format="dummy", **options) as started:
        RandomPicks(started, plain)
        yield started
        stats = started.engine.stats().speculation
        assert stats is not None and stats.drafted > 0 and stats.accepted[0] > 0, "nothing was guessed"


def sampled(name: str, prompt: list[int], **params: Any) -> EngineRequest:
    values = {"max_tokens": 40, "temperature": 1.0, "ignore_eos": True, "seed": 1234} | params
    return EngineRequest(name, 0, 1, prompt, SamplingParams(**values))


PROMPT = [5, 6, 7, 8, 9, 10, 11]
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {"temperature": 1.3, "seed": 7},
    "filtered": {"temperature": 2.0, "top_k": 12, "top_p": 0.9, "min_p": 0.02, "seed": -3},
    "penalised": {"temperature": 0.7, "repetition_penalty": 1.5, "presence_penalty": 0.4, "frequency_penalty": 0.8},
    "greedy, penalised": {"temperature": 0.0, "frequency_penalty": 1.5},
    "logprobs": {"temperature": 0.9, "logprobs": 4},
    "all": {"temperature": 0.9, "top_p": 0.8, "presence_penalty": 1.0, "logprobs": 0},
    "typical": {"temperature": 1.4, "typical_p": 0.6, "seed": 5},
    "edited": {"temperature": 1.0, "logit_bias": ((3, 2.0), (9, -100.0)), "bad_words": ((11,), (13,)), "min_tokens": 6},
    "pairs": {
        "temperature": 1.1,
        "bad_words": tuple((i, (i * k + 1) % VOCABULARY) for i in range(24) for k in range(8)),
    },
}


@pytest.fixture(scope="module")
def alone(model: Path) -> dict[str, Collected]:
    """Each kind by itself, without speculation."""
    with running(model, load_format="dummy", speculate=False) as started:
        assert started.engine.stats().speculation is None
        return {kind: started.run([sampled(kind, PROMPT, **params)])[0] for kind, params in KINDS.items()}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="as it is"),
        pytest.param({"overlap": False}, id="no overlap"),
        pytest.param({"num_blocks": 14, "max_model_len": 64, "max_seqs": 8}, id="preemption"),
        pytest.param({"max_batched_tokens": 64}, id="chunked prompts"),
        pytest.param({"block_size": 4}, id="small blocks"),
    ],
)
def test_the_output_is_that_of_plain_decoding(
    model: Path, alone: dict[str, Collected], options: dict[str, Any]
) -> None:
    with speculating(model, **options) as started:
        noise = [started.submit(sampled(f"n{i}", [3 + j % 20 for j in range(20 + 3 * i)], seed=i)) for i in range(6)]
        outputs = started.run([sampled(kind, PROMPT, **params) for kind, params in KINDS.items()])
        started.wait(noise)
        for kind, output in zip(KINDS, outputs, strict=True):
            assert output.ids == alone[kind].ids, kind
            assert [entry.top_ids for entry in output.logprobs] == [entry.top_ids for entry in alone[kind].logprobs]
            assert [entry.chosen for entry in output.logprobs] == pytest.approx(
                [entry.chosen for entry in alone[kind].logprobs], abs=1e-4
            )
        assert (started.engine.stats().preemptions > 0) == ("num_blocks" in options)


def test_replayed_steps(model: Path, alone: dict[str, Collected]) -> None:
    """As in CUDA graphs: fixed addresses, padded sizes, several trees for each size."""
    with speculating(model, plain=0.1, max_seqs=8, max_batched_tokens=1024) as started:
        graphs = RepeatedFunctions()
        started.engine.runner.capture_graphs(graphs, lambda fraction: None)
        for round_ in range(3):
            outputs = started.run([sampled(f"{kind} {round_}", PROMPT, **params) for kind, params in KINDS.items()])
            assert [output.ids for output in outputs] == [output.ids for output in alone.values()]
            for kind in ("greedy", "plain", "filtered"):
                (output,) = started.run([sampled(f"{kind} alone {round_}", PROMPT, **KINDS[kind])])
                assert output.ids == alone[kind].ids
        decodes = {key[-2:] for key in graphs.replayed if key[0] in ("decode", "step")}  # type: ignore[index]
        assert {nodes for _, nodes in decodes} == {1, 2, 4, 8, 16, 32, 64}
        assert all(size * nodes <= 512 for size, nodes in decodes)


def test_warming_up_with_trees_leaves_no_trace(
    model: Path, alone: dict[str, Collected], monkeypatch: pytest.MonkeyPatch
) -> None:
    with speculating(model, max_seqs=24) as started:
        runner = started.engine.runner
        plans = launched_plans(runner, monkeypatch)
        warm_up(runner, started.engine.scheduler.limits, started.engine.info.num_blocks)
        largest = {
            nodes: max(s for s, n in runner.decode_shapes() if n == nodes) for _, nodes in runner.decode_shapes()
        }
        beside = {(len(plan.decodes) + 1, plan.nodes) for plan in plans if plan.chunks}
        assert beside >= {(most, nodes) for nodes, most in largest.items()}
        outputs = started.run([sampled(kind, PROMPT, **params) for kind, params in KINDS.items()])
        assert [output.ids for output in outputs] == [output.ids for output in alone.values()]


@pytest.mark.parametrize("done", [1, 9, 39])
def test_a_migrated_sequence_goes_on(model: Path, alone: dict[str, Collected], done: int) -> None:
    with speculating(model, plain=0.0) as started:
        requests = [
            dataclasses.replace(sampled(kind, PROMPT, **params), epoch=2, generated_ids=alone[kind].ids[:done])
            for kind, params in KINDS.items()
        ]
        for kind, output in zip(KINDS, started.run(requests), strict=True):
            assert output.ids == alone[kind].ids[done:]
        started.run([greedy("something", PROMPT)])


def test_ends_inside_an_accepted_run(model: Path, alone: dict[str, Collected]) -> None:
    free = alone["plain"].ids
    with speculating(model, plain=0.0) as started:
        for length in range(1, 12):
            (output,) = started.run([sampled(f"length {length}", PROMPT, **KINDS["plain"], max_tokens=length)])
            assert (output.ids, output.finish) == (free[:length], FinishReason.LENGTH)
        for stop in set(free):
            (output,) = started.run([sampled(f"stop {stop}", PROMPT, **KINDS["plain"], stop_token_ids=(stop,))])
            assert output.ids == free[: free.index(stop) + 1]
            assert (output.finish, output.stop_token) == (FinishReason.STOP_TOKEN, stop)


def test_to_the_brim_of_the_context(model: Path) -> None:
    """Trees reach past the end of the context, over blocks that a sequence will never need."""
    request = greedy("brim", [3 + i % 20 for i in range(30)], 1000)
    with running(model, load_format="dummy", max_model_len=64, num_blocks=4, speculate=False) as started:
        (expected,) = started.run([request])
    assert len(expected.ids) == 34
    for blocks in (4, 5, 40):
        with running(model, load_format="dummy", max_model_len=64, num_blocks=blocks) as started:
            RandomPicks(started, 0.0)
            outputs = started.run([request, *(dataclasses.replace(request, request_id=str(i)) for i in range(3))])
            assert [output.ids for output in outputs] == [expected.ids] * 4


def test_a_prefix_with_guessed_tokens_is_shared_rightly(model: Path) -> None:
    """Blocks filled by accepted guesses are found by a later request, which continues as if it had computed them."""
    with running(model, load_format="dummy", speculate=False, prefix_cache=False) as started:
        (expected,) = started.run([greedy("a", PROMPT, 120)])
    with speculating(model, plain=0.0) as started:
        (first,) = started.run([greedy("a", PROMPT, 60)])
        (second,) = started.run([greedy("b", PROMPT + first.ids, 60)])
        assert first.ids + second.ids == expected.ids
        assert started.engine.stats().prefix_hit_tokens == (len(PROMPT) + 59) // 16 * 16


def test_a_sliding_window(tmp_path: Path) -> None:
    folder = dummy_model(
        tmp_path / "window", vocab_size=VOCABULARY, architectures=["MistralForCausalLM"], sliding_window=24
    )
    random_heads(folder / "medusa", 32)
    requests = [sampled(str(seed), PROMPT, seed=seed, max_tokens=150) for seed in range(3)]
    with running(folder, load_format="dummy", speculate=False) as started:
        expected = [output.ids for output in started.run(requests)]
    with speculating(folder, plain=0.1) as started:
        assert [output.ids for output in started.run(requests)] == expected


def test_statistics(model: Path) -> None:
    with speculating(model, plain=0.3) as started:
        outputs = started.run([greedy("a", PROMPT, 60), sampled("b", PROMPT, presence_penalty=1.0)])
        stats = started.engine.stats().speculation
        assert stats is not None and len(stats.accepted) == 4
        assert stats.accepted == sorted(stats.accepted, reverse=True)
        last = {token.request_id: token for step in started.steps for token in step.outputs if token.finish}
        told, untold = last["a"].speculation, last["b"].speculation
        assert told is not None and untold is not None
        assert told.drafted > 0 and told.accepted[0] > 0 and told.nodes >= 2 * told.drafted
        assert list(told.accepted) == sorted(told.accepted, reverse=True)
        assert (untold.drafted, untold.accepted, untold.nodes) == (0, (), 0) and untold.plain > 0
        assert stats.accepted[: len(told.accepted)] == list(told.accepted) and stats.drafted == told.drafted
        # The first token is the prompt's step's; a step's last guesses may lie beyond the last token.
        assert 0 <= 1 + told.plain + told.drafted + sum(told.accepted) - 60 <= 8
        assert stats.steps[1] > 0 and sum(stats.steps.values()) >= stats.drafted
        assert len(outputs[0].ids) == 60


def test_typical_acceptance_is_opt_in_and_leaves_greedy_alone(model: Path, alone: dict[str, Collected]) -> None:
    with speculating(model, plain=0.0, typical_acceptance=(0.09, 0.3)) as started:
        same, other = started.run([sampled("g", PROMPT, **KINDS["greedy"]), sampled("p", PROMPT, **KINDS["plain"])])
        assert same.ids == alone["greedy"].ids
        assert other.ids != alone["plain"].ids and len(other.ids) == 40


def test_a_step_with_a_search_tells_nothing_of_what_decoding_takes(model: Path) -> None:
    """It runs passes of its own in the same step."""
    with running(model, load_format="dummy") as started:
        engine = started.engine
        told: list[tuple[bool, float | None]] = []
        trees = engine.trees
        assert trees is not None
        trees.observe_time = lambda batch, tree, seconds: told.append(  # type: ignore[method-assign]
            (engine._in_flight[0].plan.has_search, seconds)
        )
        beams = EngineRequest("b", 0, 1, (5, 6, 7), SamplingParams(max_tokens=20, num_beams=2, temperature=0.0))
        started.run([greedy("g", range(3, 9), 40), beams])
    assert {searched for searched, _ in told} == {True, False}
    assert all(seconds is None for searched, seconds in told if searched)
    assert any(seconds is not None for searched, seconds in told if not searched)


def test_heads_that_do_not_fit_are_refused(model: Path, tmp_path: Path) -> None:
    for folder, code in ((tmp_path, "heads_missing"), (random_heads(tmp_path / "wide", 48), "heads_wrong_shape")):
        with pytest.raises(ModelError) as caught:
            Harness(EngineConfig(model, load_format="dummy", device="cpu", heads=folder)).engine.load()
        assert caught.value.code == code


Wrong = Callable[[ModelRunner], None]


def forget_to_move(runner: ModelRunner) -> None:
    runner.ops.move_kv = lambda *_: None  # type: ignore[method-assign]


def one_position_for_all(runner: ModelRunner) -> None:
    assert runner.verifier is not None
    for tree in runner.verifier.trees.values():
        tree.depths = tree.depths.clamp(max=1)


@pytest.mark.parametrize("wrong", [forget_to_move, one_position_for_all])
def test_these_tests_can_fail(model: Path, alone: dict[str, Collected], wrong: Wrong) -> None:
    with speculating(model, plain=0.0) as started:
        wrong(started.engine.runner)
        outputs = started.run([sampled(kind, PROMPT, **KINDS[kind]) for kind in ("greedy", "plain", "filtered")])
        assert [output.ids for output in outputs] != [alone[kind].ids for kind in ("greedy", "plain", "filtered")]


def prompts(count: int, vocabulary: int, length: int, seed: int = 5) -> list[list[int]]:
    rng = random.Random(seed)
    return [[1] + [rng.randrange(3, vocabulary) for _ in range(rng.randrange(1, length))] for _ in range(count)]


def mixed_requests(count: int, vocabulary: int, max_tokens: int) -> list[EngineRequest]:
    """Greedy and sampled ones in turn."""
    return [
        sampled(str(i), prompt, seed=i, temperature=0.0 if i % 2 == 0 else 0.8, max_tokens=max_tokens)
        for i, prompt in enumerate(prompts(count, vocabulary, 24))
    ]


@needs_weights
def test_a_real_model(tmp_path: Path) -> None:
    """stories260K with random heads, in full batches."""
    folder = weights("stories260K")
    config = load_config(folder)
    requests = mixed_requests(40, config.vocab_size, 48)
    with running(folder, max_seqs=16) as started:
        expected = [output.ids for output in started.run(requests)]
    with running(folder, max_seqs=16, heads=random_heads(tmp_path, config.hidden_size, scale=0.02)) as started:
        RandomPicks(started, 0.1)
        outputs = started.run(requests)
        stats = started.engine.stats().speculation
    assert stats is not None and sum(stats.accepted) > 20 and Counter(stats.steps).total() > 50
    assert [output.ids for output in outputs] == expected


def test_the_demo_model_has_heads_and_they_change_nothing() -> None:
    folder = Path(__file__).resolve().parents[2] / "models" / "demo"
    requests = mixed_requests(12, 4096, 20)
    with running(folder, max_seqs=6, speculate=False) as started:
        expected = [output.ids for output in started.run(requests)]
    with running(folder, max_seqs=6) as started:
        assert len(started.engine.info.tree_sizes) >= 4
        RandomPicks(started, 0.1)
        outputs = started.run(requests)
        stats = started.engine.stats().speculation
    assert stats is not None and sum(stats.accepted) > 5
    assert [output.ids for output in outputs] == expected


def test_choices_that_share_a_prompt_and_its_logprobs(model: Path) -> None:
    """Forked sequences have the hidden state that the drafter wants from their own first step."""

    def requests(name: str) -> list[EngineRequest]:
        params = SamplingParams(max_tokens=30, temperature=1.1, ignore_eos=True, seed=3, prompt_logprobs=2)
        prompt = [3 + (5 * i) % 20 for i in range(37)]
        return [EngineRequest(name, c, 1, prompt, params, prompt_done=None if c else 0) for c in range(4)]

    with running(model, load_format="dummy", speculate=False) as started:
        plain = [output.ids for output in started.run(requests("a"))]
        told = started.prompts["a", 1]
    with speculating(model, max_batched_tokens=40) as started:
        noise = [started.submit(sampled(f"n{i}", PROMPT, seed=i)) for i in range(3)]
        assert [output.ids for output in started.run(requests("a"))] == plain
        started.wait(noise)
        again = started.prompts["a", 1]
        assert again.ids == told.ids and len(again.logprobs) == 37
        assert [e.chosen for e in again.logprobs] == pytest.approx([e.chosen for e in told.logprobs], abs=1e-4)
