import json
import re
from pathlib import Path

import msgpack
import pytest
from pydantic import ValidationError

from shared import api
from shared.errors import RETRYABLE, ErrorCode, GorgonError
from shared.messages import ReplyTo


def refusal(body: dict) -> str:
    with pytest.raises(GorgonError) as caught:
        api.parse_request(body)
        api.hash_body(body)
    assert caught.value.code == ErrorCode.INVALID_REQUEST
    return caught.value.message


SEARCH_FIELDS = {
    "num_beams", "length_penalty", "early_stopping", "penalty_alpha", "cd_alpha", "cd_beta", "cd_temperature",
}  # fmt: skip


@pytest.mark.parametrize(
    "search",
    [
        {
            "num_beams": 4,
            "length_penalty": -1,
            "early_stopping": "never",
            "n": 4,
            "temperature": 0,
            "stop_token_ids": [2],
        },
        {"num_beams": 1, "temperature": 0.5, "n": 3},
        {"penalty_alpha": 0.6, "top_k": 4, "stop": "x"},
        {
            "cd_alpha": 0.1,
            "cd_beta": 0.5,
            "cd_temperature": 0.5,
            "temperature": 0.7,
            "top_p": 0.9,
            "n": 2,
            "logprobs": 2,
        },
    ],
)
def test_searches(search: dict):
    request = api.parse_request({"prompt": "a", "max_tokens": 5, "metadata": {"k": 1}, "stream": False} | search)
    assert search.items() <= (request.model_dump() | {"stop": "x"}).items()


@pytest.mark.parametrize(
    "wrong",
    [
        {"messages": [{"role": "user", "content": [1] * 20_000}]},
        {"prompt": "a", "stop": [1] * 20_000},
        {"prompt": "a", "stop_token_ids": ["x"] * 20_000},
        {"prompt": "a", "bad_words": [1] * 20_000},
        {"prompt": "a", "logit_bias": {str(n): "x" for n in range(20_000)}},
        {"prompt": "a", "structured": {"choice": [1] * 20_000}},
    ],
)
def test_what_is_wrong_all_over_is_not_told_of_each_part(wrong: dict):
    """Each complaint costs more than the part itself, and a tokenizer's one thread makes them."""
    with pytest.raises(ValidationError) as caught:
        api.GenerateRequest.model_validate(wrong)
    assert caught.value.error_count() < 10


def test_what_a_search_does_anyhow_may_be_said():
    tool = {"name": "f", "parameters": {"type": "object"}}
    body = {
        "messages": [{"role": "user", "content": "a"}],
        "tools": [{"type": "function", "function": tool}],
        "num_beams": 2,
    }
    assert api.parse_request(body | {"tool_choice": "auto"}).tool_choice == "auto"
    with pytest.raises(GorgonError, match="tool_choice"):
        api.parse_request(body | {"tool_choice": "required"})


@pytest.mark.parametrize(
    ("named", "search"),
    [
        ("temperature", {"num_beams": 2, "temperature": 0.5}),
        ("top_p", {"num_beams": 2, "top_p": 0.5}),
        ("stop", {"num_beams": 2, "stop": ["x"]}),
        ("logprobs", {"num_beams": 2, "logprobs": 0}),
        ("repetition_penalty", {"num_beams": 2, "repetition_penalty": 1.1}),
        ("penalty_alpha", {"num_beams": 2, "penalty_alpha": 0.5, "top_k": 4}),
        ("beams", {"num_beams": 2, "n": 3}),
        ("num_beams", {"num_beams": 17}),
        ("num_beams", {"length_penalty": 2.0}),
        ("num_beams", {"num_beams": 1, "early_stopping": True}),
        ("early_stopping", {"num_beams": 2, "early_stopping": "always"}),
        ("top_k", {"penalty_alpha": 0.5}),
        ("top_k", {"penalty_alpha": 0.5, "top_k": 1}),
        ("top_k", {"penalty_alpha": 0.5, "top_k": 17}),
        ("'n'", {"penalty_alpha": 0.5, "top_k": 4, "n": 2}),
        ("temperature", {"penalty_alpha": 0.5, "top_k": 4, "temperature": 1}),
        ("penalty_alpha", {"penalty_alpha": 0, "top_k": 4}),
        ("cd_alpha", {"penalty_alpha": 0.5, "top_k": 4, "cd_alpha": 0.1}),
        ("cd_alpha", {"cd_beta": 0.5}),
        ("cd_alpha", {"cd_temperature": 0.5}),
        ("presence_penalty", {"cd_alpha": 0.1, "presence_penalty": 1}),
        ("cd_alpha", {"cd_alpha": 1.5}),
        ("cd_beta", {"cd_alpha": 0.1, "cd_beta": -1}),
    ],
)
def test_what_a_search_does_not_honour_is_refused(named: str, search: dict):
    assert named in refusal({"prompt": "a"} | search)


