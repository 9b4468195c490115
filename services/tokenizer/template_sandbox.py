"""Where a chat template runs: as in transformers (utils/chat_template_utils.py), because templates are written for it, but within
bounds of time and output.

It is a sandbox, since a template comes with the weights; and bounded, since the messages come from anybody: with Mistral's template a
request of 4 MiB can ask for minutes of work and hundreds of megabytes of prompt (all tools again at each of many equal messages).
"""

from __future__ import annotations

import json
import operator
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

_LOOKS_BETWEEN_CLOCKS = 64
_LARGEST_POWER = 64
_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "*": operator.mul,
    "**": operator.pow,
    "%": operator.mod,
}


class TooMuchTime(Exception):
    """Rendering took more CPU time than it was given."""


class TooMuchText(Exception):
    """The text, or a part of it, is longer than allowed."""


class Bounds(threading.local):
    """What the rendering that is going on in this thread may still use. Without one, nothing is bounded."""

    def __init__(self) -> None:
        self.until = float("inf")  # of the thread's CPU time
        self.chars = 2**63  # of the text, or of one string on the way to it
        self._looks = 0

    @contextmanager
    def set(self, seconds: float, chars: int) -> Iterator[None]:
        self.until, self.chars = time.thread_time() + seconds, chars
        try:
            yield
        finally:
            self.until, self.chars = float("inf"), 2**63

    def look(self) -> None:
        """Called wherever a template can loop. CPU time, so that a busy machine refuses nobody."""
        self._looks += 1
        if self._looks >= _LOOKS_BETWEEN_CLOCKS:
            self._looks = 0
            if time.thread_time() > self.until:
                raise TooMuchTime

    def check_size(self, size: int) -> None:
        if size > self.chars:
            raise TooMuchText


bounds = Bounds()


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
    """Jinja's own escapes HTML. With an indentation deep nesting becomes long: it is written in pieces, and not to the end."""
    if indent is None:
        return json.dumps(value, ensure_ascii=ensure_ascii, separators=separators, sort_keys=sort_keys)
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    pieces, size = [], 0
    for piece in encoder.iterencode(value):
        bounds.look()
        size += len(piece)
        bounds.check_size(size)
        pieces.append(piece)
    return "".join(pieces)


class _Dict:
    """`dict` without the rest of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Environment(ImmutableSandboxedEnvironment):
    """Looks at the bounds at each access to the messages, each call and each operation that can make much of little."""

    intercepted_binops = frozenset(_OPERATORS)

    def getattr(self, obj: Any, attribute: str) -> Any:
        bounds.look()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        bounds.look()
        return super().getitem(obj, argument)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        bounds.look()
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        bounds.look()
        if operator == "*":
            for one, times in ((left, right), (right, left)):
                if isinstance(one, (str, list, tuple)) and isinstance(times, int):
                    bounds.check_size(len(one) * times)
        elif operator == "**" and not (abs(left) < 2**32 and abs(right) < _LARGEST_POWER):
            raise TooMuchText
        elif operator == "%" and isinstance(left, str) and len(left) > 2 and any(c.isdigit() or c == "*" for c in left):
            raise jinja2.exceptions.SecurityError("no widths in formats")
        result = _OPERATORS[operator](left, right)
        if isinstance(result, (str, list, tuple)):
            bounds.check_size(len(result))
        return result


def new_environment() -> ImmutableSandboxedEnvironment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    del environment.globals["lipsum"]
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _PublicNamespace,
    }
    return environment
