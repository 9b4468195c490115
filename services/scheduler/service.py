"""The scheduler stage: admits and places requests, watches the workers, migrates.

Any number of schedulers run at once. New requests come to one of them (REQ's durable consumers); what is live is known to all (a watch
of KV `assign`), and each looks after the part that rendezvous hashing gives it. When two believe they do, compare-and-swap decides.
"""

from __future__ import annotations

import asyncio
import contextlib

from services.scheduler.assignments import Assignments
from services.scheduler.cancel import CancelDoor
from services.scheduler.dispatch import Dispatcher
from services.scheduler.entries import Entries
from services.scheduler.fleet import Fleet, Link
from services.scheduler.housekeeping import Housekeeping
from services.scheduler.intake import Intake
from services.scheduler.ledger import Ledger
from services.scheduler.migration import Migrations
from services.scheduler.orders import Orders
from services.scheduler.recovery import diagnose, moved_because, stale_runs
from services.scheduler.requests import Requests
from services.scheduler.settings import SchedulerSettings
from shared import codec, subjects
from shared import messages as m
from shared.bus import Bus, Entry, Message
from shared.logging import note_request
from shared.rendezvous import owner
from shared.retry import until_done
from shared.service import Service

TICK = 0.05
CLOCK_PATIENCE = 5.0
SCAN = 0.2


