"""The templates of well-known models render as transformers renders them."""

from pathlib import Path

import pytest

from services.tokenizer.chat_template import ChatTemplate, TemplateBroken
from shared.errors import ErrorCode, GorgonError

TEMPLATES = Path(__file__).parents[3] / "shared/data/chat_templates"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather <now> & 'later' in Zürich",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "a city"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
        "return": {"type": "string"},
    },
}
USER = {"role": "user", "content": "  Hello, <b>wörld</b> & 'you'\n"}
MULTI_TURN = [
    USER,
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHi."},
    {"role": "user", "content": "And {{ now }}?"},
]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
CASES: dict[str, tuple[list[dict], list[dict] | None, dict]] = {
    "one turn": ([USER], None, {}),
    "multi-turn": (MULTI_TURN, None, {}),
    "system": ([{"role": "system", "content": "Be brief."}, *MULTI_TURN], None, {}),
    "no generation prompt": (MULTI_TURN, None, {"add_generation_prompt": False}),
    "reasoning": ([USER, {"role": "assistant", "content": "Hi.", "reasoning": "hm"}, USER], None, {}),
    "nulls": ([USER, {"role": "assistant", "content": "Hi.", "tool_calls": None}, USER], None, {}),
    "tools": ([{"role": "system", "content": "Be brief."}, USER], [TOOL], {}),
    "tool calls": (
        [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]},
         {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": "sun"}],
        [TOOL], {},
    ),
    "variables": ([USER], None, {"enable_thinking": False, "thinking": True, "bos_token": "<S>", "reasoning_effort": "low"}),
}  # fmt: skip


def templates() -> list[Path]:
    return sorted(TEMPLATES.glob("*.jinja"))


def by_transformers(source: str, messages: list[dict], tools: list[dict] | None, variables: dict) -> str:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast  # slow to import

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **SPECIAL)
    options = {"add_generation_prompt": True} | variables
    return tokenizer.apply_chat_template(messages, tools=tools, chat_template=source, tokenize=False, **options)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("path", templates(), ids=lambda path: path.stem)
def test_renders_as_transformers(path: Path, case: str):
    messages, tools, variables = CASES[case]
    source = path.read_text(encoding="utf-8")
    ours = ChatTemplate({"default": source}, SPECIAL)
    try:
        expected = by_transformers(source, messages, tools, variables)
    except Exception:
        with pytest.raises(GorgonError) as caught:
            ours.render(messages, tools, variables)
        assert caught.value.code == ErrorCode.INVALID_REQUEST
    else:
        assert ours.render(messages, tools, variables) == expected


def test_the_nine_templates_are_there():
    if not TEMPLATES.is_dir():
        pytest.skip(f"{TEMPLATES} is absent: the templates of well-known models are not part of the repository")
    assert len(templates()) == 9


FEATURES = (
    "{%- set ns = namespace(n=0) %}{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{% if m.role == 'x' %}{% continue %}{% endif %}\n    {% set ns.n = ns.n + 1 %}\n{{ m.content | tojson }}"
    "{% generation %}{% set leaked = 1 %}{{ m.role }}{% endgeneration %}{{ leaked is defined }}{% endfor %}{{ ns.n }}"
    "{{ dict(a=1) | tojson(indent=2) }}{{ strftime_now('%Y') }}{{ documents is none }}{{ tools is none }}"
)


def test_features_as_transformers():
    messages = [{"role": "x", "content": "1"}, {"role": "y", "content": "<&'\">ü"}, {"role": "z", "content": "3"}]
    expected = by_transformers(FEATURES, messages, None, {})
    assert ChatTemplate({"default": FEATURES}, SPECIAL).render(messages) == expected
    assert '"<&\'\\">ü"' in expected


def test_the_template_for_tools():
    template = ChatTemplate({"default": "plain", "tool_use": "tools"}, {})
    assert template.render([USER]) == "plain"
    assert template.render([USER], [TOOL]) == "tools"
    with pytest.raises(TemplateBroken):
        ChatTemplate({"rag": "x"}, {})
    with pytest.raises(TemplateBroken):
        ChatTemplate({"default": "{% if %}"}, {})


def refusal(source: str, messages: list[dict], variables: dict | None = None) -> GorgonError:
    with pytest.raises(GorgonError) as caught:
        ChatTemplate({"default": source}, SPECIAL).render(messages, None, variables)
    return caught.value


def test_errors_have_codes():
    error = refusal("{{ raise_exception('roles must alternate') }}", [USER])
    assert error.code == ErrorCode.INVALID_REQUEST
    assert "roles must alternate" in error.message
    assert refusal("{{ messages[0].content + 1 }}", [USER]).code == ErrorCode.INVALID_REQUEST
    assert refusal("x", [USER], {"continue_final_message": True}).code == ErrorCode.UNSUPPORTED
    assert refusal("x", [USER], {"messages": []}).code == ErrorCode.UNSUPPORTED
    image = {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}
    assert refusal("x", [image]).code == ErrorCode.UNSUPPORTED


@pytest.mark.parametrize(
    "source",
    ["{{ messages.__class__.__mro__ }}", "{{ namespace.__init__.__globals__ }}", "{% set ns = namespace(_x=1) %}",
     "{{ dict.__class__.__subclasses__() }}", "{{ messages.append(1) }}"],
)  # fmt: skip
def test_the_sandbox_holds(source: str):
    assert refusal(source, [USER]).code == ErrorCode.INVALID_REQUEST


def test_content_in_parts():
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert ChatTemplate({"default": "{{ messages[0]['content'] }}"}, {}).render(parts) == "a\nb"
    walking = "{% for m in messages %}{% for p in m['content'] %}[{{ p.text }}]{% endfor %}{% endfor %}"
    assert ChatTemplate({"default": walking}, {}).render(parts) == "[a][b]"
