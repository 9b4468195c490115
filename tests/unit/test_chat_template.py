"""The templates of well-known models render as transformers renders them."""

import time
import tracemalloc
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
HARD_CALL = {
    "id": "a1B2c3D4e", "type": "function",
    "function": {"name": "plan", "arguments": {"q": "\"<ü>\" & \n", "n": [1, 2.5, None, True], "deep": {"k": {"j": []}}}},
}  # fmt: skip
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": '{"sky": "sun", "°C": 24}'}
HARD_RESULT = {"role": "tool", "name": "plan", "tool_call_id": "a1B2c3D4e", "content": "none </tool_response>"}
ANSWERED = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT,
            {"role": "assistant", "content": "It is sunny."}, {"role": "user", "content": "And tomorrow?"}]  # fmt: skip
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
    "calls answered": (ANSWERED, [TOOL], {}),
    "calls without tools": (ANSWERED, None, {}),
    "two calls in turn": (
        [*ANSWERED, {"role": "assistant", "content": "", "tool_calls": [HARD_CALL]}, HARD_RESULT], [TOOL], {},
    ),
    "parallel calls": (
        [USER, {"role": "assistant", "content": "I look.", "tool_calls": [CALL, HARD_CALL]}, RESULT, HARD_RESULT], [TOOL, TOOL], {},
    ),
    "a call with reasoning": (
        [USER, {"role": "assistant", "content": "", "reasoning": "sun?", "tool_calls": [HARD_CALL]}, HARD_RESULT], [TOOL], {},
    ),
    "a result as an object": (
        [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT | {"role": "ipython"}], [TOOL], {},
    ),
    "an id of the wrong length": (
        [USER, {"role": "assistant", "content": "", "tool_calls": [CALL | {"id": "x"}]}, RESULT | {"tool_call_id": "x"}], [TOOL], {},
    ),
    "llama's own variables": (
        [{"role": "system", "content": "Be brief."}, *ANSWERED], [TOOL],
        {"date_string": "1 Jan 2031", "tools_in_user_message": False, "builtin_tools": ["code_interpreter", "weather"]},
    ),
    "documents": (MULTI_TURN, None, {"documents": [{"title": "T", "text": "ü"}]}),
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
MORE_FEATURES = (
    "{{ strftime_now('%d %b %Y') }}{% for d in documents or [] %}[{{ d.title }}: {{ d['text'] | trim }}]{% endfor %}"
    "{%- macro turn(m, mark='') -%}{{ mark * 2 }}{{ m.role | upper }} {{ m['content'] | default('', true) }}{%- endmacro -%}"
    "{% for m in messages %}{% generation %}{{ turn(m, mark='#') }}{% set x = loop.index ** 2 % 7 + 1 %}{{ x }}{% endgeneration %}"
    "{% generation %}{% for c in m.tool_calls or [] %}{{ c | tojson(indent=4, sort_keys=true) }}{% endfor %}{% endgeneration %}"
    "{% endfor %}{{ '%s-%s' % ('a', 1) }}{{ [1] + [2] }}{{ 'a' ~ 1 }}{{ dict.fromkeys(['a']) }}{{ messages[-1]['content'][:2] }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ tools[0]['function'].items() | list | first }}"
)


def test_features_as_transformers():
    messages = [{"role": "x", "content": "1"}, {"role": "y", "content": "<&'\">ü"}, {"role": "z", "content": "3"}]
    expected = by_transformers(FEATURES, messages, None, {})
    assert ChatTemplate({"default": FEATURES}, SPECIAL).render(messages) == expected
    assert '"<&\'\\">ü"' in expected


def test_more_features_as_transformers():
    variables = {"documents": [{"title": "T", "text": " ü "}, {"title": "U", "text": ""}]}
    expected = by_transformers(MORE_FEATURES, ANSWERED, [TOOL], variables)
    assert ChatTemplate({"default": MORE_FEATURES}, SPECIAL).render(ANSWERED, [TOOL], variables) == expected
    assert "[T: ü][U: ]" in expected


