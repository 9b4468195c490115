"""A link that loses messages and holds messages back: a process between stages and clients on the one side and nats-server on the
other, which understands as much of NATS's protocol as it takes to lose or delay single messages, in both directions.

    python -m tests.chaos.lossy_link --listen PORT --server PORT [--drop 0.003] [--delay 0.01] [--max-delay 0.2] [--seed 1]

A lost PUB is an append, an order or an answer that never arrived; a lost MSG an event, a heartbeat, an acknowledgement or an entry of
the log that NATS believes it has delivered. A delayed message is overtaken by those after it. What is not a message (SUB, PING, …)
passes untouched and in order. Faults begin with SIGUSR1. SIGTERM ends the process, which then prints what it did, as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import cast

MESSAGES = (b"PUB ", b"HPUB ", b"MSG ", b"HMSG ")


class Frames:
    """Cuts one direction of a connection into protocol lines, each with its payload. (frame, whether it is a message)."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bool]]:
        buffer = self._buffer
        buffer += data
        start = 0
        while (end := buffer.find(b"\r\n", start)) >= 0:
            line = bytes(buffer[start:end])
            is_message = line[:5].upper().startswith(MESSAGES)
            if is_message:
                size = end + 2 + int(line.rsplit(b" ", 1)[1]) + 2
                if len(buffer) < size:
                    break
            else:
                size = end + 2
            yield bytes(buffer[start:size]), is_message
            start = size
        del buffer[:start]


class Direction(asyncio.Protocol):
    """What one end sends, carried to the other, with faults."""

    def __init__(self, link: LossyLink, name: str) -> None:
        self._link = link
        self._name = name
        self._frames = Frames()
        self.transport: asyncio.Transport | None = None
        self.other: Direction | None = None
        self._early: list[bytes] = []  # what came before the other end was there

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def join(self, other: Direction) -> None:
        self.other = other
        for data in self._early:
            self.data_received(data)
        self._early.clear()

    def data_received(self, data: bytes) -> None:
        if self.other is None:
            self._early.append(data)
            return
        whole = []
        for frame, is_message in self._frames.feed(data):
            fate = self._link.fate(self._name) if is_message else 0.0
            if fate == 0.0:
                whole.append(frame)
            elif fate > 0.0:
                asyncio.get_running_loop().call_later(fate, self._write, frame)
        if whole:
            self._write(b"".join(whole))

    def _write(self, data: bytes) -> None:
        if self.other is not None and self.other.transport is not None and not self.other.transport.is_closing():
            self.other.transport.write(data)

    def pause_writing(self) -> None:  # whoever does not read slows the other end down, as without a link between
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()


class LossyLink:
    """`done` counts messages by what befell them: passed, dropped or delayed, to the server or to the client."""

    def __init__(self, server: int, seed: int, drop: float, delay: float, max_delay: float) -> None:
        self.done: Counter[str] = Counter()
        self._server = server
        self.faulty = False
        self._random = random.Random(seed)
        self._drop, self._delay, self._max_delay = drop, delay, max_delay
        self._tasks: set[asyncio.Task[None]] = set()

    def fate(self, direction: str) -> float:
        """0: passes;  below 0: is lost;  else seconds of delay."""
        dice = self._random.random() if self.faulty else 1.0
        if dice < self._drop:
            self.done[f"dropped {direction}"] += 1
            return -1.0
        if dice < self._drop + self._delay:
            self.done[f"delayed {direction}"] += 1
            return self._random.uniform(0.001, self._max_delay)
        self.done[f"passed {direction}"] += 1
        return 0.0

    async def listen(self, port: int) -> asyncio.Server:
        return await asyncio.get_running_loop().create_server(self._accept, "127.0.0.1", port)

    def _accept(self) -> Direction:
        client = Direction(self, "to the server")
        task = asyncio.get_running_loop().create_task(self._connect(client))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return client

    async def _connect(self, client: Direction) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, server = await loop.create_connection(lambda: Direction(self, "to a client"), "127.0.0.1", self._server)
        except OSError:
            if client.transport is not None:
                client.transport.abort()
            return
        if client.transport is None or client.transport.is_closing():
            assert server.transport is not None
            server.transport.close()
            return
        server.other = client
        client.join(server)
        server.join(client)


async def _main(args: argparse.Namespace) -> None:
    link = LossyLink(args.server, args.seed, args.drop, args.delay, args.max_delay)
    server = await link.listen(args.listen)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stopping.set)
    loop.add_signal_handler(signal.SIGUSR1, lambda: setattr(link, "faulty", True))
    print("listening", flush=True)
    await stopping.wait()
    server.close()
    print(json.dumps(link.done), flush=True)


class Link:
    """The process. `done` is known when it has ended."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.done: Counter[str] = Counter()
        self._process = process

    def begin_faults(self) -> None:
        self._process.send_signal(signal.SIGUSR1)


@contextlib.asynccontextmanager
async def lossy_link(listen: int, server: int, seed: int, drop: float, delay: float) -> AsyncIterator[Link]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.chaos.lossy_link", "--listen", str(listen), "--server", str(server),
        "--seed", str(seed), "--drop", str(drop), "--delay", str(delay),
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    link = Link(process)
    try:
        assert (await process.stdout.readline()).strip() == b"listening"
        yield link
    finally:
        process.terminate()
        out, _ = await process.communicate()
        link.done.update(json.loads(out.splitlines()[-1]))


def main() -> None:
    import uvloop

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--listen", type=int, required=True)
    parser.add_argument("--server", type=int, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--drop", type=float, default=0.003)
    parser.add_argument("--delay", type=float, default=0.01)
    parser.add_argument("--max-delay", type=float, default=0.2, help="seconds")
    uvloop.run(_main(parser.parse_args()))


if __name__ == "__main__":
    main()
