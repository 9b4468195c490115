"""One owned partition: follows its log from the last snapshot on, serves its clients and schedulers, and settles what has ended."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import structlog

from services.detokenizer import parts
from services.detokenizer.answer import Answer
from services.detokenizer.client_probe import ClientProbe
from services.detokenizer.core import PartitionCore
from services.detokenizer.decoding import NewDecoding
from services.detokenizer.queries import Replay, parse_replay, prefix_reply
from services.detokenizer.recorder import Recorder
from services.detokenizer.results import ResultsWriter
from services.detokenizer.settings import DetokenizerSettings
from services.detokenizer.snapshot import Snapshot, pack_answer, unpack, unpack_answer
from shared import codec, subjects
from shared.api import encode_event, encoding_of, error_event
from shared.bus import Bucket, Bus, BusError, Follower, Message, PayloadTooLarge, Stored, Subscription, WrongRevision
from shared.errors import ErrorCode, GorgonError
from shared.messages import (
    Assignment,
    Attach,
    End,
    Failure,
    LogEntry,
    Open,
    PrefixQuery,
    PrefixReply,
    ReplyTo,
    StepTokens,
    Tombstone,
)
from shared.micro import Endpoint
from shared.retry import until_done

log = structlog.get_logger()

Spawn = Callable[[Coroutine[Any, Any, None], str], "asyncio.Task[None]"]

PREFIX_HELD = 1.0  # how long the question for a prefix waits for its fence, seconds
BEHIND = 0.01  # while there is a backlog, events are sent this often, seconds
# Bytes a second of snapshots of all partitions, about, and the longest pause between two of one: they keep streams waiting, here and in
# the server. A new owner must fold what came since the last one: a second of work for three at 40,000 tokens a second.
SNAPSHOT_RATE, LONGEST_PAUSE = 2**20, 3.0
REDELIVERY = 120.0  # a tombstone outlives the attach window by this, so that a redelivered REQ still finds it
# An ended request is known here for longer than its tombstone lives, which is written a little later: as long as there is one,
# whoever sends the request again is attached to it, and must be told something.
FORGOTTEN_AFTER = REDELIVERY + 10.0
END_LOST = Failure("internal", "how the request ended is no longer in the log")
EVENTS_PER_MESSAGE = 256
CATCH_UP = 1.0  # seconds within which what is at the log's end must come, or it is looked at again
LOOK_PAUSE = 0.05  # seconds between two looks: thousands of clients whose requests are queued ask every few seconds


def snapshot_pause(size: int, settings: DetokenizerSettings) -> float:
    """Seconds until a partition's next snapshot, the last one having had `size` bytes."""
    return max(settings.snapshot_interval, min(size * settings.partitions / SNAPSHOT_RATE, LONGEST_PAUSE))


