"""The client against a scripted server, and against real detokenizers whose server dies. In virtual time."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from typing import Any

import msgpack
import pytest

from shared import api, subjects
from shared.bus import Message
from shared.client import Client
from shared.client_stream import Cursor
from shared.errors import ErrorCode, GorgonError
from shared.memory_bus import Faults, MemoryBroker, MemoryBus
from tests.protocol.detokenizer_world import MODEL, World
from tests.protocol.virtual import until, virtual

KEY = subjects.request_key(api.DEFAULT_TENANT, "r")
PARTITION = subjects.partition_of(KEY, 4)


class Script:
    """Plays tokenizer and detokenizer by hand. `asked` and `replays` are (time, body) of what came in."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.broker = MemoryBroker(1)
        self.bus = MemoryBus(self.broker)
        self.client = Client(MemoryBus(self.broker), MODEL, partitions=4, accept_timeout=10.0)
        self.asked: list[tuple[float, dict[str, Any]]] = []
        self.replays: list[tuple[float, dict[str, Any]]] = []
        self.inbox = ""
        self.on_request: Callable[[], None] = self.accept
        self.on_replay: Callable[[dict[str, Any]], None] = lambda body: None
        self._beacon: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Script:
        await self.bus.subscribe(subjects.generate(MODEL), self._request)
        await self.bus.subscribe(subjects.replay(MODEL, PARTITION), self._replay)
        await self.client.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.beacon(False)
        await self.client.close()

    def beacon(self, on: bool) -> None:
        if self._beacon is not None:
            self._beacon.cancel()
        self._beacon = self.loop.create_task(self._shine()) if on else None

    async def _shine(self) -> None:
        while True:
            self.bus.publish(subjects.beacon(MODEL, PARTITION), b"x")
            await asyncio.sleep(0.1)

    def _request(self, message: Message) -> None:
        self.inbox = message.reply
        self.asked.append((self.loop.time(), msgpack.unpackb(message.data)))
        self.on_request()

    def _replay(self, message: Message) -> None:
        self.inbox = message.reply
        body = msgpack.unpackb(message.data)
        self.replays.append((self.loop.time(), body))
        self.on_replay(body)

    def send(self, *events: dict[str, Any]) -> None:
        self.bus.publish(self.inbox, msgpack.packb(list(events)))

    def accept(self) -> None:
        replay = subjects.replay(MODEL, PARTITION)
        self.send(api.accepted_event("r", "default", prompt_tokens=1, seed=0, replay=replay, results=None))

    def refuse(self, code: ErrorCode, retry_after: float | None = None) -> None:
        self.send(api.error_event("r", GorgonError(code, "no", retry_after=retry_after)))

    def tokens(self, start: int, end: int) -> dict[str, Any]:
        """Of an endless text: token i is the letter i mod 26."""
        text = "".join(chr(97 + i % 26) for i in range(start, end))
        return api.tokens_event("r", 0, start, list(range(start, end)), text, start)

    def finished(self, count: int) -> dict[str, Any]:
        choice = dict(choice=0, finish_reason="length", stop=None, tokens=count, chars=count)
        return api.finished_event("r", [choice], prompt_tokens=1, completion_tokens=count, timings={}, metadata={})


@virtual
async def test_events_are_folded_once_whatever_their_order():
    async with Script() as script:
        script.on_replay = lambda body: script.send(
            script.tokens(body["cursors"][0]["position"], 6), script.finished(6)
        )
        stream = script.client.generate("x", id="r")
        await until(lambda: stream.accepted)
        script.send(script.tokens(0, 2))
        script.send(script.tokens(0, 2), script.tokens(1, 3))  # seen, and half seen
        script.send(script.tokens(4, 6))  # a gap: 3 is missing
        script.send(script.finished(6))  # too early
        deltas = [delta async for delta in stream]
        assert [(d.position, d.offset, d.ids, d.text) for d in deltas] == [
            (0, 0, [0, 1], "ab"),
            (2, 2, [2], "c"),
            (3, 3, [3, 4, 5], "def"),
        ]
        assert [body["cursors"][0]["position"] for _, body in script.replays] == [3]
        assert (await stream.text()) == "abcdef"
        script.send(script.finished(6))  # nobody minds
        await asyncio.sleep(1)
        assert [d async for d in stream] == []


