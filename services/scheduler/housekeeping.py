"""What is done now and then: looking at the server's clock, trimming REQ."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from services.scheduler.ledger import Ledger
from services.scheduler.requests import Requests
from services.scheduler.settings import SchedulerSettings
from shared import codec, subjects
from shared import messages as m
from shared.bus import BusError
from shared.service import Service

CLOCK_INTERVAL = 60.0


def intakes(settings: SchedulerSettings) -> list[tuple[str, str]]:
    """(subject, durable consumer) of each class of tenants."""
    model = settings.model
    return [(subjects.req(model, c), subjects.consumer_req(model, c)) for c in range(settings.tenant_classes)]


class Housekeeping:
    """`responsible`: whether this scheduler is the one that looks after something of that name."""

    def __init__(
        self,
        stage: Service,
        settings: SchedulerSettings,
        ledger: Ledger,
        requests: Requests,
        responsible: Callable[[str], bool],
    ) -> None:
        self._stage = stage
        self._settings = settings
        self._ledger = ledger
        self._requests = requests
        self._responsible = responsible
        self._acked_before: dict[str, int] = {}  # by intake subject: all below was acked a round of trimming ago

    async def watch_clock_forever(self) -> None:
        """Goes on after the first look, which is at the start."""
        while True:
            await asyncio.sleep(CLOCK_INTERVAL)
            try:
                await self.look_at_clock()
            except BusError as error:
                self._stage.log.warning("clock_unknown", error=repr(error))

    async def look_at_clock(self) -> None:
        """An entry without tokens shows the time at which the server stored it."""
        subject, nothing = subjects.tok(self._settings.model, 0), codec.encode(m.StepTokens("", 0, ()))
        appended = await self._stage.bus.append(subject, nothing)
        if (stored := await self._stage.bus.read(subjects.STREAM_TOK, appended.seq)) is not None:
            self._requests.observe_clock(stored.stamp)

    async def trim_forever(self) -> None:
        while True:
            await asyncio.sleep(self._settings.trim_interval)
            try:
                await self._trim()
            except BusError as error:
                self._stage.log.warning("trim_failed", error=repr(error))

    async def _trim(self) -> None:
        """Deletes the model's requests below the oldest that lives. What had been acknowledged one round ago has its assignment since,
        and that has reached the ledger, so everything older that is not there has ended."""
        model = self._settings.model
        acked = {}
        for subject, consumer in intakes(self._settings):
            acked[subject] = await self._stage.bus.acked_below(subjects.STREAM_REQ, consumer)
        before, self._acked_before = self._acked_before, acked
        if self._stage.bus.connected_for < self._settings.trim_interval or not self._responsible(f"trim.{model}"):
            return
        oldest = self._ledger.oldest()
        for subject, below in before.items():
            await self._stage.bus.trim(subjects.STREAM_REQ, below if oldest is None else min(below, oldest), subject)
