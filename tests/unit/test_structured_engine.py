"""Structured output in the engine: the text keeps to its grammar, whatever else runs, whatever is guessed, wherever it is taken up."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator
from tokenizers import Tokenizer

from services.model_worker.engine import Engine, EngineRequest, FinishReason, RequestRejected, StepOutput
from services.model_worker.token_masks import TokenMasks
from services.tokenizer.tool_choice import strict_calls
from shared.api import Structured
from shared.errors import ErrorCode
from shared.sampling import SamplingParams
from shared.structured import Matcher, Vocabulary, constraint_of, json_constraint
from shared.tool_calls import parse
from tests.structured_schemas import HARD
from tests.unit.engine_harness import Collected, Harness, RepeatedFunctions, dummy_model, running
from tests.unit.test_speculation_engine import RandomPicks

DEMO = Path(__file__).resolve().parents[2] / "models/demo"
TOKENIZER = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
PROMPT = TOKENIZER.encode("The clerk filled in the form, and wrote:\n").ids


pytestmark = pytest.mark.usefixtures("one_thread")


@contextmanager
def demo(**options: Any) -> Iterator[Harness]:
    with running(DEMO, dtype="float32", **{"speculate": False} | options) as started:
        yield started


def asked(
    name: str, constraint: str, generated: Any = (), epoch: int = 1, choice: int = 0, **params: Any
) -> EngineRequest:
    values = {"max_tokens": 64, "temperature": 0.0} | params
    return EngineRequest(
        name, choice, epoch, PROMPT, SamplingParams(**values), generated_ids=generated, constraint=constraint
    )


def text_of(output: Collected) -> str:
    return str(TOKENIZER.decode(output.ids, skip_special_tokens=True))


# Short enough to end, with a bit of everything.
SCHEMA = {
    "type": "object",
    "properties": {
        "who": {"type": "string", "minLength": 2, "maxLength": 6},
        "kind": {"enum": ["new", "newer", "größe"]},
        "lines": {
            "type": "array",
            "minItems": 1,
            "maxItems": 2,
            "items": {"type": "integer", "minimum": 1, "maximum": 99},
        },
        "sku": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]$"},
    },
    "required": ["who", "kind", "lines", "sku"],
    "additionalProperties": False,
}
CONSTRAINTS = {
    "schema": json_constraint(SCHEMA),
    "recursive": json_constraint(HARD["expression"]),
    "object": constraint_of(Structured(json_object=True)),
    "regex": constraint_of(Structured(regex="[a-f]{3}(-[0-9]{2}){2,4}")),
    "choice": constraint_of(Structured(choice=["the dark night", "the old captain", 'a "quoted" \\ one', "größer"])),
    "grammar": constraint_of(
        Structured(grammar='start: pair ("," pair)~1..3\npair: NAME "=" /[0-9]{1,3}/\nNAME: /[a-z]{1,6}/')
    ),
}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 5},
    "filtered": {"temperature": 1.2, "top_k": 30, "top_p": 0.9, "seed": 6},
    "penalised": {"temperature": 0.8, "repetition_penalty": 1.3, "frequency_penalty": 0.3, "seed": 7},
    "logprobs": {"temperature": 0.9, "logprobs": 3, "seed": 8},
}


# The schema with each kind of sampling, each constraint with two.
CASES = [(n, k) for n in CONSTRAINTS for k in KINDS if n == "schema" or k in ("greedy", "sampled")]


def conforms(name: str, text: str) -> None:
    if name == "schema":
        Draft202012Validator(SCHEMA).validate(json.loads(text))
    elif name == "recursive":
        Draft202012Validator(HARD["expression"]).validate(json.loads(text))
    elif name == "object":
        assert isinstance(json.loads(text), dict)
    elif name == "regex":
        assert re.fullmatch("[a-f]{3}(-[0-9]{2}){2,4}", text), text
    elif name == "choice":
        assert text in ("the dark night", "the old captain", 'a "quoted" \\ one', "größer"), text
    else:
        assert re.fullmatch("[a-z]{1,6}=[0-9]{1,3}(,[a-z]{1,6}=[0-9]{1,3}){1,3}", text), text


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, str], Collected]:
    """Each case by itself, no steps overlapping and nothing guessed."""
    with demo(overlap=False) as started:
        return {case: started.run([request])[0] for case, request in zip(CASES, all_requests(), strict=True)}


def all_requests() -> list[EngineRequest]:
    return [asked(f"{name} {kind}", CONSTRAINTS[name], **KINDS[kind]) for name, kind in CASES]


def test_texts_conform(alone: dict[tuple[str, str], Collected]) -> None:
    finished = 0
    for (name, _), output in alone.items():
        assert output.error is None, output.error
        if output.finish is FinishReason.STOP:
            conforms(name, text_of(output))
            finished += 1
    assert finished >= 9, "most of them end"


def free(name: str, seed: int, **params: Any) -> EngineRequest:
    return EngineRequest(
        name, 0, 1, PROMPT[: 3 + seed], SamplingParams(max_tokens=40, seed=seed, ignore_eos=True, **params)
    )


def test_a_batch_changes_nothing(alone: dict[tuple[str, str], Collected]) -> None:
    """Overlapping steps, chunked prompts, requests with masks and without, greedy and sampled, in one batch."""
    with demo(overlap=False) as started:
        expected = [
            o.ids for o in started.run([free("f1", 1), free("f2", 2, temperature=0.0), free("f3", 3, logprobs=1)])
        ]
    with demo(max_seqs=40, max_batched_tokens=48) as started:
        others = [started.submit(r) for r in (free("f1", 1), free("f2", 2, temperature=0.0), free("f3", 3, logprobs=1))]
        outputs = started.run(all_requests())
        started.wait(others)
        assert [output.ids for output in outputs] == [output.ids for output in alone.values()]
        assert [output.ids for output in others] == expected
        assert [output.finish for output in outputs] == [output.finish for output in alone.values()]


def test_preempted_ones_go_on(alone: dict[tuple[str, str], Collected]) -> None:
    with demo(max_seqs=12, num_blocks=20, max_model_len=128) as started:
        outputs = started.run(all_requests())
        assert started.engine.stats().preemptions > 0
        assert [output.ids for output in outputs] == [output.ids for output in alone.values()]


@pytest.mark.parametrize("options", [{}, {"overlap": False, "max_batched_tokens": 96}], ids=["overlap", "chunks"])
def test_guesses_change_nothing(alone: dict[tuple[str, str], Collected], options: dict[str, Any]) -> None:
    with demo(**{"speculate": True, "max_seqs": 8, "max_tree_rows": 64} | options) as started:
        RandomPicks(started)
        outputs = started.run(all_requests())
        for (name, kind), output, expected in zip(alone, outputs, alone.values(), strict=True):
            assert output.ids == expected.ids, (name, kind)
        stats = started.engine.stats().speculation
        assert stats is not None and stats.accepted[0] > 20, "guesses were accepted"


def test_replayed_steps(alone: dict[tuple[str, str], Collected]) -> None:
    """As with CUDA graphs: drafts, forward passes and the choices of steps without masks at fixed addresses."""
    # Few rows a step, since each size of a prompt's step is captured, whether it comes or not.
    with demo(speculate=True, max_seqs=4, max_tree_rows=32, max_batched_tokens=64) as started:
        RandomPicks(started, plain=0.3)
        graphs = RepeatedFunctions()
        started.engine.runner.capture_graphs(graphs, lambda fraction: None)
        outputs = started.run([*all_requests()[:8], free("f1", 1)])
        assert [output.ids for output in outputs[:8]] == [output.ids for output in list(alone.values())[:8]]
        assert {key[0] for key in graphs.replayed} >= {"draft", "decode", "prompt"}  # type: ignore[index]


@pytest.mark.parametrize("speculate", [False, True])
def test_taken_up_at_every_token(alone: dict[tuple[str, str], Collected], speculate: bool) -> None:
    """A worker dies after each token in turn; the next one replays what was committed."""
    whole = {name: alone[name, "greedy"] for name in ("schema", "recursive", "regex", "choice", "grammar")}
    with demo(speculate=speculate, max_seqs=16, max_tree_rows=64) as started:
        for name, expected in whole.items():
            requests = [
                asked(f"{name} from {done}", CONSTRAINTS[name], expected.ids[:done], epoch=2)
                for done in range(len(expected.ids) + (expected.finish is FinishReason.STOP))
            ]
            for done, output in enumerate(started.run(requests)):
                assert output.error is None, output.error
                assert expected.ids[:done] + output.ids == expected.ids, (name, done)
                assert output.finish is expected.finish, (name, done)


@pytest.mark.parametrize("speculate", [False, True])
def test_a_strict_call_is_taken_up_at_every_token(speculate: bool) -> None:
    """Free text until the model begins a call, here by what is committed already; then the call is one, whoever goes on with it."""
    parameters = {
        "type": "object",
        "properties": {"kind": {"enum": ["new", "newer"]}, "lines": {"type": "integer", "minimum": 1, "maximum": 99}},
        "required": ["kind", "lines"],
        "additionalProperties": False,
    }
    tools = [{"name": "fill_in", "parameters": parameters, "strict": True}]
    constraint = strict_calls("hermes", tools, lambda text: None, several=True)
    opening = TOKENIZER.encode("So:\n<tool_call>", add_special_tokens=False).ids
    with demo(overlap=False) as started:
        (expected,) = started.run([asked("whole", constraint, opening, epoch=2, max_tokens=64)])
    text = str(TOKENIZER.decode([*opening, *expected.ids], skip_special_tokens=True))
    _, calls = parse("hermes", text)
    assert calls and calls[0].error is None, text
    Draft202012Validator(parameters).validate(json.loads(calls[0].arguments))
    with demo(speculate=speculate, max_seqs=16, max_tree_rows=64) as started:
        requests = [
            asked(f"from {done}", constraint, [*opening, *expected.ids[:done]], epoch=3, max_tokens=64)
            for done in range(len(expected.ids))
        ]
        for done, output in enumerate(started.run(requests)):
            assert output.error is None, output.error
            assert (expected.ids[:done] + output.ids, output.finish) == (expected.ids, expected.finish), done


def test_choices_have_matchers_of_their_own() -> None:
    with demo() as started:
        outputs = started.run(
            asked("n", CONSTRAINTS["schema"], choice=choice, temperature=1.0, seed=9, max_tokens=90)
            for choice in range(4)
        )
        assert len({tuple(output.ids) for output in outputs}) == 4
        for output in outputs:
            if output.finish is FinishReason.STOP:
                conforms("schema", text_of(output))


def test_the_end_of_the_grammar_is_a_stop_without_a_token(alone: dict[tuple[str, str], Collected]) -> None:
    expected = alone["schema", "greedy"]
    assert expected.finish is FinishReason.STOP and expected.stop_token is None and text_of(expected).endswith("}")
    with demo() as started:
        exact, short = started.run(
            [
                asked("exact", CONSTRAINTS["schema"], max_tokens=len(expected.ids)),
                asked("short", CONSTRAINTS["schema"], max_tokens=len(expected.ids) - 1),
            ]
        )
        assert (exact.ids, exact.finish) == (expected.ids, FinishReason.STOP)
        assert (short.ids, short.finish) == (expected.ids[:-1], FinishReason.LENGTH)
        (nothing,) = started.run([asked("nothing", constraint_of(Structured(regex="(x)?")), max_tokens=1)])
        assert nothing.finish is FinishReason.STOP


def test_what_may_end_may_also_go_on() -> None:
    """Where the grammar may end or go on, the model's end-of-sequence id is among the choices, and never before."""
    with demo() as started:
        outputs = started.run(
            asked(f"e{seed}", constraint_of(Structured(regex="[ab]{2,40}")), temperature=1.5, seed=seed)
            for seed in range(24)
        )
        assert {output.finish for output in outputs} == {FinishReason.STOP}
        assert all(re.fullmatch("[ab]{2,40}", text_of(output)) for output in outputs)
        assert any(output.stop_token == 1 for output in outputs)


