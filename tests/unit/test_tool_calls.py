"""Tool calls are found in realistic outputs of each format, wherever the text is cut."""

import json
import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.tool_calls import FORMATS, MARKERS, SINGLE, ToolCall, ToolCallParser, call_id, parse

WEATHER = '{"city": "Zürich", "days": 3}'


def stream(format: str, pieces: list[str]) -> tuple[str, list[ToolCall]]:
    """What a client makes of the deltas, checked against what the parser says at the end."""
    parser = ToolCallParser(format, "r")
    content, calls = "", []
    for parsed in [*map(parser.feed, pieces), parser.finish()]:
        content += parsed.content
        for delta in parsed.calls:
            if delta.index == len(calls):
                assert delta.name is not None
                calls.append(ToolCall(delta.id, delta.name, ""))
            else:
                assert delta.name is None
            assert delta.index == len(calls) - 1
            assert delta.id == call_id("r", 0, delta.index)
            calls[-1] = calls[-1]._replace(arguments=calls[-1].arguments + delta.arguments, error=delta.error)
    assert calls == parser.calls
    return content, calls


def found(format: str, text: str) -> tuple[str, list[tuple[str, object]]]:
    """(content, [(name, arguments)]) of a text without broken calls, the same cut into characters and whole."""
    whole = stream(format, [text])
    assert stream(format, list(text)) == whole
    assert all(call.error is None for call in whole[1])
    return whole[0], [(call.name, json.loads(call.arguments)) for call in whole[1]]


GOOD = [
    ("hermes", f'<tool_call>\n{{"name": "weather", "arguments": {WEATHER}}}\n</tool_call>', "", ["weather"]),
    ("hermes", f'Let me look.\n<tool_call>\n{{"name": "weather", "arguments": {WEATHER}}}\n</tool_call>\n',
     "Let me look.", ["weather"]),
    ("hermes",
     '<think>\n1 < 2, so {x}\n</think>\n\n<tool_call>\n{"name": "a", "arguments": {}}\n</tool_call>\n'
     '<tool_call>\n{"arguments": {"x": {"y": [1, -2.5e3, null]}}, "name": "b"}\n</tool_call>',
     "<think>\n1 < 2, so {x}\n</think>", ["a", "b"]),
    ("hermes",
     '<tool_call>{"name":"a","arguments":"{\\"x\\": 1}"}</tool_call> and <tool_call>{"name":"b","arguments":null}</tool_call>',
     " and", ["a", "b"]),
    ("hermes", '<tool_call>{"name": "a"}</tool_call>', "", ["a"]),
    ("hermes", '<tool_call>[{"name": "a", "arguments": {}}, {"name": "b", "arguments": {}}]</tool_call>', "", ["a", "b"]),
    ("hermes", '<tool_call>{"name": "a", "arguments": {}}\n{"name": "b", "arguments": {}}</tool_call>x', "x", ["a", "b"]),
    ("hermes", '<tool_call>{"name": "a", "arguments": {"s": "</tool_call>"}}', "", ["a"]),
    ("hermes", '<tool_call><tool_call>{"name": "a", "arguments": {}}</tool_call>', "<tool_call>", ["a"]),
    ("llama3", f'{{"name": "weather", "parameters": {WEATHER}}}', "", ["weather"]),
    ("llama3", f'\n\n  {{"type": "function", "name": "weather", "parameters": {WEATHER}}}', "", ["weather"]),
    ("llama3", '<|python_tag|>{"name": "a", "parameters": {}}; {"name": "b", "parameters": {"q": "\\u00fc\\ud83d\\ude00\\n"}}',
     "", ["a", "b"]),
    ("llama3", 'Sure:\n{"name": "a", "parameters": {}}\nDone.', "Sure:\nDone.", ["a"]),
    ("llama3", '[{"name": "a", "parameters": {}}, {"name": "b", "parameters": {}}]', "", ["a", "b"]),
    ("llama3", '{"name": "a", "parameters": {}}<|python_tag|>{"name": "b", "parameters": {}}', "", ["a", "b"]),
    ("mistral", f'[TOOL_CALLS][{{"name": "weather", "arguments": {WEATHER}}}]', "", ["weather"]),
    ("mistral", '[TOOL_CALLS] [{"name": "a", "arguments": {"x": "]"}, "id": "VvvODy9mT"}, {"name": "b", "arguments": {}}]',
     "", ["a", "b"]),
    ("mistral", '[TOOL_CALLS]a[ARGS]{"x": 1}[TOOL_CALLS]ns.b-2[ARGS]{}', "", ["a", "ns.b-2"]),
    ("mistral", 'I look.[TOOL_CALLS]a[CALL_ID]9XyZ01234[ARGS]{"x": [{}]} Well', "I look. Well", ["a"]),
    ("mistral", '[TOOL_CALLS]a{"x": 1}', "", ["a"]),
    ("mistral", '[TOOL_CALLS]{"name": "a", "arguments": {}}', "", ["a"]),
]  # fmt: skip


