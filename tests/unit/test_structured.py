"""Constraints: what a request may demand, what is refused, and that a hostile one costs its limits and no more."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from shared.api import Structured, parse_request
from shared.errors import GorgonError
from shared.structured import (
    MAX_CONSTRAINT_BYTES,
    ConstraintError,
    Matcher,
    Vocabulary,
    constraint_of,
    json_constraint,
    tool_constraint,
)
from tests.structured_schemas import HARD, REFUSED, bfcl_schemas

PATH = Path(__file__).resolve().parents[2] / "models/demo/tokenizer.json"
TOKENIZER = Tokenizer.from_file(str(PATH))
EOS = 1


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(PATH.read_text(), 4096, [EOS])


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False).ids)


def allowed(matcher: Matcher) -> set[int]:
    bits = int.from_bytes(matcher.mask(), "little")
    return {token for token in range(4096) if bits >> token & 1}


def takes(vocabulary: Vocabulary, constraint: str, text: str) -> bool:
    """The whole text, and that it may end there."""
    matcher = vocabulary.compile(constraint)
    return all(matcher.advance([token]) for token in ids(text)) and EOS in allowed(matcher)


@pytest.mark.parametrize(
    ("structured", "good", "bad"),
    [
        ({"json_schema": {"type": "integer", "minimum": 3}}, ["3", "12345"], ["2", "-5", "3.5", '"3"']),
        ({"json_object": True}, ["{}", '{"a": [1, {"b": null}]}', '{\n  "x": "y"\n}'], ["[]", "1", '{"a": 01}']),
        ({"regex": "a+(b|ü){2}"}, ["aabb", "aüb"], ["bb", "aab", "aabbb"]),
        ({"grammar": 'start: "x" NUM\nNUM: /[0-9]+/'}, ["x1", "x123"], ["x", "1"]),
        ({"choice": ["ab", "abc", 'q"\\', "zwei\nZeilen"]}, ["ab", "abc", 'q"\\', "zwei\nZeilen"], ["a", "abcd", 'q"']),
    ],
)
def test_each_kind(vocabulary: Vocabulary, structured: dict[str, Any], good: list[str], bad: list[str]) -> None:
    constraint = constraint_of(Structured(**structured))
    assert constraint == constraint_of(Structured(**structured)), "the same in every process"
    for text in good:
        assert takes(vocabulary, constraint, text), text
    for text in bad:
        assert not takes(vocabulary, constraint, text), text


def test_runs_of_blanks_end(vocabulary: Vocabulary) -> None:
    matcher = vocabulary.compile(json_constraint({"type": "array"}))
    assert matcher.advance(ids("["))
    blank = ids("x\n")[-1]
    count = 0
    while blank in allowed(matcher) and matcher.advance([blank]):
        count += 1
    assert count == 1


@pytest.mark.parametrize("name", HARD)
def test_hard_schemas_compile(vocabulary: Vocabulary, name: str) -> None:
    assert allowed(vocabulary.compile(json_constraint(HARD[name])))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused(vocabulary: Vocabulary, name: str) -> None:
    for schema in (REFUSED[name], REFUSED[name] | {"x-guidance": {"lenient": True}}):
        with pytest.raises(ConstraintError) as raised:
            vocabulary.compile(json_constraint(schema))
        assert 5 < len(str(raised.value)) <= 400 and "\n" not in str(raised.value)


class Panic(BaseException):
    """As pyo3's PanicException, which is no Exception."""


def test_a_panic_of_the_library_is_a_refusal(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    def panics(*_: Any, **__: Any) -> None:
        raise Panic("index out of bounds")

    monkeypatch.setattr("shared.structured.LLMatcher", panics)
    with pytest.raises(ConstraintError, match="Panic: index out of bounds"):
        vocabulary.compile("start: /never compiled before/")


def test_function_parameters_compile(vocabulary: Vocabulary) -> None:
    schemas = bfcl_schemas(100)
    if not schemas:
        pytest.skip("../shared/data/prompts is not here")
    for schema in schemas:
        vocabulary.compile(json_constraint(schema))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({}, "exactly one"),
        ({"regex": "a", "choice": ["b"]}, "exactly one"),
        ({"json_object": False}, "json_object"),
        ({"choice": []}, "choice"),
        ({"choice": [""]}, "choice"),
        ({"regex": ""}, "regex"),
        ({"xml": "a"}, "xml"),
        ({"json_schema": True}, "json_schema"),
    ],
)
def test_malformed_fields_are_refused(wrong: dict[str, Any], reason: str) -> None:
    with pytest.raises(GorgonError, match=reason):
        parse_request({"prompt": "a", "structured": wrong})


