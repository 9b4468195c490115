"""What shared.memory_bus connects to: routing, streams, durable consumers and buckets in one process, with seeded faults.

State that a real server keeps on disk (streams, consumers, buckets) outlives `kill` and `restart`; connections do not.
All time is the running loop's, all chance comes from one `random.Random(seed)`: under shared.virtual_time a run repeats exactly.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shared.bus import (
    Appended,
    BucketSpec,
    BusError,
    Entry,
    Message,
    StorageFull,
    Stored,
    StreamSpec,
    WrongRevision,
)

if TYPE_CHECKING:
    from shared.memory_bus import MemoryBus, MemoryConsumer, MemorySubscription

# The servers' clock is not the clients': a loop's time 0 is this many seconds since the epoch.
CLOCK_OFFSET = 1_700_000_000.0


@dataclass(slots=True)
class Faults:
    """Probabilities for each message, and times in seconds. They may be changed while running."""

    drop: float = 0.0  # a core message, an ack or the answer to a read is lost
    duplicate: float = 0.0  # a core message comes twice
    delay: float = 0.0  # a core message is late by up to max_delay, and so overtaken by others
    max_delay: float = 0.2
    lose_append: float = 0.0  # nothing is stored, BusTimeout
    late_append: float = 0.0  # BusTimeout, and stored up to max_delay after that
    lose_ack: float = 0.0  # stored, BusTimeout
    blind: float = 0.0  # a follower that waits for news hears of them late, by up to max_blind: its consumer was lost
    max_blind: float = 6.0
    latency: float = 0.0  # of every hop
    max_reconnect: float = 0.1  # clients come back within this time of a restart


def matches(pattern: str, subject: str) -> bool:
    """Whether a subject matches a pattern with the wildcards `*` (one token) and `>` (the rest)."""
    if pattern == subject:
        return True
    if "*" not in pattern and ">" not in pattern:
        return False
    wanted, tokens = pattern.split("."), subject.split(".")
    for i, token in enumerate(wanted):
        if token == ">":
            return len(tokens) > i
        if i >= len(tokens) or token not in ("*", tokens[i]):
            return False
    return len(wanted) == len(tokens)


class Stream:
    """A stream's messages, in order of sequence."""

    def __init__(self, spec: StreamSpec) -> None:
        self.spec = spec
        self.messages: dict[int, Stored] = {}
        self.last_seq = 0
        self.size = 0
        self.consumers: dict[str, DurableConsumer] = {}
        self._waits: list[tuple[str, asyncio.Future[None]]] = []  # of followers, by what they follow
        self._by_subject: dict[str, list[int]] = {}
        self._seen: dict[str, tuple[int, float]] = {}  # msg_id → seq, time; in order of time

    def append(self, subject: str, data: bytes, now: float, msg_id: str | None, expected: int | None) -> Appended:
        self.expire(now)
        if msg_id is not None and msg_id in self._seen:
            return Appended(self._seen[msg_id][0], True)
        if expected is not None and expected != self.last_of(subject):
            raise WrongRevision(f"{subject}: last sequence is {self.last_of(subject)}, not {expected}")
        if self.spec.max_bytes and self.size + len(data) > self.spec.max_bytes:
            raise StorageFull(f"stream {self.spec.name} is full")
        seq = self.last_seq = self.last_seq + 1
        self.messages[seq] = Stored(seq, subject, data, now + CLOCK_OFFSET)
        self.size += len(data)
        self._by_subject.setdefault(subject, []).append(seq)
        if msg_id is not None:
            self._seen[msg_id] = (seq, now)
        self._wake(subject)
        return Appended(seq, False)

    def wait_for(self, pattern: str, wait: asyncio.Future[None]) -> None:
        """`wait` resolves when a message that matches is appended."""
        self._waits.append((pattern, wait))

    def _wake(self, subject: str) -> None:
        waits, self._waits = self._waits, []
        for pattern, wait in waits:
            if not matches(pattern, subject):
                self._waits.append((pattern, wait))
            elif not wait.done():
                wait.set_result(None)

    def last_of(self, subject: str) -> int:
        seqs = self._by_subject.get(subject)
        return seqs[-1] if seqs else 0

    def _seqs(self, pattern: str) -> Iterator[list[int]]:
        if "*" in pattern or ">" in pattern:
            yield from (seqs for subject, seqs in self._by_subject.items() if matches(pattern, subject))
        elif pattern in self._by_subject:
            yield self._by_subject[pattern]

    def next(self, pattern: str, seq: int) -> Stored | None:
        """The first message that matches, from `seq` on, with the number of those behind it."""
        first, behind = 0, -1
        for seqs in self._seqs(pattern):
            at = bisect_left(seqs, seq)
            behind += len(seqs) - at
            if at < len(seqs) and (not first or seqs[at] < first):
                first = seqs[at]
        if not first:
            return None
        m = self.messages[first]
        return Stored(m.seq, m.subject, m.data, m.stamp, behind)

    def count(self, pattern: str, seq: int) -> int:
        return sum(len(seqs) - bisect_left(seqs, seq) for seqs in self._seqs(pattern))

    def delete(self, seq: int) -> None:
        if (message := self.messages.pop(seq, None)) is not None:
            self.size -= len(message.data)
            seqs = self._by_subject[message.subject]
            del seqs[bisect_left(seqs, seq)]

    def trim(self, below_seq: int, pattern: str = ">") -> None:
        for seqs in list(self._seqs(pattern)):
            for seq in seqs[: bisect_left(seqs, below_seq)]:
                self.delete(seq)

    def expire(self, now: float) -> None:
        """Forgets what is older than the stream's limits."""
        while self._seen:
            msg_id, (_, when) = next(iter(self._seen.items()))
            if when > now - self.spec.duplicate_window:
                break
            del self._seen[msg_id]
        if self.spec.max_age:
            oldest = now + CLOCK_OFFSET - self.spec.max_age
            while self.messages and (first := next(iter(self.messages.values()))).stamp <= oldest:
                self.delete(first.seq)


