"""The durable door: jobs that nobody waits for. Their events, from `accepted` on, are stored in RESULTS."""

from __future__ import annotations

import structlog

from services.tokenizer.admission import Admitted, Refused
from shared import subjects
from shared.api import encode_event, error_event
from shared.bus import Bus, WrongRevision

log = structlog.get_logger()


def job_id(seq: int) -> str:
    """The id of a job that brings none, from its sequence in JOBS: the publisher knows it from the acknowledgement."""
    return f"job-{seq}"


class JobResults:
    """What the tokenizer stores about a job. Repeating it changes nothing, so a job may be delivered more than once.

    All methods raise BusError when it is not known to be stored.
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def store_accepted(self, admitted: Admitted, event: dict[str, object], seq: int) -> int:
        """Before the request is in REQ, so that nobody writes earlier. Returns the sequence, 0 if the id has results already."""
        subject = subjects.results(admitted.request.key)
        data = encode_event(event, admitted.to.reply.encoding)
        try:
            return (await self._bus.append(subject, data, msg_id=f"accepted.{seq}", expected_last_subject_seq=0)).seq
        except WrongRevision:
            return 0

    async def store_refusal(self, refused: Refused, seq: int, accepted_seq: int = 0) -> None:
        """Under the job's id; under `job_id(seq)` if the results of that id are another's."""
        to = refused.to
        event = error_event(to.id, refused.error, metadata=to.metadata) | {"refused": True}
        data = encode_event(event, to.reply.encoding)
        for request_id in dict.fromkeys([to.id or job_id(seq), job_id(seq)]):
            subject = subjects.results(subjects.request_key(to.tenant, request_id))
            msg_id = f"refused.{seq}.{request_id}"
            try:
                await self._bus.append(subject, data, msg_id=msg_id, expected_last_subject_seq=accepted_seq)
                return
            except WrongRevision:
                accepted_seq = 0
        log.warning("refusal_stored_before", request_id=to.key, job=seq)
