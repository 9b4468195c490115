"""Ids of server-sent events. Each says which request the event belongs to and how much of every choice the client has once it has read
it, so that `Last-Event-ID` alone is enough to go on, at any gateway:

    <request id>~<creation time, hex>~<choice>.<tokens>.<characters>[f]~…[~x<format>][~u]

`f`: the choice's last chunk was among them; `u`: the usage was; `x`: how the model writes its tool calls, if they are looked for.
A call of several prompts has one id, whose requests are called <id>-0, <id>-1, …
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from services.gateway.errors import refused
from shared.tool_calls import MARKERS

_ID = re.compile(r"[0-9a-f]{32}\Z")
_CHOICE = re.compile(r"(\d{1,6})\.(\d{1,9})\.(\d{1,9})(f?)\Z")


@dataclass(slots=True)
class Progress:
    """How much of a choice the client has: tokens and characters, and whether it knows that the choice has ended."""

    position: int = 0
    offset: int = 0
    finished: bool = False


@dataclass(slots=True)
class Cursor:
    base: str
    created: int
    choices: dict[int, Progress] = field(default_factory=dict)
    usage_sent: bool = False
    tool_format: str | None = None
    _head: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._head = f"{self.base}~{self.created:x}"

    def __str__(self) -> str:
        text = self._head
        for index, at in self.choices.items():
            text += f"~{index}.{at.position}.{at.offset}{'f' if at.finished else ''}"
        if self.tool_format is not None:
            text += f"~x{self.tool_format}"
        return text + "~u" if self.usage_sent else text


def parse_cursor(text: str) -> Cursor:
    """Raises ApiError 400."""
    base, _, rest = text.partition("~")
    created, *parts = rest.split("~")
    try:
        if not _ID.match(base) or len(created) > 12:
            raise ValueError
        cursor = Cursor(base, int(created, 16))
        if parts and parts[-1] == "u":
            cursor.usage_sent = True
            parts.pop()
        if parts and parts[-1][:1] == "x":
            cursor.tool_format = parts.pop()[1:]
            if cursor.tool_format and cursor.tool_format not in MARKERS:
                raise ValueError
        for part in parts:
            match = _CHOICE.match(part)
            if match is None:
                raise ValueError
            index, position, offset, finished = match.groups()
            cursor.choices[int(index)] = Progress(int(position), int(offset), bool(finished))
    except ValueError:
        raise refused("Last-Event-ID: not an id of this API's events", "Last-Event-ID") from None
    return cursor
