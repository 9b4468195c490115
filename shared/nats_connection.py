"""nats-py's connection on a shorter way: a message is handled as the socket gives it, and written as it is published (what else the
same turn of the loop publishes, at its end or some milliseconds later). nats-py's own goes through a stream, a task, a queue and
another task on its way in, and a queue and a task on its way out, at every hop of a request. Connecting, authentication, pings and
errors stay nats-py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any, TypeVar

import structlog
from nats import errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.aio.transport import TcpTransport
from nats.protocol.parser import AWAITING_CONTROL_LINE

log = structlog.get_logger()
T = TypeVar("T")

# The latter two are uvloop's when it has closed a transport, which nats-py's reading loop is yet to notice.
TRANSPORT_ERRORS = (OSError, RuntimeError, AttributeError)
NO_SUBJECT = re.compile(r"[ \t\r\n]").search
LARGE = 32 * 1024  # bytes read at once: a backlog
# Seconds for which what a turn of the loop publishes waits for its end. Each writing wakes who reads it, which on few processors keeps
# this process from the rest of its turn.
_PROCESSORS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
LONG_TURN = 0.005 if _PROCESSORS <= 4 else 0.002


class DirectReader(asyncio.Protocol):
    """Stands between the socket and nats-py: hands out messages (MSG, HMSG) itself, and gives nats-py's parser the rest."""

    def __init__(self, connection: Connection, transport: TcpTransport) -> None:
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._partial = b""  # the beginning of a message
        self._others = b""  # for nats-py's parser
        self._parsing = False  # nats-py's parser has something that it is not through with
        self._ended: Exception | None = None
        self._wake: asyncio.Future[None] | None = None
        stream: Any = transport._io_reader
        self._socket: Any = transport._io_writer.transport  # type: ignore[union-attr]
        self._stream_protocol: Any = self._socket.get_protocol()
        self._socket.set_protocol(self)
        left = bytes(stream._buffer)
        stream._buffer.clear()
        stream._maybe_resume_transport()
        if stream.at_eof() or stream.exception() is not None:
            self._ended = stream.exception() or errors.UnexpectedEOF()
        if left:
            self.data_received(left)

    # ---- from the socket

    def data_received(self, data: bytes) -> None:
        self._connection.stats["in_bytes"] += len(data)
        if len(data) >= LARGE and not self._socket.is_closing():
            # There is probably more, and libuv would bring up to 32 such pieces before anything else of the loop has its turn.
            self._socket.pause_reading()
            self._loop.call_soon(self._read_on)
        if self._parsing or self._others:
            self._for_nats(data)
            return
        if self._partial:
            data, self._partial = self._partial + data, b""
        rest, whole = self._connection.take_messages(data)
        if whole:
            self._partial = rest
        else:
            self._for_nats(rest)

    def _read_on(self) -> None:
        if not self._socket.is_closing():
            self._socket.resume_reading()

    def eof_received(self) -> bool:
        self._end(errors.UnexpectedEOF())
        return bool(self._stream_protocol.eof_received())

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc or errors.UnexpectedEOF())
        self._stream_protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        self._stream_protocol.pause_writing()

    def resume_writing(self) -> None:
        self._stream_protocol.resume_writing()

    def _end(self, error: Exception) -> None:
        self._ended = self._ended or error
        self._wake_up()

    def _for_nats(self, data: bytes) -> None:
        self._others += data
        self._wake_up()

    def _wake_up(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    # ---- for nats-py

    async def others(self) -> bytes:
        """What nats-py has to parse; it must be through with what it was given before. Raises what ended the connection."""
        parser = self._connection._ps
        # Of a message that it has the beginning of, it gets the end, too.
        self._parsing = bool(parser.buf) or parser.state != AWAITING_CONTROL_LINE
        while not self._others:
            if self._ended is not None:
                raise self._ended
            self._wake = self._loop.create_future()
            await self._wake
        data, self._others, self._parsing = self._others, b"", True
        return data


class Connection(Client):
    """See above. `listen` instead of `subscribe`, `send` instead of `publish`."""

    def __init__(self) -> None:
        super().__init__()
        self._handlers: dict[int, Callable[[Msg], None]] = {}
        self._loop = asyncio.get_running_loop()
        self._turn = False  # something was published in this turn of the loop
        self._written = 0.0  # monotonic: last, in this turn

    async def _process_pong(self) -> None:
        """A pong for somebody who has given up waiting must not end the reading loop (as in 2.16): the connection would be deaf from
        then on, and nobody told."""
        if self._pongs and self._pongs[0].done():
            self._pongs[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()

    async def _send_ping(self, future: asyncio.Future[bool] | None = None) -> None:
        """Behind what is pending: nats-py's overtakes it, and then the pong says nothing of an UNSUB. Raises OSError."""
        try:
            self._write()
            await super()._send_ping(future)
        except TRANSPORT_ERRORS as error:
            raise ConnectionError(f"not sent: {error!r}") from error

    def forget_pending(self) -> None:
        """After a disconnect: whoever published it has been told that it was not, and subscriptions are begun anew."""
        self._pending, self._pending_data_size = [], 0

    async def listen(self, subject: str, queue: str, handler: Callable[[Msg], None]) -> Subscription:
        """Subscribes. What is not read yet waits in the socket and then at the server, nothing is dropped here."""
        number = self._sid + 1  # the first message may be there before `subscribe` returns
        self._handlers[number] = handler
        try:
            return await self.subscribe(subject, queue)
        except BaseException:
            self._handlers.pop(number, None)
            raise

    def _remove_sub(self, sid: int, max_msgs: int = 0) -> None:
        self._handlers.pop(sid, None)
        super()._remove_sub(sid, max_msgs)

    async def _read_loop(self) -> None:
        if type(self._transport) is not TcpTransport:
            await super()._read_loop()
            return
        try:
            reader = DirectReader(self, self._transport)
            while not (self.is_closed or self.is_reconnecting):
                await self._ps.parse(await reader.others())
        except errors.ProtocolError:
            await self._process_op_err(errors.ProtocolError())
        except errors.UnexpectedEOF as error:
            await self._error_cb(error)
            await self._process_op_err(error)
        except asyncio.CancelledError:
            pass
        except Exception as error:
            await self._process_op_err(error)

    def take_messages(self, data: bytes) -> tuple[bytes, bool]:
        """Handles the messages that `data` begins with. Returns the rest, and whether that is but the beginning of another message
        (or nothing): what else it is is nats-py's to parse."""
        at = 0
        while (line_end := data.find(b"\r\n", at)) >= 0:
            operation = data[at : at + 4]
            if operation == b"MSG ":
                words, header = data[at + 4 : line_end].split(), 0
            elif operation == b"HMSG":
                *words, length, total = data[at + 4 : line_end].split()
                header = int(length)
                words.append(total)
            else:
                return data[at:], False
            begin = line_end + 2
            end = begin + int(words[-1])
            if end + 2 > len(data):
                break
            reply = words[2] if len(words) == 4 else b""
            headers = data[begin : begin + header] if header else None
            self._handle(int(words[1]), words[0], reply, data[begin + header : end], headers)
            at = end + 2
        rest = data[at:]
        return rest, b"MSG ".startswith(rest[:4]) or b"HMSG ".startswith(rest[:5])

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        """From nats-py's parser: behind something else, or over another transport."""
        if type(self._transport) is not TcpTransport:
            self.stats["in_bytes"] += len(data)
        self._handle(sid, subject, reply, data, headers)

    def _handle(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        if (handler := self._handlers.get(sid)) is None:
            return  # of a subscription that has ended
        self.stats["in_msgs"] += 1
        # A subject is any bytes that somebody sends, and a stream's message comes again until it is taken.
        name = subject.decode(errors="replace")
        try:
            parsed = _at_once(self._process_headers(headers)) if headers else None
            handler(Msg(self, name, reply.decode(errors="replace"), data, parsed))
        except Exception as error:  # must not end the reading
            log.error("receiver_failed", subject=name, exc_info=error)

    @property
    def unsent(self) -> int:
        """Bytes that the server has not taken yet."""
        waiting: int = self._pending_data_size
        with contextlib.suppress(AttributeError):  # other transports, and uvloop's TLS when it is closed
            transport: Any = self._transport
            waiting += transport._io_writer.transport.get_write_buffer_size()
        return waiting

    def send(self, subject: str, data: bytes, reply: str, headers: Mapping[str, str] | None) -> bool:
        """Publishes: the first message of a turn of the loop at once, the others together, if that is soon. False, and nothing is done,
        where it takes nats-py's `publish`: over WebSockets, and to say what is wrong."""
        if type(self._transport) is not TcpTransport or not self.is_connected or self.is_draining_pubs:
            return False
        if not subject or NO_SUBJECT(subject) or (reply and NO_SUBJECT(reply)):
            return False
        if headers is None:
            command = f"PUB {subject} {reply} {len(data)}\r\n".encode() + data + b"\r\n"
        else:
            lines = [f"{name}: {value}" for name, value in headers.items()]
            if any("\n" in line or "\r" in line for line in lines):
                return False
            block = "\r\n".join(["NATS/1.0", *lines, "", ""]).encode()
            sizes = f"{len(block)} {len(block) + len(data)}"
            command = f"HPUB {subject} {reply} {sizes}\r\n".encode() + block + data + b"\r\n"
        self._pending.append(command)
        self._pending_data_size += len(command)
        if not self._turn:
            # The first of a turn is often the only one, and uvloop sends what is written within the same turn.
            self._turn = True
            self._loop.call_soon(self._end_turn)
            self._write_now()
        elif time.monotonic() - self._written > LONG_TURN:
            # Hundreds have come at once: what can be done with the first should not wait until the last has been.
            self._write_now()
        self.stats["out_msgs"] += 1
        self.stats["out_bytes"] += len(data)
        return True

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is published within is written in one piece at its end (or of the turn, if something went before)."""
        # Over another transport nats-py's flusher writes, and it must find what is to be written.
        first = not self._turn and type(self._transport) is TcpTransport
        if first:
            self._turn, self._written = True, math.inf
        try:
            yield
        finally:
            if first:
                self._end_turn()

    def _write_now(self) -> None:
        self._write()
        self._written = time.monotonic()

    def _end_turn(self) -> None:
        self._turn = False
        try:
            self._write()
        except TRANSPORT_ERRORS as error:  # who waits for an answer is told when the connection is found to be lost
            log.warning("not_written", error=repr(error))

    def _write(self) -> None:
        """All that is pending, nats-py's own commands among it; its flusher then finds nothing. Raises TRANSPORT_ERRORS."""
        if self._pending and self.is_connected and self._transport is not None:
            pending, self._pending, self._pending_data_size = b"".join(self._pending), [], 0
            self._transport.write(pending)


def _at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of one that suspends nowhere."""
    try:
        coroutine.send(None)
    except StopIteration as stopped:
        result: T = stopped.value
        return result
    coroutine.close()
    raise RuntimeError(f"{coroutine!r} waits for something")
