"""The Bus on NATS. nats-py keeps the connection; requests, acknowledgements, pulls and buckets are done here, because each must
know at once when the connection is lost, and none may wait for a server that has died.

What differs from nats-py's own:
    messages are handled as they are read and written as they are published, without tasks in between (shared.nats_connection)
    nothing is buffered while there is no connection (that buffer loses messages silently)
    a server that does not answer a ping in time counts as gone, and its socket is aborted: closing it would wait for it
    streams are read by standing pulls (shared.nats_pull), re-armed at every reconnect, and buckets watched in the same way
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import AbstractContextManager
from datetime import datetime
from functools import partial
from typing import Any

import orjson
import structlog
from nats import errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as NatsSubscription

from shared.bus import (
    APPEND_TIMEOUT,
    HEADROOM,
    Appended,
    BucketSpec,
    BusError,
    BusTimeout,
    Delivery,
    Message,
    NoResponders,
    PayloadTooLarge,
    StorageFull,
    Stored,
    StreamSpec,
    WrongRevision,
)
from shared.config import StageSettings
from shared.nats_connection import TRANSPORT_ERRORS, Connection
from shared.nats_kv import NatsBucket
from shared.nats_pull import NatsConsumer, NatsFollower, Reader

log = structlog.get_logger()

API = "$JS.API"
NANOSECONDS = 10**9
# Seconds. A link that is silent for LINK_STALLED proves nothing any more; after LINK_DEAD it is given up.
PING_INTERVAL, LINK_STALLED, LINK_DEAD, LAST_LOOK = 0.25, 1.0, 5.0, 0.05
API_TIMEOUT, DRAIN_TIMEOUT = 5.0, 1.0
# A core message is dropped when this many bytes wait for a server that does not read.
MAX_UNSENT = 64 * 2**20

# nats-server's JetStream error codes (server/errors.json)
WRONG_LAST = {10071, 10164}
FULL = {10002, 10023, 10028, 10047, 10077}
TOO_LARGE = {10054}
NO_CONSUMER, NO_MESSAGE, NO_STREAM = 10014, 10037, 10059
NOT_NOW = {10008, 10009, 10076, 10167}


class ApiError(BusError):
    """JetStream refused a request; `code` is its err_code."""

    def __init__(self, code: int, description: str) -> None:
        super().__init__(f"{description} ({code})")
        self.code = code


def api_error(error: Mapping[str, Any]) -> BusError:
    """What the `error` of an answer of JetStream means."""
    code, description = error.get("err_code", 0), error.get("description", "")
    if code in WRONG_LAST:
        return WrongRevision(description)
    if code in FULL:
        return StorageFull(description)
    if code in TOO_LARGE:
        return PayloadTooLarge(description)
    if code in NOT_NOW:
        return BusTimeout(description)
    return ApiError(code, description)


class CoreSubscription:
    """A subscription of a plain handler."""

    def __init__(self, subscription: NatsSubscription) -> None:
        self._subscription = subscription

    async def unsubscribe(self) -> None:
        try:
            await self._subscription.unsubscribe()
        except errors.Error as error:  # closed before
            log.debug("unsubscribe", error=repr(error))

    async def drain(self) -> None:
        """Unsubscribes when what the server has sent already has been handled."""
        try:
            async with asyncio.timeout(DRAIN_TIMEOUT):
                await self._subscription.drain()  # type: ignore[no-untyped-call]
        except (errors.Error, OSError) as error:  # a TimeoutError is one
            log.debug("drain", error=repr(error))
            # nats-py takes it for closed now, but would subscribe to it again at every reconnect.
            self._subscription._conn._remove_sub(self._subscription._id)


class NatsBus:
    """See shared.bus.Bus for the interface; made by `connect`."""

    def __init__(self, inbox_prefix: str = "_INBOX") -> None:
        self.dropped = 0  # core messages published while there was no connection
        self.handler_errors = 0
        self._loop = asyncio.get_running_loop()
        self._nc = Connection()
        self._inbox = f"{inbox_prefix}.{self._nc._nuid.next().decode()}."
        self._tokens = itertools.count(1)
        # By the inbox's token: what was asked, and what gets the answer or the reason why there is none.
        self._waiting: dict[str, tuple[str, Callable[[Msg | BusError], None]]] = {}
        # Loop times until which answers to appends are waited for, and their tokens.
        self._appends: deque[tuple[float, str]] = deque()
        self._append_timer: asyncio.TimerHandle | None = None
        self._connected = asyncio.Event()
        self._since: float | None = None
        self._last_pong = 0.0
        self._ping_task: asyncio.Task[None] | None = None
        self._on_reconnect: list[Callable[[], None]] = []
        self._on_closed: list[Callable[[BaseException], None]] = []
        self._closing = False
        self._dead = False
        self._readers: dict[Reader, None] = {}
        self._said: str = ""

    # ------------------------------------------------ connection

    @classmethod
    async def connect(cls, settings: StageSettings) -> NatsBus:
        """Waits for a server as long as it takes, and says so in the log. Raises OSError for a key or certificate that cannot
        be read."""
        bus = cls(settings.nats_inbox_prefix)
        connecting = bus._nc.connect(
            servers=[url.strip() for url in settings.nats_url.split(",")],
            name=settings.name or None,
            error_cb=bus._error,
            disconnected_cb=bus._disconnected,
            reconnected_cb=bus._reconnected,
            closed_cb=bus._closed,
            max_reconnect_attempts=-1,
            reconnect_time_wait=0.05,  # type: ignore[arg-type]  # seconds; a float will do
            connect_timeout=2,
            ping_interval=3600,  # `_ping` does it
            pending_size=0,  # no reconnect buffer
            user=settings.nats_user or None,
            password=settings.nats_password or None,
            nkeys_seed=settings.nats_nkey or None,
            user_credentials=settings.nats_credentials or None,
            tls=_tls(settings),
        )
        await _cancellable(connecting)
        await bus._nc.listen(bus._inbox + "*", "", bus._answered)
        bus._up()
        return bus

    @property
    def connected_for(self) -> float:
        if self._since is None or self._loop.time() - self._last_pong > LINK_STALLED:
            return 0.0
        return self._loop.time() - self._since

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        self._on_reconnect.append(callback)

    def on_closed(self, callback: Callable[[BaseException], None]) -> None:
        self._on_closed.append(callback)
        if self._dead:
            callback(ConnectionError(self._said))

    async def close(self) -> None:
        self._closing = True
        for reader in list(self._readers):
            await reader.close()
        if self._connected.is_set():
            try:
                await self._nc.flush(timeout=2)
            except (errors.Error, OSError) as error:
                log.warning("not_flushed", error=repr(error))
        if self._ping_task is not None:
            self._ping_task.cancel()
        self._abort_if_frozen()
        await self._nc.close()

    def _up(self) -> None:
        self._since = self._last_pong = self._loop.time()
        self._connected.set()
        self._ping_task = self._loop.create_task(self._ping())

    def is_up(self) -> bool:
        if not self._connected.is_set():
            return False
        if not self._nc.is_connected:
            self._down()  # nats-py knows already, and will tell in a moment
            return False
        return True

    def _down(self) -> None:
        self._since = None
        self._connected.clear()
        self._nc.forget_pending()
        if self._ping_task is not None:
            self._ping_task.cancel()
        for token in self._waiting:
            self._loop.call_soon(self._give_up, token, "the connection was lost")

    async def _disconnected(self) -> None:
        self._down()
        if not self._closing:
            log.warning("nats_disconnected")

    async def _reconnected(self) -> None:
        self._up()
        log.info("nats_reconnected", dropped=self.dropped)
        for reader in list(self._readers):
            reader.begin_anew()
        for callback in self._on_reconnect:
            self.handle(callback, (), "on_reconnect")

    async def _closed(self) -> None:
        """nats-py gave up for good: wrong password, a protocol error."""
        self._down()
        if self._closing:
            return
        self._dead = True
        self._said = f"NATS closed the connection for good: {self._nc.last_error!r}"
        log.error("nats_closed", error=repr(self._nc.last_error))
        for callback in self._on_closed:
            callback(ConnectionError(self._said))

    async def _error(self, error: Exception) -> None:
        if (task := asyncio.current_task()) is not None and task.cancelling():
            # A connect that fails just as it is cancelled tells of the failure alone (`wait_for`, Python 3.11), and nats-py's task
            # would try again for ever: behind a closed bus, and in the way of a loop that wants to end.
            raise asyncio.CancelledError
        if "permissions violation" in str(error).lower():
            self._not_permitted(str(error))
        elif self._since is None and repr(error) != self._said:
            self._said = repr(error)
            log.warning("waiting_for_nats", error=self._said)
        else:
            log.debug("nats_error", error=repr(error))

    def _not_permitted(self, error: str) -> None:
        """The server names the subject, in lower case by way of nats-py. Whoever waits for an answer to it need not wait any longer."""
        log.error("not_permitted", error=error)
        for token, (subject, _) in self._waiting.items():
            if f'"{subject.lower()}"' in error:
                self._loop.call_soon(self._give_up, token, f"not permitted: {subject}")

    async def _ping(self) -> None:
        """Knows within LINK_STALLED whether the server still answers; also whether this process itself was stopped."""
        while True:
            sent = self._loop.time()
            if not await self._pong():
                log.warning("nats_silent", seconds=LINK_DEAD)
                self._abort()
                return
            now = self._loop.time()
            if now - self._last_pong > LINK_STALLED or now - sent > LINK_STALLED:
                self._since = now
            self._last_pong = now
            await asyncio.sleep(PING_INTERVAL)

    async def _pong(self) -> bool:
        """Asks the server for a sign of life; False if nothing at all came for LINK_DEAD. An answer that stands in line behind a flood
        of messages is late, but the server is not gone. (nats-py's `flush` knows only the answer, and fails on a late one.)"""
        pong: asyncio.Future[bool] = self._loop.create_future()
        try:
            await self._nc._send_ping(pong)
        except (errors.Error, OSError):
            return False
        while not pong.done():
            received = self._nc.stats["in_bytes"]
            # The last look is for what came while this process itself was kept from running: it is read before time is up.
            for patience in (LINK_DEAD, LAST_LOOK):
                await asyncio.wait([pong], timeout=patience)
                if pong.done() or self._nc.stats["in_bytes"] != received:
                    break
            else:
                return False
        return True

    def _abort_if_frozen(self) -> None:
        if self._loop.time() - self._last_pong > LINK_STALLED:
            self._abort()

    def _abort(self) -> None:
        writer = getattr(self._nc._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()

    async def _wait_for_connection(self, timeout: float) -> float:
        """Returns what is left of `timeout`."""
        if self.is_up():
            return timeout
        deadline = self._loop.time() + timeout
        try:
            async with asyncio.timeout_at(deadline):
                await self._connected.wait()
        except TimeoutError:
            raise BusTimeout("not connected") from None
        return deadline - self._loop.time()

    # ------------------------------------------------ core

    def publish(self, subject: str, data: bytes, reply: str = "") -> None:
        nc = self._nc
        if len(data) > nc._max_payload - HEADROOM:
            raise PayloadTooLarge(f"{len(data)} bytes, {nc._max_payload - HEADROOM} are allowed")
        if nc.unsent <= MAX_UNSENT and self.is_up():
            try:
                self._send(subject, data, reply)
                return
            except BusError as error:
                log.debug("publish_failed", subject=subject, error=repr(error))
        if self.dropped & (self.dropped - 1) == 0:  # 0, 1, 2, 4, 8 ...
            log.warning("publish_dropped", subject=subject, count=self.dropped + 1)
        self.dropped += 1

    def _send(self, subject: str, data: bytes, reply: str = "", headers: dict[str, str] | None = None) -> None:
        try:
            if self._nc.send(subject, data, reply, headers):
                return
            # A coroutine, but it suspends only after the bytes are in the buffer, when the flusher's queue is full; there is no need
            # to wait for that.
            sending = self._nc.publish(subject, data, reply, headers)
            sending.send(None)
        except StopIteration:
            return
        except (errors.Error, *TRANSPORT_ERRORS) as error:
            raise BusTimeout(f"{subject}: not sent: {error!r}") from error
        sending.close()

    async def request(self, subject: str, data: bytes, timeout: float) -> Message:
        answer = await self.ask(subject, data, timeout)
        return Message(answer.subject, answer.data, answer.reply)

    async def ask(self, subject: str, data: bytes, timeout: float, headers: dict[str, str] | None = None) -> Msg:
        """`request` with headers. Raises NoResponders, BusTimeout, PayloadTooLarge."""
        if len(data) > self._nc._max_payload - HEADROOM:
            raise PayloadTooLarge(f"{len(data)} bytes, {self._nc._max_payload - HEADROOM} are allowed")
        timeout = await self._wait_for_connection(timeout)
        future: asyncio.Future[Msg] = self._loop.create_future()
        token = self._expect_answer(subject, partial(_settle, future))
        timer = self._loop.call_later(timeout, self._give_up, token, "no answer in time")
        try:
            self._send(subject, data, self._inbox + token, headers)
            answer = await future
        finally:
            timer.cancel()
            self._waiting.pop(token, None)
            # An exception holds this frame: were it to hold the exception in turn, all that waited here would be left to the collector.
            del future
        if _nobody_there(answer):
            raise NoResponders(subject)
        return answer

    def _expect_answer(self, subject: str, answered: Callable[[Msg | BusError], None]) -> str:
        """The inbox's token, for what is about to be sent to `subject`."""
        token = str(next(self._tokens))
        self._waiting[token] = subject, answered
        return token

    def _answered(self, msg: Msg) -> None:
        if (waiting := self._waiting.pop(msg.subject.rpartition(".")[2], None)) is not None:
            waiting[1](msg)

    def _give_up(self, token: str, why: str) -> None:
        if (waiting := self._waiting.pop(token, None)) is not None:
            waiting[1](BusTimeout(why))

    async def subscribe(self, subject: str, handler: Callable[[Message], None], queue: str = "") -> CoreSubscription:
        def receive(msg: Msg) -> None:
            self.handle(handler, (Message(msg.subject, msg.data, msg.reply),), subject)

        return await self.subscribe_raw(subject, receive, queue)

    async def subscribe_raw(self, subject: str, receive: Callable[[Msg], None], queue: str = "") -> CoreSubscription:
        """With nats-py's messages."""
        try:
            return CoreSubscription(await self._nc.listen(subject, queue, receive))
        except errors.Error as error:
            raise BusError(f"{subject}: {error!r}") from error

    def handle(self, handler: Callable[..., None], arguments: tuple[Any, ...], subject: str) -> None:
        try:
            handler(*arguments)
        except Exception as error:
            self.handler_errors += 1
            log.error("handler_failed", subject=subject, exc_info=error)

    def new_inbox(self) -> str:
        """A subject that nobody else uses."""
        return f"{self._inbox[:-1]}-{next(self._tokens)}"

    # ------------------------------------------------ JetStream's requests

    async def api(self, operation: str, body: Any = None, timeout: float = API_TIMEOUT) -> dict[str, Any]:
        """One request to JetStream. Raises ApiError, BusTimeout and what `api_error` knows."""
        try:
            answer = await self.ask(f"{API}.{operation}", json.dumps(body).encode() if body else b"", timeout)
        except NoResponders:
            raise BusTimeout("JetStream does not answer") from None
        result: dict[str, Any] = json.loads(answer.data)
        if "error" in result:
            raise api_error(result["error"])
        return result

    async def store(self, subject: str, data: bytes, headers: dict[str, str] | None, timeout: float) -> Appended:
        try:
            answer = json.loads((await self.ask(subject, data, timeout, headers)).data)
        except NoResponders:
            raise BusError(f"no stream takes {subject}") from None
        if "error" in answer:
            raise api_error(answer["error"])
        return Appended(answer["seq"], answer.get("duplicate", False))

    async def get_message(self, stream: str, query: dict[str, Any]) -> dict[str, Any] | None:
        """A stored message as the stream's leader knows it (a direct get might be answered by a replica that lags)."""
        try:
            message: dict[str, Any] = (await self.api(f"STREAM.MSG.GET.{stream}", query))["message"]
        except ApiError as error:
            if error.code == NO_MESSAGE:
                return None
            raise
        return message

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
        headers: dict[str, str] | None = None
        if msg_id is not None:
            headers = {"Nats-Msg-Id": msg_id}
        if expected_last_subject_seq is not None:
            headers = headers or {}
            headers["Nats-Expected-Last-Subject-Sequence"] = str(expected_last_subject_seq)
        return await self.store(subject, data, headers, timeout)

    def append_soon(
        self, subject: str, data: bytes, done: Callable[[Appended | BusError], None], *, msg_id: str | None = None
    ) -> bool:
        if len(data) > self._nc._max_payload - HEADROOM or not self.is_up():
            return False
        token = self._expect_answer(subject, partial(_appended, subject, done))
        self._set_deadline(token)
        try:
            self._send(subject, data, self._inbox + token, None if msg_id is None else {"Nats-Msg-Id": msg_id})
        except BusTimeout as error:
            # Later: its caller is not told before it knows that the message was taken.
            self._loop.call_soon(self._give_up, token, str(error))
        return True

    def _set_deadline(self, token: str) -> None:
        """One timer for all: they are waited for equally long, so the oldest is the next."""
        appends = self._appends
        while appends and appends[0][1] not in self._waiting:
            appends.popleft()
        appends.append((self._loop.time() + APPEND_TIMEOUT, token))
        if self._append_timer is None:
            self._append_timer = self._loop.call_at(appends[0][0], self._expire_appends)

    def _expire_appends(self) -> None:
        appends, now = self._appends, self._loop.time()
        while appends and (appends[0][0] <= now or appends[0][1] not in self._waiting):
            # Each by itself: one whose caller fails harms no other.
            self._loop.call_soon(self._give_up, appends.popleft()[1], "no answer in time")
        self._append_timer = self._loop.call_at(appends[0][0], self._expire_appends) if appends else None

    def together(self) -> AbstractContextManager[None]:
        return self._nc.together()

    async def read(self, stream: str, seq: int) -> Stored | None:
        if seq < 1:
            return None
        message = await self.get_message(stream, {"seq": seq})
        if message is None:
            return None
        data = base64.b64decode(message.get("data", ""))
        return Stored(message["seq"], message["subject"], data, datetime.fromisoformat(message["time"]).timestamp())

    async def last_seq(self, stream: str, subject: str) -> int:
        message = await self.get_message(stream, {"last_by_subj": subject})
        return message["seq"] if message else 0

    async def follow(self, stream: str, subject: str, start_seq: int) -> NatsFollower:
        await self.api(f"STREAM.INFO.{stream}")
        follower = NatsFollower(self, stream, subject, start_seq)
        await follower.open()
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
    ) -> NatsConsumer:
        consumer = NatsConsumer(self, stream, durable, subject, handler, limit, ack_wait)
        await consumer.open()
        return consumer

    def add_reader(self, reader: Reader) -> None:
        """The reader begins anew at every reconnect and is closed with the bus, until `remove_reader`."""
        self._readers[reader] = None

    def remove_reader(self, reader: Reader) -> None:
        self._readers.pop(reader, None)

    async def consumer_info(self, stream: str, durable: str) -> dict[str, Any] | None:
        try:
            return await self.api(f"CONSUMER.INFO.{stream}.{durable}")
        except ApiError as error:
            if error.code == NO_CONSUMER:
                return None
            raise

    async def backlog(self, stream: str, durable: str) -> int:
        info = await self.consumer_info(stream, durable)
        return info["num_pending"] if info is not None else 0

    async def acked_below(self, stream: str, durable: str) -> int:
        info = await self.consumer_info(stream, durable)
        return info["ack_floor"]["stream_seq"] + 1 if info is not None else 1

    async def trim(self, stream: str, below_seq: int, subject: str = "") -> None:
        if below_seq > 1:
            await self.api(f"STREAM.PURGE.{stream}", {"seq": below_seq} | ({"filter": subject} if subject else {}))

    async def ensure_stream(self, spec: StreamSpec) -> None:
        window = min(spec.duplicate_window, spec.max_age) if spec.max_age else spec.duplicate_window
        await self._ensure(
            spec,
            {
                "name": spec.name,
                "subjects": [spec.subject],
                "retention": "workqueue" if spec.work_queue else "limits",
                "max_age": int(spec.max_age * NANOSECONDS),
                "max_bytes": spec.max_bytes or -1,
                "duplicate_window": int(window * NANOSECONDS),
                "num_replicas": spec.replicas,
                "metadata": dict(spec.metadata),
            },
        )

    async def _ensure(self, spec: StreamSpec, config: dict[str, Any]) -> None:
        config |= {"storage": "file", "discard": "new", "allow_direct": True}
        try:
            present = (await self.api(f"STREAM.INFO.{spec.name}"))["config"]
        except ApiError as error:
            if error.code != NO_STREAM:
                raise
            # Two processes may do this at once: creating what exists with the same configuration is no error.
            await self.api(f"STREAM.CREATE.{spec.name}", config)
            return
        metadata = present.get("metadata") or {}
        spec.check_metadata(metadata)
        config["metadata"] = metadata | config["metadata"]
        if any(present.get(name) != value for name, value in config.items()):
            await self.api(f"STREAM.UPDATE.{spec.name}", present | config)

    # ------------------------------------------------ key-value

    async def ensure_bucket(self, spec: BucketSpec) -> None:
        name = f"KV_{spec.name}"
        await self._ensure(
            StreamSpec(name, f"$KV.{spec.name}.>"),
            {
                "name": name,
                "subjects": [f"$KV.{spec.name}.>"],
                "max_msgs_per_subject": 1,
                "num_replicas": spec.replicas,
                "allow_rollup_hdrs": True,
                "allow_msg_ttl": True,
                "subject_delete_marker_ttl": 60 * NANOSECONDS,  # watchers learn of what expired
                "metadata": {},
            },
        )

    async def bucket(self, name: str) -> NatsBucket:
        await self.api(f"STREAM.INFO.KV_{name}")
        return NatsBucket(self, name)


async def _cancellable(connecting: Coroutine[Any, Any, None]) -> None:
    """nats-py, closing an attempt that failed, takes a cancellation for its own and tries again (seen in 2.16): who is told to go
    tells it until it does."""
    task = asyncio.ensure_future(connecting)
    try:
        await asyncio.wait([task])
    finally:
        while not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=0.05)
    task.result()


