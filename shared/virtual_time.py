"""An asyncio event loop whose clock jumps to the next timer as soon as nothing is ready: hours of protocol in seconds, and
the same each time. `asyncio.Runner(loop_factory=VirtualTimeLoop).run(main())`

It has no selector, no sockets and no threads. Timers due at one instant run in the order in which they were set, so a run depends on
nothing but the program and its seeds.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable
from contextvars import Context, copy_context
from heapq import heappop, heappush
from typing import Any, TypeVarTuple

_Ts = TypeVarTuple("_Ts")


class Deadlock(RuntimeError):
    """Nothing is ready and no timer is set: the program would wait for ever."""


class Handle(asyncio.TimerHandle):
    """asyncio's own, without what it does for debugging: its constructor costs as much as many a callback."""

    __slots__ = ()
    _args: tuple[Any, ...]
    _callback: Callable[..., object] | None
    _context: Context

    def __init__(
        self, when: float, callback: Callable[..., object], args: tuple[Any, ...], loop: Any, context: Context | None
    ) -> None:
        self._when = when
        self._callback = callback
        self._args = args
        self._loop = loop
        self._context = copy_context() if context is None else context
        self._cancelled = self._scheduled = False
        self._repr = self._source_traceback = None

    def cancel(self) -> None:
        self._cancelled = True
        self._callback, self._args = None, ()


class VirtualTimeLoop(asyncio.BaseEventLoop):
    """See the module docstring. `time()` starts at 0."""

    _ready: deque[Handle]
    _stopping: bool

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._order = itertools.count()
        # BaseEventLoop's own heap holds handles, whose comparison costs as much as all the rest.
        self._timers: list[tuple[float, int, Handle]] = []

    def time(self) -> float:
        return self._now

    def call_at(
        self,
        when: float,
        callback: Callable[[*_Ts], object],
        *args: *_Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        timer = Handle(when, callback, args, self, context)
        heappush(self._timers, (when, next(self._order), timer))
        return timer

    def call_later(
        self,
        delay: float,
        callback: Callable[[*_Ts], object],
        *args: *_Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_soon(
        self, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.Handle:
        handle = Handle(self._now, callback, args, self, context)
        self._ready.append(handle)
        return handle

    def _run_once(self) -> None:
        """One round of BaseEventLoop: what is ready now, and not what becomes ready meanwhile."""
        ready, timers, may_run = self._ready, self._timers, self._may_run
        while timers and timers[0][2]._cancelled:
            heappop(timers)
        if not ready and not self._stopping:
            if not timers:
                raise Deadlock("every task waits and no timer is set")
            self._now = max(self._now, timers[0][0])
        now = self._now
        while timers and timers[0][0] <= now:
            ready.append(heappop(timers)[2])
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle._cancelled and may_run(handle):
                handle._run()

    def _may_run(self, handle: Handle) -> bool:
        """For loops that hold some back."""
        return True

    def _write_to_self(self) -> None:
        pass
