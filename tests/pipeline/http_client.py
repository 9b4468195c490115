"""HTTP by hand, for what real clients hide: where a stream broke off, the ids of its events, a client that does not read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any


class Broken(Exception):
    """The connection ended before the answer did."""


@dataclass
class Event:
    id: str
    data: str

    @property
    def json(self) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(self.data)
        return body


@dataclass
class Answer:
    """Status and headers are there; the body is read by `body` or, of a stream, event by event."""

    status: int
    headers: dict[str, str]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    last_id: str = field(default="")

    async def chunks(self) -> AsyncIterator[bytes]:
        """Raises Broken."""
        try:
            if "content-length" in self.headers:
                yield await self.reader.readexactly(int(self.headers["content-length"]))
                return
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                data = await self.reader.readexactly(size + 2)
                yield data[:-2]
            await self.reader.readuntil(b"\r\n")
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            raise Broken(repr(error)) from None

    async def body(self) -> dict[str, Any]:
        parsed: dict[str, Any] = json.loads(b"".join([chunk async for chunk in self.chunks()]))
        return parsed

    async def events(self) -> AsyncIterator[Event]:
        """Raises Broken. `last_id` is what a client would send as Last-Event-ID."""
        text = b""
        async for chunk in self.chunks():
            text += chunk
            while (end := text.find(b"\n\n")) >= 0:
                block, text = text[:end].decode(), text[end + 2 :]
                fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
                if "id" in fields:
                    self.last_id = fields["id"]
                if "data" in fields:
                    yield Event(fields.get("id", ""), fields["data"])

    def close(self) -> None:
        self.writer.transport.abort()


async def call(
    port: int, path: str, body: dict[str, Any] | bytes | None = None, headers: dict[str, str] | None = None
) -> Answer:
    """One request over a connection of its own: POST with a body, else GET. Raises Broken."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", "Connection: close"]
        headers = {"Host": "localhost", "Content-Type": "application/json"} | (headers or {})
        if body is not None:
            lines.append(f"Content-Length: {len(data)}")
        lines += [f"{name}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode() + data)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    except (OSError, asyncio.IncompleteReadError) as error:
        raise Broken(repr(error)) from None
    status = int(head[0].split()[1])
    found = dict(_header(line) for line in head[1:] if line)
    return Answer(status, found, reader, writer)


def _header(line: str) -> tuple[str, str]:
    name, _, value = line.partition(": ")
    return name.lower(), value
