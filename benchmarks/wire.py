"""A NATS connection that costs the load next to nothing a message, so that what is measured is the pipeline and not the client library.

Only what a load needs of the protocol (https://docs.nats.io/reference/reference-protocols/nats-protocol): subscribe, publish, and
messages without headers.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator
from typing import cast
from urllib.parse import urlsplit

CONNECT = (
    b'CONNECT {"verbose":false,"pedantic":false,"headers":false,"lang":"python","version":"0","protocol":1}\r\nPING\r\n'
)


class Frames:
    """Takes the server's bytes apart."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[tuple[str, bytes]]:
        """(subject, payload) of each message that is complete with these bytes. Raises RuntimeError for an error of the server."""
        data, at = self._rest + data, 0
        while (end := data.find(b"\r\n", at)) >= 0:
            if data.startswith(b"MSG ", at):
                words = data[at:end].split(b" ")
                begin, size = end + 2, int(words[-1])
                if len(data) < begin + size + 2:
                    break
                yield words[1].decode(), data[begin : begin + size]
                end = begin + size
            elif data.startswith(b"-ERR", at):
                raise RuntimeError(data[at:end].decode())
            at = end + 2
        self._rest = data[at:]


class Wire(asyncio.Protocol):
    """`on_bytes` is given what comes, with the time (`time.monotonic()`) at which it was read."""

    def __init__(self, on_bytes: Callable[[float, bytes], None]) -> None:
        self._on_bytes = on_bytes
        self._subscriptions = 0
        self._ready = asyncio.get_running_loop().create_future()

    @classmethod
    async def connect(cls, url: str, on_bytes: Callable[[float, bytes], None]) -> Wire:
        address = urlsplit(url)
        _, wire = await asyncio.get_running_loop().create_connection(
            lambda: cls(on_bytes), address.hostname, address.port
        )
        await wire._ready
        return wire

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(CONNECT)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        if b"PING\r\n" in data:
            self._transport.write(b"PONG\r\n")
        if not self._ready.done():
            if b"PONG\r\n" in data:
                self._ready.set_result(None)
            return
        self._on_bytes(now, data)

    @staticmethod
    def new_inbox() -> str:
        return f"_INBOX.{uuid.uuid4().hex}"

    def subscribe(self, subject: str) -> int:
        self._subscriptions += 1
        self._transport.write(f"SUB {subject} {self._subscriptions}\r\n".encode())
        return self._subscriptions

    def unsubscribe(self, number: int) -> None:
        self._transport.write(f"UNSUB {number}\r\n".encode())

    def publish(self, subject: str, data: bytes, reply: str) -> None:
        self._transport.write(b"PUB %s %s %d\r\n%s\r\n" % (subject.encode(), reply.encode(), len(data), data))

    def close(self) -> None:
        self._transport.close()