def test_a_refusal_begins_with_the_field_if_it_is_about_one():
    assert refusal({"prompt": ""}) == "prompt: it is empty"
    assert refusal({"prompt": "a", "id": "a b"}).startswith("id: 1 to 64")
    assert refusal({"prompt": "a", "messages": []}).startswith("exactly one of")


def test_a_field_goes_with_a_search_only_if_the_search_names_it():
    odd = {
        "temperature": 0.5,
        "repetition_penalty": 2.0,
        "presence_penalty": 1.0,
        "logprobs": 1,
        "top_p": 0.5,
        "min_p": 0.5,
    }
    for field, value in odd.items():
        assert field in refusal({"prompt": "a", "num_beams": 2, field: value})


def test_defaults_and_every_field():
    request = api.parse_request({"prompt": "a"})
    assert (request.n, request.stop, request.temperature, request.tenant) == (1, [], None, "default")
    body = {
        "id": "r-1", "tenant": "t_1", "model": "m", "messages": [{"role": "user", "content": "x", "name": "bob"}],
        "tools": [{}], "tool_choice": "auto", "parallel_tool_calls": True, "chat_template_kwargs": {"a": 1},
        "max_tokens": 5, "temperature": 0, "top_p": 1, "top_k": 0,
        "min_p": 0.1, "seed": 2**63 - 1, "n": 16, "stop": "x", "stop_token_ids": [1], "ignore_eos": True,
        "repetition_penalty": 1.1, "presence_penalty": -2, "frequency_penalty": 2, "logprobs": 0, "priority": -100,
        "deadline": 0.5, "stream": False, "batched": True, "metadata": {"k": [1]}, "traceparent": f"00-{10:032x}-{11:016x}-01",
        "typical_p": 0.5, "logit_bias": {"5": -100, "0": 2.5}, "bad_words": ["x y"], "min_tokens": 3,
        "best_of": 16, "prompt_logprobs": 20, "echo": True,
    }  # fmt: skip
    # structured contradicts ignore_eos: tests/unit/test_structured.py
    assert set(body) | SEARCH_FIELDS | {"prompt", "structured"} == set(api.GenerateRequest.model_fields)
    request = api.parse_request(body)
    assert request.stop == ["x"]
    assert request.messages is not None and request.messages[0].model_extra == {"name": "bob"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", ""), ("id", "a.b"), ("id", "a" * 65), ("id", 1), ("tenant", "*"), ("tenant", None), ("prompt", ""),
        ("prompt", []), ("prompt", [-1]), ("prompt", [2**31]), ("prompt", [True]), ("prompt", 5), ("prompt", b"x"),
        ("max_tokens", 0), ("max_tokens", 10**7), ("max_tokens", 10**400), ("max_tokens", 1.0), ("max_tokens", True),
        ("temperature", -1), ("temperature", float("nan")), ("temperature", float("inf")), ("temperature", "1"),
        ("temperature", 10**400), ("top_p", 0), ("top_p", 1.1), ("top_k", -1), ("min_p", 2), ("seed", -1), ("seed", 2**63),
        ("n", 0), ("n", 17), ("stop", ["x"] * 17), ("stop", [""]), ("stop", "y" * 257), ("stop", [1]),
        ("stop_token_ids", [-5]), ("stop_token_ids", list(range(65))), ("ignore_eos", 1), ("repetition_penalty", 0),
        ("presence_penalty", 3), ("frequency_penalty", -3), ("logprobs", 21), ("priority", 101), ("deadline", 0),
        ("stream", "yes"), ("batched", None), ("metadata", []), ("metadata", {"k": "v" * 5000}), ("metadata", {"k": 2**70}),
        ("traceparent", "x" * 65), ("traceparent", "00-a-b-01"), ("typical_p", 0), ("typical_p", 1.5),
        ("logit_bias", {"a": 1}), ("logit_bias", {"-1": 1}),
        ("logit_bias", {"01": 1}), ("logit_bias", {"5": 101}), ("logit_bias", {"5": "1"}), ("logit_bias", [1]),
        ("logit_bias", {str(2**31): 1}), ("logit_bias", {"1" * 100: 1}), ("logit_bias", {str(i): 1 for i in range(385)}),
        ("logit_bias", {"²": 1}), ("bad_words", "x"), ("bad_words", [""]), ("bad_words", ["x"] * 129), ("bad_words", ["y" * 257]),
        ("min_tokens", -1), ("min_tokens", 1.0), ("best_of", 0), ("best_of", 17),
        ("prompt_logprobs", 21), ("prompt_logprobs", -1), ("echo", 1),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(field: str, value: object):
    message = refusal({"prompt": "a", field: value})
    assert field in message
    assert len(message) < 1000


def test_combinations():
    assert "exactly one" in refusal({})
    assert "exactly one" in refusal({"prompt": "a", "messages": [{"role": "user"}]})
    assert "empty" in refusal({"messages": []})
    assert "need 'messages'" in refusal({"prompt": "a", "tools": []})
    assert "role" in refusal({"messages": [{"content": "x"}]})
    assert refusal({"prompt": "a", "n": 3, "best_of": 2}).count("best_of")
    assert api.parse_request({"prompt": "a", "max_tokens": 0, "echo": True}).max_tokens == 0
    assert api.parse_request({"prompt": "a", "max_tokens": 0, "prompt_logprobs": 0}).max_tokens == 0


def test_floods_of_mistakes_are_answered_shortly():
    assert refusal({"prompt": "a"} | {f"x{i}": 1 for i in range(100_000)}).count(",") == 4
    assert len(refusal({"prompt": ["a"] * 500_000})) < 1000
    assert len(refusal({"messages": [1] * 500_000})) < 1000
    assert len(refusal({"prompt": "a", "x" * 10**6: 1})) < 200


def test_values_that_json_cannot_express_are_refused():
    def nested(depth: int) -> dict:
        value: dict = {}
        for _ in range(depth):
            value = {"v": value}
        return value

    for bad in (b"x", float("inf"), "\ud800", {b"k": 1}, msgpack.Timestamp(1), msgpack.ExtType(5, b"")):
        message = refusal({"prompt": "a", "metadata": {"k": bad}})
        message.encode()
        message = refusal({"messages": [{"role": "user", "content": "x", "more": bad}]})
        message.encode()
    assert "nested" in refusal({"messages": [{"role": "user", "content": "x", "more": nested(100)}]})
    assert "nested" in refusal({"prompt": "a", "metadata": nested(200)})
    refusal({"prompt": "\ud800"}).encode()
    refusal({"prompt": "a", "\ud800": 1}).encode()
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    refusal({"prompt": "a", "metadata": {"k": deep}})
    refusal({"messages": [{"role": "user", "content": "x", "more": deep}]})


@pytest.mark.parametrize(
    "data",
    [b"", b" ", b"{", b"{}}", b"[]", b'"x"', b"\xff\xfe", b'{"a": NaN}', b'{"a": Infinity}', b'{"a": "\xff"}', b"\x80\x01",
     b"\x81\x01\x01", b"\x81\xa1a", b'{"a":' * 100_000, b"\x91" * 100_000, b'{"a":' + b"9" * 5000 + b"}", b"\xc1"],
)  # fmt: skip
def test_undecodable(data: bytes):
    with pytest.raises(GorgonError) as caught:
        api.decode_body(data)
    assert caught.value.code == ErrorCode.INVALID_REQUEST
    assert len(caught.value.message) < 300


def test_encodings_are_told_apart():
    body = {"prompt": "ä", "n": 1}
    assert api.decode_body(b" \n" + json.dumps(body).encode()) == (body, "json")
    assert api.decode_body(msgpack.packb(body)) == (body, "msgpack")


def test_hash_tells_what_is_to_be_generated_and_nothing_else():
    body = {"prompt": "a", "temperature": 0.5, "id": "1"}
    same = {
        "id": "2",
        "temperature": 0.5,
        "prompt": "a",
        "stream": False,
        "batched": True,
        "traceparent": f"00-{1:032x}-{1:016x}-00",
        "deadline": 3.5,
        "seed": None,
    }
    assert api.hash_body(body) == api.hash_body(same)
    assert len(api.hash_body(body)) == 16
    others = [body | {"prompt": "b"}, body | {"n": 2}, body | {"metadata": {"a": 1}}, {"messages": "a"}]
    assert len({api.hash_body(b) for b in [body, *others]} | {api.hash_body(body, model="m")}) == 6


def test_token_ids_as_a_prompt():
    ids = [0, 5, 2**31 - 1]
    assert api.parse_request({"prompt": ids}).prompt == ids
    assert "item 2 " in refusal({"prompt": [1, 2, 2**31, -1]})
    assert "item 1 " in refusal({"prompt": [1, True]})
    bodies = [{"prompt": ids}, {"prompt": ids[::-1]}, {"prompt": ids[:2]}, {"prompt": str(ids)}]
    assert len({api.hash_body(body) for body in bodies}) == 4
    assert api.hash_body({"prompt": ids}) == api.hash_body({"prompt": list(ids)})


def test_events_in_both_encodings():
    event = api.tokens_event("r", 0, 0, [1], "ü", 0, [{"id": 1, "logprob": float("-inf"), "top": [[1, -0.5]]}])
    assert json.loads(api.encode_event(event, "json"))["logprobs"][0]["logprob"] is None
    assert msgpack.unpackb(api.encode_event(event, "msgpack")) == event
    odd = event | {"metadata": {"big": 2**70, "half": "\ud800"}}
    assert json.loads(api.encode_event(odd, "json")) == json.loads(api.encode_event(event, "json")) | {
        "metadata": odd["metadata"]
    }
    assert len(api.encode_for(ReplyTo("x"), [event, event])) == 2
    assert json.loads(api.encode_for(ReplyTo("x", batched=True), [event])[0])[0]["text"] == "ü"
    error = api.error_event("r", GorgonError(ErrorCode.OVERLOADED, "m", retry_after=1.5))
    assert error == dict(event="error", id="r", code="overloaded", message="m", retryable=True, retry_after=1.5)


def test_the_documentation_names_every_field_and_every_code():
    text = (Path(__file__).parents[2] / "docs/protocol.md").read_text(encoding="utf-8")
    fields = text.split("## Request")[1].split("## Events")[0]
    assert set(re.findall(r"^\| `(\w+)` ", fields, re.M)) == set(api.GenerateRequest.model_fields)
    codes = text.split("### Error codes")[1].split("## Never missing")[0]
    documented = dict(re.findall(r"^\| `(\w+)` \| (yes|no) ", codes, re.M))
    assert documented == {str(code): "yes" if code in RETRYABLE else "no" for code in ErrorCode}
