"""Fixtures that several folders of tests share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from shared.broker import Broker


@pytest_asyncio.fixture
async def nats_server(tmp_path: Path) -> AsyncIterator[Broker]:
    """A real nats-server with JetStream in a fresh folder. Tests may kill it and start it again."""
    server = Broker(tmp_path / "nats")
    await server.start()
    yield server
    await server.kill()
