"""A worker is killed in the middle of a document: another goes on with it, in the grammar and in the text."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from shared import codec, subjects
from shared import messages as m
from shared.bus import Message
from tests.pipeline.harness import WAIT, Answer, Deployment, RawClient, deployed
from tests.unit.test_structured_engine import SCHEMA

DEMO = Path(__file__).resolve().parents[2] / "models/demo"
PROMPT = "The clerk filled in the form, and wrote:\n"


class Killer:
    """Reads the token log and kills the worker that has just brought a request to a certain position."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.epochs: dict[str, set[int]] = {}
        self._positions: dict[str, int] = {}

    def at(self, key: str, position: int) -> None:
        self._positions[key] = position

    def on_entry(self, message: Message) -> None:
        entry = codec.decode(message.data)
        if not isinstance(entry, m.StepTokens):
            return
        for tokens in entry.entries:
            self.epochs.setdefault(tokens.key, set()).add(tokens.epoch)
            position = self._positions.get(tokens.key)
            if position is not None and tokens.position + len(codec.unpack_ids(tokens.ids)) >= position:
                del self._positions[tokens.key]
                stages = self.deployment.supervisor.stages
                name = next(name for name in stages if entry.worker.startswith(name))
                self.deployment.expected_deaths[name] = self.deployment.expected_deaths.get(name, 0) + 1
                stages[name].kill(signal.SIGKILL)

    async def until_restarted(self) -> None:
        async with asyncio.timeout(WAIT):
            while self.deployment.deaths() != self.deployment.expected_deaths:  # noqa: ASYNC110
                await asyncio.sleep(0.05)


async def killed_at(tmp_path: Path, positions: list[int] | None, speculate: bool) -> None:
    """positions: None, every one."""
    flags = ["--device", "cpu", "--threads", "1", "--dtype", "float32", "--max-seqs", "4", "--num-blocks", "256"]
    flags += [] if speculate else ["--speculate", "false"]
    body: dict[str, Any] = dict(prompt=PROMPT, max_tokens=90, temperature=0.0, structured={"json_schema": SCHEMA})
    async with (
        deployed(tmp_path, "demo", DEMO, {"model_worker": flags}, {"model_worker": 2}) as deployment,
        RawClient(deployment.url, "demo") as client,
    ):
        killer = Killer(deployment)
        for partition in range(8):
            await deployment.bus.subscribe(subjects.tok("demo", partition), killer.on_entry)
        whole = await client.ask(body)
        assert whole.end is not None and whole.end["choices"][0]["finish_reason"] == "stop"
        Draft202012Validator(SCHEMA).validate(json.loads(whole.text[0]))
        migrated = 0
        for position in positions or range(1, len(whole.ids[0])):
            killer.at(f"default.k{position}", position)
            answer: Answer = await client.ask(body | {"id": f"k{position}"})
            assert answer.ids[0] == whole.ids[0], position
            assert answer.text[0] == whole.text[0], position
            assert answer.end is not None and answer.end["choices"] == whole.end["choices"]
            migrated += max(killer.epochs[f"default.k{position}"]) > 1
            await killer.until_restarted()
        # Near the end a document may be through before the signal is.
        assert migrated >= 0.7 * len(positions or whole.ids[0])
        await deployment.until_idle()
        client.check()


async def test_a_document_survives_its_workers(tmp_path: Path) -> None:
    await killed_at(tmp_path, [1, 12], speculate=True)


@pytest.mark.chaos
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("speculate", [False, True])
async def test_a_document_survives_a_kill_at_every_token(tmp_path: Path, speculate: bool) -> None:
    await killed_at(tmp_path, None, speculate)