def _tls(settings: StageSettings) -> ssl.SSLContext | None:
    """None leaves it to the URL and the server whether there is TLS, with the system's CAs."""
    if not settings.nats_tls_ca and not settings.nats_tls_cert:
        return None
    context = ssl.create_default_context(cafile=settings.nats_tls_ca or None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if settings.nats_tls_cert:
        context.load_cert_chain(settings.nats_tls_cert, settings.nats_tls_key or None)
    return context


def _nobody_there(answer: Msg) -> bool:
    return answer.headers is not None and answer.headers.get("Status") == "503"


def _settle(future: asyncio.Future[Msg], answer: Msg | BusError) -> None:
    if future.done():  # nobody waits any more
        return
    if isinstance(answer, BusError):
        future.set_exception(answer)
    else:
        future.set_result(answer)


def _appended(subject: str, done: Callable[[Appended | BusError], None], answer: Msg | BusError) -> None:
    """Nothing is raised here: an exception would hold this frame, and the frame the exception."""
    if isinstance(answer, BusError):
        done(answer)
    elif _nobody_there(answer):
        done(BusError(f"no stream takes {subject}"))
    else:
        try:
            said = orjson.loads(answer.data)
            refused = said.get("error")
            told = Appended(said["seq"], said.get("duplicate", False)) if refused is None else api_error(refused)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            told = BusError(f"an answer about {subject} that cannot be read: {error!r}")
        done(told)
