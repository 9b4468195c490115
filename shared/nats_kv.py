"""Key-value buckets on JetStream: the stream KV_<bucket>, one message a subject, as nats's own tools lay them out (ADR-8)."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from typing import TYPE_CHECKING

from shared.bus import BusTimeout, Entry, Stored, WrongRevision
from shared.nats_pull import OrderedReader

if TYPE_CHECKING:
    from shared.nats_bus import NatsBus

OPERATION, REASON = "KV-Operation", "Nats-Marker-Reason"
EXPECTED, TTL = "Nats-Expected-Last-Subject-Sequence", "Nats-TTL"
TIMEOUT = 2.0
LIST_TIMEOUT = 30.0
# Seconds for which a deleted key leaves its marker. Watches notice a missing key without it, at their next listing.
MARKER_TTL = 60


def deleted(headers: dict[str, str] | None) -> bool:
    """Whether a message of a bucket means that its key is gone."""
    return headers is not None and (headers.get(OPERATION) in ("DEL", "PURGE") or REASON in headers)


def _parse_headers(block: str) -> dict[str, str]:
    lines = base64.b64decode(block).decode().split("\r\n")[1:]
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines if line)}


class NatsWatch:
    """Tells a handler of each key's newest value; see shared.bus.Bucket.watch."""

    def __init__(
        self, bus: NatsBus, bucket: str, handler: Callable[[Entry], None], ready: Callable[[], None] | None
    ) -> None:
        self._bus = bus
        self._prefix = len(f"$KV.{bucket}.")
        self._handler = handler
        self._ready = ready
        self._known: dict[str, int] = {}  # revision by key
        self._listed: set[str] | None = None  # while a listing is under way
        self._reader = OrderedReader(
            bus, f"KV_{bucket}", f"$KV.{bucket}.>", self._take, last_per_subject=True, begun=self._begun
        )
        self.begin_anew = self._reader.begin_anew

    async def open(self) -> None:
        await self._reader.open()
        self._bus.add_reader(self)

    def _begun(self, pending: int, resumed: bool) -> None:
        if not resumed:
            self._listed = set()
        if pending == 0 and self._listed is not None:
            self._list_ends(0)

    def _take(self, message: Stored, headers: dict[str, str] | None) -> None:
        key = message.subject[self._prefix :]
        if self._listed is not None:
            self._listed.add(key)
        self._tell(Entry(key, None if deleted(headers) else message.data, message.seq))
        if self._listed is not None and message.pending == 0:
            self._list_ends(message.seq)

    def _list_ends(self, revision: int) -> None:
        listed, self._listed = self._listed or set(), None
        for key in [key for key in self._known if key not in listed]:
            self._tell(Entry(key, None, max(revision, self._known[key] + 1)))
        if self._ready is not None:
            ready, self._ready = self._ready, None
            ready()

    def _tell(self, entry: Entry) -> None:
        if self._known.get(entry.key, 0) >= entry.revision:
            return
        if entry.value is None:
            if self._known.pop(entry.key, None) is None:
                return
        else:
            self._known[entry.key] = entry.revision
        self._bus.handle(self._handler, (entry,), entry.key)

    async def unsubscribe(self) -> None:
        await self.close()

    async def close(self) -> None:
        self._bus.remove_reader(self)
        await self._reader.close()


class NatsBucket:
    """shared.bus.Bucket"""

    def __init__(self, bus: NatsBus, name: str) -> None:
        self._bus = bus
        self._name = name

    def _subject(self, key: str) -> str:
        return f"$KV.{self._name}.{key}"

    async def _last(self, key: str) -> tuple[Entry, bool] | None:
        """The key's newest message, and whether it is a marker of its deletion."""
        message = await self._bus.get_message(f"KV_{self._name}", {"last_by_subj": self._subject(key)})
        if message is None:
            return None
        gone = "hdrs" in message and deleted(_parse_headers(message["hdrs"]))
        return Entry(key, base64.b64decode(message.get("data", "")), message["seq"]), gone

    async def get(self, key: str) -> Entry | None:
        last = await self._last(key)
        return None if last is None or last[1] else last[0]

    async def create(self, key: str, value: bytes) -> int:
        try:
            return await self.update(key, value, 0)
        except WrongRevision:
            last = await self._last(key)
            if last is None:
                return await self.update(key, value, 0)
            if not last[1]:
                raise
            return await self.update(key, value, last[0].revision)

    async def update(self, key: str, value: bytes, revision: int, ttl: float | None = None) -> int:
        headers = {EXPECTED: str(revision)} | _lifetime(ttl)
        return (await self._bus.store(self._subject(key), value, headers, TIMEOUT)).seq

    async def put(self, key: str, value: bytes, ttl: float | None = None) -> int:
        return (await self._bus.store(self._subject(key), value, _lifetime(ttl) or None, TIMEOUT)).seq

    async def delete(self, key: str) -> None:
        await self._bus.store(self._subject(key), b"", {OPERATION: "DEL", TTL: f"{MARKER_TTL}s"}, TIMEOUT)

    async def entries(self) -> list[Entry]:
        found: dict[str, Entry] = {}
        listed = asyncio.Event()
        watch = await self.watch(lambda entry: found.update({entry.key: entry}), listed.set)
        try:
            async with asyncio.timeout(LIST_TIMEOUT):
                await listed.wait()
        except TimeoutError:
            raise BusTimeout(f"the bucket {self._name} was not listed in {LIST_TIMEOUT:g} s") from None
        finally:
            await watch.unsubscribe()
        return [entry for entry in found.values() if entry.value is not None]

    async def watch(self, handler: Callable[[Entry], None], ready: Callable[[], None]) -> NatsWatch:
        watch = NatsWatch(self._bus, self._name, handler, ready)
        await watch.open()
        return watch


def _lifetime(ttl: float | None) -> dict[str, str]:
    # The server counts whole seconds, and at least one.
    return {} if ttl is None else {TTL: f"{max(1, round(ttl))}s"}
