"""Tool calls as a client sees them: the format of the calls comes with the `accepted` event, which the text may overtake."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.tool_calls import MARKERS, Parsed, ToolCall, ToolCallDelta, ToolCallParser


class CallReader:
    """Content and calls of one choice. `whole` False: its beginning is not here, so calls cannot be told from text."""

    def __init__(self, request_id: str, choice: int, whole: bool = True) -> None:
        self._request_id = request_id
        self._choice = choice
        self._whole = whole
        self._parser: ToolCallParser | None = None
        self._unread = ""  # came before the format was known

    def feed(self, text: str, tool_format: str | None) -> Parsed:
        """What the further text says. `tool_format`: None if it is not known yet, "" if no calls are to be looked for."""
        if tool_format == "" or not self._whole:
            return Parsed(text)
        self._unread += text
        if tool_format not in MARKERS:
            return Parsed("")
        if self._parser is None:
            self._parser = ToolCallParser(tool_format, self._request_id, self._choice)
        text, self._unread = self._unread, ""
        return self._parser.feed(text)

    def finish(self, end: Mapping[str, Any]) -> Parsed:
        """What has not been told yet. `end` is the choice's part of the `finished` event, {} if there is none: it says what the text
        says where `accepted` was lost, or named a format that is not known here."""
        if self._parser is not None:
            return self._parser.finish()
        unread, self._unread = self._unread, ""
        if not unread:
            return Parsed("")
        calls = (ToolCallDelta(i, c.id, c.name, c.arguments, c.error) for i, c in enumerate(calls_of(end)))
        return Parsed(end.get("content", unread), tuple(calls))


def calls_of(end: Mapping[str, Any]) -> list[ToolCall]:
    """Of a choice's part of the `finished` event."""
    return [ToolCall(c["id"], c["name"], c["arguments"], c.get("error")) for c in end.get("tool_calls", ())]
