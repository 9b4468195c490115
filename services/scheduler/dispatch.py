"""Requests that wait for a worker: migrated ones first (a client is watching them), then new ones by fair turns."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from services.scheduler.fairness import Charge, FairQueue, Shares
from services.scheduler.fleet import Fleet, Worker
from services.scheduler.ledger import Ledger
from services.scheduler.placement import Need, PrefixIndex, choose, in_use, prefix_chunks
from shared import messages as m
from shared.capabilities import needed_of_workers
from shared.subjects import split_request_key

PATIENCE = 8  # sequences that pass a request before a worker is kept for it, at least


class Expired(Exception):
    """The request's deadline passed while it waited."""


class Dropped(Exception):
    """The request was cancelled, or ended otherwise, while it waited."""


class Draining(Exception):
    """This scheduler goes away: another one has to take the request."""


@dataclass(eq=False, slots=True)
class Waiting:
    """`expires` is in loop time. `passed` counts sequences that others were given while this was the first in line and did not fit."""

    key: str
    request: m.Request
    need: Need
    turn: asyncio.Future[Worker]
    expires: float | None = None
    chunks: list[int] = field(default_factory=list)
    passed: int = 0


class Dispatcher:
    """`worker_for` waits for a turn and reserves a place; the caller gives the reservation back (`release`) once the ledger shows the
    request, or it failed."""

    def __init__(self, fleet: Fleet, ledger: Ledger, weights: Mapping[str, float]) -> None:
        self._fleet = fleet
        self._ledger = ledger
        self._draining = False
        self._index = PrefixIndex()
        self._queue: FairQueue[Waiting] = FairQueue(weights)
        self._shares = Shares(weights)
        self._reserved: Counter[str] = Counter()  # sequences of tenants that the ledger does not show yet
        self._migrated: dict[Waiting, None] = {}
        self._by_key: dict[str, dict[Waiting, None]] = {}
        self._charges: dict[str, Charge] = {}  # by key
        # Has been passed for long: what becomes free on the worker `holds` is for it.
        self._holder: Waiting | None = None
        self.holds = ""

    @property
    def waiting(self) -> int:
        """New requests without a worker."""
        return len(self._queue)

    @property
    def unplaced(self) -> int:
        """Migrated requests without a worker."""
        return len(self._migrated)

    def check_idle(self) -> list[str]:
        """Complaints if, with no live request, something is left here."""
        left = dict(waiting=self.waiting, unplaced=self.unplaced, keys=len(self._by_key), charges=len(self._charges))
        left |= {f"reserved for {tenant}": count for tenant, count in self._reserved.items()}
        left |= {w.instance: w.reserved + w.isolated_reserved for w in self._fleet.workers.values()}
        return [f"{name}: {count}" for name, count in left.items() if count]

    async def worker_for(
        self, request: m.Request, *, expires: float | None, prefix: int | None = None, isolated: bool = False
    ) -> tuple[Worker, Need]:
        """`prefix`: committed tokens of a migrated request, None for a new one. Raises Expired, Dropped, Draining."""
        if self._draining:
            raise Draining
        tenant = split_request_key(request.key)[0]
        slots = request.sampling.slots(request.choices)
        needed = needed_of_workers(request)
        need = Need(len(request.prompt_ids) // 4 + (prefix or 0), slots, isolated, tenant, needed)
        turn: asyncio.Future[Worker] = asyncio.get_running_loop().create_future()
        item = Waiting(request.key, request, need, turn, expires, prefix_chunks(request.prompt_ids))
        if prefix is not None:
            self._migrated[item] = None
        else:
            self._shares.seen(tenant, asyncio.get_running_loop().time())
            self._queue.put(tenant, request.priority, item)
        self._by_key.setdefault(item.key, {})[item] = None
        self.dispatch()
        try:
            return await turn, need
        finally:
            self._forget(item)

    def dispatch(self) -> None:
        """Gives out all turns that there is room for."""
        for item in list(self._migrated):
            if self._grant(item):
                del self._migrated[item]
        progress = True
        while progress:
            progress = False
            passed = list(self._migrated)
            for tenant, item in self._queue.candidates():
                has_its_share = self._has_its_share(tenant)
                if not self._grant(item, has_its_share):
                    if not has_its_share:
                        passed.append(item)
                else:
                    if passed:
                        passed[0].passed += item.need.choices
                    self._queue.pop(tenant)
                    self.refund(item.key)  # of an earlier request with this id: only one of them will run
                    self._charges[item.key] = self._queue.charge(
                        tenant, item.need.tokens, item.request.sampling.max_tokens
                    )
                    progress = True
                    break

    def _has_its_share(self, tenant: str) -> bool:
        places = sum(worker.beat.max_seqs for worker in self._fleet.workers.values())
        running = self._ledger.tenants()
        used = running.get(tenant, 0) + self._reserved[tenant]
        return self._shares.has_its_share(tenant, used, places, running)

    def _grant(self, item: Waiting, keep_free: bool = False) -> bool:
        if item.turn.done():
            return False  # dropped or expired: it leaves by itself
        length = item.need.tokens + min(1, item.request.sampling.max_tokens)
        able = self._fleet.able(item.need.fields)
        workers = self._fleet.available(able, lambda beat: length <= min(beat.max_model_len, beat.kv_tokens_total))
        if item is not self._holder:
            held = {self.holds, *self._fleet.held_by_peers()}
            workers = [worker for worker in workers if worker.instance not in held]
        worker = choose(workers, self._ledger, self._index, item.need, item.chunks, keep_free)
        if worker is None:
            self._hold(item, workers)
            return False
        if item is self._holder:
            self._let_go()
        worker.reserved += item.need.choices
        self._reserved[item.need.tenant] += item.need.choices
        worker.reserved_tokens += item.need.tokens
        worker.isolated_reserved += item.need.isolated
        self._index.placed(worker.instance, item.chunks)
        item.turn.set_result(worker)
        return True

    def _hold(self, item: Waiting, workers: list[Worker]) -> None:
        """One that needs many places (or much of a worker's memory) might wait for ever for others to leave so much at once: when it
        has been passed by as many as it needs, the emptiest worker is kept for it. For one request at a time, so that the others have
        the other workers."""
        if item is self._holder:
            if self.holds not in {worker.instance for worker in workers}:
                self._let_go()  # the worker has gone, or takes nothing new
        elif self._holder is None and workers and item.passed >= max(item.need.choices, PATIENCE):
            emptiest = min(workers, key=lambda w: (in_use(w, self._ledger) / w.beat.max_seqs, w.instance))
            self._holder, self.holds = item, emptiest.instance

    def _let_go(self) -> None:
        self._holder, self.holds = None, ""

    def waiting_of(self, tenant: str) -> int:
        return self._queue.waiting(tenant)

    def release(self, worker: Worker, need: Need) -> None:
        worker.reserved -= need.choices
        self._reserved[need.tenant] -= need.choices
        if not self._reserved[need.tenant]:
            del self._reserved[need.tenant]
        worker.isolated_reserved -= need.isolated

    def ended(self, key: str, output_tokens: int) -> None:
        """The request is over: corrects its tenant's counter, and drops it if it still waits."""
        if (charge := self._charges.pop(key, None)) is not None:
            self._queue.correct(charge, output_tokens)
        self.drop(key)

    def refund(self, key: str) -> None:
        """The request was not started after all."""
        if (charge := self._charges.pop(key, None)) is not None:
            self._queue.refund(charge)

    def drop(self, key: str) -> None:
        for item in self._by_key.get(key, ()):
            if not item.turn.done():
                item.turn.set_exception(Dropped(key))

    def expire(self, now: float) -> None:
        for item in self._all():
            if item.expires is not None and now >= item.expires and not item.turn.done():
                item.turn.set_exception(Expired(item.key))

    def drain(self) -> None:
        """Nobody waits here any more."""
        self._draining = True
        for item in self._all():
            if not item.turn.done():
                item.turn.set_exception(Draining())

    def forget_worker(self, instance: str) -> None:
        self._index.forget(instance)

    def _all(self) -> list[Waiting]:
        return [item for items in self._by_key.values() for item in items]

    def _forget(self, item: Waiting) -> None:
        items = self._by_key[item.key]
        del items[item]
        if not items:
            del self._by_key[item.key]
        if item is self._holder:
            self._let_go()
        granted = not item.turn.cancelled() and item.turn.exception() is None
        if not granted:
            if item in self._migrated:
                del self._migrated[item]
            else:
                self._queue.remove(split_request_key(item.key)[0], item)
