"""Puts admitted requests into REQ: once accepted, nothing may lose them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from services.tokenizer.settings import TokenizerSettings
from shared import codec, subjects
from shared.bus import Appended, Bucket, Bus, BusError, BusTimeout, NoResponders, PayloadTooLarge, StorageFull
from shared.errors import ErrorCode, GorgonError
from shared.messages import Assignment, Attach, ReplyTo, Request, Tombstone

log = structlog.get_logger()
T = TypeVar("T")

_CONFLICT = "the id belongs to a request with another body"
_PAUSE = 0.05  # seconds after an attempt that failed at once


class RequestStore:
    def __init__(self, bus: Bus, settings: TokenizerSettings, assignments: Bucket) -> None:
        self._bus = bus
        self._settings = settings
        self._assignments = assignments

    async def put(self, request: Request) -> bool:
        """Returns when the request is stored. False: it was there before, and its events go to this reply from now on.

        Raises GorgonError: ID_CONFLICT if another request has the id, NOT_FOUND if it had it and is forgotten, STORAGE_FULL,
        PAYLOAD_TOO_LARGE, UNAVAILABLE (it may or may not have been stored: the same id may safely be sent again).
        """
        settings = self._settings
        tenant, _ = subjects.split_request_key(request.key)
        subject = subjects.req(request.model, subjects.tenant_class_of(tenant, settings.tenant_classes))
        data = codec.encode(request)
        unsure = False

        async def append() -> Appended:
            nonlocal unsure
            try:
                return await self._bus.append(subject, data, msg_id=request.key, timeout=settings.append_timeout)
            except BusTimeout:
                unsure = True
                raise

        appended = await self._insist("append", request.key, append)
        if not appended.duplicate:
            return True
        body_hash, reply = await self._first(request.key, appended.seq)
        if body_hash != request.body_hash:
            raise GorgonError(ErrorCode.ID_CONFLICT, _CONFLICT)
        if unsure and reply == request.reply:
            return True  # an attempt of ours did arrive
        if not request.durable:
            await self._attach(request)
        return False

    async def check_id(self, request: Request) -> None:
        """Raises GorgonError: ID_CONFLICT if the id belongs to another request that a scheduler knows of, UNAVAILABLE."""
        entry = await self._insist("read", request.key, lambda: self._assignments.get(request.key))
        if entry is not None and entry.value is not None:
            known: Assignment | Tombstone = codec.decode(entry.value)
            if known.body_hash != request.body_hash:
                raise GorgonError(ErrorCode.ID_CONFLICT, _CONFLICT)

    async def _first(self, key: str, seq: int) -> tuple[bytes, ReplyTo | None]:
        """Body hash and reply of the request that has the id."""
        stored = await self._insist("read", key, lambda: self._bus.read(subjects.STREAM_REQ, seq))
        if stored is not None:
            first = codec.decode_as(Request, stored.data)
            return first.body_hash, first.reply
        # REQ is trimmed below the oldest live request: this one has ended. Its tombstone outlives the attach window.
        entry = await self._insist("read", key, lambda: self._assignments.get(key))
        if entry is None or entry.value is None:
            raise GorgonError(ErrorCode.NOT_FOUND, "the request with this id has ended and is forgotten: take a new id")
        ended: Assignment | Tombstone = codec.decode(entry.value)
        return ended.body_hash, None

    async def _attach(self, request: Request) -> None:
        """The owner of the partition writes it into the log, and answers when it is there: a tokenizer, which reads what
        strangers send, has no right to write among the tokens."""
        partition = subjects.partition_of(request.key, self._settings.partitions)
        subject, data = subjects.attach(request.model, partition), codec.encode(Attach(request.key, request.reply))
        timeout = self._settings.append_timeout

        async def attach() -> None:
            try:
                await self._bus.request(subject, data, timeout)
            except NoResponders:
                await asyncio.sleep(timeout / 2)  # the partition is changing hands
                raise

        await self._insist("attach", request.key, attach)

    async def _insist(self, what: str, key: str, attempt: Callable[[], Awaitable[T]]) -> T:
        """Some attempts. Raises GorgonError."""
        for left in reversed(range(self._settings.append_attempts)):
            try:
                return await attempt()
            except StorageFull as error:
                message, code = f"the log has no room: {error}", ErrorCode.STORAGE_FULL
                raise GorgonError(code, message, retry_after=self._settings.retry_after) from None
            except PayloadTooLarge as error:
                raise GorgonError(ErrorCode.PAYLOAD_TOO_LARGE, f"the encoded request is too large: {error}") from None
            except BusError as error:
                log.warning("retrying", what=what, request_id=key, error=repr(error), attempts_left=left)
                if left and not isinstance(error, BusTimeout):
                    await asyncio.sleep(_PAUSE)
        message = "the log does not answer: whether the request was accepted is unknown; send it again with the same id"
        raise GorgonError(ErrorCode.UNAVAILABLE, message, retry_after=self._settings.retry_after)
