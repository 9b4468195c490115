"""The cancel door: whoever knows a request's id and tenant may end it."""

from __future__ import annotations

import asyncio

from services.scheduler.assignments import Assignments
from services.scheduler.dispatch import Dispatcher
from services.scheduler.entries import Entries
from services.scheduler.settings import SchedulerSettings
from shared import api, subjects
from shared import messages as m
from shared.bus import Message
from shared.errors import ErrorCode, GorgonError
from shared.service import Service


class CancelDoor:
    def __init__(
        self,
        stage: Service,
        settings: SchedulerSettings,
        dispatcher: Dispatcher,
        assignments: Assignments,
        entries: Entries,
    ) -> None:
        self._stage = stage
        self._settings = settings
        self._dispatcher = dispatcher
        self._assignments = assignments
        self._entries = entries
        self._loop = asyncio.get_running_loop()
        self._endpoint = stage.endpoint("cancel", subjects.cancel(settings.model), subjects.SCHEDULERS)

    async def open(self) -> None:
        subscribe, door = self._stage.bus.subscribe, subjects.cancel(self._settings.model)
        for subject in (door, subjects.of_tenant(door)):
            await subscribe(subject, self._on_cancel, queue=subjects.SCHEDULERS)
            await subscribe(subject, self._on_any)

    def _on_any(self, message: Message) -> None:
        """Every scheduler hears a cancel: the one that holds the request in its queue ends it there."""
        try:
            self._dispatcher.drop(self._cancelled_key(message)[0])
        except GorgonError:
            return  # the member of the queue group answers

    def _on_cancel(self, message: Message) -> None:
        began = self._loop.time()
        try:
            key, encoding = self._cancelled_key(message)
        except GorgonError as error:
            self._endpoint.done(self._loop.time() - began, f"{error.code}:{error.message}")
            if message.reply:
                event = api.error_event(None, error)
                self._stage.bus.publish(message.reply, api.encode_event(event, api.encoding_of(message.data)))
            return
        self._stage.spawn(self._cancel(key, encoding, message.reply, began), f"cancel.{key}")

    def _cancelled_key(self, message: Message) -> tuple[str, str]:
        """(request key, encoding) of a cancel. Raises GorgonError(INVALID_REQUEST)."""
        door_of = subjects.tenant_of(message.subject, subjects.cancel(self._settings.model))
        body, encoding = api.decode_body(message.data)
        api.check_tenant(body, door_of)
        tenant, request_id = door_of or body.get("tenant", api.DEFAULT_TENANT), body.get("id")
        unknown = body.keys() - {"id", "tenant"}
        if unknown or not all(isinstance(x, str) and subjects.is_token(x) for x in (tenant, request_id)):
            raise GorgonError(ErrorCode.INVALID_REQUEST, f"a cancel is {{id, tenant?}}, each {subjects.TOKEN_RULE}")
        return subjects.request_key(tenant, str(request_id)), encoding

    async def _cancel(self, key: str, encoding: str, reply: str, began: float) -> None:
        """The END may come before the OPEN. It is not written after the end, when it would be remembered for a request to come."""
        known = await self._assignments.present(key)
        state = "unknown" if known is None else "ended" if isinstance(known, m.Tombstone) else "live"
        if state != "ended":
            await self._entries.append(m.End(key, "cancelled"))
            self._stage.meter.count("gorgon_scheduler_cancelled_total")
            self._stage.log.info("cancelled", request_id=key)
        if reply:
            self._stage.bus.publish(reply, api.encode_event({"ok": True, "request": state}, encoding))
        self._endpoint.done(self._loop.time() - began)
