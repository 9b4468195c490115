"""Processes of a simulation: each is a context of its own on one event loop in virtual time, so that it can be killed (nothing of it
ever runs again) and stopped (everything of it waits, and goes on later with the clock far ahead), as the operating system does it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from typing import Any

from shared.memory_bus import MemoryBroker, MemoryBus
from shared.virtual_time import Handle, VirtualTimeLoop

# How long what dies may still run, cut off from the world: so that its tasks end and nothing is left to be destroyed.
AFTERLIFE = 1.0

_current: ContextVar[Process | None] = ContextVar("process", default=None)


class Process:
    """Runs `main(bus)` in its own context, on a connection of its own."""

    def __init__(self, name: str, broker: MemoryBroker) -> None:
        self.name = name
        self.alive = True
        self.stopped = False
        self.over = False  # even the afterlife
        self.buried = False
        self.parked: list[Handle] = []
        self.tasks: dict[asyncio.Task[Any], None] = {}
        self._context = copy_context()
        self._context.run(_current.set, self)
        self.bus = self.call(MemoryBus, broker)

    def call(self, function: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        """Calls a function inside the process."""
        return self._context.copy().run(function, *args, **keywords)

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = self.call(asyncio.get_running_loop().create_task, coroutine)
        return task

    def kill(self) -> None:
        """kill -9."""
        if not self.alive:
            return
        self.alive = False
        self.bus.abort()
        self.resume()
        for task in list(self.tasks):
            task.cancel()
        asyncio.get_running_loop().call_later(AFTERLIFE, self._end, context=Context())

    def _end(self) -> None:
        self.over = not self.buried

    def bury(self) -> None:
        """The simulation is over: lets what is left of its tasks end."""
        self.kill()
        self.over, self.buried = False, True

    def stop(self) -> None:
        """SIGSTOP."""
        self.stopped = self.alive

    def resume(self) -> None:
        """SIGCONT."""
        if self.stopped:
            self.stopped = False
            loop = asyncio.get_running_loop()
            assert isinstance(loop, SimulationLoop)
            loop.run_soon(self.parked)
            self.parked = []


class SimulationLoop(VirtualTimeLoop):
    """Virtual time for processes."""

    def _may_run(self, handle: Handle) -> bool:
        process = handle._context.get(_current)
        if process is None or not (process.stopped or process.over):
            return True
        if process.stopped:
            process.parked.append(handle)
        return False

    def run_soon(self, handles: list[Handle]) -> None:
        self._ready.extend(handles)

    def create_task(self, coro: Any, *, name: str | None = None, context: Context | None = None) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = super().create_task(coro, name=name, context=context)  # type: ignore[call-overload]
        if (process := _current.get()) is not None:
            process.tasks[task] = None
            task.add_done_callback(process.tasks.pop)
        return task
