"""The Bus: all that a stage may ask of the messaging system. Two implementations behave alike:

    shared.nats_bus.NatsBus        the real one (nats-py); `await NatsBus.connect(settings)`
    shared.memory_bus.MemoryBus    in one process, on the running loop's clock, with seeded faults: the simulation's

Services talk to this interface only, take time only from `asyncio.get_running_loop().time()`, and so run unchanged in both.

Handlers of subscriptions are plain functions, called one after another on the event loop: they must not block and must not raise
(an exception is logged with the subject and counted, and the subscription goes on).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol

# The server's limit, and what a message keeps below it for headers: one byte over and the server closes the connection for good.
MAX_PAYLOAD = 8 * 2**20
HEADROOM = 64 * 2**10
APPEND_TIMEOUT = 2.0  # seconds


class BusError(Exception):
    """Something did not get through. Retry, or tell the client `unavailable`."""


class NoResponders(BusError):
    """Nobody listens on the subject of a request."""


class BusTimeout(BusError):
    """No answer (or no acknowledgement) in time: the message may or may not have arrived."""


class PayloadTooLarge(BusError):
    """The message exceeds the server's limit less the headroom that is kept for headers."""


class StorageFull(BusError):
    """The stream is at its limit or the disk is full (discard=new): nothing was stored."""


class WrongRevision(BusError):
    """A compare-and-swap lost: the key or subject has changed since, or exists already."""


class IncompatibleStream(BusError):
    """The stream exists already, and its metadata say that it was laid out otherwise."""


class StreamSpec(NamedTuple):
    """A file stream that refuses new messages when it is full (discard new). 0 means no limit.

    work_queue   an acked message is deleted
    max_age, duplicate_window   seconds
    metadata     what must never change in the life of the stream: a disagreement is IncompatibleStream
    """

    name: str
    subject: str
    work_queue: bool = False
    max_age: float = 0.0
    max_bytes: int = 0
    duplicate_window: float = 120.0
    replicas: int = 1
    metadata: Mapping[str, str] = MappingProxyType({})

    def check_metadata(self, present: Mapping[str, str]) -> None:
        """Raises IncompatibleStream if a stream that exists, with this metadata, was laid out otherwise."""
        for name, value in self.metadata.items():
            if (found := present.get(name)) != value:
                raise IncompatibleStream(f"stream {self.name} exists with {name}={found}, but {name}={value} is wanted")


class BucketSpec(NamedTuple):
    """A key-value bucket on file that keeps one value a key. Keys may have a time to live."""

    name: str
    replicas: int = 1


@dataclass(slots=True)
class Message:
    """A core message. `reply` is empty when no answer is wanted."""

    subject: str
    data: bytes
    reply: str = ""


class Appended(NamedTuple):
    """A stored message. `duplicate`: its msg_id was seen within the stream's window; `seq` is then the first one's."""

    seq: int
    duplicate: bool


@dataclass(slots=True)
class Stored:
    """A message of a stream. `stamp` is its store time in seconds since the epoch of the *server's* clock."""

    seq: int
    subject: str
    data: bytes
    stamp: float
    pending: int = 0  # messages of the followed subject still behind this one


class Delivery(Protocol):
    """A message of a durable consumer. It comes again after ack_wait unless acked; `attempt` counts from 1.

    The methods do not wait for the server and do not raise: what is lost on the way makes the message come again, nothing else."""

    message: Stored
    attempt: int

    async def ack(self) -> None: ...
    async def nak(self, delay: float = 0.0) -> None: ...
    async def in_progress(self) -> None:
        """Starts ack_wait again."""


class Subscription(Protocol):
    async def unsubscribe(self) -> None: ...


class Follower(Protocol):
    """An ordered, gap-free reader of one subject of a stream, from a sequence on, for ever. It survives server restarts."""

    def __aiter__(self) -> AsyncIterator[Stored]: ...
    async def close(self) -> None: ...


class Consumer(Protocol):
    """A standing pull on a durable consumer, re-armed after every reconnect. `set_limit(n)` allows at most n unacked deliveries
    in this process (0 pauses)."""

    def set_limit(self, limit: int) -> None: ...
    async def stop(self) -> None: ...


class Entry(NamedTuple):
    """A key's value. `value` is None in a watch when the key was deleted or expired."""

    key: str
    value: bytes | None
    revision: int


