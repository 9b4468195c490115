"""Answers that are written as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

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


class EventStream(Response):
    """Server-sent events. `events` is closed when the client goes, and when it does not read for `stall_timeout` seconds; after
    `keepalive` seconds of silence it gets a comment line."""

    def __init__(
        self,
        events: AsyncIterator[bytes],
        headers: dict[str, str],
        *,
        keepalive: float,
        stall_timeout: float,
        on_close: Callable[[], None],
    ) -> None:
        self._events = events
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
        async for data in self._events:
            await self._send(send, {"type": "http.response.body", "body": data, "more_body": True})
        await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})

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
                await self._send(send, {"type": "http.response.body", "body": b": waiting\n\n", "more_body": True})
