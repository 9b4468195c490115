"""Chat messages → the text that the model was trained on, by the model's own Jinja template.

The same text as transformers', in bounds (services/tokenizer/template_sandbox.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jinja2

from services.tokenizer.template_sandbox import TooMuchText, TooMuchTime, bounds, new_environment
from shared.errors import ErrorCode, GorgonError

# Names that the request has fields for, and options of transformers that are not template variables: to pass them on as variables
# would be to ignore them.
_RESERVED = frozenset(
    {"messages", "tools", "self", "chat_template", "continue_final_message", "tokenize", "return_assistant_tokens_mask"}
)
_REASONING = ("reasoning_content", "thinking", "reasoning")
_TAKES_STRING_ARGUMENTS = re.compile(r"arguments(['\"]\])?\s+is\s+(string|mapping|not\s+string|not\s+mapping)")
_WALKS_CONTENT = re.compile(r"\bfor\s+\w+\s+in\s+(\w+(\.content|\[['\"]content['\"]\])|content\b)")


MAX_CHARS = 16 * 2**20  # of a prompt, whatever the context


class TemplateBroken(Exception):
    """The template itself does not compile, or there is none to choose."""


class _Compiled(NamedTuple):
    """walks_content   the template takes content in parts; others would print the list
    reads_arguments   it takes the arguments of a call as JSON text; others would quote the text once more
    """

    template: jinja2.Template
    walks_content: bool
    reads_arguments: bool


class ChatTemplate:
    """A model's templates: "default", and perhaps "tool_use" for requests with tools. Thread-safe.

    special_tokens   {"bos_token": "<s>", ...}: variables of the template
    seconds          of CPU time that a rendering may take
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str], seconds: float = 5.0) -> None:
        if "default" not in templates:
            raise TemplateBroken(f"no chat template is named 'default', only {sorted(templates)}")
        environment = new_environment()
        self._special_tokens = dict(special_tokens)
        self._seconds = seconds
        self._compiled: dict[str, _Compiled] = {}
        for name, source in templates.items():
            try:
                template = environment.from_string(source)
            except jinja2.TemplateError as error:
                raise TemplateBroken(f"chat template {name!r}: {error}") from None
            self._compiled[name] = _Compiled(
                template, bool(_WALKS_CONTENT.search(source)), bool(_TAKES_STRING_ARGUMENTS.search(source))
            )

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        max_chars: int = MAX_CHARS,
    ) -> str:
        """The prompt, ready for the assistant's turn unless `variables` say add_generation_prompt=False. Raises GorgonError:
        INVALID_REQUEST if the template refuses the messages or takes too long over them, CONTEXT_LENGTH_EXCEEDED if the prompt has
        more than max_chars characters, UNSUPPORTED for content that is not text."""
        variables = variables or {}
        if reserved := sorted(_RESERVED & variables.keys()):
            raise GorgonError(ErrorCode.UNSUPPORTED, f"chat_template_kwargs: {', '.join(reserved)} cannot be set there")
        name = "tool_use" if tools is not None and "tool_use" in self._compiled else "default"
        compiled = self._compiled[name]
        prepared = [_prepare(message, compiled) for message in messages]
        given = {"documents": None, "add_generation_prompt": True} | self._special_tokens | dict(variables)
        max_chars = min(max_chars, MAX_CHARS)
        code = ErrorCode.INVALID_REQUEST
        try:
            with bounds.set(self._seconds, max_chars):
                return _joined(compiled.template, dict(given, messages=prepared, tools=tools))
        except TooMuchTime:
            message = f"the chat template takes more than {self._seconds:g} s over the messages"
        except (TooMuchText, MemoryError, OverflowError):
            code = ErrorCode.CONTEXT_LENGTH_EXCEEDED
            message = f"the prompt exceeds {max_chars} characters, more than the context takes"
        except jinja2.TemplateError as error:
            message = f"the chat template refuses the messages: {error!s:.500}"
        except Exception as error:  # whatever a template does with messages that it was not written for
            message = f"the chat template cannot render the messages: {error!r:.500}"
        raise GorgonError(code, message)


def _joined(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """`template.render`, but a text that grows too long is given up before it is there."""
    pieces, size = [], 0
    for piece in template.generate(variables):
        bounds.look()
        size += len(piece)
        bounds.check_size(size)
        pieces.append(piece)
    return "".join(pieces)


def _prepare(message: Mapping[str, Any], compiled: _Compiled) -> dict[str, Any]:
    """A message as transformers hands it to a template: without nulls, its reasoning under each of the names in use.

    Where transformers would print what nobody wants (a list of parts, a quoted text of arguments), the parts are joined and the
    arguments read for a template that does not do it itself."""
    prepared = {key: value for key, value in message.items() if value is not None}
    reasoning = next((prepared[name] for name in _REASONING if name in prepared), None)
    if reasoning is not None:
        prepared = {"thinking": reasoning, **prepared, "reasoning_content": reasoning}
    if isinstance(content := prepared.get("content"), list):
        for part in content:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise GorgonError(
                    ErrorCode.UNSUPPORTED, f"messages: content of type {part.get('type')!r:.80}; only text"
                )
        if not compiled.walks_content:
            prepared["content"] = "\n".join(part["text"] for part in content)
    if isinstance(calls := prepared.get("tool_calls"), list) and not compiled.reads_arguments:
        prepared["tool_calls"] = [_with_object(call) for call in calls]
    return prepared


def _with_object(call: Any) -> Any:
    """A tool call whose arguments are an object, if they are the JSON text of one (as OpenAI's are)."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return call | {"function": _with_object(call["function"])}
    if isinstance(text := call.get("arguments"), str):
        try:
            arguments = json.loads(text)
        except (ValueError, RecursionError):
            return call
        if isinstance(arguments, dict):
            return call | {"arguments": arguments}
    return call
