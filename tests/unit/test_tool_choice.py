"""A demanded call: the text that the constraint allows is a valid call in the model's own format, whatever the model likes."""

from __future__ import annotations

import functools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.tokenizer.admission import Admission, Admitted, Refused
from services.tokenizer.encoder import Encoder
from services.tokenizer.model_files import ModelFiles, load_model_files
from services.tokenizer.tool_choice import forced_call, strict_calls, tools_of
from shared.errors import ErrorCode, GorgonError
from shared.structured import Vocabulary
from shared.tool_calls import FORMATS, MARKERS, parse
from tests.unit.test_tool_format import byte_level, with_marks

DEMO = Path(__file__).parents[2] / "models/demo"
MESSAGES = [{"role": "user", "content": "Weather?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Zürich", 'New "York"']}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather.get", "parameters": SCHEMA}},
    {"name": "time", "description": "no parameters"},
]


@functools.cache
def files() -> ModelFiles:
    return load_model_files(DEMO)


class Model:
    """A byte-level tokenizer, whose marks of calls are text or tokens of their own, and the library's view of it."""

    def __init__(self, marked: bool) -> None:
        self.tokenizer = with_marks(byte_level()) if marked else byte_level()
        self.tokenizer.add_special_tokens(["<eos>"])
        self.encoder = Encoder(self.tokenizer)
        self.eos = self.tokenizer.token_to_id("<eos>")
        self.vocabulary = Vocabulary(self.encoder.to_json(), self.tokenizer.get_vocab_size(), [self.eos])

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def allows(self, constraint: str, ids: list[int]) -> bool:
        """Whether the constraint allows the text, and its end there."""
        matcher = self.vocabulary.compile(constraint)
        return matcher.advance(ids) and (matcher.complete or bool(matcher.mask()[self.eos // 8] >> self.eos % 8 & 1))

    def walk(
        self, constraint: str, seed: int, begin: str = "", most: int = 500, ends_early: bool = False
    ) -> str | None:
        """A text that the constraint allows, from `begin` on chosen token by token at random (`ends_early`: it ends as soon as it
        may); None if it has not ended then."""
        chance = random.Random(seed)
        matcher, ids = self.vocabulary.compile(constraint), self.ids(begin)
        assert matcher.advance(ids), matcher.error
        while not matcher.complete and len(ids) < most and ids[-1:] != [self.eos]:
            mask = matcher.mask()
            allowed = [i for i in range(len(mask) * 8) if mask[i // 8] >> (i % 8) & 1]
            token = self.eos if ends_early and self.eos in allowed else chance.choice(allowed)
            if token in self.vocabulary.special_ids and (ordinary := matcher.mistaken(token)) is not None:
                token = ordinary
            assert matcher.advance([token]), matcher.error
            ids.append(token)
        if not matcher.complete and ids[-1] != self.eos:
            return None
        return self.tokenizer.decode(ids, skip_special_tokens=False).replace("<eos>", "")


@pytest.mark.parametrize("marked", [False, True], ids=["marks are text", "marks are tokens"])
@pytest.mark.parametrize("format", FORMATS)
def test_every_text_that_is_allowed_is_a_call(format: str, marked: bool):
    model = Model(marked)
    names = set()
    for seed in range(8):
        for name in ("weather.get", "time", None):
            constraint = forced_call(format, TOOLS, name, model.encoder.added_id, several=name is None)
            text = model.walk(constraint, seed)
            assert text is not None
            assert any(marker in text for marker in MARKERS[format][:1]) or format == "llama3"
            content, calls = parse(format, text)
            assert content == ""
            assert calls and all(call.error is None for call in calls)
            for call in calls:
                names.add(call.name)
                arguments = json.loads(call.arguments)
                assert call.name == (name or call.name)
                if call.name == "weather.get":
                    assert arguments["city"] in ("Zürich", 'New "York"') and 1 <= arguments["days"] <= 9
                else:
                    assert arguments == {}
    assert names == {"weather.get", "time"}


STRICT = [
    {"type": "function", "function": {"name": "weather.get", "parameters": SCHEMA, "strict": True}},
    {"name": "time", "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}}},
]


CALLS = {
    "hermes": '<tool_call>\n{"name": "weather.get", "arguments": %s}\n</tool_call>',
    "llama3": '{"name": "weather.get", "parameters": %s}',
    "mistral": '[TOOL_CALLS][{"name": "weather.get", "arguments": %s}]',
    "mistral v11": "[TOOL_CALLS]weather.get[ARGS]%s",
}


@pytest.mark.parametrize("marked", [False, True], ids=["marks are text", "marks are tokens"])
@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_text_stays_free_and_strict_calls_keep_to_their_schema(format: str, several: bool, marked: bool):
    model = Model(marked)
    constraint = strict_calls(format, STRICT, model.encoder.added_id, several)

    def allowed(text: str) -> bool:
        return model.allows(constraint, model.ids(text))

    notation = CALLS["mistral v11" if format == "mistral" and marked else format]
    good, wrong = '{"city": "Zürich", "days": 3}', '{"city": "Bern", "days": 3}'
    text = 'Ümlaut, {"x": 1}\n{"x": {"name": 2}}\n[1] <tool> {"name": 5} is JSON.'
    assert allowed("") and allowed(text) and allowed("x\n\n\ny")
    assert allowed(notation % good) and allowed(f"Let me see.\n{notation % good}")
    assert not allowed(notation % wrong) and not allowed(f"Let me see.\n{notation % wrong}")
    assert not allowed((notation % good)[:-3])
    other = notation.replace("weather.get", "time")
    assert allowed(other % '{"zone": 5, "more": [true]}'), "it is not strict"
    assert not allowed(notation.replace("weather.get", "unknown") % good)
    second = {
        "hermes": f"\n{notation % good}",
        "llama3": f"; {notation % good}",
        "mistral": notation % good if marked else f", {(notation % good).removeprefix('[TOOL_CALLS][')}",
    }[format]
    first = (notation % good).removesuffix("]") if format == "mistral" and not marked else notation % good
    assert allowed(first + second) is several
    if marked and format != "llama3":
        # The mark spelled by ordinary tokens looks the same to whoever reads the text.
        spelled = [model.tokenizer.token_to_id(char) for char in MARKERS[format][0]]
        assert not model.allows(constraint, spelled)


@pytest.mark.parametrize("marked", [False, True], ids=["marks are text", "marks are tokens"])
@pytest.mark.parametrize("format", FORMATS)
def test_whatever_text_is_allowed_its_strict_calls_are_valid(format: str, marked: bool):
    """At random, but led to calls: what stands at the beginning is one's."""
    model = Model(marked)
    constraint = strict_calls(format, STRICT, model.encoder.added_id, True)
    opening = {"hermes": "<tool_call>", "llama3": '{"name": ', "mistral": "[TOOL_CALLS]"}[format]
    found = 0
    for seed in range(30):
        text = model.walk(constraint, seed, f"So:\n{opening}", 400, ends_early=True)
        if text is None:
            continue
        content, calls = parse(format, text)
        assert content == "So:" and calls, text
        for call in calls:
            assert call.error is None
            if call.name == "weather.get":
                found += 1
                arguments = json.loads(call.arguments)
                assert arguments["city"] in ("Zürich", 'New "York"') and 1 <= arguments["days"] <= 9
    assert found > 3


def test_only_strict_tools_cost_a_constraint():
    for tools, choice, constrained in (
        (STRICT, "auto", True),
        (STRICT, None, True),
        (TOOLS, "auto", False),
        (STRICT, "none", False),
    ):
        outcome = admit({"tools": tools, "tool_choice": choice})
        assert isinstance(outcome, Admitted), outcome
        assert bool(outcome.request.constraint) is constrained
    for body, says in ((dict(ignore_eos=True), "ignore_eos"), (dict(num_beams=2), "num_beams")):
        refused = admit({"tools": STRICT} | body)
        assert isinstance(refused, Refused) and refused.error.code == ErrorCode.INVALID_REQUEST
        assert says in refused.error.message and "strict" in refused.error.message
    refused = admit({"tools": STRICT}, "")
    assert isinstance(refused, Refused) and refused.error.code == ErrorCode.UNSUPPORTED


def admission(tool_format: str = "hermes") -> Admission:
    return Admission(replace(files(), tool_format=tool_format), "demo", 64)


def admit(body: dict[str, Any], tool_format: str = "hermes") -> Admitted | Refused:
    return admission(tool_format).admit(json.dumps({"messages": MESSAGES} | body).encode(), "inbox", None)


def test_a_demanded_call_becomes_a_constraint():
    for choice in ("required", {"name": "time"}):
        outcome = admit({"tools": TOOLS, "tool_choice": choice})
        assert isinstance(outcome, Admitted), outcome
        assert "<tool_call>" in outcome.request.constraint
        assert outcome.request.tool_format == "hermes"
    outcome = admit({"tools": TOOLS})
    assert isinstance(outcome, Admitted)
    assert outcome.request.constraint == ""


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        ({"tools": TOOLS, "tool_choice": {"name": "nothing"}}, "invalid_request", "nothing"),
        ({"tools": [], "tool_choice": "required"}, "invalid_request", "no 'tools'"),
        ({"tool_choice": "required"}, "invalid_request", "tools"),
        ({"tools": [{"name": 5}], "tool_choice": "required"}, "invalid_request", "tools.0"),
        ({"tools": [{"name": "f", "parameters": {"type": "array"}}], "tool_choice": "required"}, "invalid_request", "tools.0"),
        ({"tools": TOOLS, "tool_choice": "required", "ignore_eos": True}, "invalid_request", "ignore_eos"),
        ({"tools": TOOLS, "tool_choice": "required", "structured": {"regex": "a"}}, "invalid_request", "structured"),
        ({"tools": TOOLS, "tool_choice": {"name": "time", "type": "function"}}, "invalid_request", "tool_choice"),
    ],
)  # fmt: skip
def test_what_cannot_be_demanded_is_refused(body: dict[str, Any], code: str, says: str):
    outcome = admit(body)
    assert isinstance(outcome, Refused)
    assert outcome.error.code == code
    assert says in outcome.error.message


def test_a_model_of_no_known_format_cannot_be_made_to_call():
    outcome = admit({"tools": TOOLS, "tool_choice": "required"}, "")
    assert isinstance(outcome, Refused)
    assert outcome.error.code == ErrorCode.UNSUPPORTED


def test_tools_in_both_forms():
    assert [tool.name for tool in tools_of(TOOLS)] == ["weather.get", "time"]
    assert tools_of(TOOLS)[1].parameters["additionalProperties"] is False
    with pytest.raises(GorgonError):
        tools_of([{"type": "function", "function": "f"}])
