"""What a scheduler tells workers: run, abort."""

from __future__ import annotations

import asyncio

from services.scheduler.assignments import Assignments
from services.scheduler.entries import Entries
from services.scheduler.fleet import Fleet
from services.scheduler.ledger import Ledger
from services.scheduler.requests import Known, Requests
from services.scheduler.settings import SchedulerSettings
from shared import codec, subjects
from shared import messages as m
from shared.bus import BusError, PayloadTooLarge
from shared.errors import ErrorCode
from shared.service import Service

TRY_ELSEWHERE = frozenset({"overloaded", "draining"})


class Orders:
    def __init__(
        self,
        stage: Service,
        settings: SchedulerSettings,
        fleet: Fleet,
        ledger: Ledger,
        requests: Requests,
        assignments: Assignments,
        entries: Entries,
    ) -> None:
        self._stage = stage
        self._settings = settings
        self._fleet = fleet
        self._ledger = ledger
        self._requests = requests
        self._assignments = assignments
        self._entries = entries

    async def run(
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
            None if expires is None else max(0.001, expires - asyncio.get_running_loop().time()),
            isolated,
            known.trace,
            prompt_done=prefix.prompt_done if prefix is not None else 0,
            constraint=request.constraint,
        )
        try:
            answer = await self._stage.bus.request(
                subjects.worker_run(worker), codec.encode(order), self._settings.run_timeout
            )
            reply = codec.decode_as(m.RunReply, answer.data)
        except PayloadTooLarge as error:
            reply = m.RunReply(False, ErrorCode.PAYLOAD_TOO_LARGE, str(error))
        except (BusError, codec.CodecError) as error:
            self._fleet.answered(worker, accepted=False)
            self._stage.meter.count("gorgon_scheduler_runs_refused_total", "no_answer")
            self._stage.log.warning(
                "run_unanswered", request_id=request.key, epoch=epoch, worker=worker, error=repr(error)
            )
            return False
        if reply.accepted:
            self._ledger.taken(request.key, epoch)
        if reply.accepted or reply.code == "stale_epoch":
            self._fleet.answered(worker, accepted=True)
            return True
        self._fleet.answered(worker, accepted=reply.only_this)
        self._stage.meter.count("gorgon_scheduler_runs_refused_total", reply.code)
        self._stage.log.warning(
            "run_refused", request_id=request.key, epoch=epoch, worker=worker, code=reply.code, error=reply.message
        )
        if reply.code in TRY_ELSEWHERE:
            return False
        # The answer may be old: this process may have stood still, and another scheduler have found a worker that takes it.
        present = await self._assignments.present(request.key)
        if isinstance(present, m.Assignment) and (present.epoch, present.worker) == (epoch, worker):
            await self._entries.append(m.End(request.key, "error", failure=m.Failure(reply.code, reply.message)))
        return True

    def abort(self, worker: str, key: str, epoch: int) -> None:
        self._stage.bus.publish(subjects.worker_abort(worker), codec.encode(m.Abort(key, epoch)))
