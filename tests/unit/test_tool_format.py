"""Tool calls on their way through tokenizer and detokenizer: which format a model has, what its marks look like in the text, what the
terminal event says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from services.detokenizer.answer import Answer
from services.detokenizer.core import PartitionCore
from services.detokenizer.decoding import decoder_for
from services.detokenizer.snapshot import unpack
from services.tokenizer.admission import Admission, Admitted, Refused
from services.tokenizer.model_files import load_model_files
from services.tokenizer.tool_format import tool_format_of
from shared import messages as m
from shared.codec import pack_ids
from shared.tool_calls import MARKERS, call_id

ROOT = Path(__file__).parents[2]
TEMPLATES = ROOT.parent / "shared/data/chat_templates"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


# ---------------------------------------------------------------- which format


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("meta-llama-Llama-3.1-8B-Instruct", "llama3"),
        ("Qwen-Qwen2.5-7B-Instruct", "hermes"),
        ("Qwen-Qwen3-0.6B", "hermes"),
        ("mistralai-Mistral-Nemo-Instruct-2407", "mistral"),
        ("HuggingFaceTB-SmolLM3-3B", ""),
        ("google-gemma-2-2b-it", ""),
        ("openai-gpt-oss-120b", ""),
        ("deepseek-ai-DeepSeek-V3.1", ""),
        ("microsoft-Phi-3.5-mini-instruct", ""),
    ],
)
def test_the_format_of_well_known_models(name: str, format: str):
    path = TEMPLATES / f"{name}.jinja"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    assert tool_format_of([path.read_text(encoding="utf-8")], []) == format


def test_tokens_tell_when_the_template_does_not():
    assert tool_format_of([], ["<s>", "<|python_tag|>"]) == "llama3"
    assert tool_format_of(["{{ messages }}"], ["<tool_call>"]) == "hermes"
    assert tool_format_of(["{{ messages }}"], ["[TOOL_CALLS]"]) == "mistral"
    assert tool_format_of(["<tool_call>\n<function=f>\n<parameter=x>"], ["<tool_call>"]) == ""
    assert tool_format_of([], []) == ""


def admit(admission: Admission, **body: Any) -> Admitted | Refused:
    return admission.admit(json.dumps(body).encode(), "inbox", None)


def test_only_requests_with_tools_are_read_for_calls():
    files = load_model_files(ROOT / "models/demo")
    assert files.tool_format == ""
    messages = [{"role": "user", "content": "Hello"}]
    admission = Admission(replace(files, tool_format="hermes"), "demo", 256)

    def format_of(**body: Any) -> str:
        admitted = admit(admission, messages=messages, **body)
        assert isinstance(admitted, Admitted), admitted
        return admitted.request.tool_format

    assert format_of(tools=[TOOL]) == "hermes"
    assert format_of(tools=[TOOL], tool_choice="auto") == "hermes"
    assert format_of(tools=[TOOL], tool_choice="none") == ""
    assert format_of(tools=[TOOL], parallel_tool_calls=False) == "hermes-single"
    assert format_of(tools=[]) == ""
    assert format_of() == ""
    for wrong in (
        dict(tool_choice="auto"),
        dict(tools=[TOOL], tool_choice="sometimes"),
        dict(tools=[TOOL], tool_choice=1),
    ):
        refused = admit(admission, messages=messages, **wrong)
        assert isinstance(refused, Refused)
        assert "tool_choice" in refused.error.message


def test_tool_choice_none_hides_the_tools_from_the_template():
    files = load_model_files(ROOT / "models/demo")
    from services.tokenizer.chat_template import ChatTemplate

    template = ChatTemplate(
        {"default": "{{ messages[0].content }}{% if tools %}{{ tools | tojson * 9 }}{% endif %}"}, {}
    )
    admission = Admission(replace(files, template=template), "demo", 256)
    messages = [{"role": "user", "content": "Hello"}]

    def prompt(**body: Any) -> bytes:
        admitted = admit(admission, messages=messages, **body)
        assert isinstance(admitted, Admitted), admitted
        return admitted.request.prompt_ids

    assert prompt(tools=[TOOL], tool_choice="none") == prompt()
    assert len(prompt(tools=[TOOL])) > len(prompt())


# ---------------------------------------------------------------- marks in the text

SPECIAL = ["<eos>", *(marker for markers in MARKERS.values() for marker in markers)]


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback() -> Tokenizer:
    vocabulary = {"<unk>": 0, "▁": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    for char in map(chr, range(33, 127)):
        vocabulary[char] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    replace_blanks = decoders.Replace("▁", " ")
    tokenizer.decoder = decoders.Sequence(
        [replace_blanks, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = byte_fallback()
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    return tokenizer


def with_marks(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return tokenizer


CALL = '<tool_call>{"name": "f", "arguments": {"x": "y z"}}</tool_call>'


@pytest.mark.parametrize("make", [byte_level, byte_fallback, metaspace])
def test_marks_are_shown_to_those_who_look_for_calls(make):
    tokenizer = with_marks(make())
    ids = tokenizer.encode(f"Hm. {CALL} Ok.<eos>").ids
    assert tokenizer.token_to_id("<tool_call>") in ids
    new_decoding = decoder_for(tokenizer)
    plain = tokenizer.decode(ids, skip_special_tokens=True)
    assert plain == f"Hm. {CALL} Ok.".replace("<tool_call>", "").replace("</tool_call>", "")
    for shown, expected in (((), plain), (MARKERS["mistral"], plain), (MARKERS["hermes"], f"Hm. {CALL} Ok.")):
        decoding = new_decoding(shown)
        assert decoding.feed(ids) + decoding.flush() == expected
        by_token = new_decoding(shown)
        assert "".join(by_token.feed([token]) for token in ids) + by_token.flush() == expected


# ---------------------------------------------------------------- the terminal event


class Core:
    def __init__(self, format: str, stream: bool = True) -> None:
        self.tokenizer = with_marks(byte_level())
        self.core = PartitionCore(decoder_for(self.tokenizer))
        self.apply(m.Open("t.r", m.ReplyTo("x", stream=stream), 1, 5, 99, choices=2, tool_format=format))

    def apply(self, entry: m.LogEntry) -> None:
        self.core.apply(self.core.seq + 1, 1.0, entry)

    def say(self, choice: int, text: str, finish: str) -> None:
        ids = self.tokenizer.encode(text + ("<eos>" if finish == "stop" else "")).ids
        stop = ids[-1] if finish == "stop" else None
        self.apply(m.StepTokens("w", 1, (m.Tokens("t.r", choice, 1, 0, pack_ids(ids), finish, stop),)))

    def ends(self, answer: Answer | None = None) -> list[dict[str, Any]]:
        (event,) = [e for e in (answer or self.core.answers["t.r"]).replay({}) if e["event"] == "finished"]
        return event["choices"]


def test_the_end_names_the_calls():
    core = Core("hermes")
    core.say(0, f"Let me look.\n{CALL}", "stop")
    core.say(1, "No need.", "stop")
    first, second = core.ends()
    assert first["finish_reason"] == "tool_calls"
    assert first["content"] == "Let me look."
    assert first["tool_calls"] == [{"id": call_id("r", 0, 0), "name": "f", "arguments": '{"x": "y z"}'}]
    assert first["chars"] == len(f"Let me look.\n{CALL}")
    assert second["finish_reason"] == "stop"
    assert "tool_calls" not in second and "content" not in second
    restored = unpack(core.core.snapshot(), decoder_for(core.tokenizer)).answers["t.r"]
    assert core.ends(restored) == [first, second]


def test_a_call_that_was_cut_off_is_marked():
    core = Core("hermes")
    core.say(0, CALL + CALL[:50], "length")
    core.say(1, CALL[:50], "length")
    first, second = core.ends()
    assert [("error" in call) for call in first["tool_calls"]] == [False, True]
    assert first["finish_reason"] == second["finish_reason"] == "length"
    assert [("error" in call) for call in second["tool_calls"]] == [True]


def test_without_tools_text_is_text():
    core = Core("")
    core.say(0, CALL, "stop")
    core.say(1, CALL, "stop")
    for end in core.ends():
        assert end["finish_reason"] == "stop"
        assert "tool_calls" not in end
