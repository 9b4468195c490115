"""Readers of JetStream consumers. A pull stands at the server all the time, so that a message is pushed to it as it is stored;
what is taken is made up for before the pull runs dry. After a reconnect, silence or a gap, the reader begins anew by itself.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import structlog
from nats.aio.msg import Msg

from shared.bus import BusError, BusTimeout, Delivery, Stored

if TYPE_CHECKING:
    from shared.nats_bus import CoreSubscription, NatsBus

log = structlog.get_logger()

NANOSECONDS = 10**9
EXPIRES = 600.0  # seconds for which a pull stands
HEARTBEAT = 0.5  # of the server, to a pull to which it has nothing to send
OPEN_ATTEMPTS = 3  # a process that starts must not end because one answer was lost
SILENCE = 2.0  # longer than this without message or heartbeat: the consumer is gone
FIRST_DELAY, LONGEST_DELAY = 0.05, 1.0
# Messages that may be under way to a follower, or waiting in it.
BATCH = 256
# An ephemeral consumer whose reader is gone is deleted by the server after this.
INACTIVE = 30.0
_YIELD_EVERY = 64


class Reader(Protocol):
    """What the bus tells of a reconnect, and of its own end."""

    begin_anew: Callable[[], None]

    async def close(self) -> None: ...


class Place(NamedTuple):
    """What a message's reply subject says: `$JS.ACK[.domain.account].stream.consumer.delivered.sseq.cseq.time.pending`."""

    delivered: int
    stream_seq: int
    consumer_seq: int
    time: int  # nanoseconds since the epoch
    pending: int

    @classmethod
    def of(cls, reply: str) -> Place:
        tokens = reply.split(".")
        return cls(*map(int, tokens[4:9] if len(tokens) == 9 else tokens[6:11]))