def test_logprobs_are_of_the_raw_logits() -> None:
    with demo() as started:
        outputs = started.run(
            [
                asked("c", constraint_of(Structured(regex="[0-9]{1,2}Q")), logprobs=5),
                asked("f", "", logprobs=5, max_tokens=1),
            ]
        )
        assert outputs[0].logprobs[0].top_ids == outputs[1].logprobs[0].top_ids
        assert outputs[0].ids[0] not in outputs[0].logprobs[0].top_ids


def test_text_that_spells_a_special_token() -> None:
    """It is written in ordinary tokens, with guesses and without; the token itself comes only where the grammar names it."""
    special = TOKENIZER.token_to_id("<|user|>")
    texts = constraint_of(Structured(choice=["<|user|>: a", "<|user|>: b"]))
    token = constraint_of(Structured(grammar=f'start: "a" <[{special}]> "b"'))
    for speculate in (False, True):
        with demo(speculate=speculate, max_tree_rows=64) as started:
            if speculate:
                RandomPicks(started, plain=0.0)
            text, named = started.run([asked("text", texts), asked("named", token)])
            assert text.finish is FinishReason.STOP and special not in text.ids and text_of(text)[:9] == "<|user|>:"
            assert named.finish is FinishReason.STOP and special in named.ids


class Broken:
    """A matcher whose library raises after some tokens."""

    def __init__(self, matcher: Any, fuel: int, where: str) -> None:
        self._matcher, self._fuel, self._where = matcher, fuel, where

    def __getattr__(self, name: str) -> Any:
        if name == self._where:
            self._fuel -= 1
            if self._fuel < 0:
                raise RuntimeError("the library is broken")
        return getattr(self._matcher, name)


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("where", ["consume_tokens", "unsafe_compute_mask_ptr"])
def test_a_broken_matcher_ends_its_own_request(
    alone: dict[tuple[str, str], Collected], monkeypatch: pytest.MonkeyPatch, where: str, speculate: bool
) -> None:
    compile_ = Vocabulary.compile

    def compiled(self: Vocabulary, constraint: str) -> Matcher:
        matcher = compile_(self, constraint)
        if constraint == CONSTRAINTS["object"]:
            matcher._matcher = Broken(matcher._matcher, 5, where)  # type: ignore[assignment]
        return matcher

    monkeypatch.setattr(Vocabulary, "compile", compiled)
    with demo(max_seqs=8, speculate=speculate, max_tree_rows=64) as started:
        if speculate:
            RandomPicks(started)
        requests = [asked(name, constraint) for name, constraint in CONSTRAINTS.items()]
        for name, output in zip(CONSTRAINTS, started.run(requests), strict=True):
            if name == "object":
                assert output.error is not None and output.error.code == ErrorCode.CONSTRAINT_FAILED
                assert "the library is broken" in output.error.message
            else:
                assert output.error is None and output.ids == alone[name, "greedy"].ids


