"""The scheduler's entries of the token log: OPEN, FENCE, ATTACH, END."""

from __future__ import annotations

import asyncio

from services.scheduler.requests import Known, Requests
from services.scheduler.settings import SchedulerSettings
from shared import codec, subjects
from shared import messages as m
from shared.bus import Appended, Bus, BusError
from shared.errors import ErrorCode
from shared.retry import until_done


class Entries:
    def __init__(self, bus: Bus, settings: SchedulerSettings, requests: Requests) -> None:
        self._bus = bus
        self._settings = settings
        self._requests = requests

    async def append(self, entry: m.LogEntry) -> None:
        """Stores an entry of the token log, however long it takes. Repeats are harmless: the fold ignores them."""
        assert not isinstance(entry, m.StepTokens)
        subject, data = self._placed(entry.key, entry)
        await until_done(type(entry).__name__, entry.key, lambda: self._bus.append(subject, data))

    async def open(self, known: Known, revision: int = 0) -> None:
        if not known.opened:
            await self.opening(known, revision)

    def opening(self, known: Known, revision: int) -> asyncio.Task[None]:
        """OPEN is on its way when this returns, and stored when the task is done. revision: see Open."""
        request = known.request
        entry = m.Open(
            request.key,
            request.reply,
            known.seq,
            len(request.prompt_ids) // 4,
            request.sampling.max_tokens,
            request.stop,
            request.choices,
            request.sampling.logprobs is not None,
            request.durable,
            request.metadata,
            request.trace,
            request.tokenize_ms,
            self._requests.age(known) * 1e3,
            tool_format=request.tool_format,
            best=request.best,
            prompt_logprobs=request.sampling.prompt_logprobs is not None,
            prompt_ids=request.prompt_ids if request.echo else b"",
            revision=revision,
            body_hash=request.body_hash,
        )
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[Appended | BusError] = loop.create_future()

        def told(answer: Appended | BusError) -> None:
            if not outcome.done():  # as when this process is about to end
                outcome.set_result(answer)

        sent = self._bus.append_soon(*self._placed(request.key, entry), told)

        async def stored() -> None:
            if not sent or isinstance(await outcome, BusError):
                await self.append(entry)
            known.opened = True

        return loop.create_task(stored())

    def _placed(self, key: str, entry: m.LogEntry) -> tuple[str, bytes]:
        """Subject and data."""
        partition = subjects.partition_of(key, self._settings.partitions)
        return subjects.tok(self._settings.model, partition), codec.encode(entry)


def our_fault(key: str) -> m.End:
    return m.End(key, "error", failure=m.Failure(ErrorCode.INTERNAL, "the scheduler failed at this request"))
