"""Streams of server-sent events that are written from within the message that brings them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from services.gateway.http_protocol import write_chunk
from services.gateway.sse import EventStream, Live, Round


class Script:
    """News that the test brings. What is `slow` is not to be had at once."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.slow = False
        self.last = False
        self.error: Exception | None = None
        self.callback: Callable[[], None] = lambda: None
        self.round = Round()

    def bring(self, piece: bytes = b"", *, last: bool = False) -> None:
        self.pieces += [piece] if piece else []
        self.last = last
        self.callback()
        self.round.write()  # as at the end of a message

    def on_news(self, callback: Callable[[], None]) -> None:
        self.callback = callback

    def _take(self) -> bytes:
        data, self.pieces = b"".join(self.pieces), []
        return data

    def take_now(self) -> bytes | None:
        if self.error is not None:
            raise self.error
        return None if self.slow or self.last else self._take()

    async def take(self) -> tuple[bytes, bool]:
        if self.slow:
            await asyncio.sleep(0)
        return self._take(), self.last


class Connection:
    """The client's end: `reads` is cleared while it does not read, and then a write waits."""

    def __init__(self) -> None:
        self.reads = asyncio.Event()
        self.reads.set()
        self.messages: list[dict[str, Any]] = []
        self.closed = False
        self.left = False  # before the end
        self.gone = asyncio.Event()

    async def send(self, message: Any) -> None:
        await self.reads.wait()
        self.messages.append(message)

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)

    def close(self, left: bool) -> None:
        self.closed, self.left = True, left


async def begin(script: Script) -> tuple[Connection, asyncio.Task[None]]:
    """A stream that waits for news."""
    connection = Connection()
    stream = EventStream(Live(script, script.round), {}, keepalive=60, stall_timeout=60, on_close=connection.close)
    task = asyncio.create_task(stream({"type": "http"}, connection.receive, connection.send))
    await settle()
    return connection, task


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_news_is_written_within_the_message_itself() -> None:
    script = Script()
    connection, task = await begin(script)
    for number in range(5):
        script.bring(b"%d" % number)
        assert connection.body == b"01234"[: number + 1]
    script.bring(b"end", last=True)
    await task
    assert connection.body == b"01234end"
    assert connection.messages[-1]["more_body"] is False
    assert connection.closed and not connection.left


async def test_the_events_of_a_message_are_one_piece_of_each_stream() -> None:
    script, other = Script(), Script()
    other.round = script.round
    (connection, task), (another, its_task) = await begin(script), await begin(other)
    for piece in (b"a", b"b"):
        for one in (script, other):
            one.pieces.append(piece)
            one.callback()
    assert connection.body == another.body == b""
    script.round.write()
    for to in (connection, another):
        assert [message["body"] for message in to.messages[1:]] == [b"ab"]
    other.callback()
    other.pieces.append(b"c")  # outside of any message
    await settle()
    assert another.body == b"abc"
    for one, its in ((script, task), (other, its_task)):
        one.bring(last=True)
        await its


class Socket:
    """A connection that has not sent `unsent` bytes."""

    def __init__(self, unsent: int = 0, closing: bool = False) -> None:
        self.unsent, self.closing, self.data = unsent, closing, b""

    def is_closing(self) -> bool:
        return self.closing

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def write(self, data: bytes) -> None:
        self.data += data


def test_a_chunk_is_written_to_the_connection_itself_unless_something_is_in_its_way() -> None:
    free, full, gone = Socket(), Socket(unsent=1), Socket(closing=True)
    assert write_chunk(cast(asyncio.Transport, free), b"x" * 17) and free.data == b"11\r\n" + b"x" * 17 + b"\r\n"
    for socket in (full, gone):
        assert not write_chunk(cast(asyncio.Transport, socket), b"x") and socket.data == b""
    assert not write_chunk(None, b"x")


async def test_what_has_to_wait_is_left_to_the_task() -> None:
    script = Script()
    connection, task = await begin(script)
    script.slow = True
    script.bring(b"a")
    assert connection.body == b""
    await settle()
    assert connection.body == b"a"
    script.slow = False
    script.bring(b"b")
    assert connection.body == b"ab"
    script.bring(last=True)
    await task


async def test_a_client_that_does_not_read_gets_everything_once_and_in_order_when_it_does() -> None:
    script = Script()
    connection, task = await begin(script)
    script.bring(b"a")
    connection.reads.clear()
    for piece in (b"b", b"c", b"d"):
        script.bring(piece)
        await settle()
    assert connection.body == b"a"
    connection.reads.set()
    await settle()
    assert connection.body == b"abcd"
    script.bring(b"e")
    assert connection.body == b"abcde"
    script.bring(last=True)
    await task


@pytest.mark.parametrize("reads", [True, False])
async def test_a_client_that_goes_ends_the_stream(reads: bool) -> None:
    script = Script()
    connection, task = await begin(script)
    if not reads:
        connection.reads.clear()
        script.bring(b"never read")
        await settle()
    connection.gone.set()
    await task
    assert connection.closed and connection.left
    script.bring(b"late")  # nobody is there
    assert connection.body == b""


async def test_an_error_ends_its_stream_alone() -> None:
    script = Script()
    connection, task = await begin(script)
    script.error = RuntimeError("cannot be rendered")
    with capture_logs() as logs:
        script.bring(b"a")  # raises nothing: other streams are called back after this one
        await task
    assert connection.closed
    assert [line["event"] for line in logs] == ["stream_failed"]
