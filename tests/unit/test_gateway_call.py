"""A call that reads a scripted request: tool calls as OpenAI's client folds them, whole, streamed, and gone on with anywhere."""

from __future__ import annotations

import asyncio
import gc
import json
import weakref
from typing import Any, cast

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from services.gateway.call import Call
from services.gateway.cursor import Cursor, parse_cursor
from services.gateway.errors import ApiError
from services.gateway.generation import Generation, Generations
from services.gateway.render import ChatRenderer, CompletionRenderer
from services.gateway.sse import Bell
from services.gateway.vocabulary import Vocabulary
from shared.client_stream import Delta, Stream
from shared.memory_bus import MemoryBroker, MemoryBus

BASE = "a" * 32
SAID = (
    'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich", "days": [1, 2]}}\n</tool_call>'
    '\n<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
)


class Script:
    """Stands for the client's stream: what has come of the request so far."""

    def __init__(self, accepted: dict[str, Any] | None, end: dict[str, Any] | None) -> None:
        self.accepted = accepted
        self.ending = end
        self.known = True
        self.body: dict[str, Any] | None = {}
        self.news: list[Delta] = []

    def take_deltas(self) -> list[Delta]:
        news, self.news = self.news, []
        return news


def deltas(text: str, size: int) -> list[Delta]:
    """One token a character, `size` in an event."""
    return [Delta(0, i, [5] * len(text[i : i + size]), text[i : i + size], i) for i in range(0, len(text), size)]


def finished(reason: str, **more: Any) -> dict[str, Any]:
    usage = dict(prompt_tokens=3, completion_tokens=len(SAID), total_tokens=3 + len(SAID), cached_tokens=2)
    end = dict(choice=0, finish_reason=reason, stop=None, tokens=len(SAID), chars=len(SAID)) | more
    return dict(event="finished", id=BASE, choices=[end], usage=usage)


def call_of(
    script: Script,
    news: list[Delta],
    cursor: Cursor,
    *,
    tools: bool = True,
    echo: bool = False,
    logprobs: int | None = None,
) -> tuple[Call, Generation]:
    renderer: ChatRenderer | CompletionRenderer
    kind = CompletionRenderer if echo else ChatRenderer
    renderer = kind(BASE, 1, "m", include_usage=False, logprobs=logprobs)
    script.news = news
    generation = Generation("t", BASE, None, False)
    generation.follow(cast(Stream, script))
    bus = MemoryBus(MemoryBroker(1))
    vocabulary = Vocabulary(bus, "m")
    vocabulary.pieces |= {token: f"<{token}>".encode() for token in range(10)}
    call = Call(cast(Generations, None), renderer, cursor, vocabulary, tools=tools, echo=echo)
    call.read(generation, 0)
    return call, generation


async def stream_of(call: Call) -> str:
    """All of it, taken as sse.Live does."""
    bell, pieces, last = Bell(), [], False
    call.on_news(bell.ring)
    while True:
        data, last = await call.take()
        pieces.append(data)
        if last:
            return b"".join(pieces).decode()
        await bell.wait()
        while (now := call.take_now()) is not None:
            pieces.append(now)
            await bell.wait()


async def chunks_of(call: Call) -> list[tuple[str, dict[str, Any]]]:
    """(event id, chunk)"""
    found = []
    blocks = (await stream_of(call)).split("\n\n")
    assert blocks[-2] == "data: [DONE]"
    for block in blocks[:-2]:
        name, data = block.split("\n")
        found.append((name.removeprefix("id: "), json.loads(data.removeprefix("data: "))))
    return found


def fold(chunks: list[dict[str, Any]]) -> tuple[str, list[tuple[str, str, str]], str | None]:
    """As OpenAI's client does: content, calls by index, finish reason."""
    content, calls, reason = "", {}, None
    for chunk in chunks:
        (choice,) = ChatCompletionChunk.model_validate(chunk).choices
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or ():
            assert call.function is not None
            known = calls.setdefault(call.index, [call.id, call.function.name, ""])
            known[2] += call.function.arguments or ""
        reason = choice.finish_reason or reason
    return content, [cast(tuple[str, str, str], tuple(calls[i])) for i in sorted(calls)], reason


ACCEPTED = dict(event="accepted", prompt_tokens=3, tool_format="hermes")


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
async def test_tool_calls_whole_streamed_and_resumed(size: int) -> None:
    call, _ = call_of(Script(ACCEPTED, finished("tool_calls")), deltas(SAID, size), Cursor(BASE, 1))
    answer = ChatCompletion.model_validate(await call.whole())
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me see."
    told = [
        (c.id, c.function.name, c.function.arguments) for c in choice.message.tool_calls or [] if c.type == "function"
    ]
    assert [(name, json.loads(arguments)) for _, name, arguments in told] == [
        ("weather", {"city": "Zürich", "days": [1, 2]}),
        ("time", {}),
    ]
    call, _ = call_of(Script(ACCEPTED, finished("tool_calls")), deltas(SAID, size), Cursor(BASE, 1))
    chunks = await chunks_of(call)
    wanted = ("Let me see.", told, "tool_calls")
    assert fold([chunk for _, chunk in chunks]) == wanted
    for cut in range(1, len(chunks) + 1):
        # At another gateway, which hears nothing of the acceptance and gets the text in other pieces.
        cursor = parse_cursor(chunks[cut - 1][0])
        rest, _ = call_of(Script(None, finished("tool_calls")), deltas(SAID, 5), cursor)
        assert fold([c for _, c in chunks[:cut]] + [c for _, c in await chunks_of(rest)]) == wanted, cut


