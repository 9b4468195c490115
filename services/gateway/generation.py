"""Requests that this gateway follows. HTTP calls read them; a request may have several readers (a retry that came before the first
connection was found dead), and none for a while (its client is on its way back)."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import uuid
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import msgpack
import structlog

from services.gateway.errors import ApiError
from services.gateway.settings import GatewaySettings
from services.gateway.sse import Bell, Round
from shared import subjects
from shared.api import hash_body
from shared.bus import Bus, BusError, Message
from shared.client import Client
from shared.client_stream import Delta, Stream
from shared.errors import ErrorCode, GorgonError

log = structlog.get_logger()

HELD_TIMEOUT = 0.5  # for the others to say that they read a request
HELD_ATTEMPTS = 3
RECONNECT_GRACE = 2.0  # that the others get to come back, too, after a loss of the link

Spawn = Callable[[Coroutine[Any, Any, None], str], "asyncio.Task[None]"]

_TENANT_DIGITS = 8  # of an id, in front: whose it is


def new_id(tenant: str, idempotency_key: str | None) -> str:
    """The id of a request, 32 hexadecimal digits. The same key always gives the same id. Events carry no more than it, so ids of two
    tenants must differ even if one of them makes its up: they begin with digits of the tenant's own."""
    if idempotency_key is None:
        rest = uuid.uuid4().hex
    else:
        rest = _digest(f"{tenant}\0{idempotency_key}")
    return _of_tenant(tenant) + rest[_TENANT_DIGITS:]


def is_of(tenant: str, request_id: str) -> bool:
    """Whether the id is one that this tenant's requests may have."""
    return request_id.startswith(_of_tenant(tenant))


def _of_tenant(tenant: str) -> str:
    return _digest(tenant)[:_TENANT_DIGITS]


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()


class Generation:
    """One request. `deltas` is everything that has come; `bells` are rung at each change.

    survives   its client may come back: it is not cancelled as soon as nobody reads it
    """

    def __init__(self, tenant: str, request_id: str, body_hash: bytes | None, survives: bool) -> None:
        self.tenant = tenant
        self.id = request_id
        self.body_hash = body_hash
        self.survives = survives
        self.deltas: list[Delta] = []
        self.end: dict[str, Any] | None = None  # the terminal event, when all deltas are there
        self.bells: set[Callable[[], None]] = set()
        self.readers = 0
        self.left: asyncio.TimerHandle | None = None
        self._stream: Stream | None = None

    def follow(self, stream: Stream) -> None:
        self._stream = stream
        self.on_change()

    @property
    def stream(self) -> Stream:
        assert self._stream is not None
        return self._stream

    def on_change(self) -> None:
        if self._stream is None:
            return  # it failed before it began
        self.deltas += self._stream.take_deltas()
        self.end = self._stream.ending
        for bell in tuple(self.bells):
            bell()

    @property
    def known(self) -> bool:
        """It is accepted; of a request that was made elsewhere, something has been heard."""
        return self.stream.known and (self.stream.body is not None or bool(self.deltas))


