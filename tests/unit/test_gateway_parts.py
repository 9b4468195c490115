"""The gateway's pure parts: what is asked, where a stream stands, what is said."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from services.gateway import completions
from services.gateway.auth import Authenticator, Caller
from services.gateway.call import split
from services.gateway.cursor import Cursor, Progress, parse_cursor
from services.gateway.errors import _OF_CODE, ApiError
from services.gateway.fleet import Fleet
from services.gateway.generation import is_of, new_id
from services.gateway.render import ChatRenderer, Choice, CompletionRenderer, Prompt
from services.gateway.schema import ChatCompletionRequest, CompletionRequest
from services.gateway.translate import chat_body, completion_bodies
from shared.client_stream import Delta
from shared.errors import ErrorCode, GorgonError
from shared.messages import Heartbeat, WorkerHeartbeat

MESSAGES = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "hello"}]


def chat(**fields: Any) -> dict[str, Any]:
    return chat_body(ChatCompletionRequest.model_validate({"model": "m", "messages": MESSAGES} | fields), None)


def texts(**fields: Any) -> list[dict[str, Any]]:
    return completion_bodies(CompletionRequest.model_validate({"model": "m", "prompt": "x"} | fields), 2.0, 4)


# ---------------------------------------------------------------- what is asked


def test_chat_fields() -> None:
    body = chat(
        max_completion_tokens=7, logprobs=True, top_logprobs=3, user="u", metadata={"a": "b"}, top_k=4, stop="x"
    )
    assert body["messages"][0]["role"] == "system"
    assert (body["max_tokens"], body["logprobs"], body["top_k"], body["stop"]) == (7, 3, 4, "x")
    assert body["metadata"] == {"a": "b", "user": "u"}
    assert body["stream"] is False and "deadline" not in body
    assert chat(logprobs=True)["logprobs"] == 0
    assert "logprobs" not in chat(logprobs=False)


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": [1] * 20_000},
        {"bad_words": [1] * 20_000},
        {"logit_bias": {str(n): "x" for n in range(20_000)}},
        {"metadata": {str(n): 1 for n in range(20_000)}},
        {f"unknown{n}": 1 for n in range(20_000)},
    ],
)
def test_a_body_that_is_wrong_all_over_is_not_told_so_of_each_part(fields: dict[str, Any]) -> None:
    """Each complaint costs more than the part itself, and the gateway's one thread makes them."""
    for model, body in ((ChatCompletionRequest, {"messages": MESSAGES}), (CompletionRequest, {"prompt": "x"})):
        with pytest.raises(ValidationError) as caught:
            model.model_validate({"model": "m"} | body | fields)
        assert caught.value.error_count() < 10
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate({"model": "m", "prompt": ["a", *[1] * 20_000]})
    assert caught.value.error_count() < 10


def test_what_is_wrong_is_named_as_the_client_names_it() -> None:
    with pytest.raises(ApiError) as caught:
        chat(max_completion_tokens=-3)
    assert caught.value.param == "max_completion_tokens" and caught.value.message.startswith("max_completion_tokens")


def test_prompts_of_one_call_are_known_to_belong_together() -> None:
    """What is sent again under the same key must be all of them."""
    told = [[body["metadata"]["prompts"] for body in texts(prompt=prompts)] for prompts in (["a", "b"], ["a", "c"])]
    assert len(set(told[0])) == len(set(told[1])) == 1 and told[0][0] != told[1][0]
    assert "metadata" not in texts(prompt=["a"])[0]


