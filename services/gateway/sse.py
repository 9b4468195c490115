"""Answers that are written as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from functools import partial
from typing import Any, Protocol

import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

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


SendPiece = Callable[[bytes], Coroutine[Any, Any, None]]


class Body(Protocol):
    """What an EventStream consists of."""

    async def write(self, send: SendPiece) -> None:
        """Sends all of it."""


class EventStream(Response):
    """Server-sent events. They cease when the client goes, and when it does not read for `stall_timeout` seconds; after `keepalive`
    seconds of silence it gets a comment line."""

    def __init__(
        self,
        body: Body,
        headers: dict[str, str],
        *,
        keepalive: float,
        stall_timeout: float,
        on_close: Callable[[], None],
    ) -> None:
        self._body = body
        self._keepalive = keepalive
        self._stall_timeout = stall_timeout
        self._on_close = on_close
        self._sending_since: float | None = None
        self._sent_at = 0.0
        self.status_code = 200
        self.background = None
        self.init_headers(HEADERS | headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        writing = loop.create_task(self._write(send), name="sse.write")
        gone = loop.create_task(until_disconnected(receive), name="sse.disconnect")
        watching = loop.create_task(self._watch(send), name="sse.watch")
        tasks = (writing, gone, watching)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            self._on_close()
        if isinstance(error := done[0], Exception):
            log.error("stream_failed", error=repr(error), exc_info=error)

    async def _write(self, send: Send) -> None:
        await self._send(send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await self._body.write(partial(self._send_piece, send))
        await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_piece(self, send: Send, data: bytes) -> None:
        await self._send(send, {"type": "http.response.body", "body": data, "more_body": True})

    async def _send(self, send: Send, message: dict[str, Any]) -> None:
        loop = asyncio.get_running_loop()
        self._sent_at = self._sending_since = loop.time()
        await send(message)
        self._sending_since = None

    async def _watch(self, send: Send) -> None:
        """Returns when the client has not read for too long."""
        loop = asyncio.get_running_loop()
        period = min(self._keepalive, self._stall_timeout) / 4
        while True:
            await asyncio.sleep(period)
            now = loop.time()
            if self._sending_since is not None:
                if now - self._sending_since >= self._stall_timeout:
                    log.warning("client_stalled", seconds=self._stall_timeout)
                    return
            elif now - self._sent_at >= self._keepalive:
                await self._send_piece(send, b": waiting\n\n")


class Iterated:
    """The body that an iterator gives. It is closed with the stream."""

    def __init__(self, events: AsyncIterator[bytes]) -> None:
        self._events = events

    async def write(self, send: SendPiece) -> None:
        async for data in self._events:
            await send(data)


class News(Protocol):
    """What comes by and by, in pieces that may be empty."""

    def on_news(self, callback: Callable[[], None]) -> None:
        """`callback` is called whenever there is something to be taken, from now on."""

    def take_now(self) -> bytes | None:
        """None where `take` is needed."""

    async def take(self) -> tuple[bytes, bool]:
        """A piece, and whether it is the last."""


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


class Live:
    """The body that news makes, written from within the callback that brings it: waking a task for every token of every stream costs
    more than rendering it. The task does what has to wait: for the client to read, for what the events are made of, for the end."""

    def __init__(self, news: News) -> None:
        self._news = news
        self._bell = Bell()
        self._resting = False  # the task waits for the bell, so the callback may write
        self._begun: _Begun | None = None  # a write of the callback that has to wait for the client
        self._error: Exception | None = None  # of the callback

    async def write(self, send: SendPiece) -> None:
        self._news.on_news(partial(self._on_news, send))
        while True:
            data, last = await self._news.take()
            if data:
                await send(data)
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
                await begun

    def _on_news(self, send: SendPiece) -> None:
        if self._resting and self._write_now(send):
            return
        self._resting = False
        self._bell.ring()

    def _write_now(self, send: SendPiece) -> bool:
        """False if there is something left for the task. Never raises: others are about to be called back."""
        try:
            if (data := self._news.take_now()) is None:
                return False
            if data:
                piece = send(data)
                self._begun = _Begun(piece, piece.send(None))
                return False
        except StopIteration:
            pass  # written
        except Exception as error:
            self._error = error
            return False
        return True
