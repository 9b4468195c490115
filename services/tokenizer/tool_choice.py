"""Calls that the request demands, and calls that must keep to their schema if the model makes any, as constraints on the text: the
model's own notation around the arguments."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from shared.errors import ErrorCode, GorgonError
from shared.structured import optional_calls_constraint, tool_constraint
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
        found.append(Tool(name, {"type": "object"} | schema, is_strict(tool)))
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
    notation = _notation(tool_format, special_id, "tool_choice", "none can be demanded")
    wanted = [tool for tool in tools_of(tools) if name is None or tool.name == name]
    if not wanted:
        raise GorgonError(ErrorCode.INVALID_REQUEST, f"tool_choice: no tool is named {name!r:.80}")
    opening = [notation.begin] if notation.is_bare else [notation.mark, notation.begin]
    alternatives = [
        ([*opening, *notation.before(tool.name)], tool.parameters, [notation.after, notation.closing])
        for tool in wanted
    ]
    return tool_constraint(alternatives, separator="\n" if tool_format == "hermes" and several else None)


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
    notation = _notation(tool_format, special_id, "tools", "'strict' cannot be kept")
    return optional_calls_constraint(
        MARKERS[tool_format][0],
        notation.mark if isinstance(notation.mark, int) else None,
        notation.begin,
        [
            (notation.before(tool.name), tool.parameters if tool.strict else _ANYTHING, notation.after)
            for tool in tools_of(tools)
        ],
        closing=[notation.closing],
        separator=notation.separator if several else None,
        again=several and notation.separator is None,
        bare=_BARE if notation.is_bare else "",
    )


def is_strict(tool: Mapping[str, Any]) -> bool:
    inner = tool.get("function", tool)
    return isinstance(inner, dict) and inner.get("strict") is True


class _Notation(NamedTuple):
    """How a format writes calls: the mark, `begin`, and for each call its name, what stands before the arguments, these, and `after`.

    closing     after the calls that one mark introduces
    separator   between those, None if a mark introduces only one
    is_quoted   the name is a JSON string
    is_bare     calls need no mark
    """

    mark: str | int
    begin: str
    key: str | int
    after: str
    closing: str | int = ""
    separator: str | None = None
    is_quoted: bool = True
    is_bare: bool = False

    def before(self, name: str) -> list[str | int]:
        return [json.dumps(name, ensure_ascii=False) if self.is_quoted else name, self.key]


def _notation(tool_format: str, special_id: Callable[[str], int | None], field: str, so: str) -> _Notation:
    """Raises GorgonError(UNSUPPORTED) for a format that is not known: `field` of the request asks for it, `so` it cannot be had."""
    if tool_format not in MARKERS:
        raise GorgonError(ErrorCode.UNSUPPORTED, f"{field}: how this model writes calls is not known, so {so}")

    def marker(text: str) -> str | int:
        token = special_id(text)
        return text if token is None else token

    opener, *others = map(marker, MARKERS[tool_format])
    if tool_format == "hermes":
        return _Notation(opener, '\n{"name": ', ', "arguments": ', "}\n", others[0])
    if tool_format == "llama3":
        return _Notation(opener, '{"name": ', ', "parameters": ', "}", separator='; {"name": ', is_bare=True)
    if isinstance(others[-1], int):  # [ARGS]: tokenizers from v11 on
        return _Notation(opener, "", others[-1], "", is_quoted=False)
    return _Notation(opener, '[{"name": ', ', "arguments": ', "}", "]", ', {"name": ')
