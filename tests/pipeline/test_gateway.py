"""The OpenAI door as its users see it: the official client, and raw HTTP where that hides something."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI, BadRequestError
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from prometheus_client.parser import text_string_to_metric_families

from services.cli import DEMO_MODEL
from shared.client import Client
from tests.pipeline.harness import Deployment, deployed
from tests.pipeline.http_client import Event, call

pytestmark = [pytest.mark.asyncio(loop_scope="module")]
MODEL = "demo"
MESSAGES: list[Any] = [{"role": "user", "content": "Good morning, captain."}]
PROMPT = "It was a dark night, and the old captain"
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def deployment(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Deployment]:
    flags = {"tokenizer": ["--tool-format", "hermes"]}  # the demo model's template shows none
    folder = tmp_path_factory.mktemp("gateway")
    async with deployed(folder, MODEL, DEMO_MODEL, flags, {"gateway": 1}) as deployment:
        yield deployment


@pytest.fixture
def port(deployment: Deployment) -> int:
    return deployment.supervisor.plan.http_port


@pytest_asyncio.fixture(loop_scope="module")
async def client(deployment: Deployment, port: int) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        yield client
    await deployment.until_idle()


async def expected(deployment: Deployment, prompt: str = PROMPT, **params: Any) -> str:
    """The text by Gorgon's own client."""
    async with Client(deployment.bus, MODEL) as client:
        return await client.generate(prompt, **params).text()


# ---------------------------------------------------------------- the official client


async def test_models(client: AsyncOpenAI) -> None:
    assert [m.id async for m in client.models.list()] == [MODEL]
    assert (await client.models.retrieve(MODEL)).owned_by == "gorgon"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("nobody")


async def test_chat(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=12, temperature=0)
    assert isinstance(answer, ChatCompletion)
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.id == f"chatcmpl-{answer._request_id}"


async def test_usage_tells_what_the_prefix_cache_had(client: AsyncOpenAI) -> None:
    prompt = "Whoever has told this tale before begins it with the same words. " * 5
    told = []
    for _ in range(2):
        answer = await client.completions.create(model=MODEL, prompt=[prompt, "Once"], max_tokens=2)
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        told.append((answer.usage.prompt_tokens, answer.usage.prompt_tokens_details.cached_tokens))
    (length, first), (_, second) = told
    assert first == 0 and second is not None and second % 16 == 0 and length - 40 < second < length


async def test_chat_stream_says_the_same(client: AsyncOpenAI) -> None:
    params: dict[str, Any] = dict(model=MODEL, messages=MESSAGES, max_tokens=30, seed=5, temperature=0.8)
    whole = await client.chat.completions.create(**params)
    stream = await client.chat.completions.create(**params, stream=True, stream_options={"include_usage": True})
    chunks: list[ChatCompletionChunk] = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len(chunks) > 10, "it streams"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1


async def test_three_choices_with_a_seed(client: AsyncOpenAI) -> None:
    params: dict[str, Any] = dict(model=MODEL, messages=MESSAGES, max_tokens=16, n=3, seed=11, temperature=1.0)
    whole = await client.chat.completions.create(**params)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    streamed = ["", "", ""]
    async for chunk in await client.chat.completions.create(**params, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


async def test_chat_logprobs(client: AsyncOpenAI) -> None:
    params: dict[str, Any] = dict(
        model=MODEL, messages=MESSAGES, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3
    )
    whole = await client.chat.completions.create(**params)
    assert whole.choices[0].logprobs is not None and whole.usage is not None
    content = whole.choices[0].logprobs.content or []
    assert len(content) == whole.usage.completion_tokens
    text = whole.choices[0].message.content or ""
    assert b"".join(bytes(entry.bytes or []) for entry in content).decode().startswith(text)
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob), "greedy"
    streamed = [
        entry
        async for chunk in await client.chat.completions.create(**params, stream=True)
        for choice in chunk.choices
        if choice.logprobs
        for entry in choice.logprobs.content or []
    ]
    assert [e.token for e in streamed] == [e.token for e in content]