class Partition:
    """See the module docstring. `run` is the follower's task; whatever else runs for the partition ends with `close`."""

    def __init__(
        self,
        bus: Bus,
        settings: DetokenizerSettings,
        number: int,
        new_decoding: NewDecoding,
        spawn: Spawn,
        recorder: Recorder,
    ) -> None:
        self.number = number
        self._recorder = recorder
        self.core = PartitionCore(new_decoding)
        self.serving = False
        self.backlog = 0
        self._bus = bus
        self._settings = settings
        self._new_decoding = new_decoding
        self._log = log.bind(partition=number)
        self._spawn_task = spawn
        self._tasks: set[asyncio.Task[None]] = set()
        self._subscriptions: list[Subscription] = []
        self._subject = subjects.tok(settings.model, number)
        self._snapshots: Bucket
        self._assignments: Bucket
        self._saved_seq = 0
        self._saved_bytes = 0
        self._log_was_trimmed = False  # further than the snapshot that this began with: entries may be missing
        self._delivered_at = 0.0
        self._writers: dict[str, ResultsWriter] = {}
        self._settling: set[str] = set()
        self._held: dict[str, list[tuple[PrefixQuery, str]]] = {}  # questions for a prefix that wait for their fence
        self._clients = ClientProbe(bus, settings.vanished_after)
        self._unknown: dict[tuple[str, str], Replay] = {}  # questions for what is not known here, by key and asker
        self._doubt = asyncio.Event()  # there are such questions
        self._progress = asyncio.Event()  # something was folded

    # ------------------------------------------------ life

    def start(self) -> None:
        self._spawn(self._run(), "follow")

    async def close(self) -> None:
        """Lets go; the state as it is goes into a last snapshot, so that the next owner need not replay much."""
        was_serving, self.serving = self.serving, False
        self.core.recorder = None
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        while self._subscriptions:  # each holds this partition by its handler
            with contextlib.suppress(BusError):
                await self._subscriptions.pop().unsubscribe()
        if was_serving:
            with contextlib.suppress(BusError):
                await self._save()

    def _spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        task = self._spawn_task(coroutine, f"{name}.{self.number}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self) -> None:
        follower = await until_done("load", self._subject, self._load)
        try:
            target = await until_done(
                "last_seq", self._subject, lambda: self._bus.last_seq(subjects.STREAM_TOK, self._subject)
            )
            if self.core.seq >= target:
                await self._serve()
            async for stored in follower:
                self.fold(stored)
                self._progress.set()
                if self.serving:
                    await self._deliver_in_time(stored)
                elif stored.seq >= target:
                    await self._serve()
        finally:
            await follower.close()

    async def _load(self) -> Follower:
        self._snapshots = await self._bus.bucket(subjects.BUCKET_SNAPSHOT)
        self._assignments = await self._bus.bucket(subjects.BUCKET_ASSIGN)
        snapshot = None
        try:
            data = await parts.get(self._snapshots, subjects.snapshot_key(self._settings.model, self.number))
            if data is not None:
                snapshot = unpack(data, self._new_decoding)
        except ValueError as error:
            self._log.error("snapshot_unreadable", error=str(error))
        if snapshot is not None and not await self._is_of_this_stream(snapshot):
            self._log.error("snapshot_ahead_of_stream", seq=snapshot.seq)
            snapshot = None
        self.core = PartitionCore(self._new_decoding, snapshot)
        self._saved_seq = self.core.seq
        return await self._bus.follow(subjects.STREAM_TOK, self._subject, self.core.seq + 1)

    async def _is_of_this_stream(self, snapshot: Snapshot) -> bool:
        """Whether the snapshot was made from the stream as it is now, not from one that was lost with its disk."""
        stored = await self._bus.read(subjects.STREAM_TOK, snapshot.seq)
        if stored is not None:
            return stored.subject == self._subject and stored.stamp <= snapshot.stamp + 0.001
        # It has been trimmed since, or it was not reached yet: then the place of a new (empty) entry tells.
        newest = await self._bus.last_seq(subjects.STREAM_TOK, self._subject)
        if newest <= snapshot.seq:
            newest = (await self._bus.append(self._subject, codec.encode(StepTokens("", 0, ())))).seq
        self._log_was_trimmed = newest > snapshot.seq
        return self._log_was_trimmed

    async def _serve(self) -> None:
        self.core.drop_stale()
        model = self._settings.model
        replay = subjects.replay(model, self.number)
        await self._listen(replay, self._on_replay, self._recorder.replays)
        await self._listen(subjects.of_tenant(replay), self._on_replay, self._recorder.replays)
        await self._listen(subjects.attach(model, self.number), self._on_attach, self._recorder.attaches)
        await self._listen(subjects.prefix(model, self.number), self._on_prefix_query, self._recorder.prefixes)
        self.serving = True
        self.core.tokens, self.core.recorder = 0, self._recorder
        self._spawn(self._save_forever(), "snapshots")
        self._spawn(self._prune_forever(), "prune")
        self._spawn(self._answer_unknown_forever(), "unknown")
        if self._settings.vanished_after:
            self._spawn(self._clients.probe_forever(self.core, self._spawn, self._cancel_vanished), "probe")
        self._log.info("serving", seq=self.core.seq, requests=len(self.core.answers))
        if self._log_was_trimmed and (live := [a for a in self.core.answers.values() if not a.ended]):
            self._spawn(self._end_what_has_ended(live), "look")
        self.deliver()

    async def _end_what_has_ended(self, live: list[Answer]) -> None:
        """The log may lack the end of what the snapshot holds: whose tombstone is there, or is gone again, has ended. What lacks tokens
        only is generated again from where it stands here, as its worker reports it no more."""
        self._log.error("snapshot_older_than_the_log", live=len(live))
        for answer in live:
            key = answer.state.key
            entry = await until_done("assign", key, lambda key=key: self._assignments.get(key))  # type: ignore[misc]
            known = codec.decode(entry.value) if entry is not None and entry.value is not None else None
            if not answer.ended and not (isinstance(known, Assignment) and known.req_seq == answer.opened.req_seq):
                self._log.error("end_lost", request_id=key)
                self._append(End(key, "error", failure=END_LOST))

    async def _listen(self, subject: str, handler: Callable[[Message], str | None], endpoint: Endpoint) -> None:
        counting = endpoint.counting(handler)
        self._subscriptions.append(
            await until_done("subscribe", subject, lambda: self._bus.subscribe(subject, counting))
        )

    # ------------------------------------------------ folding and delivery

    def fold(self, stored: Stored) -> None:
        self.backlog = stored.pending
        try:
            entry = codec.decode(stored.data)
        except codec.CodecError as error:
            self._log.error("entry_unreadable", seq=stored.seq, error=str(error))
            self.core.skip(stored.seq, stored.stamp)
            return
        if not isinstance(entry, LogEntry):
            self._log.error("entry_unreadable", seq=stored.seq, error=f"{type(entry).__name__} does not belong here")
            self.core.skip(stored.seq, stored.stamp)
            return
        if isinstance(entry, Open) and self.core.make_way(entry, stored.stamp - self._settings.attach_window):
            self._settling.discard(entry.key)
        self.core.apply(stored.seq, stored.stamp, entry)

    async def _deliver_in_time(self, stored: Stored) -> None:
        """At once when there is no backlog; else now and then, so that events of several steps share a message."""
        now = asyncio.get_running_loop().time()
        if stored.pending == 0:
            self.deliver()
        elif now - self._delivered_at >= BEHIND:
            self.deliver()
            await asyncio.sleep(0)  # a follower with a backlog does not wait, so nobody else would run
        else:
            return
        self._delivered_at = now

    def deliver(self) -> None:
        batches: dict[str, tuple[ReplyTo, list[dict[str, Any]]]] = {}
        for answer in self.core.take_dirty():
            reply = answer.state.reply
            if reply is not None and reply.subject and (events := answer.unsent()):
                if not reply.batched:
                    self._publish(reply, events)
                elif (batch := batches.get(reply.subject)) is not None:
                    batch[1].extend(events)
                else:
                    batches[reply.subject] = (reply, events)
            if answer.ended or answer.opened.stop or answer.opened.durable or answer.broken:
                self._follow_up(answer)
        for reply, events in batches.values():
            self._publish(reply, events)
        self._answer_held()
        for key, reply in self.core.recalled:
            self._spawn(
                self._answer_from_archive(Replay(key, subjects.split_request_key(key)[1], {}, False, reply)), "archive"
            )
        self.core.recalled.clear()

    def _follow_up(self, answer: Answer) -> None:
        """What an answer's news mean beside its events."""
        key = answer.state.key
        if answer.ended:
            if key not in self._settling:
                self._settling.add(key)
                self._spawn(self._settle(answer), "settle")
        elif (failure := answer.undeclared_failure()) is not None:
            self._append(End(key, "error", failure=failure))
        else:
            for choice, stop, length in answer.undeclared_stops():
                self._append(End(key, "stop", choice, length, stop=stop))
        if answer.opened.durable:
            self._writer(answer).news.set()

    def _publish(self, reply: ReplyTo, events: list[dict[str, Any]]) -> None:
        messages: Iterable[Any] = events
        if reply.batched:
            messages = [events[i : i + EVENTS_PER_MESSAGE] for i in range(0, len(events), EVENTS_PER_MESSAGE)]
        for message in messages:
            try:
                self._bus.publish(reply.subject, encode_event(message, reply.encoding))
            except PayloadTooLarge as error:
                self._publish_smaller(reply, message if reply.batched else [message], error)

    def _publish_smaller(self, reply: ReplyTo, events: list[dict[str, Any]], error: PayloadTooLarge) -> None:
        if len(events) > 1:
            for event in events:
                self._publish(reply, [event])
            return
        request_id = events[0]["id"]
        self._log.warning("answer_too_large", request_id=request_id, error=str(error))
        text = "the answer does not fit into a message; ask for a replay with stream"
        self._publish(reply, [error_event(request_id, GorgonError(ErrorCode.PAYLOAD_TOO_LARGE, text))])

    def _append(self, entry: LogEntry) -> None:
        """Into the partition's log, repeated until it is there: a second time does no harm to the entries written here."""
        data, key = codec.encode(entry), getattr(entry, "key", "")

        async def append() -> None:
            await until_done(type(entry).__name__, key, lambda: self._bus.append(self._subject, data))

        self._spawn(append(), "append")

    # ------------------------------------------------ the end of a request

    def _writer(self, answer: Answer) -> ResultsWriter:
        writer = self._writers.get(answer.state.key)
        if writer is None:
            writer = ResultsWriter(self._bus, answer, self._settings.durable_tokens, self._settings.durable_delay)
            self._writers[answer.state.key] = writer
            self._spawn(writer.run(), "results")
        return writer

    async def _settle(self, answer: Answer) -> None:
        """Tombstone, results, archive, in this order: schedulers wait for the first. Each may be done twice."""
        key = answer.state.key
        if key not in self.core.settled:
            await until_done("tombstone", key, lambda: self._bury(answer))
            self.core.settled.add(key)
        if answer.opened.durable:
            await self._writer(answer).finished.wait()
            del self._writers[key]
        window = self._settings.attach_window + REDELIVERY
        archive_key = subjects.archive_key(self._settings.model, key)
        data = pack_answer(answer)
        try:
            await until_done("archive", key, lambda: parts.put(self._snapshots, archive_key, data, window))
        except PayloadTooLarge as error:  # of a server that takes less than a part
            self._log.warning("archive_too_large", request_id=key, error=str(error))  # it stays in memory until pruned
            return
        self.core.archive(answer)
        self._settling.discard(key)
        self._clients.forget(key)

    async def _bury(self, answer: Answer) -> None:
        state, terminal = answer.state, answer.state.terminal
        assert terminal is not None
        opened = answer.opened
        # Of a job it is kept as long as the results, so that these are never taken for those of another job with the same id.
        kept = self._settings.results_max_age if opened.durable else self._settings.attach_window

        def tombstone(body_hash: bytes) -> bytes:
            return codec.encode(
                Tombstone(opened.req_seq, state.epoch, terminal.reason, body_hash, answer.completion_tokens)
            )

        if opened.revision and state.epoch == 1:
            try:
                value = tombstone(opened.body_hash)
                await self._assignments.update(state.key, value, opened.revision, kept + REDELIVERY)
                self._recorder.ended(answer)
                return
            except WrongRevision:
                pass  # a migration has begun, or this has been done before
        entry = await self._assignments.get(state.key)
        body_hash = b""
        if entry is not None and entry.value is not None:
            known = codec.decode(entry.value)
            if isinstance(known, Tombstone):
                return
            if isinstance(known, Assignment):
                if known.req_seq != answer.opened.req_seq:
                    return  # a later request has the id
                body_hash = known.body_hash
        await self._assignments.put(state.key, tombstone(body_hash), kept + REDELIVERY)
        self._recorder.ended(answer)

    async def _cancel_vanished(self, answer: Answer, reply: ReplyTo) -> None:
        await self._catch_up()  # it may listen elsewhere since
        if answer.ended or answer.state.reply != reply:
            return
        self._log.info("client_vanished", request_id=answer.state.key)
        self._recorder.vanished()
        self._append(End(answer.state.key, "cancelled"))

    async def _prune_forever(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            self.core.prune(self._settings.attach_window + FORGOTTEN_AFTER)
            self._settling &= self.core.answers.keys()

    # ------------------------------------------------ questions

    def _on_replay(self, message: Message) -> str | None:
        if not message.reply:
            return None
        try:
            tenant = subjects.tenant_of(message.subject, subjects.replay(self._settings.model, self.number))
            asked = parse_replay(message.data, message.reply, tenant)
        except GorgonError as error:
            self._publish(ReplyTo(message.reply, encoding_of(message.data)), [error_event(None, error)])
            return f"{error.code}:{error.message}"
        if self._answer(asked):
            return None
        self._unknown[asked.key, asked.reply.subject] = asked
        self._doubt.set()
        return f"{ErrorCode.NOT_FOUND}:{asked.key}"

    def _answer(self, asked: Replay) -> bool:
        """False: such a request is not known here."""
        answer = self.core.answers.get(asked.key)
        if answer is not None:
            self._answer_replay(asked, answer)
        elif asked.key in self.core.archived:
            self._spawn(self._answer_from_archive(asked), "archive")
        else:
            return False
        return True

    async def _answer_unknown_forever(self) -> None:
        """Nothing is denied before everything is folded that was in the log when the question came: an owner that stood still, or whose
        follower was cut off, would else deny what runs, and its client believe it. (What Raft calls a read index.)"""
        while True:
            await self._doubt.wait()
            self._doubt.clear()
            asked, self._unknown = self._unknown, {}
            await self._catch_up()
            for question in asked.values():
                try:
                    if not self._answer(question):
                        self._publish_not_found(question)
                except Exception as error:  # the others' come next
                    self._log.error("replay_failed", request_id=question.key, exc_info=error)
            await asyncio.sleep(LOOK_PAUSE)

    async def _catch_up(self) -> None:
        """Until all is folded that is in the log now."""
        while True:
            last = await until_done(
                "last_seq", self._subject, lambda: self._bus.last_seq(subjects.STREAM_TOK, self._subject)
            )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CATCH_UP):  # what was trimmed meanwhile never comes: then look again
                    while self.core.seq < last:
                        self._progress.clear()
                        await self._progress.wait()
                    return

    def _answer_replay(self, asked: Replay, answer: Answer) -> None:
        self._clients.forget(asked.key)  # whoever asks is there
        self.deliver()  # so that what goes to the old reply subject is not behind this answer
        self._publish(asked.reply, answer.replay(asked.cursors, asked.reply.stream))
        if asked.attach and not answer.ended and answer.state.reply != asked.reply:
            self.core.expect_attach(answer, asked.reply, asked.cursors)
            self._append(Attach(asked.key, asked.reply))

    async def _answer_from_archive(self, asked: Replay) -> None:
        try:
            data = await parts.get(self._snapshots, subjects.archive_key(self._settings.model, asked.key))
            answer = None if data is None else unpack_answer(data, self._new_decoding)
        except BusError as error:
            self._log.warning("archive_unreachable", request_id=asked.key, error=repr(error))
            return  # the asker asks again
        except ValueError as error:
            self._log.error("archive_unreadable", request_id=asked.key, error=str(error))
            answer = None
        if answer is None:
            self._publish_not_found(asked)
        else:
            self._publish(asked.reply, answer.replay(asked.cursors, asked.reply.stream))

    def _on_attach(self, message: Message) -> str | None:
        """A tokenizer has a request again that was accepted before."""
        try:
            entry = codec.decode_as(Attach, message.data)
        except codec.CodecError as error:
            self._log.error("attach_unreadable", error=str(error))
            return f"{ErrorCode.INTERNAL}:{error}"
        data = codec.encode(entry)

        async def write() -> None:
            await until_done("Attach", entry.key, lambda: self._bus.append(self._subject, data))
            self._bus.publish(message.reply, b"+OK")

        self._spawn(write(), "attach")
        return None

    def _publish_not_found(self, asked: Replay) -> None:
        text = "no such request here: not started yet, or ended too long ago"
        self._publish(asked.reply, [error_event(asked.id, GorgonError(ErrorCode.NOT_FOUND, text))])

    def _on_prefix_query(self, message: Message) -> str | None:
        try:
            query = codec.decode_as(PrefixQuery, message.data)
        except codec.CodecError as error:
            self._log.error("prefix_query_unreadable", error=str(error))
            return f"{ErrorCode.INTERNAL}:{error}"
        if not self._answer_prefix(query, message.reply):
            held = (query, message.reply)
            self._held.setdefault(query.key, []).append(held)
            asyncio.get_running_loop().call_later(PREFIX_HELD, self._give_up_on, held)
        return None

    def _answer_prefix(self, query: PrefixQuery, reply_subject: str) -> bool:
        reply = prefix_reply(query, self.core.request(query.key), self.core.answers.get(query.key))
        if reply is not None:
            self._bus.publish(reply_subject, codec.encode(reply))
        return reply is not None

    def _answer_held(self) -> None:
        for key in self.core.fenced:
            waiting = self._held.pop(key, [])
            if left := [held for held in waiting if not self._answer_prefix(*held)]:
                self._held[key] = left
        self.core.fenced.clear()

    def _give_up_on(self, held: tuple[PrefixQuery, str]) -> None:
        query, reply_subject = held
        waiting = self._held.get(query.key, [])
        if held in waiting:
            waiting.remove(held)
            if not waiting:
                del self._held[query.key]
            if self.serving:
                self._bus.publish(reply_subject, codec.encode(PrefixReply("pending")))

    # ------------------------------------------------ snapshots

    async def _save_forever(self) -> None:
        # In turn with the other partitions: all at once would keep every stream waiting.
        await asyncio.sleep(self._settings.snapshot_interval * self.number / self._settings.partitions)
        while True:
            await asyncio.sleep(snapshot_pause(self._saved_bytes, self._settings))
            try:
                await self._save()
            except BusError as error:
                # The older one serves as well, with more to replay.
                self._log.warning("snapshot_not_stored", seq=self.core.seq, error=repr(error))

    async def _save(self) -> None:
        self.deliver()  # a snapshot promises that everything up to it was sent
        if self.core.seq == self._saved_seq:
            return
        # Work, not waiting: the loop's own clock stands still in the meantime.
        seq, began = self.core.seq, time.perf_counter()
        data = self.core.snapshot()
        self._recorder.packed(time.perf_counter() - began)
        self._saved_bytes = len(data)
        await parts.put(self._snapshots, subjects.snapshot_key(self._settings.model, self.number), data)
        self._saved_seq = seq
