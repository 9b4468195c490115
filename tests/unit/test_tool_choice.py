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
from services.tokenizer.tool_choice import forced_call, tools_of
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


def walk(vocabulary: Vocabulary, constraint: str, decode: Any, seed: int) -> str:
    """A text that the constraint allows, chosen token by token at random."""
    chance = random.Random(seed)
    matcher, ids = vocabulary.compile(constraint), []
    while not matcher.complete and len(ids) < 500:
        mask = matcher.mask()
        allowed = [i for i in range(len(mask) * 8) if mask[i // 8] >> (i % 8) & 1]
        token = chance.choice(allowed)
        if token in vocabulary.special_ids and (ordinary := matcher.mistaken(token)) is not None:
            token = ordinary
        assert matcher.advance([token]), matcher.error
        ids.append(token)
    assert matcher.complete
    return decode(ids)


@pytest.mark.parametrize("marked", [False, True], ids=["marks are text", "marks are tokens"])
@pytest.mark.parametrize("format", FORMATS)
def test_every_text_that_is_allowed_is_a_call(format: str, marked: bool):
    tokenizer = with_marks(byte_level())
    if not marked:
        tokenizer = byte_level()
        tokenizer.add_special_tokens(["<eos>"])
    encoder = Encoder(tokenizer)
    eos = tokenizer.token_to_id("<eos>")
    vocabulary = Vocabulary(encoder.to_json(), tokenizer.get_vocab_size(), [eos])
    names = set()
    for seed in range(8):
        for name in ("weather.get", "time", None):
            constraint = forced_call(format, TOOLS, name, encoder.added_id, several=name is None)
            text = walk(vocabulary, constraint, lambda ids: tokenizer.decode(ids, skip_special_tokens=False), seed)
            text = text.replace("<eos>", "")
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
