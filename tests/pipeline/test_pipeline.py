"""The whole pipeline: real processes, a real nats-server, a real (tiny) model on the CPU."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tokenizers import Tokenizer

from shared.client import Client
from shared.errors import GorgonError
from shared.messages import PROMPT
from tests.pipeline.harness import SHARED, Deployment, RawClient, deployed, needs_prompts, needs_weights, weights

pytestmark = [pytest.mark.asyncio(loop_scope="module"), needs_weights]
MODEL = "stories"
FOLDER = weights("stories260K")
ROOT = Path(__file__).resolve().parents[2]
STORY = dict(prompt="One day, a little girl named Lily", max_tokens=40, temperature=0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def deployment(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Deployment]:
    async with deployed(tmp_path_factory.mktemp("stories"), MODEL, FOLDER) as deployment:
        yield deployment


@pytest_asyncio.fixture(loop_scope="module")
async def client(deployment: Deployment) -> AsyncIterator[RawClient]:
    async with RawClient(deployment.url, MODEL) as client:
        yield client
        await deployment.until_idle()
        client.check()


def golden(folder: Path) -> tuple[list[int], list[int]]:
    """(prompt ids, the ids that greedy decoding generates)"""
    data = json.loads((folder / "golden.json").read_text())
    return data["prompt_ids"], data["greedy_ids"][len(data["prompt_ids"]) :]


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
async def test_greedy_ids_and_text(client: RawClient, encoding: str) -> None:
    prompt, expected = golden(FOLDER)
    body = dict(prompt=prompt, max_tokens=len(expected), temperature=0)
    answer = await client.ask(body, encoding=encoding)
    assert answer.names.count("accepted") == 1
    assert answer.names.count("tokens") > len(expected) / 4, "it streams"
    assert answer.end is not None
    assert answer.ids[0] == expected
    assert answer.text[0] == Tokenizer.from_file(str(FOLDER / "tokenizer.json")).decode(expected)
    (choice,) = answer.end["choices"]
    assert (choice["finish_reason"], choice["tokens"], choice["chars"]) == (
        "length",
        len(expected),
        len(answer.text[0]),
    )
    assert answer.end["usage"] == dict(
        prompt_tokens=len(prompt),
        completion_tokens=len(expected),
        total_tokens=len(prompt) + len(expected),
        cached_tokens=0,
    )
    assert set(answer.end["timings"]) == {"tokenize_ms", "queue_ms", "ttft_ms", "total_ms"}


async def test_another_model_with_its_golden_ids(tmp_path: Path) -> None:
    folder = weights("babyllama-tok361")
    prompt, expected = golden(folder)
    async with deployed(tmp_path, "baby", folder) as deployment, RawClient(deployment.url, "baby") as client:
        answer = await client.ask(dict(prompt=prompt, max_tokens=len(expected), temperature=0), encoding="msgpack")
        assert answer.ids[0] == expected
        await deployment.until_idle()
        client.check()


async def test_text_prompt_without_streaming(client: RawClient) -> None:
    streamed = await client.ask(STORY)
    whole = await client.ask(STORY | dict(stream=False))
    # On a slow machine, an empty `tokens` event may ask whether the client is still there.
    assert not any(whole.ids.values()) and set(whole.names) - {"tokens"} == {"accepted", "finished"}
    assert whole.end is not None
    (choice,) = whole.end["choices"]
    assert (choice["text"], choice["ids"]) == (streamed.text[0], streamed.ids[0])


async def test_sampling_is_repeatable_by_its_seed_and_choices_differ(client: RawClient) -> None:
    body = STORY | dict(temperature=0.9, top_p=0.95, top_k=50, seed=7, n=3, repetition_penalty=1.1)
    first, again, other = await asyncio.gather(client.ask(body), client.ask(body), client.ask(body | dict(seed=8)))
    assert first.text == again.text
    assert len({*first.text.values(), *other.text.values()}) == 6


async def test_stop_strings_stop_tokens_and_logprobs(client: RawClient) -> None:
    plain = await client.ask(STORY)
    stop = plain.text[0][12:16]
    answer = await client.ask(STORY | dict(stop=[stop, "never to be seen"], max_tokens=200))
    assert answer.end is not None
    assert answer.text[0] == plain.text[0][: plain.text[0].index(stop)]
    assert answer.end["choices"][0]["finish_reason"] == "stop"
    assert answer.end["choices"][0]["stop"] == stop

    token = plain.ids[0][9]
    at = plain.ids[0].index(token)
    answer = await client.ask(STORY | dict(stop_token_ids=[token], logprobs=3))
    assert answer.end is not None
    assert answer.ids[0] == plain.ids[0][: at + 1]
    assert answer.end["choices"][0]["stop"] == token
    rows = [row for event in answer.events if event["event"] == "tokens" for row in event["logprobs"]]
    assert [row["id"] for row in rows] == answer.ids[0]
    for row in rows:
        assert row["top"][0] == [row["id"], row["logprob"]], "greedy: the likeliest"
        assert len(row["top"]) == 3


async def test_cancel(client: RawClient) -> None:
    request_id = f"cancel-{uuid.uuid4().hex[:8]}"
    answer = await client.send(STORY | dict(id=request_id, max_tokens=450, ignore_eos=True))
    await answer.until_tokens(3)
    reply = await client.nc.request(f"llm.v1.cancel.{MODEL}", json.dumps(dict(id=request_id)).encode(), timeout=5)
    assert reply.data
    await answer.wait()
    assert answer.end is not None
    assert answer.end["event"] == "cancelled"
    assert 3 <= answer.end["usage"]["completion_tokens"] < 450


async def test_deadline(client: RawClient) -> None:
    answer = await client.ask(STORY | dict(max_tokens=450, ignore_eos=True, deadline=0.05))
    assert answer.code == "deadline_exceeded"


async def test_the_durable_door(client: RawClient, deployment: Deployment) -> None:
    request_id = f"job-{uuid.uuid4().hex[:8]}"
    body = STORY | dict(id=request_id)
    stored = await client.nc.request(f"llm.v1.jobs.{MODEL}", json.dumps(body).encode(), timeout=5)
    assert "seq" in json.loads(stored.data), "JetStream has it"
    js = client.nc.jetstream()
    results = await js.subscribe(f"llm.v1.results.default.{request_id}", ordered_consumer=True)
    events: list[dict[str, Any]] = []
    async with asyncio.timeout(30):
        while not events or events[-1]["event"] not in {"finished", "error"}:
            events.append(json.loads((await results.next_msg(timeout=30)).data))
    streamed = await client.ask(STORY)
    assert "".join(e["text"] for e in events if e["event"] == "tokens") == streamed.text[0]
    assert [i for e in events if e["event"] == "tokens" for i in e["ids"]] == streamed.ids[0]
    assert sum(e["event"] == "finished" for e in events) == 1


async def test_the_client_library_attaches_to_an_ended_stream(deployment: Deployment) -> None:
    async with Client(deployment.bus, MODEL) as client:
        stream = client.generate(STORY["prompt"], max_tokens=40, temperature=0)
        pieces = [delta.text async for delta in stream]
        result = await stream.result()
        assert "".join(pieces) == result.choices[0].text
        again = await client.attach(stream.id).result()
        assert again.choices[0].text == result.choices[0].text
        with pytest.raises(GorgonError) as unknown:
            await client.attach("there-is-no-such-request").result()
        assert unknown.value.code == "not_found"


BAD: dict[str, tuple[dict[str, Any] | bytes, str]] = {
    "empty": (b"", "invalid_request"),
    "no object": (b"[1, 2]", "invalid_request"),
    "broken JSON": (b'{"prompt": "a', "invalid_request"),
    "broken UTF-8": (b'{"prompt": "\xff\xfe"}', "invalid_request"),
    "broken msgpack": (b"\x81\xa6prompt", "invalid_request"),
    "NaN": (b'{"prompt": "a", "temperature": NaN}', "invalid_request"),
    "deeply nested": (b'{"prompt": ' + b"[" * 100_000, "invalid_request"),
    "no prompt": ({}, "invalid_request"),
    "empty prompt": (STORY | dict(prompt=""), "invalid_request"),
    "unknown field": (STORY | dict(best=3), "invalid_request"),
    "wrong type": (STORY | dict(max_tokens="3"), "invalid_request"),
    "max_tokens 0": (STORY | dict(max_tokens=0), "invalid_request"),
    "max_tokens huge": (STORY | dict(max_tokens=10**12), "invalid_request"),
    "negative temperature": (STORY | dict(temperature=-1), "invalid_request"),
    "expired deadline": (STORY | dict(deadline=0), "invalid_request"),
    "id with a dot": (STORY | dict(id="a.b"), "invalid_request"),
    "id outside the vocabulary": (STORY | dict(prompt=[1, 100_000]), "invalid_request"),
    "long prompt": (STORY | dict(prompt="once upon a time " * 500), "context_length_exceeded"),
    "long prompt of ids": (STORY | dict(prompt=[5] * 600), "context_length_exceeded"),
    "10 MB": (b'{"prompt": "' + b"a" * (7 * 2**20) + b'"}', "payload_too_large"),
    "chat without a template": (dict(messages=[dict(role="user", content="hi")]), "unsupported"),
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_input_gets_a_code_and_harms_nothing(client: RawClient, name: str) -> None:
    body, code = BAD[name]
    answer = await asyncio.wait_for(client.ask(body), 10)
    assert (answer.names, answer.code) == (["error"], code), answer.events
    assert answer.end is not None
    assert answer.end["message"]
    assert not answer.end["retryable"]
    assert (await client.ask(STORY | dict(max_tokens=2))).end["event"] == "finished"  # type: ignore[index]


async def test_an_unknown_model_is_an_immediate_error(client: RawClient) -> None:
    answer = await asyncio.wait_for(client.ask(STORY, subject="llm.v1.generate.no-such-model"), 2)
    assert answer.code == "unknown_model"


async def test_the_same_id_again(client: RawClient) -> None:
    request_id = f"again-{uuid.uuid4().hex[:8]}"
    body = STORY | dict(id=request_id)
    first = await client.ask(body)
    conflict = await client.ask(body | dict(max_tokens=5))
    assert conflict.code == "id_conflict"
    again = await client.ask(body)
    assert again.text == first.text


async def test_gorgon_bench(client: RawClient, deployment: Deployment, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "services.cli",
        "bench",
        "--nats",
        deployment.url,
        "--model",
        MODEL,
        "--out",
        str(tmp_path),
    ]
    process = await asyncio.create_subprocess_exec(
        *command, "--workload", "batch-8", "--workload", "ttft-2048", cwd=ROOT, stdout=-1, stderr=-1
    )
    out, said = await process.communicate()
    assert process.returncode == 0, said.decode()
    assert "| batch-8 | 8 | 0 |" in out.decode() and "ttft-2048 is left out" in said.decode(), "longer than the context"
    (result,) = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert (result["output_tokens"], result["input_tokens"], result["failed"]) == (8 * 256, 8 * 128, 0)
    assert 0 < result["first_token_ms"]["p50"] <= result["first_token_ms"]["p99"]


@needs_prompts
@pytest.mark.timeout(300)
async def test_five_hundred_mixed_requests(client: RawClient, deployment: Deployment) -> None:
    """Each ends in exactly one terminal event, its text is that of its ids, and everything is given back."""
    draw = random.Random(1)
    prompts = [
        json.loads(line)["turns"][0]
        for name in ("mt_bench", "spec_bench")
        for line in (SHARED / f"data/prompts/{name}.jsonl").read_text().splitlines()
    ]
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    ends: dict[str, int] = {}
    gate = asyncio.Semaphore(64)

    async def one(number: int) -> None:
        prompt = draw.choice(prompts)[: draw.choice((20, 80, 300, 900, 4000))]
        body = dict(
            prompt=prompt,
            tenant=f"tenant{number % 5}",
            max_tokens=draw.choice((1, 4, 16, 48)),
            temperature=draw.choice((0, 0.7, 1.0)),
            seed=number,
            stop=draw.choice(([], ["Lily"], ["the", "."])),
            n=draw.choice((1, 1, 1, 2)),
            logprobs=draw.choice((None, None, 2)),
            typical_p=draw.choice((None, None, 0.9)),
            logit_bias=draw.choice(({}, {}, {"300": -100, "261": 1.5})),
            bad_words=draw.choice((None, None, ["Lily", "was very"])),
            min_tokens=draw.choice((None, None, 1)),
            prompt_logprobs=draw.choice((None, None, None, 1)),
        )
        if draw.random() < 0.1:
            body["best_of"] = body["n"] + 1
        async with gate:
            answer = await client.ask(body, encoding=draw.choice(("json", "msgpack")))
            assert answer.end is not None
            kind = answer.end["event"]
            ends[kind] = ends.get(kind, 0) + 1
            if kind == "error":
                assert answer.code == "context_length_exceeded", answer.end
                return
            told = answer.ids.get(PROMPT, [])
            assert len(told) == (0 if body["prompt_logprobs"] is None else answer.end["usage"]["prompt_tokens"])
            assert len(answer.end["choices"]) == body["n"]
            for end in answer.end["choices"]:
                ids = answer.ids.get(end["choice"], [])
                text = answer.text.get(end["choice"], "")
                assert 300 not in ids or not body["logit_bias"]
                assert (len(ids), len(text)) == (end["tokens"], end["chars"])
                shown = tokenizer.decode(ids)
                if isinstance(end["stop"], str):
                    assert end["stop"] in body["stop"]
                    assert shown.startswith(text + end["stop"])
                else:
                    assert text == shown

    await asyncio.gather(*(one(number) for number in range(500)))
    assert ends["finished"] > 300, ends
    assert ends.get("error", 0) > 10, "some prompts are longer than the context"
    assert sum(ends.values()) == 500
    await deployment.until_idle()
