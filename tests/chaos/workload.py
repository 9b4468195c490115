"""Streams of mixed kinds against a deployment, each recorded as its client sees it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack

from shared import subjects
from shared.bus import Bus, BusError, Message
from shared.client import Client
from shared.client_stream import Cursor, Delta, Stream
from shared.errors import GorgonError
from tests.chaos.checker import TERMINAL, Record

Body = dict[str, Any]
KINDS = {"plain": 8, "cancelled": 3, "deadline": 2, "durable": 3, "attached": 3}
DEADLINES = (0.2, 3.0)  # seconds


class RecordingClient(Client):
    """Keeps the events of each request as they came, each with the time at which it was `heard`; duplicates and what comes after its
    end included."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.events: dict[str, list[dict[str, Any]]] = {}

    def _on_message(self, message: Message) -> None:
        if message.data:
            decoded = msgpack.unpackb(message.data)
            for event in decoded if isinstance(decoded, list) else [decoded]:
                if event.get("id") is not None:
                    event["heard"] = round(self.loop.time(), 3)
                    self.events.setdefault(event["id"], []).append(event)
        super()._on_message(message)


class ReplaylessClient(RecordingClient):
    """Negative control: never asks for what it missed."""

    def ask_replay(self, stream: Stream) -> None:
        pass


class Results:
    """Follows all of RESULTS: the events of durable requests as they are stored."""

    def __init__(self, bus: Bus) -> None:
        self.events: dict[str, list[dict[str, Any]]] = {}
        self._bus = bus
        self._ended: dict[str, asyncio.Event] = {}

    async def follow(self) -> None:
        follower = await self._bus.follow(subjects.STREAM_RESULTS, f"{subjects.ROOT}.results.>", 1)
        try:
            async for stored in follower:
                event = json.loads(stored.data)
                self.events.setdefault(event["id"], []).append(event)
                if event["event"] in TERMINAL:
                    self._ending(event["id"]).set()
        finally:
            await follower.close()

    async def until_ended(self, request_id: str) -> list[dict[str, Any]]:
        await self._ending(request_id).wait()
        return self.events[request_id]

    def _ending(self, request_id: str) -> asyncio.Event:
        return self._ended.setdefault(request_id, asyncio.Event())


