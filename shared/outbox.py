"""Sends messages to streams again and again until they are stored: what goes in is neither dropped nor forgotten.

Up to WINDOW messages of a subject are under way at a time. A message that got lost is sent again by itself, so one subject's messages
can be stored twice, and out of order after a failure. The fold of the token log tolerates both; other readers need a `msg_id`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import structlog

from shared.bus import Appended, Bus, BusError, PayloadTooLarge, StorageFull
from shared.service import Service

log = structlog.get_logger()

WINDOW = 8
# Seconds between attempts, growing. `append` itself waits for the connection, so this is only against a busy loop.
FIRST_DELAY, LONGEST_DELAY = 0.02, 1.0


@dataclass(slots=True)
class _Item:
    data: bytes
    stored: Callable[[], None] | None
    msg_id: str | None
    acked: bool = False


@dataclass(slots=True)
class _Lane:
    """One subject's messages, oldest first; the first `sent` of them are under way."""

    items: deque[_Item] = field(default_factory=deque)
    sent: int = 0


class Outbox:
    """Bounded by `limit` messages through its user: at the limit `on_full(True)` asks to pause, at half of it `on_full(False)` to go
    on. What is put in between is taken all the same.

    on_storage_full  told True when a stream has no room (sending goes on, ever more slowly) and False when it has again
    """

    def __init__(
        self,
        bus: Bus,
        *,
        limit: int,
        on_full: Callable[[bool], None] | None = None,
        on_storage_full: Callable[[bool], None] | None = None,
    ) -> None:
        self._bus = bus
        self._limit = limit
        self._on_full = on_full
        self._on_storage_full = on_storage_full
        self._owner: Service | None = None
        self._lanes: dict[str, _Lane] = {}
        self._count = 0
        self._empty = asyncio.Event()
        self._empty.set()
        self.full = False
        self.storage_full = False
        self.retries = 0

    def __len__(self) -> int:
        """Messages that are not stored yet, as far as is known."""
        return self._count

    def start(self, owner: Service) -> None:
        """Begins to send. An error that sending again cannot mend fails `owner`."""
        self._owner = owner
        for subject, lane in self._lanes.items():
            self._advance(subject, lane)

    def stop(self) -> None:
        """Nothing more is sent."""
        self._owner = None

    def put(
        self, subject: str, data: bytes, stored: Callable[[], None] | None = None, *, msg_id: str | None = None
    ) -> None:
        """`stored` is called once this message and all earlier ones of its subject are stored."""
        lane = self._lanes.setdefault(subject, _Lane())
        lane.items.append(_Item(data, stored, msg_id))
        self._count += 1
        self._empty.clear()
        self._advance(subject, lane)
        if not self.full and self._count >= self._limit:
            self._set_full(True)

    async def flush(self) -> None:
        """Waits until everything is stored."""
        await self._empty.wait()

    def _advance(self, subject: str, lane: _Lane) -> None:
        if self._owner is None:
            return
        while lane.sent < min(WINDOW, len(lane.items)):
            item = lane.items[lane.sent]
            lane.sent += 1
            done = partial(self._on_outcome, subject, lane, item)
            if not self._bus.append_soon(subject, item.data, done, msg_id=item.msg_id):
                self._owner.spawn(self._send(subject, lane, item, 0.0), "outbox")

    def _on_outcome(self, subject: str, lane: _Lane, item: _Item, outcome: Appended | BusError) -> None:
        if isinstance(outcome, Appended):
            self._on_stored(subject, lane, item)
        elif self._owner is not None:
            self._note(subject, outcome, FIRST_DELAY)
            self._owner.spawn(self._send(subject, lane, item, FIRST_DELAY), "outbox")

    async def _send(self, subject: str, lane: _Lane, item: _Item, delay: float) -> None:
        """After `delay` seconds; and then, ever more slowly, until it is stored."""
        while True:
            await asyncio.sleep(delay)
            delay = min(max(2 * delay, FIRST_DELAY), LONGEST_DELAY)
            try:
                await self._bus.append(subject, item.data, msg_id=item.msg_id)
                break
            except PayloadTooLarge:
                raise
            except BusError as error:
                self._note(subject, error, delay)
        self._on_stored(subject, lane, item)

    def _note(self, subject: str, error: BusError, delay: float) -> None:
        self.retries += 1
        if isinstance(error, StorageFull):
            self._set_storage_full(True)
        log.warning("append_again", subject=subject, error=repr(error), delay=delay)

    def _on_stored(self, subject: str, lane: _Lane, item: _Item) -> None:
        self._set_storage_full(False)
        item.acked = True
        while lane.items and lane.items[0].acked:
            first = lane.items.popleft()
            lane.sent -= 1
            self._count -= 1
            if first.stored is not None:
                first.stored()
        self._advance(subject, lane)
        if self.full and self._count <= self._limit // 2:
            self._set_full(False)
        if self._count == 0:
            self._empty.set()

    def _set_full(self, full: bool) -> None:
        self.full = full
        if self._on_full is not None:
            self._on_full(full)

    def _set_storage_full(self, full: bool) -> None:
        if full == self.storage_full:
            return
        self.storage_full = full
        log.error("storage_full") if full else log.info("storage_has_room")
        if self._on_storage_full is not None:
            self._on_storage_full(full)
