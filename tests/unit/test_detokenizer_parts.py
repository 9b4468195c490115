"""The detokenizer's pure parts: who owns what, snapshots, questions, events."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.detokenizer import snapshot
from services.detokenizer.core import PartitionCore
from services.detokenizer.ownership import Fleet, partitions_of
from services.detokenizer.partition import snapshot_pause
from services.detokenizer.queries import parse_replay
from services.detokenizer.settings import DetokenizerSettings
from shared import messages as m
from shared.codec import pack_ids
from shared.errors import ErrorCode, GorgonError
from shared.tokenlog import Terminal
from tests.protocol.detokenizer_world import EOS, Letters, piece

# ---------------------------------------------------------------- ownership


def beat(name: str, draining: bool = False) -> m.Heartbeat:
    return m.Heartbeat("detokenizer", "m", name, 1, 0.1, draining)


def watch(fleet: Fleet, start: float, end: float, connected_for: float = 100.0) -> frozenset[str]:
    """Looks every 50 ms; returns what was seen last."""
    now, seen = start, frozenset()
    while now <= end:
        seen = fleet.others(now, connected_for)
        now += 0.05
    return seen


def test_the_silent_and_the_draining_are_left_out():
    fleet = Fleet("me", 0.5)
    fleet.others(0.0, 100)
    fleet.saw(beat("a"), 0.0)
    fleet.saw(beat("b"), 0.0)
    fleet.saw(beat("me"), 0.0)
    assert watch(fleet, 0.0, 0.5) == {"a", "b"}
    fleet.saw(beat("a"), 0.5)
    assert watch(fleet, 0.55, 0.9) == {"a"}
    fleet.saw(beat("a", draining=True), 0.9)
    assert watch(fleet, 0.9, 0.95) == frozenset()


def test_silence_counts_only_on_a_healthy_link():
    fleet = Fleet("me", 0.5)
    fleet.saw(beat("a"), 0.0)
    assert watch(fleet, 0.0, 5.0, connected_for=0.0) == {"a"}
    assert watch(fleet, 5.0, 5.4, connected_for=0.4) == {"a"}
    assert watch(fleet, 5.45, 6.0) == frozenset()


def test_ones_own_standstill_is_not_the_others_silence():
    fleet = Fleet("me", 0.5)
    fleet.saw(beat("a"), 0.0)
    assert watch(fleet, 0.0, 0.2) == {"a"}
    assert fleet.others(10.0, 100) == {"a"}, "stopped for ten seconds"
    assert watch(fleet, 10.05, 10.45) == {"a"}
    assert watch(fleet, 10.5, 10.7) == frozenset()


def test_partitions_are_divided():
    nodes = frozenset("abc")
    shares = [partitions_of(node, nodes, "m", 32) for node in nodes]
    assert sorted(p for share in shares for p in share) == list(range(32))


# ---------------------------------------------------------------- the core and its snapshots


PROMPT = [4, 5, 30, 6, 7]
entries = st.lists(
    st.one_of(
        st.builds(
            lambda r, n, stops, lp, s, best, prompt, echo: m.Open(
                f"t.{r}",
                m.ReplyTo("x", stream=s),
                1,
                5,
                99,
                stops,
                n,
                lp,
                best=best,
                prompt_logprobs=prompt,
                prompt_ids=echo,
            ),
            st.integers(0, 2),
            st.integers(1, 2),
            st.sampled_from([(), ("bb",), ("ca", "d")]),
            st.booleans(),
            st.booleans(),
            st.sampled_from([0, 0, 1]),
            st.booleans(),
            st.sampled_from([b"", b"", pack_ids(PROMPT)]),
        ),
        st.builds(
            lambda r, position, end, epoch: m.StepTokens(
                "w",
                1,
                (
                    m.Tokens(
                        f"t.{r}",
                        m.PROMPT,
                        epoch,
                        position,
                        pack_ids(PROMPT[position:end]),
                        logprobs=tuple(
                            m.TokenLogprobs(-float(i), pack_ids([i]), (-1.0,)) for i in PROMPT[position:end]
                        ),
                    ),
                ),
            ),
            st.integers(0, 2),
            st.sampled_from([0, 0, 0, 3]),
            st.sampled_from([3, 5, 5]),
            st.integers(1, 2),
        ),
        st.builds(
            lambda r, choice, position, ids, finish: m.StepTokens(
                "w",
                1,
                (
                    m.Tokens(
                        f"t.{r}",
                        choice,
                        1,
                        position,
                        pack_ids(ids),
                        finish,
                        ids[-1] if finish == "stop" and ids else None,
                        tuple(m.TokenLogprobs(-1.0, pack_ids([i]), (-1.0,)) for i in ids),
                    ),
                ),
            ),
            st.integers(0, 2),
            st.integers(0, 1),
            st.integers(0, 6),
            st.lists(st.sampled_from([0, 1, 2, 3, 27, EOS]), max_size=4),
            st.sampled_from([None] * 6 + ["stop", "length", "error"]),
        ),
        st.builds(lambda r: m.End(f"t.{r}", "cancelled"), st.integers(0, 2)),
        st.builds(lambda r, c: m.End(f"t.{r}", "stop", c, 1, stop="bb"), st.integers(0, 2), st.integers(0, 1)),
        st.builds(lambda r: m.Attach(f"t.{r}", m.ReplyTo("y")), st.integers(0, 2)),
        st.builds(lambda r, e: m.Fence(f"t.{r}", e), st.integers(0, 2), st.integers(1, 2)),
    ),
    max_size=30,
)


def told(core: PartitionCore) -> dict[str, list[dict]]:
    return {key: answer.replay({}) for key, answer in core.answers.items()}


@settings(max_examples=400, deadline=None)
@given(entries, st.integers(0, 30))
def test_a_core_restored_from_a_snapshot_tells_the_same(log, at):
    core = PartitionCore(Letters)
    restored = None
    for seq, entry in enumerate(log, 1):
        if seq - 1 == at:
            restored = PartitionCore(Letters, snapshot.unpack(core.snapshot(), Letters))
            assert told(restored) == told(core)
        core.apply(seq, float(seq), entry)
        if restored is not None:
            restored.apply(seq, float(seq), entry)
    if restored is not None:
        assert (restored.seq, restored.stamp) == (core.seq, core.stamp)
        assert told(restored) == told(core)
        assert {k: a.undeclared_stops() for k, a in restored.answers.items()} == {
            k: a.undeclared_stops() for k, a in core.answers.items()
        }


@settings(max_examples=200, deadline=None)
@given(entries)
def test_what_is_sent_piece_by_piece_is_what_a_replay_tells(log):
    core = PartitionCore(Letters)
    sent: dict[str, list[dict]] = {}
    for seq, entry in enumerate(log, 1):
        if isinstance(entry, m.Attach):
            continue
        core.apply(seq, float(seq), entry)
        for answer in core.take_dirty():
            sent.setdefault(answer.state.key, []).extend(answer.unsent())
    for key, answer in core.answers.items():
        assert {e["choice"] for e in sent.get(key, []) if e["event"] == "tokens"} <= answer.tracks.keys()
        for number, track in answer.tracks.items():
            events = [e for e in sent.get(key, []) if e["event"] == "tokens" and e["choice"] == number]
            ids = [i for e in events for i in e["ids"]]
            text = "".join(e["text"] for e in events)
            if answer.state.reply.stream:
                assert ids == track.ids[: track.stream.shown]
                assert text == track.stream.text
                assert len(events) == len([e for e in events if e["ids"] or e["text"]])
            else:
                assert not events
        terminals = [e for e in sent.get(key, []) if e["event"] != "tokens"]
        assert len(terminals) == int(answer.ended)
        if terminals and terminals[0]["event"] == "finished":
            counted = sum(choice["tokens"] for choice in terminals[0]["choices"])
            assert terminals[0]["usage"]["completion_tokens"] == counted or answer.opened.best


def test_an_archived_request_comes_back_whole_and_leaves_little():
    core = PartitionCore(Letters)
    core.apply(1, 1.0, m.Open("t.r", m.ReplyTo("x"), 9, 5, 99, metadata={"big": "x" * 3000}))
    ids = [i % 26 for i in range(3000)]
    core.apply(2, 2.0, m.StepTokens("w", 1, (m.Tokens("t.r", 0, 1, 0, pack_ids(ids), "length"),)))
    (answer,) = core.answers.values()
    events = answer.replay({})
    data = snapshot.pack_answer(answer)
    core.archive(answer)
    assert len(core.snapshot()) < 300
    assert snapshot.unpack_answer(data, Letters).replay({}) == events
    assert "".join(e.get("text", "") for e in events) == "".join(map(piece, ids))
    assert max(len(e.get("ids", ())) for e in events) <= 512
    # The fold's rules still hold for it: a repeated OPEN does not begin it anew.
    core.apply(3, 3.0, m.Open("t.r", m.ReplyTo("x"), 9, 5, 99))
    assert not core.answers and core.request("t.r").terminal.reason == "finished"
    core.apply(4, 4.0, m.Attach("t.r", m.ReplyTo("late")))
    assert core.recalled == [("t.r", m.ReplyTo("late"))]


def test_archived_requests_share_what_is_left_of_them_also_after_a_snapshot():
    core = PartitionCore(Letters)
    for number in range(2):
        key = f"t.r{number}"
        core.apply(2 * number + 1, 1.0, m.Open(key, m.ReplyTo("x"), 9 + number, 5, 99))
        entry = m.StepTokens("w", number, (m.Tokens(key, 0, 1, 0, pack_ids([1]), "length"),))
        core.apply(2 * number + 2, 1.0, entry)
    for answer in list(core.answers.values()):
        core.archive(answer)
    for fold in (core.fold, snapshot.unpack(core.snapshot(), Letters).fold):
        first, second = fold.requests.values()
        assert first.opened is second.opened and first.terminal is second.terminal
        assert first.terminal == Terminal("finished")


@pytest.mark.parametrize("data", [b"", b"r", b"znonsense", b"r\x93\x01\x02\x03", b"q123"])
def test_bytes_that_are_no_snapshot_are_refused(data):
    with pytest.raises(ValueError, match="not a snapshot"):
        snapshot.unpack(data, Letters)


def test_a_large_snapshot_is_compressed():
    core = PartitionCore(Letters)
    core.apply(1, 1.0, m.Open("t.r", m.ReplyTo("x"), 9, 5, 99))
    core.apply(2, 2.0, m.StepTokens("w", 1, (m.Tokens("t.r", 0, 1, 0, pack_ids([1] * 1_200_000)),)))
    data = core.snapshot()
    assert data[:1] == b"z" and len(data) < 100_000
    restored = snapshot.unpack(data, Letters)
    assert restored.fold.requests["t.r"].choices[0].ids == [1] * 1_200_000


# ---------------------------------------------------------------- questions


@pytest.mark.parametrize(
    "body, names",
    [
        ({}, "id"),
        ({"id": "a.b"}, "id"),
        ({"id": "r", "cursors": [{"choice": -2}]}, "cursors.0.choice"),
        ({"id": "r", "cursors": [{"position": 1.5}]}, "cursors.0.position"),
        ({"id": "r", "cursors": "x"}, "cursors"),
        ({"id": "r", "what": 1}, "what"),
        ({"id": "r", "cursors": [{}] * 100}, "cursors"),
    ],
)
def test_bad_questions_name_the_field(body, names):
    with pytest.raises(GorgonError) as caught:
        parse_replay(json.dumps(body).encode(), "x")
    assert caught.value.code == ErrorCode.INVALID_REQUEST
    assert names in caught.value.message


def test_a_question_is_answered_in_its_own_encoding():
    assert parse_replay(b'{"id":"r"}', "x").reply == m.ReplyTo("x", "json", False, True)
    asked = parse_replay(b"\x82\xa2id\xa1r\xa7batched\xc3", "x")
    assert (asked.key, asked.reply) == ("default.r", m.ReplyTo("x", "msgpack", True, True))


def test_large_snapshots_are_made_less_often() -> None:
    settings = DetokenizerSettings(partitions=16)
    pauses = [snapshot_pause(kib * 2**10, settings) for kib in (0, 1, 32, 64, 145, 8192)]
    assert pauses == pytest.approx([0.5, 0.5, 0.5, 1.0, 2.266, 3.0], abs=0.001)
    assert snapshot_pause(8 * 2**20, DetokenizerSettings(snapshot_interval=60)) == 60