def test_completion_fields() -> None:
    (body,) = texts(logprobs=2, n=2)
    assert (body["max_tokens"], body["logprobs"], body["deadline"], body["prompt"]) == (16, 2, 2.0, "x")
    assert [body["prompt"] for body in texts(prompt=["a", "b"])] == ["a", "b"]
    assert [body["prompt"] for body in texts(prompt=[1, 2])] == [[1, 2]]
    assert [body["prompt"] for body in texts(prompt=[[1], [2, 3]])] == [[1], [2, 3]]
    (body,) = texts(max_tokens=0, echo=True)
    assert (body["max_tokens"], body["echo"]) == (0, True)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (dict(functions=[]), "functions"),
        (dict(audio={}), "audio"),
        (dict(reasoning_effort="high"), "reasoning_effort"),
        (dict(store=True), "store"),
        (dict(modalities=["audio"]), "modalities"),
        (dict(service_tier="flex"), "service_tier"),
        (dict(top_logprobs=3), "top_logprobs"),
        (dict(logprobs=True, top_logprobs=21), "top_logprobs"),
        (dict(max_tokens=3, max_completion_tokens=4), "max_completion_tokens"),
        (dict(tool_choice="auto"), "tool_choice"),
        (dict(tools=[{"type": "custom", "custom": {"name": "f"}}]), "tools"),
        (dict(tools=[{"type": "function"}]), "tools"),
        (dict(response_format={"type": "yaml"}), "response_format"),
        (dict(response_format={"type": "json_schema"}), "response_format"),
        (dict(response_format={"type": "json_object", "schema": {}}), "response_format"),
        (dict(response_format={"type": "text", "json_schema": {}}), "response_format"),
        (dict(response_format={"type": "json_schema", "json_schema": {"schema": {}, "x": 1}}), "response_format"),
        (dict(stream_options={"include_usage": True}), "stream_options"),
        (dict(presence_penalty=3), "presence_penalty"),
        (dict(stop=["x"] * 17), "stop"),
    ],
)
def test_what_is_not_honoured_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_too_many_prompts() -> None:
    with pytest.raises(ApiError, match="at most 4"):
        texts(prompt=["x"] * 5)


# ---------------------------------------------------------------- errors


def test_every_code_has_a_status() -> None:
    assert set(_OF_CODE) == set(ErrorCode)
    overloaded = ApiError.of(GorgonError(ErrorCode.OVERLOADED, "full", retry_after=1.2))
    assert (overloaded.status, overloaded.headers["retry-after"]) == (429, "2")
    assert ApiError.of(GorgonError(ErrorCode.UNAVAILABLE, "x")).headers["retry-after"] == "1"
    assert ApiError.of(GorgonError(ErrorCode.QUARANTINED, "x")).headers["x-should-retry"] == "false"
    assert ApiError.of(GorgonError(ErrorCode.INVALID_REQUEST, "stop.3: too long")).param == "stop"


# ---------------------------------------------------------------- where a stream stands


@given(
    st.dictionaries(st.integers(0, 40), st.tuples(st.integers(0, 10**6), st.integers(0, 10**6), st.booleans())),
    st.booleans(),
    st.sampled_from([None, "", "hermes", "llama3"]),
)
def test_cursor_comes_back(choices: dict[int, tuple[int, int, bool]], usage: bool, tools: str | None) -> None:
    progress = {i: Progress(*at) for i, at in choices.items()}
    cursor = Cursor(new_id("t", None), 1_700_000_000, progress, usage, tools)
    assert parse_cursor(str(cursor)) == cursor


@given(st.text())
def test_other_cursors_are_refused(text: str) -> None:
    with pytest.raises(ApiError):
        parse_cursor(text)


def test_ids() -> None:
    assert new_id("a", "k") == new_id("a", "k") != new_id("b", "k")
    assert new_id("a", None) != new_id("a", None)
    for tenant, other in (("a", "b"), ("b", "a")):
        for key in (None, "k"):
            assert is_of(tenant, new_id(tenant, key)) and not is_of(other, new_id(tenant, key))


async def test_nobody_goes_on_with_a_request_of_another_tenant() -> None:
    """Not even by a name that can be worked out from a key that is easy to guess: events are told apart by ids alone."""
    asked = CompletionRequest(model="m", prompt="x", stream=True)
    last = f"{new_id('alice', '1')}~1~0.1.1"
    assert completions._cursor(asked, Caller("alice"), "1", last).base == new_id("alice", "1")
    for key in (None, "1"):
        with pytest.raises(ApiError) as refusal:
            completions._cursor(asked, Caller("bob"), key, last)
        assert (refusal.value.status, refusal.value.code) == (404, "not_found")


@given(st.lists(st.integers(1, 9), max_size=6), st.text(max_size=8), st.integers(0, 20), st.integers(0, 20))
def test_split_loses_nothing(ids: list[int], text: str, position: int, offset: int) -> None:
    delta = Delta(0, 5, ids, text, 7, [{"id": i} for i in ids])
    old, new = split(delta, position, offset)
    rest = ([], "", []) if new is None else (new.ids, new.text, new.logprobs)
    assert (old.ids + rest[0], old.text + rest[1]) == (ids, text)
    assert [entry["id"] for entry in (old.logprobs or []) + (rest[2] or [])] == ids
    if new is not None:
        assert new.ids or new.text
        assert not new.ids or new.position == max(5, position)
        assert not new.text or new.offset == max(7, offset)


