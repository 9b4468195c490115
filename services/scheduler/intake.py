"""Takes requests out of REQ: each is placed, assigned, opened and ordered to run, and only then acknowledged."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from services.scheduler.assignments import Assignments
from services.scheduler.dispatch import Dispatcher, Draining, Dropped, Expired
from services.scheduler.entries import Entries, our_fault
from services.scheduler.fleet import Worker
from services.scheduler.housekeeping import intakes
from services.scheduler.migration import Migrations
from services.scheduler.orders import Orders
from services.scheduler.placement import Need
from services.scheduler.requests import Known, Requests
from services.scheduler.settings import SchedulerSettings
from shared import api, codec, subjects
from shared import messages as m
from shared.bus import BusError, Consumer, Delivery, Entry, WrongRevision
from shared.errors import ErrorCode, GorgonError
from shared.retry import until_done
from shared.service import Service
from shared.streams import JOB_ACK_WAIT

# A tenant that fills this share of the places of its class is asked to come again later, so that others of the class are not kept out.
TENANT_SHARE, COME_AGAIN = 0.75, 1.0


class Intake:
    """`holding`: by REQ sequence, what was delivered to this process and is not acknowledged."""

    def __init__(
        self,
        stage: Service,
        settings: SchedulerSettings,
        dispatcher: Dispatcher,
        requests: Requests,
        assignments: Assignments,
        entries: Entries,
        orders: Orders,
        migrations: Migrations,
        on_assignment: Callable[[Entry], None],
    ) -> None:
        self.holding: dict[int, Delivery] = {}
        self._class_limit = max(1, settings.max_waiting // settings.tenant_classes)
        self._stage = stage
        self._settings = settings
        self._dispatcher = dispatcher
        self._requests = requests
        self._assignments = assignments
        self._entries = entries
        self._orders = orders
        self._migrations = migrations
        self._on_assignment = on_assignment
        self._consumers: list[Consumer] = []
        self._queue_seconds = stage.meter.histogram("gorgon_scheduler_queue_seconds")

    async def open(self) -> None:
        for name, subject in subjects.job_consumers(self._settings.model).items():
            # Made here and used by tokenizers, which have no right to make them (shared/permissions.py).
            made = await self._consume(subjects.STREAM_JOBS, name, subject, 0, JOB_ACK_WAIT)
            await made.stop()
        for subject, durable in intakes(self._settings):
            self._consumers.append(
                await self._consume(subjects.STREAM_REQ, durable, subject, self._class_limit, self._settings.ack_wait)
            )

    async def _consume(self, stream: str, durable: str, subject: str, limit: int, ack_wait: float) -> Consumer:
        consume = self._stage.bus.consume
        return await until_done(
            "consume",
            durable,
            lambda: consume(stream, durable, subject, self._on_delivery, limit=limit, ack_wait=ack_wait),
        )

    def drain(self) -> None:
        for consumer in self._consumers:
            consumer.set_limit(0)

    async def close(self) -> None:
        for consumer in self._consumers:
            await consumer.stop()

    async def _on_delivery(self, delivery: Delivery) -> None:
        seq = delivery.message.seq
        if self._stage.draining:
            await delivery.nak()
            return
        self.holding[seq] = delivery
        try:
            await self._admit(delivery)
        except Draining:
            await delivery.nak()
        except BusError as error:
            self._stage.log.warning("admission_failed", seq=seq, error=repr(error))
            await delivery.nak(1.0)
        except Exception as error:
            known = self._requests.take(delivery.message)
            self._stage.log.exception("request_failed", request_id=known.request.key, error=repr(error))
            await self._end_unstarted(known, delivery, our_fault(known.request.key))
        finally:
            self.holding.pop(seq, None)

    async def _admit(self, delivery: Delivery) -> None:
        stored = delivery.message
        try:
            known = self._requests.take(stored)
        except codec.CodecError as error:
            self._stage.log.error("unreadable_request", seq=stored.seq, error=str(error))
            await delivery.ack()
            return
        request = known.request
        if delivery.attempt > 1 and (entry := await self._assignments.get(request.key)) is not None:
            await self._settle_duplicate(known, entry, delivery)
            return
        tenant = subjects.split_request_key(request.key)[0]
        if self._dispatcher.waiting_of(tenant) >= TENANT_SHARE * self._class_limit:
            await delivery.nak(COME_AGAIN)
            return
        span = self._stage.tracer.begin("schedule", request.trace, known.stamp, request_id=request.key, epoch=1)
        known.trace = span.traceparent
        try:
            worker, need = await self._dispatcher.worker_for(request, expires=self._requests.expires(known))
        except Expired:
            failure = m.Failure(
                ErrorCode.DEADLINE_EXCEEDED, "the deadline passed while the request waited for a worker"
            )
            await self._end_unstarted(known, delivery, m.End(request.key, "error", failure=failure))
            span.end(error=failure.code)
            return
        except Dropped:
            await self._end_unstarted(known, delivery, m.End(request.key, "cancelled"))
            span.end(error="cancelled")
            return
        span.event("placed", worker=worker.instance)
        await self._start(known, worker, need, delivery)
        span.end()

    async def _start(self, known: Known, worker: Worker, need: Need, delivery: Delivery) -> None:
        """Assign, OPEN and run, ack: from the first of these on, the request survives this process."""
        request = known.request
        self._migrations.busy.add(request.key)
        accepted = False
        try:
            try:
                revision = await self._assignments.create(known, worker.instance)
            except BusError as error:
                self._dispatcher.refund(request.key)
                entry = await self._assignments.get(request.key) if isinstance(error, WrongRevision) else None
                if entry is None:
                    raise
                await self._settle_duplicate(known, entry, delivery)
                return
            finally:
                self._dispatcher.release(worker, need)
            # The order does not wait until OPEN is stored: that would be a round trip more to the first token. OPEN is sent first,
            # and the fold lets tokens wait for it, should they overtake it all the same.
            opening = self._entries.opening(known, revision)
            accepted = await self._orders.run(known, 1, worker.instance)
            await opening
            if accepted:
                self._queue_seconds.observe(self._requests.age(known))
            await delivery.ack()
        finally:
            self._migrations.busy.discard(request.key)
        if not accepted:
            self._migrations.begin(request.key, "refused")

    async def _end_unstarted(self, known: Known, delivery: Delivery, end: m.End) -> None:
        """A request that ends before any worker had it."""
        try:
            revision = await self._assignments.create(known, "")
        except WrongRevision:
            if (entry := await self._assignments.get(end.key)) is not None:
                await self._settle_duplicate(known, entry, delivery)
                return
        await self._entries.open(known, revision)
        await self._entries.append(end)
        self._stage.log.info("ended_unstarted", request_id=end.key, reason=end.reason)
        await delivery.ack()

    async def _settle_duplicate(self, known: Known, entry: Entry, delivery: Delivery) -> None:
        """The key is taken: by this very request (redelivered after a scheduler died), by a repeat of it, or by another one."""
        request = known.request
        present = codec.decode(entry.value or b"")
        if present.req_seq == known.seq:
            # Only the acknowledgement was lost, or OPEN and the run, too: recovery looks after every live request, this one included.
            self._on_assignment(entry)
        elif present.body_hash == request.body_hash:
            if not request.durable:
                await self._entries.append(m.Attach(request.key, request.reply))
            self._stage.log.info("attached", request_id=request.key, reason="the same request is known already")
        else:
            error = GorgonError(ErrorCode.ID_CONFLICT, "the id belongs to a request with another body")
            tenant, request_id = subjects.split_request_key(request.key)
            event = api.error_event(request_id, error, metadata=request.metadata)
            if request.durable:
                told_as = subjects.request_key(tenant, request.refused_as or request_id)
                subject, msg_id = subjects.results(told_as), f"{request.key}:conflict:{known.seq}"
                data = api.encode_event(event, request.reply.encoding)
                await until_done("result", request.key, lambda: self._stage.bus.append(subject, data, msg_id=msg_id))
            else:
                for data in api.encode_for(request.reply, [event]):
                    self._stage.bus.publish(request.reply.subject, data)
            self._stage.log.warning("id_conflict", request_id=request.key)
        await delivery.ack()

    async def keep_forever(self) -> None:
        """What waits here for its turn must not be handed to another scheduler meanwhile."""
        while True:
            await asyncio.sleep(self._settings.ack_wait / 3)
            for delivery in list(self.holding.values()):
                await delivery.in_progress()