@pytest.mark.parametrize(("format", "text", "content", "names"), GOOD)
def test_calls(format: str, text: str, content: str, names: list[str]):
    said, calls = found(format, text)
    assert [name for name, _ in calls] == names
    assert said.replace("\n\n", "\n") == content.replace("\n\n", "\n")


def test_arguments_are_what_the_model_wrote():
    text = '<tool_call>\n{"name": "a", "arguments": {"q":  "\\u00fc \\"x\\"", "n": 1.50}}\n</tool_call>'
    assert parse("hermes", text)[1][0].arguments == '{"q":  "\\u00fc \\"x\\"", "n": 1.50}'
    raw_newline = '<tool_call>{"name": "a", "arguments": {"code": "a\n\tb"}}</tool_call>'
    assert found("hermes", raw_newline)[1] == [("a", {"code": "a\n\tb"})]


def test_arguments_stream():
    parser = ToolCallParser("hermes")
    assert parser.feed('Hm.\n<tool_call>\n{"name": "a"').calls == ()
    (first,) = parser.feed(', "arguments": {"x": "lo').calls
    assert (first.name, first.arguments) == ("a", '{"x": "lo')
    (second,) = parser.feed('ng"').calls
    assert (second.index, second.name, second.arguments) == (0, None, 'ng"')


NO_CALLS = [
    ("hermes", "A <tool> call, <tool_cal"),
    ("hermes", "<tool_call>"),
    ("hermes", "<tool_call>\nnothing\n</tool_call>\n"),
    ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "a", "arguments": 3}</tool_call>'),
    ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "a", "arguments": "no"}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {}, "arguments": {}, "name": "a"}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {"a": 1}'),
    ("hermes", '<tool_call>{"name": "a", "argu'),
    ("hermes", '<tool_call>{"name" "a"}'),
    ("hermes", '{"name": "a", "arguments": {}}'),
    ("llama3", '{"name": "John", "age": 3}\n'),
    ("llama3", '{"result": {"name": "a", "parameters": {}}}'),
    ("llama3", 'Use {"name": "a", "parameters": {}} here'),
    ("llama3", "<|python_tag|>print([x for x in {1}])\n"),
    ("llama3", "[1] see the paper\n{ block }"),
    ("mistral", "[TOOL_CALLS]"),
    ("mistral", "[TOOL_CALLS][]"),
    ("mistral", "[TOOL_CALLS] I cannot do that."),
    ("mistral", "[TOOL_CALLS]a[CALL_ID]x y"),
    ("mistral", "[TOOL_CALLS]a[ARGS]no"),
    ("mistral", "[TOOL_CALLS]" + "a" * 300 + "[ARGS]{}"),
    ("mistral", '[{"name": "a", "arguments": {}}]'),
]


@pytest.mark.parametrize(("format", "text"), NO_CALLS)
def test_what_is_no_call_is_text(format: str, text: str):
    assert found(format, text) == (text, [])


BROKEN = [
    ("hermes", '<tool_call>{"name": "a", "arguments": {"x": 1,}}</tool_call>', '{"x": 1,', "}}</tool_call>"),
    ("hermes", '<tool_call>{"name": "a", "arguments": {"x": tru', '{"x": tru', ""),
    ("hermes", '<tool_call>{"name": "a", "arguments": {"x": 01}}</tool_call>', '{"x": 01', "}}</tool_call>"),
    ("hermes", '<tool_call>{"name": "a", "arguments": {}</tool_call>', "{}", "</tool_call>"),
    ("llama3", '{"name": "a", "parameters": {"x": "\\q"}}', '{"x": "\\', 'q"}}'),
    ("mistral", '[TOOL_CALLS]a[ARGS]{"x": "y"', '{"x": "y"', ""),
    ("mistral", "[TOOL_CALLS]a[ARGS]" + '{"x":' * 70, '{"x":' * 64, '{"x":' * 6),
]


@pytest.mark.parametrize(("format", "text", "arguments", "rest"), BROKEN)
def test_a_call_that_breaks_is_marked(format: str, text: str, arguments: str, rest: str):
    content, calls = stream(format, list(text))
    assert stream(format, [text]) == (content, calls)
    assert [(call.name, call.arguments) for call in calls] == [("a", arguments)]
    assert calls[0].error
    assert content == rest


def test_text_after_a_broken_call_is_kept():
    text = "[TOOL_CALLS]a[ARGS]{<[TOOL_CALLS][x] and so on"
    assert stream("mistral", [text]) == stream("mistral", list(text))
    assert stream("mistral", [text])[0] == "<[TOOL_CALLS][x] and so on"


def test_a_broken_call_harms_no_other():
    text = '<tool_call>{"name": "a", "arguments": {"x": }}</tool_call>\n<tool_call>{"name": "b", "arguments": {}}</tool_call>'
    content, calls = stream("hermes", [text])
    assert [(call.name, call.error is None) for call in calls] == [("a", False), ("b", True)]
    assert content == "}}</tool_call>"


