"""Every option of sampling through the real pipeline."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from tokenizers import Tokenizer

from shared.client import Client
from shared.messages import PROMPT
from tests.pipeline.harness import Answer, Deployment, RawClient, deployed, needs_weights, weights

pytestmark = [pytest.mark.asyncio(loop_scope="module"), needs_weights]
MODEL = "stories"
FOLDER = weights("stories260K")
STORY: dict[str, Any] = dict(prompt="One day, a little girl named Lily", max_tokens=40, temperature=0, ignore_eos=True)


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


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def rows_of(answer: Answer, choice: int) -> list[dict[str, Any]]:
    told = [e for e in answer.events if e["event"] == "tokens" and e["choice"] == choice]
    return [row for event in told for row in event.get("logprobs", ())]


async def test_typical_p_keeps_nearly_nothing_when_it_is_small(client: RawClient) -> None:
    body = STORY | dict(temperature=1.0, seed=5)
    one, same, other = await asyncio.gather(
        client.ask(body | dict(typical_p=1e-6)),
        client.ask(body | dict(typical_p=1e-6, seed=9)),
        client.ask(body | dict(typical_p=1.0)),
    )
    assert one.ids == same.ids != other.ids, "one token is the most typical, whatever the seed"


async def test_logit_bias_and_bad_words(client: RawClient, tokenizer: Tokenizer) -> None:
    plain = await client.ask(STORY)
    token = plain.ids[0][3]
    biased = await client.ask(STORY | dict(logit_bias={str(token): -100}))
    assert token in plain.ids[0] and token not in biased.ids[0]
    forced = await client.ask(STORY | dict(logit_bias={str(token): 100}))
    assert set(forced.ids[0]) == {token}
    word = plain.text[0].split()[3].strip(".,")
    assert len(tokenizer.encode(word, add_special_tokens=False).ids) > 1, "of several tokens"
    clean = await client.ask(STORY | dict(bad_words=[word]))
    assert f" {word} " in plain.text[0] and f" {word} " not in clean.text[0]


async def test_min_tokens(client: RawClient) -> None:
    plain = await client.ask(STORY)
    stops = list(dict.fromkeys(plain.ids[0]))
    early, late = await asyncio.gather(
        client.ask(STORY | dict(stop_token_ids=stops)), client.ask(STORY | dict(stop_token_ids=stops, min_tokens=20))
    )
    assert len(early.ids[0]) == 1 and early.ids[0][0] in stops
    assert len(late.ids[0]) > 20 and late.ids[0][-1] in stops and not set(late.ids[0][:20]) & set(stops)


async def test_best_of(client: RawClient) -> None:
    body = STORY | dict(temperature=1.2, seed=3, max_tokens=12)
    every = await client.ask(body | dict(n=5, logprobs=0))
    means = {c: sum(row["logprob"] for row in rows_of(every, c)) / 12 for c in range(5)}
    best = sorted(means, key=lambda c: -means[c])[:2]
    told = await client.ask(body | dict(n=2, best_of=5))
    assert [told.ids[0], told.ids[1]] == [every.ids[c] for c in best] and set(told.ids) == {0, 1}
    assert told.end is not None and told.end["usage"]["completion_tokens"] == 60
    assert not any("logprobs" in event for event in told.events)
    whole = await client.ask(body | dict(n=2, best_of=5, stream=False))
    assert whole.end is not None and [c["ids"] for c in whole.end["choices"]] == [every.ids[c] for c in best]


async def test_echo_and_prompt_logprobs(client: RawClient, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(STORY["prompt"]).ids
    plain = await client.ask(STORY | dict(logprobs=2, n=2))
    echoed = await client.ask(STORY | dict(echo=True, logprobs=2, n=2))
    assert echoed.ids[PROMPT] == ids and echoed.text[PROMPT] == tokenizer.decode(ids)
    assert echoed.ids[0] == echoed.ids[1] == plain.ids[0]
    assert echoed.text[PROMPT] + echoed.text[0] == tokenizer.decode(ids + plain.ids[0])
    assert echoed.end is not None
    assert echoed.end["prompt"] == {"tokens": len(ids), "chars": len(echoed.text[PROMPT])}
    # What was generated, as part of a prompt: told in pieces, with the same log-probabilities.
    continued = ids + plain.ids[0]
    body = dict(prompt=continued, max_tokens=0, prompt_logprobs=2)
    for stream in (True, False):
        answer = await client.ask(body | dict(stream=stream))
        assert answer.end is not None and answer.end["usage"]["completion_tokens"] == 0
        rows = rows_of(answer, PROMPT) if stream else answer.end["prompt"]["logprobs"]
        assert [row["id"] for row in rows] == continued
        assert rows[0]["logprob"] is None and rows[0]["top"] == []
        for row, generated in zip(rows[len(ids) :], rows_of(plain, 0), strict=True):
            assert row["logprob"] == pytest.approx(generated["logprob"], abs=1e-4)
            assert [pair[0] for pair in row["top"]] == [pair[0] for pair in generated["top"]]
    nothing = await client.ask(dict(prompt=continued, max_tokens=0, echo=True, stream=False))
    assert nothing.end is not None and nothing.end["prompt"]["text"] == tokenizer.decode(continued)
    async with Client(client._url, MODEL) as own:
        result = await own.generate(prompt=continued, max_tokens=1, prompt_logprobs=0, echo=True).result()
        assert result.prompt is not None and result.prompt.ids == continued and len(result.choices) == 1
        assert len(result.prompt.logprobs) == len(continued)


async def test_a_durable_request_tells_of_its_prompt(client: RawClient) -> None:
    body = dict(id="prompted", prompt=[1, 5, 6, 7], max_tokens=3, prompt_logprobs=1, best_of=2, temperature=1.0)
    await client.nc.request(f"llm.v1.jobs.{MODEL}", json.dumps(body).encode(), timeout=5)
    results = await client.nc.jetstream().subscribe("llm.v1.results.default.prompted", ordered_consumer=True)
    events: list[dict[str, Any]] = []
    async with asyncio.timeout(30):
        while not events or events[-1]["event"] not in {"finished", "error"}:
            events.append(json.loads((await results.next_msg(timeout=30)).data))
    told = [(e["choice"], i) for e in events if e["event"] == "tokens" for i in e["ids"]]
    assert told[:4] == [(PROMPT, i) for i in body["prompt"]] and [c for c, _ in told[4:]] == [0] * 3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("typical_p", dict(typical_p=0)), ("logit_bias", dict(logit_bias={"512": 1})), ("logit_bias", dict(logit_bias={"x": 1})),
        ("bad_words", dict(bad_words=["abcdefghijklmnopqrstuvwxyz" * 2])), ("min_tokens", dict(min_tokens=41)),
        ("best_of", dict(n=2, best_of=1)), ("prompt_logprobs", dict(prompt_logprobs=21)), ("echo", dict(echo="yes")),
        ("max_tokens", dict(max_tokens=0)),
    ],
)  # fmt: skip
async def test_bad_values_are_refused_by_name(client: RawClient, field: str, body: dict[str, Any]) -> None:
    answer = await client.ask(STORY | body)
    assert answer.code == "invalid_request" and answer.end is not None and field in answer.end["message"]
