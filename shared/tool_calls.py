"""Tool calls in a model's text, found while it streams.

Models write calls in the format that they were trained on; the chat template shows which:

    hermes   <tool_call>{"name": "f", "arguments": {…}}</tool_call>             Hermes, Qwen 2.5 and 3, SmolLM3
    llama3   {"name": "f", "parameters": {…}}, also after <|python_tag|>        Llama 3.1 and later; several are separated by ";"
    mistral  [TOOL_CALLS][{"name": "f", "arguments": {…}}, …]                   Mistral up to tokenizer v7
             [TOOL_CALLS]f[ARGS]{…}, [TOOL_CALLS]f[CALL_ID]x[ARGS]{…}           Mistral from tokenizer v11 on

However the text is cut into pieces, the calls and the text around them come out the same. Nothing is lost: what turns out to be no
call comes out as text; a call whose arguments were already on their way when it broke is marked by `error`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from shared.json_stream import JsonScanner, Malformed

# Special tokens by which each format marks its calls: a detokenizer has to show them to whoever looks for calls.
MARKERS: dict[str, tuple[str, ...]] = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "llama3": ("<|python_tag|>",),
    "mistral": ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
}
FORMATS = tuple(MARKERS)
# The same, but only the first call is one: what follows it is text.
_SINGLE = "-single"
SINGLE = {format: format + _SINGLE for format in FORMATS}
MARKERS |= {SINGLE[format]: MARKERS[format] for format in FORMATS}

_ARGUMENTS = ("arguments", "parameters")
_KEYS = frozenset({"name", "type", "id", *_ARGUMENTS})
_WHITESPACE = " \t\n\r"
_BRACKET = re.compile(r"[{[]")
_NAME = re.compile(r"[A-Za-z0-9_.:/-]+")
_MAX_NAME = 256  # characters
_ID_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_ID_LENGTH = 9  # Mistral's templates take no other


class ToolCall(NamedTuple):
    """`arguments` is JSON text of an object, unless `error` says why the call broke off."""

    id: str
    name: str
    arguments: str
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """What is new of the call number `index`. `name` comes with its first delta only, `error` with its last if it broke."""

    index: int
    id: str
    name: str | None
    arguments: str
    error: str | None = None


class Parsed(NamedTuple):
    """`content` is text that is not part of a call."""

    content: str
    calls: tuple[ToolCallDelta, ...] = ()


def call_id(request_id: str, choice: int, index: int) -> str:
    """The same for everybody who parses the same stream: nine letters and digits."""
    number = int.from_bytes(hashlib.blake2b(f"{request_id}.{choice}.{index}".encode(), digest_size=8).digest())
    letters = []
    for _ in range(_ID_LENGTH):
        number, at = divmod(number, len(_ID_LETTERS))
        letters.append(_ID_LETTERS[at])
    return "".join(letters)


class ToolCallParser:
    """The calls of one choice. Raises ValueError for a format that is none of FORMATS or SINGLE's.

        parser = ToolCallParser("hermes", request_id, choice)
        for text in pieces:
            content, calls = parser.feed(text)
        content, calls = parser.finish()
        parser.calls    # all of them, complete

    Whitespace next to calls belongs to the format: of the content's end it is left out if there are calls.
    """

    def __init__(self, format: str, request_id: str = "", choice: int = 0) -> None:
        if format not in MARKERS:
            raise ValueError(f"no tool call format {format!r}: one of {', '.join(MARKERS)}")
        self._single = format.endswith(_SINGLE)
        self._format = format.removesuffix(_SINGLE)
        self._opener = MARKERS[format][0]
        self._request_id = request_id
        self._choice = choice
        self._state: Callable[[str, int], int] = self._text
        self._held = ""  # text that may be the beginning of a marker
        self._raw: list[str] = []  # since the last content or call: content, if it is no call
        self._settled = False  # what was read up to here is of a call: it will not be shown
        self._marked = False  # an opener introduced what is being read
        self._in_list = False
        self._name = ""  # what stands before the arguments (mistral)
        self._call: _ObjectScanner | None = None
        self._arguments: JsonScanner | None = None  # of a call whose name stands before them
        self._open: list[str] | None = None  # arguments of the call whose name is known
        self._calls: list[ToolCall] = []
        self._content: list[str] = []
        self._deltas: list[ToolCallDelta] = []
        self._space = ""  # of the content: shown when more content follows
        self._last = ""  # character of the content, to know where a line begins
        self._blank = True  # so far there was nothing but whitespace

    @property
    def _full(self) -> bool:
        return self._single and bool(self._calls)

    @property
    def calls(self) -> list[ToolCall]:
        """Those that are over, in order."""
        return list(self._calls)

    def feed(self, text: str) -> Parsed:
        """What the further text adds."""
        text, self._held = self._held + text, ""
        at = 0
        while at < len(text):
            before, state = at, self._state
            try:
                at = state(text, at)
            except Malformed as error:
                at = error.at
                self._raw.append(text[before:at])
                self._give_up(error.reason)
                continue
            if state != self._text:
                self._raw.append(text[before:at])
            if self._settled:
                self._raw.clear()
                self._settled = self._open is not None
            if state == self._state and at == before:
                self._held = text[at:]
                break
        return self._take()

    def finish(self) -> Parsed:
        """What was held back: the text is over."""
        self._raw.append(self._held)
        self._held = ""
        self._give_up("the text ended inside the call")
        if not self._calls:
            self._content.append(self._space)
        self._space = ""
        return self._take()

    # ------------------------------------------------ what comes out

    def _take(self) -> Parsed:
        content, deltas = "".join(self._content), self._deltas
        self._content, self._deltas = [], []
        merged: dict[int, ToolCallDelta] = {}
        for delta in deltas:
            first = merged.get(delta.index)
            merged[delta.index] = (
                delta
                if first is None
                else replace(first, arguments=first.arguments + delta.arguments, error=delta.error)
            )
        return Parsed(content, tuple(merged.values()))

    def _show(self, text: str) -> None:
        if not text:
            return
        self._last = text[-1]
        shown = self._space + text
        self._space = shown[len(shown.rstrip(_WHITESPACE)) :]
        if shown := shown[: len(shown) - len(self._space)]:
            self._blank = False
            self._content.append(shown)

    def _give_up(self, reason: str) -> None:
        """Back to text: what was read is no call, or a broken one."""
        self._pass_on()
        if self._open is not None:
            self._close_call(reason)
        else:
            self._show("".join(self._raw))
        self._raw.clear()
        self._settled = False
        self._to_text()

    def _to_text(self) -> None:
        self._call = self._arguments = None
        self._marked = self._in_list = False
        self._name = ""
        self._state = self._text

    # ------------------------------------------------ calls

    def _pass_on(self) -> None:
        """Arguments that have been read."""
        if self._call is not None and self._call.begun:
            if self._open is None:
                assert self._call.name is not None
                self._open_call(self._call.name)
            self._argue(self._call.take())
        elif self._arguments is not None:
            self._argue(self._arguments.take())

    def _open_call(self, name: str) -> None:
        self._name = name
        self._open = []
        self._settled = True
        self._blank, self._last = False, "}"
        self._deltas.append(ToolCallDelta(len(self._calls), self._call_id(), name, ""))

    def _argue(self, text: str) -> None:
        assert self._open is not None
        if text:
            self._open.append(text)
            self._deltas.append(ToolCallDelta(len(self._calls), self._call_id(), None, text))

    def _call_id(self) -> str:
        return call_id(self._request_id, self._choice, len(self._calls))

    def _close_call(self, error: str | None = None) -> None:
        assert self._open is not None
        if error is not None:
            self._deltas.append(ToolCallDelta(len(self._calls), self._call_id(), None, "", error))
        self._calls.append(ToolCall(self._call_id(), self._name, "".join(self._open), error))
        self._open = self._call = self._arguments = None

    # ------------------------------------------------ states: each takes text from `at` on and returns how far it came

    def _text(self, text: str, at: int) -> int:
        if self._full:
            self._show(text[at:])
            return len(text)
        found, is_whole = _find(self._opener, text, at)
        bare = self._find_bare(text, at, found) if self._format == "llama3" else None
        if bare is not None:
            found, is_whole = bare, False
        self._show(text[at:found])
        if is_whole:
            self._raw.append(self._opener)
            found += len(self._opener)
        if is_whole or bare is not None:
            self._marked = is_whole
            self._state = self._before
        return found

    def _find_bare(self, text: str, begin: int, end: int) -> int | None:
        """Where a call without an opener may begin: where a line does, and after blanks if nothing stands before them."""
        for match in _BRACKET.finditer(text, begin, end):
            before = text[begin : match.start()]
            if (before or self._last).endswith("\n") or (self._blank and not before.strip(_WHITESPACE)):
                return match.start()
        return None

    def _before(self, text: str, at: int) -> int:
        char = text[at]
        if char == "{":
            self._call = _ObjectScanner(strict=not self._marked)
            self._state = self._object
            return at
        if char == "[" and not self._in_list:
            self._in_list = True
        elif self._format == "mistral" and not self._in_list and _NAME.match(char):
            self._state = self._name_first
            return at
        elif char not in _WHITESPACE:
            raise Malformed("no call", at)
        return at + 1

    def _object(self, text: str, at: int) -> int:
        assert self._call is not None
        at = self._call.scan(text, at)
        self._pass_on()
        if self._call.done:
            self._close_call()
            self._state = self._after
        return at

    def _after(self, text: str, at: int) -> int:
        """After a call: more of them, or the end of their part of the text."""
        char = text[at]
        if char in _WHITESPACE:
            return at + 1
        if self._in_list:
            return self._after_in_list(text, at)
        if self._format == "hermes":
            closer = MARKERS["hermes"][1]
            found, is_whole = _find(closer, text, at)
            if found == at and not is_whole:
                return at
            if found == at:
                self._to_text()
                self._settled = True
                return at + len(closer)
        if self._full:
            raise Malformed("one call too many", at)
        if self._format == "llama3" and char in ";,":
            self._state = self._before_next
            return at + 1
        if char == "{" and self._format != "mistral":
            self._state = self._before
            return at
        raise Malformed("no call", at)

    def _after_in_list(self, text: str, at: int) -> int:
        if self._full and text[at] != "]":
            raise Malformed("one call too many", at)
        if text[at] == "]":
            self._in_list = False
            self._settled = True
        elif text[at] == ",":
            self._state = self._before_next
        else:
            raise Malformed("no call", at)
        return at + 1

    def _before_next(self, text: str, at: int) -> int:
        if text[at] == "{":
            self._state = self._before
            return at
        if text[at] not in _WHITESPACE:
            raise Malformed("no call", at)
        return at + 1

    def _name_first(self, text: str, at: int) -> int:
        """`f[ARGS]{…}`, `f[CALL_ID]x[ARGS]{…}`, `f{…}`"""
        match = _NAME.match(text, at)
        if match is not None:
            self._name += match[0]
            if len(self._name) > _MAX_NAME:
                raise Malformed("no name", at)
            return match.end()
        if text[at] == "{":
            self._state = self._before_arguments
            return at
        for tag in MARKERS["mistral"][1:]:
            found, is_whole = _find(tag, text, at)
            if found == at and is_whole:
                self._state = self._before_arguments if tag == "[ARGS]" else self._model_id
                return at + len(tag)
            if found == at:
                return at
        raise Malformed("no call", at)

    def _model_id(self, text: str, at: int) -> int:
        """The model's own id of the call: ours takes its place."""
        found, is_whole = _find("[ARGS]", text, at)
        match = _NAME.match(text, at)
        end = match.end() if match is not None else at
        if end < found:
            raise Malformed("no call", end)
        if is_whole:
            self._state = self._before_arguments
            return found + len("[ARGS]")
        return found

    def _before_arguments(self, text: str, at: int) -> int:
        if text[at] in _WHITESPACE:
            return at + 1
        if text[at] != "{":
            raise Malformed("no arguments", at)
        self._arguments = JsonScanner()
        self._open_call(self._name)
        self._state = self._arguments_last
        return at

    def _arguments_last(self, text: str, at: int) -> int:
        assert self._arguments is not None
        at = self._arguments.scan(text, at)
        self._pass_on()
        if self._arguments.done:
            self._close_call()
            self._to_text()
        return at


