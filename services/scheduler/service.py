"""The scheduler stage: admits and places requests, watches the workers, migrates.

Any number of schedulers run at once. New requests come to one of them (REQ's durable consumers); what is live is known to all (a watch
of KV `assign`), and each looks after the part that rendezvous hashing gives it. When two believe they do, compare-and-swap decides.
"""

from __future__ import annotations

import asyncio
import time

import msgpack

from services.scheduler.dispatch import Dispatcher, Draining, Dropped, Expired
from services.scheduler.fleet import Fleet, Link, Worker
from services.scheduler.ledger import Ledger
from services.scheduler.placement import Need
from services.scheduler.recovery import DEATHS, diagnose, stale_runs
from services.scheduler.requests import Known, Requests
from services.scheduler.settings import SchedulerSettings
from services.scheduler.suspicion import after_death, is_guilty, is_isolated
from shared import api, codec, subjects
from shared import messages as m
from shared.bus import Bucket, Bus, BusError, Consumer, Delivery, Entry, Message, PayloadTooLarge, WrongRevision
from shared.errors import ErrorCode, GorgonError
from shared.logging import note_request
from shared.rendezvous import owner
from shared.retry import until_done
from shared.service import Service
from shared.streams import JOB_ACK_WAIT

TICK = 0.05
SCAN = 0.2
CLOCK_INTERVAL = 60.0
TRY_ELSEWHERE = frozenset({"overloaded", "draining"})
# A tenant that fills this share of the places of its class is asked to come again later, so that others of the class are not kept out.
TENANT_SHARE, COME_AGAIN = 0.75, 1.0
RETRY_PAUSES = (0.02, 0.05, 0.1, 0.2, 0.5)


