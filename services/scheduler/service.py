"""The scheduler stage: admits and places requests, watches the workers, migrates.

Any number of schedulers run at once. New requests come to one of them (REQ's durable consumers); what is live is known to all (a watch
of KV `assign`), and each looks after the part that rendezvous hashing gives it. When two believe they do, compare-and-swap decides.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from dataclasses import dataclass

import msgpack

from services.scheduler.dispatch import Dispatcher, Draining, Dropped, Expired
from services.scheduler.fleet import Fleet, Link, Worker
from services.scheduler.ledger import Ledger
from services.scheduler.recovery import (
    DEATHS,
    after_death,
    diagnose,
    is_isolated,
    is_quarantined,
    stale_runs,
)
from services.scheduler.settings import SchedulerSettings
from shared import api, codec, subjects
from shared import messages as m
from shared.bus import Bucket, Bus, BusError, Consumer, Delivery, Entry, Message, PayloadTooLarge, WrongRevision
from shared.errors import ErrorCode, GorgonError
from shared.rendezvous import owner
from shared.retry import until_done
from shared.service import Service

TICK = 0.05
SCAN = 0.2
LINK_PATIENCE = 0.35
REMEMBER_REQUESTS = 4096
TRY_ELSEWHERE = frozenset({"overloaded", "draining"})
RETRY_PAUSES = (0.02, 0.05, 0.1, 0.2, 0.5)


@dataclass(slots=True)
class Known:
    """A request as REQ stores it. `opened`: this process has seen its OPEN acknowledged."""

    request: m.Request
    seq: int
    stamp: float
    opened: bool = False


class SchedulerService(Service):
    stage = "scheduler"
    settings: SchedulerSettings

    def __init__(self, bus: Bus, settings: SchedulerSettings) -> None:
        super().__init__(bus, settings)
        self.ledger = Ledger()
        link = Link(LINK_PATIENCE, settings.reconnect_grace)
        self.fleet = Fleet(link, settings.silence, settings.step_margin)
        self.dispatcher = Dispatcher(self.fleet, self.ledger, settings.tenant_weights)
        self._assign: Bucket
        self._consumers: list[Consumer] = []
        self._holding: dict[int, Delivery] = {}  # by REQ sequence: delivered to this process and not acknowledged
        self._busy: set[str] = set()  # keys that an assignment or a migration of this process is about
        self._requests: OrderedDict[int, Known] = OrderedDict()  # by REQ sequence; saves a read at most migrations
        self._clock: float | None = None  # loop time - server time: the smallest difference seen
        self._trim_bounds: deque[tuple[float, int | None]] = deque()
        self._migrations = 0

    # ------------------------------------------------ life

    async def on_start(self) -> None:
        model = self.settings.model
        self._assign = await self.bus.bucket(subjects.BUCKET_ASSIGN)
        listed = asyncio.Event()
        await self._assign.watch(self._on_assignment, listed.set)
        await listed.wait()
        await self.bus.subscribe(subjects.heartbeats("model_worker", model), self._on_worker_beat)
        await self.bus.subscribe(subjects.heartbeats(self.stage, model), self._on_scheduler_beat)
        await self.bus.subscribe(subjects.cancel(model), self._on_cancel, queue=subjects.SCHEDULERS)
        await self.bus.subscribe(subjects.cancel(model), self._on_any_cancel)
        classes = self.settings.tenant_classes
        for tenant_class in range(classes):
            consumer = await self.bus.consume(
                subjects.STREAM_REQ,
                subjects.consumer_req(model, tenant_class),
                subjects.req(model, tenant_class),
                self._on_delivery,
                limit=max(1, self.settings.max_waiting // classes),
                ack_wait=self.settings.ack_wait,
            )
            self._consumers.append(consumer)
        self.spawn(self._tick_forever(), "tick")
        self.spawn(self._keep_deliveries(), "keep_deliveries")
        self.spawn(self._trim_forever(), "trim")

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
        waiting = len(self.dispatcher.queue)
        slots = sum(w.beat.max_seqs for w in self.fleet.workers.values())
        return self.base_heartbeat(
            load=min(1.0, len(self.ledger.live) / slots) if slots else 0.0,
            in_flight=len(self._holding),
            waiting=waiting,
            live=len(self.ledger.live),
            unplaced=len(self.dispatcher.migrated),
            workers=len(self.fleet.workers),
            migrations=self._migrations,
        )

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    # ------------------------------------------------ intake

    async def _on_delivery(self, delivery: Delivery) -> None:
        seq = delivery.message.seq
        self._holding[seq] = delivery
        try:
            await self._admit(delivery)
        except Draining:
            await delivery.nak()
        except BusError as error:
            self.log.warning("admission_failed", seq=seq, error=repr(error))
            await delivery.nak(1.0)
        finally:
            self._holding.pop(seq, None)

    async def _admit(self, delivery: Delivery) -> None:
        stored = delivery.message
        try:
            request = codec.decode_as(m.Request, stored.data)
        except codec.CodecError as error:
            self.log.error("unreadable_request", seq=stored.seq, error=str(error))
            await delivery.ack()
            return
        known = self._remember(Known(request, stored.seq, stored.stamp))
        self._observe_clock(stored.stamp)
        if delivery.attempt > 1 and (entry := await self._assign.get(request.key)) is not None:
            await self._settle_duplicate(known, entry, delivery)
            return
        try:
            worker = await self.dispatcher.worker_for(request, expires=self._expires(known))
        except Expired:
            failure = m.Failure(
                ErrorCode.DEADLINE_EXCEEDED, "the deadline passed while the request waited for a worker"
            )
            await self._end_unstarted(known, delivery, m.End(request.key, "error", failure=failure))
            return
        except Dropped:
            await self._end_unstarted(known, delivery, m.End(request.key, "cancelled"))
            return
        await self._start(known, worker, delivery)

    async def _start(self, known: Known, worker: Worker, delivery: Delivery) -> None:
        """Assign, OPEN, run, ack: from the first of these on, the request survives this process."""
        request = known.request
        self._busy.add(request.key)
        accepted = False
        try:
            try:
                await self._create(known, worker.instance)
            except WrongRevision:
                entry = await self._assign.get(request.key)
                if entry is not None:
                    await self._settle_duplicate(known, entry, delivery)
                    return
                raise
            finally:
                self.dispatcher.release(worker)
            await self._open(known)
            accepted = await self._run(known, 1, worker.instance)
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
        key = known.request.key
        assignment = m.Assignment(known.seq, 1, worker, known.request.body_hash)
        revision = await self._assign.create(key, codec.encode(assignment))
        self.ledger.apply(key, assignment, revision, self._now())
        self.log.debug("assigned", request_id=key, epoch=1, worker=worker)

    async def _settle_duplicate(self, known: Known, entry: Entry, delivery: Delivery) -> None:
        """The key is taken: by this very request (redelivered after a scheduler died), by a repeat of it, or by another one."""
        request = known.request
        present = codec.decode(entry.value or b"")
        if present.req_seq == known.seq:
            # Whether OPEN and the run got through is unknown; recovery looks after every live request, this one included.
            if isinstance(present, m.Assignment) and request.key not in self._busy:
                self.ledger.apply(request.key, present, entry.revision, self._now())
                self._begin_migration(request.key, "redelivered")
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

    def _begin_migration(self, key: str, reason: str) -> None:
        if key not in self._busy and not self.draining:
            self._busy.add(key)
            self.spawn(self._migrate(key, reason), f"migrate.{key}")

    async def _migrate(self, key: str, reason: str) -> None:
        try:
            pauses = iter(RETRY_PAUSES)
            while not await self._retarget(key, reason):
                reason = "refused"
                await asyncio.sleep(next(pauses, RETRY_PAUSES[-1]))
        except WrongRevision:
            self.log.info("migration_left_to_another", request_id=key)
        except (Dropped, Draining):
            pass
        except BusError as error:
            self.log.warning("migration_failed", request_id=key, error=repr(error))  # found again by the next scan
        finally:
            self._busy.discard(key)

    async def _retarget(self, key: str, reason: str) -> bool:
        """One attempt: CAS epoch+1, FENCE, prefix, CAS worker, run. False: to be tried again with a further epoch."""
        live = self.ledger.live.get(key)
        if live is None:
            return True
        died = reason in DEATHS and live.reported is not None
        assignment = live.assignment._replace(epoch=live.assignment.epoch + 1, worker="")
        epoch = assignment.epoch
        self._migrations += 1
        self.log.info("migrating", request_id=key, epoch=epoch, reason=reason, worker=live.assignment.worker)
        revision = await self._update(key, assignment, live.revision)
        known = await self._known(assignment.req_seq)
        if known is None:
            failure = m.Failure(ErrorCode.INTERNAL, "the request is no longer stored")
            await self._append(m.End(key, "error", failure=failure))
            self.log.error("request_lost", request_id=key, seq=assignment.req_seq)
            return True
        await self._open(known)
        await self._append(m.Fence(key, epoch))
        prefix = await self._prefix(key, epoch)
        if prefix is None:
            return True
        if died:
            assignment = after_death(assignment, sum(map(len, prefix.generated)) // 4)
            if is_quarantined(assignment):
                await self._quarantine(known, assignment, prefix)
                return True
        try:
            worker = await self.dispatcher.worker_for(
                known.request, expires=self._expires(known), migrated=True, isolated=is_isolated(assignment)
            )
        except Expired:
            failure = m.Failure(
                ErrorCode.DEADLINE_EXCEEDED, "the deadline passed while the request waited for another worker"
            )
            await self._append(m.End(key, "error", failure=failure))
            return True
        try:
            await self._update(key, assignment._replace(worker=worker.instance), revision)
        finally:
            self.dispatcher.release(worker)
        return await self._run(known, epoch, worker.instance, prefix, is_isolated(assignment))

    async def _prefix(self, key: str, epoch: int) -> m.PrefixReply | None:
        """What the fence fixed. None if the request ended, or a higher epoch is in force."""
        partition = subjects.partition_of(key, self.settings.partitions)
        subject = subjects.prefix(self.settings.model, partition)
        question = codec.encode(m.PrefixQuery(key, epoch))
        pauses = iter(RETRY_PAUSES)
        while key in self.ledger.live:
            try:
                answer = await self.bus.request(subject, question, self.settings.prefix_timeout)
                reply = codec.decode_as(m.PrefixReply, answer.data)
                if reply.state == "running" and reply.epoch == epoch:
                    return reply
                if reply.state in ("ended", "superseded"):
                    return None
            except BusError as error:
                self.log.info("prefix_unknown", request_id=key, epoch=epoch, error=repr(error))
            await asyncio.sleep(next(pauses, RETRY_PAUSES[-1]))
        return None

    async def _run(
        self, known: Known, epoch: int, worker: str, prefix: m.PrefixReply | None = None, isolated: bool = False
    ) -> bool:
        """Orders the run. True: it is under way, or nothing more is to be done; False: another target is needed, after a fence."""
        request = known.request
        expires = self._expires(known)
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
            request.trace,
        )
        try:
            answer = await self.bus.request(subjects.worker_run(worker), codec.encode(order), self.settings.run_timeout)
            reply = codec.decode_as(m.RunReply, answer.data)
        except PayloadTooLarge as error:
            reply = m.RunReply(False, ErrorCode.PAYLOAD_TOO_LARGE, str(error))
        except BusError as error:
            self.log.warning("run_unanswered", request_id=request.key, epoch=epoch, worker=worker, error=repr(error))
            return False
        if reply.accepted or reply.code == "stale_epoch":
            return True
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
        self.log.error("quarantined", request_id=key, epoch=assignment.epoch, deaths=assignment.suspect)

    # ------------------------------------------------ what comes in

    def _on_assignment(self, entry: Entry) -> None:
        try:
            value = None if entry.value is None else codec.decode(entry.value)
        except codec.CodecError as error:
            self.log.error("unreadable_assignment", request_id=entry.key, error=str(error))
            return
        before = self.ledger.live.get(entry.key)
        ended = self.ledger.apply(entry.key, value, entry.revision, self._now())
        if ended is None or before is None:
            return
        self.dispatcher.ended(entry.key, ended.completion_tokens)
        if ended.reason != "finished" and before.assignment.worker and self._responsible(entry.key):
            self._abort(before.assignment.worker, entry.key, ended.epoch)
        self.dispatcher.dispatch()

    def _on_worker_beat(self, message: Message) -> None:
        beat = codec.decode(message.data)
        if not isinstance(beat, m.WorkerHeartbeat):
            return  # it is still loading
        instance = beat.base.instance
        if self.fleet.heard(beat, self._now()):
            self.log.info("worker_found", worker=instance, max_seqs=beat.max_seqs)
        for key, epoch in stale_runs(beat.running, instance, self.ledger):
            if self._responsible(key):
                self._abort(instance, key, epoch)
        if beat.base.draining:
            for key in self.ledger.on_worker(instance) - beat.running.keys():
                if self._responsible(key):
                    self._begin_migration(key, "draining")
        else:
            self.dispatcher.dispatch()

    def _on_scheduler_beat(self, message: Message) -> None:
        beat = codec.decode_as(m.Heartbeat, message.data)
        if beat.instance == self.instance:
            self.fleet.link.echoed(self._now())
        self.fleet.heard_peer(beat.instance, beat.draining, self._now())

    def _on_any_cancel(self, message: Message) -> None:
        """Every scheduler hears a cancel: the one that holds the request in its queue ends it there."""
        try:
            self.dispatcher.drop(_cancelled_key(message.data)[0])
        except GorgonError:
            return  # the member of the queue group answers

    def _on_cancel(self, message: Message) -> None:
        try:
            key, encoding = _cancelled_key(message.data)
        except GorgonError as error:
            if message.reply:
                self.bus.publish(message.reply, api.encode_event(api.error_event(None, error), "json"))
            return
        self.spawn(self._cancel(key, encoding, message.reply), f"cancel.{key}")

    async def _cancel(self, key: str, encoding: str, reply: str) -> None:
        await self._append(m.End(key, "cancelled"))
        self.log.info("cancelled", request_id=key)
        if reply:
            self.bus.publish(reply, api.encode_event({"ok": True}, encoding))

    # ------------------------------------------------ watching

    async def _tick_forever(self) -> None:
        scanned = 0.0
        while True:
            await asyncio.sleep(TICK)
            now = self._now()
            for instance, verdict in self.fleet.judge(now).items():
                self._worker_gone(instance, verdict)
            if now - scanned >= SCAN:
                scanned = now
                self._scan(now)
            self.dispatcher.expire(now)
            self.dispatcher.dispatch()

    def _worker_gone(self, instance: str, verdict: str) -> None:
        keys = self.ledger.on_worker(instance)
        if verdict != "hung":
            self.fleet.remove(instance)
            self.dispatcher.index.forget(instance)
        if keys or verdict != "hung":
            self.log.warning("worker_gone", worker=instance, verdict=verdict, requests=len(keys))
        for key in keys:
            if self._responsible(key):
                self._begin_migration(key, verdict)

    def _scan(self, now: float) -> None:
        for request in list(self.ledger.live.values()):
            reason = diagnose(
                request, self.fleet, now, report_grace=self.settings.report_grace, stuck_grace=self.settings.stuck_grace
            )
            if reason is not None and self._responsible(request.key):
                self._begin_migration(request.key, reason)

    def _responsible(self, key: str) -> bool:
        peers = self.fleet.live_peers(self._now())
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
                max(0.0, self._server_now() - known.stamp) * 1e3,
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
        self.ledger.apply(key, assignment, new, self._now())
        return new

    def _remember(self, known: Known) -> Known:
        present = self._requests.setdefault(known.seq, known)
        self._requests.move_to_end(known.seq)
        if len(self._requests) > REMEMBER_REQUESTS:
            self._requests.popitem(last=False)
        return present

    async def _known(self, seq: int) -> Known | None:
        if (known := self._requests.get(seq)) is not None:
            return known
        stored = await until_done("read", str(seq), lambda: self.bus.read(subjects.STREAM_REQ, seq))
        if stored is None:
            return None
        return self._remember(Known(codec.decode_as(m.Request, stored.data), seq, stored.stamp))

    def _observe_clock(self, stamp: float) -> None:
        """Deadlines count from REQ's store time, by the server's clock. The smallest difference of the clocks seen is the true one
        and the shortest way of a message; an older message cannot make it smaller."""
        difference = self._now() - stamp
        if self._clock is None or difference < self._clock:
            self._clock = difference

    def _server_now(self) -> float:
        return self._now() - (self._clock or 0.0)

    def _expires(self, known: Known) -> float | None:
        """Loop time of the request's deadline."""
        if known.request.deadline is None:
            return None
        self._observe_clock(known.stamp)
        assert self._clock is not None
        return known.stamp + self._clock + known.request.deadline

    # ------------------------------------------------ trimming REQ

    async def _trim_forever(self) -> None:
        while True:
            await asyncio.sleep(self.settings.trim_interval)
            try:
                await self._trim()
            except BusError as error:
                self.log.warning("trim_failed", error=repr(error))

    async def _trim(self) -> None:
        """Trims below the smallest bound of the last `trim_age` seconds: what a dying scheduler held when a bound was taken has been
        redelivered since, and lowers a later one. A moment with undelivered requests, or with another live scheduler's, gives none."""
        now = self._now()
        self._trim_bounds.append((now, await self._trim_bound()))
        while len(self._trim_bounds) > 1 and self._trim_bounds[1][0] <= now - self.settings.trim_age:
            self._trim_bounds.popleft()
        bounds = [bound for _, bound in self._trim_bounds]
        if self._trim_bounds[0][0] <= now - self.settings.trim_age and None not in bounds:
            await self.bus.trim(subjects.STREAM_REQ, min(b for b in bounds if b is not None))

    async def _trim_bound(self) -> int | None:
        """The smallest REQ sequence that is needed now, None if that cannot be told. REQ is shared by all models, so only a
        deployment's only scheduler trims; several leave it to the stream's limits."""
        if len(self.fleet.live_peers(self._now())) != 1 or self._holding:
            return None
        model = self.settings.model
        for tenant_class in range(self.settings.tenant_classes):
            if await self.bus.backlog(subjects.STREAM_REQ, subjects.consumer_req(model, tenant_class)):
                return None
        newest = 0
        for tenant_class in range(self.settings.tenant_classes):
            newest = max(newest, await self.bus.last_seq(subjects.STREAM_REQ, subjects.req(model, tenant_class)))
        oldest = self.ledger.oldest()
        return newest if oldest is None else min(oldest, newest)


def _cancelled_key(data: bytes) -> tuple[str, str]:
    """(request key, encoding) of a cancel. Raises GorgonError(INVALID_REQUEST)."""
    body, encoding = api.decode_body(data)
    tenant, request_id = body.get("tenant", api.DEFAULT_TENANT), body.get("id")
    unknown = body.keys() - {"id", "tenant"}
    if unknown or not all(isinstance(x, str) and subjects.is_token(x) for x in (tenant, request_id)):
        raise GorgonError(
            ErrorCode.INVALID_REQUEST, "a cancel is {id, tenant?}, each 1 to 64 of letters, digits, '_' and '-'"
        )
    return subjects.request_key(tenant, str(request_id)), encoding
