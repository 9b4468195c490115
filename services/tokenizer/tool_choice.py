"""A call that the request demands, as a constraint on the text: the model's own notation around arguments that keep to the schema."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from shared.errors import ErrorCode, GorgonError
from shared.structured import Text, tool_constraint
from shared.tool_calls import MARKERS

# A tool that declares no parameters takes none.
_NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


class Tool(NamedTuple):
    name: str
    parameters: Mapping[str, Any]


def tools_of(tools: Sequence[Mapping[str, Any]]) -> list[Tool]:
    """Names and schemas, in OpenAI's form ({"type": "function", "function": {…}}) or without the outer object. Raises GorgonError."""
    found: list[Tool] = []
    for index, tool in enumerate(tools):
        inner = tool.get("function", tool)
        name = inner.get("name") if isinstance(inner, dict) else None
        parameters = inner.get("parameters") if isinstance(inner, dict) else None
        schema = _NOTHING if parameters is None else parameters
        if not isinstance(name, str) or not name:
            raise GorgonError(ErrorCode.INVALID_REQUEST, f"tools.{index}: a tool that may be demanded needs a name")
        if not isinstance(schema, dict) or schema.get("type", "object") != "object":
            raise GorgonError(
                ErrorCode.INVALID_REQUEST, f"tools.{index}: the parameters of {name!r:.80} are no schema of an object"
            )
        found.append(Tool(name, {"type": "object"} | schema))
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
    if tool_format not in MARKERS:
        raise GorgonError(
            ErrorCode.UNSUPPORTED, "tool_choice: how this model writes calls is not known, so none can be demanded"
        )
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


def _frame(tool_format: str, name: str, special_id: Callable[[str], int | None]) -> tuple[Text, Text]:
    """What stands before the arguments and after them."""

    def marker(text: str) -> str | int:
        token = special_id(text)
        return text if token is None else token

    quoted = json.dumps(name, ensure_ascii=False)
    if tool_format == "hermes":
        opener, closer = map(marker, MARKERS["hermes"])
        return [opener, f'\n{{"name": {quoted}, "arguments": '], ["}\n", closer]
    if tool_format == "llama3":
        return f'{{"name": {quoted}, "parameters": ', "}"
    opener, arguments = marker("[TOOL_CALLS]"), marker("[ARGS]")
    if isinstance(arguments, int):  # tokenizers from v11 on
        return [opener, name, arguments], ""
    return [opener, f'[{{"name": {quoted}, "arguments": '], "}]"