@virtual
async def test_a_request_is_repeated_under_its_id_until_accepted():
    async with Script() as script:
        script.on_request = lambda: script.accept() if len(script.asked) == 3 else None
        stream = script.client.generate("x", id="r")
        await until(lambda: stream.accepted)
        assert [body["id"] for _, body in script.asked] == ["r"] * 3
        times = [time for time, _ in script.asked]
        assert times[1] - times[0] < times[2] - times[1] <= 2
        await asyncio.sleep(20)
        assert len(script.asked) == 3


@virtual
async def test_overload_is_waited_out_within_the_budget():
    async with Script() as script:
        script.on_request = lambda: (
            script.accept() if len(script.asked) == 2 else script.refuse(ErrorCode.OVERLOADED, 3.0)
        )
        stream = script.client.generate("x", id="r")
        await until(lambda: stream.accepted)
        assert script.asked[1][0] - script.asked[0][0] == pytest.approx(3.0, abs=0.1)


@pytest.mark.parametrize("refusal, code", [(ErrorCode.OVERLOADED, "overloaded"), (None, "unavailable")])
@virtual
async def test_a_request_that_nobody_accepts_fails_in_time(refusal, code):
    async with Script() as script:
        script.on_request = lambda: script.refuse(refusal) if refusal else None
        with pytest.raises(GorgonError) as caught:
            await script.client.generate("x", id="r").result()
        assert caught.value.code == code
        assert 5.0 <= script.loop.time() <= 10.2


@virtual
async def test_an_error_event_is_raised_once():
    async with Script() as script:
        script.on_request = lambda: script.refuse(ErrorCode.CONTEXT_LENGTH_EXCEEDED)
        stream = script.client.generate("x", id="r")
        with pytest.raises(GorgonError) as caught:
            async for _ in stream:
                pass
        assert caught.value.code == ErrorCode.CONTEXT_LENGTH_EXCEEDED
        script.send(script.tokens(0, 3), script.finished(3))
        with pytest.raises(GorgonError):
            await stream.result()
        assert len(script.asked) == 1


@virtual
async def test_a_bad_request_is_not_sent():
    async with Script() as script:
        with pytest.raises(GorgonError) as caught:
            script.client.generate("x", temperature=float("nan"))
        assert caught.value.code == ErrorCode.INVALID_REQUEST
        with pytest.raises(GorgonError, match="wrong"):
            script.client.generate("x", wrong=1)
        script.client.generate("x", id="r")
        with pytest.raises(ValueError, match="follows r already"):
            script.client.generate("x", id="r")


@virtual
async def test_what_can_be_no_name_is_refused_before_anything_is_sent():
    with pytest.raises(GorgonError, match="model"):
        Client(MemoryBus(MemoryBroker(1)), "no subject")
    async with Script() as script:
        with pytest.raises(GorgonError, match="id"):
            script.client.attach("no subject")
        for prompt in ("\udcff", [2**64]):  # of a terminal's bytes that are no text, and what no MessagePack can hold
            with pytest.raises(GorgonError) as caught:
                script.client.generate(prompt, id="r")  # type: ignore[arg-type]
            assert caught.value.code is ErrorCode.INVALID_REQUEST
        await asyncio.sleep(1.0)
        assert script.asked == []
        assert script.replays == []


@virtual
async def test_a_cancel_that_is_refused_is_no_cancel():
    async with Script() as script:
        event = api.error_event(None, GorgonError(ErrorCode.INVALID_REQUEST, "no id"))
        await script.bus.subscribe(
            subjects.cancel(MODEL), lambda message: script.bus.publish(message.reply, msgpack.packb(event))
        )
        with pytest.raises(GorgonError, match="no id"):
            await script.client.cancel("r")


@virtual
async def test_questions_on_silence_back_off_and_begin_anew_with_the_next_token():
    async with Script() as script:
        script.beacon(True)
        stream = script.client.generate("x", id="r")
        await until(lambda: stream.accepted)
        await asyncio.sleep(0.3)
        script.send(script.tokens(0, 1))
        script.on_replay = lambda body: script.send(api.tokens_event("r", 0, 1, [], "", 1))  # alive, no news
        began = script.loop.time()
        await asyncio.sleep(30)
        times = [time - began for time, _ in script.replays]
        gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
        assert gaps[0] == pytest.approx(0.3, abs=0.06)
        assert all(a <= b + 0.06 for a, b in itertools.pairwise(gaps))
        assert gaps[-1] == pytest.approx(5.0, abs=0.1)
        script.send(script.tokens(1, 2))
        before, asked = script.loop.time(), len(script.replays)
        await until(lambda: len(script.replays) > asked)
        assert script.loop.time() - before == pytest.approx(0.3, abs=0.06)