class SchedulerService(Service):
    stage = "scheduler"
    settings: SchedulerSettings

    def __init__(self, bus: Bus, settings: SchedulerSettings) -> None:
        super().__init__(bus, settings)
        self.ledger = ledger = Ledger()
        link = Link(settings.heartbeat_interval, settings.reconnect_grace)
        self.fleet = Fleet(link, settings.silence, settings.step_margin)
        self.dispatcher = dispatcher = Dispatcher(self.fleet, ledger, settings.tenant_weights)
        self._requests = requests = Requests(bus)
        self._assignments = assignments = Assignments(bus, ledger, link)
        entries = Entries(bus, settings, requests)
        self._orders = orders = Orders(self, settings, self.fleet, ledger, requests, assignments, entries)
        self._migrations = Migrations(self, settings, ledger, dispatcher, requests, assignments, entries, orders)
        self._intake = Intake(
            self, settings, dispatcher, requests, assignments, entries, orders, self._migrations, self._on_assignment
        )
        self._cancel_door = CancelDoor(self, settings, dispatcher, assignments, entries)
        self._housekeeping = Housekeeping(self, settings, ledger, requests, self._responsible)

    # ------------------------------------------------ life

    async def on_start(self) -> None:
        await self._assignments.watch(self._on_assignment)
        model = self.settings.model
        await self.bus.subscribe(subjects.heartbeats("model_worker", model), self._on_worker_beat)
        await self.bus.subscribe(subjects.heartbeats(self.stage, model), self._on_scheduler_beat)
        await self._cancel_door.open()
        # Before the first delivery, else it is not known how old a request is that waited for a scheduler; but for no longer than this,
        # as a store without room has none for the entry that tells.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOCK_PATIENCE):
                await until_done("clock", model, self._housekeeping.look_at_clock)
        await self._intake.open()
        self.spawn(self._tick_forever(), "tick")
        self.spawn(self._housekeeping.watch_clock_forever(), "clock")
        self.spawn(self._intake.keep_forever(), "keep_deliveries")
        self.spawn(self._housekeeping.trim_forever(), "trim")

    async def on_drain(self) -> None:
        """Takes no more; gives back what waits; ends what is half done, so that nobody has to find it out by a timeout."""
        self._intake.drain()
        self.dispatcher.drain()
        while self._intake.holding or self._migrations.busy:  # noqa: ASYNC110 - both shrink as their tasks end
            await asyncio.sleep(0.01)

    async def on_stop(self) -> None:
        await self._intake.close()

    def heartbeat(self) -> m.Heartbeat:
        slots = sum(w.beat.max_seqs for w in self.fleet.workers.values())
        return self.base_heartbeat(
            load=min(1.0, len(self.ledger.live) / slots) if slots else 0.0,
            in_flight=len(self._intake.holding),
            waiting=self.dispatcher.waiting,
            live=len(self.ledger.live),
            unplaced=self.dispatcher.unplaced,
            workers=len(self.fleet.workers),
            migrations=self._migrations.count,
            **({"holds": self.dispatcher.holds} if self.dispatcher.holds else {}),
        )

    def check_idle(self) -> list[str]:
        """Complaints if, with no live request, something is left here."""
        left = [
            f"{name}: {len(what)}"
            for name, what in (("holding", self._intake.holding), ("busy", self._migrations.busy))
            if what
        ]
        return left + self.dispatcher.check_idle()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    # ------------------------------------------------ what comes in

    def _on_assignment(self, entry: Entry) -> None:
        try:
            value = None if entry.value is None else codec.decode(entry.value)
        except codec.CodecError as error:
            self.log.error("unreadable_assignment", request_id=entry.key, error=str(error))
            return
        if isinstance(value, m.Assignment) and value.model != self.settings.model:
            return
        ended = self.ledger.apply(entry.key, value, entry.revision, self.fleet.link.proven)
        if value is not None:
            note_request(entry.key, value.epoch)
        if not isinstance(value, m.Tombstone):
            return
        self.dispatcher.ended(entry.key, value.completion_tokens)
        self._requests.forget(value.req_seq)
        # What ends by a stop string is aborted at the worker's next heartbeat.
        worker = ended.assignment.worker if ended is not None else ""
        if worker and value.reason != "finished" and self._responsible(entry.key):
            self._orders.abort(worker, entry.key, value.epoch)
        self.dispatcher.dispatch()

    def _on_worker_beat(self, message: Message) -> None:
        beat = codec.decode(message.data)
        if not isinstance(beat, m.WorkerHeartbeat):
            return  # it is still loading
        instance = beat.base.instance
        if self.fleet.heard(beat):
            self.log.info("worker_found", worker=instance, max_seqs=beat.max_seqs)
        for key, epoch in stale_runs(beat.running, instance, self.ledger):
            if self._responsible(key):
                self._orders.abort(instance, key, epoch)
        if beat.base.draining:
            for key in self.ledger.on_worker(instance):
                if key not in beat.running and self._responsible(key):
                    self._migrations.begin(key, "draining")
        else:
            self.dispatcher.dispatch()

    def _on_scheduler_beat(self, message: Message) -> None:
        beat = codec.decode_as(m.Heartbeat, message.data)
        if beat.instance == self.instance:
            self.fleet.link.echoed(self._now())
        else:
            self.fleet.heard_peer(beat.instance, beat.draining, beat.detail.get("holds", ""))

    # ------------------------------------------------ watching

    async def _tick_forever(self) -> None:
        scanned = 0.0
        while True:
            await asyncio.sleep(TICK)
            now = self._now()
            for instance, verdict in self.fleet.judge().items():
                self._worker_gone(instance, verdict)
            if now - scanned >= SCAN:
                scanned = now
                self._scan()
            self.dispatcher.expire(now)
            self.dispatcher.dispatch()

    def _worker_gone(self, instance: str, verdict: str) -> None:
        keys, beat = self.ledger.on_worker(instance), self.fleet.workers[instance].beat
        if verdict != "hung":
            self.fleet.remove(instance)
            self.dispatcher.forget_worker(instance)
        if keys or verdict != "hung":
            self.meter.count("gorgon_scheduler_workers_gone_total", verdict)
            self.log.warning("worker_gone", worker=instance, verdict=verdict, requests=len(keys))
        for key in keys:
            if self._responsible(key):
                self._migrations.begin(key, moved_because(verdict, self.ledger.live[key], beat), beat.suspects)

    def _scan(self) -> None:
        for request in list(self.ledger.live.values()):
            reason = diagnose(
                request,
                self.fleet,
                report_grace=self.settings.report_grace,
                finish_grace=self.settings.finish_grace,
                stuck_grace=self.settings.stuck_grace,
            )
            if reason is not None and self._responsible(request.key):
                self._migrations.begin(request.key, reason)

    def _responsible(self, key: str) -> bool:
        peers = self.fleet.live_peers()
        return not self.draining and owner(key, {*peers, self.instance}) == self.instance