async def test_completion(client: AsyncOpenAI, deployment: Deployment) -> None:
    params: dict[str, Any] = dict(max_tokens=20, temperature=0)
    answer = await client.completions.create(model=MODEL, prompt=PROMPT, **params)
    assert isinstance(answer, Completion)
    assert answer.choices[0].text == await expected(deployment, **params)
    assert (await client.completions.create(model=MODEL, prompt=PROMPT, temperature=0)).usage.completion_tokens <= 16  # type: ignore[union-attr]


async def test_several_prompts_as_text_and_ids(client: AsyncOpenAI, deployment: Deployment) -> None:
    prompts = [[5, 6, 7], [9, 10]]
    answer = await client.completions.create(model=MODEL, prompt=prompts, n=2, max_tokens=5, seed=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None and answer.usage.prompt_tokens == 5
    texts = ["The ship", "A storm"]
    answer = await client.completions.create(model=MODEL, prompt=texts, max_tokens=8, temperature=0)
    assert [choice.text for choice in answer.choices] == [
        await expected(deployment, text, max_tokens=8, temperature=0) for text in texts
    ]
    streamed = ["", ""]
    async for chunk in await client.completions.create(
        model=MODEL, prompt=texts, max_tokens=8, temperature=0, stream=True
    ):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == [choice.text for choice in answer.choices]


async def test_completion_logprobs(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=10, temperature=0, logprobs=2)
    logprobs, text = answer.choices[0].logprobs, answer.choices[0].text
    assert logprobs is not None
    assert logprobs.tokens and logprobs.token_logprobs and logprobs.top_logprobs and logprobs.text_offset
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert text[offset:].startswith(token) or offset >= len(text)
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert top[token] == logprob == max(top.values())


async def test_echo(client: AsyncOpenAI) -> None:
    plain = await client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=6, temperature=0)
    echoed = await client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=6, temperature=0, echo=True)
    assert echoed.choices[0].text == PROMPT + plain.choices[0].text
    only = await client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=0, echo=True)
    assert only.choices[0].text == PROMPT and only.usage is not None and only.usage.completion_tokens == 0
    parts = [
        chunk.choices[0].text
        async for chunk in await client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=6, temperature=0, echo=True, stream=True
        )
    ]
    assert parts[0].startswith(PROMPT) and "".join(parts) == echoed.choices[0].text


async def test_echoed_logprobs_as_evaluations_ask_for_them(client: AsyncOpenAI, deployment: Deployment) -> None:
    """Prompts as ids, nothing or one token to generate: the log-probabilities of a continuation are those of its generation."""
    async with Client(deployment.bus, MODEL) as own:
        generated = await own.generate(PROMPT, max_tokens=8, temperature=0, logprobs=0, echo=True).result()
    assert generated.prompt is not None
    ids, choice = generated.prompt.ids + generated.choices[0].ids, generated.choices[0]
    for max_tokens, n in ((0, 1), (1, 2)):
        options: Any = dict(model=MODEL, prompt=[ids, ids[:5]], max_tokens=max_tokens, temperature=0, n=n, echo=True)
        answer = await client.completions.create(**options, logprobs=1)
        assert len(answer.choices) == 2 * n
        for index, echoed in enumerate(answer.choices):
            logprobs, length = echoed.logprobs, len(ids) if index < n else 5
            assert logprobs is not None and logprobs.token_logprobs and logprobs.tokens and logprobs.top_logprobs
            assert len(logprobs.tokens) == len(logprobs.token_logprobs) == length + max_tokens
            assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
            assert all(len(top) >= 1 for top in logprobs.top_logprobs[1:])
            if length == len(ids):
                told = logprobs.token_logprobs[length - 8 : length]
                assert told == pytest.approx([entry["logprob"] for entry in choice.logprobs], abs=1e-3)
                assert [max(top.values()) for top in logprobs.top_logprobs[length - 8 : length]] == told, "greedy"
        streamed = [c async for c in await client.completions.create(**options, logprobs=1, stream=True)]
        rows: dict[int, list[Any]] = {}
        for chunk in streamed:
            for part in chunk.choices:
                rows.setdefault(part.index, []).extend(part.logprobs.token_logprobs or [] if part.logprobs else [])
        for echoed in answer.choices:
            assert echoed.logprobs is not None and echoed.logprobs.token_logprobs is not None
            first, *others = echoed.logprobs.token_logprobs
            assert rows[echoed.index][0] is first is None and rows[echoed.index][1:] == pytest.approx(others, abs=1e-3)


