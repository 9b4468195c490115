"""Checks JSON (RFC 8259) while it arrives in pieces, wherever they are cut."""

from __future__ import annotations

import re

MAX_NESTING = 64

_WHITESPACE = " \t\n\r"
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?\Z")
_LITERALS = ("true", "false", "null")


class Malformed(Exception):
    """The character at index `at` of the text cannot stand there."""

    def __init__(self, reason: str, at: int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.at = at


class JsonScanner:
    """One value. `scan` takes further text until `done`.

    Control characters inside strings, which models write and JSON forbids, are taken and come out escaped: what `take` has returned
    in all is valid JSON once the value is done.
    """

    def __init__(self) -> None:
        self.done = False
        self._stack: list[str] = []  # what closes each open array and object
        self._state = self._value
        self._is_key = False
        self._word = ""  # of a number or literal so far
        self._digits = 0  # of a \u escape that are still to come
        self._out: list[str] = []

    def take(self) -> str:
        """The text of the value since the last call."""
        out = "".join(self._out)
        self._out.clear()
        return out

    def scan(self, text: str, at: int) -> int:
        """The index after the value's last character, or the text's length. Raises Malformed."""
        while at < len(text) and not self.done:
            at = self._state(text, at)
        return at

    # ------------------------------------------------ states: each takes at least a character or changes the state

    def _value(self, text: str, at: int) -> int:
        char = text[at]
        if char in _WHITESPACE:
            self._out.append(char)
        elif char == '"':
            self._begin_string(is_key=False)
        elif char in "{[":
            if len(self._stack) == MAX_NESTING:
                raise Malformed(f"nested more than {MAX_NESTING} levels deep", at)
            self._out.append(char)
            self._stack.append("}" if char == "{" else "]")
            self._state = self._key_or_end if char == "{" else self._value_or_end
        elif char in "-0123456789":
            self._word, self._state = "", self._number
            return at
        elif char in "tfn":
            self._word, self._state = "", self._literal
            return at
        else:
            raise Malformed("a value was expected", at)
        return at + 1

    def _value_or_end(self, text: str, at: int) -> int:
        if text[at] == "]":
            return self._close(text, at)
        if text[at] not in _WHITESPACE:
            self._state = self._value
            return at
        self._out.append(text[at])
        return at + 1

    def _key_or_end(self, text: str, at: int) -> int:
        return self._close(text, at) if text[at] == "}" else self._key(text, at)

    def _key(self, text: str, at: int) -> int:
        char = text[at]
        if char == '"':
            self._begin_string(is_key=True)
        elif char in _WHITESPACE:
            self._out.append(char)
        else:
            raise Malformed("a key was expected", at)
        return at + 1

    def _colon(self, text: str, at: int) -> int:
        char = text[at]
        if char == ":":
            self._state = self._value
        elif char not in _WHITESPACE:
            raise Malformed("a colon was expected", at)
        self._out.append(char)
        return at + 1

    def _comma_or_end(self, text: str, at: int) -> int:
        char, closing = text[at], self._stack[-1]
        if char == closing:
            return self._close(text, at)
        if char == ",":
            self._state = self._key if closing == "}" else self._value
        elif char not in _WHITESPACE:
            raise Malformed(f"a comma or {closing!r} was expected", at)
        self._out.append(char)
        return at + 1

    def _string(self, text: str, at: int) -> int:
        match = _PLAIN.match(text, at)
        assert match is not None
        self._out.append(match[0])
        at = match.end()
        if at == len(text):
            return at
        char = text[at]
        if char == '"':
            self._out.append(char)
            if self._is_key:
                self._state = self._colon
            else:
                self._value_is_over()
        elif char == "\\":
            self._out.append(char)
            self._state = self._escape
        else:
            self._out.append(f"\\u{ord(char):04x}")
        return at + 1

    def _escape(self, text: str, at: int) -> int:
        char = text[at]
        if char == "u":
            self._digits, self._state = 4, self._hex
        elif char in '"\\/bfnrt':
            self._state = self._string
        else:
            raise Malformed(f"there is no escape \\{char}", at)
        self._out.append(char)
        return at + 1

    def _hex(self, text: str, at: int) -> int:
        if text[at] not in "0123456789abcdefABCDEF":
            raise Malformed("four hexadecimal digits were expected", at)
        self._out.append(text[at])
        self._digits -= 1
        if not self._digits:
            self._state = self._string
        return at + 1

    def _number(self, text: str, at: int) -> int:
        char = text[at]
        if char in "+-.eE0123456789":
            self._word += char
            self._out.append(char)
            return at + 1
        if not _NUMBER.match(self._word):
            raise Malformed("no number", at)
        self._value_is_over()
        return at

    def _literal(self, text: str, at: int) -> int:
        self._word += text[at]
        if not any(literal.startswith(self._word) for literal in _LITERALS):
            raise Malformed("true, false or null was expected", at)
        self._out.append(text[at])
        if self._word in _LITERALS:
            self._value_is_over()
        return at + 1

    # ------------------------------------------------

    def _begin_string(self, is_key: bool) -> None:
        self._out.append('"')
        self._is_key = is_key
        self._state = self._string

    def _close(self, text: str, at: int) -> int:
        self._out.append(text[at])
        self._stack.pop()
        self._value_is_over()
        return at + 1

    def _value_is_over(self) -> None:
        if self._stack:
            self._state = self._comma_or_end
        else:
            self.done = True
