"""Load generators of the benchmarks that run a pipeline. Each function runs in a process of its own and talks to NATS as any client
would.

Times are `time.monotonic()`, which all processes of a host share.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import time
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import msgpack
import uvloop
from nats.aio.client import Client
from nats.aio.msg import Msg

from benchmarks.wire import Frames, Wire
from shared import codec, subjects
from shared import messages as m

FINISHED = b'"event":"finished"'
PROMPT = "The captain looked at the sea for a long time, and then he said"
TIMEOUT = 180.0
NOTICE = 0.03  # seconds from the last process's being ready to the start of all
AWAKE = 0.0005  # seconds for which it awaits that without sleeping: some are woken a millisecond later than others


class Start:
    """A load process tells that it is set up, and waits until all of them are."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    async def together(self) -> None:
        self._pipe.send("ready")
        when: float = await asyncio.to_thread(self._pipe.recv)
        await asyncio.sleep(max(0.0, when - time.monotonic() - AWAKE))
        while time.monotonic() < when:
            pass


Load = Callable[..., Coroutine[Any, Any, Any]]


def run_together(loads: list[tuple[Load, tuple[Any, ...]]]) -> list[Any]:
    """Runs each `load(start, *args)` in a process of its own, all starting together; returns their results."""
    context = multiprocessing.get_context("spawn")
    children = []
    for load, args in loads:
        ours, theirs = context.Pipe()
        process = context.Process(target=_child, args=(theirs, load, args), daemon=True)
        process.start()
        theirs.close()
        children.append((process, ours))
    try:
        for _, pipe in children:
            _receive(pipe)
        when = time.monotonic() + NOTICE  # one clock for all processes of a machine
        for _, pipe in children:
            pipe.send(when)
        return [_receive(pipe) for _, pipe in children]
    finally:
        for process, _ in children:
            process.join(5)
            if process.is_alive():
                process.kill()


def _receive(pipe: Connection) -> Any:
    if not pipe.poll(TIMEOUT):
        raise TimeoutError("a load process does not come to its end")
    result = pipe.recv()
    if isinstance(result, BaseException):
        raise result
    return result


def _child(pipe: Connection, load: Load, args: tuple[Any, ...]) -> None:
    try:
        result = uvloop.run(asyncio.wait_for(_watched(load(Start(pipe), *args)), TIMEOUT))
    except Exception as error:
        result = RuntimeError(f"{load.__name__}: {error!r}")
    pipe.send(result)


async def _watched(load: Coroutine[Any, Any, Any]) -> Any:
    """What the load returns; an error in a callback is its error, too."""
    loop = asyncio.get_running_loop()
    failed: asyncio.Future[Any] = loop.create_future()

    def on_error(_: object, context: dict[str, Any]) -> None:
        if not failed.done():
            failed.set_exception(context.get("exception") or RuntimeError(context["message"]))

    loop.set_exception_handler(on_error)
    task = loop.create_task(load)
    done, _ = await asyncio.wait((task, failed), return_when=asyncio.FIRST_COMPLETED)
    task.cancel()
    return done.pop().result()


async def connect(url: str) -> Client:
    client = Client()
    await client.connect(url, pending_size=64 * 2**20)
    return client


# ---------------------------------------------------------------- time to first token


def forgetting_after(attach_window: float) -> dict[str, str]:
    """Environment of stages that forget what has ended after so many seconds, and keep the log for as long as they must."""
    return {"GORGON_ATTACH_WINDOW": str(attach_window), "GORGON_TOK_MAX_AGE": str(2 * attach_window)}


