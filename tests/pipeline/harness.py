"""A whole deployment in real processes on a real nats-server, and a client of it that knows nothing but docs/protocol.md."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import pytest
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg

from services.running import running
from services.supervisor import GATEWAY, STAGES, Plan, Supervisor
from shared import presence
from shared.broker import free_port, free_ports
from shared.config import StageSettings
from shared.messages import Heartbeat, WorkerHeartbeat
from shared.nats_bus import NatsBus

SHARED = Path(__file__).resolve().parents[3] / "shared"
TERMINAL = {"finished", "cancelled", "error"}
WAIT = 30.0

needs_weights = pytest.mark.skipif(not (SHARED / "data/weights").is_dir(), reason="../shared/data/weights is not here")
needs_prompts = pytest.mark.skipif(not (SHARED / "data/prompts").is_dir(), reason="../shared/data/prompts is not here")


def weights(name: str) -> Path:
    return SHARED / "data/weights" / name


@dataclass
class Deployment:
    supervisor: Supervisor
    bus: NatsBus
    expected_deaths: dict[str, int] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return self.supervisor.plan.nats_url

    @property
    def model(self) -> str:
        return self.supervisor.plan.model

    async def beats(self) -> list[Heartbeat | WorkerHeartbeat]:
        expected = len(self.supervisor.stages)
        return await presence.gather(self.bus, 1.0, lambda beats: len(beats) >= expected)

    async def until_served(self) -> None:
        """Until every partition of the log is served: what is in it before that is delivered, but not measured."""
        settings = StageSettings()
        partitions = int(self.supervisor.plan.env.get("GORGON_PARTITIONS", settings.partitions))
        async with asyncio.timeout(WAIT):
            while True:
                beats = map(presence.base_of, await self.beats())
                if sum(beat.detail["serving"] for beat in beats if beat.stage == "detokenizer") == partitions:
                    return

    async def until_idle(self) -> None:
        """Until no stage has anything in flight and every pool is full again."""
        last: list[str] = []
        try:
            async with asyncio.timeout(WAIT):
                while last := [c for beat in await self.beats() for c in complaints(beat)]:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise AssertionError(f"not idle again: {last}") from None

    def deaths(self) -> dict[str, int]:
        return {child.name: child.restarts for child in self.supervisor.children() if child.restarts}


def complaints(beat: Heartbeat | WorkerHeartbeat) -> list[str]:
    base = presence.base_of(beat)
    found = [f"{base.stage}: {base.in_flight} in flight"] if base.in_flight else []
    if isinstance(beat, WorkerHeartbeat):
        if beat.running:
            found.append(f"running: {beat.running}")
        if beat.kv_tokens_free != beat.kv_tokens_total:
            found.append(f"{beat.kv_tokens_total - beat.kv_tokens_free} KV tokens are not back")
        if base.detail["slots_free"] != beat.max_seqs or base.detail["outbox"]:
            found.append(f"slots or outbox: {base.detail}")
    return found


@asynccontextmanager
async def deployed(
    data: Path,
    model: str,
    model_path: Path,
    flags: dict[str, list[str]] | None = None,
    copies: dict[str, int] | None = None,
    **more: Any,
) -> AsyncIterator[Deployment]:
    """One of each stage, ready. The worker computes on one CPU thread. `more` goes into the Plan."""
    flags = {"model_worker": ["--device", "cpu", "--threads", "1", "--max-seqs", "64"]} | (flags or {})
    plan = Plan(data, model, model_path, free_port(), dict.fromkeys(STAGES, 1) | (copies or {}), flags, **more)
    plan.http_port = free_ports(plan.copies.get(GATEWAY, 0))
    async with running(plan) as (supervisor, bus):
        deployment = Deployment(supervisor, bus)
        yield deployment
        assert deployment.deaths() == deployment.expected_deaths, "a stage died"


@dataclass
class Answer:
    """The events of one request, each checked as it comes: every position and character once and in order, one terminal event."""

    events: list[dict[str, Any]] = field(default_factory=list)
    ids: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    end: dict[str, Any] | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    broken: str = ""
    progress: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        name = event["event"]
        if name == "accepted":
            pass  # from the tokenizer: it may be overtaken by what the detokenizer sends
        elif self.end is not None:
            self.broken = f"{event} after the terminal event"
        elif name == "tokens":
            choice = event["choice"]
            ids, text = self.ids.setdefault(choice, []), self.text.setdefault(choice, "")
            if event["position"] != len(ids) or event["offset"] != len(text):
                self.broken = f"{event} at position {len(ids)}, offset {len(text)}"
            ids += event["ids"]
            self.text[choice] = text + event["text"]
        elif name in TERMINAL:
            self.end = event
            self.ended.set()
        self.progress.set()

    @property
    def names(self) -> list[str]:
        return [event["event"] for event in self.events]

    @property
    def code(self) -> str | None:
        return None if self.end is None else self.end.get("code")

    async def wait(self, timeout: float = WAIT) -> Answer:
        try:
            await asyncio.wait_for(self.ended.wait(), timeout)
        except TimeoutError:
            raise AssertionError(f"no end after {timeout:g} s: {self.events[-3:]}") from None
        return self

    async def until_tokens(self, count: int) -> None:
        async with asyncio.timeout(WAIT):
            while sum(map(len, self.ids.values())) < count:
                self.progress.clear()
                await self.progress.wait()


class RawClient:
    """nats-py and nothing else. `check` at the end finds events that came after the end of a request, too."""

    def __init__(self, url: str, model: str) -> None:
        self.model = model
        self.nc = Nats()
        self._url = url
        self._answers: dict[str, Answer] = {}

    async def __aenter__(self) -> RawClient:
        await self.nc.connect(self._url)
        self._inbox = self.nc.new_inbox()
        await self.nc.subscribe(f"{self._inbox}.*", cb=self._on_message)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.nc.close()

    async def _on_message(self, msg: Msg) -> None:
        answer = self._answers[msg.subject]
        if not msg.data and msg.headers:
            answer.add(dict(event="error", id=None, code="no responders", message="NATS: nobody listens"))
        else:
            # The answer's encoding is the request's; of a request that is neither, whatever its first byte looks like.
            answer.add(json.loads(msg.data) if msg.data[:1] == b"{" else msgpack.unpackb(msg.data))

    async def send(self, body: dict[str, Any] | bytes, *, encoding: str = "json", subject: str = "") -> Answer:
        data = (
            body
            if isinstance(body, bytes)
            else json.dumps(body).encode()
            if encoding == "json"
            else msgpack.packb(body)
        )
        reply = f"{self._inbox}.{len(self._answers)}"
        answer = Answer()
        self._answers[reply] = answer
        await self.nc.publish(subject or f"llm.v1.generate.{self.model}", data, reply=reply)
        return answer

    async def ask(self, body: dict[str, Any] | bytes, *, encoding: str = "json", subject: str = "") -> Answer:
        """Sends a request and waits for its end."""
        return await (await self.send(body, encoding=encoding, subject=subject)).wait()

    def check(self) -> None:
        for answer in self._answers.values():
            assert not answer.broken, answer.broken