@pytest.mark.parametrize(
    ("format", "text", "content"),
    [("hermes", '<tool_call>{"name": "a", "arguments": {}}</tool_call>\n<tool_call>{"name": "b", "arguments": {}}</tool_call>',
      '\n<tool_call>{"name": "b", "arguments": {}}</tool_call>'),
     ("hermes", '<tool_call>{"name": "a", "arguments": {}}\n{"name": "b", "arguments": {}}</tool_call>',
      '\n{"name": "b", "arguments": {}}</tool_call>'),
     ("llama3", '{"name": "a", "parameters": {}}; {"name": "b", "parameters": {}}', '; {"name": "b", "parameters": {}}'),
     ("mistral", '[TOOL_CALLS][{"name": "a", "arguments": {}}, {"name": "b", "arguments": {}}]', ', {"name": "b", "arguments": {}}]'),
     ("mistral", "[TOOL_CALLS]a[ARGS]{}[TOOL_CALLS]b[ARGS]{}", "[TOOL_CALLS]b[ARGS]{}")],
)  # fmt: skip
def test_a_single_call_and_the_rest_is_text(format: str, text: str, content: str):
    assert found(SINGLE[format], text) == (content, [("a", {})])
    assert len(found(format, text)[1]) == 2


def test_unknown_format():
    with pytest.raises(ValueError, match="hermes"):
        ToolCallParser("xml")


# ------------------------------------------------ any text, cut anywhere

PIECES = [
    *(marker for markers in MARKERS.values() for marker in markers),
    '{"name": "f", "arguments": {"x": "é\\u00e9😀"}}', '{"name": "g", "parameters": {}}', '"name"', '"arguments": ', '"parameters": {',
    "{", "}", "[", "]", '"', ":", ",", ";", "\\", "\n", " ", "0", "-1.5", "true", "f", "text ", "<", "</tool", "[TOOL", "ü",
]  # fmt: skip
texts = st.lists(st.sampled_from(PIECES), max_size=24).map("".join) | st.text(max_size=40)


@given(st.sampled_from([*FORMATS, *SINGLE.values()]), texts, st.data())
@settings(max_examples=600, deadline=None)
def test_any_cut_gives_the_same(format: str, text: str, data: st.DataObject):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = stream(format, [text])
    assert stream(format, pieces) == whole
    assert stream(format, list(text)) == whole
    content, calls = whole
    for call in calls:
        if call.error is None:
            assert isinstance(json.loads(call.arguments), dict)
    if not calls:
        assert content == text


def test_many_random_texts():
    """Longer ones than hypothesis likes to try. GORGON_TOOL_TEXTS says how many."""
    chance, found_calls = random.Random(5), 0
    for _ in range(int(os.environ.get("GORGON_TOOL_TEXTS", "3000"))):
        format = chance.choice([*FORMATS, *SINGLE.values()])
        text = "".join(chance.choice(PIECES) for _ in range(chance.randrange(30)))
        step = chance.randrange(2, 9)
        whole = stream(format, [text])
        assert stream(format, list(text)) == whole, (format, text)
        assert stream(format, [text[i : i + step] for i in range(0, len(text), step)]) == whole, (format, text)
        found_calls += len(whole[1])
    assert found_calls > 100


names = st.text(st.sampled_from("abcXYZ012_-."), min_size=1, max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
calls_of = st.lists(st.tuples(names, st.dictionaries(st.text(max_size=8), values, max_size=4)), min_size=1, max_size=3)
WRITERS = {
    "hermes": [lambda calls, dump: "\n".join(
        f'<tool_call>\n{{"name": "{n}", "arguments": {dump(a)}}}\n</tool_call>' for n, a in calls)],
    "llama3": [lambda calls, dump: "<|python_tag|>" + "; ".join(f'{{"name": "{n}", "parameters": {dump(a)}}}' for n, a in calls),
               lambda calls, dump: "\n".join(f'{{"name": "{n}", "parameters": {dump(a)}}}' for n, a in calls)],
    "mistral": [lambda calls, dump: "[TOOL_CALLS]" + dump([{"name": n, "arguments": a} for n, a in calls]),
                lambda calls, dump: "".join(f"[TOOL_CALLS]{n}[ARGS]{dump(a)}" for n, a in calls)],
}  # fmt: skip


@given(
    st.sampled_from(FORMATS), calls_of, st.sampled_from([None, 1]), st.booleans(), st.integers(0, 1), st.integers(1, 9)
)
@settings(max_examples=300, deadline=None)
def test_calls_written_are_calls_read(format, calls, indent, ascii, writer, step):
    writers = WRITERS[format]
    text = writers[writer % len(writers)](calls, lambda value: json.dumps(value, ensure_ascii=ascii, indent=indent))
    content, got = stream(format, [text[i : i + step] for i in range(0, len(text), step)])
    assert content == ""
    assert [(call.name, json.loads(call.arguments), call.error) for call in got] == [(n, a, None) for n, a in calls]
