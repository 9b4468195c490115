"""Chat messages → the text that the model was trained on, by the model's own Jinja template.

The environment is the one that transformers gives to templates (utils/chat_template_utils.py), because templates are written for
it. It is a sandbox: a template comes with the weights, and the messages come from anybody.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shared.errors import ErrorCode, GorgonError

# Names that the request has fields for, and options of transformers that are not template variables: to pass them on as variables
# would be to ignore them.
_RESERVED = frozenset(
    {"messages", "tools", "self", "chat_template", "continue_final_message", "tokenize", "return_assistant_tokens_mask"}
)
_REASONING = ("reasoning_content", "thinking", "reasoning")
_WALKS_CONTENT = re.compile(r"\bfor\s+\w+\s+in\s+(\w+(\.content|\[['\"]content['\"]\])|content\b)")


class TemplateBroken(Exception):
    """The template itself does not compile, or there is none to choose."""


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's part for training; here it is only what is inside."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(lineno)


class _PublicNamespace(jinja2.utils.Namespace):
    """As Jinja's, but underscore names, which could lead into the interpreter, are refused."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _refuse_underscore(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"no attribute {name!r} on a namespace")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Dict:
    """`dict` without the rest of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _PublicNamespace,
    }
    return environment


class ChatTemplate:
    """A model's templates: "default", and perhaps "tool_use" for requests with tools. Thread-safe.

    special_tokens   {"bos_token": "<s>", ...}: variables of the template
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        if "default" not in templates:
            raise TemplateBroken(f"no chat template is named 'default', only {sorted(templates)}")
        environment = _environment()
        self._special_tokens = dict(special_tokens)
        self._compiled: dict[str, tuple[jinja2.Template, bool]] = {}
        for name, source in templates.items():
            try:
                self._compiled[name] = environment.from_string(source), bool(_WALKS_CONTENT.search(source))
            except jinja2.TemplateError as error:
                raise TemplateBroken(f"chat template {name!r}: {error}") from None

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt, ready for the assistant's turn unless `variables` say add_generation_prompt=False. Raises GorgonError:
        INVALID_REQUEST if the template refuses the messages, UNSUPPORTED for content that is not text."""
        variables = variables or {}
        if reserved := sorted(_RESERVED & variables.keys()):
            raise GorgonError(ErrorCode.UNSUPPORTED, f"chat_template_kwargs: {', '.join(reserved)} cannot be set there")
        name = "tool_use" if tools is not None and "tool_use" in self._compiled else "default"
        template, walks_content = self._compiled[name]
        prepared = [_prepare(message, walks_content) for message in messages]
        given = {"documents": None, "add_generation_prompt": True} | self._special_tokens | dict(variables)
        try:
            return template.render(messages=prepared, tools=tools, **given)
        except jinja2.TemplateError as error:
            message = f"the chat template refuses the messages: {error!s:.500}"
        except Exception as error:  # whatever a template does with messages that it was not written for
            message = f"the chat template cannot render the messages: {error!r:.500}"
        raise GorgonError(ErrorCode.INVALID_REQUEST, message)


def _prepare(message: Mapping[str, Any], walks_content: bool) -> dict[str, Any]:
    """A message as transformers hands it to a template: without nulls, its reasoning under each of the names in use.

    Content in parts is joined for a template that expects a string: it would print the list."""
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
        if not walks_content:
            prepared["content"] = "\n".join(part["text"] for part in content)
    return prepared