class StandingPull:
    """Keeps a consumer and a pull on it alive.

    create()          makes (or finds) the consumer and returns its name and the number of messages that it has to send
    begun(pending)    called when a new pull begins
    room()            how many messages may be under way
    deliver(msg, at, current)   takes a message; False if it is not the one that was due, and the reader must begin anew.
                      `current` is False for what an earlier pull still brings
    idle(sent)        told, while nothing comes, the consumer sequence of the last message that the server has sent; False if that one
                      has not come, and the reader must begin anew
    """

    def __init__(
        self,
        bus: NatsBus,
        stream: str,
        create: Callable[[], Awaitable[tuple[str, int]]],
        begun: Callable[[int], None],
        room: Callable[[], int],
        deliver: Callable[[Msg, Place, bool], bool],
        idle: Callable[[int], bool] = lambda sent: True,
    ) -> None:
        self._bus = bus
        self._stream = stream
        self._create = create
        self._begun = begun
        self._room = room
        self._deliver = deliver
        self._idle = idle
        self._subscription: CoreSubscription | None = None
        self._consumer = ""
        self._inbox = ""
        self._requested = 0  # messages that the server may still send
        self._heard = 0.0
        self._broken = asyncio.Event()
        self._draining: asyncio.Task[None] | None = None  # of the pull before this one
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Raises a BusError if the consumer cannot be made; an answer that is lost is asked for again, and later errors are retried
        for ever."""
        try:
            for left in reversed(range(OPEN_ATTEMPTS)):
                try:
                    await self._begin()
                    break
                except BusTimeout:
                    if not left:
                        raise
        except BaseException:
            await self.close()
            raise
        self._task = asyncio.get_running_loop().create_task(self._keep_alive(), name=f"pull {self._stream}")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._consumer = ""
        if self._subscription is not None and self._bus.is_up():
            await self._subscription.drain()
        elif self._subscription is not None:
            await self._subscription.unsubscribe()

    def begin_anew(self) -> None:
        self._broken.set()

    def fill(self) -> None:
        """Asks for more, if there is room for as much that it is worth while."""
        room = self._room()
        wanted = room - self._requested
        if wanted < 0:
            self.begin_anew()  # the only way to take a request back
        elif self._consumer and not self._broken.is_set() and 2 * wanted >= max(room, 1):
            self._requested += wanted
            body = {
                "batch": wanted,
                "expires": int(EXPIRES * NANOSECONDS),
                "idle_heartbeat": int(HEARTBEAT * NANOSECONDS),
            }
            subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._consumer}"
            self._bus.publish(subject, json.dumps(body).encode(), self._inbox)

    async def _begin(self) -> None:
        self._broken.clear()
        self._consumer = ""
        if self._subscription is not None:
            # The server forgets pulls that nobody listens to; what it has sent already is still taken.
            self._draining = asyncio.get_running_loop().create_task(self._subscription.drain())
        inbox = self._bus.new_inbox()
        self._subscription = await self._bus.subscribe_raw(inbox, partial(self._receive, inbox))
        name, pending = await self._create()
        self._inbox, self._consumer = inbox, name
        self._requested = 0
        self._heard = asyncio.get_running_loop().time()
        self._begun(pending)
        self.fill()

    async def _keep_alive(self) -> None:
        delay = FIRST_DELAY
        while True:
            try:
                await self._until_broken()
                await self._begin()
                delay = FIRST_DELAY
            except BusError as error:
                log.warning("reader_begins_anew", stream=self._stream, error=repr(error), delay=delay)
                self._broken.set()
                await asyncio.sleep(delay)
                delay = min(2 * delay, LONGEST_DELAY)

    async def _until_broken(self) -> None:
        """Until begin_anew, or the server has been silent for too long."""
        loop = asyncio.get_running_loop()
        while not self._broken.is_set():
            quiet = loop.time() - self._heard if self._requested else 0.0
            if quiet >= SILENCE:
                log.warning(
                    "reader_hears_nothing", stream=self._stream, consumer=self._consumer, seconds=round(quiet, 1)
                )
                return
            try:
                async with asyncio.timeout(SILENCE - quiet):
                    await self._broken.wait()
            except TimeoutError:
                continue

    def _receive(self, inbox: str, msg: Msg) -> None:
        current = inbox == self._inbox and bool(self._consumer)
        if not msg.reply.startswith("$JS.ACK"):
            if current and msg.headers:
                self._on_status(msg.headers)
            return
        if current:
            self._heard = asyncio.get_running_loop().time()
            self._requested -= 1
        if not self._deliver(msg, Place.of(msg.reply), current):
            self.begin_anew()
        self.fill()

    def _on_status(self, headers: dict[str, str]) -> None:
        status, description = headers.get("Status", ""), headers.get("Description", "")
        self._heard = asyncio.get_running_loop().time()
        if status == "100":  # a heartbeat
            if not self._idle(int(headers.get("Nats-Last-Consumer", 0))):
                log.warning("last_message_lost", stream=self._stream, consumer=self._consumer)
                self.begin_anew()
            return
        if status == "408":  # the pull has expired
            self._requested -= int(headers.get("Nats-Pending-Messages", self._requested))
            self.fill()
            return
        log.info("reader_begins_anew", stream=self._stream, status=status, description=description)
        self.begin_anew()


class OrderedReader:
    """A gap-free reader by an ephemeral consumer: whatever happens, `take` gets each message from `next_seq` on once and in order.

    last_per_subject  begins with the last message of each subject, and so again when the connection was lost, instead of going on
    begun(pending, resumed)   see StandingPull; `resumed`: it goes on where a message was lost. A long listing would never come to its
                              end on a link that loses one message in a hundred if each loss began it anew.
    waiting()         messages that were taken but not used yet: they count as under way
    """

    def __init__(
        self,
        bus: NatsBus,
        stream: str,
        subject: str,
        take: Callable[[Stored, dict[str, str] | None], None],
        *,
        start_seq: int = 1,
        last_per_subject: bool = False,
        begun: Callable[[int, bool], None] = lambda pending, resumed: None,
        waiting: Callable[[], int] = lambda: 0,
    ) -> None:
        self._bus = bus
        self._stream = stream
        self._subject = subject
        self._take = take
        self._next_seq = max(1, start_seq)
        self._last_per_subject = last_per_subject
        self._due = 1  # consumer sequence
        self._resume = self._resumed = not last_per_subject
        self._user_begun = begun
        self._waiting = waiting
        self._name = ""
        self._pull = StandingPull(bus, stream, self._create, self._begun, self._room, self._deliver, self._is_whole)
        self.open = self._pull.open
        self.fill = self._pull.fill

    def begin_anew(self) -> None:
        self._resume = not self._last_per_subject
        self._pull.begin_anew()

    async def _create(self) -> tuple[str, int]:
        self._delete()
        self._name = f"gorgon-{uuid.uuid4().hex}"
        config: dict[str, Any] = {
            "name": self._name,
            "filter_subject": self._subject,
            "ack_policy": "none",
            "max_deliver": 1,
            "mem_storage": True,
            "num_replicas": 1,
            "inactive_threshold": int(INACTIVE * NANOSECONDS),
        }
        resumed = self._resume
        if not resumed:
            config["deliver_policy"] = "last_per_subject"
        else:
            config |= {"deliver_policy": "by_start_sequence", "opt_start_seq": self._next_seq}
        subject = f"CONSUMER.CREATE.{self._stream}.{self._name}.{self._subject}"
        made = await self._bus.api(subject, {"stream_name": self._stream, "config": config, "action": "create"})
        self._resumed, self._resume = resumed, not self._last_per_subject
        return self._name, made["num_pending"]

    def _delete(self) -> None:
        """Lets the server know that the consumer is not needed any more; if it does not hear it, INACTIVE does the same."""
        if self._name and self._bus.is_up():
            subject = f"$JS.API.CONSUMER.DELETE.{self._stream}.{self._name}"
            self._bus.publish(subject, b"", self._bus.new_inbox())  # the server does nothing without a reply subject
        self._name = ""

    def _begun(self, pending: int) -> None:
        self._due = 1
        self._user_begun(pending, self._resumed)

    def _room(self) -> int:
        return max(0, BATCH - self._waiting())

    def _deliver(self, msg: Msg, at: Place, current: bool) -> bool:
        if not current:
            return True
        if at.consumer_seq != self._due:
            return self._lost_one()
        self._due += 1
        self._next_seq = at.stream_seq + 1
        self._take(Stored(at.stream_seq, msg.subject, msg.data, at.time / NANOSECONDS, at.pending), msg.headers)
        return True

    def _is_whole(self, sent: int) -> bool:
        """A lost message shows by the next one, and by this if there is no next one."""
        return sent < self._due or self._lost_one()

    def _lost_one(self) -> bool:
        self._resume = True
        return False

    async def close(self) -> None:
        await self._pull.close()
        self._delete()


class NatsFollower:
    """shared.bus.Follower"""

    def __init__(self, bus: NatsBus, stream: str, subject: str, start_seq: int) -> None:
        self._bus = bus
        self._buffer: deque[Stored] = deque()
        self._wait: asyncio.Future[None] | None = None
        self._at_once = 0
        self._closed = False
        self._reader = OrderedReader(
            bus, stream, subject, self._take, start_seq=start_seq, waiting=lambda: len(self._buffer)
        )
        self.begin_anew = self._reader.begin_anew

    async def open(self) -> None:
        await self._reader.open()
        self._bus.add_reader(self)

    def _take(self, message: Stored, headers: dict[str, str] | None) -> None:
        self._buffer.append(message)
        self._wake()

    def _wake(self) -> None:
        if self._wait is not None and not self._wait.done():
            self._wait.set_result(None)

    def __aiter__(self) -> AsyncIterator[Stored]:
        return self

    async def __anext__(self) -> Stored:
        """The next message, after any wait; the iteration ends only by `close`."""
        if self._at_once >= _YIELD_EVERY:
            self._at_once = 0
            await asyncio.sleep(0)
        while not self._buffer and not self._closed:
            self._at_once = 0
            self._wait = asyncio.get_running_loop().create_future()
            await self._wait
        if self._closed:
            raise StopAsyncIteration
        self._at_once += 1
        message = self._buffer.popleft()
        self._reader.fill()
        return message

    async def close(self) -> None:
        self._closed = True
        self._wake()
        self._bus.remove_reader(self)
        await self._reader.close()


class NatsDelivery:
    """shared.bus.Delivery"""

    def __init__(self, consumer: NatsConsumer, message: Stored, attempt: int, reply: str) -> None:
        self.message = message
        self.attempt = attempt
        self._consumer = consumer
        self._reply = reply

    async def ack(self) -> None:
        self._consumer.settle(self, self._reply, b"+ACK")

    async def nak(self, delay: float = 0.0) -> None:
        body = b"-NAK" + (json.dumps({"delay": int(delay * NANOSECONDS)}).encode() if delay > 0 else b"")
        self._consumer.settle(self, self._reply, body)

    async def in_progress(self) -> None:
        self._consumer.extend(self, self._reply)


class NatsConsumer:
    """shared.bus.Consumer"""

    def __init__(
        self,
        bus: NatsBus,
        stream: str,
        durable: str,
        subject: str,
        handler: Callable[[Delivery], Awaitable[None]],
        limit: int,
        ack_wait: float,
    ) -> None:
        self._bus = bus
        self._stream = stream
        self._durable = durable
        self._subject = subject
        self._handler = handler
        self._limit = limit
        self._ack_wait = ack_wait
        # What is unacked here; the timer is for the moment when the server will hand it out again anyway.
        self._open: dict[NatsDelivery, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = False
        self._pull = StandingPull(bus, stream, self._create, lambda pending: None, self._room, self._deliver)
        self.begin_anew = self._pull.begin_anew

    async def open(self) -> None:
        await self._pull.open()
        self._bus.add_reader(self)

    async def _create(self) -> tuple[str, int]:
        config = {
            "durable_name": self._durable,
            "name": self._durable,
            "filter_subject": self._subject,
            "deliver_policy": "all",
            "ack_policy": "explicit",
            "ack_wait": int(self._ack_wait * NANOSECONDS),
            "max_deliver": -1,
            "max_ack_pending": -1,
            "max_waiting": 10_000,
        }
        if (present := await self._bus.consumer_info(self._stream, self._durable)) is not None:
            settled = present["config"]
            if all(settled.get(name) == value for name, value in config.items() if name != "deliver_policy"):
                return self._durable, present["num_pending"]  # to create one is a right that not every stage has
        subject = f"CONSUMER.CREATE.{self._stream}.{self._durable}.{self._subject}"
        made = await self._bus.api(subject, {"stream_name": self._stream, "config": config})
        return self._durable, made["num_pending"]

    def _room(self) -> int:
        return max(0, self._limit - len(self._open))

    def _deliver(self, msg: Msg, at: Place, current: bool) -> bool:
        message = Stored(at.stream_seq, msg.subject, msg.data, at.time / NANOSECONDS, at.pending)
        delivery = NatsDelivery(self, message, at.delivered, msg.reply)
        if self._stopped or len(self._open) >= self._limit:
            # It was asked for before the limit was lowered.
            self._bus.publish(msg.reply, b"-NAK")
            return True
        self._expect(delivery)
        task = asyncio.get_running_loop().create_task(self._run(delivery))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    async def _run(self, delivery: NatsDelivery) -> None:
        try:
            await self._handler(delivery)
        except Exception as error:
            log.error("handler_failed", subject=delivery.message.subject, seq=delivery.message.seq, exc_info=error)

    def _expect(self, delivery: NatsDelivery) -> None:
        self._open[delivery] = asyncio.get_running_loop().call_later(self._ack_wait, self._settled, delivery)

    def _settled(self, delivery: NatsDelivery) -> None:
        if (timer := self._open.pop(delivery, None)) is not None:
            timer.cancel()
            self._pull.fill()

    def settle(self, delivery: NatsDelivery, reply: str, body: bytes) -> None:
        self._bus.publish(reply, body)
        self._settled(delivery)

    def extend(self, delivery: NatsDelivery, reply: str) -> None:
        if (timer := self._open.pop(delivery, None)) is not None:
            timer.cancel()
            self._expect(delivery)
        self._bus.publish(reply, b"+WPI")

    def set_limit(self, limit: int) -> None:
        self._limit = limit
        self._pull.fill()

    async def stop(self) -> None:
        self._stopped = True
        self._bus.remove_reader(self)
        await self._pull.close()

    async def close(self) -> None:
        await self.stop()
