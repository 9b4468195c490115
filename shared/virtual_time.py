"""An asyncio event loop whose clock jumps to the next timer as soon as nothing is ready: hours of protocol in seconds, and
the same each time. `asyncio.Runner(loop_factory=VirtualTimeLoop).run(main())`

It has no selector, no sockets and no threads. Timers due at one instant run in the order in which they were set, so a run depends on
nothing but the program and its seeds.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable
from contextvars import Context
from typing import Any, TypeVarTuple

_Ts = TypeVarTuple("_Ts")


class Deadlock(RuntimeError):
    """Nothing is ready and no timer is set: the program would wait for ever."""


class _Timer(asyncio.TimerHandle):
    """A timer with a place among those of the same instant (asyncio's own order among them is the heap's whim)."""

    __slots__ = ("order",)

    def __init__(self, order: int, *args: Any) -> None:
        super().__init__(*args)
        self.order = order

    def __lt__(self, other: Any) -> bool:
        when, others = self._when, other._when  # type: ignore[attr-defined]
        return bool(self.order < other.order if when == others else when < others)


class _JumpingSelector:
    """Stands where BaseEventLoop waits for I/O, and moves the clock instead."""

    def __init__(self, loop: VirtualTimeLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise Deadlock("every task waits and no timer is set")
        if timeout > 0:
            self._loop.jump()
        return []


class VirtualTimeLoop(asyncio.BaseEventLoop):
    """See the module docstring. `time()` starts at 0."""

    _scheduled: list[asyncio.TimerHandle]

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._order = itertools.count()
        self._clock_resolution = 1e-9
        self._selector = _JumpingSelector(self)  # the one that BaseEventLoop's _run_once asks

    def time(self) -> float:
        return self._now

    def jump(self) -> None:
        """To the next timer; called by the selector when nothing is ready."""
        self._now = max(self._now, self._scheduled[0].when())

    def call_at(
        self,
        when: float,
        callback: Callable[[*_Ts], object],
        *args: *_Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        timer = _Timer(next(self._order), when, callback, args, self, context)
        heapq.heappush(self._scheduled, timer)
        timer._scheduled = True  # type: ignore[attr-defined]  # so that a cancelled one is counted and swept
        return timer

    def call_later(
        self,
        delay: float,
        callback: Callable[[*_Ts], object],
        *args: *_Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def _process_events(self, event_list: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass
