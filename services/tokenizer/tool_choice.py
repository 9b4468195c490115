"""Calls that the request demands, and calls that must keep to their schema if the model makes any, as constraints on the text: the
model's own notation around the arguments."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from shared.errors import ErrorCode, GorgonError
from shared.structured import Text, optional_calls_constraint, tool_constraint
from shared.tool_calls import MARKERS

# A tool that declares no parameters takes none.
_NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


_ANYTHING: dict[str, Any] = {"type": "object"}
# What the parser takes for a call where nothing marks it: an object whose first key is one of a call's (shared/tool_calls.py).
_BARE = r'\{[ \t\r\n]*"(name|type|id|arguments|parameters)"'


class Tool(NamedTuple):
    """`strict`: the arguments must keep to the schema even where no call is demanded."""

    name: str
    parameters: Mapping[str, Any]
    strict: bool


def tools_of(tools: Sequence[Mapping[str, Any]]) -> list[Tool]:
    """Names and schemas, in OpenAI's form ({"type": "function", "function": {…}}) or without the outer object. Raises GorgonError."""
    found: list[Tool] = []
    for index, tool in enumerate(tools):
        inner = tool.get("function", tool)
        name = inner.get("name") if isinstance(inner, dict) else None
        parameters = inner.get("parameters") if isinstance(inner, dict) else None
        schema = _NOTHING if parameters is None else parameters
        if not isinstance(name, str) or not name:
            raise GorgonError(ErrorCode.INVALID_REQUEST, f"tools.{index}: a tool needs a name")
        if not isinstance(schema, dict) or schema.get("type", "object") != "object":
            raise GorgonError(
                ErrorCode.INVALID_REQUEST, f"tools.{index}: the parameters of {name!r:.80} are no schema of an object"
            )
        found.append(Tool(name, {"type": "object"} | schema, inner.get("strict") is True))
    return found


def forced_call(
    tool_format: str,
    tools: Sequence[Mapping[str, Any]],
    name: str | None,
    special_id: Callable[[str], int | None],
    several: bool = False,
) -> str:
    """The constraint (shared.structured) of a call of one tool, or with `name` None of any; with `several` of one or more, where the
    format allows that.

    special_id   of a token that the tokenizer has beside its vocabulary: a marker that is one must be written as one

    Raises GorgonError: UNSUPPORTED if the model's format is not known, INVALID_REQUEST for tools that are wrong.
    """
    _check_format(tool_format, "tool_choice", "none can be demanded")
    known = tools_of(tools)
    wanted = [tool for tool in known if name is None or tool.name == name]
    if not wanted:
        raise GorgonError(ErrorCode.INVALID_REQUEST, f"tool_choice: no tool is named {name!r:.80}")
    alternatives = [
        (before, tool.parameters, after)
        for tool in wanted
        for before, after in [_frame(tool_format, tool.name, special_id)]
    ]
    separator = "\n" if tool_format == "hermes" and several else None
    return tool_constraint(alternatives, separator=separator)


def strict_calls(
    tool_format: str,
    tools: Sequence[Mapping[str, Any]],
    special_id: Callable[[str], int | None],
    several: bool,
) -> str:
    """The constraint of text that may contain calls, `several` or one: those of `strict` tools keep to their schema, the others have
    any object as arguments. "" if no tool is strict: then nothing needs to be kept from the model.

    special_id   as of `forced_call`

    Raises GorgonError: UNSUPPORTED if the model's format is not known, INVALID_REQUEST for tools that are wrong.
    """
    if not any(is_strict(tool) for tool in tools):
        return ""
    _check_format(tool_format, "tools", "'strict' cannot be kept")
    known = [(tool.name, tool.parameters if tool.strict else _ANYTHING) for tool in tools_of(tools)]
    marker = MARKERS[tool_format][0]
    form = partial(optional_calls_constraint, marker, special_id(marker))
    if tool_format == "hermes":
        closer = MARKERS["hermes"][1]
        closing = special_id(closer)
        return form(
            '\n{"name": ',
            [(f'{_quoted(name)}, "arguments": ', schema, "}\n") for name, schema in known],
            closing=closer if closing is None else [closing],
            again=several,
        )
    if tool_format == "llama3":
        return form(
            '{"name": ',
            [(f'{_quoted(name)}, "parameters": ', schema, "}") for name, schema in known],
            separator='; {"name": ' if several else None,
            bare=_BARE,
        )
    arguments = special_id("[ARGS]")
    if arguments is not None:  # tokenizers from v11 on
        return form("", [([name, arguments], schema, "") for name, schema in known], again=several)
    return form(
        '[{"name": ',
        [(f'{_quoted(name)}, "arguments": ', schema, "}") for name, schema in known],
        closing="]",
        separator=', {"name": ' if several else None,
    )


def is_strict(tool: Mapping[str, Any]) -> bool:
    inner = tool.get("function", tool)
    return isinstance(inner, dict) and inner.get("strict") is True


def _check_format(tool_format: str, field: str, so: str) -> None:
    if tool_format not in MARKERS:
        raise GorgonError(ErrorCode.UNSUPPORTED, f"{field}: how this model writes calls is not known, so {so}")


def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)


def _frame(tool_format: str, name: str, special_id: Callable[[str], int | None]) -> tuple[Text, Text]:
    """What stands before the arguments and after them."""

    def marker(text: str) -> str | int:
        token = special_id(text)
        return text if token is None else token

    quoted = _quoted(name)
    if tool_format == "hermes":
        opener, closer = map(marker, MARKERS["hermes"])
        return [opener, f'\n{{"name": {quoted}, "arguments": '], ["}\n", closer]
    if tool_format == "llama3":
        return f'{{"name": {quoted}, "parameters": ', "}"
    opener, arguments = marker("[TOOL_CALLS]"), marker("[ARGS]")
    if isinstance(arguments, int):  # tokenizers from v11 on
        return [opener, name, arguments], ""
    return [opener, f'[{{"name": {quoted}, "arguments": '], "}]"
