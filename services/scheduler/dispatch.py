"""Requests that wait for a worker: migrated ones first (a client is watching them), then new ones by fair turns."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from services.scheduler.fairness import FairQueue
from services.scheduler.fleet import Fleet, Worker
from services.scheduler.ledger import Ledger
from services.scheduler.placement import PrefixIndex, choose, prefix_chunks
from shared import messages as m
from shared.subjects import split_request_key


class Expired(Exception):
    """The request's deadline passed while it waited."""


class Dropped(Exception):
    """The request was cancelled, or ended otherwise, while it waited."""


class Draining(Exception):
    """This scheduler goes away: another one has to take the request."""


@dataclass(eq=False, slots=True)
class Waiting:
    """`expires` is in loop time; `migrated` requests go first; `isolated` ones need a worker without another such request."""

    key: str
    request: m.Request
    turn: asyncio.Future[Worker]
    expires: float | None = None
    migrated: bool = False
    isolated: bool = False
    chunks: list[bytes] = field(default_factory=list)

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_ids) // 4


class Dispatcher:
    """`worker_for` waits for a turn and reserves a place; the caller gives the reservation back (`release`) once the ledger shows the
    request, or it failed."""

    def __init__(self, fleet: Fleet, ledger: Ledger, weights: Mapping[str, float]) -> None:
        self._fleet = fleet
        self._ledger = ledger
        self.index = PrefixIndex()
        self.queue: FairQueue[Waiting] = FairQueue(weights)
        self.migrated: list[Waiting] = []
        self._guesses: dict[str, tuple[str, float]] = {}  # key: (tenant, output tokens charged in advance)

    async def worker_for(
        self, request: m.Request, *, expires: float | None, migrated: bool = False, isolated: bool = False
    ) -> Worker:
        """Raises Expired, Dropped, Draining."""
        turn: asyncio.Future[Worker] = asyncio.get_running_loop().create_future()
        chunks = prefix_chunks(request.prompt_ids)
        item = Waiting(request.key, request, turn, expires, migrated, isolated, chunks)
        if migrated:
            self.migrated.append(item)
        else:
            self.queue.put(split_request_key(request.key)[0], request.priority, item)
        self.dispatch()
        try:
            return await turn
        finally:
            self._remove(item)

    def dispatch(self) -> None:
        """Gives out all turns that there is room for."""
        for item in list(self.migrated):
            if self._grant(item):
                self.migrated.remove(item)
        progress = True
        while progress:
            progress = False
            for tenant, item in self.queue.candidates():
                if self._grant(item):
                    self.queue.pop(tenant)
                    guess = self.queue.charge(tenant, item.prompt_tokens, item.request.sampling.max_tokens)
                    self._guesses[item.key] = (tenant, guess)
                    progress = True
                    break

    def _grant(self, item: Waiting) -> bool:
        if item.turn.done():
            return True
        worker = choose(
            self._fleet.available(), self._ledger, self.index, item.prompt_tokens, item.chunks, item.isolated
        )
        if worker is None:
            return False
        worker.reserved += 1
        worker.reserved_tokens += item.prompt_tokens
        self.index.placed(worker.instance, item.chunks)
        item.turn.set_result(worker)
        return True

    def release(self, worker: Worker) -> None:
        worker.reserved -= 1

    def ended(self, key: str, output_tokens: int) -> None:
        """The request is over: corrects its tenant's counter, and drops it if it still waits."""
        if (guess := self._guesses.pop(key, None)) is not None:
            self.queue.correct(*guess, output_tokens)
        self.drop(key)

    def drop(self, key: str) -> None:
        for item in self._all():
            if item.key == key and not item.turn.done():
                item.turn.set_exception(Dropped(key))

    def expire(self, now: float) -> None:
        for item in self._all():
            if item.expires is not None and now >= item.expires and not item.turn.done():
                item.turn.set_exception(Expired(item.key))

    def drain(self) -> None:
        for item in self._all():
            if not item.turn.done():
                item.turn.set_exception(Draining())

    def _all(self) -> list[Waiting]:
        return [*self.migrated, *self.queue]

    def _remove(self, item: Waiting) -> None:
        if item in self.migrated:
            self.migrated.remove(item)
        self.queue.remove(item)
