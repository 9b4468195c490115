"""Fixtures that several folders of tests share."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import ModuleType

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


@pytest.fixture(scope="session")
def tiny_models() -> ModuleType:
    """Makes tiny random models of many families, as oracles."""
    file = Path(__file__).resolve().parents[2] / "shared/tools/tiny_models.py"
    if not file.is_file():
        pytest.skip("../shared/tools/tiny_models.py is not here")
    spec = importlib.util.spec_from_file_location("tiny_models", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