@dataclass(slots=True)
class Unacked:
    attempt: int
    due: float  # loop time at which it comes again


class DurableConsumer:
    """Hands each message that matches to one of its members; again, if it is not acked in time."""

    def __init__(self, broker: MemoryBroker, stream: Stream, subject: str, ack_wait: float) -> None:
        self.broker = broker
        self.stream = stream
        self.subject = subject
        self.ack_wait = ack_wait
        self.next_seq = 1
        self.unacked: dict[int, Unacked] = {}
        self.again: deque[int] = deque()
        self.members: list[MemoryConsumer] = []

    def dispatch(self) -> None:
        """Delivers while there is a message and a member with room, in turn."""
        loop = asyncio.get_running_loop()
        while self.broker.up and (member := self._free_member()) is not None:
            message = self._take()
            if message is None:
                return
            unacked = self.unacked.setdefault(message.seq, Unacked(0, 0.0))
            unacked.attempt += 1
            self._postpone(message.seq, unacked, loop.time() + self.ack_wait)
            member.deliver(message, unacked.attempt)

    def _free_member(self) -> MemoryConsumer | None:
        for i, member in enumerate(self.members):
            if member.has_room():
                self.members.append(self.members.pop(i))
                return member
        return None

    def _take(self) -> Stored | None:
        while self.again:
            seq = self.again.popleft()
            if seq in self.unacked:
                if (message := self.stream.messages.get(seq)) is not None:
                    return message
                del self.unacked[seq]  # trimmed or expired
        message = self.stream.next(self.subject, self.next_seq)
        if message is not None:
            self.next_seq = message.seq + 1
        return message

    def _postpone(self, seq: int, unacked: Unacked, due: float) -> None:
        unacked.due = due
        asyncio.get_running_loop().call_at(due, self._redeliver, seq, due, context=self.broker.context)

    def _redeliver(self, seq: int, due: float) -> None:
        unacked = self.unacked.get(seq)
        if unacked is not None and unacked.due == due and self.broker.up:
            self.again.append(seq)
            self.dispatch()

    def after_restart(self) -> None:
        now = asyncio.get_running_loop().time()
        self.again.extend(seq for seq, unacked in self.unacked.items() if unacked.due <= now and seq not in self.again)

    def ack(self, seq: int) -> None:
        if self.unacked.pop(seq, None) is not None and self.stream.spec.work_queue:
            self.stream.delete(seq)

    def nak(self, seq: int, delay: float) -> None:
        if (unacked := self.unacked.get(seq)) is not None:
            self._postpone(seq, unacked, asyncio.get_running_loop().time() + delay)

    def in_progress(self, seq: int) -> None:
        if (unacked := self.unacked.get(seq)) is not None:
            self._postpone(seq, unacked, asyncio.get_running_loop().time() + self.ack_wait)


