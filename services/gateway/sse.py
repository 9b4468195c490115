"""Answers that are written as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from typing import Any, Protocol, cast

import structlog
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from services.gateway.http_protocol import connection_of, cut, write_chunk

log = structlog.get_logger()

HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would collect the events
}


class Bell:
    """Wakes one waiter. Cheaper than asyncio.Event where it rings for every token."""

    __slots__ = ("_rung", "_waiter")

    def __init__(self) -> None:
        self._rung = False
        self._waiter: asyncio.Future[None] | None = None

    def ring(self) -> None:
        self._rung = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        while not self._rung:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._rung = False


async def until_disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Begun:
    """Awaits the rest of a coroutine that was begun outside of any task and came to a future."""

    def __init__(self, coroutine: Coroutine[Any, Any, None], future: Any) -> None:
        self._coroutine = coroutine
        self._future = future

    def __await__(self) -> Generator[Any, Any, None]:
        waiting = self._future
        while True:
            yield waiting
            try:
                waiting = self._coroutine.send(None)
            except StopIteration:
                return


class Writer:
    """Where a body's pieces go. `sending_since`: a piece waits for the client to read; `sent_at`: when the latest began. Loop times."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._connection = connection_of(scope)
        self._send = cast(Callable[[Message], Coroutine[Any, Any, None]], send)  # servers' are coroutine functions
        self._time = asyncio.get_running_loop().time
        self.sending_since: float | None = None
        self.sent_at = 0.0

    async def write(self, data: bytes, more: bool = True) -> None:
        """Waits for the client, if need be. `more` False: this is the last."""
        if (begun := self.write_now(data, more)) is not None:
            await self.finish(begun)

    def write_now(self, data: bytes, more: bool = True) -> _Begun | None:
        """None if it is written; else the client has to read before, and `finish` must be awaited."""
        self.sent_at = now = self._time()
        if more and write_chunk(self._connection, data):
            return None
        sending = self._send({"type": "http.response.body", "body": data, "more_body": more})
        try:
            future = sending.send(None)
        except StopIteration:
            return None
        self.sending_since = now
        return _Begun(sending, future)

    async def finish(self, begun: _Begun) -> None:
        await begun
        self.sending_since = None


class Body(Protocol):
    """What an EventStream consists of."""

    async def write(self, writer: Writer) -> None:
        """Writes all of it."""


class EventStream(Response):
    """Server-sent events. They cease when the client goes, when it does not read for `stall_timeout` seconds, and with `given_up`;
    after `keepalive` seconds of silence it gets a comment line. on_close: told whether it was the client that went before the end."""

    def __init__(
        self,
        body: Body,
        headers: dict[str, str],
        *,
        keepalive: float,
        stall_timeout: float,
        on_close: Callable[[bool], None],
        given_up: asyncio.Event | None = None,
    ) -> None:
        self._body = body
        self._keepalive = keepalive
        self._stall_timeout = stall_timeout
        self._on_close = on_close
        self._given_up = given_up or asyncio.Event()
        self.status_code = 200
        self.background = None
        self.init_headers(HEADERS | headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        writer = Writer(scope, send)
        writing = loop.create_task(self._write(send, writer), name="sse.write")
        gone = loop.create_task(until_disconnected(receive), name="sse.disconnect")
        watching = loop.create_task(self._watch(writer), name="sse.watch")
        given_up = loop.create_task(self._given_up.wait(), name="sse.given_up")
        tasks = (writing, gone, watching, given_up)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            left = gone.done() and not writing.done()
            # There is no other sign that it is not whole.
            if not writing.done() and (watching.done() or given_up.done()):
                cut(connection_of(scope), at_once=watching.done())
            for task in tasks:
                task.cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            self._on_close(left)
        if isinstance(error := done[0], Exception):
            log.error("stream_failed", error=repr(error), exc_info=error)

    async def _write(self, send: Send, writer: Writer) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await self._body.write(writer)
        await writer.write(b"", more=False)  # so that who does not read to the end is noticed, too

    async def _watch(self, writer: Writer) -> None:
        """Returns when the client has not read for too long."""
        loop = asyncio.get_running_loop()
        writer.sent_at = loop.time()
        period = min(self._keepalive, self._stall_timeout) / 4
        while True:
            await asyncio.sleep(period)
            now = loop.time()
            if writer.sending_since is not None:
                if now - writer.sending_since >= self._stall_timeout:
                    log.warning("client_stalled", seconds=self._stall_timeout)
                    return
            elif now - writer.sent_at >= self._keepalive:
                await writer.write(b": waiting\n\n")


class Iterated:
    """The body that an iterator gives. It is closed with the stream."""

    def __init__(self, events: AsyncIterator[bytes]) -> None:
        self._events = events

    async def write(self, writer: Writer) -> None:
        async for data in self._events:
            await writer.write(data)


class News(Protocol):
    """What comes by and by, in pieces that may be empty."""

    def on_news(self, callback: Callable[[], None]) -> None:
        """`callback` is called whenever there is something to be taken, from now on."""

    def take_now(self) -> bytes | None:
        """None where `take` is needed."""

    async def take(self) -> tuple[bytes, bool]:
        """A piece, and whether it is the last."""


class Round:
    """The streams that have news, until they are written together: what was rendered one after the other is then written one after the
    other, which is faster than by turns, and of several events of one stream comes one piece."""

    def __init__(self) -> None:
        self._lives: list[Live] = []

    def add(self, live: Live) -> None:
        if not self._lives:
            asyncio.get_running_loop().call_soon(self.write)
        self._lives.append(live)

    def write(self) -> None:
        """At the end of a message that brought news, or of the loop's turn."""
        lives, self._lives = self._lives, []
        for live in lives:
            live.render()
        for live in lives:
            live.write_now()


class Live:
    """The body that news makes, written within the message that brings it: waking a task for every token of every stream costs
    more than rendering it. The task does what has to wait: for the client to read, for what the events are made of, for the end."""

    def __init__(self, news: News, together: Round) -> None:
        self._news = news
        self._round = together
        self._writer: Writer
        self._bell = Bell()
        self._resting = False  # the task waits for the bell, so others may write
        self._in_round = False
        self._piece = b""  # rendered, to be written at once
        self._begun: _Begun | None = None  # a write that has to wait for the client
        self._error: Exception | None = None  # of rendering or writing outside of the task

    async def write(self, writer: Writer) -> None:
        self._writer = writer
        self._news.on_news(self._on_news)
        while True:
            data, last = await self._news.take()
            if data:
                await writer.write(data)
            if last:
                return
            self._resting = True
            try:
                await self._bell.wait()
            finally:
                self._resting = False
            if self._error is not None:
                raise self._error
            if self._begun is not None:
                begun, self._begun = self._begun, None
                await writer.finish(begun)

    def _on_news(self) -> None:
        if not self._resting:
            self._bell.ring()
        elif not self._in_round:
            self._in_round = True
            self._round.add(self)

    def render(self) -> None:
        """Never raises: others come next."""
        self._in_round = False
        if not self._resting:  # the client has gone meanwhile
            return
        try:
            data = self._news.take_now()
        except Exception as error:
            self._error, data = error, None
        if data is None:
            self._leave_to_task()
        else:
            self._piece = data

    def write_now(self) -> None:
        """Never raises: others come next."""
        piece, self._piece = self._piece, b""
        if piece:
            try:
                self._begun = self._writer.write_now(piece)
            except Exception as error:
                self._error = error
            if self._begun is not None or self._error is not None:
                self._leave_to_task()

    def _leave_to_task(self) -> None:
        self._resting = False
        self._bell.ring()
