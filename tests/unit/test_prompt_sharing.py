"""Choices of one request compute their prompt once and share its blocks; log-probabilities of prompts come once, in order."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from services.model_worker.engine import EngineRequest, FinishReason
from services.model_worker.interface import TokenLogprobs
from services.model_worker.prompt_logprobs import FIRST, PIECE
from shared.sampling import SamplingParams
from tests.unit.engine_harness import Collected, Harness, dummy_model, greedy, needs_weights, running, weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dummy_model(tmp_path_factory.mktemp("dummy"), vocab_size=PIECE - 28)


N = 4


def prompt_of(length: int) -> list[int]:
    return [3 + (7 * index + index // 5) % 80 for index in range(length)]


def choices(name: str, length: int, count: int = N, **options: Any) -> list[EngineRequest]:
    params = SamplingParams(max_tokens=20, temperature=1.2, ignore_eos=True, seed=9, **options.pop("params", {}))
    generated = options.pop("generated", [()] * count)
    return [
        EngineRequest(name, choice, 1, prompt_of(length), params, generated_ids=generated[choice], **options)
        for choice in range(count)
    ]


def apart(requests: list[EngineRequest]) -> list[EngineRequest]:
    """The same sequences, as requests that have nothing to do with each other."""
    return [dataclasses.replace(request, request_id=f"{request.request_id}.{request.choice}") for request in requests]


def together(started: Harness, requests: list[EngineRequest]) -> list[Collected]:
    """All are there before the first step, however slow this thread is."""
    started.engine.pause_output(True)
    outputs = [started.submit(request) for request in requests]
    started.engine.pause_output(False)
    started.wait(outputs)
    return outputs


class Rows:
    """Counts the rows of chunks and the copies that the model computes."""

    def __init__(self, started: Harness) -> None:
        self.chunk_rows = self.copies = self.most_used = 0
        pool, launch = started.engine.scheduler.pool, started.engine.runner.forward

        def counting(plan: Any) -> Any:
            self.chunk_rows += sum(chunk.rows for chunk in plan.chunks)
            self.copies += len(plan.copies)
            self.most_used = max(self.most_used, pool.num_blocks - pool.free)
            return launch(plan)

        started.engine.runner.forward = counting  # type: ignore[method-assign]


@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("length", [1, 2, 16, 17, 32, 37, 90])
def test_a_prompt_is_computed_once_and_shared(model: Path, length: int, prefix_cache: bool) -> None:
    options: dict[str, Any] = {"load_format": "dummy", "max_batched_tokens": 24, "prefix_cache": prefix_cache}
    with running(model, **options) as started:
        expected = started.run(apart(choices("a", length)))
    with running(model, **options) as started:
        rows = Rows(started)
        outputs = together(started, choices("a", length))
        assert [output.ids for output in outputs] == [output.ids for output in expected]
        assert len({tuple(output.ids) for output in outputs}) == N
        # Each but the first computes the last token's row again, for its logits.
        assert rows.chunk_rows == (length + N - 1 if length > 1 else N)
        assert rows.copies == (N - 1 if (length - 1) % 16 else 0)
        shared, each = (length - 1) // 16, -(-(length + 20) // 16)
        assert rows.most_used <= shared + N * (each - shared)


def test_choices_with_prefixes_share_the_prompt_after_a_migration(model: Path) -> None:
    with running(model, load_format="dummy", prefix_cache=False) as started:
        whole = started.run(choices("a", 37))
        rows = Rows(started)
        generated = [whole[0].ids[:9], [], whole[2].ids[:1], whole[3].ids[:19]]
        again = together(started, choices("b", 37, generated=generated))
        assert [done + output.ids for done, output in zip(generated, again, strict=True)] == [o.ids for o in whole]
        # The others compute what they have generated, or their prompt's last token.
        assert rows.chunk_rows <= 37 + 9 + 1 + 1 + 19
        assert rows.copies == 3


@pytest.mark.parametrize("blocks", [12, 14, 16])
def test_sharing_under_preemption(model: Path, blocks: int) -> None:
    with running(model, load_format="dummy", max_batched_tokens=16, max_seqs=16) as started:
        expected = started.run([*choices("a", 37), *choices("b", 50)])
    options: dict[str, Any] = {"num_blocks": blocks, "max_model_len": 80, "max_batched_tokens": 16}
    with running(model, load_format="dummy", prefix_cache=False, **options) as started:
        outputs = together(started, [*choices("a", 37), *choices("b", 50)])
        assert [output.ids for output in outputs] == [output.ids for output in expected]
        assert started.engine.stats().preemptions > 0


def test_siblings_do_not_wait_for_one_that_is_gone(model: Path) -> None:
    """Aborted while it was at work on the prompt, at any step."""
    for steps in range(6):
        with running(model, load_format="dummy", max_batched_tokens=16, prefix_cache=False, overlap=False) as started:
            started.engine.pause_output(True)
            first, *others = choices("a", 60)
            lone = dataclasses.replace(first, deadline=None)
            outputs = [started.submit(request) for request in (lone, *others)]
            scheduler = started.engine.scheduler
            launch, launched = started.engine.runner.forward, 0

            def ending(
                plan: Any, steps: int = steps, launch: Any = launch, scheduler: Any = scheduler, started: Any = started
            ) -> Any:
                nonlocal launched
                launched += 1
                ticket = launch(plan)
                if launched == steps + 1:
                    sequence = started.engine._sequences["a", 0]
                    scheduler.finish(sequence)
                    started.engine._forget(sequence.request)
                return ticket

            started.engine.runner.forward = ending  # type: ignore[method-assign]
            started.engine.pause_output(False)
            started.wait(outputs[1:])
            assert all(len(output.ids) == 20 for output in outputs[1:])


def test_a_window_that_has_moved_on_is_not_shared(tmp_path: Path) -> None:
    model = dummy_model(
        tmp_path / "m", architectures=["MistralForCausalLM"], sliding_window=24, head_dim=8, vocab_size=100
    )
    with running(model, load_format="dummy", max_seqs=16) as started:
        expected = started.run(apart(choices("a", 70, params={})))
    with running(model, load_format="dummy", max_seqs=2, prefix_cache=False) as started:
        outputs = started.run(choices("a", 70))  # the last two are admitted when the first two have ended
        assert [output.ids for output in outputs] == [output.ids for output in expected]
    with running(model, load_format="dummy", max_seqs=16, prefix_cache=False) as started:
        first, *others = choices("a", 70)
        outputs = started.submit_and_pause([first], 15)  # its window has left the beginning of the prompt's end behind
        outputs += [started.submit(request) for request in others]
        started.engine.pause_output(False)
        started.wait(outputs)
        assert [output.ids for output in outputs] == [output.ids for output in expected]


# ---------------------------------------------------------------- log-probabilities of prompts


def told(started: Harness, name: str, epoch: int = 1) -> Collected:
    return started.prompts[name, epoch]


def check_prompt(collected: Collected, prompt: list[int], logits: torch.Tensor, top: int, start: int = 0) -> None:
    """logits [len(prompt), V]: of a plain forward pass."""
    assert collected.start == start and collected.ids == prompt[start:] and collected.finish is None
    assert len(collected.logprobs) == len(prompt) - start
    logprobs = logits.double().log_softmax(-1)
    for position, entry in enumerate(collected.logprobs, start):
        if position == 0:
            assert entry == FIRST
            continue
        row = logprobs[position - 1]
        assert entry.chosen == pytest.approx(row[prompt[position]].item(), abs=1e-4)
        best = row.topk(top) if top else None
        assert entry.top_ids == ([] if best is None else best.indices.tolist())
        assert entry.top == pytest.approx([] if best is None else best.values.tolist(), abs=1e-4)


@needs_weights
@pytest.mark.parametrize("rows", [16, 512])
def test_prompt_logprobs_equal_transformers_in_a_mixed_batch(rows: int) -> None:
    folder = weights("stories260K")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = [[1, *[3 + (11 * i * i + k) % 500 for i in range(n)]] for k, n in enumerate((0, 1, 15, 16, 31, 200))]
    with torch.inference_mode():
        logits = [model(torch.tensor([prompt])).logits[0] for prompt in prompts]
    with running(folder, max_batched_tokens=rows) as started:
        noise = [started.submit(greedy(f"n{i}", prompts[-1][i:], 30, params={"logprobs": 2})) for i in range(3)]
        for attempt in ("first", "again, cached"):
            for k, prompt in enumerate(prompts):
                params = {"prompt_logprobs": k, "logprobs": None if k % 2 else 3}
                outputs = started.run([greedy(f"{attempt} {k}", prompt, 5, params=params, prompt_done=0)])
                assert len(outputs[0].ids) == 5
                check_prompt(told(started, f"{attempt} {k}"), prompt, logits[k], k)
        started.wait(noise)
    # Nothing to generate; and a part of the prompt is told already.
    with running(folder, max_batched_tokens=rows) as started:
        for k, prompt in enumerate(prompts):
            for done in {0, len(prompt) // 2, len(prompt) - 1}:
                params = {"prompt_logprobs": 2}
                request = greedy(f"{k} {done}", prompt, 0, params=params, prompt_done=done)
                (output,) = started.run([request])
                assert (output.ids, output.finish) == ([], FinishReason.LENGTH)
                check_prompt(told(started, f"{k} {done}"), prompt, logits[k], 2, done)
        whole = started.run([greedy("whole", prompts[-1], 0)])[0]
        assert (whole.ids, whole.finish) == ([], FinishReason.LENGTH), "without anything to tell it ends at once"


@pytest.mark.parametrize("blocks", [None, 9])
def test_prompt_logprobs_once_with_choices_and_preemption(model: Path, blocks: int | None) -> None:
    def told_of(name: str, started: Harness) -> list[TokenLogprobs]:
        collected = told(started, name)
        assert collected.ids == prompt_of(50) and collected.start == 0
        return collected.logprobs

    params = {"prompt_logprobs": 3}
    with running(model, load_format="dummy") as started:
        outputs = started.run([dataclasses.replace(r, prompt_done=0) for r in choices("a", 50, 1, params=params)])
        expected, ids = told_of("a", started), outputs[0].ids
    options: dict[str, Any] = {"num_blocks": blocks, "max_model_len": 80} if blocks else {}
    with running(model, load_format="dummy", max_batched_tokens=16, **options) as started:
        first, *others = choices("a", 50, params=params)
        more = [dataclasses.replace(r, prompt_done=0) for r in choices("b", 50, 1, params=params)]
        asked = [*choices("noise", 30, 2), dataclasses.replace(first, prompt_done=0), *others, *more]
        outputs = together(started, asked)
        assert outputs[2].ids == ids
        for name in ("a", "b"):
            for got, wanted in zip(told_of(name, started), expected, strict=True):
                assert got.chosen == pytest.approx(wanted.chosen, abs=1e-5)
                assert got.top_ids == wanted.top_ids
        assert (started.engine.stats().preemptions > 0) == (blocks is not None)
