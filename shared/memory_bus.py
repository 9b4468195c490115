"""The Bus in one process, on the running loop's clock: for tests without a server, and for the simulation with its seeded faults.
`bus = MemoryBus(MemoryBroker(seed=1, faults=Faults(drop=0.01)))`, one a client, made inside a running loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager
from contextvars import copy_context
from typing import Any, TypeVar

import structlog

from shared.bus import (
    APPEND_TIMEOUT,
    HEADROOM,
    MAX_PAYLOAD,
    Appended,
    BucketSpec,
    BusError,
    BusTimeout,
    Delivery,
    Entry,
    Message,
    NoResponders,
    PayloadTooLarge,
    Stored,
    StreamSpec,
)
from shared.memory_broker import BucketState, DurableConsumer, Faults, MemoryBroker

__all__ = ["Faults", "MemoryBroker", "MemoryBus"]
log = structlog.get_logger()
T = TypeVar("T")

# An iteration over what is there already lets others run this often.
_YIELD_EVERY = 64


class MemorySubscription:
    def __init__(self, bus: MemoryBus, subject: str, queue: str, handler: Callable[[Message], None]) -> None:
        self.bus = bus
        self.subject = subject
        self.queue = queue
        self._handler = handler
        self._active = True

    def carrier(self, message: Message) -> Callable[[], None]:
        """What delivers the message, unless the connection that it travels on is lost before."""
        connection = self.bus.connection

        def arrive() -> None:
            if self._active and self.bus.connection == connection:
                self.bus.handle(self._handler, message, self.subject)

        return arrive

    async def unsubscribe(self) -> None:
        self.abort()

    def abort(self) -> None:
        self._active = False
        self.bus.broker.remove(self)


class MemoryFollower:
    def __init__(self, bus: MemoryBus, stream: str, subject: str, start_seq: int) -> None:
        self._bus = bus
        self._stream = stream
        self._subject = subject
        self._next = max(1, start_seq)
        self._at_once = 0
        self._wait: asyncio.Future[None] | None = None
        self._closed = False

    def __aiter__(self) -> AsyncIterator[Stored]:
        return self

    async def __anext__(self) -> Stored:
        """The next message, after any wait; the iteration ends only by `close`."""
        while not self._closed:
            stream = self._bus.broker.stream(self._stream)
            message = stream.next(self._subject, self._next) if self._bus.connected else None
            if message is None:
                self._at_once = 0
                self._wait = asyncio.get_running_loop().create_future()
                stream.wait_for(self._subject, self._wait)
                self._bus.wakes_on_reconnect(self._wait)
                await self._wait
                await self._bus.hop()
                if (broker := self._bus.broker).chance(broker.faults.blind):
                    await asyncio.sleep(broker.random.random() * broker.faults.max_blind)
            elif self._at_once == _YIELD_EVERY:
                self._at_once = 0
                await asyncio.sleep(0)
            else:
                self._at_once += 1
                self._next = message.seq + 1
                return message
        raise StopAsyncIteration

    async def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        self._closed = True
        if self._wait is not None and not self._wait.done():
            self._wait.set_result(None)


class MemoryDelivery:
    def __init__(self, consumer: MemoryConsumer, message: Stored, attempt: int) -> None:
        self.message = message
        self.attempt = attempt
        self._consumer = consumer

    async def ack(self) -> None:
        seq = self.message.seq
        self._consumer.settle(self, lambda durable: durable.ack(seq))

    async def nak(self, delay: float = 0.0) -> None:
        seq = self.message.seq
        self._consumer.settle(self, lambda durable: durable.nak(seq, delay))

    async def in_progress(self) -> None:
        seq = self.message.seq
        self._consumer.extend(self, lambda durable: durable.in_progress(seq))


class MemoryConsumer:
    """A member of a durable consumer."""

    def __init__(
        self, bus: MemoryBus, durable: DurableConsumer, handler: Callable[[Delivery], Awaitable[None]], limit: int
    ) -> None:
        self._bus = bus
        self._durable = durable
        self._handler = handler
        self._limit = limit
        self._stopped = False
        # What is unacked here; the timer is for the moment when the server will hand it out again anyway.
        self._open: dict[MemoryDelivery, asyncio.TimerHandle] = {}
        self._tasks: dict[asyncio.Task[None], None] = {}

    def has_room(self) -> bool:
        return self._bus.connected and not self._stopped and len(self._open) < self._limit

    def deliver(self, message: Stored, attempt: int) -> None:
        delivery = MemoryDelivery(self, message, attempt)
        self._expect(delivery)
        connection = self._bus.connection
        self._bus.broker.hop(lambda: self._arrive(delivery, connection), self._bus.context)

    def _arrive(self, delivery: MemoryDelivery, connection: int) -> None:
        if self._bus.connection == connection and not self._stopped:
            task = asyncio.get_running_loop().create_task(self._run(delivery))
            self._tasks[task] = None
            task.add_done_callback(self._tasks.pop)

    async def _run(self, delivery: MemoryDelivery) -> None:
        try:
            await self._handler(delivery)
        except Exception as error:
            log.error("handler_failed", subject=delivery.message.subject, seq=delivery.message.seq, exc_info=error)

    def _expect(self, delivery: MemoryDelivery) -> None:
        loop = asyncio.get_running_loop()
        wait = self._durable.ack_wait
        self._open[delivery] = loop.call_later(wait, self._settled, delivery, context=self._bus.context)

    def _settled(self, delivery: MemoryDelivery) -> None:
        if (timer := self._open.pop(delivery, None)) is not None:
            timer.cancel()
            if not self._stopped:
                self._durable.dispatch()

    def settle(self, delivery: MemoryDelivery, tell: Callable[[DurableConsumer], None]) -> None:
        self._tell(tell)
        self._settled(delivery)

    def extend(self, delivery: MemoryDelivery, tell: Callable[[DurableConsumer], None]) -> None:
        if (timer := self._open.pop(delivery, None)) is not None:
            timer.cancel()
            self._expect(delivery)
        self._tell(tell)

    def _tell(self, tell: Callable[[DurableConsumer], None]) -> None:
        broker = self._bus.broker
        if self._bus.connected and not broker.chance(broker.faults.drop):
            broker.hop(lambda: tell(self._durable) if broker.up else None, broker.context)

    def lose_connection(self) -> None:
        for timer in self._open.values():
            timer.cancel()
        self._open.clear()

    def reconnected(self) -> None:
        self._durable.dispatch()

    def set_limit(self, limit: int) -> None:
        self._limit = limit
        self._durable.dispatch()

    async def stop(self) -> None:
        self.abort()

    def abort(self) -> None:
        self._stopped = True
        if self in self._durable.members:
            self._durable.members.remove(self)


class MemoryWatch:
    def __init__(
        self, bus: MemoryBus, state: BucketState, handler: Callable[[Entry], None], ready: Callable[[], None]
    ) -> None:
        self._bus = bus
        self._state = state
        self._handler = handler
        self._ready: Callable[[], None] | None = ready
        self._known: dict[str, int] = {}
        self._active = True
        state.watchers.append(self._changed)
        self.list_again()

    def list_again(self) -> None:
        connection = self._bus.connection
        present = {key: Entry(key, value, revision) for key, (value, revision) in self._state.values.items()}
        gone = [Entry(key, None, self._state.revision) for key in self._known if key not in present]
        self._bus.broker.hop(lambda: self._listed([*gone, *present.values()], connection), self._bus.context)

    def _listed(self, entries: list[Entry], connection: int) -> None:
        if not self._active or self._bus.connection != connection:
            return
        for entry in entries:
            self._tell(entry)
        if self._ready is not None:
            ready, self._ready = self._ready, None
            ready()

    def _changed(self, entry: Entry) -> None:
        if self._bus.connected:
            connection = self._bus.connection
            self._bus.broker.hop(
                lambda: self._tell(entry) if self._bus.connection == connection else None, self._bus.context
            )

    def _tell(self, entry: Entry) -> None:
        if not self._active or self._known.get(entry.key, 0) >= entry.revision:
            return
        if entry.value is None:
            if self._known.pop(entry.key, None) is None:
                return
        else:
            self._known[entry.key] = entry.revision
        self._bus.handle(self._handler, entry, entry.key)

    async def unsubscribe(self) -> None:
        self.abort()

    def abort(self) -> None:
        self._active = False
        if self._changed in self._state.watchers:
            self._state.watchers.remove(self._changed)
        self._bus.watches.pop(self, None)


class MemoryBucket:
    def __init__(self, bus: MemoryBus, name: str) -> None:
        self._bus = bus
        self._name = name

    async def get(self, key: str) -> Entry | None:
        state = await self._read()
        found = state.values.get(key)
        return Entry(key, *found) if found else None

    async def entries(self) -> list[Entry]:
        state = await self._read()
        return [Entry(key, value, revision) for key, (value, revision) in state.values.items()]

    async def _read(self) -> BucketState:
        return await self._bus.read_from_broker(lambda: self._bus.broker.bucket(self._name))

    async def create(self, key: str, value: bytes) -> int:
        return await self._write(value, lambda state: state.set(key, value, 0))

    async def update(self, key: str, value: bytes, revision: int, ttl: float | None = None) -> int:
        return await self._write(value, lambda state: self._bus.broker.put_with_ttl(state, key, value, ttl, revision))

    async def put(self, key: str, value: bytes, ttl: float | None = None) -> int:
        return await self._write(value, lambda state: self._bus.broker.put_with_ttl(state, key, value, ttl))

    async def delete(self, key: str) -> None:
        await self._write(b"", lambda state: state.delete(key))

    async def _write(self, value: bytes, change: Callable[[BucketState], T]) -> T:
        broker = self._bus.broker

        def write() -> T:
            broker.check_disk()
            return change(broker.bucket(self._name))

        self._bus.check_size(value)
        return await self._bus.write_to_broker(write, 2.0)

    async def watch(self, handler: Callable[[Entry], None], ready: Callable[[], None]) -> MemoryWatch:
        watch = MemoryWatch(self._bus, await self._read(), handler, ready)
        self._bus.watches[watch] = None
        return watch


class MemoryBus:
    """A client of a MemoryBroker. See shared.bus.Bus for the interface."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.broker = broker
        self.context = copy_context()  # in which everything is done that comes in here
        self.connection = 1  # grows with each connection lost: what travels on an older one is lost with it
        self.partitioned = False
        self.watches: dict[MemoryWatch, None] = {}
        self.dropped = 0  # messages published while disconnected
        self.handler_errors = 0
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._since: float | None = self._loop.time() if broker.up else None
        self._connected = asyncio.Event()
        if broker.up:
            self._connected.set()
        self._appending: set[asyncio.Task[None]] = set()
        self._lost: dict[asyncio.Future[Any], None] = {}  # what fails when the connection is lost
        self._waits: dict[asyncio.Future[None], None] = {}  # of followers
        self._subscriptions: list[MemorySubscription] = []
        self._consumers: list[MemoryConsumer] = []
        self._followers: list[MemoryFollower] = []
        self._on_reconnect: list[Callable[[], None]] = []
        broker.clients.append(self)

    # ------------------------------------------------ connection

    @property
    def connected(self) -> bool:
        return self._since is not None

    @property
    def connected_for(self) -> float:
        return self._loop.time() - self._since if self._since is not None else 0.0

    def lose_connection(self) -> None:
        self._since = None
        self.connection += 1
        self._connected.clear()
        for future in self._lost:
            if not future.done():
                future.set_exception(BusTimeout("the connection was lost"))
        for consumer in self._consumers:
            consumer.lose_connection()

    def reconnect_after(self, delay: float) -> None:
        connection = self.connection
        self._loop.call_later(delay, self._reconnect, connection, context=self.context)

    def _reconnect(self, connection: int) -> None:
        if self._closed or self.partitioned or self.connected or self.connection != connection or not self.broker.up:
            return
        self._since = self._loop.time()
        self._connected.set()
        for wait in list(self._waits):
            if not wait.done():
                wait.set_result(None)
        for watch in self.watches:
            watch.list_again()
        for consumer in self._consumers:
            consumer.reconnected()
        for callback in self._on_reconnect:
            callback()

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        self._on_reconnect.append(callback)

    def on_closed(self, callback: Callable[[BaseException], None]) -> None:
        """Never called: this connection always comes back."""

    async def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        """What the death of the client's process means to the broker."""
        for follower in self._followers:
            follower.abort()
        for consumer in self._consumers:
            consumer.abort()
        for watch in list(self.watches):
            watch.abort()
        for subscription in self._subscriptions:
            subscription.abort()
        self._closed = True
        self.lose_connection()
        if self in self.broker.clients:
            self.broker.clients.remove(self)

    # ------------------------------------------------ for the parts of this module

    def handle(self, handler: Callable[[Any], None], argument: Any, subject: str) -> None:
        try:
            handler(argument)
        except Exception as error:
            self.handler_errors += 1
            log.error("handler_failed", subject=subject, exc_info=error)

    async def hop(self) -> None:
        await asyncio.sleep(self.broker.faults.latency)

    def check_size(self, data: bytes) -> None:
        if len(data) > MAX_PAYLOAD - HEADROOM:
            raise PayloadTooLarge(f"{len(data)} bytes, {MAX_PAYLOAD - HEADROOM} are allowed")

    def wakes_on_reconnect(self, wait: asyncio.Future[None]) -> None:
        self._waits[wait] = None
        wait.add_done_callback(self._waits.pop)

    async def _answer(self, future: asyncio.Future[T], timeout: float) -> T:
        """What `future` gets; BusTimeout after `timeout` or when the connection is lost."""
        self._lost[future] = None
        timer = self._loop.call_later(timeout, _time_out, future)
        try:
            return await future
        finally:
            timer.cancel()
            del self._lost[future]

    async def _wait_for_connection(self, timeout: float) -> float:
        """Returns what is left of `timeout`."""
        if self.connected:
            return timeout
        deadline = self._loop.time() + timeout
        try:
            async with asyncio.timeout_at(deadline):
                await self._connected.wait()
        except TimeoutError:
            raise BusTimeout("not connected") from None
        return deadline - self._loop.time()

    async def read_from_broker(self, read: Callable[[], T], timeout: float = 2.0) -> T:
        timeout = await self._wait_for_connection(timeout)
        future: asyncio.Future[T] = self._loop.create_future()
        if not self.broker.chance(self.broker.faults.drop):
            self.broker.hop(lambda: _resolve(future, read), self.broker.context)
        answer = await self._answer(future, timeout)
        await self.hop()
        return answer

    async def write_to_broker(self, write: Callable[[], T], timeout: float) -> T:
        timeout = await self._wait_for_connection(timeout)
        return await self._answer(self._write(write, timeout), timeout)

    def _write(self, write: Callable[[], T], timeout: float) -> asyncio.Future[T]:
        """Does `write` on the broker at once, so that writes of one client keep their order; the answer takes its time."""
        broker, faults = self.broker, self.broker.faults
        future: asyncio.Future[T] = self._loop.create_future()
        if broker.chance(faults.late_append):
            late = timeout + broker.random.random() * faults.max_delay
            self._loop.call_later(late, lambda: _resolve(future, write) if broker.up else None, context=broker.context)
        elif not broker.chance(faults.lose_append):
            outcome: asyncio.Future[T] = self._loop.create_future()
            _resolve(outcome, write)
            if not broker.chance(faults.lose_ack):
                broker.hop(lambda: _resolve(future, outcome.result), broker.context)
            else:
                outcome.exception()  # nobody will ask for it
        return future

    # ------------------------------------------------ core

    def publish(self, subject: str, data: bytes, reply: str = "") -> None:
        self.check_size(data)
        if self.connected:
            self.broker.route(Message(subject, data, reply))
            return
        if self.dropped == 0:
            log.warning("publish_while_disconnected", subject=subject)
        self.dropped += 1

    def new_inbox(self) -> str:
        return f"_INBOX.{self.broker.new_id()}"

    async def request(self, subject: str, data: bytes, timeout: float) -> Message:
        self.check_size(data)
        timeout = await self._wait_for_connection(timeout)
        inbox = self.new_inbox()
        future: asyncio.Future[Message] = self._loop.create_future()
        self.broker.inboxes[inbox] = future
        try:
            if self.broker.route(Message(subject, data, inbox)) == 0:
                await self.hop()
                raise NoResponders(subject)
            return await self._answer(future, timeout)
        finally:
            del self.broker.inboxes[inbox]

    async def subscribe(self, subject: str, handler: Callable[[Message], None], queue: str = "") -> MemorySubscription:
        subscription = MemorySubscription(self, subject, queue, handler)
        self._subscriptions.append(subscription)
        self.broker.add(subscription)
        return subscription

    # ------------------------------------------------ streams

    async def append(
        self,
        subject: str,
        data: bytes,
        *,
        msg_id: str | None = None,
        expected_last_subject_seq: int | None = None,
        timeout: float = APPEND_TIMEOUT,
    ) -> Appended:
        self.check_size(data)
        return await self.write_to_broker(
            lambda: self.broker.append(subject, data, msg_id, expected_last_subject_seq), timeout
        )

    def together(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def append_soon(
        self, subject: str, data: bytes, done: Callable[[Appended | BusError], None], *, msg_id: str | None = None
    ) -> bool:
        if not self.connected or len(data) > MAX_PAYLOAD - HEADROOM:
            return False
        future = self._write(lambda: self.broker.append(subject, data, msg_id, None), APPEND_TIMEOUT)

        async def answer() -> None:
            try:
                outcome: Appended | BusError = await self._answer(future, APPEND_TIMEOUT)
            except BusError as error:
                outcome = error
            done(outcome)

        task = self._loop.create_task(answer())
        self._appending.add(task)
        task.add_done_callback(self._appending.discard)
        return True

    async def read(self, stream: str, seq: int) -> Stored | None:
        return await self.read_from_broker(lambda: self.broker.stream(stream).messages.get(seq))

    async def last_seq(self, stream: str, subject: str) -> int:
        return await self.read_from_broker(lambda: self.broker.stream(stream).last_of(subject))

    async def follow(self, stream: str, subject: str, start_seq: int) -> MemoryFollower:
        await self.read_from_broker(lambda: self.broker.stream(stream))
        follower = MemoryFollower(self, stream, subject, start_seq)
        self._followers.append(follower)
        return follower

    async def consume(
        self,
        stream: str,
        durable: str,
        subject: str,
        handler: Callable[[Delivery], Awaitable[None]],
        *,
        limit: int,
        ack_wait: float,
    ) -> MemoryConsumer:
        state = await self.read_from_broker(lambda: self.broker.stream(stream))
        shared = state.consumers.get(durable)
        if shared is None:
            shared = state.consumers[durable] = DurableConsumer(self.broker, state, subject, ack_wait)
        consumer = MemoryConsumer(self, shared, handler, limit)
        self._consumers.append(consumer)
        shared.members.append(consumer)
        shared.dispatch()
        return consumer

    async def backlog(self, stream: str, durable: str) -> int:
        state = await self.read_from_broker(lambda: self.broker.stream(stream))
        consumer = state.consumers.get(durable)
        return state.count(consumer.subject, consumer.next_seq) if consumer is not None else 0

    async def acked_below(self, stream: str, durable: str) -> int:
        state = await self.read_from_broker(lambda: self.broker.stream(stream))
        consumer = state.consumers.get(durable)
        return min(consumer.unacked, default=consumer.next_seq) if consumer is not None else 1

    async def trim(self, stream: str, below_seq: int, subject: str = ">") -> None:
        await self.write_to_broker(lambda: self.broker.stream(stream).trim(below_seq, subject), 2.0)

    async def ensure_stream(self, spec: StreamSpec) -> None:
        await self.write_to_broker(lambda: self.broker.ensure_stream(spec), 2.0)

    # ------------------------------------------------ key-value

    async def ensure_bucket(self, spec: BucketSpec) -> None:
        await self.write_to_broker(lambda: self.broker.buckets.setdefault(spec.name, BucketState(spec)), 2.0)

    async def bucket(self, name: str) -> MemoryBucket:
        bucket = MemoryBucket(self, name)
        await self.read_from_broker(lambda: self.broker.bucket(name))
        return bucket


def _resolve(future: asyncio.Future[T], compute: Callable[[], T]) -> None:
    """Gives the future what `compute` returns or raises; nothing if nobody waits for it any more (`compute` runs all the same)."""
    try:
        value = compute()
    except BusError as error:
        if not future.done():
            future.set_exception(error)
    else:
        if not future.done():
            future.set_result(value)


def _time_out(future: asyncio.Future[Any]) -> None:
    if not future.done():
        future.set_exception(BusTimeout("no answer in time"))