def test_constraints_that_do_not_compile_here() -> None:
    with demo() as started:
        bad, stale, good = started.run(
            [
                asked("bad", "start: /(/"),
                asked("stale", CONSTRAINTS["schema"], PROMPT[-2:], epoch=2),
                asked("good", CONSTRAINTS["choice"]),
            ]
        )
        assert bad.error is not None and bad.error.code == ErrorCode.CONSTRAINT_FAILED and "regex" in bad.error.message
        assert stale.error is not None and "does not follow" in stale.error.message
        assert good.finish is FinishReason.STOP
        with pytest.raises(RequestRejected, match="ignore_eos"):
            started.submit(asked("forever", CONSTRAINTS["choice"], ignore_eos=True))


def test_a_model_without_a_tokenizer_refuses(tmp_path: Path) -> None:
    with (
        running(dummy_model(tmp_path / "dummy"), load_format="dummy") as started,
        pytest.raises(RequestRejected, match="unsupported"),
    ):
        started.submit(dataclasses.replace(asked("a", CONSTRAINTS["choice"]), prompt_ids=[3]))


def test_aborted_while_its_grammar_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_, go = Vocabulary.compile, threading.Event()

    def compiled(self: Vocabulary, constraint: str) -> Matcher:
        assert go.wait(30)
        return compile_(self, constraint)

    monkeypatch.setattr(Vocabulary, "compile", compiled)
    with demo() as started:
        aborted, replaced = (
            started.submit(asked("a", CONSTRAINTS["choice"])),
            started.submit(asked("b", CONSTRAINTS["choice"])),
        )
        assert started.engine.stats().running == {"a": 1, "b": 1} and started.engine.stats().waiting == 2
        assert started.engine.check_idle()
        started.engine.abort("a", 1)
        started.wait([aborted])
        assert aborted.finish is FinishReason.ABORTED
        newer = started.submit(asked("b", CONSTRAINTS["choice"], epoch=2))
        go.set()
        started.wait([newer])
        assert newer.finish is FinishReason.STOP
        assert replaced.ids == [] and aborted.ids == []


