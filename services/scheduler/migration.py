"""Moves requests to other workers: CAS of the next epoch, FENCE, the prefix that it fixed, CAS of the worker, run."""

from __future__ import annotations

import asyncio
import time

import msgpack

from services.scheduler.assignments import Assignments
from services.scheduler.dispatch import Dispatcher, Draining, Dropped, Expired
from services.scheduler.entries import Entries, our_fault
from services.scheduler.ledger import Ledger
from services.scheduler.orders import Orders
from services.scheduler.recovery import DEATHS
from services.scheduler.requests import Known, Requests
from services.scheduler.settings import SchedulerSettings
from services.scheduler.suspicion import after_death, is_guilty, is_isolated
from shared import codec, subjects
from shared import messages as m
from shared.bus import BusError, WrongRevision
from shared.errors import ErrorCode
from shared.retry import until_done
from shared.service import Service

RETRY_PAUSES = (0.02, 0.05, 0.1, 0.2, 0.5)


class Migrations:
    """`busy`: keys that an assignment or a migration of this process is about. `count`: attempts so far."""

    def __init__(
        self,
        stage: Service,
        settings: SchedulerSettings,
        ledger: Ledger,
        dispatcher: Dispatcher,
        requests: Requests,
        assignments: Assignments,
        entries: Entries,
        orders: Orders,
    ) -> None:
        self.busy: set[str] = set()
        self.count = 0
        self._stage = stage
        self._settings = settings
        self._ledger = ledger
        self._dispatcher = dispatcher
        self._requests = requests
        self._assignments = assignments
        self._entries = entries
        self._orders = orders
        self._loop = asyncio.get_running_loop()
        self._seconds = stage.meter.histogram("gorgon_scheduler_migration_seconds")

    def begin(self, key: str, reason: str, suspects: tuple[str, ...] = ()) -> None:
        """`suspects`: the requests that a worker named when it died."""
        if key not in self.busy and not self._stage.draining:
            self.busy.add(key)
            self._stage.spawn(self._migrate(key, reason, suspects), f"migrate.{key}")

    async def _migrate(self, key: str, reason: str, suspects: tuple[str, ...]) -> None:
        began = self._loop.time()
        try:
            pauses = iter(RETRY_PAUSES)
            while not await self._retarget(key, reason, suspects):
                reason = "refused"
                await asyncio.sleep(next(pauses, RETRY_PAUSES[-1]))
            if (live := self._ledger.live.get(key)) is not None and live.assignment.worker:
                self._seconds.observe(self._loop.time() - began)
        except WrongRevision:
            self._stage.log.info("migration_left_to_another", request_id=key)
        except (Dropped, Draining):
            pass
        except BusError as error:
            self._stage.log.warning(
                "migration_failed", request_id=key, error=repr(error)
            )  # found again by the next scan
        except Exception as error:
            self._stage.log.exception("request_failed", request_id=key, error=repr(error))
            await self._entries.append(our_fault(key))
        finally:
            self.busy.discard(key)

    async def _retarget(self, key: str, reason: str, suspects: tuple[str, ...]) -> bool:
        """One attempt: CAS epoch+1, FENCE, prefix, CAS worker, run. False: to be tried again with a further epoch."""
        live = self._ledger.live.get(key)
        if live is None:
            return True
        began = time.time()
        # An assignment that was stored late, after its writer had given up, is followed by no order: its worker never had the request.
        was_there = key in suspects if suspects else live.was_there or not is_isolated(live.assignment)
        died = reason in DEATHS and was_there
        assignment = live.assignment._replace(epoch=live.assignment.epoch + 1, worker="")
        epoch = assignment.epoch
        self.count += 1
        self._stage.meter.count("gorgon_scheduler_migrations_total", reason)
        self._stage.log.info("migrating", request_id=key, epoch=epoch, reason=reason, worker=live.assignment.worker)
        revision = await self._assignments.update(key, assignment, live.revision)
        known = await self._requests.read(assignment.req_seq)
        if known is None:
            failure = m.Failure(ErrorCode.INTERNAL, "the request is no longer stored")
            await self._entries.append(m.End(key, "error", failure=failure))
            self._stage.log.error("request_lost", request_id=key, seq=assignment.req_seq)
            return True
        gone = live.assignment.worker
        span = self._stage.tracer.begin(
            "migrate", known.request.trace, began, request_id=key, epoch=epoch, reason=reason, gone=gone
        )
        known.trace = span.traceparent
        await self._entries.open(known)
        await self._entries.append(m.Fence(key, epoch))
        span.event("fenced")
        prefix = await self._prefix(known, epoch)
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
            worker, need = await self._dispatcher.worker_for(
                known.request, expires=self._requests.expires(known), prefix=length, isolated=isolated
            )
        except Expired:
            failure = m.Failure(
                ErrorCode.DEADLINE_EXCEEDED, "the deadline passed while the request waited for another worker"
            )
            await self._entries.append(m.End(key, "error", failure=failure))
            span.end(error=failure.code)
            return True
        span.event("placed", worker=worker.instance)
        try:
            await self._assignments.update(key, assignment._replace(worker=worker.instance), revision)
        finally:
            self._dispatcher.release(worker, need)
        accepted = await self._orders.run(known, epoch, worker.instance, prefix, isolated)
        span.set(prefix_tokens=length)
        span.end(error="" if accepted else "refused")
        return accepted

    async def _prefix(self, known: Known, epoch: int) -> m.PrefixReply | None:
        """What the fence fixed. None if the request ended, or a higher epoch is in force."""
        key = known.request.key
        partition = subjects.partition_of(key, self._settings.partitions)
        subject = subjects.prefix(self._settings.model, partition)
        question = codec.encode(m.PrefixQuery(key, epoch))
        pauses = iter(RETRY_PAUSES)
        while (live := self._ledger.live.get(key)) is not None and live.assignment.epoch == epoch:
            try:
                answer = await self._stage.bus.request(subject, question, self._settings.prefix_timeout)
                reply = codec.decode_as(m.PrefixReply, answer.data)
                if reply.state == "running" and reply.epoch == epoch:
                    return reply
                if reply.state in ("ended", "superseded"):
                    return None
                # The owner may know nothing of the request: its OPEN has left the log before anybody folded it.
                known.opened = False
                await self._entries.open(known)
            except (BusError, codec.CodecError) as error:
                self._stage.log.info("prefix_unknown", request_id=key, epoch=epoch, error=repr(error))
            await asyncio.sleep(next(pauses, RETRY_PAUSES[-1]))
        return None

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
        subject = subjects.dead(self._settings.model)
        await until_done("dead_letter", key, lambda: self._stage.bus.append(subject, evidence, msg_id=key))
        message = (
            f"the request killed its worker {assignment.suspect} times at the same token, the last two times alone"
        )
        await self._entries.append(m.End(key, "error", failure=m.Failure(ErrorCode.QUARANTINED, message)))
        self._stage.meter.count("gorgon_scheduler_quarantined_total")
        self._stage.log.error("quarantined", request_id=key, epoch=assignment.epoch, deaths=assignment.suspect)