class Bucket(Protocol):
    """A key-value bucket with compare-and-swap on revisions. `ttl` in seconds."""

    async def get(self, key: str) -> Entry | None: ...
    async def create(self, key: str, value: bytes) -> int:
        """Returns the revision; WrongRevision if the key exists."""

    async def update(self, key: str, value: bytes, revision: int, ttl: float | None = None) -> int:
        """Compare-and-swap; WrongRevision if the key's revision is another."""

    async def put(self, key: str, value: bytes, ttl: float | None = None) -> int: ...
    async def delete(self, key: str) -> None: ...
    async def entries(self) -> list[Entry]: ...
    async def watch(self, handler: Callable[[Entry], None], ready: Callable[[], None]) -> Subscription:
        """Calls handler for every key's present value, then `ready` (once), then handler for each change. After a reconnect the
        whole bucket is listed again: what changed meanwhile comes, keys that vanished with value None, so that a watch is never
        silently blind. Of several changes in quick succession only the last may be seen."""


class Bus(Protocol):
    """See the module docstring. Every method raises a BusError and nothing else when the system does not do its part."""

    @property
    def connected_for(self) -> float:
        """Seconds since the connection was (re-)established; 0 while there is none. Silence of others proves nothing before
        this exceeds a grace period."""

    @property
    def dropped(self) -> int:
        """Core messages that were published while there was no connection."""

    # ------------------------------------------------ core

    def new_inbox(self) -> str:
        """A subject for answers, which nobody else uses."""

    def publish(self, subject: str, data: bytes, reply: str = "") -> None:
        """Fire and forget: may be lost. Never blocks; while disconnected the message is dropped and counted."""

    async def request(self, subject: str, data: bytes, timeout: float) -> Message:
        """One answer. Raises NoResponders, BusTimeout."""

    async def subscribe(self, subject: str, handler: Callable[[Message], None], queue: str = "") -> Subscription: ...

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
        """Stores in the subject's stream, one attempt; returns only after the server's acknowledgement. Raises BusTimeout
        (outcome unknown), StorageFull, PayloadTooLarge, WrongRevision. `shared.outbox` retries until acknowledged."""

    def append_soon(
        self, subject: str, data: bytes, done: Callable[[Appended | BusError], None], *, msg_id: str | None = None
    ) -> bool:
        """`append` without a task, for those who append a lot: `done` is told later what it would have returned or raised. False, and
        nothing is done, if the message cannot be sent at once: `append` says why, or waits until it can."""

    def together(self) -> AbstractContextManager[None]:
        """What is sent within it, without waiting for anything, goes out in one piece at its end: for those who know that they have
        several messages to send."""

    async def read(self, stream: str, seq: int) -> Stored | None: ...

    async def follow(self, stream: str, subject: str, start_seq: int) -> Follower: ...

    async def last_seq(self, stream: str, subject: str) -> int:
        """Sequence of the subject's newest message, 0 if there is none."""

    async def consume(
        self,
        stream: str,
        durable: str,
        subject: str,
        handler: Callable[[Delivery], Awaitable[None]],
        *,
        limit: int,
        ack_wait: float,
    ) -> Consumer:
        """The durable consumer is created if need be and shared by every process that names it. Each delivery's handler runs as a
        task of its own."""

    async def backlog(self, stream: str, durable: str) -> int:
        """Messages of the durable consumer that nobody has taken yet (0 if it does not exist)."""

    async def acked_below(self, stream: str, durable: str) -> int:
        """A sequence below which the durable consumer has nothing left to be acked (1 if it does not exist)."""

    async def trim(self, stream: str, below_seq: int, subject: str = "") -> None:
        """Deletes every message (of the subject, if one is given) with a smaller sequence. `below_seq` is at most one above the
        newest."""

    async def ensure_stream(self, spec: StreamSpec) -> None:
        """Creates the stream, or brings one that exists to the spec. Raises IncompatibleStream."""

    # ------------------------------------------------ key-value

    async def ensure_bucket(self, spec: BucketSpec) -> None: ...

    async def bucket(self, name: str) -> Bucket: ...

    # ------------------------------------------------ life

    def on_reconnect(self, callback: Callable[[], None]) -> None: ...

    def on_closed(self, callback: Callable[[BaseException], None]) -> None:
        """Called when the connection is lost for good (wrong password, a protocol error): the process has to end."""

    async def close(self) -> None:
        """Flushes what was published, unsubscribes, disconnects."""
