"""The checker itself: it accepts what is right and names what is wrong."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest

from services.model_worker.settings import FixedEngineSettings
from shared.api import cancelled_event, finished_event, tokens_event
from tests.chaos.checker import Record, Reference, check, check_stored
from tests.chaos.faults import USUAL, faults
from tests.chaos.lossy_link import Frames
from tests.chaos.mutants.model_worker import mixed_at
from tests.chaos.report import Goal

IDS = [5, 6, 7, 8]
TEXT = "abcdefgh"
REFERENCE = Reference({0: IDS}, {0: TEXT}, {0: ("length", None)})
CHOICES = [dict(choice=0, finish_reason="length", stop=None, tokens=4, chars=8)]
FINISHED = finished_event("r", CHOICES, prompt_tokens=1, completion_tokens=4, timings={}, metadata={})
TOLD = [{"choice": 0, "tokens": 2, "chars": 4}]
CANCELLED = cancelled_event("r", prompt_tokens=1, completion_tokens=2, metadata={}, choices=TOLD)


def tokens(position: int, count: int) -> dict[str, Any]:
    at = 2 * position
    return tokens_event("r", 0, position, IDS[position : position + count], TEXT[at : at + 2 * count], at)


def whole(kind: str = "plain") -> Record:
    events = [dict(event="accepted", id="r"), tokens(0, 2), tokens(2, 2), FINISHED]
    return Record("r", kind, "q", "finished", {0: list(IDS)}, {0: TEXT}, {0: ("length", None)}, 4, events)


def part(kind: str = "cancelled", end: str = "cancelled") -> Record:
    return Record("r", kind, "q", end, {0: IDS[:2]}, {0: TEXT[:4]}, {}, 2, [tokens(0, 2), CANCELLED])


def test_right_streams() -> None:
    for kind in ("plain", "durable", "cancelled", "deadline", "attached"):
        assert check(whole(kind), REFERENCE) == []
    assert check(part(), REFERENCE) == []
    assert check_stored(whole("durable")) == []


def test_duplicates_and_replays_are_harmless() -> None:
    record = whole()
    record.events += [tokens(1, 3), FINISHED, dict(event="error", code="not_found", id="r")]
    assert check(record, REFERENCE) == []


@pytest.mark.parametrize(
    "wrong",
    [
        replace(whole(), ids={0: [5, 6, 8, 8]}),
        replace(whole(), ids={0: [5, 6, 7]}, completion_tokens=3),
        replace(whole(), ids={0: [5, 6, 6, 7, 8]}, completion_tokens=5),
        replace(whole(), ids={0: IDS, 1: [5]}, completion_tokens=5),
        replace(whole(), text={0: "abcdefg"}),
        replace(whole(), finishes={0: ("stop", None)}),
        replace(whole(), completion_tokens=5),
        replace(whole(), events=[*whole().events, CANCELLED]),
        replace(whole(), events=whole().events[:-1]),
        replace(whole(), events=[*whole().events, tokens(1, 1) | dict(ids=[9])]),
        replace(whole(), events=[*whole().events, tokens(1, 1) | dict(offset=3)]),
        replace(whole(), end="stalled"),
        replace(whole(), end="internal"),
        part(kind="plain"),
        part(kind="deadline"),
        replace(part(), ids={0: [5, 7]}),
    ],
)
def test_wrong_streams(wrong: Record) -> None:
    assert check(wrong, REFERENCE)


@pytest.mark.parametrize(
    "events",
    [
        whole().events[1:],
        [whole().events[0], *whole().events],
        [*whole().events, FINISHED],
        [*whole().events, tokens(0, 1)],
        whole().events[:-1],
        [whole().events[0], tokens(0, 2), tokens(1, 3), FINISHED],
        [whole().events[0], tokens(2, 2), FINISHED],
    ],
)
def test_wrong_results(events: list[dict[str, Any]]) -> None:
    assert check_stored(replace(whole("durable"), events=events))


def test_mixed_epochs_show() -> None:
    from services.model_worker.interface import EngineRequest
    from shared.sampling import SamplingParams
    from tests.chaos.mutants.model_worker import EpochSequence

    settings = FixedEngineSettings.model_validate({})
    params = SamplingParams(max_tokens=100, seed=3)

    def generate(epoch: int, prefix: list[int], count: int) -> list[int]:
        sequence = EpochSequence(EngineRequest("", 0, epoch, [1, 2], params, prefix), (0, 0), settings)
        return prefix + [sequence.next_token(settings) for _ in range(count)]

    first = generate(1, [], 30)
    second = generate(2, first[:20], 30)
    assert mixed_at([1, 2], 3, first, settings) is None
    assert mixed_at([1, 2], 3, second, settings) is None
    assert mixed_at([1, 2], 3, first + second[30:], settings) is not None, "the dead one's tokens, and then the other's"


def test_a_plan_is_its_seed() -> None:
    plan, again = (list(islice(faults(random.Random(5), 0.8, 2), 400)) for _ in range(2))
    assert plan == again
    assert sum(fault.after for fault in plan) < 400 * 0.8 * 1.2
    assert {(f.target.rsplit("-", 1)[0], f.kind) for f in plan} == set(USUAL)
    assert sum(not f.after for f in plan) > 30, "two at once"


def cut(data: bytes, sizes: list[int]) -> list[tuple[bytes, bool]]:
    frames, found = Frames(), []
    for size in sizes:
        found += list(frames.feed(data[:size]))
        data = data[size:]
    return found + list(frames.feed(data))


def test_the_lossy_link_cuts_the_protocol_into_frames() -> None:
    """However the bytes come, and whatever a payload looks like."""
    whole = [
        (b'INFO {"jetstream":true}\r\n', False),
        (b"SUB a.* 1\r\n", False),
        (b"MSG a.b 1 11\r\nPING\r\nMSG \r\r\n", True),
        (b"HPUB a.b reply 12 14\r\nNATS/1.0\r\n\r\nhi\r\n", True),
        (b"PUB x 0\r\n\r\n", True),
        (b"PONG\r\n", False),
    ]
    data = b"".join(frame for frame, _ in whole)
    for step in (1, 2, 7, len(data)):
        assert cut(data, [step] * (len(data) // step)) == whole


def test_a_goal_is_reached_when_all_of_it_is() -> None:
    goal = Goal(10.0, streams=5, faults=3, at_most=30.0)
    assert not goal.reached(9.0, 5, 3)
    assert not goal.reached(11.0, 5, 2)
    assert goal.reached(11.0, 5, 3)
    assert goal.reached(30.0, 0, 0)
    assert Goal(10.0).reached(10.0, 0, 0)
