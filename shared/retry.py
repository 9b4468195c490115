"""Repeats what the bus did not do, with growing pauses."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from shared.bus import BusError, PayloadTooLarge

log = structlog.get_logger()
T = TypeVar("T")

FIRST_PAUSE = 0.05
LONGEST_PAUSE = 2.0


async def until_done(what: str, key: str, attempt: Callable[[], Awaitable[T]]) -> T:
    """Repeats `attempt` until the bus has done it. Raises PayloadTooLarge, which no repetition mends."""
    pause = FIRST_PAUSE
    while True:
        try:
            return await attempt()
        except PayloadTooLarge:
            raise
        except BusError as error:
            log.warning("retrying", what=what, request_id=key, error=repr(error), after=pause)
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE)