def test_aborted_as_its_grammar_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grammar is compiled after the abort was ordered, and before the engine's thread has taken it."""
    compile_, compiling, go = Vocabulary.compile, threading.Event(), threading.Event()
    take, looking = Engine._take_inbox, threading.Event()

    def compiled(self: Vocabulary, constraint: str) -> Matcher:
        compiling.set()
        assert go.wait(30)
        return compile_(self, constraint)

    def taken(self: Engine, output: StepOutput) -> None:
        if self._inbox and not looking.is_set():
            go.set()
            self.constraints._threads.shutdown(wait=True)  # the compilation is over
            looking.set()
        take(self, output)

    monkeypatch.setattr(Vocabulary, "compile", compiled)
    with demo() as started:
        aborted = started.submit(asked("a", CONSTRAINTS["schema"]))
        assert compiling.wait(30)
        monkeypatch.setattr(Engine, "_take_inbox", taken)
        started.engine.abort("a", 1)
        started.wait([aborted])
        assert looking.is_set() and aborted.finish is FinishReason.ABORTED and aborted.ids == []
        started.wait_for(lambda: not started.engine.stats().running)


@pytest.mark.parametrize("bans", [{"bad_words": "all"}, {"min_tokens": 8}])
@pytest.mark.parametrize("kind", [{}, {"temperature": 1.0, "min_p": 0.1}, {"temperature": 1.0, "top_k": 5}])
@pytest.mark.parametrize("speculate", [False, True])
def test_where_nothing_is_left_to_choose(
    alone: dict[tuple[str, str], Collected], bans: dict[str, Any], kind: dict[str, Any], speculate: bool
) -> None:
    """Bans that contradict the grammar end their own request, and say so; min_tokens does not outlive a grammar that has ended."""
    contradiction: dict[str, Any] = dict(bans)
    if "bad_words" in bans:  # all that can begin the text
        vocabulary = TOKENIZER.get_vocab()
        contradiction["bad_words"] = tuple((i,) for text, i in vocabulary.items() if text[0] in "QĠ" and "Q" in text)
    with demo(max_seqs=8, speculate=speculate, max_tree_rows=64) as started:
        if speculate:
            RandomPicks(started)
        bad, *good = started.run(
            [
                asked("bad", constraint_of(Structured(regex="Q")), **contradiction, **kind),
                *(asked(name, CONSTRAINTS[name]) for name in ("object", "choice")),
            ]
        )
        assert [output.ids for output in good] == [alone[name, "greedy"].ids for name in ("object", "choice")]
        if "bad_words" in bans:
            assert bad.error is not None and bad.error.code == ErrorCode.CONSTRAINT_FAILED
            assert "bad_words" in bad.error.message
        else:
            assert bad.error is None and bad.finish is FinishReason.STOP and text_of(bad) == "Q"