@virtual
async def test_a_queued_request_asks_rarely_while_its_partition_is_served_and_often_when_not():
    async with Script() as script:
        script.beacon(True)
        stream = script.client.generate("x", id="r")
        await asyncio.sleep(20)
        assert len(script.replays) <= 6
        served = len(script.replays)
        script.beacon(False)
        await asyncio.sleep(10)
        assert 15 <= len(script.replays) - served <= 25
        script.beacon(True)
        count = len(script.replays)
        await asyncio.sleep(0.2)
        assert len(script.replays) > count, "a new owner is asked at once"
        assert not stream.done


@virtual
async def test_the_late_refusal_of_a_first_attempt_is_not_believed():
    async with Script() as script:
        script.on_replay = lambda body: script.send(script.tokens(0, 1))
        stream = script.client.generate("x", id="r")
        await until(lambda: stream.accepted)
        script.refuse(ErrorCode.OVERLOADED)
        await asyncio.sleep(0.1)
        script.send(script.tokens(1, 2), script.finished(2))
        assert await stream.text() == "ab"


@virtual
async def test_late_refusals_of_several_attempts_are_not_believed_either():
    async with Script() as script:
        stream = script.client.generate("x", id="r")
        await until(lambda: stream.accepted)
        for code in (ErrorCode.UNAVAILABLE, ErrorCode.UNAVAILABLE, ErrorCode.STORAGE_FULL):
            script.refuse(code)
        await asyncio.sleep(0.1)
        assert script.replays, "it asks"
        script.send(script.tokens(0, 2), script.finished(2))
        assert await stream.text() == "ab"


@virtual
async def test_not_found_before_the_first_token_sends_the_request_again():
    async with Script() as script:
        script.on_replay = lambda body: script.refuse(ErrorCode.NOT_FOUND)
        stream = script.client.generate("x", id="r")
        await asyncio.sleep(10)
        assert not stream.done
        assert len(script.asked) == len(script.replays) + 1


@virtual
async def test_a_tokenizer_that_has_forgotten_the_id_is_believed_in_the_end():
    async with Script() as script:
        script.on_request = lambda: script.refuse(ErrorCode.NOT_FOUND)
        with pytest.raises(GorgonError) as failed:
            await script.client.generate("x", id="r").result()
        assert failed.value.code == ErrorCode.NOT_FOUND
        assert 3 <= len(script.asked) <= 8
        script.asked.clear()
        script.on_request = lambda: script.accept() if len(script.asked) > 2 else script.refuse(ErrorCode.NOT_FOUND)
        stream = script.client.generate("x", id="r")
        await until(lambda: stream.accepted)


@virtual
async def test_not_found_is_not_answered_without_a_pause():
    """An accepted request that nobody knows any more: partition and tokenizer say the same, and at once."""
    async with Script() as script:
        script.beacon(True)
        stream = script.client.generate("x", id="r")
        await until(lambda: stream.accepted)
        script.on_request = lambda: script.refuse(ErrorCode.NOT_FOUND)
        script.on_replay = lambda body: script.refuse(ErrorCode.NOT_FOUND)
        await asyncio.sleep(20.0)
        assert 4 <= len(script.asked) <= 20
        stream.abandon()


@pytest.mark.parametrize("cursor", [Cursor(0, 9, 6), Cursor(0, 6, 9)])
@virtual
async def test_cursors_beyond_the_end_are_told_so(cursor):
    async with Script() as script:
        script.on_replay = lambda body: script.send(script.finished(6))
        stream = script.client.attach("r", [cursor])
        stream.partition = PARTITION
        with pytest.raises(GorgonError, match="beyond the end") as failed:
            async with asyncio.timeout(10):
                await stream.result()
        assert failed.value.code == ErrorCode.INVALID_REQUEST


@virtual
async def test_not_found_is_believed_after_a_while_once_there_were_tokens_or_when_attaching():
    async with Script() as script:
        script.on_replay = lambda body: script.refuse(ErrorCode.NOT_FOUND)
        stream = script.client.attach("r")
        with pytest.raises(GorgonError) as caught:
            await stream.result()
        assert caught.value.code == ErrorCode.NOT_FOUND
        assert 3.0 <= script.loop.time() < 10.0
        assert all(body["attach"] for _, body in script.replays)


