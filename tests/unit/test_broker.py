"""The embedded nats-server."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from shared import broker
from shared.broker import Broker, BrokerError, find_binary, free_port, server_command, server_info, wait_until_ready

pytestmark = pytest.mark.timeout(60)


async def test_start_stop_and_start_again(tmp_path: Path) -> None:
    server = Broker(tmp_path)
    await server.start()
    info = await server_info(server.port)
    assert info is not None and info["jetstream"] and info["max_payload"] == 8 * 2**20
    first = server.pid
    await server.kill()
    assert await server_info(server.port) is None
    port = server.port
    await server.start()
    assert (server.port, server.url) == (port, f"nats://127.0.0.1:{port}")
    assert server.pid != first
    await wait_until_ready(port, timeout=1.0)
    await server.stop()
    assert await server_info(port) is None
    await server.stop()


async def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    first = Broker(tmp_path / "a")
    await first.start()
    try:
        with pytest.raises(BrokerError, match="address already in use"):
            await Broker(tmp_path / "b", first.port).start()
        assert await server_info(first.port) is not None
    finally:
        await first.stop()


async def test_a_store_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "jetstream").write_text("a file where the folder should be")
    with pytest.raises(BrokerError, match="did not start"):
        await Broker(tmp_path).start()


async def test_waiting_for_a_server_that_does_not_come() -> None:
    with pytest.raises(BrokerError, match="no NATS server"):
        await wait_until_ready(free_port(), timeout=0.1)


async def test_something_else_on_the_port_is_no_server() -> None:
    def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n")
        writer.close()

    other = await asyncio.start_server(greet, "127.0.0.1", 0)
    async with other:
        assert not await server_info(other.sockets[0].getsockname()[1])


def test_the_command_serves_the_configuration_it_wrote(tmp_path: Path) -> None:
    command = server_command(tmp_path / "data", 4333, store_limit=2**30)
    assert command[0] == str(find_binary())
    config = json.loads(Path(command[-1]).read_text())
    assert config["port"] == 4333
    assert config["jetstream"]["max_file_store"] == 2**30


def test_the_binary_may_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "my-server"
    mine.write_text("#!/bin/sh\n")
    mine.chmod(0o755)
    monkeypatch.setenv(broker.BINARY_VARIABLE, str(mine))
    assert find_binary() == mine