async def time_to_first_token(
    start: Start, url: str, model: str, requests: int, concurrency: int, body: bytes = b""
) -> list[float]:
    """Seconds from publishing a request (by default a short one in JSON) until the first `tokens` event, `concurrency` requests at a
    time."""
    subject = subjects.generate(model)
    body = body or json.dumps(dict(prompt=PROMPT, max_tokens=4, temperature=0)).encode()
    decode = json.loads if body.startswith(b"{") else msgpack.unpackb
    left = requests
    times: list[float] = []
    frames = Frames()
    firsts: dict[str, float] = {}
    ends: dict[str, asyncio.Future[None]] = {}

    def on_bytes(when: float, data: bytes) -> None:
        for inbox, payload in frames.feed(data):
            event = decode(payload)
            if event["event"] == "tokens":
                firsts.setdefault(inbox, when)
            elif event["event"] == "error":
                ends[inbox].set_exception(RuntimeError(event["message"]))
            elif event["event"] == "finished":
                ends[inbox].set_result(None)

    wire = await Wire.connect(url, on_bytes)

    async def worker() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            inbox = wire.new_inbox()
            ends[inbox] = asyncio.get_running_loop().create_future()
            subscription = wire.subscribe(inbox)
            began = time.monotonic()
            wire.publish(subject, body, inbox)
            await ends[inbox]
            times.append(firsts[inbox] - began)
            del ends[inbox], firsts[inbox]
            wire.unsubscribe(subscription)

    await start.together()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    wire.close()
    return times


# ---------------------------------------------------------------- many streams at a steady beat


async def steady_streams(
    start: Start, url: str, model: str, streams: int, connections: int, tokens: int
) -> list[list[float]]:
    """Arrival time of each token of each stream. Every stream has a reply subject of its own; nothing is decoded while it runs."""
    open_streams = streams
    done = asyncio.get_running_loop().create_future()
    readings: list[list[tuple[float, bytes]]] = [[] for _ in range(connections)]

    def reader(chunks: list[tuple[float, bytes]]) -> Callable[[float, bytes], None]:
        def on_bytes(when: float, data: bytes) -> None:
            nonlocal open_streams
            seam = chunks[-1][1][1 - len(FINISHED) :] if chunks else b""
            chunks.append((when, data))
            open_streams -= data.count(FINISHED) + (seam + data[: len(FINISHED) - 1]).count(FINISHED)
            if b'"event":"error"' in data and not done.done():
                done.set_exception(RuntimeError(data.decode()))
            if open_streams == 0 and not done.done():
                done.set_result(None)

        return on_bytes

    wires = [await Wire.connect(url, reader(chunks)) for chunks in readings]
    inboxes = [wire.new_inbox() for wire in wires]
    for wire, inbox in zip(wires, inboxes, strict=True):
        wire.subscribe(f"{inbox}.*")
    subject = subjects.generate(model)
    body = json.dumps(dict(prompt=PROMPT, max_tokens=tokens, temperature=0, ignore_eos=True)).encode()
    await start.together()
    for number in range(streams):
        wires[number % connections].publish(subject, body, f"{inboxes[number % connections]}.{number}")
        if number % 16 == 15:
            await asyncio.sleep(0.01)  # a fleet of clients does not start in one instant
    await done
    for wire in wires:
        wire.close()
    events: dict[str, list[tuple[float, bytes]]] = {}
    for chunks in readings:
        frames = Frames()
        for when, data in chunks:
            for reply, payload in frames.feed(data):
                events.setdefault(reply, []).append((when, payload))
    assert len(events) == streams
    return [_arrivals(of_stream, tokens) for of_stream in events.values()]


def _arrivals(events: list[tuple[float, bytes]], tokens: int) -> list[float]:
    times = [0.0] * tokens
    seen = 0
    for when, data in events:
        event = json.loads(data)
        if event["event"] == "tokens":
            for position in range(event["position"], event["position"] + len(event["ids"])):
                assert position == seen, f"a token is missing, doubled or out of order: {position} after {seen - 1}"
                times[position] = when
                seen += 1
    assert seen == tokens
    return times


# ---------------------------------------------------------------- the detokenizer alone: a log at one end, clients at the other


@dataclass(frozen=True)
class LogLoad:
    """`streams` requests of `tokens` tokens each, one a step, in `partitions`; their events go to `clients` inboxes."""

    model: str
    streams: int
    tokens: int
    partitions: int
    clients: int
    batched: bool
    vocab: int
    run: str

    def inbox(self, client: int) -> str:
        return f"bench.{self.run}.{client}"

    def reply(self, stream: int) -> m.ReplyTo:
        inbox = self.inbox(stream % self.clients)
        if self.batched:
            return m.ReplyTo(inbox, "msgpack", batched=True)
        return m.ReplyTo(f"{inbox}.{stream}", "json")

    def key(self, stream: int) -> str:
        return subjects.request_key("bench", f"{self.run}-{stream}")

    def keys_of(self, partition: int) -> list[tuple[int, str]]:
        keys = [(stream, self.key(stream)) for stream in range(self.streams)]
        return [(s, key) for s, key in keys if subjects.partition_of(key, self.partitions) == partition]


