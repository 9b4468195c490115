"""Asyncio client: streams that survive lost messages, reconnects and the restart of any process, the server's included.

    async with Client("nats://127.0.0.1:4222", "demo") as client:
        async for delta in client.generate("Once upon a time", max_tokens=64):
            print(delta.text, end="")

It folds events by position and offset: what it has seen is dropped, and on a gap or on silence it asks the owner of the request's
partition for what is missing (`replay`). One inbox serves all streams of a client, so that events of a step share a message.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import uuid
from collections.abc import Callable, Collection, Sequence
from typing import Any

import msgpack
import structlog

from shared import subjects
from shared.api import DEFAULT_TENANT, as_error, parse_request
from shared.bus import Bus, BusError, Message, PayloadTooLarge, Subscription
from shared.client_stream import FORGOTTEN_AFTER, Cursor, Stream
from shared.errors import RETRYABLE, ErrorCode, GorgonError

log = structlog.get_logger()

TICK = 0.05  # how often streams are looked at, seconds
STOOD_STILL = 1.0  # longer between two looks: this process was stopped
BEACON_FRESH = 0.5  # a partition is served if its beacon is no older


class Client:
    """See the module docstring. Give it a bus that is connected, or a URL (then it connects, and closes the connection at the end).

    tenant          whose requests these are; each request may name another, but ids must then be unique among all of them
    partitions      of the deployment; needed to attach to requests that were made elsewhere
    accept_timeout  seconds within which a request must be accepted; until then it is repeated under the same id
    retried         the retryable refusals that are met with repetition; others end the request at once
    after_message   called when the events of a message, of many streams perhaps, have been folded and each `on_change` called
    """

    def __init__(
        self,
        bus: Bus | str,
        model: str,
        *,
        tenant: str = DEFAULT_TENANT,
        partitions: int = 8,
        accept_timeout: float = 30.0,
        retried: Collection[ErrorCode] = RETRYABLE,
        after_message: Callable[[], None] | None = None,
    ) -> None:
        for what, name in (("model", model), ("tenant", tenant)):
            if not subjects.is_token(name):
                raise GorgonError(ErrorCode.INVALID_REQUEST, f"{what}: {subjects.TOKEN_RULE}")
        self.model = model
        self.tenant = tenant
        self.partitions = partitions
        self.accept_timeout = accept_timeout
        self.retried = retried
        self._after_message = after_message
        self.inbox = ""
        self.loop: asyncio.AbstractEventLoop
        self._given = bus
        self._bus: Bus
        self._streams: dict[str, Stream] = {}
        self._inbox_subscription: Subscription
        self._beacons: dict[int, Subscription] = {}
        self._beacon_seen: dict[int, float] = {}
        self._ticker: asyncio.Task[None]

    async def __aenter__(self) -> Client:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._bus = await _connect(self._given) if isinstance(self._given, str) else self._given
        self.inbox = self._bus.new_inbox()
        self._inbox_subscription = await self._bus.subscribe(self.inbox, self._on_message)
        self._bus.on_reconnect(self._on_reconnect)
        self._bus.on_closed(lambda error: self._fail_all(str(error)))
        self._ticker = self.loop.create_task(self._tick_forever(), name="client")

    async def close(self) -> None:
        """Streams that have not ended raise `unavailable`; the requests themselves go on (`attach` to them, or cancel them first)."""
        self._fail_all("the client was closed")
        self._ticker.cancel()
        await asyncio.gather(self._ticker, return_exceptions=True)
        for subscription in (self._inbox_subscription, *self._beacons.values()):
            with contextlib.suppress(BusError):
                await subscription.unsubscribe()
        if isinstance(self._given, str):
            await self._bus.close()

    # ------------------------------------------------ requests

    def generate(
        self,
        prompt: str | list[int] | None = None,
        *,
        messages: list[dict[str, Any]] | None = None,
        id: str | None = None,
        on_change: Callable[[], None] | None = None,
        accept_timeout: float | None = None,
        **params: Any,
    ) -> Stream:
        """Starts a request; fields as in shared.api.GenerateRequest. Raises GorgonError(INVALID_REQUEST) before anything is sent."""
        body = dict(id=id or uuid.uuid4().hex, batched=True, **{"tenant": self.tenant} | params)
        body |= {"prompt": prompt} if prompt is not None else {}
        body |= {"messages": messages} if messages is not None else {}
        parse_request(body)
        try:
            msgpack.packb(body)
        except (UnicodeEncodeError, OverflowError, ValueError, TypeError) as error:
            raise GorgonError(
                ErrorCode.INVALID_REQUEST, f"the request cannot be written as MessagePack: {error}"
            ) from None
        return self._add(
            Stream(self, body["tenant"], body["id"], body, on_change=on_change, accept_timeout=accept_timeout)
        )

    def attach(
        self,
        request_id: str,
        cursors: Sequence[Cursor] = (),
        *,
        tenant: str | None = None,
        on_change: Callable[[], None] | None = None,
        wait: float = FORGOTTEN_AFTER,
        silence: float = math.inf,
    ) -> Stream:
        """Follows a request that is running or ended within the attach window, from the cursors (default: the beginning) on.
        One that is still to come, or waits for a worker, is not known yet: `wait` is how many seconds that may last until it counts as
        not found, `silence` how many may pass without any answer until the stream ends as unavailable. Raises
        GorgonError(INVALID_REQUEST) for what can be no id."""
        if not subjects.is_token(request_id):
            raise GorgonError(ErrorCode.INVALID_REQUEST, f"id: {subjects.TOKEN_RULE}")
        tenant = tenant or self.tenant
        return self._add(Stream(self, tenant, request_id, None, cursors, on_change, wait=wait, silence=silence))

    async def cancel(self, request_id: str, tenant: str | None = None) -> str:
        """What was known of the request: "live", "ended" (nothing was done) or "unknown" (there is none, or it waits for its turn or is
        yet to come, and will end at once). Empty if nobody heard it. Raises GorgonError if it was refused."""
        body = msgpack.packb(dict(id=request_id, tenant=tenant or self.tenant))
        try:
            answer = msgpack.unpackb((await self._bus.request(subjects.cancel(self.model), body, 1.0)).data)
        except BusError:
            return ""
        if answer.get("event") == "error":
            raise as_error(answer)
        return str(answer["request"])

    def _add(self, stream: Stream) -> Stream:
        if stream.id in self._streams:
            raise ValueError(f"this client follows {stream.id} already")
        self._streams[stream.id] = stream
        stream.tick(self.loop.time())
        return stream

    # ------------------------------------------------ for streams

    def send(self, stream: Stream) -> None:
        try:
            self._bus.publish(subjects.generate(self.model), msgpack.packb(stream.body), reply=self.inbox)
        except PayloadTooLarge as error:
            stream.fail(GorgonError(ErrorCode.PAYLOAD_TOO_LARGE, str(error)))

    def ask_replay(self, stream: Stream) -> None:
        cursors = [dict(choice=c.choice, position=c.position, offset=c.offset) for c in stream.cursors]
        question = dict(
            id=stream.id,
            tenant=stream.tenant,
            cursors=cursors,
            attach=stream.body is None or stream.moved,
            batched=True,
        )
        self._bus.publish(subjects.replay(self.model, stream.partition), msgpack.packb(question), reply=self.inbox)

    def is_served(self, partition: int, now: float) -> bool:
        return now - self._beacon_seen.get(partition, now) < BEACON_FRESH

    def forget(self, stream: Stream) -> None:
        if self._streams.get(stream.id) is stream:
            del self._streams[stream.id]

    # ------------------------------------------------ what comes in

    def _on_message(self, message: Message) -> None:
        if not message.data:
            return  # "no responders": the timers take care
        events = msgpack.unpackb(message.data)
        for event in events if isinstance(events, list) else [events]:
            stream = self._streams.get(event.get("id"))
            if stream is not None:
                try:
                    stream.on_event(event)
                except Exception as error:  # the other events are of other streams
                    stream.break_off(error)
            elif event.get("id") is None:
                log.error("request_refused", code=event.get("code"), message=event.get("message"))
        if self._after_message is not None:
            self._after_message()

    def _on_beacon(self, partition: int) -> None:
        now = self.loop.time()
        returned = not self.is_served(partition, now)
        self._beacon_seen[partition] = now
        if returned:
            self._hurry(partition)

    def _on_reconnect(self) -> None:
        for stream in self._streams.values():
            stream.moved = True
        self._hurry(None)

    def _fail_all(self, reason: str) -> None:
        for stream in list(self._streams.values()):
            stream.fail(GorgonError(ErrorCode.UNAVAILABLE, reason))

    def _hurry(self, partition: int | None) -> None:
        for stream in self._streams.values():
            if partition is None or stream.partition == partition:
                stream.hurry()

    async def _tick_forever(self) -> None:
        now = self.loop.time()
        while True:
            await asyncio.sleep(TICK)
            before, now = now, self.loop.time()
            if now - before > STOOD_STILL:  # what came meanwhile is heard first
                for stream in self._streams.values():
                    stream.stood_still(now - before)
            for stream in list(self._streams.values()):
                try:
                    stream.tick(now)
                except Exception as error:
                    stream.break_off(error)
            await self._follow_beacons({stream.partition for stream in self._streams.values()})

    async def _follow_beacons(self, wanted: set[int]) -> None:
        """Listens to the beacons of the partitions that streams are in, and to no others."""
        with contextlib.suppress(BusError):
            for partition in wanted - self._beacons.keys():
                handler = lambda _, partition=partition: self._on_beacon(partition)  # noqa: E731
                self._beacons[partition] = await self._bus.subscribe(subjects.beacon(self.model, partition), handler)
                self._beacon_seen[partition] = self.loop.time()  # silence counts from now on
            for partition in self._beacons.keys() - wanted:
                await self._beacons.pop(partition).unsubscribe()
                self._beacon_seen.pop(partition, None)


async def _connect(url: str) -> Bus:
    from shared.config import StageSettings
    from shared.nats_bus import NatsBus

    settings: dict[str, Any] = {"nats_url": url}
    bus: Bus = await NatsBus.connect(StageSettings(**settings))
    return bus
