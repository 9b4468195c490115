"""The bytes of internal messages: round trips, two versions that talk to each other, and what is not a message."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import codec
from shared import messages as m
from shared.sampling import SamplingParams

SAMPLING = SamplingParams(
    max_tokens=5, temperature=0.5, seed=2**64 - 1, stop_token_ids=(1, 2), logprobs=3, typical_p=0.5,
    logit_bias=((3, -1.5), (9, 2.0)), bad_words=((1,), (2, 3)), min_tokens=4, prompt_logprobs=2, ranked=True,
)  # fmt: skip
REPLY = m.ReplyTo("_INBOX.a", "msgpack", True, False)
BASE = m.Heartbeat("model_worker", "demo", "host-1", 7, 0.1, True, 0.5, 3, {"slots": 4})
TOKENS = m.Tokens(
    "t.r",
    1,
    3,
    17,
    codec.pack_ids([5, 6]),
    "stop_token",
    6,
    (m.TokenLogprobs(-0.5, codec.pack_ids([5]), (-0.25,)),),
    None,
)

# One of every type on the wire, with every field set to something else than its default.
EXAMPLES: list[Any] = [
    m.Request(
        "t.r",
        "demo",
        b"\0hash",
        codec.pack_ids([1]),
        SAMPLING,
        REPLY,
        ("a", "b"),
        2,
        True,
        -5,
        9.5,
        {"x": [1]},
        "tr",
        1.5,
        best=1,
        echo=True,
    ),
    m.Open("t.r", REPLY, 12, 3, 64, ("stop",), 2, True, True, {"x": 1}, "trace", 0.5, 2.5, best=1)._replace(
        prompt_logprobs=True, prompt_ids=b"\1\0\0\0"
    ),
    m.Attach("t.r", REPLY),
    m.StepTokens("w-1", 99, (TOKENS, TOKENS._replace(finish="error", failure=m.Failure("internal", "no")))),
    m.Fence("t.r", 4),
    m.End("t.r", "error", 1, 7, m.Failure("internal", "why"), "stop"),
    m.Run("t.r", 2, b"\1\0\0\0", SAMPLING, 2, (b"", b"\2\0\0\0"), (1,), 3, 1.5, True, "trace", 7),
    m.RunReply(False, "overloaded", "later"),
    m.Abort("t.r", 2),
    m.PrefixQuery("t.r", 2),
    m.PiecesQuery(ids=codec.pack_ids([1, 2])),
    m.PiecesReply((b"a", b"")),
    m.PrefixReply("running", 2, (b"\1\0\0\0",), (0,), 5),
    m.Assignment(5, 2, "w-1", b"hash", 1),
    m.Tombstone(5, 2, "finished", b"hash", 9),
    BASE,
    m.WorkerHeartbeat(BASE, 9, 0.1, 2.0, {"t.r": 2}, 8, 100, 50, 2048, 32000, ("t.r",)),
]


def test_every_type_has_an_example() -> None:
    assert {type(e) for e in EXAMPLES} == set(codec._TAGS)
    assert len(set(codec._TAGS.values())) == len(codec._TAGS)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda e: type(e).__name__)
def test_round_trip(message: Any) -> None:
    decoded = codec.decode(codec.encode(message))
    assert decoded == message
    assert type(decoded) is type(message)


def test_nested_types_survive() -> None:
    step = codec.decode(codec.encode(EXAMPLES[3]))
    assert isinstance(step.entries[0], m.Tokens)
    assert isinstance(step.entries[0].logprobs[0], m.TokenLogprobs)
    assert isinstance(step.entries[1].failure, m.Failure)
    request = codec.decode(codec.encode(EXAMPLES[0]))
    assert isinstance(request.sampling, SamplingParams) and isinstance(request.reply, m.ReplyTo)
    assert isinstance(codec.decode(codec.encode(EXAMPLES[-1])).base, m.Heartbeat)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda e: type(e).__name__)
def test_a_newer_version_may_add_fields(message: Any) -> None:
    row = msgpack.unpackb(codec.encode(message), strict_map_key=False)
    assert codec.decode(msgpack.packb([*row, "new field", {"another": 1}])) == message


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda e: type(e).__name__)
def test_an_older_version_leaves_fields_out(message: Any) -> None:
    row = msgpack.unpackb(codec.encode(message), strict_map_key=False)
    defaults = type(message)._field_defaults
    required = len(message._fields) - len(defaults)
    assert codec.decode(msgpack.packb(row[: 1 + required])) == message._replace(**defaults)


def test_nested_messages_may_grow_too() -> None:
    row = msgpack.unpackb(codec.encode(m.Attach("t.r", REPLY)))
    assert codec.decode(msgpack.packb([row[0], row[1], [*row[2], "new"]])) == m.Attach("t.r", REPLY)
    assert codec.decode(msgpack.packb([row[0], row[1], ["_INBOX.b"]])) == m.Attach("t.r", m.ReplyTo("_INBOX.b"))


@given(st.binary(max_size=40))
def test_any_bytes_decode_or_raise_codec_error(data: bytes) -> None:
    try:
        message = codec.decode(data)
    except codec.CodecError:
        return
    assert type(message) in codec._TAGS


@pytest.mark.parametrize("data", [b"", b"\xc1", msgpack.packb([]), msgpack.packb([99, 1]), msgpack.packb([13]), b"{}"])
def test_what_is_not_a_message(data: bytes) -> None:
    with pytest.raises(codec.CodecError):
        codec.decode(data)


def test_decode_as_checks_the_type() -> None:
    assert codec.decode_as(m.Fence, codec.encode(m.Fence("t.r", 1))) == m.Fence("t.r", 1)
    with pytest.raises(codec.CodecError, match="expected Fence, got Abort"):
        codec.decode_as(m.Fence, codec.encode(m.Abort("t.r", 1)))


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=50))
def test_ids_are_packed_as_little_endian_int32(ids: list[int]) -> None:
    packed = codec.pack_ids(ids)
    assert packed == b"".join(i.to_bytes(4, "little", signed=True) for i in ids)
    assert codec.unpack_ids(packed) == ids


def test_ids_that_do_not_fit() -> None:
    with pytest.raises(OverflowError):
        codec.pack_ids([2**31])
    with pytest.raises(TypeError):
        codec.pack_ids([1.5, 2])  # type: ignore[list-item]


def test_what_cannot_be_packed_leaves_nothing_behind() -> None:
    """The packers are used again and again, by threads of their own."""
    for bad, error in ((object(), TypeError), (1 << 70, OverflowError), ("\ud800", UnicodeEncodeError)):
        with pytest.raises(error):
            codec.pack(["x" * 1000, bad])
        assert codec.pack([1, "a"]) == msgpack.packb([1, "a"])
    fence = m.Fence("default.a", 3)
    with pytest.raises(TypeError):
        codec.encode(m.Fence(object(), 3))  # type: ignore[arg-type]
    assert codec.decode(codec.encode(fence)) == fence
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: codec.encode(fence), range(2000))) == {codec.encode(fence)}
