"""Who has which request: KV `assign`, changed by compare-and-swap and watched by every scheduler, whose ledger follows it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from services.scheduler.fleet import Link
from services.scheduler.ledger import Ledger
from services.scheduler.requests import Known
from shared import codec, subjects
from shared import messages as m
from shared.bus import Bucket, Bus, BusError, Entry, WrongRevision
from shared.logging import note_request
from shared.retry import until_done

log = structlog.get_logger()


class Assignments:
    """What this process writes is in the ledger at once; the watch brings what others write."""

    def __init__(self, bus: Bus, ledger: Ledger, link: Link) -> None:
        self._bus = bus
        self._ledger = ledger
        self._link = link
        self._bucket: Bucket

    async def watch(self, handler: Callable[[Entry], None]) -> None:
        """Returns when all that is there has been heard."""
        name = subjects.BUCKET_ASSIGN
        self._bucket = await until_done("bucket", name, lambda: self._bus.bucket(name))
        listed = asyncio.Event()
        await until_done("watch", name, lambda: self._bucket.watch(handler, listed.set))
        await listed.wait()

    async def get(self, key: str) -> Entry | None:
        """One attempt. Raises BusError."""
        return await self._bucket.get(key)

    async def present(self, key: str) -> m.Assignment | m.Tombstone | None:
        """What is known of the request, however long it takes to hear."""
        entry = await until_done("assign", key, lambda: self._bucket.get(key))
        present: m.Assignment | m.Tombstone | None = codec.decode(entry.value or b"") if entry is not None else None
        return present

    async def create(self, known: Known, worker: str) -> int:
        """Returns the revision. Raises WrongRevision if the request is assigned already, BusError."""
        request, key = known.request, known.request.key
        slots = request.sampling.slots(request.choices)
        assignment = m.Assignment(known.seq, 1, worker, request.body_hash, choices=slots, model=request.model)
        revision = await self._bucket.create(key, codec.encode(assignment))
        self._ledger.apply(key, assignment, revision, self._link.proven)
        note_request(key, 1)
        log.debug("assigned", request_id=key, epoch=1, worker=worker)
        return revision

    async def update(self, key: str, assignment: m.Assignment, revision: int) -> int:
        """Returns the new revision. After an unknown outcome the key itself tells whether this write was stored. Raises WrongRevision
        if another was faster, BusError if that cannot be known."""
        data = codec.encode(assignment)
        try:
            new = await self._bucket.update(key, data, revision)
        except WrongRevision:
            raise
        except BusError:
            entry = await until_done("assign", key, lambda: self._bucket.get(key))
            if entry is None or entry.value != data:
                raise
            new = entry.revision
        self._ledger.apply(key, assignment, new, self._link.proven)
        return new
