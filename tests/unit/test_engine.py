"""The engine as the service sees it: what goes in, what comes out, and what must not matter."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.model_worker.engine import (
    EngineConfig,
    EngineOverloaded,
    EngineRequest,
    FinishReason,
    ModelError,
    RequestRejected,
)
from services.model_worker.prompt_graphs import PromptGraphs, prompt_sizes
from services.model_worker.sampler import CAPTURED_MODES
from services.model_worker.step_bound import StepBound
from services.model_worker.warm_up import warm_up
from shared.sampling import SamplingParams
from tests.unit.engine_harness import (
    Collected,
    Harness,
    RepeatedFunctions,
    dummy_model,
    greedy,
    launched_plans,
    running,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dummy_model(tmp_path_factory.mktemp("dummy"))


@pytest.fixture
def harness(model: Path) -> Iterator[Harness]:
    with running(model, load_format="dummy", max_seqs=8, max_batched_tokens=32) as started:
        yield started


def sampled(
    name: str, prompt: list[int], choice: int = 0, epoch: int = 1, generated: Any = (), **params: Any
) -> EngineRequest:
    values = {"max_tokens": 24, "temperature": 1.0, "ignore_eos": True, "seed": 1234} | params
    return EngineRequest(name, choice, epoch, prompt, SamplingParams(**values), generated_ids=generated)


PROMPT = [5, 6, 7, 8, 9, 10, 11]
# One of each kind of sampling, with each other in a batch.
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {"temperature": 1.3, "seed": 7},
    "filtered": {"temperature": 2.0, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "seed": -3},
    "big seed": {"temperature": 1.5, "seed": 2**64 - 5},
    "penalised": {"temperature": 0.7, "repetition_penalty": 1.5, "presence_penalty": 0.4, "frequency_penalty": 0.8},
    "greedy, penalised": {"temperature": 0.0, "frequency_penalty": 1.5},
    "logprobs": {"temperature": 0.9, "logprobs": 4},
    "all": {"temperature": 0.9, "top_p": 0.8, "presence_penalty": 1.0, "logprobs": 0},
    "typical": {"temperature": 1.4, "typical_p": 0.4, "seed": 5},
    "biased": {"temperature": 0.0, "logit_bias": ((3, 0.5), (17, -100.0), (40, 100.0))},
    "words": {
        "temperature": 0.0,
        "bad_words": (*[(i, j) for i in range(20) for j in range(i, 96, 8)][:240], (60,)),
    },
    "late end": {"temperature": 1.0, "ignore_eos": False, "stop_token_ids": tuple(range(3, 50)), "min_tokens": 24},
}


@pytest.fixture(scope="module")
def alone(model: Path) -> dict[str, Collected]:
    """Each kind by itself."""
    with running(model, load_format="dummy", max_seqs=8) as started:
        return {kind: started.run([sampled(kind, PROMPT, **params)])[0] for kind, params in KINDS.items()}


def test_the_kinds_differ(alone: dict[str, Collected]) -> None:
    assert len({tuple(output.ids) for output in alone.values()}) == len(KINDS)


@pytest.mark.parametrize("blocks", [None, 12])
def test_sampling_is_the_same_in_a_batch(model: Path, alone: dict[str, Collected], blocks: int | None) -> None:
    """Mixed parameters, chunked prompts of other requests in between, and (with few blocks) preemption."""
    options: dict[str, Any] = {"num_blocks": blocks, "max_model_len": 64} if blocks else {}
    with running(model, load_format="dummy", max_seqs=8, max_batched_tokens=16, **options) as started:
        noise = [started.submit(sampled(f"n{i}", list(range(3, 30 + i)), seed=i)) for i in range(4)]
        outputs = started.run([sampled(kind, PROMPT, **params) for kind, params in KINDS.items()])
        started.wait(noise)
        assert {kind: output.ids for kind, output in zip(KINDS, outputs, strict=True)} == {
            k: o.ids for k, o in alone.items()
        }
        assert (started.engine.stats().preemptions > 0) == (blocks is not None)


@pytest.mark.parametrize("done", [1, 9, 23])
def test_a_migrated_sequence_goes_on_as_if_nothing_had_happened(
    harness: Harness, alone: dict[str, Collected], done: int
) -> None:
    requests = [
        sampled(kind, PROMPT, epoch=2, generated=alone[kind].ids[:done], **params) for kind, params in KINDS.items()
    ]
    for kind, output in zip(KINDS, harness.run(requests), strict=True):
        assert output.ids == alone[kind].ids[done:], kind
        assert output.finish is FinishReason.LENGTH


@pytest.mark.parametrize("length", [15, 16, 17, 32, 33])
def test_chunks_end_anywhere(model: Path, length: int) -> None:
    """A prompt whose last token alone is left over goes on as a decode row."""
    prompt = [3 + index % 50 for index in range(length)]
    with (
        running(model, load_format="dummy") as whole,
        running(model, load_format="dummy", max_batched_tokens=16) as chunked,
    ):
        (expected,), (output,) = (started.run([greedy("a", prompt, 8)]) for started in (whole, chunked))
        assert output.ids == expected.ids


def test_padded_replayed_steps_change_nothing(model: Path, alone: dict[str, Collected]) -> None:
    """Everything that a graph holds fast on a GPU: addresses, padded sizes, the mode of sampling."""
    with running(model, load_format="dummy", max_seqs=12, max_batched_tokens=256) as started:
        graphs = RepeatedFunctions()
        cache = started.engine.runner.cache.data
        before = cache.view(torch.int32).clone()
        started.engine.runner.capture_graphs(graphs, lambda fraction: None)
        assert torch.equal(cache.view(torch.int32), before), "a capture has written into the cache"
        outputs = started.run([sampled(kind, PROMPT, **params) for kind, params in KINDS.items()])
        for kinds in (["greedy"], ["plain", "greedy"], ["filtered", "plain", "big seed"], list(KINDS)[:4]):
            again = started.run([sampled(f"{kind} {len(kinds)}", PROMPT, **KINDS[kind]) for kind in kinds])
            assert [output.ids for output in again] == [alone[kind].ids for kind in kinds]
            started.run([greedy(f"lengths {len(kinds)} {n}", PROMPT[:3], 4 + n) for n in range(11)])
        assert [output.ids for output in outputs] == [output.ids for output in alone.values()]
        replayed: list[tuple[Any, ...]] = [*graphs.replayed]  # type: ignore[list-item]
        assert (12, 1) in {key[1:] for key in replayed if key[0] == "decode"}
        assert {key[2:] for key in replayed if key[0] == "step"} == {(1, 1), (2, 1), (4, 1), (8, 1)}
        assert {key[1] for key in replayed if key[0] == "step"} == set(CAPTURED_MODES)
        assert any(key[0] == "prompt" for key in replayed)


@pytest.mark.parametrize("whole", [False, True])
def test_prompts_in_padded_replayed_pieces_change_nothing(model: Path, whole: bool) -> None:
    """A step's filling rows still hold what a step before it has left there, of sequences that go on; and a whole step's filling
    sequences what others have left."""
    requests = [greedy(f"{length}", range(3, 3 + length), 40) for length in (60, 9, 41, 30, 17, 1, 45, 20, 33, 50)]
    outputs = []
    for captured in (False, True):
        with running(model, load_format="dummy", max_seqs=12, max_batched_tokens=64, whole_prompts=whole) as started:
            if captured:
                graphs = RepeatedFunctions()
                started.engine.runner.capture_graphs(graphs, lambda fraction: None)
            submitted: list[Collected] = []
            for request in requests:
                started.wait_for(
                    lambda so_far=submitted: all(output.ids for output in so_far)
                )  # each comes beside decodes
                submitted.append(started.submit(request))
            started.wait(submitted)
            outputs.append([output.ids for output in submitted])
    assert outputs[0] == outputs[1]
    replayed: set[tuple[Any, ...]] = {*graphs.replayed}  # type: ignore[arg-type]
    pieces, steps = ({key[1] for key in replayed if key[0] == kind} for kind in ("prompt", "prompts"))
    assert pieces | steps == {16, 32, 64} and pieces  # more than eight sequences are never a whole step
    assert {key[2] for key in replayed if key[0] == "prompts"} == ({1, 8} if whole else set())


def test_steps_of_prompts_alone_change_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such steps read what the host has laid out, where longer ones with more sequences have left theirs; prompts in chunks, new
    tokens sampled by each sequence's own parameters, and sequences that were there before."""

    def request(length: int, index: int) -> EngineRequest:
        kind = list(KINDS)[(length + index) % len(KINDS)]
        params = KINDS[kind] | {"max_tokens": 3}
        return sampled(f"{length} {index}", [3 + (length + 7 * n) % 90 for n in range(length)], **params)

    calls: list[int] = []
    forward = PromptGraphs.forward_prompts

    def counted(self: PromptGraphs, shape: Any, rows: Any, ends: Any, contexts: list[int], tables: Any) -> torch.Tensor:
        calls.append(len(contexts))
        return forward(self, shape, rows, ends, contexts, tables)

    monkeypatch.setattr(PromptGraphs, "forward_prompts", counted)
    batches = [(20, 9, 4, 1, 17, 5, 3, 2), (60,), (3, 30), (1,), (150,), (7, 7, 7, 7, 7, 7, 7, 7, 7), (2, 40, 11)]
    outputs: list[list[list[int]]] = []
    for captured in (False, True):
        with running(model, load_format="dummy", max_seqs=12, max_batched_tokens=64) as started:
            if captured:
                started.engine.runner.capture_graphs(RepeatedFunctions(), lambda fraction: None)
            outputs.append([])
            for batch in batches:
                started.engine.pause_output(True)  # until all are there
                submitted = [started.submit(request(length, index)) for index, length in enumerate(batch)]
                started.engine.pause_output(False)
                started.wait(submitted)
                outputs[-1] += [output.ids for output in submitted]
    assert outputs[0] == outputs[1]
    # Of the 150, which begin as the 60 did, 48 are in the prefix cache: two steps. Nine are more than a graph is made for.
    assert calls == [8, 1, 2, 1, 1, 1, 3]