@dataclass
class Workload:
    """Two clients on connections of their own, and a reader of RESULTS. `limit`: seconds that a stream may take in all."""

    bus: Bus
    clients: Sequence[RecordingClient]
    requests: Mapping[str, Body]
    limit: float
    kinds: Mapping[str, int] = field(default_factory=lambda: KINDS)
    records: list[Record] = field(default_factory=list)
    ended: int = 0

    def __post_init__(self) -> None:
        self.results = Results(self.bus)

    async def keep_running(self, seed: int, streams: int, over: Callable[[], bool]) -> None:
        """`streams` at a time, until all is over and the last ones have ended."""

        async def slot(number: int) -> None:
            draw = random.Random(f"{seed}.{number}")
            count = 0
            while not over():
                (kind,) = draw.choices(list(self.kinds), list(self.kinds.values()))
                record = Record(f"s{number}-{count}", kind, draw.choice(list(self.requests)))
                await self.run(record, draw)
                self.ended += 1
                count += 1

        following = asyncio.create_task(self.results.follow())
        try:
            await asyncio.gather(*(slot(number) for number in range(streams)))
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        for record in self.records:  # what came after the end counts, too
            if record.kind == "durable":
                record.events = self.results.events.get(record.id, [])
            else:
                record.events = [event for client in self.clients for event in client.events.get(record.id, ())]

    async def run(self, record: Record, draw: random.Random) -> None:
        """One stream, from the request to its end."""
        self.records.append(record)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.limit):
                match record.kind:
                    case "plain":
                        await self._plain(record, draw)
                    case "cancelled":
                        await self._cancelled(record, draw)
                    case "deadline":
                        await self._deadline(record, draw)
                    case "attached":
                        await self._attached(record, draw)
                    case "durable":
                        await self._durable(record)

    async def references(self, names: Iterable[str]) -> dict[str, Record]:
        """The uninterrupted runs of requests, in a deployment that nobody disturbs."""
        records = [Record(f"reference-{name}", "plain", name) for name in names]
        async with asyncio.timeout(self.limit):
            await asyncio.gather(*(self._plain(record, random.Random(0)) for record in records))
        for record in records:
            assert record.end == "finished", (record.request, record.end)
        return {record.request: record for record in records}

    # ------------------------------------------------ kinds

    async def _plain(self, record: Record, draw: random.Random) -> None:
        stream = draw.choice(self.clients).generate(id=record.id, **self.requests[record.request])
        await self._read(record, stream)

    async def _deadline(self, record: Record, draw: random.Random) -> None:
        body = self.requests[record.request] | {"deadline": draw.uniform(*DEADLINES)}
        await self._read(record, draw.choice(self.clients).generate(id=record.id, **body))

    async def _cancelled(self, record: Record, draw: random.Random) -> None:
        """By the client, after some tokens; sometimes before it can know that the request was accepted."""
        stream = draw.choice(self.clients).generate(id=record.id, **self.requests[record.request])
        after = draw.choice((0, 1, 5, 20, 50))
        cancelling = asyncio.create_task(stream.cancel()) if after == 0 else None
        try:
            async for _ in self._deltas(record, stream):
                if cancelling is None and sum(map(len, record.ids.values())) >= after:
                    cancelling = asyncio.create_task(stream.cancel())
            await self._end(record, stream)
        finally:
            if cancelling is not None:
                cancelling.cancel()

    async def _attached(self, record: Record, draw: random.Random) -> None:
        """The client goes away in the middle; another one goes on from where it was."""
        first, second = draw.sample(list(self.clients), 2)
        stream = first.generate(id=record.id, **self.requests[record.request])
        after = draw.choice((1, 10, 40))
        async for _ in self._deltas(record, stream):
            if sum(map(len, record.ids.values())) >= after:
                break
        if not stream.done:
            first.forget(stream)
            known = [Cursor(choice, len(ids), len(record.text[choice])) for choice, ids in record.ids.items()]
            stream = second.attach(record.id, known)
        await self._read(record, stream)

    async def _durable(self, record: Record) -> None:
        body = {"id": record.id} | self.requests[record.request]
        model = self.clients[0].model
        while True:
            try:
                await self.bus.append(subjects.jobs(model), json.dumps(body).encode(), msg_id=record.id)
                break
            except BusError:
                await asyncio.sleep(0.1)
        events = await self.results.until_ended(record.id)
        for event in events:
            if event["event"] == "tokens":
                record.ids.setdefault(event["choice"], []).extend(event["ids"])
                record.text[event["choice"]] = record.text.get(event["choice"], "") + event["text"]
            elif event["event"] == "finished":
                record.finishes = {c["choice"]: (c["finish_reason"], c["stop"]) for c in event["choices"]}
                record.completion_tokens = event["usage"]["completion_tokens"]
            if event["event"] in TERMINAL:
                record.end = event.get("code", event["event"])

    # ------------------------------------------------ reading

    async def _read(self, record: Record, stream: Stream) -> None:
        async for _ in self._deltas(record, stream):
            pass
        await self._end(record, stream)

    async def _deltas(self, record: Record, stream: Stream) -> AsyncIterator[Delta]:
        """Yields after each delta that `record` has taken in. An error is left for `_end`."""
        loop = asyncio.get_running_loop()
        last: float | None = None
        try:
            async for delta in stream:
                now = loop.time()
                record.longest_gap = max(record.longest_gap, now - last if last is not None else 0.0)
                last = now
                ids = record.ids.setdefault(delta.choice, [])
                text = record.text.get(delta.choice, "")
                if (delta.position, delta.offset) != (len(ids), len(text)):
                    raise AssertionError(f"{record.id}: {delta} after {len(ids)} ids and {len(text)} characters")
                ids.extend(delta.ids)
                record.text[delta.choice] = text + delta.text
                yield delta
        except GorgonError:
            return

    async def _end(self, record: Record, stream: Stream) -> None:
        try:
            result = await stream.result()
        except GorgonError as error:
            record.end = str(error.code)
            return
        record.end = result.status
        record.completion_tokens = result.usage["completion_tokens"]
        if result.status == "finished":
            record.finishes = {index: (c.finish_reason, c.stop) for index, c in enumerate(result.choices)}