class SchedulerService(Service):
    stage = "scheduler"
    settings: SchedulerSettings

    def __init__(self, bus: Bus, settings: SchedulerSettings) -> None:
        super().__init__(bus, settings)
        self.ledger = Ledger()
        link = Link(settings.heartbeat_interval, settings.reconnect_grace)
        self.fleet = Fleet(link, settings.silence, settings.step_margin)
        self.dispatcher = Dispatcher(self.fleet, self.ledger, settings.tenant_weights)
        self._assign: Bucket
        self._consumers: list[Consumer] = []
        self._holding: dict[int, Delivery] = {}  # by REQ sequence: delivered to this process and not acknowledged
        self._class_limit = max(1, settings.max_waiting // settings.tenant_classes)
        self._busy: set[str] = set()  # keys that an assignment or a migration of this process is about
        self._requests = Requests(bus)
        self._acked_before: dict[str, int] = {}  # by intake subject: all below was acked a round of trimming ago
        self._migrations = 0
        self._cancels = self.endpoint("cancel", subjects.cancel(settings.model), subjects.SCHEDULERS)
        self._queue_seconds = self.meter.histogram("gorgon_scheduler_queue_seconds")
        self._migration_seconds = self.meter.histogram("gorgon_scheduler_migration_seconds")

    # ------------------------------------------------ life

    async def on_start(self) -> None:
        bucket = subjects.BUCKET_ASSIGN
        self._assign = await until_done("bucket", bucket, lambda: self.bus.bucket(bucket))
        listed = asyncio.Event()
        await until_done("watch", bucket, lambda: self._assign.watch(self._on_assignment, listed.set))
        await listed.wait()
        model = self.settings.model
        await self.bus.subscribe(subjects.heartbeats("model_worker", model), self._on_worker_beat)
        await self.bus.subscribe(subjects.heartbeats(self.stage, model), self._on_scheduler_beat)
        await self.bus.subscribe(subjects.cancel(model), self._on_cancel, queue=subjects.SCHEDULERS)
        await self.bus.subscribe(subjects.cancel(model), self._on_any_cancel)
        tenants = subjects.of_tenant(subjects.cancel(model))
        await self.bus.subscribe(tenants, self._on_cancel, queue=subjects.SCHEDULERS)
        await self.bus.subscribe(tenants, self._on_any_cancel)
        for name, subject in subjects.job_consumers(model).items():
            # Made here and used by tokenizers, which have no right to make them (shared/permissions.py).
            made = await self._consume(subjects.STREAM_JOBS, name, subject, 0, JOB_ACK_WAIT)
            await made.stop()
        for subject, durable in self._intakes():
            consumer = await self._consume(
                subjects.STREAM_REQ, durable, subject, self._class_limit, self.settings.ack_wait
            )
            self._consumers.append(consumer)
        self.spawn(self._tick_forever(), "tick")
        self.spawn(self._watch_clock(), "clock")
        self.spawn(self._keep_deliveries(), "keep_deliveries")
        self.spawn(self._trim_forever(), "trim")

    async def _consume(self, stream: str, durable: str, subject: str, limit: int, ack_wait: float) -> Consumer:
        return await until_done(
            "consume",
            durable,
            lambda: self.bus.consume(stream, durable, subject, self._on_delivery, limit=limit, ack_wait=ack_wait),
        )

    async def on_drain(self) -> None:
        """Takes no more; gives back what waits; ends what is half done, so that nobody has to find it out by a timeout."""
        for consumer in self._consumers:
            consumer.set_limit(0)
        self.dispatcher.drain()
        while self._holding or self._busy:  # noqa: ASYNC110 - both shrink as their tasks end
            await asyncio.sleep(0.01)

    async def on_stop(self) -> None:
        for consumer in self._consumers:
            await consumer.stop()

    def heartbeat(self) -> m.Heartbeat:
        slots = sum(w.beat.max_seqs for w in self.fleet.workers.values())
        return self.base_heartbeat(
            load=min(1.0, len(self.ledger.live) / slots) if slots else 0.0,
            in_flight=len(self._holding),
            waiting=self.dispatcher.waiting,
            live=len(self.ledger.live),
            unplaced=self.dispatcher.unplaced,
            workers=len(self.fleet.workers),
            migrations=self._migrations,
        )

    def check_idle(self) -> list[str]:
        """Complaints if, with no live request, something is left here."""
        left = [f"{name}: {len(what)}" for name, what in (("holding", self._holding), ("busy", self._busy)) if what]
        return left + self.dispatcher.check_idle()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    # ------------------------------------------------ intake

    async def _on_delivery(self, delivery: Delivery) -> None:
        seq = delivery.message.seq
        if self.draining:
            await delivery.nak()
            return
        self._holding[seq] = delivery
        try:
            await self._admit(delivery)
        except Draining:
            await delivery.nak()
        except BusError as error:
            self.log.warning("admission_failed", seq=seq, error=repr(error))
            await delivery.nak(1.0)
        except Exception as error:
            known = self._requests.take(delivery.message)
            self.log.exception("request_failed", request_id=known.request.key, error=repr(error))
            await self._end_unstarted(known, delivery, _our_fault(known.request.key))
        finally:
            self._holding.pop(seq, None)

    async def _admit(self, delivery: Delivery) -> None:
        stored = delivery.message
        try:
            known = self._requests.take(stored)
        except codec.CodecError as error:
            self.log.error("unreadable_request", seq=stored.seq, error=str(error))
            await delivery.ack()
            return
        request = known.request
        if delivery.attempt > 1 and (entry := await self._assign.get(request.key)) is not None:
            await self._settle_duplicate(known, entry, delivery)
            return
        tenant = subjects.split_request_key(request.key)[0]
        if self.dispatcher.waiting_of(tenant) >= TENANT_SHARE * self._class_limit:
            await delivery.nak(COME_AGAIN)
            return
        span = self.tracer.begin("schedule", request.trace, known.stamp, request_id=request.key, epoch=1)
        known.trace = span.traceparent
        try:
            worker, need = await self.dispatcher.worker_for(request, expires=self._requests.expires(known))
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
        self._busy.add(request.key)
        accepted = False
        try:
            try:
                await self._create(known, worker.instance)
            except BusError as error:
                self.dispatcher.refund(request.key)
                entry = await self._assign.get(request.key) if isinstance(error, WrongRevision) else None
                if entry is None:
                    raise
                await self._settle_duplicate(known, entry, delivery)
                return
            finally:
                self.dispatcher.release(worker, need)
            # The order does not wait until OPEN is stored: that would be a round trip more to the first token. OPEN is sent first,
            # and the fold lets tokens wait for it, should they overtake it all the same.
            _, accepted = await asyncio.gather(self._open(known), self._run(known, 1, worker.instance))
            if accepted:
                self._queue_seconds.observe(self._requests.age(known))
            await delivery.ack()
        finally:
            self._busy.discard(request.key)
        if not accepted:
            self._begin_migration(request.key, "refused")

    async def _end_unstarted(self, known: Known, delivery: Delivery, end: m.End) -> None:
        """A request that ends before any worker had it."""
        try:
            await self._create(known, "")
        except WrongRevision:
            if (entry := await self._assign.get(end.key)) is not None:
                await self._settle_duplicate(known, entry, delivery)
                return
        await self._open(known)
        await self._append(end)
        self.log.info("ended_unstarted", request_id=end.key, reason=end.reason)
        await delivery.ack()

    async def _create(self, known: Known, worker: str) -> None:
        request, key = known.request, known.request.key
        slots = request.sampling.slots(request.choices)
        assignment = m.Assignment(known.seq, 1, worker, request.body_hash, choices=slots, model=request.model)
        revision = await self._assign.create(key, codec.encode(assignment))
        self.ledger.apply(key, assignment, revision, self.fleet.link.proven)
        note_request(key, 1)
        self.log.debug("assigned", request_id=key, epoch=1, worker=worker)

    async def _settle_duplicate(self, known: Known, entry: Entry, delivery: Delivery) -> None:
        """The key is taken: by this very request (redelivered after a scheduler died), by a repeat of it, or by another one."""
        request = known.request
        present = codec.decode(entry.value or b"")
        if present.req_seq == known.seq:
            # Only the acknowledgement was lost, or OPEN and the run, too: recovery looks after every live request, this one included.
            self._on_assignment(entry)
        elif present.body_hash == request.body_hash:
            if not request.durable:
                await self._append(m.Attach(request.key, request.reply))
            self.log.info("attached", request_id=request.key, reason="the same request is known already")
        else:
            error = GorgonError(ErrorCode.ID_CONFLICT, "the id belongs to a request with another body")
            tenant_id = subjects.split_request_key(request.key)[1]
            event = api.error_event(tenant_id, error, metadata=request.metadata)
            if request.durable:
                subject, msg_id = subjects.results(request.key), f"{request.key}:conflict:{known.seq}"
                data = api.encode_event(event, request.reply.encoding)
                await until_done("result", request.key, lambda: self.bus.append(subject, data, msg_id=msg_id))
            else:
                for data in api.encode_for(request.reply, [event]):
                    self.bus.publish(request.reply.subject, data)
            self.log.warning("id_conflict", request_id=request.key)
        await delivery.ack()

    async def _keep_deliveries(self) -> None:
        """What waits here for its turn must not be handed to another scheduler meanwhile."""
        while True:
            await asyncio.sleep(self.settings.ack_wait / 3)
            for delivery in list(self._holding.values()):
                try:
                    await delivery.in_progress()
                except BusError as error:
                    self.log.warning("in_progress_failed", seq=delivery.message.seq, error=repr(error))

    # ------------------------------------------------ migration

    def _begin_migration(self, key: str, reason: str, suspects: tuple[str, ...] = ()) -> None:
        """`suspects`: the requests that a worker named when it died."""
        if key not in self._busy and not self.draining:
            self._busy.add(key)
            self.spawn(self._migrate(key, reason, suspects), f"migrate.{key}")

    async def _migrate(self, key: str, reason: str, suspects: tuple[str, ...]) -> None:
        began = self._now()
        try:
            pauses = iter(RETRY_PAUSES)
            while not await self._retarget(key, reason, suspects):
                reason = "refused"
                await asyncio.sleep(next(pauses, RETRY_PAUSES[-1]))
            if (live := self.ledger.live.get(key)) is not None and live.assignment.worker:
                self._migration_seconds.observe(self._now() - began)
        except WrongRevision:
            self.log.info("migration_left_to_another", request_id=key)
        except (Dropped, Draining):
            pass
        except BusError as error:
            self.log.warning("migration_failed", request_id=key, error=repr(error))  # found again by the next scan
        except Exception as error:
            self.log.exception("request_failed", request_id=key, error=repr(error))
            await self._append(_our_fault(key))
        finally:
            self._busy.discard(key)

    async def _retarget(self, key: str, reason: str, suspects: tuple[str, ...]) -> bool:
        """One attempt: CAS epoch+1, FENCE, prefix, CAS worker, run. False: to be tried again with a further epoch."""
        live = self.ledger.live.get(key)
        if live is None:
            return True
        began = time.time()
        died = reason in DEATHS and (not suspects or key in suspects)
        assignment = live.assignment._replace(epoch=live.assignment.epoch + 1, worker="")
        epoch = assignment.epoch
        self._migrations += 1
        self.meter.count("gorgon_scheduler_migrations_total", reason)
        self.log.info("migrating", request_id=key, epoch=epoch, reason=reason, worker=live.assignment.worker)
        revision = await self._update(key, assignment, live.revision)
        known = await self._requests.read(assignment.req_seq)
        if known is None:
            failure = m.Failure(ErrorCode.INTERNAL, "the request is no longer stored")
            await self._append(m.End(key, "error", failure=failure))
            self.log.error("request_lost", request_id=key, seq=assignment.req_seq)
            return True
        gone = live.assignment.worker
        span = self.tracer.begin(
            "migrate", known.request.trace, began, request_id=key, epoch=epoch, reason=reason, gone=gone
        )
        known.trace = span.traceparent
        await self._open(known)
        await self._append(m.Fence(key, epoch))
        span.event("fenced")
        prefix = await self._prefix(key, epoch)
        if prefix is None:
            span.end(error="it has ended, or goes on in a higher epoch")
            return True
        if died:
            assignment = after_death(assignment, sum(map(len, prefix.generated)) // 4, named=bool(suspects))
            if is_guilty(assignment):
                await self._quarantine(known, assignment, prefix)
                span.end(error=ErrorCode.QUARANTINED)
                return True
        isolated, length = is_isolated(assignment), sum(map(len, prefix.generated)) // 4
        try:
            worker, need = await self.dispatcher.worker_for(
                known.request, expires=self._requests.expires(known), prefix=length, isolated=isolated
            )
        except Expired:
            failure = m.Failure(
                ErrorCode.DEADLINE_EXCEEDED, "the deadline passed while the request waited for another worker"
            )
            await self._append(m.End(key, "error", failure=failure))
            span.end(error=failure.code)
            return True
        span.event("placed", worker=worker.instance)
        try:
            await self._update(key, assignment._replace(worker=worker.instance), revision)
        finally:
            self.dispatcher.release(worker, need)
        accepted = await self._run(known, epoch, worker.instance, prefix, isolated)
        span.set(prefix_tokens=length)
        span.end(error="" if accepted else "refused")
        return accepted

    async def _prefix(self, key: str, epoch: int) -> m.PrefixReply | None:
        """What the fence fixed. None if the request ended, or a higher epoch is in force."""
        partition = subjects.partition_of(key, self.settings.partitions)
        subject = subjects.prefix(self.settings.model, partition)
        question = codec.encode(m.PrefixQuery(key, epoch))
        pauses = iter(RETRY_PAUSES)
        while (live := self.ledger.live.get(key)) is not None and live.assignment.epoch == epoch:
            try:
                answer = await self.bus.request(subject, question, self.settings.prefix_timeout)
                reply = codec.decode_as(m.PrefixReply, answer.data)
                if reply.state == "running" and reply.epoch == epoch:
                    return reply
                if reply.state in ("ended", "superseded"):
                    return None
            except (BusError, codec.CodecError) as error:
                self.log.info("prefix_unknown", request_id=key, epoch=epoch, error=repr(error))
            await asyncio.sleep(next(pauses, RETRY_PAUSES[-1]))
        return None

    async def _run(
        self, known: Known, epoch: int, worker: str, prefix: m.PrefixReply | None = None, isolated: bool = False
    ) -> bool:
        """Orders the run. True: it is under way, or nothing more is to be done; False: another target is needed, after a fence."""
        request = known.request
        expires = self._requests.expires(known)
        order = m.Run(
            request.key,
            epoch,
            request.prompt_ids,
            request.sampling,
            request.choices,
            prefix.generated if prefix is not None else (),
            prefix.done if prefix is not None else (),
            request.priority,
            None if expires is None else max(0.001, expires - self._now()),
            isolated,
            known.trace,
            prompt_done=prefix.prompt_done if prefix is not None else 0,
            constraint=request.constraint,
        )
        try:
            answer = await self.bus.request(subjects.worker_run(worker), codec.encode(order), self.settings.run_timeout)
            reply = codec.decode_as(m.RunReply, answer.data)
        except PayloadTooLarge as error:
            reply = m.RunReply(False, ErrorCode.PAYLOAD_TOO_LARGE, str(error))
        except (BusError, codec.CodecError) as error:
            self.fleet.answered(worker, accepted=False)
            self.meter.count("gorgon_scheduler_runs_refused_total", "no_answer")
            self.log.warning("run_unanswered", request_id=request.key, epoch=epoch, worker=worker, error=repr(error))
            return False
        if reply.accepted or reply.code == "stale_epoch":
            self.fleet.answered(worker, accepted=True)
            return True
        self.fleet.answered(worker, accepted=False)
        self.meter.count("gorgon_scheduler_runs_refused_total", reply.code)
        self.log.warning(
            "run_refused", request_id=request.key, epoch=epoch, worker=worker, code=reply.code, error=reply.message
        )
        if reply.code in TRY_ELSEWHERE:
            return False
        await self._append(m.End(request.key, "error", failure=m.Failure(reply.code, reply.message)))
        return True

    async def _quarantine(self, known: Known, assignment: m.Assignment, prefix: m.PrefixReply) -> None:
        """Ends a request that kills its workers, and keeps all that is needed to see it happen again."""
        key = known.request.key
        evidence = msgpack.packb(
            {
                "key": key,
                "request": codec.encode(known.request),
                "epoch": assignment.epoch,
                "deaths": assignment.suspect,
                "generated": list(prefix.generated),
            }
        )
        subject = subjects.dead(self.settings.model)
        await until_done("dead_letter", key, lambda: self.bus.append(subject, evidence, msg_id=key))
        message = (
            f"the request killed its worker {assignment.suspect} times at the same token, the last two times alone"
        )
        await self._append(m.End(key, "error", failure=m.Failure(ErrorCode.QUARANTINED, message)))
        self.meter.count("gorgon_scheduler_quarantined_total")
        self.log.error("quarantined", request_id=key, epoch=assignment.epoch, deaths=assignment.suspect)

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
            self._abort(worker, entry.key, value.epoch)
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
                self._abort(instance, key, epoch)
        if beat.base.draining:
            for key in self.ledger.on_worker(instance):
                if key not in beat.running and self._responsible(key):
                    self._begin_migration(key, "draining")
        else:
            self.dispatcher.dispatch()

    def _on_scheduler_beat(self, message: Message) -> None:
        beat = codec.decode_as(m.Heartbeat, message.data)
        if beat.instance == self.instance:
            self.fleet.link.echoed(self._now())
        self.fleet.heard_peer(beat.instance, beat.draining)

    def _on_any_cancel(self, message: Message) -> None:
        """Every scheduler hears a cancel: the one that holds the request in its queue ends it there."""
        try:
            self.dispatcher.drop(self._cancelled_key(message)[0])
        except GorgonError:
            return  # the member of the queue group answers

    def _on_cancel(self, message: Message) -> None:
        began = self._now()
        try:
            key, encoding = self._cancelled_key(message)
        except GorgonError as error:
            self._cancels.done(self._now() - began, f"{error.code}:{error.message}")
            if message.reply:
                self.bus.publish(message.reply, api.encode_event(api.error_event(None, error), "json"))
            return
        self.spawn(self._cancel(key, encoding, message.reply, began), f"cancel.{key}")

    def _cancelled_key(self, message: Message) -> tuple[str, str]:
        door = subjects.cancel(self.settings.model)
        return _cancelled_key(message.data, subjects.tenant_of(message.subject, door))

    async def _cancel(self, key: str, encoding: str, reply: str, began: float) -> None:
        """The END may come before the OPEN. It is not written after the end, when it would be remembered for a request to come."""
        entry = await until_done("assign", key, lambda: self._assign.get(key))
        if entry is None or not isinstance(codec.decode(entry.value or b""), m.Tombstone):
            await self._append(m.End(key, "cancelled"))
            self.meter.count("gorgon_scheduler_cancelled_total")
            self.log.info("cancelled", request_id=key)
        if reply:
            self.bus.publish(reply, api.encode_event({"ok": True}, encoding))
        self._cancels.done(self._now() - began)

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
        keys, suspects = self.ledger.on_worker(instance), self.fleet.workers[instance].beat.suspects
        if verdict != "hung":
            self.fleet.remove(instance)
            self.dispatcher.forget_worker(instance)
        if keys or verdict != "hung":
            self.meter.count("gorgon_scheduler_workers_gone_total", verdict)
            self.log.warning("worker_gone", worker=instance, verdict=verdict, requests=len(keys))
        for key in keys:
            if self._responsible(key):
                self._begin_migration(key, verdict, suspects)

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
                self._begin_migration(request.key, reason)

    def _responsible(self, key: str) -> bool:
        peers = self.fleet.live_peers()
        return not self.draining and owner(key, {*peers, self.instance}) == self.instance

    def _abort(self, worker: str, key: str, epoch: int) -> None:
        self.bus.publish(subjects.worker_abort(worker), codec.encode(m.Abort(key, epoch)))

    # ------------------------------------------------ small things

    async def _append(self, entry: m.LogEntry) -> None:
        """Stores an entry of the token log, however long it takes. Repeats are harmless: the fold ignores them."""
        assert not isinstance(entry, m.StepTokens)
        partition = subjects.partition_of(entry.key, self.settings.partitions)
        subject, data = subjects.tok(self.settings.model, partition), codec.encode(entry)
        await until_done(type(entry).__name__, entry.key, lambda: self.bus.append(subject, data))

    async def _open(self, known: Known) -> None:
        if known.opened:
            return
        request = known.request
        await self._append(
            m.Open(
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
            )
        )
        known.opened = True

    async def _update(self, key: str, assignment: m.Assignment, revision: int) -> int:
        """Compare-and-swap. After an unknown outcome the key itself tells whether this write was stored."""
        data = codec.encode(assignment)
        try:
            new = await self._assign.update(key, data, revision)
        except WrongRevision:
            raise
        except BusError:
            entry = await until_done("assign", key, lambda: self._assign.get(key))
            if entry is None or entry.value != data:
                raise
            new = entry.revision
        self.ledger.apply(key, assignment, new, self.fleet.link.proven)
        return new

    # ------------------------------------------------ the server's clock, trimming REQ

    async def _watch_clock(self) -> None:
        """An entry without tokens shows the time at which the server stored it."""
        subject, nothing = subjects.tok(self.settings.model, 0), codec.encode(m.StepTokens("", 0, ()))
        while True:
            try:
                appended = await self.bus.append(subject, nothing)
                if (stored := await self.bus.read(subjects.STREAM_TOK, appended.seq)) is not None:
                    self._requests.observe_clock(stored.stamp)
            except BusError as error:
                self.log.warning("clock_unknown", error=repr(error))
            await asyncio.sleep(CLOCK_INTERVAL)

    async def _trim_forever(self) -> None:
        while True:
            await asyncio.sleep(self.settings.trim_interval)
            try:
                await self._trim()
            except BusError as error:
                self.log.warning("trim_failed", error=repr(error))

    async def _trim(self) -> None:
        """Deletes the model's requests below the oldest that lives. What had been acknowledged one round ago has its assignment since,
        and that has reached the ledger, so everything older that is not there has ended."""
        model = self.settings.model
        acked = {}
        for subject, consumer in self._intakes():
            acked[subject] = await self.bus.acked_below(subjects.STREAM_REQ, consumer)
        before, self._acked_before = self._acked_before, acked
        if self.bus.connected_for < self.settings.trim_interval or not self._responsible(f"trim.{model}"):
            return
        oldest = self.ledger.oldest()
        for subject, below in before.items():
            await self.bus.trim(subjects.STREAM_REQ, below if oldest is None else min(below, oldest), subject)

    def _intakes(self) -> list[tuple[str, str]]:
        """(subject, durable consumer) of each class of tenants."""
        model = self.settings.model
        return [(subjects.req(model, c), subjects.consumer_req(model, c)) for c in range(self.settings.tenant_classes)]


def _our_fault(key: str) -> m.End:
    return m.End(key, "error", failure=m.Failure(ErrorCode.INTERNAL, "the scheduler failed at this request"))


def _cancelled_key(data: bytes, door_of: str | None = None) -> tuple[str, str]:
    """(request key, encoding) of a cancel; `door_of` is the tenant through whose door it came. Raises GorgonError(INVALID_REQUEST)."""
    body, encoding = api.decode_body(data)
    api.check_tenant(body, door_of)
    tenant, request_id = door_of or body.get("tenant", api.DEFAULT_TENANT), body.get("id")
    unknown = body.keys() - {"id", "tenant"}
    if unknown or not all(isinstance(x, str) and subjects.is_token(x) for x in (tenant, request_id)):
        raise GorgonError(
            ErrorCode.INVALID_REQUEST, "a cancel is {id, tenant?}, each 1 to 64 of letters, digits, '_' and '-'"
        )
    return subjects.request_key(tenant, str(request_id)), encoding