# ---------------------------------------------------------------- what is said


def test_chat_chunks() -> None:
    renderer = ChatRenderer("b", 1, "m", include_usage=True, logprobs=None)
    choice = Choice(2)
    first = renderer.delta(choice, Delta(0, 0, [1], 'say "é"\n', 0), NOTHING)
    assert first is not None
    chunk = json.loads(renderer.chunk(first))
    assert chunk["choices"] == [
        dict(index=2, delta=dict(role="assistant", content='say "é"\n'), logprobs=None, finish_reason=None)
    ]
    assert chunk["usage"] is None and chunk["object"] == "chat.completion.chunk" and chunk["id"] == "chatcmpl-b"
    assert renderer.delta(choice, Delta(0, 1, [1], "", 8), NOTHING) is None, "text that waits is no chunk"
    last = json.loads(renderer.chunk(renderer.last(choice, "stop", NOTHING)))
    assert last["choices"][0] == dict(index=2, delta={}, logprobs=None, finish_reason="stop")
    assert json.loads(renderer.chunk("", {"total_tokens": 3}))["usage"] == {"total_tokens": 3}


@dataclass
class Known:
    pieces: dict[int, bytes] = field(default_factory=dict)
    special: set[int] = field(default_factory=set)


NOTHING = Known()


def test_bytes_that_are_no_text() -> None:
    pieces = Known({1: "é".encode()[:1], 2: "é".encode()[1:]})
    entry = dict(id=1, logprob=None, top=[[1, None], [2, -3.0]])
    renderer = CompletionRenderer("b", 1, "m", include_usage=False, logprobs=2)
    chunk = renderer.delta(Choice(0), Delta(0, 0, [1], "", 0, [entry]), pieces)
    assert chunk is not None
    said = json.loads(chunk)["logprobs"]
    assert said["tokens"] == ["bytes:\\xc3"] and said["token_logprobs"] == [-9999.0]
    assert said["top_logprobs"] == [{"bytes:\\xc3": -9999.0, "bytes:\\xa9": -3.0}]


def test_places_of_tokens_count_the_characters_that_are_made_of_several() -> None:
    whale = "🐳".encode()
    pieces = Known({1: b"a", 2: whale[:2], 3: whale[2:], 4: b"b", 5: b"\xff"}, set())
    renderer = CompletionRenderer("b", 1, "m", include_usage=False, logprobs=0)

    def rows(ids: list[int]) -> list[dict[str, Any]]:
        return [dict(id=token, logprob=-1.0, top=[]) for token in ids]

    ids = [1, 2, 3, 4, 5, 4]
    choice = Choice(0)
    renderer.absorb(choice, Delta(0, 0, ids, "a🐳b\N{REPLACEMENT CHARACTER}b", 0, rows(ids)))
    assert renderer.choice(choice, "stop", pieces)["logprobs"]["text_offset"] == [0, 1, 1, 2, 3, 4]
    choice, places = Choice(0), []
    for token, text in zip(ids[:4], ("a", "", "🐳", "b"), strict=True):
        chunk = renderer.delta(choice, Delta(0, 0, [token], text, choice.chars, rows([token])), pieces)
        assert chunk is not None
        places += json.loads(chunk)["logprobs"]["text_offset"]
    assert places == [0, 1, 1, 2]


def test_places_of_tokens_are_the_same_wherever_a_stream_is_cut_in_pieces() -> None:
    """Also within a character, which is not in the text before it is complete."""
    text = "👩é日a🐳"
    data = text.encode()
    pieces = Known({byte: bytes([byte]) for byte in data}, set())
    renderer = CompletionRenderer("b", 1, "m", include_usage=False, logprobs=0)
    rows = [dict(id=token, logprob=-1.0, top=[]) for token in data]
    whole = Choice(0)
    renderer.absorb(whole, Delta(0, 0, list(data), text, 0, rows))
    places = renderer.choice(whole, "stop", pieces)["logprobs"]["text_offset"]
    assert places == [len(data[:at].decode(errors="ignore")) for at in range(len(data))]
    for cut in range(1, len(data)):
        shown = data[:cut].decode(errors="ignore")
        chunks = []
        choice = Choice(0)
        for at, end, new in ((0, cut, shown), (cut, len(data), text[len(shown) :])):
            delta = Delta(0, at, list(data[at:end]), new, choice.chars, rows[at:end])
            chunks.append(renderer.delta(choice, delta, pieces))
        told = [json.loads(chunk)["logprobs"]["text_offset"] for chunk in chunks if chunk is not None]
        assert list(chain.from_iterable(told)) == places, f"cut at byte {cut}"


