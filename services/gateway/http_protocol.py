"""uvicorn's HTTP protocol, with a shorter way for pieces of a response that goes on."""

from __future__ import annotations

import asyncio

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_CONNECTION = "gorgon.connection"


class StreamingProtocol(HttpToolsProtocol):
    """Its scopes tell the connection. With a step of the model many streams have a piece each to be written, and ASGI's way there, a
    coroutine in each layer, takes as long as the system call."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope[_CONNECTION] = self.transport  # type: ignore[literal-required]


def connection_of(scope: Scope) -> asyncio.Transport | None:
    """None under another server."""
    connection: asyncio.Transport | None = scope.get(_CONNECTION)
    return connection


def write_chunk(connection: asyncio.Transport | None, data: bytes) -> bool:
    """Writes a piece of a response whose start has been sent, without length (RFC 9112, section 7.1), if nothing is in its way.

    False: the client is slow or has gone; ASGI's `send` knows what to do."""
    if connection is None or connection.is_closing() or connection.get_write_buffer_size():
        return False
    connection.write(b"%x\r\n%b\r\n" % (len(data), data))
    return True