async def write_log(start: Start, url: str, load: LogLoad, partitions: list[int], window: int) -> dict[str, float]:
    """Plays scheduler and worker for some partitions: OPEN of every request, then a message for each step, as fast as they are
    stored."""
    nc = await connect(url)
    room = asyncio.Semaphore(window)
    messages: list[tuple[str, bytes]] = []
    opens: list[tuple[str, bytes]] = []
    for partition in partitions:
        subject = subjects.tok(load.model, partition)
        keys = load.keys_of(partition)
        for stream, key in keys:
            opens.append((subject, codec.encode(m.Open(key, load.reply(stream), 1, 8, load.tokens))))
        for step in range(load.tokens):
            finish = "length" if step == load.tokens - 1 else None
            entries = tuple(
                m.Tokens(key, 0, 1, step, codec.pack_ids([3 + (stream * 7919 + step * 31) % (load.vocab - 3)]), finish)
                for stream, key in keys
            )
            messages.append((subject, codec.encode(m.StepTokens("bench", step, entries))))
    by_step = [messages[at] for step in range(load.tokens) for at in range(step, len(messages), load.tokens)]
    inbox = nc.new_inbox()

    async def on_ack(msg: Msg) -> None:
        if b'"error"' in msg.data:
            raise RuntimeError(msg.data.decode())
        room.release()

    await nc.subscribe(f"{inbox}.*", cb=on_ack)
    await start.together()
    began = time.monotonic()
    for number, (subject, data) in enumerate(opens + by_step):
        await room.acquire()
        await nc.publish(subject, data, reply=f"{inbox}.{number}")
    for _ in range(window):
        await room.acquire()
    ended = time.monotonic()
    await nc.close()
    return dict(began=began, ended=ended, bytes=sum(len(data) for _, data in by_step))


async def count_tokens(start: Start, url: str, load: LogLoad, client: int) -> dict[str, Any]:
    """Takes the events of one inbox until each of its streams has finished."""
    nc = await connect(url)
    mine = len(range(client, load.streams, load.clients))
    done = asyncio.get_running_loop().create_future()
    tokens = repeated = received = 0
    first = 0.0
    inbox = load.inbox(client)
    lengths: dict[str, int] = {}
    finished: set[str] = set()

    async def on_message(msg: Msg) -> None:
        nonlocal tokens, repeated, first, received
        first = first or time.monotonic()
        received += 1
        events = msgpack.unpackb(msg.data) if load.batched else [json.loads(msg.data)]
        for event in events:
            if event["event"] == "tokens":
                # A new owner of a partition says again what its predecessor may not have said.
                known, end = lengths.get(event["id"], 0), event["position"] + len(event["ids"])
                new = max(0, end - known)
                tokens += new
                repeated += len(event["ids"]) - new
                lengths[event["id"]] = max(known, end)
            elif event["event"] == "finished":
                finished.add(event["id"])
                if len(finished) == mine and not done.done():
                    done.set_result(None)

    await nc.subscribe(inbox, cb=on_message, pending_msgs_limit=-1, pending_bytes_limit=-1)
    await nc.subscribe(f"{inbox}.*", cb=on_message, pending_msgs_limit=-1, pending_bytes_limit=-1)
    await nc.flush()
    await start.together()
    await done
    ended = time.monotonic()
    await nc.close()
    return dict(tokens=tokens, repeated=repeated, first=first, ended=ended, messages=received)


# ---------------------------------------------------------------- the tokenizer alone


