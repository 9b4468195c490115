"""Fixtures that several folders of tests share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
import structlog

from shared.broker import Broker


@pytest_asyncio.fixture
async def nats_server(tmp_path: Path) -> AsyncIterator[Broker]:
    """A real nats-server with JetStream in a fresh folder. Tests may kill it and start it again."""
    server = Broker(tmp_path / "nats")
    await server.start()
    yield server
    await server.kill()


@pytest.fixture(autouse=True)
def fresh_logs() -> Iterator[None]:
    """Commands configure logging for their own process; here it would write to a stream that pytest has closed."""
    yield
    structlog.reset_defaults()
