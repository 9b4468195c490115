"""What a client saw of a stream, held against the uninterrupted run. Pure: no network, no clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

STALLED = "stalled"  # how a stream ended that did not end in time
TERMINAL = frozenset({"finished", "cancelled", "error"})
# Answers about a request rather than the end of it: the client asks or sends again.
PASSING_ERRORS = frozenset({"not_found", "unavailable", "overloaded"})

# How a stream may end, by kind. A cancel and a deadline may come too late.
ENDS = {
    "plain": frozenset({"finished"}),
    "attached": frozenset({"finished"}),
    "durable": frozenset({"finished"}),
    "cancelled": frozenset({"cancelled", "finished"}),
    "deadline": frozenset({"deadline_exceeded", "finished"}),
}


@dataclass
class Record:
    """A stream as its client saw it.

    end           "finished", "cancelled", an error's code, or STALLED
    ids, text     by choice, as folded
    finishes      by choice (finish reason, stop); of a finished stream only
    events        as they came, duplicates and replays included
    longest_gap   seconds between two tokens events
    """

    id: str
    kind: str
    request: str
    end: str = STALLED
    ids: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    finishes: dict[int, tuple[str | None, str | int | None]] = field(default_factory=dict)
    completion_tokens: int | None = None
    events: list[dict[str, Any]] = field(default_factory=list)
    longest_gap: float = 0.0


@dataclass(frozen=True)
class Reference:
    """The uninterrupted run: ids, text and how it ended, by choice."""

    ids: Mapping[int, list[int]]
    text: Mapping[int, str]
    finishes: Mapping[int, tuple[str | None, str | int | None]]

    @classmethod
    def of(cls, record: Record) -> Reference:
        return cls(record.ids, record.text, record.finishes)


Check = Callable[[Record], list[str]]


def check(record: Record, reference: Reference) -> list[str]:
    """What is wrong with the stream; empty if nothing is."""
    wrong = check_end(record)
    for choice, ids in record.ids.items():
        wrong += _differs(f"choice {choice}: ids", ids, reference.ids.get(choice, []))
    for choice, text in record.text.items():
        wrong += _differs(f"choice {choice}: text", text, reference.text.get(choice, ""))
    if record.end == "finished":
        for name in ("ids", "text", "finishes"):
            if _without_empty(getattr(record, name)) != _without_empty(getattr(reference, name)):
                wrong.append(f"finished, but not with the {name} of the reference")
    for event in record.events:
        wrong += _check_event(event, reference)
    return wrong


def check_end(record: Record) -> list[str]:
    """The stream ended, as its kind may, in one terminal event; usage counts what came."""
    wrong = []
    if record.end not in ENDS[record.kind]:
        wrong.append(f"ended as {record.end!r}")
    terminals = {
        (e["event"], e.get("code"))
        for e in record.events
        if e["event"] in TERMINAL and e.get("code") not in PASSING_ERRORS
    }
    if record.end != STALLED and len(terminals) != 1:
        wrong.append(f"terminal events: {sorted(map(str, terminals))}")
    seen = sum(map(len, record.ids.values()))
    if record.completion_tokens is not None and record.completion_tokens != seen:
        wrong.append(f"usage says {record.completion_tokens} tokens, {seen} came")
    return wrong


def check_stored(record: Record) -> list[str]:
    """The stored events of a durable request: `accepted` first, each position and character once and in order, one terminal, last."""
    wrong = []
    names = [event["event"] for event in record.events]
    if names[:1] != ["accepted"] or names.count("accepted") != 1:
        wrong.append(f"stored first: {names[:2]}, accepted {names.count('accepted')} times")
    if [name for name in names if name in TERMINAL] != names[-1:]:
        wrong.append(
            f"stored terminal events: {[(at, n) for at, n in enumerate(names) if n in TERMINAL]} of {len(names)}"
        )
    position: dict[int, int] = {}
    offset: dict[int, int] = {}
    for event in record.events:
        if event["event"] == "tokens":
            choice = event["choice"]
            due = position.get(choice, 0), offset.get(choice, 0)
            if (event["position"], event["offset"]) != due:
                wrong.append(f"stored at {event['position']}, {event['offset']}; due was {due}")
            position[choice] = event["position"] + len(event["ids"])
            offset[choice] = event["offset"] + len(event["text"])
    return wrong


def _check_event(event: dict[str, Any], reference: Reference) -> list[str]:
    """Every event says what the reference says, whether or not the client needed it."""
    if event["event"] == "tokens":
        choice, position, offset = event["choice"], event["position"], event["offset"]
        ids, text = reference.ids.get(choice, []), reference.text.get(choice, "")
        if event["ids"] != ids[position : position + len(event["ids"])]:
            return [f"an event with other ids at {choice}/{position}: {event['ids'][:8]}"]
        if event["text"] != text[offset : offset + len(event["text"])]:
            return [f"an event with other text at {choice}/{offset}: {event['text'][:40]!r}"]
    if event["event"] == "finished":
        for end in event["choices"]:
            choice = end["choice"]
            if (end["tokens"], end["chars"]) != (len(reference.ids[choice]), len(reference.text[choice])):
                return [f"finished with {end['tokens']} tokens and {end['chars']} characters"]
    return []


def _differs(what: str, got: list[int] | str, expected: list[int] | str) -> list[str]:
    """Whether `got` is no prefix of `expected`."""
    if expected[: len(got)] == got:
        return []
    at = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), len(expected))
    return [f"{what} differ at {at} of {len(got)}: {got[at : at + 8]!r}, not {expected[at : at + 8]!r}"]


def _without_empty(by_choice: Mapping[int, Any]) -> dict[int, Any]:
    return {choice: value for choice, value in by_choice.items() if value}