def parse(format: str, text: str, request_id: str = "", choice: int = 0) -> tuple[str, list[ToolCall]]:
    """(content, calls) of a text that is complete."""
    parser = ToolCallParser(format, request_id, choice)
    content = parser.feed(text).content + parser.finish().content
    return content, parser.calls


def _find(marker: str, text: str, at: int) -> tuple[int, bool]:
    """Where the whole marker stands, or else what may be its beginning at the end of the text, or else the text's end."""
    found = text.find(marker, at)
    if found >= 0:
        return found, True
    for length in range(min(len(text) - at, len(marker) - 1), 0, -1):
        if text.endswith(marker[:length]):
            return len(text) - length, False
    return len(text), False


class _ObjectScanner:
    """`{"name": …, "arguments": {…}}`, with the keys in any order and perhaps others among them.

    strict   for text that nothing marks as a call: both keys must be there, and the first key must be one of a call's
    begun    name and beginning of the arguments are known: it is a call, though it may still break
    """

    def __init__(self, strict: bool) -> None:
        self.name: str | None = None
        self.begun = False
        self.done = False
        self._strict = strict
        self._expected = "{"  # "{", "key", "key or }", ":", "value", ", or }"
        self._key: str | None = None
        self._seen: set[str] = set()
        self._scanner: JsonScanner | None = None
        self._word: list[str] = []  # key or value that is read whole
        self._has_arguments = self._streaming = False
        self._out: list[str] = []

    def take(self) -> str:
        """Text of the arguments since the last call. Only what has `begun` is asked."""
        out = "".join(self._out)
        self._out.clear()
        return out

    def scan(self, text: str, at: int) -> int:
        """The index after the object, or the text's length. Raises Malformed."""
        while at < len(text) and not self.done:
            if self._scanner is not None:
                at = self._scan_string_or_value(text, at)
            elif text[at] in _WHITESPACE:
                at += 1
            else:
                at = self._step(text, at)
        return at

    def _step(self, text: str, at: int) -> int:
        char, expected = text[at], self._expected
        if expected == "{" and char == "{":
            self._expected = "key or }"
        elif expected in ("key", "key or }") and char == '"':
            self._key, self._scanner = None, JsonScanner()
            return at
        elif expected == ":" and char == ":":
            self._expected = "value"
        elif expected == "value":
            self._begin_value(char, at)
            return at
        elif expected == ", or }" and char == ",":
            self._expected = "key"
        elif expected in (", or }", "key or }") and char == "}":
            self._end(at)
        else:
            raise Malformed(f"{expected} was expected", at)
        return at + 1

    def _begin_value(self, char: str, at: int) -> None:
        if self._key == "name" and char != '"':
            raise Malformed("the name is no string", at)
        if self._key in _ARGUMENTS:
            if char not in '{"n':
                raise Malformed("the arguments are no object", at)
            self._streaming = char == "{"
            if self._streaming:
                self._has_arguments = True
                self.begun = self.name is not None
        self._scanner = JsonScanner()

    def _scan_string_or_value(self, text: str, at: int) -> int:
        assert self._scanner is not None
        try:
            at = self._scanner.scan(text, at)
        finally:
            (self._out if self._streaming else self._word).append(self._scanner.take())
        if self._scanner.done:
            self._scanner = None
            word = "".join(self._word)
            self._word.clear()
            if self._key is None:
                self._end_key(word, at)
            else:
                self._end_value(word, at)
        return at

    def _end_key(self, word: str, at: int) -> None:
        key: str = json.loads(word)
        if self._strict and not self._seen and key not in _KEYS:
            raise Malformed("no key of a call", at)
        kind = "arguments" if key in _ARGUMENTS else key
        if kind in self._seen:
            raise Malformed("a key occurs twice", at)
        self._seen.add(kind)
        self._key, self._expected = key, ":"

    def _end_value(self, word: str, at: int) -> None:
        self._expected = ", or }"
        if self._streaming:
            self._streaming = False
        elif self._key == "name":
            self.name = json.loads(word)
            assert self.name is not None
            if not 0 < len(self.name) <= _MAX_NAME or not _is_text(self.name):
                raise Malformed("no name", at)
            self.begun = self._has_arguments
        elif self._key in _ARGUMENTS:
            self._out.append(_object_in(word, at))
            self._has_arguments = True
            self.begun = self.name is not None

    def _end(self, at: int) -> None:
        if self.name is None or (self._strict and not self._has_arguments):
            raise Malformed("name or arguments are missing", at)
        if not self._has_arguments:
            self._out.append("{}")
            self.begun = True
        self.done = True


def _object_in(word: str, at: int) -> str:
    """Arguments that were written as null, or as a string of JSON."""
    inner = json.loads(word)
    if inner is None:
        return "{}"
    scanner = JsonScanner()
    end = scanner.scan(inner, 0) if inner.startswith("{") else 0
    if not scanner.done or inner[end:].strip(_WHITESPACE) or not _is_text(inner):
        raise Malformed("the arguments are no object", at)
    return scanner.take()


def _is_text(text: str) -> bool:
    """Not so with lone surrogates, which JSON can escape."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
