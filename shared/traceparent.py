"""W3C trace context as a string, `00-<trace id>-<parent span id>-<flags>` (https://www.w3.org/TR/trace-context/, version 00)."""

from __future__ import annotations

import re
import secrets
from typing import NamedTuple

_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?\Z")
SAMPLED = 0x01


class TraceContext(NamedTuple):
    """trace_id: 32 hexadecimal digits; span_id: 16, of the parent of what follows; flags: bit 0 is "sampled"."""

    trace_id: str
    span_id: str
    flags: int = SAMPLED

    def __str__(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}"

    @property
    def sampled(self) -> bool:
        return bool(self.flags & SAMPLED)


def parse(traceparent: str) -> TraceContext | None:
    """None for what is no valid trace context: the specification has it ignored."""
    match = _FORM.match(traceparent)
    if match is None:
        return None
    version, trace_id, span_id, flags = match.groups()
    # Later versions may append fields, version 00 may not; ff and all-zero ids are invalid.
    if version == "ff" or (version == "00" and len(traceparent) != 55) or not int(trace_id, 16) or not int(span_id, 16):
        return None
    return TraceContext(trace_id, span_id, int(flags, 16))


def generate() -> TraceContext:
    """The root of a new trace."""
    return TraceContext(secrets.token_hex(16), secrets.token_hex(8))


def trace_id_of(traceparent: str) -> str:
    """Its trace id, "" if there is none."""
    context = parse(traceparent) if traceparent else None
    return "" if context is None else context.trace_id
