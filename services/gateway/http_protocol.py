"""uvicorn's HTTP protocol, with a shorter way for pieces of a response that goes on, and no patience for clients that stand still."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import ClassVar

import structlog
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

log = structlog.get_logger()

_CONNECTION = "gorgon.connection"
# Bytes of a request's line and headers, beside those that come with its first. The parser itself has no limit, and takes time that
# grows with the square of their length.
MAX_HEAD = 64 << 10
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class StreamingProtocol(HttpToolsProtocol):
    """Its scopes tell the connection. With a step of the model many streams have a piece each to be written, and ASGI's way there, a
    coroutine in each layer, takes as long as the system call.

    read_timeout    seconds for a connection's first head, for each further one, and between pieces of a body
    stall_timeout   seconds after which a client that reads nothing of what is to be written is cut off
    """

    read_timeout: ClassVar[float] = 75.0
    stall_timeout: ClassVar[float] = 60.0

    _head: int | None = None  # bytes of the head that has begun, None: none has
    _reading: asyncio.TimerHandle | None = None  # while a request is not whole
    _writing: asyncio.TimerHandle | None = None  # while more is to be written than the kernel takes

    @property
    def incomplete(self) -> bool:
        """A request is awaited, or the rest of one."""
        return self._reading is not None

    @property
    def stalled(self) -> bool:
        return self._writing is not None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_more()

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrived()
        self._written()
        super().connection_lost(exc)

    def _await_more(self) -> None:
        self._arrived()
        self._reading = self.loop.call_later(self.read_timeout, self._late)

    def _arrived(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _late(self) -> None:
        if self.flow.read_paused:  # it is not the client that stands still
            self._await_more()
            return
        log.info("request_incomplete", client=self.client)
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        self._written()
        super().resume_writing()

    def _watch(self) -> None:
        self._writing = self.loop.call_later(self.stall_timeout, self._stalled, self.transport.get_write_buffer_size())

    def _written(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def _stalled(self, before: int) -> None:
        """before: bytes to be written then. A slow client may take its time, one that takes nothing may not."""
        if self.transport.get_write_buffer_size() < before:
            self._watch()
            return
        log.warning("client_stalled", client=self.client)
        cut(self.transport, at_once=True)

    def data_received(self, data: bytes) -> None:
        if self._head is not None:
            self._head += len(data)
            if self._head > MAX_HEAD:
                log.warning("head_too_large", client=self.client)
                self.transport.write(_TOO_LARGE)
                self.transport.close()
                return
        super().data_received(data)

    def on_headers_complete(self) -> None:
        self._head = None
        self._await_more()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._await_more()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._arrived()
        super().on_message_complete()

    def on_message_begin(self) -> None:
        self._head = 0
        self._await_more()
        super().on_message_begin()
        self.scope[_CONNECTION] = self.transport  # type: ignore[literal-required]


def patient(stall_timeout: float) -> type[StreamingProtocol]:
    """The protocol with this timeout."""
    return type("StreamingProtocol", (StreamingProtocol,), {"stall_timeout": stall_timeout})


def connection_of(scope: Scope) -> asyncio.Transport | None:
    """None under another server."""
    connection: asyncio.Transport | None = scope.get(_CONNECTION)
    return connection


def cut(connection: asyncio.Transport | None, *, at_once: bool) -> None:
    """Ends a connection in mid-response. at_once: not even what the kernel holds is sent any more, for a client that does not read."""
    if connection is None:
        return
    if at_once and (raw := connection.get_extra_info("socket")) is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.abort()


def write_chunk(connection: asyncio.Transport | None, data: bytes) -> bool:
    """Writes a piece of a response whose start has been sent, without length (RFC 9112, section 7.1), if nothing is in its way.

    False: the client is slow or has gone; ASGI's `send` knows what to do."""
    if connection is None or connection.is_closing() or connection.get_write_buffer_size():
        return False
    connection.write(b"%x\r\n%b\r\n" % (len(data), data))
    return True