async def test_logprobs_of_the_prompt(client: AsyncOpenAI) -> None:
    """As the harnesses ask that measure likelihoods: the prompt's own log-probabilities, whole and streamed alike."""
    params: dict[str, Any] = dict(model=MODEL, prompt=PROMPT, echo=True, logprobs=2, temperature=0)
    whole = await client.completions.create(**params, max_tokens=3)
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens and logprobs.token_logprobs and logprobs.top_logprobs
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    assert all(value is not None and value <= 0 for value in logprobs.token_logprobs[1:])
    assert whole.usage is not None
    assert len(logprobs.tokens) == whole.usage.prompt_tokens + whole.usage.completion_tokens
    text = whole.choices[0].text
    assert text.startswith(PROMPT)
    for token, offset in zip(logprobs.tokens[1:], logprobs.text_offset or [], strict=False):
        assert offset == 0 or token in text
    only = await client.completions.create(**params, max_tokens=0)
    assert only.choices[0].logprobs is not None
    assert only.choices[0].logprobs.tokens == logprobs.tokens[: whole.usage.prompt_tokens]
    streamed: list[str] = []
    async for chunk in await client.completions.create(**params, max_tokens=3, stream=True):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.tokens or []
    assert streamed == logprobs.tokens


async def test_json_schema(client: AsyncOpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    params: dict[str, Any] = dict(model=MODEL, messages=MESSAGES, max_tokens=200, response_format=wanted, seed=4)
    answer = await client.chat.completions.create(**params)
    person = json.loads(answer.choices[0].message.content or "")
    assert set(person) == {"name", "age"} and isinstance(person["age"], int)
    text = ""
    async for chunk in await client.chat.completions.create(**params, stream=True):
        text += chunk.choices[0].delta.content or ""
    assert json.loads(text) == person
    schema["properties"]["name"] = {"type": "array", "uniqueItems": True}
    with pytest.raises(BadRequestError) as refused:
        await client.chat.completions.create(**params)
    assert refused.value.param == "response_format" and "response_format: " in refused.value.message
    structured = dict(model=MODEL, messages=MESSAGES, extra_body={"structured": {"regex": "(["}})
    with pytest.raises(BadRequestError) as refused:
        await client.chat.completions.create(**structured)
    assert refused.value.param == "structured"


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
async def test_tools(client: AsyncOpenAI, choice: Any) -> None:
    params: dict[str, Any] = dict(model=MODEL, messages=MESSAGES, tools=[WEATHER], tool_choice=choice, max_tokens=300)
    params |= dict(seed=3, parallel_tool_calls=False)
    whole = (await client.chat.completions.create(**params)).choices[0]
    assert whole.finish_reason == "tool_calls" and whole.message.content is None
    (call,) = whole.message.tool_calls or []
    assert call.type == "function" and call.function.name == "weather"
    assert set(json.loads(call.function.arguments)) == {"city", "days"}
    async with client.chat.completions.stream(**params) as stream:
        async for _ in stream:
            pass
        folded = (await stream.get_final_completion()).choices[0]
    assert folded.finish_reason == "tool_calls" and not folded.message.content
    (again,) = folded.message.tool_calls or []
    assert again.id and again.id != call.id and again.function.name == "weather"
    assert again.function.arguments == call.function.arguments


async def test_tools_that_nobody_calls(client: AsyncOpenAI) -> None:
    params: dict[str, Any] = dict(model=MODEL, messages=MESSAGES, tools=[WEATHER], max_tokens=10, temperature=0)
    for choice in ("auto", "none"):
        answer = (await client.chat.completions.create(**params, tool_choice=choice)).choices[0]
        assert answer.message.content and not answer.message.tool_calls


async def test_stop(client: AsyncOpenAI, deployment: Deployment) -> None:
    text = await expected(deployment, max_tokens=40, temperature=0)
    stop = text[len(text) // 2 :][:5]
    answer = await client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=40, temperature=0, stop=stop)
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


async def test_cancel_by_leaving(client: AsyncOpenAI, deployment: Deployment) -> None:
    stream = await client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    async for _ in stream:
        break
    await stream.close()
    async with asyncio.timeout(5):
        await deployment.until_idle()


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("wrong", "status", "param", "code"),
    [
        ({"model": "nobody"}, 404, "model", "model_not_found"),
        ({"n": 0}, 400, "n", "invalid_request"),
        ({"max_tokens": "3"}, 400, "max_tokens", "invalid_type"),
        ({"user": "x" * 5000}, 400, "user", "invalid_request"),
        ({"temperature": -1}, 400, "temperature", "invalid_request"),
        ({"nonsense": 1}, 400, "nonsense", "unknown_parameter"),
        ({"seed": 10**30}, 400, "seed", "invalid_request"),
        ({"suffix": "x"}, 400, "suffix", "unsupported_value"),
        ({"prompt": []}, 400, "prompt", None),
        ({"prompt": "\ud800"}, 400, None, None),
        ({"max_tokens": 100_000}, 400, None, "context_length_exceeded"),
        ({"prompt": [10_000_000]}, 400, "prompt", "invalid_request"),
        ({"prompt": [[5], [1 << 70]]}, 400, "prompt", "invalid_request"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "unsupported_value"),
        ({"stream": True, "stream_options": {"foo": True}}, 400, "stream_options", "unknown_parameter"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_wrong_requests(
    port: int, deployment: Deployment, wrong: dict[str, Any], status: int, param: str, code: str, stream: bool
) -> None:
    if stream and "stream_options" in wrong:
        return
    body = {"model": MODEL, "prompt": "x", "stream": stream} | wrong
    answer = await call(port, TEXT, body)
    error = (await answer.body())["error"]
    assert (answer.status, error["param"], error["code"]) == (status, param, code), error
    assert set(error) == {"message", "type", "param", "code"} and error["message"]


async def test_other_errors(port: int, client: AsyncOpenAI) -> None:
    for body, status in ((b"{", 400), (b"[]", 400), (b"", 400), (b'{"model": "demo"}', 400)):
        answer = await call(port, CHAT, body)
        assert (answer.status, list(await answer.body())) == (status, ["error"])
    answer = await call(port, CHAT, {"model": MODEL, "messages": MESSAGES}, {"Content-Type": "text/plain"})
    assert answer.status == 400 and "Content-Type" in (await answer.body())["error"]["message"]
    answer = await call(port, "/v1/nowhere")
    assert (answer.status, list(await answer.body())) == (404, ["error"])
    answer = await call(port, CHAT, b" " * (4 * 2**20 + 1))
    assert (answer.status, (await answer.body())["error"]["code"]) == (413, "payload_too_large")
    with pytest.raises(openai.BadRequestError, match="embeddings"):
        await client.embeddings.create(model=MODEL, input="x")
    unknown = {"role": "pirate", "content": "x"}
    with pytest.raises(openai.BadRequestError, match="unknown role"):
        await client.chat.completions.create(model=MODEL, messages=[unknown])  # type: ignore[list-item]


@pytest.mark.parametrize("stream", [False, True])
async def test_deadline(port: int, stream: bool) -> None:
    body = dict(model=MODEL, prompt=PROMPT, max_tokens=900, stream=stream, ignore_eos=True)
    answer = await call(port, TEXT, body, {"X-Request-Timeout": "0.3"})
    if stream:
        events = [event async for event in answer.events()]
        assert "error" in events[-1].json and events[-1].json["error"]["code"] == "deadline_exceeded"
    else:
        assert (answer.status, (await answer.body())["error"]["code"]) == (504, "deadline_exceeded")
    answer = await call(port, TEXT, body, {"X-Request-Timeout": "soon"})
    assert answer.status == 400


async def test_operation(port: int) -> None:
    assert (await call(port, "/health")).status == 200
    ready = await call(port, "/ready")
    assert (ready.status, (await ready.body())["models"]) == (200, [MODEL])
    assert (await call(port, TEXT, dict(model=MODEL, prompt=PROMPT, max_tokens=1))).status == 200
    metrics = b"".join([chunk async for chunk in (await call(port, "/metrics")).chunks()]).decode()
    samples = {s.name: s.labels for family in text_string_to_metric_families(metrics) for s in family.samples}
    route = samples["gorgon_gateway_requests_total"]
    assert (route["stage"], route["model"]) == ("gateway", MODEL) and route["instance"].startswith("gateway-1")
    assert {
        "gorgon_ready",
        "gorgon_load_ratio",
        "gorgon_gateway_in_flight",
        "process_cpu_seconds_total",
    } <= samples.keys()
    schema = await (await call(port, "/openapi.json")).body()
    assert CHAT in schema["paths"]


# ---------------------------------------------------------------- the same request again


def said(events: list[Event]) -> str:
    return "".join(e.json["choices"][0]["text"] for e in events if e.data != "[DONE]" and e.json.get("choices"))


async def test_resumed_exactly_after_any_event(port: int, deployment: Deployment) -> None:
    body = dict(model=MODEL, prompt=PROMPT, max_tokens=24, seed=1, stream=True, logprobs=1)
    body |= dict(stream_options={"include_usage": True})
    whole = [event async for event in (await call(port, TEXT, body)).events()]
    for cut in range(1, len(whole)):
        answer = await call(port, TEXT, body, {"Last-Event-ID": whole[cut - 1].id})
        rest = [event async for event in answer.events()]
        assert said(whole[:cut]) + said(rest) == said(whole)
        tokens = [
            e.json["choices"][0]["logprobs"] for e in whole[:cut] + rest if e.data != "[DONE]" and e.json["choices"]
        ]
        assert sum(len(entry["tokens"]) for entry in tokens if entry) == 24
        assert [e.json for e in whole[:cut] + rest if e.data != "[DONE]" and e.json.get("usage")] == [whole[-2].json]
        assert rest[-1].data == "[DONE]"
        assert [e.id for e in rest[-2:-1]] in ([], [whole[-2].id]), "ids of a resumed stream go on"
    answer = await call(port, TEXT, body, {"Last-Event-ID": "nonsense"})
    assert answer.status == 400
    answer = await call(port, TEXT, body, {"Last-Event-ID": f"{'0' * 32}~1~0.1.1"})
    assert (answer.status, (await answer.body())["error"]["code"]) == (404, "not_found")


async def test_idempotency_key(port: int, deployment: Deployment) -> None:
    key = {"Idempotency-Key": "story one, again & again"}
    body = dict(model=MODEL, prompt=PROMPT, max_tokens=400, temperature=1.0, stream=True, ignore_eos=True)
    first = await call(port, TEXT, body, key)
    seen = []
    async for event in first.events():
        seen.append(event)
        if len(seen) == 5:
            break
    first.close()
    await asyncio.sleep(0.1)
    again = [event async for event in (await call(port, TEXT, body, key)).events()]
    assert again[-1].data == "[DONE]"
    assert said(again).startswith(said(seen)), "the running request, from its beginning"
    resumed = await call(port, TEXT, body, key | {"Last-Event-ID": seen[-1].id})
    assert said(seen) + said([event async for event in resumed.events()]) == said(again)
    whole = await (await call(port, TEXT, body | {"stream": False}, key)).body()
    assert whole["choices"][0]["text"] == said(again)
    other = await call(port, TEXT, body | {"temperature": 0.5}, key)
    assert (other.status, (await other.body())["error"]["code"]) == (409, "idempotency_conflict")
    assert json.loads(again[0].data)["id"] == whole["id"]
    several = {"Idempotency-Key": "several prompts"}
    for prompts, status in ((["a", "b"], 200), (["a"], 409), (["a", "b", "c"], 409), (["a", "b"], 200)):
        other = await call(port, TEXT, body | {"prompt": prompts, "max_tokens": 3, "stream": False}, several)
        assert other.status == status, prompts