@virtual
async def test_who_attaches_where_nobody_is_hears_so_if_he_wishes():
    async with Script() as script:
        script.on_replay = lambda body: None
        stream = script.client.attach("r", silence=4.0)
        with pytest.raises(GorgonError) as caught:
            await stream.result()
        assert caught.value.code == ErrorCode.UNAVAILABLE
        assert 4.0 <= script.loop.time() < 10.0


@virtual
async def test_who_attaches_to_a_request_that_is_queued_may_wait_for_it():
    async with Script() as script:
        script.beacon(True)
        known = 30.0
        script.on_replay = lambda body: (
            script.refuse(ErrorCode.NOT_FOUND)
            if script.loop.time() < known
            else script.send(script.tokens(0, 2), script.finished(2))
        )
        stream = script.client.attach("r", wait=60.0, silence=10.0)
        stream.partition = PARTITION
        assert await stream.text() == "ab"
        assert known <= script.loop.time() < known + 6.0
        assert len(script.replays) <= 16, "it asks ever more seldom"


@virtual
async def test_what_breaks_one_stream_breaks_no_other():
    """Neither an event that cannot be understood nor a reader that raises; and silence is still met with questions afterwards."""

    def raises() -> None:
        raise RuntimeError("a reader's fault")

    async with Script() as script:
        other = api.accepted_event("o", "default", prompt_tokens=1, seed=0, replay="llm.v1.replay.m.0", results=None)
        script.on_request = lambda: script.send(other) if script.asked[-1][1]["id"] == "o" else script.accept()
        stream, broken = (script.client.generate("x", id=name, on_change=raises) for name in ("r", "o"))
        await until(lambda: stream.accepted and broken.accepted)
        script.send(dict(event="tokens", id="o", choice=0), script.tokens(0, 2))
        with pytest.raises(GorgonError, match="failed at this stream") as caught:
            await broken.result()
        assert caught.value.code == ErrorCode.INTERNAL
        script.on_replay = lambda body: script.send(script.tokens(2, 4), script.finished(4))
        assert (await stream.text()) == "abcd"


@virtual
async def test_closing_the_client_ends_its_streams():
    async with Script() as script:
        stream = script.client.generate("x", id="r")
        await script.client.close()
        with pytest.raises(GorgonError) as caught:
            await stream.result()
        assert caught.value.code == ErrorCode.UNAVAILABLE


# ---------------------------------------------------------------- against real detokenizers


@virtual
async def test_attach_goes_on_in_another_process_from_where_the_first_stood():
    async with World() as world, world.client() as first, world.client() as second:
        await world.detokenizer("a")
        plan = world.plan("r", choices=[list(range(52)) * 2, list(range(52))])
        stream = first.generate("x", id="r", n=2)
        await asyncio.sleep(1.0)
        cursors = stream.cursors
        assert [c.position for c in cursors] > [0, 0]
        rest = second.attach("r", cursors)
        result = await rest.result()
        for cursor, choice, index in zip(cursors, result.choices, (0, 1), strict=True):
            ids, text, reason, _ = plan.expected(index)
            assert (choice.ids, choice.text) == (ids[cursor.position :], text[cursor.offset :])
            assert choice.finish_reason == reason
        # Recently ended, from the beginning:
        again = await second.attach("r").result()
        assert [c.ids for c in again.choices] == plan.choices
        assert cursors[0] != Cursor()


@pytest.mark.parametrize("seed", range(6))
@virtual
async def test_streams_survive_the_death_of_the_server(seed):
    faults = Faults(drop=0.02, delay=0.02, max_reconnect=0.4)
    async with World(seed, faults) as world, world.client(accept_timeout=60) as client:
        await world.detokenizer("a")
        await world.detokenizer("b")
        plans = {f"r{i}": world.random_plan(f"r{i}") for i in range(16)}
        for plan in plans.values():
            plan.choices = [ids[:-1] * 4 + ids[-1:] for ids in plan.choices]
        streams = {name: client.generate("x", id=name, n=len(plan.choices)) for name, plan in plans.items()}
        checks = asyncio.gather(*(world.check(streams[name], plan) for name, plan in plans.items()))
        for _ in range(3):
            await asyncio.sleep(world.random.uniform(0.1, 0.6))
            world.broker.kill()
            await asyncio.sleep(world.random.uniform(0.1, 2.0))
            world.broker.restart()
        await checks