async def test_text_waits_until_the_format_is_known() -> None:
    script = Script(None, None)
    call, generation = call_of(script, deltas(SAID, 4), Cursor(BASE, 1))
    reading = asyncio.create_task(chunks_of(call))
    await asyncio.sleep(0)
    script.accepted = ACCEPTED
    generation.on_change()
    await asyncio.sleep(0)
    script.ending = finished("tool_calls")
    generation.on_change()
    content, calls, _ = fold([chunk for _, chunk in await reading])
    assert content == "Let me see." and len(calls) == 2


async def test_the_end_tells_the_format_where_the_acceptance_was_lost() -> None:
    call, _ = call_of(Script(ACCEPTED, finished("tool_calls")), deltas(SAID, 4), Cursor(BASE, 1))
    content, calls, _ = fold([chunk for _, chunk in await chunks_of(call)])
    named = [dict(id=i, name=name, arguments=arguments) for i, name, arguments in calls]
    lost = Script(None, finished("tool_calls", tool_calls=named, content=content))
    call, _ = call_of(lost, deltas(SAID, 4), Cursor(BASE, 1))
    assert fold([chunk for _, chunk in await chunks_of(call)])[:2] == (content, calls)


async def test_no_calls_without_tools() -> None:
    call, _ = call_of(Script(ACCEPTED, finished("stop")), deltas(SAID, 4), Cursor(BASE, 1), tools=False)
    assert fold([chunk for _, chunk in await chunks_of(call)]) == (SAID, [], "stop")


async def test_the_prompt_goes_first_whichever_comes_first() -> None:
    script = Script(ACCEPTED, None)
    call, generation = call_of(script, deltas(SAID, 50), Cursor(BASE, 1), echo=True, tools=False)
    reading = asyncio.create_task(chunks_of(call))
    await asyncio.sleep(0)
    script.news = [Delta(-1, 0, [1, 2, 3], "Prompt: ", 0)]
    generation.on_change()
    script.ending = finished("stop")
    generation.on_change()
    assert "".join(chunk["choices"][0]["text"] for _, chunk in await reading) == "Prompt: " + SAID


async def test_echoed_logprobs_go_on_after_any_event() -> None:
    """A stream that broke off says the same as one that did not: the places of its tokens count from the prompt's beginning."""

    def told(choice: int, ids: list[int], position: int, offset: int) -> Delta:
        rows = [dict(id=i, logprob=-1.0, top=[]) for i in ids]
        return Delta(choice, position, ids, "".join(f"<{i}>" for i in ids), offset, rows)

    def news(size: int) -> list[Delta]:
        ids = [4, 5, 6, 7, 8]
        return [told(-1, [1, 2, 3], 0, 0)] + [told(0, ids[i : i + size], i, 3 * i) for i in range(0, 5, size)]

    def offsets(chunks: list[tuple[str, dict[str, Any]]]) -> list[int]:
        rows = [chunk["choices"][0]["logprobs"] for _, chunk in chunks]
        return [offset for row in rows if row for offset in row["text_offset"]]

    end = finished("stop")
    call, _ = call_of(Script(ACCEPTED, end), news(1), Cursor(BASE, 1), echo=True, tools=False, logprobs=0)
    chunks = await chunks_of(call)
    assert offsets(chunks) == list(range(0, 24, 3))
    for cut in range(1, len(chunks) + 1):
        cursor = parse_cursor(chunks[cut - 1][0])
        rest, _ = call_of(Script(None, end), news(3), cursor, echo=True, tools=False, logprobs=0)
        assert offsets(chunks[:cut] + await chunks_of(rest)) == list(range(0, 24, 3)), cut


async def test_a_failure_is_the_streams_last_event() -> None:
    script = Script(ACCEPTED, dict(event="error", id=BASE, code="deadline_exceeded", message="too late"))
    call, _ = call_of(script, deltas(SAID, 50), Cursor(BASE, 1), tools=False)
    blocks = (await stream_of(call)).split("\n\n")
    assert json.loads(blocks[-2].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert SAID.startswith(json.loads(blocks[0].split("data: ")[1])["choices"][0]["delta"]["content"])
    with pytest.raises(ApiError, match="too late"):
        await call.whole()


async def test_a_call_that_is_closed_is_freed_without_a_collection() -> None:
    """With it go its request's tokens: a collection of the oldest objects may be hours away."""

    class Reader:
        def __init__(self, call: Call) -> None:
            self.call = call

        def on_news(self) -> None: ...

    class Left:
        def leave(self, generation: Generation) -> None: ...

    gc.disable()
    try:
        call, _ = call_of(Script({}, None), [], Cursor(BASE, 1))
        call._generations = cast(Generations, Left())
        call.on_news(Reader(call).on_news)
        call.close()
        freed = weakref.ref(call)
        del call
        assert freed() is None
    finally:
        gc.enable()
