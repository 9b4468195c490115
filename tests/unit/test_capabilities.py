"""What a process of another version would lose of a request."""

from __future__ import annotations

from dataclasses import fields, replace

from shared import messages as m
from shared.capabilities import KNOWN, knows, needed_of_detokenizers, needed_of_schedulers, needed_of_workers
from shared.sampling import SamplingParams

PLAIN = m.Request("t.r", "m", b"h", b"", SamplingParams(temperature=0.5, top_k=3), m.ReplyTo("x"))
OLD, NEW = (m.Heartbeat("s", "m", "i", 1, 0.1, knows=known) for known in ({}, KNOWN))


def test_what_was_always_there_needs_nothing() -> None:
    for needed in (needed_of_schedulers, needed_of_workers, needed_of_detokenizers):
        assert set(needed(PLAIN).values()) == {0}
        assert knows(OLD, needed(PLAIN)) and knows(NEW, needed(PLAIN))


def test_what_came_later_needs_who_knows_it() -> None:
    later = [
        PLAIN._replace(constraint="start: x"),
        PLAIN._replace(sampling=replace(PLAIN.sampling, bad_words=((1,),))),
        PLAIN._replace(sampling=replace(PLAIN.sampling, num_beams=4)),
        PLAIN._replace(sampling=replace(PLAIN.sampling, prompt_logprobs=0)),
    ]
    for request in later:
        needed = needed_of_workers(request)
        assert not knows(OLD, needed) and knows(NEW, needed)
        for kind, count in needed.items():
            if count:  # one field less
                assert not knows(NEW._replace(knows=dict(KNOWN, **{kind: count - 1})), needed)
                assert knows(NEW._replace(knows=dict(KNOWN, **{kind: count})), needed)
        assert not knows(OLD, needed_of_schedulers(request))
    for request in (PLAIN._replace(tool_format="hermes"), PLAIN._replace(best=1), PLAIN._replace(echo=True)):
        assert not knows(OLD, needed_of_detokenizers(request)) and knows(NEW, needed_of_detokenizers(request))
        assert not knows(OLD, needed_of_schedulers(request))
        assert knows(OLD, needed_of_workers(request))


def test_a_process_of_a_version_to_come_knows_all_of_this_one() -> None:
    later = m.Heartbeat("s", "m", "i", 1, 0.1, knows={kind: count + 3 for kind, count in KNOWN.items()} | {"new": 1})
    assert knows(later, needed_of_schedulers(PLAIN._replace(constraint="start: x", echo=True)))


def test_no_field_is_forgotten() -> None:
    """Whoever adds a field has to say here whether a reader that drops it would do something else than was asked for."""
    # Without OPEN's revision and body hash, the assignment is looked at before it is replaced.
    changes_nothing = {"metadata", "trace", "tokenize_ms", "queue_ms", "revision", "body_hash"}
    counted = {
        "run": {"constraint", "prompt_done"},
        "open": {"tool_format", "best", "prompt_logprobs", "prompt_ids"},
        "request": {"tool_format", "best", "echo", "constraint", "refused_as"},
    }
    first = {"run": m.Run._fields[:11], "open": m.Open._fields[:13], "request": m.Request._fields[:14]}
    for kind, cls in (("run", m.Run), ("open", m.Open), ("request", m.Request)):
        assert set(cls._fields) == {*first[kind], *counted[kind], *changes_nothing} & set(cls._fields)
        assert KNOWN[kind] == len(cls._fields)
    assert KNOWN["sampling"] == len(fields(SamplingParams))