class Generations:
    """All of this gateway, by tenant and id; a Client (one reply inbox) for each model."""

    def __init__(self, bus: Bus, settings: GatewaySettings, spawn: Spawn) -> None:
        self._bus = bus
        self._settings = settings
        self._spawn = spawn
        self._clients: dict[str, Client] = {}
        self._starting: dict[str, asyncio.Lock] = {}
        self._all: dict[str, Generation] = {}
        self.closing = False
        self.given_up = asyncio.Event()  # what is not answered by now will not be answered here
        self.round = Round()  # of all streams that are written

    def __len__(self) -> int:
        return len(self._all)

    async def start(self) -> None:
        await self._bus.subscribe(subjects.HELD, self._on_held)

    async def close(self) -> None:
        """The requests go on: their clients find them at another gateway."""
        self.closing = True
        for generation in self._all.values():
            if generation.left is not None:
                generation.left.cancel()
        for client in self._clients.values():
            await client.close()

    # ------------------------------------------------ reading

    async def begin(
        self, model: str, tenant: str, request_id: str, body: dict[str, Any], *, survives: bool, patience: float
    ) -> Generation:
        """Starts the request, or joins it if it is there already. Raises ApiError."""
        client = await self._client(model)
        try:
            body_hash = hash_body(body, model=model)
        except GorgonError as error:
            raise ApiError.of(error) from None
        while (known := self._known(tenant, request_id)) is not None and known.body_hash not in (None, body_hash):
            await self._leave_to(known, patience)
        if known is not None:
            known.survives = known.survives or survives
            return self._join(known)
        self._make_room()
        generation = Generation(tenant, request_id, body_hash, survives)
        try:
            generation.follow(
                client.generate(
                    id=request_id,
                    tenant=tenant,
                    on_change=partial(self._changed, generation),
                    accept_timeout=patience,
                    **body,
                )
            )
        except GorgonError as error:
            raise ApiError.of(error) from None
        return self._join(generation)

    async def resume(self, model: str, tenant: str, request_id: str, *, survives: bool) -> Generation:
        """Joins a request that was made earlier, here or at another gateway. Raises ApiError."""
        client = await self._client(model)
        if (known := self._known(tenant, request_id)) is not None:
            known.survives = known.survives or survives
            return self._join(known)
        self._make_room()
        generation = Generation(tenant, request_id, None, survives)
        generation.follow(
            client.attach(request_id, tenant=tenant, on_change=partial(self._changed, generation)),
        )
        return self._join(generation)

    def _join(self, generation: Generation) -> Generation:
        self._all[generation.id] = generation
        generation.readers += 1
        if generation.left is not None:
            generation.left.cancel()
            generation.left = None
        return generation

    def leave(self, generation: Generation) -> None:
        """A reader goes. The last one's request is cancelled, at once or after the grace, unless it has ended."""
        generation.readers -= 1
        if generation.readers:
            return
        if generation.end is not None or self.closing:
            self._forget(generation)
        elif not generation.survives:
            self._spawn(self._cancel(generation), "cancel")
        else:
            grace = self._settings.reattach_grace
            loop = asyncio.get_running_loop()
            generation.left = loop.call_later(
                grace, lambda: self._spawn(self._cancel_if_abandoned(generation), "abandon")
            )

    async def _cancel(self, generation: Generation) -> None:
        log.info("cancelling", request_id=subjects.request_key(generation.tenant, generation.id))
        with contextlib.suppress(GorgonError):
            await generation.stream.cancel()
        self._forget(generation)

    async def _cancel_if_abandoned(self, generation: Generation) -> None:
        """Whoever lost its connection to this gateway may have come back through another one."""
        if generation.readers or generation.end is not None or self.closing:
            return
        question = msgpack.packb((generation.tenant, generation.id))
        generation.left = None  # two gateways whose readers have left must not excuse each other
        unanswered = 0
        while unanswered < HELD_ATTEMPTS:
            try:
                await self._bus.request(subjects.HELD, question, HELD_TIMEOUT)
            except BusError:
                if self._bus.connected_for > RECONNECT_GRACE:  # else the silence proves nothing
                    unanswered += 1
                else:
                    await asyncio.sleep(HELD_TIMEOUT)
                continue
            log.info("held_elsewhere", request_id=subjects.request_key(generation.tenant, generation.id))
            self._forget(generation)
            return
        if not generation.readers:
            await self._cancel(generation)

    def _on_held(self, message: Message) -> None:
        """Of a request that is read here, or whose reader has left so lately that it may come back."""
        tenant, request_id = msgpack.unpackb(message.data)
        generation = self._all.get(request_id)
        if (
            message.reply
            and generation is not None
            and generation.tenant == tenant
            and (generation.readers or generation.left is not None)
        ):
            self._bus.publish(message.reply, b"\x01")

    # ------------------------------------------------ inside

    async def _leave_to(self, known: Generation, patience: float) -> None:
        """Of two requests with one id and different bodies: returns if the pipeline has refused this one, which is in its place and may
        itself have come with a key that another request has. Raises ApiError if it has accepted it, or does not tell."""
        bell = Bell()
        known.bells.add(bell.ring)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while not known.known and known.end is None:
                    await bell.wait()
        known.bells.discard(bell.ring)
        if known.known or known.end is None:
            text = "the Idempotency-Key belongs to a request with another body"
            raise ApiError.of(GorgonError(ErrorCode.ID_CONFLICT, text))
        self._drop(known)

    def _changed(self, generation: Generation) -> None:
        generation.on_change()
        if not generation.readers and generation.id in self._all and generation.end is not None:
            self._forget(generation)

    def _known(self, tenant: str, request_id: str) -> Generation | None:
        generation = self._all.get(request_id)
        if generation is not None and generation.tenant != tenant:
            # Ids are hashes or random: somebody tries another tenant's.
            raise ApiError.of(GorgonError(ErrorCode.NOT_FOUND, "no such request"))
        return generation

    def _make_room(self) -> None:
        if len(self._all) >= self._settings.max_streams:
            message = f"this gateway follows {len(self._all)} requests: no more"
            raise ApiError.of(GorgonError(ErrorCode.OVERLOADED, message, retry_after=1.0))

    def _forget(self, generation: Generation) -> None:
        if generation.left is not None:
            generation.left.cancel()
        if not generation.readers:
            self._drop(generation)

    def _drop(self, generation: Generation) -> None:
        if self._all.get(generation.id) is generation:
            del self._all[generation.id]
            generation.stream.abandon()

    async def _client(self, model: str) -> Client:
        lock = self._starting.setdefault(model, asyncio.Lock())
        async with lock:
            if (client := self._clients.get(model)) is None:
                client = Client(
                    self._bus,
                    model,
                    partitions=self._settings.partitions,
                    accept_timeout=self._settings.accept_timeout,
                    # Whoever is turned away for want of room is told at once: HTTP clients know how to wait.
                    retried=(ErrorCode.UNAVAILABLE,),
                    after_message=self.round.write,
                )
                try:
                    await client.start()
                except BusError as error:
                    raise ApiError.of(GorgonError(ErrorCode.UNAVAILABLE, f"NATS: {error}")) from None
                self._clients[model] = client
        return client