@pytest.mark.parametrize("path", templates(), ids=lambda path: path.stem)
def test_arguments_as_text_render_as_arguments(path: Path):
    """OpenAI's clients send them so. Templates that take text are given it; the others would quote it."""
    source = path.read_text(encoding="utf-8")
    ours = ChatTemplate({"default": source}, SPECIAL)
    function = {"name": "plan", "arguments": '{"q": "ü", "n": [1]}'}

    def history(arguments: object) -> list[dict]:
        call = HARD_CALL | {"function": function | {"arguments": arguments}}
        return [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, HARD_RESULT]

    as_text, as_object, broken = history(function["arguments"]), history({"q": "ü", "n": [1]}), history("{")
    try:
        expected = by_transformers(source, as_object, [TOOL], {})
    except Exception:
        pytest.skip("the template refuses calls")
    assert ours.render(as_text, [TOOL]) == expected
    assert ours.render(broken, [TOOL]) == by_transformers(source, broken, [TOOL], {})


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


# ---------------------------------------------------------------- bounds


def nested(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


def limited(source: str, seconds: float = 0.3, **variables) -> GorgonError:
    with pytest.raises(GorgonError) as caught:
        ChatTemplate({"default": source}, SPECIAL, seconds).render([USER] * 1000, None, variables, 100_000)
    return caught.value


@pytest.mark.parametrize(
    "source",
    ["{% for a in messages %}{% for b in messages %}{% for c in messages %}{{ c.role and '' }}{% endfor %}{% endfor %}{% endfor %}",
     "{% set ns = namespace(n=0) %}{% for a in range(99999) %}{% for b in range(99999) %}{% set ns.n = ns.n + 1 %}"
     "{% endfor %}{% endfor %}",
     "{% for a in messages %}{% for b in messages %}{% for c in messages %}{{ messages | tojson(indent=1) | length and '' }}"
     "{% endfor %}{% endfor %}{% endfor %}"],
)  # fmt: skip
def test_time_is_bounded(source: str):
    begin = time.thread_time()
    error = limited(source)
    assert time.thread_time() - begin < 1.5
    assert error.code == ErrorCode.INVALID_REQUEST or "exceeds" in error.message


@pytest.mark.parametrize(
    "source",
    ["{% for a in messages %}{% for b in messages %}{{ b.content }}{% endfor %}{% endfor %}",
     "{{ 'x' * 10 ** 9 }}", "{{ width * messages[0].content }}", "{{ 9 ** 99999999 }}", "{{ [1] * width }}",
     "{% set ns = namespace(s='xx') %}{% for m in messages %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
     "{{ deep | tojson(indent=4) }}", "{{ range(width) | list }}", "{{ '%99999999d' % 1 }}", "{{ '%*d' % (width, 1) }}"],
)  # fmt: skip
def test_output_is_bounded(source: str):
    tracemalloc.start()
    try:
        error = limited(source, 5.0, width=2**30, deep=[nested(50)] * 300)
        assert tracemalloc.get_traced_memory()[1] < 40 * 2**20
    finally:
        tracemalloc.stop()
    assert error.code in (ErrorCode.CONTEXT_LENGTH_EXCEEDED, ErrorCode.INVALID_REQUEST)


def test_bounds_are_of_one_rendering_only():
    template = ChatTemplate({"default": "{% for m in messages %}{{ m.content }}{% endfor %}"}, {})
    with pytest.raises(GorgonError):
        template.render([USER] * 1000, None, None, 100)
    assert len(template.render([USER] * 1000)) == 1000 * len(USER["content"])


def test_hostile_messages_of_well_known_templates_end_in_time():
    """What took Mistral's template 2 minutes and 500 MB, and Llama's 8 s and 380 MB, smaller."""
    if not TEMPLATES.is_dir():
        pytest.skip(f"{TEMPLATES} is absent")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2000
    mistral = ChatTemplate(
        {"default": (TEMPLATES / "mistralai-Mistral-Nemo-Instruct-2407.jinja").read_text()}, SPECIAL, 1.0
    )
    begin = time.thread_time()
    with pytest.raises(GorgonError) as caught:
        mistral.render(turns[:-1], [TOOL] * 500)
    assert time.thread_time() - begin < 3
    assert "more than" in caught.value.message
    deep = {
        "type": "function",
        "function": {"name": "f", "description": "", "parameters": {"enum": [nested(50)] * 3000}},
    }
    llama = ChatTemplate({"default": (TEMPLATES / "meta-llama-Llama-3.1-8B-Instruct.jinja").read_text()}, SPECIAL)
    with pytest.raises(GorgonError) as caught:
        llama.render([USER], [deep])
    assert caught.value.code == ErrorCode.CONTEXT_LENGTH_EXCEEDED