def test_it_contradicts_ignore_eos() -> None:
    with pytest.raises(GorgonError, match="ignore_eos"):
        parse_request({"prompt": "a", "structured": {"json_object": True}, "ignore_eos": True})


def test_too_large() -> None:
    with pytest.raises(ConstraintError, match="bytes"):
        constraint_of(Structured(regex="a" * MAX_CONSTRAINT_BYTES))
    with pytest.raises(ConstraintError, match="bytes"):
        json_constraint({"enum": [f"value {index}" for index in range(10_000)]})


def _doubled(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema, "b": schema}, "required": ["a"]}
    return schema


HOSTILE: dict[str, dict[str, Any]] = {
    "nested repetitions": {"regex": "((a{1,100}){1,100}){1,100}"},
    "a huge repetition": {"regex": "(ab|cd|ef){1,100000}"},
    "exponential automaton": {"regex": ".*(a|b).{60}[xyz].{60}"},
    "unicode classes": {"regex": r"(\w+\s){1,500}"},
    "many alternatives": {"grammar": "start: " + " | ".join(f'"x{i}"' for i in range(6000))},
    "ambiguity": {"grammar": 'start: s\ns: s s s | "a" | ""'},
    "a rule of itself": {"grammar": "start: a\na: b\nb: a"},
    "many fields": {
        "json_schema": {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(2200)}}
    },
    "choices of patterns": {
        "json_schema": {
            "allOf": [
                {
                    "anyOf": [
                        {"type": "string", "pattern": f"^{chr(97 + i)}"},
                        {"type": "string", "pattern": f"{chr(98 + i)}$"},
                    ]
                }
                for i in range(18)
            ]
        }
    },
    "doubled levels": {"json_schema": _doubled(9)},
    "huge multiple": {"json_schema": {"type": "integer", "multipleOf": 10**9 + 7}},
    "huge array": {"json_schema": {"type": "array", "items": {"type": "integer"}, "minItems": 10**8}},
    "deep": {"json_schema": json.loads('{"items":' * 500 + "{}" + "}" * 500)},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_constraint_is_bounded(vocabulary: Vocabulary, name: str) -> None:
    """It compiles or is refused, and so does its first mask; in well below a second on a machine with nothing else to do."""
    start = time.process_time()
    try:
        matcher = vocabulary.compile(constraint_of(Structured(**HOSTILE[name])))
        matcher.mask()
    except ConstraintError as error:
        assert str(error)
    assert time.process_time() - start < 5


def test_a_matcher_forks_and_goes_back(vocabulary: Vocabulary) -> None:
    matcher = vocabulary.compile(json_constraint({"enum": ["abc", "abd"]}))
    assert matcher.advance(ids('"ab'))
    before = allowed(matcher)
    other = matcher.fork()
    assert matcher.advance(ids("x" + "c")[-1:]) and not matcher.complete
    assert allowed(other) == before
    assert matcher.rollback(1) and allowed(matcher) == before
    assert matcher.advance(ids('xd"')[-2:]) and matcher.complete and allowed(matcher) == {EOS}
    assert not other.advance(ids("z")) and other.error
    assert other.mask() == b"" and not other.rollback(1), "an error is for ever"


def test_tool_calls(vocabulary: Vocabulary) -> None:
    weather = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
    before = '<tool_call>\n{"name": "%s", "arguments": '
    alternatives = [
        (before % "weather", weather, "}\n</tool_call>"),
        (before % "stop", {"type": "object"}, "}\n</tool_call>"),
    ]
    one = tool_constraint(alternatives)
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    other = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
    assert takes(vocabulary, one, call) and takes(vocabulary, one, other)
    assert not takes(vocabulary, one, call.replace("Oslo", "Bonn"))
    assert not takes(vocabulary, one, call + "\n" + other)
    assert takes(vocabulary, tool_constraint(alternatives, separator="\n"), call + "\n" + other)


def test_special_tokens_of_tool_calls(vocabulary: Vocabulary) -> None:
    """Only an id stands for a special token; characters that read like it do not."""
    special = TOKENIZER.token_to_id("<|user|>")
    by_id = vocabulary.compile(tool_constraint([([special, "f"], {"type": "integer", "maximum": 9, "minimum": 0}, "")]))
    assert allowed(by_id) == {special} and by_id.mistaken(special) is None
    assert by_id.advance([special]) and by_id.advance(ids("f")) and by_id.advance(ids("7")) and by_id.complete
    by_text = vocabulary.compile(tool_constraint([("<|user|>f", {"type": "integer"}, "")]))
    assert not by_text.fork().advance([special])
    assert by_text.mistaken(special) == ids("x<")[-1], "the library proposes it all the same"
