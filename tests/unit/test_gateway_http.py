"""Clients that stand still, against the HTTP protocol alone."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn

from services.gateway.http_protocol import StreamingProtocol

PATIENCE = 0.5  # seconds
ANSWER = bytes(32 << 20)  # more than the kernel takes


class Impatient(StreamingProtocol):
    read_timeout = stall_timeout = PATIENCE


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Reads the body, then answers at length to /long."""
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        more = message.get("more_body", False)
    answer = ANSWER if scope["path"] == "/long" else b"short"
    headers = [(b"content-length", b"%d" % len(answer))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(app, http=Impatient, loop="none", ws="none", lifespan="off", log_config=None, timeout_graceful_shutdown=1)
    )  # fmt: skip
    serving = asyncio.create_task(server.serve([listener]))
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 10)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, listener.getsockname())
    reader, writer = await asyncio.open_connection(sock=client, limit=16 << 10)
    try:
        async with asyncio.timeout(30):
            yield reader, writer
    finally:
        writer.close()
        server.should_exit = True
        await serving


async def test_who_reads_nothing_is_cut_off() -> None:
    async with connected() as (reader, writer):
        writer.write(b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(4 * PATIENCE)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(len(ANSWER))


async def test_who_reads_slowly_gets_all_of_it() -> None:
    async with connected() as (reader, writer):
        writer.write(b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        left = len(ANSWER)
        while left:
            left -= len(await reader.readexactly(min(left, 1 << 20)))
            await asyncio.sleep(PATIENCE / 8)


@pytest.mark.parametrize(
    "sent", [b"", b"POST / HTTP/1.1\r\nHo", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf"]
)
async def test_what_never_becomes_a_request_is_closed(sent: bytes) -> None:
    async with connected() as (reader, writer):
        writer.write(sent)
        assert await reader.read() == b""


async def test_a_body_may_come_slowly() -> None:
    async with connected() as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
        for _ in range(9):
            await asyncio.sleep(PATIENCE / 3)
            writer.write(b"x")
        assert (await reader.readuntil(b"short")).startswith(b"HTTP/1.1 200 ")
