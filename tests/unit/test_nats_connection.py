"""The reader between the socket and nats-py, without a server: whatever the pieces in which bytes come, each message is handed out
once, in order, and nats-py's parser gets the rest."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nats import errors
from nats.aio.msg import Msg
from nats.aio.transport import TcpTransport

from shared.nats_connection import Connection, DirectReader

PAYLOADS = st.one_of(
    st.binary(max_size=40), st.sampled_from([b"", b"\r\n", b"MSG a 1 3\r\nabc\r\n", b"PONG\r\n", b"M", b"HMSG"])
)
SUBJECTS = st.sampled_from(["a", "a.b-c", "MSG", "HMSG.x", "ünï"])
MESSAGES = st.tuples(
    SUBJECTS, st.sampled_from(["", "reply.to"]), PAYLOADS, st.dictionaries(st.sampled_from(["A", "Nats-X"]), SUBJECTS, max_size=2)
)  # fmt: skip
OTHERS = st.sampled_from([b"+OK\r\n", b"PONG\r\n"])
Heard = tuple[str, str, bytes, dict[str, str]]


def wire(subject: str, reply: str, payload: bytes, headers: dict[str, str]) -> bytes:
    words = [subject.encode(), b"7", *([reply.encode()] if reply else [])]
    if not headers:
        return b" ".join([b"MSG", *words, str(len(payload)).encode()]) + b"\r\n" + payload + b"\r\n"
    block = ("NATS/1.0\r\n" + "".join(f"{k}: {v}\r\n" for k, v in headers.items()) + "\r\n").encode()
    sizes = [str(len(block)).encode(), str(len(block) + len(payload)).encode()]
    return b" ".join([b"HMSG", *words, *sizes]) + b"\r\n" + block + payload + b"\r\n"


class Socket:
    """What nats-py has of a connected one."""

    def __init__(self) -> None:
        self.stream = asyncio.StreamReader()
        self.protocol: Any = asyncio.StreamReaderProtocol(self.stream)
        self.transport = TcpTransport()  # type: ignore[no-untyped-call]
        self.transport._io_reader = self.stream
        self.transport._io_writer = SimpleNamespace(transport=self)  # type: ignore[assignment]

    def get_protocol(self) -> Any:
        return self.protocol

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol


async def hear(pieces: list[bytes], before: bytes = b"", pauses: bool = False) -> tuple[list[Heard], int]:
    """What a handler hears, and how many pongs nats-py does. before: bytes that came while nats-py was still connecting."""
    connection, socket = Connection(), Socket()
    heard: list[Heard] = []
    pongs = 0

    async def pong() -> None:
        nonlocal pongs
        await asyncio.sleep(0)  # as nats-py's own operations may
        pongs += 1

    def take(msg: Msg) -> None:
        heard.append((msg.subject, msg.reply, msg.data, msg.headers or {}))

    connection._process_pong = pong  # type: ignore[method-assign]
    connection._handlers[7] = take
    connection._transport = socket.transport
    socket.stream.feed_data(before)
    ended: list[Exception] = []

    async def end(e: Exception) -> None:
        ended.append(e)

    connection._process_op_err = connection._error_cb = end  # type: ignore[method-assign]
    reading = asyncio.ensure_future(connection._read_loop())
    await asyncio.sleep(0)
    assert isinstance(socket.protocol, DirectReader)
    for piece in pieces:
        socket.protocol.data_received(piece)
        if pauses:
            await asyncio.sleep(0)
    socket.protocol.eof_received()
    await asyncio.wait_for(reading, 5)
    assert all(isinstance(error, errors.UnexpectedEOF) for error in ended) and ended
    return heard, pongs


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(MESSAGES, OTHERS), max_size=12), st.data())
def test_every_message_is_handed_out_once_whatever_the_pieces(items: list[Any], data: st.DataObject) -> None:
    stream = b"".join(item if isinstance(item, bytes) else wire(*item) for item in items)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    begun = data.draw(st.booleans())
    heard, pongs = asyncio.run(hear(pieces[begun:], pieces[0] if begun else b"", pauses=data.draw(st.booleans())))
    assert heard == [item for item in items if not isinstance(item, bytes)]
    assert pongs == items.count(b"PONG\r\n")


async def test_a_message_that_nats_py_has_the_first_line_of() -> None:
    message: Heard = ("a", "", b"MSG a 7 1\r\nx", {})
    data = wire(*message)
    end = data.index(b"\r\n") + 2
    assert await hear([b"PONG\r\n" + data[:end], data[end:], data], pauses=True) == ([message, message], 1)


async def test_a_subject_is_any_bytes() -> None:
    """Whoever may publish to a wildcard can send such a one; a stream's comes again until it is taken."""
    for header in ({}, {"A": "b"}):
        bad = wire("bad", "reply", b"1", header).replace(b"bad", b"b\xff\xfe")
        heard, _ = await hear([bad + wire("a", "", b"2", {})])
        assert heard == [("b\ufffd\ufffd", "reply", b"1", header), ("a", "", b"2", {})]
    nothing = b"HMSG a 7 8 9\r\nNATS/1.0x\r\n" + b"HMSG a 7 12 13\r\nNATS/1.0\r\n\r\nx\r\n"
    heard, _ = await hear([nothing + wire("a", "", b"2", {})])
    assert heard[-1] == ("a", "", b"2", {})


async def test_what_is_no_protocol_ends_the_connection() -> None:
    for garbage in (b"MESSAGE\r\n", b"MSG a seven 1\r\nx\r\n"):
        with pytest.raises((ValueError, AssertionError)):
            await hear([garbage, b"PONG\r\n"])


async def test_a_long_message_in_many_pieces() -> None:
    message: Heard = ("a", "", bytes(range(256)) * 4096, {})
    data = wire(*message)
    assert (await hear([data[at : at + 1000] for at in range(0, len(data), 1000)]))[0] == [message]
