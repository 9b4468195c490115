"""Tests in virtual time."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine
from typing import Any

from shared.virtual_time import VirtualTimeLoop
from tests.protocol.simulated_processes import SimulationLoop

Test = Callable[..., Coroutine[Any, Any, None]]


def virtual(test: Test) -> Callable[..., None]:
    """Runs the test in virtual time."""
    return _on(VirtualTimeLoop, test)


def with_processes(test: Test) -> Callable[..., None]:
    """The same, with processes that can be stopped (tests.protocol.simulated_processes)."""
    return _on(SimulationLoop, test)


def _on(loop: Callable[[], asyncio.AbstractEventLoop], test: Test) -> Callable[..., None]:
    def run(**arguments: Any) -> None:
        with asyncio.Runner(loop_factory=loop) as runner:
            runner.run(test(**arguments))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    run.__signature__ = inspect.signature(test)  # type: ignore[attr-defined]
    return run


async def until(condition: Callable[[], Any], within: float = 30.0) -> Any:
    """Waits until the condition holds; returns its value."""
    async with asyncio.timeout(within):
        while not (value := condition()):  # noqa: ASYNC110 - virtual time
            await asyncio.sleep(0.005)
    return value