@virtual
async def test_without_replay_a_lossy_bus_breaks_streams():
    """The negative control: it is the questions that make the streams whole."""
    async with World(1, Faults(drop=0.05)) as world, world.client() as client:
        client.ask_replay = lambda stream: None  # type: ignore[method-assign]
        await world.detokenizer("a")
        for i in range(8):
            world.plan(f"r{i}", choices=[[1] * 60])
        streams = [client.generate("x", id=f"r{i}") for i in range(8)]
        await asyncio.sleep(60)
        assert not all(stream.done for stream in streams)


@virtual
async def test_the_clients_body_is_what_the_public_contract_says():
    async with Script() as script:
        script.client.generate(messages=[{"role": "user", "content": "hi"}], id="r", max_tokens=3, stop=["x"])
        await until(lambda: script.asked)
        request = api.parse_request(script.asked[0][1])
        assert (request.id, request.max_tokens, request.stop, request.batched) == ("r", 3, ["x"], True)
        assert json.dumps(script.asked[0][1])


# ---------------------------------------------------------------- tool calls

CALL = 'Hm.\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
TOOLS = dict(tools=[{"type": "function", "function": {"name": "f"}}])
MESSAGES = [{"role": "user", "content": "x"}]


def accept_tools(script: Script) -> dict[str, Any]:
    replay = subjects.replay(MODEL, PARTITION)
    fields = dict(prompt_tokens=1, seed=0, replay=replay, results=None, tool_format="hermes")
    return api.accepted_event("r", "default", **fields)  # type: ignore[arg-type]


def piece_of(text: str, start: int, end: int) -> dict[str, Any]:
    return api.tokens_event("r", 0, start, list(range(start, end)), text[start:end], start)


def end_of(text: str, **more: Any) -> dict[str, Any]:
    end = dict(choice=0, finish_reason="tool_calls", stop=None, tokens=len(text), chars=len(text)) | more
    return api.finished_event("r", [end], prompt_tokens=1, completion_tokens=1, timings={}, metadata={})


@pytest.mark.parametrize("accepted", ["first", "late", "lost"])
@virtual
async def test_tool_calls_come_in_deltas_and_in_the_result(accepted: str):
    async with Script() as script:
        script.on_request = lambda: None
        stream = script.client.generate(messages=MESSAGES, id="r", **TOOLS)
        await until(lambda: script.asked)
        half = len(CALL) // 2
        calls = [{"id": "abc", "name": "f", "arguments": '{"x": 1}'}]
        events = [
            piece_of(CALL, 0, half),
            piece_of(CALL, half, len(CALL)),
            end_of(CALL, tool_calls=calls, content="Hm."),
        ]
        if accepted != "lost":
            events.insert(accepted == "late", accept_tools(script))
        script.send(*events)
        deltas = [delta async for delta in stream]
        assert "".join(delta.text for delta in deltas) == CALL
        assert "".join(delta.content for delta in deltas) == "Hm."
        said = [call for delta in deltas for call in delta.tool_calls]
        assert [call.name for call in said if call.name] == ["f"]
        assert "".join(call.arguments for call in said) == '{"x": 1}'
        (choice,) = (await stream.result()).choices
        assert (choice.text, choice.content, choice.finish_reason) == (CALL, "Hm.", "tool_calls")
        assert [(call.name, call.arguments, call.error) for call in choice.tool_calls] == [("f", '{"x": 1}', None)]


@virtual
async def test_what_was_held_back_comes_at_the_end():
    """Of text that might have become a call, also when the request is cancelled."""
    told = [dict(choice=0, tokens=6, chars=6)]
    cancelled = api.cancelled_event("r", prompt_tokens=1, completion_tokens=6, metadata={}, choices=told)
    for end in (end_of("<tool_"), cancelled):
        async with Script() as script:
            script.on_request = lambda: None
            stream = script.client.generate(messages=MESSAGES, id="r", **TOOLS)
            await until(lambda: script.asked)
            script.send(accept_tools(script), piece_of("<tool_", 0, 6), end)
            deltas = [delta async for delta in stream]
            assert [(delta.text, delta.content) for delta in deltas] == [("<tool_", ""), ("", "<tool_")]


@virtual
async def test_without_tools_content_is_the_text():
    async with Script() as script:
        stream = script.client.generate("x", id="r")
        await until(lambda: stream.accepted)
        script.send(piece_of(CALL, 0, len(CALL)), end_of(CALL, finish_reason="stop"))
        (delta,) = [delta async for delta in stream]
        assert delta.content == delta.text == CALL
        (choice,) = (await stream.result()).choices
        assert (choice.content, choice.tool_calls) == (CALL, [])
