"""Gateways killed in the middle of streams: whoever comes back, to whichever gateway, gets every token once.

GORGON_GATEWAY_KILLS   how many (default 10)
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from services.cli import DEMO_MODEL
from services.model_worker.fixed_engine import expected_ids
from services.model_worker.interface import EngineRequest
from services.model_worker.settings import FixedEngineSettings
from services.supervisor import GATEWAY
from shared.sampling import SamplingParams
from tests.pipeline.harness import Deployment, deployed
from tests.pipeline.http_client import Answer, Broken, Event, call

KILLS = int(os.environ.get("GORGON_GATEWAY_KILLS", "10"))
GATEWAYS = 3
CLIENTS = 24
TOKENS = 250
STEP = 0.02
VOCABULARY = json.loads((DEMO_MODEL / "config.json").read_text())["vocab_size"]
STREAM_LIMIT = 120.0  # seconds; a lost stream never ends
KINDS = ("resume", "again", "whole")

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(KILLS * 8 + 180)]


@dataclass
class Load:
    """Clients that start a stream as soon as their last one has ended, until `stopping`. `reading` counts streams by gateway."""

    ports: list[int]
    draw: random.Random
    reading: Counter[int] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)
    returns: int = 0
    broken: list[str] = field(default_factory=list)
    stopping: bool = False

    async def client(self, number: int) -> None:
        tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
        settings = FixedEngineSettings(step_time=STEP, vocab_size=VOCABULARY)
        turn = 0
        while not self.stopping:
            turn += 1
            kind = KINDS[(number + turn) % len(KINDS)]
            prompt = [3 + number, 3 + turn % 1000, 5]
            params = SamplingParams(max_tokens=TOKENS, seed=turn)
            ids = expected_ids(EngineRequest("r", 0, 1, prompt, params), settings)
            body = dict(model="demo", prompt=prompt, max_tokens=TOKENS, seed=turn, stream=kind != "whole")
            body |= dict(stream_options={"include_usage": True}) if kind != "whole" else {}
            try:
                async with asyncio.timeout(STREAM_LIMIT):
                    text, count = await getattr(self, kind)(body, {"Idempotency-Key": uuid.uuid4().hex})
            except TimeoutError:
                self.broken.append(f"{kind} {prompt}: no end")
                continue
            if (text, count) != (tokenizer.decode(ids, skip_special_tokens=True), len(ids)):
                self.broken.append(f"{kind} {prompt}: {count} tokens, {text!r}")
            self.done[kind] += 1

    async def resume(self, body: dict[str, Any], headers: dict[str, str]) -> tuple[str, int]:
        """Goes on after the last event."""
        events: list[Event] = []
        last_id = ""
        while True:
            more = {"Last-Event-ID": last_id} if last_id else {}
            try:
                async with self._answer(body, headers | more) as answer:
                    async for event in answer.events():
                        events.append(event)
                        last_id = answer.last_id or last_id
                return _said(events)
            except Broken:
                await self._pause()

    async def again(self, body: dict[str, Any], headers: dict[str, str]) -> tuple[str, int]:
        """Reads the same request from its beginning; what was seen before must come again."""
        seen = ""
        while True:
            events: list[Event] = []
            try:
                async with self._answer(body, headers) as answer:
                    async for event in answer.events():
                        events.append(event)
                text, count = _said(events)
                return (text, count) if text.startswith(seen) else (f"{seen!r} became {text!r}", count)
            except Broken:
                seen = max(seen, _text(events), key=len)
                await self._pause()

    async def whole(self, body: dict[str, Any], headers: dict[str, str]) -> tuple[str, int]:
        """Without a stream."""
        while True:
            try:
                async with self._answer(body, headers) as answer:
                    said = await answer.body()
                return said["choices"][0]["text"], said["usage"]["completion_tokens"]
            except Broken:
                await self._pause()

    def _answer(self, body: dict[str, Any], headers: dict[str, str]) -> _Reading:
        return _Reading(self, self.draw.choice(self.ports), body, headers)

    async def _pause(self) -> None:
        self.returns += 1
        await asyncio.sleep(self.draw.uniform(0.02, 0.2))


class _Reading:
    """A call to one gateway; an answer of 503 (it has just started) is as good as a broken one."""

    def __init__(self, load: Load, port: int, body: dict[str, Any], headers: dict[str, str]) -> None:
        self._load = load
        self._port = port
        self._body = body
        self._headers = headers

    async def __aenter__(self) -> Answer:
        self._load.reading[self._port] += 1
        try:
            self._answer = await call(self._port, "/v1/completions", self._body, self._headers)
            if self._answer.status == 503:
                raise Broken("503")
            assert self._answer.status == 200, await self._answer.body()
        except BaseException:
            self._load.reading[self._port] -= 1
            raise
        return self._answer

    async def __aexit__(self, *_: object) -> None:
        self._load.reading[self._port] -= 1
        self._answer.close()


def _text(events: list[Event]) -> str:
    said = (e.json for e in events if e.data != "[DONE]")
    return "".join(body["choices"][0]["text"] for body in said if body.get("choices"))


def _said(events: list[Event]) -> tuple[str, int]:
    if events[-1].data != "[DONE]":
        return events[-1].data, -1
    usage = [e.json["usage"] for e in events if e.data != "[DONE]" and e.json.get("usage")]
    return _text(events), usage[0]["completion_tokens"] if len(usage) == 1 else -1


async def kill_one(deployment: Deployment, load: Load) -> bool:
    """The gateway that most streams are being read from. False if none is at the moment."""
    for port, count in load.reading.most_common():
        child = deployment.supervisor.stages[f"{GATEWAY}-{port - load.ports[0] + 1}"]
        if count > 1 and child.pid is not None:
            os.kill(child.pid, signal.SIGKILL)
            deployment.expected_deaths[child.name] = deployment.expected_deaths.get(child.name, 0) + 1
            pid = child.pid
            while child.pid == pid:  # noqa: ASYNC110 - until the supervisor knows
                await asyncio.sleep(0.005)
            return True
    return False


async def test_killed_gateways_lose_nothing(tmp_path: Path) -> None:
    flags = ["--engine", "fixed", "--fixed.step-time", str(STEP), "--fixed.vocab-size", str(VOCABULARY)]
    async with deployed(tmp_path, "demo", DEMO_MODEL, {"model_worker": flags}, {GATEWAY: GATEWAYS}) as deployment:
        first = deployment.supervisor.plan.http_port
        load = Load(list(range(first, first + GATEWAYS)), random.Random(1))
        kills = 0
        async with asyncio.TaskGroup() as clients:
            for number in range(CLIENTS):
                clients.create_task(load.client(number))
            while kills < KILLS and not load.broken:
                await asyncio.sleep(load.draw.uniform(0.3, 1.0))
                kills += await kill_one(deployment, load)
            load.stopping = True
        print(f"{kills} kills, {sum(load.done.values())} streams {dict(load.done)}, {load.returns} returns")
        assert not load.broken, "\n".join(load.broken[:10])
        assert load.returns >= kills and all(load.done[kind] for kind in KINDS)
        await deployment.until_idle()
        while deployment.deaths() != deployment.expected_deaths:  # noqa: ASYNC110 - a last restart may be due
            await asyncio.sleep(0.1)
