"""Ten thousand requests that are wrong in some way: each gets one answer with a stable code, and the service goes on."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgpack

from shared import subjects
from shared.api import GenerateRequest
from shared.errors import ErrorCode
from tests.protocol.test_tokenizer import MODEL, World
from tests.protocol.virtual import virtual

CASES = 10_000
VALID: dict[str, Any] = {
    "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.0, "seed": 1,
    "n": 1, "stop": ["."], "stop_token_ids": [3], "ignore_eos": False, "repetition_penalty": 1.1, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "logprobs": 1, "priority": 0, "deadline": 5.0, "stream": True, "metadata": {"k": "v"},
}  # fmt: skip
CHAT: dict[str, Any] = {
    "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
    "tools": [{"type": "function"}],
    "chat_template_kwargs": {"a": 1},
}


def nested(rng: random.Random, depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value] if rng.random() < 0.5 else {"k": value}
    return value


def odd_value(rng: random.Random) -> Any:
    """Something that some field will not like. All of it can be written as MessagePack or JSON."""
    makers: list[Callable[[], Any]] = [
        lambda: None,
        lambda: rng.choice([True, False]),
        lambda: rng.choice([0, -1, 2**31, 2**63, -(2**63), 10**19, 10**300]),
        lambda: rng.choice([0.0, -0.5, 1e308, -1e308, 5e-324, float("nan"), float("inf"), -float("inf")]),
        lambda: rng.choice(
            ["", " ", "\x00", "\ud800", "a\udfffb", "🦜", "x" * 300, "default.x", "*", ">", "../..", "{{ 7 * 7 }}"]
        ),
        lambda: [],
        lambda: {},
        lambda: [odd_value(rng) for _ in range(rng.randrange(4))],
        lambda: {rng.choice(["role", "content", "type", "", "__class__"]): odd_value(rng)},
        lambda: [{"role": rng.choice(["user", "wizard", ""]), "content": odd_value(rng)}],
        lambda: [rng.randrange(-5, 5000) for _ in range(rng.randrange(1200))],
        lambda: nested(rng, rng.choice([3, 70, 600, 1500])),
    ]
    return rng.choice(makers)()


def mutated_body(rng: random.Random) -> dict[str, Any]:
    body = dict(VALID)
    if rng.random() < 0.3:
        body.pop("prompt")
        body |= CHAT
    for _ in range(rng.randrange(1, 4)):
        kind = rng.randrange(4)
        field = rng.choice(sorted(GenerateRequest.model_fields.keys() - {"id", "batched"}))
        if kind == 0 and body:
            body.pop(rng.choice(sorted(body)))
        elif kind == 1:
            body[rng.choice(["promt", "Prompt", "", "\ud800", "x" * 1000, "best", "🦜"])] = odd_value(rng)
        else:
            body[field] = odd_value(rng)
    return body


def well_formed(rng: random.Random) -> bytes:
    """Wrong only in what it says, if at all."""
    body: dict[str, Any] = dict(VALID)
    length = rng.choice([1, 900, 1016, 1017, 1023, 1024, 3000])
    match rng.randrange(4):
        case 0:
            body["prompt"] = [rng.randrange(rng.choice([4096, 4100])) for _ in range(length)]
        case 1:
            body["prompt"] = "x " * length
        case 2:
            body["stop_token_ids"] = [rng.choice([0, 4095, 4096, 2**31 - 1])]
        case _:
            del body["prompt"]
            content = [{"type": rng.choice(["text", "image_url"]), "text": "x"}]
            kwargs = {rng.choice(["tools", "continue_final_message", "bos_token"]): "x"}
            body |= {"messages": [{"role": "user", "content": content}], "chat_template_kwargs": kwargs}
    return encoded(rng, body)


def encoded(rng: random.Random, body: Any) -> bytes:
    try:
        if rng.random() < 0.5:
            return json.dumps(body).encode()  # surrogates, NaN and the rest as Python writes them
        return msgpack.packb(body, unicode_errors="surrogatepass")
    except (ValueError, RecursionError, OverflowError):
        return json.dumps(str(type(body))).encode()


def broken_bytes(rng: random.Random) -> bytes:
    data = bytearray(encoded(rng, VALID | {"id": "x"}))
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(data)) if data else 0
        match rng.randrange(5):
            case 0:
                del data[at:]
            case 1:
                data[at : at + 1] = rng.randbytes(1)
            case 2:
                del data[at : at + rng.randrange(4)]
            case 3:
                data[at:at] = rng.choice(
                    [b"\xff", b"\xed\xa0\x80", b"\x00", b"{", b"[" * 50, b'"', b"\\ud800", b"\xc1", b"NaN"]
                )
            case _:
                data += rng.randbytes(rng.randrange(8))
    return bytes(data)


def random_bytes(rng: random.Random) -> bytes:
    return rng.choice([b"", b"{", b"\x80", b"\xde\xff\xff", b"\xdb\xff\xff\xff\xff"]) + rng.randbytes(
        rng.randrange(200)
    )


def wrong_shape(rng: random.Random) -> bytes:
    return encoded(rng, rng.choice([odd_value(rng), [VALID], "text", 5, {"prompt": odd_value(rng)}]))


def request(rng: random.Random) -> bytes:
    kind = rng.random()
    if kind < 0.6:
        return encoded(rng, mutated_body(rng))
    return rng.choice([broken_bytes, random_bytes, wrong_shape, well_formed])(rng)


@virtual
async def test_malformed_requests() -> None:
    rng = random.Random(20)
    world = World()
    service = await world.start(max_in_flight=CASES, max_waiting=2 * CASES, log_level="error")
    subjects_sent = [MODEL] * 20 + ["nobody", "de_mo", "x" * 64]
    requests = {f"inbox.{i}": (request(rng), rng.choice(subjects_sent)) for i in range(CASES)}
    for start in range(0, CASES, 500):
        for reply, (data, model) in list(requests.items())[start : start + 500]:
            world.send(data, reply=reply, model=model)
        await asyncio.sleep(0.1)
    await asyncio.sleep(2.0)

    answers = Counter(subject for subject, _ in world.inbox)
    assert answers == Counter(requests.keys()), "each request has one answer"
    codes = Counter()
    for (subject, _), event in zip(world.inbox, world.events(), strict=True):
        data, model = requests[subject]
        assert event["event"] in ("accepted", "error")
        if event["event"] == "error":
            code = ErrorCode(event["code"])
            assert code not in (ErrorCode.INTERNAL, ErrorCode.UNAVAILABLE), (data, event)
            assert event["message"]
            codes[code] += 1
        if model != MODEL:
            assert event.get("code") == ErrorCode.UNKNOWN_MODEL
    accepted = CASES - codes.total()
    assert CASES / 50 < accepted < CASES / 2
    assert codes[ErrorCode.INVALID_REQUEST] > CASES / 3
    assert {ErrorCode.UNKNOWN_MODEL, ErrorCode.UNSUPPORTED, ErrorCode.CONTEXT_LENGTH_EXCEEDED} <= codes.keys()
    counts = service.heartbeat().detail
    assert counts["accepted"] + counts.get("repeated", 0) == accepted
    assert len(world.stored(subjects.STREAM_REQ)) == counts["accepted"]

    assert service.bus.handler_errors == 0
    assert service.failed is not None and not service.failed.done()
    assert (await world.ask({"prompt": "Once"}))["event"] == "accepted"
    await world.stop()
