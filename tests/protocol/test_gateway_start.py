"""What keeps a gateway from starting is told in one line, with a code, and is no traceback."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from services.gateway.service import GatewayService
from services.gateway.settings import GatewaySettings
from shared.errors import StartError
from shared.memory_bus import MemoryBroker, MemoryBus


async def start(**settings: object) -> None:
    service = GatewayService(MemoryBus(MemoryBroker()), GatewaySettings(host="127.0.0.1", **settings))  # type: ignore[arg-type]
    try:
        await service.start()
    finally:
        await service.stop()


@pytest.mark.parametrize("text", [None, "no TOML", '[keys.a]\nsha256 = "xyz"\n'])
async def test_api_keys_that_cannot_be_read(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "keys.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(StartError) as caught:
        await start(port=0, api_keys=str(path))
    assert caught.value.code == "unreadable_api_keys"


@pytest.mark.parametrize("setting", ["port", "metrics_port"])
async def test_a_port_that_is_taken(setting: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = {"port": 0, "metrics_host": "127.0.0.1", setting: taken.getsockname()[1]}
        with pytest.raises(StartError) as caught:
            await start(**ports)
    assert caught.value.code == "cannot_listen"
