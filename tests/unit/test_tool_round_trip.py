"""What a model's own template writes as a call is read back as that call: real functions, in the formats of real models."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from services.tokenizer.chat_template import ChatTemplate
from services.tokenizer.tool_format import tool_format_of
from shared.tool_calls import parse
from tests.structured_schemas import bfcl_tools

TEMPLATES = Path(__file__).parents[3] / "shared/data/chat_templates"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
USER = {"role": "user", "content": "Do it."}
# (template, what ends the assistant's turn, several calls in one turn)
MODELS = [
    ("Qwen-Qwen2.5-7B-Instruct", "<|im_end|>", True),
    ("Qwen-Qwen3-0.6B", "<|im_end|>", True),
    ("meta-llama-Llama-3.1-8B-Instruct", "<|eot_id|>", False),
    ("mistralai-Mistral-Nemo-Instruct-2407", "</s>", True),
]
TEXTS = ["Zürich", 'a "quoted" \\ thing', "two\nlines", "</tool_call>", "[TOOL_CALLS]", "{}", "😀", ""]


def value_of(schema: Any, chance: random.Random) -> Any:
    if "enum" in schema:
        return chance.choice(schema["enum"])
    match schema.get("type"):
        case "object":
            return {name: value_of(inner, chance) for name, inner in schema.get("properties", {}).items()}
        case "array":
            return [value_of(schema.get("items", {}), chance) for _ in range(chance.randrange(3))]
        case "integer":
            return chance.randrange(-9, 99)
        case "number":
            return chance.choice([0.5, -3, 1e20, 2.25])
        case "boolean":
            return chance.random() < 0.5
        case _:
            return chance.choice(TEXTS)


def turn(template: ChatTemplate, tools: list[dict], message: dict, end: str) -> str:
    """What the model would have written for this message."""
    before = template.render([USER], tools)
    after = template.render([USER, message], tools, {"add_generation_prompt": False})
    if message["content"] == "" and not after.startswith(before):  # the template closes the line of the role itself
        before = before.rstrip("\n")
    assert after.startswith(before)
    return after[len(before) :].rstrip("\n").removesuffix(end)


@pytest.mark.parametrize(("name", "end", "several"), MODELS, ids=[name for name, _, _ in MODELS])
def test_calls_come_back(name: str, end: str, several: bool):
    path = TEMPLATES / f"{name}.jinja"
    tools = bfcl_tools()
    if not path.exists() or not tools:
        pytest.skip("../shared/data is not here")
    source = path.read_text(encoding="utf-8")
    template, format = ChatTemplate({"default": source}, SPECIAL), tool_format_of([source], [])
    chance = random.Random(7)
    for index in range(len(tools)):
        wanted = [tools[(index + i) % len(tools)]["function"] for i in range(chance.randint(1, 3) if several else 1)]
        expected = [(function["name"], value_of(function["parameters"], chance)) for function in wanted]
        calls = [
            {"id": f"abcdefg{i:02}", "type": "function", "function": {"name": function, "arguments": arguments}}
            for i, (function, arguments) in enumerate(expected)
        ]
        text = turn(template, tools[index : index + 1], {"role": "assistant", "content": "", "tool_calls": calls}, end)
        content, found = parse(format, text)
        assert [(call.name, json.loads(call.arguments), call.error) for call in found] == [
            (function, arguments, None) for function, arguments in expected
        ], text
        assert content.replace("<think>", "").replace("</think>", "").strip() == ""
