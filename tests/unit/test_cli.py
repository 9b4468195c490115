"""The `gorgon` command: what people get wrong, and who reads what it prints."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import nats
import pytest
from typer.testing import CliRunner

from services.cli import _say_error, app
from shared import subjects
from shared.broker import Broker

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "wrong",
    [
        ["up", "--model", "no/such/folder"],
        ["up", "--model-path", "/no/such/folder"],
        ["up", "--port", "70000"],
        ["up", "--workers", "-1"],
        ["run", "--model-path", "/no/such/folder"],
        ["generate", "x", "--model", "no subject"],
        ["generate", "x", "--tenant", "a.b"],
        ["attach", "no subject"],
        ["cancel", "no subject"],
        ["top", "--model", "no subject"],
        ["tail", "--stage", "tokeniser"],
    ],
)
def test_what_cannot_be_is_refused_at_once(wrong: list[str]) -> None:
    result = CliRunner().invoke(app, wrong)
    assert result.exit_code == 2 and "Usage" in result.output, result.output


def test_an_error_is_one_line_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    message = "structured: [/a] in [red]" + " and more of it" * 20
    assert _say_error("invalid_request", message) == 1
    assert capsys.readouterr().err == f"invalid_request: {message}\n"


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GORGON_REPLICAS", "many")
    result = CliRunner().invoke(app, ["ps"])
    assert result.exit_code == 1 and "GORGON_REPLICAS" in result.output and "Traceback" not in result.output


async def test_tail_ends_when_its_reader_has_gone(nats_server: Broker) -> None:
    command = (sys.executable, "-m", "services.cli", "tail", "--nats", nats_server.url)
    tail = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=-1, stderr=-1)
    assert tail.stdout is not None and tail.stderr is not None
    client = await nats.connect(nats_server.url)
    line = json.dumps(dict(ts="now", level="info", stage="tokenizer", event="accepted", request_id="t.r")).encode()

    async def log_forever() -> None:
        while True:
            await client.publish(subjects.log("tokenizer", "t-1"), line)
            await asyncio.sleep(0.05)

    logging = asyncio.create_task(log_forever())
    try:
        async with asyncio.timeout(30):
            assert b"accepted" in await tail.stdout.readline()
            tail._transport.get_pipe_transport(1).close()  # type: ignore[attr-defined]
            assert await tail.wait() == 1
            assert await tail.stderr.read() == b""
    finally:
        logging.cancel()
        await client.close()
