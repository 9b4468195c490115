"""The gateway among other processes: several models on one NATS, API keys and tenants, a client that does not read, a gateway that
is told to go. The workers make fixed tokens at a fixed pace."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio

from services.cli import DEMO_MODEL
from services.supervisor import GATEWAY, STAGES, Child
from shared import presence
from tests.pipeline.harness import Deployment, deployed
from tests.pipeline.http_client import Broken, Event, call

pytestmark = [pytest.mark.asyncio(loop_scope="module")]
TEXT = "/v1/completions"
STEP = 0.02
STALL = 2.0  # seconds
GRACE = 1.0
VOCABULARY = json.loads((DEMO_MODEL / "config.json").read_text())["vocab_size"]
FIXED = ["--engine", "fixed", "--fixed.step-time", str(STEP), "--fixed.vocab-size", str(VOCABULARY)]
BLUE, RED = {"Authorization": "Bearer blue-key"}, {"Authorization": "Bearer red-key"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def deployment(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Deployment]:
    """Two gateways that want keys."""
    data = tmp_path_factory.mktemp("keys")
    tables = [
        f'[keys.{name}]\nsha256 = "{hashlib.sha256(f"{name}-key".encode()).hexdigest()}"\n' for name in ("blue", "red")
    ]
    (data / "keys.toml").write_text("".join(tables) + "requests_per_minute = 6\n")
    flags = ["--api-keys", str(data / "keys.toml"), "--stall-timeout", str(STALL), "--drain-timeout", "3"]
    flags += ["--reattach-grace", str(GRACE)]
    async with deployed(data, "demo", DEMO_MODEL, {"model_worker": FIXED, GATEWAY: flags}, {GATEWAY: 2}) as deployment:
        yield deployment


@pytest.fixture
def port(deployment: Deployment) -> int:
    return deployment.supervisor.plan.http_port


def body(prompt: int, tokens: int = 50, **more: Any) -> dict[str, Any]:
    return dict(model="demo", prompt=[prompt, 5, 6], max_tokens=tokens, seed=1, stream=True) | more


def said(events: list[Event]) -> str:
    return "".join(e.json["choices"][0]["text"] for e in events if e.data != "[DONE]" and e.json.get("choices"))


async def test_keys_and_tenants(deployment: Deployment, port: int) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        answer = await call(port, TEXT, body(7), headers)
        assert (answer.status, (await answer.body())["error"]["type"]) == (401, "invalid_request_error")
        assert (await call(port, "/v1/models", headers=headers)).status == 401
        assert (await call(port, "/api/pipeline", headers=headers)).status == 401
    assert (await call(port, "/health")).status == 200
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n".encode())
    async with asyncio.timeout(5):
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 401 "), "its body is not waited for"
        await reader.readuntil(b"missing_api_key")
    writer.close()
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="wrong", max_retries=0) as stranger:
        for _ in range(5):
            with pytest.raises(openai.AuthenticationError):
                await stranger.completions.create(model="demo", prompt="x" * 3_500_000)
    key = {"Idempotency-Key": "one"}
    blue = [event async for event in (await call(port, TEXT, body(7), BLUE | key)).events()]
    other = [event async for event in (await call(port + 1, TEXT, body(8), RED | key)).events()]
    assert blue[-1].data == other[-1].data == "[DONE]", "the same key of another tenant is another request"
    stolen = await call(port, TEXT, body(7), RED | {"Last-Event-ID": blue[3].id})
    assert (stolen.status, (await stolen.body())["error"]["code"]) == (404, "not_found")
    mine = await call(port + 1, TEXT, body(7), BLUE | {"Last-Event-ID": blue[3].id})
    assert said(blue[:4]) + said([event async for event in mine.events()]) == said(blue)


async def test_rate_limit(deployment: Deployment, port: int) -> None:
    statuses = []
    for _ in range(8):
        answer = await call(port, TEXT, body(9, tokens=1, stream=False), RED)
        statuses.append(answer.status)
    assert statuses.count(200) >= 4 and statuses[-1] == 429
    assert (await answer.body())["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(answer.headers["retry-after"]) <= 10
    assert (await call(port, TEXT, body(9, tokens=1, stream=False), BLUE)).status == 200, "others are not concerned"


async def test_a_client_that_does_not_read_is_cut_off_and_delays_nobody(deployment: Deployment, port: int) -> None:
    data = json.dumps(body(10, tokens=3000, n=8, logprobs=20)).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer blue-key\r\nContent-Type: application/json\r\n"
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", port))
        deaf.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        longest, last = 0.0, time.monotonic()
        async for _ in (await call(port, TEXT, body(11, tokens=200), BLUE)).events():
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        assert longest < STALL / 2, "its neighbour's tokens come all the while"
        async with asyncio.timeout(30):
            log = deployment.supervisor.stages[f"{GATEWAY}-1"].log_path
            while "client_stalled" not in log.read_text():  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        deaf.settimeout(5)
        with pytest.raises(ConnectionResetError):  # not what was written before, which nobody may ever read
            while deaf.recv(1 << 16):
                pass
        await deployment.until_idle()


async def test_heads_without_end_are_refused(deployment: Deployment, port: int) -> None:
    for start in (b"GET /", b"GET / HTTP/1.1\r\nX: "):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(start)
        answer = asyncio.create_task(reader.read())
        try:
            for _ in range(64):
                writer.write(b"a" * (64 << 10))
                await writer.drain()
        except OSError:
            pass  # it has stopped listening
        with contextlib.suppress(OSError):
            assert b" 431 " in await asyncio.wait_for(answer, 5)
        writer.close()
    log = deployment.supervisor.stages[f"{GATEWAY}-1"].log_path
    assert log.read_text().count("head_too_large") == 2
    assert (await call(port, "/v1/models", headers=BLUE | {"X-Long": "a" * 60_000})).status == 200


async def test_whoever_comes_back_elsewhere_is_not_cancelled_and_who_does_not_is(
    deployment: Deployment, port: int
) -> None:
    async def begin(key: str, tokens: int) -> None:
        answer = await call(port, TEXT, body(16, tokens), BLUE | {"Idempotency-Key": key})
        async for _ in answer.events():
            break
        answer.close()

    several = round(4 * GRACE / STEP)
    await begin("back", several)
    again = await call(port + 1, TEXT, body(16, several), BLUE | {"Idempotency-Key": "back"})
    events = [event async for event in again.events()]
    assert events[-1].data == "[DONE]", "it lasted for several graces of the gateway that its client has left"
    await begin("gone", 500)
    async with asyncio.timeout(500 * STEP / 2):
        await deployment.until_idle()
    late = await call(port, TEXT, body(16, tokens=500, stream=False), BLUE | {"Idempotency-Key": "gone"})
    assert (late.status, (await late.body())["error"]["code"]) == (499, "cancelled")


async def test_a_gateway_that_is_told_to_go(deployment: Deployment, port: int) -> None:
    """What is short ends there; what is long goes on elsewhere."""
    long = body(12, tokens=400)
    headers = BLUE | {"Idempotency-Key": "long"}
    short = await call(port, TEXT, body(13, tokens=60), BLUE)
    answer = await call(port, TEXT, long, headers)
    whole = asyncio.create_task(call(port, TEXT, body(17, tokens=400, stream=False), BLUE | {"Idempotency-Key": "all"}))
    seen: list[Event] = []
    ended: list[Event] = []

    async def read(answer: Any, into: list[Event]) -> None:
        async for event in answer.events():
            into.append(event)

    readers = [asyncio.create_task(read(short, ended)), asyncio.create_task(read(answer, seen))]
    while len(seen) < 5:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    deployment.expected_deaths[f"{GATEWAY}-1"] = 1
    deployment.supervisor.stages[f"{GATEWAY}-1"].kill(signal.SIGTERM)
    done = await asyncio.gather(*readers, return_exceptions=True)
    assert done[0] is None and ended[-1].data == "[DONE]"
    assert isinstance(done[1], Broken), done
    given_up = await whole
    assert (given_up.status, (await given_up.body())["error"]["code"]) == (503, "unavailable")
    assert given_up.headers["retry-after"] == "1" and given_up.headers["x-request-id"]
    log = deployment.supervisor.stages[f"{GATEWAY}-1"].log_path
    assert "Traceback" not in log.read_text() and "without completing response" not in log.read_text()
    resumed = await call(port + 1, TEXT, long, headers | {"Last-Event-ID": answer.last_id})
    rest = [event async for event in resumed.events()]
    assert rest[-1].data == "[DONE]"
    again = [event async for event in (await call(port + 1, TEXT, long, headers)).events()]
    assert said(seen) + said(rest) == said(again)
    assert deployment.supervisor.stages[f"{GATEWAY}-1"].restarts <= 1
    async with asyncio.timeout(30):
        while deployment.deaths() != deployment.expected_deaths:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_several_models_on_one_nats(deployment: Deployment, port: int, tmp_path: Path) -> None:
    missing = await call(port + 1, TEXT, body(14, model="second"), BLUE)
    assert (missing.status, (await missing.body())["error"]["code"]) == (404, "model_not_found")
    common = ["--nats-url", deployment.url, "--model", "second", "--model-path", str(DEMO_MODEL)]
    others = [
        Child(
            f"second-{stage}",
            [sys.executable, "-m", f"services.{stage}", *common, *(FIXED if stage == "model_worker" else [])],
            tmp_path / f"{stage}.log",
        )
        for stage in STAGES
    ]
    try:
        await asyncio.gather(*(child.start() for child in others))
        await presence.wait_for_stages(deployment.bus, dict.fromkeys(STAGES, 1), "second", 60)
        listed = await (await call(port + 1, "/v1/models", headers=BLUE)).body()
        assert [model["id"] for model in listed["data"]] == ["demo", "second"]
        answers = await asyncio.gather(*(call(port + 1, TEXT, body(15, model=m), BLUE) for m in ("demo", "second")))
        for answer, model in zip(answers, ("demo", "second"), strict=True):
            events = [event async for event in answer.events()]
            assert events[-1].data == "[DONE]" and {e.json["model"] for e in events[:-1]} == {model}
    finally:
        await asyncio.gather(*(child.stop() for child in others))