@pytest.mark.parametrize("wrong", ["late", "siblings"])
def test_these_tests_can_fail(
    alone: dict[tuple[str, str], Collected], monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """Masks of the step before, or one and the same mask for all nodes of a tree, are noticed."""
    if wrong == "late":
        fill = TokenMasks._fill_single
        monkeypatch.setattr(TokenMasks, "_fill_single", lambda self, matchers: fill(self, matchers[:1]))
    else:
        walk = TokenMasks._walk
        monkeypatch.setattr(TokenMasks, "_walk", lambda self, tree, *rest: [walk(self, tree, *rest)[0]] * tree.size)
    with demo(max_seqs=8, speculate=wrong == "siblings", max_tree_rows=64) as started:
        if wrong == "siblings":
            RandomPicks(started, plain=0.0)
        outputs = started.run([asked(name, constraint) for name, constraint in CONSTRAINTS.items()])
        assert [output.ids for output in outputs] != [alone[name, "greedy"].ids for name in CONSTRAINTS]


@pytest.mark.timeout(10)  # each of them was looked for in each word: a minute
def test_an_embedding_far_larger_than_the_vocabulary_is_no_reason_to_wait() -> None:
    special = {5, 31, 32, *range(8000, 200_000)}
    masks = TokenMasks(1, 200_000, torch.device("cpu"), special)
    marked = np.zeros(6250, np.uint32)
    marked[masks._special_words] = masks._special_bits.view(np.uint32)
    bits = (marked[:, None] >> np.arange(32, dtype=np.uint32)) & 1
    assert set(np.flatnonzero(bits)) == special
    masks.close()