async def accepted_rate(
    start: Start, url: str, model: str, requests: int, concurrency: int, prompt: str
) -> dict[str, float]:
    """Keeps `concurrency` requests under way until `requests` are accepted; the rest of their life is somebody else's."""
    nc = await connect(url)
    inbox = nc.new_inbox()
    sent = accepted = 0
    done = asyncio.get_running_loop().create_future()
    run_id = uuid.uuid4().hex[:12]

    async def send() -> None:
        nonlocal sent
        if sent < requests:
            body = json.dumps(dict(id=f"{run_id}-{sent}", tenant=f"t{sent % 16}", prompt=prompt, max_tokens=1)).encode()
            sent += 1
            await nc.publish(subjects.generate(model), body, reply=f"{inbox}.{sent}")

    async def on_event(msg: Msg) -> None:
        nonlocal accepted
        event = json.loads(msg.data)
        if event["event"] == "error":
            if not done.done():
                done.set_exception(RuntimeError(event["message"]))
        elif event["event"] == "accepted":
            accepted += 1
            if accepted == requests:
                done.set_result(None)
            await send()

    await nc.subscribe(f"{inbox}.*", cb=on_event, pending_msgs_limit=-1, pending_bytes_limit=-1)
    await start.together()
    began = time.monotonic()
    for _ in range(concurrency):
        await send()
    await done
    ended = time.monotonic()
    await nc.close()
    return dict(began=began, ended=ended, requests=requests)


# ---------------------------------------------------------------- one after the other


async def in_turn(
    start: Start, url: str, model: str, prompts: list[list[int]], output: int, run: str, pause: float
) -> list[float]:
    """Seconds from each publication to the first `tokens` event; the next request comes `pause` after the end of the last one."""
    nc = await connect(url)
    inbox = nc.new_inbox()
    events: asyncio.Queue[tuple[float, dict[str, Any]]] = asyncio.Queue()

    async def on_events(msg: Msg) -> None:
        now = time.monotonic()
        for event in msgpack.unpackb(msg.data):
            events.put_nowait((now, event))

    await nc.subscribe(inbox, cb=on_events)
    await nc.flush()
    await start.together()
    seconds = []
    for number, prompt in enumerate(prompts):
        body = dict(
            id=f"{run}-{number}", prompt=prompt, max_tokens=output, temperature=0.0, ignore_eos=True, batched=True
        )
        data, first = msgpack.packb(body), 0.0
        began = time.monotonic()
        await nc.publish(subjects.generate(model), data, reply=inbox)
        kind = ""
        while kind != "finished":
            now, event = await events.get()
            kind = event["event"]
            if kind == "error":
                raise RuntimeError(str(event))
            if kind == "tokens":
                first = first or now
        seconds.append(first - began)
        await asyncio.sleep(pause)
    await nc.close()
    return seconds


# ---------------------------------------------------------------- token ids in and out, as many as the worker gives


async def generate(
    start: Start, url: str, model: str, prompts: list[list[int]], outputs: list[int], temperature: float, run: str
) -> dict[str, Any]:
    """Publishes its requests at once and takes their events, in arrays, until each has ended."""
    nc = await connect(url)
    inbox = nc.new_inbox()
    first: dict[str, float] = {}
    tokens = ended = 0
    done = asyncio.get_running_loop().create_future()

    async def on_events(msg: Msg) -> None:
        nonlocal tokens, ended
        now = time.monotonic()
        for event in msgpack.unpackb(msg.data):
            kind = event["event"]
            if kind == "tokens":
                tokens += len(event["ids"])
                first.setdefault(event["id"], now)
            elif kind == "finished":
                ended += 1
                if ended == len(prompts):
                    done.set_result(now)
            elif kind != "accepted" and not done.done():
                done.set_exception(RuntimeError(str(event)))

    await nc.subscribe(inbox, cb=on_events, pending_msgs_limit=-1, pending_bytes_limit=-1)
    await nc.flush()
    bodies = [
        msgpack.packb(
            dict(
                id=f"{run}-{i}",
                prompt=prompt,
                max_tokens=count,
                temperature=temperature,
                seed=i,
                ignore_eos=True,
                batched=True,
            )
        )
        for i, (prompt, count) in enumerate(zip(prompts, outputs, strict=True))
    ]
    await start.together()
    began = time.monotonic()
    for body in bodies:
        await nc.publish(subjects.generate(model), body, reply=inbox)
    finish = await done
    await nc.close()
    return dict(began=began, ended=finish, tokens=tokens, first=[t - began for t in first.values()])