def test_echoed_logprobs_come_first() -> None:
    pieces = Known({0: b"<s>", 1: b"ab", 2: b"c", 3: b"d"}, {0})
    renderer = CompletionRenderer("b", 1, "m", include_usage=False, logprobs=1)
    prompt = Prompt()
    first, second = dict(id=0, logprob=None, top=[]), dict(id=1, logprob=-0.2, top=[[1, -0.2]])
    prompt.extend(Delta(-1, 0, [0, 1], "ab", 0, [first, second]))
    prompt.extend(Delta(-1, 2, [2], "c", 2, [dict(id=2, logprob=-1.0, top=[[3, -0.5]])]))
    delta = Delta(0, 0, [3], "d", 0, [dict(id=3, logprob=-2.0, top=[[3, -2.0]])])
    chunk = renderer.delta(Choice(0, prompt=prompt), delta, pieces)
    assert chunk is not None
    streamed = json.loads(chunk)
    choice = Choice(0, prompt=prompt)
    renderer.absorb(choice, delta)
    whole = renderer.choice(choice, "stop", pieces)
    for said in (streamed, whole):
        assert said["text"] == "abcd"
        assert said["logprobs"] == dict(
            text_offset=[0, 0, 2, 3],
            token_logprobs=[None, -0.2, -1.0, -2.0],
            tokens=["<s>", "ab", "c", "d"],
            top_logprobs=[None, {"ab": -0.2}, {"c": -1.0, "d": -0.5}, {"d": -2.0}],
        )


# ---------------------------------------------------------------- who asks, who is there


def test_api_keys(tmp_path: Path) -> None:
    assert Authenticator().caller({}).tenant == "default"
    path = tmp_path / "keys.toml"
    path.write_text(f'[keys.alice]\nsha256 = "{hashlib.sha256(b"secret").hexdigest()}"\ntenant = "blue"\n')
    keys = Authenticator.from_file(str(path))
    assert keys.caller({"authorization": "Bearer secret"}).tenant == "blue"
    path.write_text(f'[keys.alice]\nsha256 = "{hashlib.sha256("schlüssel".encode()).hexdigest()}"\ntenant = "red"\n')
    as_servers_decode_it = "schlüssel".encode().decode("latin-1")
    assert (
        Authenticator.from_file(str(path)).caller({"authorization": f"Bearer {as_servers_decode_it}"}).tenant == "red"
    )
    for headers in ({}, {"authorization": "secret"}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer "}):
        with pytest.raises(ApiError) as caught:
            keys.caller(headers)
        assert caught.value.status == 401
    for wrong in ('[keys.a]\nsha256 = "xyz"\n', f'[keys.a]\nsha256 = "{"0" * 64}"\ntenant = "a.b"\n'):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=r"keys\.a"):
            Authenticator.from_file(str(path))


def test_models_of_the_heartbeats() -> None:
    fleet = Fleet()
    for stage in ("tokenizer", "scheduler", "detokenizer"):
        fleet.hear(Heartbeat(stage, "m", f"{stage}-1", 1, 0.1), 10.0)
    assert not fleet.models(10.0)["m"].ready
    worker = Heartbeat("model_worker", "m", "w", 1, 0.1)
    fleet.hear(WorkerHeartbeat(worker, 0, 0, 1, {}, 4, 100, 100, 64, 512), 10.0)
    assert fleet.models(10.0)["m"].ready and fleet.models(10.0)["m"].context == 64
    assert fleet.models(12.0) == {} and fleet.remembers("m", 12.0) and not fleet.remembers("x", 12.0)
    fleet.forget_old(1000.0)
    assert not fleet.remembers("m", 1000.0)