def test_sizes_of_captured_prompts() -> None:
    assert prompt_sizes(440_000_000, 8192)[-1] == 8192
    assert prompt_sizes(7_000_000_000, 8192)[-1] == 512
    assert prompt_sizes(1_000, 100)[-1] == 96
    assert prompt_sizes(10**12, 8192) == []


@pytest.mark.parametrize("slots", [2, 24])
def test_warming_up_leaves_no_trace(model: Path, alone: dict[str, Collected], slots: int) -> None:
    with running(model, load_format="dummy", max_seqs=slots) as started:
        runner, info = started.engine.runner, started.engine.info
        assert warm_up(runner, started.engine.scheduler.limits, info.num_blocks) == (23 if slots == 2 else 69)
        outputs = started.run([sampled(kind, PROMPT, **params) for kind, params in KINDS.items()])
        assert [output.ids for output in outputs] == [output.ids for output in alone.values()]


def test_warming_up_sees_many_sequences_beside_a_prompt(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of attention differ by the number of sequences, and outside graphs by whether contexts are split."""
    with running(model, load_format="dummy", max_seqs=200) as started:
        runner, info = started.engine.runner, started.engine.info
        plans = launched_plans(runner, monkeypatch)
        warm_up(runner, started.engine.scheduler.limits, info.num_blocks)
    assert {len(plan.decodes) for plan in plans if plan.chunks} >= {1, 3, 16, 32, 128, 199}


def test_choices_and_seeds_differ(harness: Harness) -> None:
    outputs = harness.run([
        *(sampled("a", PROMPT, choice=choice) for choice in range(3)), sampled("b", PROMPT, seed=4), sampled("c", PROMPT),
    ])  # fmt: skip
    assert len({tuple(output.ids) for output in outputs}) == 4
    assert outputs[0].ids == outputs[4].ids


def test_logprobs(harness: Harness) -> None:
    many, none, chosen = harness.run([
        greedy("many", PROMPT, 6, params={"logprobs": 5, "frequency_penalty": 2.0}), greedy("none", PROMPT, 6),
        greedy("chosen", PROMPT, 6, params={"logprobs": 0}),
    ])  # fmt: skip
    assert none.logprobs == [] and len(many.logprobs) == len(chosen.logprobs) == 6
    for token, entry in zip(many.ids, many.logprobs, strict=True):
        assert len(entry.top_ids) == len(entry.top) == 5 and entry.top == sorted(entry.top, reverse=True)
        assert entry.chosen <= entry.top[0] < 0 and sum(map(math.exp, entry.top)) < 1
        if token in entry.top_ids:
            assert entry.top[entry.top_ids.index(token)] == entry.chosen
    # The first token was chosen before any penalty applied, the raw distribution does not know of penalties anyway.
    assert many.logprobs[0].top_ids[0] == many.ids[0] and many.ids != none.ids
    assert chosen.ids == none.ids and chosen.logprobs[0].chosen == pytest.approx(many.logprobs[0].chosen, abs=1e-5)
    assert all(entry.top == entry.top_ids == [] for entry in chosen.logprobs)


def test_how_sequences_end(model: Path) -> None:
    with running(model, load_format="dummy") as started:
        (free,) = started.run([greedy("free", PROMPT, 30)])
    stop, own = free.ids[8], free.ids[4]
    upto = {token: free.ids.index(token) + 1 for token in (stop, own)}
    ending = dummy_model(model.parent / "ending", eos_token_id=[1, stop])
    with running(ending, load_format="dummy") as started:
        eos, ignored, token, length, finished = started.run([
            greedy("eos", PROMPT, 30, params={"ignore_eos": False}), greedy("ignored", PROMPT, 30),
            greedy("token", PROMPT, 30, params={"stop_token_ids": (own,)}), greedy("length", PROMPT, 1),
            greedy("finished", PROMPT, 4, generated_ids=free.ids[:4]),
        ])  # fmt: skip
    assert (eos.ids, eos.finish, eos.stop_token) == (free.ids[: upto[stop]], FinishReason.STOP, stop)
    assert (ignored.ids, ignored.finish) == (free.ids, FinishReason.LENGTH)
    assert (token.ids, token.finish, token.stop_token) == (free.ids[: upto[own]], FinishReason.STOP_TOKEN, own)
    assert (length.ids, length.finish) == (free.ids[:1], FinishReason.LENGTH)
    assert (finished.ids, finished.finish) == ([], FinishReason.LENGTH)


def test_the_context_limit_ends_a_sequence(harness: Harness) -> None:
    longest = harness.engine.info.max_model_len
    brim, over = list(range(3, 90)) * 3, greedy("over", [3] * longest, 1)
    (output,) = harness.run([greedy("brim", brim[: longest - 3], 1000)])
    assert len(output.ids) == 3 and output.finish is FinishReason.LENGTH
    with pytest.raises(RequestRejected) as caught:
        harness.engine.submit(over)
    assert caught.value.error.code == "context_length_exceeded" and not caught.value.error.retryable


def test_the_pool_caps_the_context(model: Path) -> None:
    with running(model, load_format="dummy", num_blocks=4, block_size=16) as started:
        assert started.engine.info.max_model_len == 64
        (output,) = started.run([greedy("all", [4] * 40, 1000)])
        assert len(output.ids) == 24
        assert len(started.run([greedy(str(i), [i + 3] * 60, 4) for i in range(5)])) == 5


def test_what_fails_in_the_engine_fails_alone(harness: Harness) -> None:
    good = harness.submit(greedy("good", PROMPT, 10))
    (bad,) = harness.run([greedy("bad", PROMPT, params={"stop_token_ids": (np.array(5),)})])  # not hashable
    assert bad.error is not None and (bad.error.code, bad.error.request_id) == ("internal", "bad")
    harness.wait([good])
    assert len(good.ids) == 10 and "bad" not in harness.engine.stats().running


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("invalid_request", {"prompt_ids": []}),
        ("invalid_request", {"prompt_ids": [96]}),
        ("invalid_request", {"prompt_ids": [4, -1]}),
        ("invalid_request", {"generated_ids": [1000]}),
        ("invalid_request", {"prompt_ids": ["x"]}),
        ("invalid_request", {"params": SamplingParams(max_tokens=-1)}),
        ("invalid_request", {"params": SamplingParams(prompt_logprobs=21)}),
        ("invalid_request", {"params": SamplingParams(top_k=2**40)}),
        ("invalid_request", {"params": SamplingParams(logprobs=97)}),
        ("invalid_request", {"params": SamplingParams(temperature="hot")}),  # type: ignore[arg-type]
        ("invalid_request", {"params": SamplingParams(logit_bias=((96, 1.0),))}),
        ("invalid_request", {"params": SamplingParams(bad_words=((1, 96),))}),
        ("invalid_request", {"params": SamplingParams(min_tokens=3, stop_token_ids=(96,))}),
        ("invalid_request", {"params": SamplingParams(bad_words=((1,) * 17,))}),
        ("invalid_request", {"params": SamplingParams(bad_words=((),))}),
        ("invalid_request", {"params": SamplingParams(bad_words=((1,),) * 257)}),
        ("invalid_request", {"params": SamplingParams(logit_bias=tuple((1, 1.0) for _ in range(385)))}),
    ],
)
def test_a_bad_request_harms_itself_only(harness: Harness, code: str, changes: dict[str, Any]) -> None:
    good = harness.submit(greedy("good", PROMPT, 10))
    with pytest.raises(RequestRejected) as caught:
        harness.engine.submit(dataclasses.replace(greedy("bad", PROMPT), **changes))
    assert (caught.value.error.code, caught.value.error.request_id) == (code, "bad")
    harness.wait([good])
    assert len(good.ids) == 10 and "bad" not in harness.engine.stats().running


def test_abort(harness: Harness) -> None:
    requests = [sampled("a", PROMPT, choice=choice, epoch=3, max_tokens=200) for choice in range(3)]
    *outputs, other = harness.submit_and_pause([*requests, greedy("b", PROMPT, 60)], 12)
    harness.engine.abort("a", 2)  # of an older epoch: not this one
    harness.submit_and_pause([], 12)
    assert harness.engine.stats().running == {"a": 3, "b": 1}
    harness.engine.abort("a", 3)
    harness.engine.abort("a", 4)
    harness.engine.abort("never seen", 1)
    harness.engine.pause_output(False)
    harness.wait([*outputs, other])
    assert [output.finish for output in outputs] == [FinishReason.ABORTED] * 3 and len(other.ids) == 60


def test_a_newer_epoch_replaces_the_older(harness: Harness) -> None:
    (old,) = harness.submit_and_pause([sampled("a", PROMPT, max_tokens=100)], 5)
    new = harness.submit(sampled("a", PROMPT, epoch=2, generated=old.ids[:2], max_tokens=100))
    with pytest.raises(RequestRejected) as caught:
        harness.engine.submit(sampled("a", PROMPT, epoch=2))
    assert caught.value.error.code == "duplicate_request"
    harness.engine.pause_output(False)
    harness.wait([old, new])
    assert old.finish is FinishReason.ABORTED and new.finish is FinishReason.LENGTH
    assert len(new.ids) == 98 and new.ids[: len(old.ids) - 2] == old.ids[2:]


def test_deadline(harness: Harness) -> None:
    past = harness.submit(greedy("past", PROMPT, 50, deadline=time.monotonic() - 1))
    soon = harness.submit(greedy("soon", PROMPT, 249, deadline=time.monotonic() + 0.05))
    harness.engine.pause_output(True)
    harness.wait([past, soon])
    harness.engine.pause_output(False)
    assert (past.ids, past.finish) == ([], FinishReason.DEADLINE)
    assert soon.finish is FinishReason.DEADLINE


def test_pause_stops_steps_and_loses_nothing(harness: Harness, alone: dict[str, Collected]) -> None:
    output = harness.submit(sampled("greedy", PROMPT, **KINDS["greedy"]))
    harness.engine.pause_output(True)
    deadline = time.monotonic() + 10
    while harness.engine.stats().step_started is not None:  # until what was in flight is out
        assert time.monotonic() < deadline
    steps = harness.engine.stats().step
    late = harness.submit(sampled("plain", PROMPT, **KINDS["plain"]))
    threading.Event().wait(0.05)
    assert harness.engine.stats().step == steps and output.finish is None
    harness.engine.pause_output(False)
    harness.wait([output, late])
    assert output.ids == alone["greedy"].ids and late.ids == alone["plain"].ids


def test_overload_and_all_or_none(model: Path) -> None:
    with running(model, load_format="dummy", max_seqs=2, max_waiting=3) as started:
        started.engine.pause_output(True)
        outputs = [started.submit(greedy(str(index), PROMPT, 4)) for index in range(4)]
        with pytest.raises(EngineOverloaded):
            started.engine.submit(greedy("x", PROMPT), greedy("y", PROMPT))
        outputs.append(started.submit(greedy("4", PROMPT, 4)))
        with pytest.raises(EngineOverloaded):
            started.engine.submit(greedy("x", PROMPT))
        assert started.engine.stats().waiting == 5
        started.engine.pause_output(False)
        started.wait(outputs)
        outputs = started.run([greedy("z", PROMPT, 4)])
        started.engine.stop(drain=True)
        with pytest.raises(EngineOverloaded):
            started.engine.submit(greedy("after", PROMPT))


def test_stop_without_drain_drops_without_a_word(model: Path) -> None:
    with running(model, load_format="dummy", max_seqs=2) as started:
        outputs = started.submit_and_pause([greedy(str(index), PROMPT, 200) for index in range(5)], 3)
        started.engine.stop()
        assert all(output.finish is None for output in outputs)
        assert started.engine.stats().running == {}


def test_a_failing_step_is_fatal_and_names_its_suspects(model: Path) -> None:
    with running(model, load_format="dummy", max_seqs=2) as started:
        outputs = started.submit_and_pause([greedy(str(index), PROMPT, 200) for index in range(3)], 8)

        def broken(*_: Any) -> None:
            raise RuntimeError("the device is gone")

        started.engine.runner.decoder.forward = broken  # type: ignore[method-assign]
        started.engine.pause_output(False)
        with pytest.raises(RuntimeError, match="the device is gone"):
            started.wait(outputs)
        assert started.fatal is not None and started.fatal[1] == [("0", 1), ("1", 1)]
        with pytest.raises(EngineOverloaded):
            started.engine.submit(greedy("after", PROMPT))
        started.settle = lambda: None  # type: ignore[method-assign]


def test_priority(model: Path) -> None:
    with running(model, load_format="dummy", max_seqs=1) as started:
        started.engine.pause_output(True)
        low, high = (started.submit(greedy(name, PROMPT, 5, priority=p)) for name, p in (("low", 0), ("high", 5)))
        started.engine.pause_output(False)
        started.wait([low, high])
        order = [token.request_id for step in started.steps for token in step.outputs]
        assert order == ["high"] * 5 + ["low"] * 5


def test_stats(harness: Harness) -> None:
    engine = harness.engine
    (output,) = harness.submit_and_pause([greedy("a", PROMPT, 100)], 5)
    stats = engine.stats()
    assert stats.running == {"a": 1} and stats.batch_size == 1 and stats.slots_free == 7
    assert stats.blocks_free < stats.blocks_total and stats.step_bound >= 2.0
    engine.pause_output(False)
    harness.wait([output])
    deadline = time.monotonic() + 10
    while engine.stats().step_started is not None:
        assert time.monotonic() < deadline
    stats = engine.stats()
    assert stats.step >= 100 and stats.tokens_generated == 100 and stats.prompt_tokens == len(PROMPT)
    assert engine.check_idle() == [] and stats.waiting == stats.batch_size == 0


def test_step_bound_learns() -> None:
    bound = StepBound(minimum=2.0, first=60.0)
    assert bound.declare(0) == bound.declare(10) == 60.0
    bound.observe(0, 0.01)
    assert bound.declare(0) == 2.0 and bound.declare(10) == 60.0
    bound.observe(100, 1.01)
    assert bound.declare(1000) == pytest.approx(100.1)
    bound.observe(0, 1.0)
    assert bound.declare(0) == pytest.approx(10.0)
    for _ in range(500):
        bound.observe(0, 0.01)
    assert bound.declare(0) == 2.0


@pytest.mark.parametrize(
    ("code", "options"),
    [
        ("unsupported_dtype", {"dtype": "float16"}),
        ("unsupported_device", {"device": "nothing"}),
        ("out_of_memory", {"cpu_cache_bytes": 100}),
    ],
)
def test_what_cannot_be_loaded(model: Path, code: str, options: dict[str, Any]) -> None:
    config = EngineConfig(model, **{"load_format": "dummy", "device": "cpu", **options})
    with pytest.raises(ModelError) as caught:
        Harness(config).engine.load()
    assert caught.value.code == code


def test_steps_tell_their_time_and_who_got_a_slot(harness: Harness) -> None:
    began = time.monotonic()
    first = harness.submit(greedy("long", list(range(3, 60)), max_tokens=4))
    second = harness.submit(greedy("short", PROMPT, max_tokens=4))
    harness.wait([first, second])
    ended = time.monotonic()
    retired = [step for step in harness.steps if step.seconds is not None]
    # The long prompt takes more than one step of 32 rows, and the steps without a token tell their time, too.
    assert any(not step.tokens for step in retired)
    assert len(retired) == harness.engine.stats().step
    assert all(step.seconds > 0 for step in retired)
    assert sum(step.seconds or 0 for step in retired) <= ended - began
    slots = {slot.request_id: slot.when for step in retired for slot in step.admitted}
    assert slots.keys() == {"long", "short"}
    assert all(began <= when <= ended for when in slots.values())