@dataclass(slots=True)
class BucketState:
    spec: BucketSpec
    values: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    expiry: dict[str, float] = field(default_factory=dict)
    revision: int = 0
    watchers: list[Callable[[Entry], None]] = field(default_factory=list)

    def set(self, key: str, value: bytes, revision: int | None) -> int:
        """`revision`: None for whatever, 0 for a new key."""
        present = self.values[key][1] if key in self.values else 0
        if revision is not None and revision != present:
            raise WrongRevision(f"{self.spec.name}/{key}: revision is {present}, not {revision}")
        self.revision += 1
        self.values[key] = (value, self.revision)
        self.expiry.pop(key, None)
        self._tell(Entry(key, value, self.revision))
        return self.revision

    def delete(self, key: str) -> None:
        if self.values.pop(key, None) is not None:
            self.expiry.pop(key, None)
            self.revision += 1
            self._tell(Entry(key, None, self.revision))

    def _tell(self, entry: Entry) -> None:
        for watcher in self.watchers:
            watcher(entry)

    def expire_at(self, key: str, when: float) -> None:
        self.expiry[key] = when

    def expire(self, now: float) -> None:
        for key in [key for key, when in self.expiry.items() if when <= now]:
            self.delete(key)


class MemoryBroker:
    """The server. `kill` and `restart` it, `disconnect` and `reconnect` a client; connect with `MemoryBus(broker)`."""

    def __init__(self, seed: int = 0, faults: Faults | None = None) -> None:
        self.random = random.Random(seed)
        self.faults = faults or Faults()
        self.up = True
        self.disk_full = False
        self.streams: dict[str, Stream] = {}
        self.buckets: dict[str, BucketState] = {}
        self.clients: list[MemoryBus] = []
        self.inboxes: dict[str, asyncio.Future[Message]] = {}
        self._ids = itertools.count(1)
        self._numbers = itertools.count()  # of subscriptions
        self.context = copy_context()  # of what the broker does by itself, whoever caused it
        # By pattern: those without wildcards, found by the subject alone, and the others.
        self._exact: dict[str, dict[MemorySubscription, int]] = {}
        self._wildcards: dict[str, dict[MemorySubscription, int]] = {}

    # ------------------------------------------------ faults

    def kill(self) -> None:
        """kill -9: every connection is lost, what is on disk stays."""
        self.up = False
        for client in list(self.clients):
            client.lose_connection()

    def restart(self) -> None:
        """Starts again on the same disk; clients reconnect one by one, within faults.max_reconnect."""
        self.up = True
        now = asyncio.get_running_loop().time()
        for stream in self.streams.values():
            stream.expire(now)
            for consumer in stream.consumers.values():
                consumer.after_restart()
        for bucket in self.buckets.values():
            bucket.expire(now)
        for client in list(self.clients):
            if not client.partitioned:
                client.reconnect_after(self.random.random() * self.faults.max_reconnect)

    def disconnect(self, client: MemoryBus) -> None:
        """Cuts one client off until `reconnect`."""
        client.partitioned = True
        client.lose_connection()

    def reconnect(self, client: MemoryBus) -> None:
        client.partitioned = False
        client.reconnect_after(0.0)

    def chance(self, probability: float) -> bool:
        return probability > 0 and self.random.random() < probability

    # ------------------------------------------------ core

    def new_id(self) -> int:
        return next(self._ids)

    def add(self, subscription: MemorySubscription) -> None:
        self._like(subscription.subject).setdefault(subscription.subject, {})[subscription] = next(self._numbers)

    def remove(self, subscription: MemorySubscription) -> None:
        patterns = self._like(subscription.subject)
        same = patterns.get(subscription.subject, {})
        if same.pop(subscription, None) is not None and not same:
            del patterns[subscription.subject]

    def _like(self, pattern: str) -> dict[str, dict[MemorySubscription, int]]:
        return self._wildcards if "*" in pattern or ">" in pattern else self._exact

    def _route(self, subject: str) -> tuple[list[MemorySubscription], list[list[MemorySubscription]]]:
        """Who a message goes to, in the order of subscription: (each of these, one of each of these)."""
        found = dict(self._exact.get(subject, ()))
        for pattern, same in self._wildcards.items():
            if matches(pattern, subject):
                found |= same
        plain: list[MemorySubscription] = []
        groups: dict[tuple[str, str], list[MemorySubscription]] = {}
        for subscription in sorted(found, key=found.__getitem__):
            if subscription.queue:
                groups.setdefault((subscription.subject, subscription.queue), []).append(subscription)
            else:
                plain.append(subscription)
        return plain, list(groups.values())

    def route(self, message: Message) -> int:
        """Sends a message on its way; returns how many it goes to."""
        if (inbox := self.inboxes.get(message.subject)) is not None:
            self._carry(lambda: None if inbox.done() else inbox.set_result(message), self.context)
            return 1
        plain, groups = self._route(message.subject)
        targets = [s for s in plain if s.bus.connected]
        for group in groups:
            if members := [s for s in group if s.bus.connected]:
                targets.append(members[0] if len(members) == 1 else self.random.choice(members))
        for target in targets:
            self._carry(target.carrier(message), target.bus.context)
        return len(targets)

    def _carry(self, arrive: Callable[[], None], context: Context) -> None:
        faults = self.faults
        if self.chance(faults.drop):
            return
        self.hop(arrive, context, self.random.random() * faults.max_delay if self.chance(faults.delay) else 0.0)
        if self.chance(faults.duplicate):
            self.hop(arrive, context, self.random.random() * faults.max_delay)

    def hop(self, arrive: Callable[[], None], context: Context, delay: float = 0.0) -> None:
        """Calls `arrive` after the latency, in the receiver's context. Hops without extra delay arrive in the order in which they were
        sent."""
        loop = asyncio.get_running_loop()
        delay += self.faults.latency
        if delay > 0:
            loop.call_later(delay, arrive, context=context)
        else:
            loop.call_soon(arrive, context=context)

    # ------------------------------------------------ streams and buckets

    def ensure_stream(self, spec: StreamSpec) -> None:
        stream = self.streams.get(spec.name)
        if stream is None:
            self.streams[spec.name] = Stream(spec)
            return
        spec.check_metadata(stream.spec.metadata)
        stream.spec = spec

    def stream(self, name: str) -> Stream:
        stream = self.streams.get(name)
        if stream is None:
            raise BusError(f"no stream {name}")
        stream.expire(asyncio.get_running_loop().time())
        return stream

    def check_disk(self) -> None:
        if self.disk_full:
            raise StorageFull("the disk is full")

    def append(self, subject: str, data: bytes, msg_id: str | None, expected: int | None) -> Appended:
        for stream in self.streams.values():
            if matches(stream.spec.subject, subject):
                break
        else:
            raise BusError(f"no stream takes {subject}")
        self.check_disk()
        appended = stream.append(subject, data, asyncio.get_running_loop().time(), msg_id, expected)
        for consumer in stream.consumers.values():
            if matches(consumer.subject, subject):
                consumer.dispatch()
        return appended

    def bucket(self, name: str) -> BucketState:
        state = self.buckets.get(name)
        if state is None:
            raise BusError(f"no bucket {name}")
        state.expire(asyncio.get_running_loop().time())
        return state

    def put_with_ttl(
        self, bucket: BucketState, key: str, value: bytes, ttl: float | None, present: int | None = None
    ) -> int:
        revision = bucket.set(key, value, present)
        if ttl is not None:
            loop = asyncio.get_running_loop()
            bucket.expire_at(key, loop.time() + ttl)
            # While the broker is down nothing expires: `restart` makes up for it.
            loop.call_later(ttl, lambda: bucket.expire(loop.time()) if self.up else None, context=self.context)
        return revision
