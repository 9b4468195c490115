"""uvicorn's HTTP protocol, with a shorter way for pieces of a response that goes on."""

from __future__ import annotations

import asyncio
import socket
import struct

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
    coroutine in each layer, takes as long as the system call."""

    _head: int | None = None  # bytes of the head that has begun, None: none has

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
        super().on_headers_complete()

    def on_message_begin(self) -> None:
        self._head = 0
        super().on_message_begin()
        self.scope[_CONNECTION] = self.transport  # type: ignore[literal-required]


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
