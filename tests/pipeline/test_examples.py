"""The examples of docs/protocol.md do what they say, as they stand there (but for the server's address)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg

from tests.pipeline.harness import TERMINAL, Deployment, deployed, needs_weights, weights

pytestmark = [pytest.mark.asyncio(loop_scope="module"), needs_weights]
ROOT = Path(__file__).resolve().parents[2]
DOCS = (ROOT / "docs/protocol.md").read_text(encoding="utf-8")
# A folder with node_modules/@nats-io/transport-node in it: `npm install @nats-io/transport-node`.
NODE_FOLDER = Path(os.environ.get("GORGON_NODE_FOLDER", str(ROOT)))
START = "Once upon a time"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def deployment(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Deployment]:
    async with deployed(tmp_path_factory.mktemp("demo"), "demo", weights("stories260K")) as deployment:
        yield deployment


def examples(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS, re.DOTALL)


async def output_of(*command: str, cwd: Path = ROOT) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, cwd=cwd, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=-1, stderr=-1
    )
    async with asyncio.timeout(60):
        out, error = await process.communicate()
    assert process.returncode == 0, error.decode()
    return out.decode()


@pytest.mark.parametrize("number", range(len(examples("python"))))
async def test_python(deployment: Deployment, tmp_path: Path, number: int) -> None:
    code = examples("python")[number].replace("nats://127.0.0.1:4222", deployment.url)
    if "asyncio.run" not in code:  # what stands in a coroutine
        imports, rest = code.split("\n\n", 1)
        code = (
            f"import asyncio\n{imports}\n\nasync def main():\n{textwrap.indent(rest, '    ')}\n\nasyncio.run(main())\n"
        )
    (tmp_path / "example.py").write_text(code)
    text = await output_of(sys.executable, str(tmp_path / "example.py"))
    assert len(text.split()) > 10, text


@pytest.mark.skipif(shutil.which("node") is None, reason="no node")
@pytest.mark.skipif(
    not (NODE_FOLDER / "node_modules/@nats-io/transport-node").is_dir(),
    reason="no @nats-io/transport-node in $GORGON_NODE_FOLDER",
)
async def test_javascript(deployment: Deployment) -> None:
    (code,) = examples("js")
    file = NODE_FOLDER / "gorgon-example.mjs"
    file.write_text(code.replace("nats://127.0.0.1:4222", deployment.url))
    try:
        text = await output_of("node", str(file), cwd=NODE_FOLDER)
    finally:
        file.unlink()
    assert "finished" in text and len(text.split()) > 10, text


def seconds(option: str, options: str, default: str) -> float:
    number, unit = re.search(rf" --{option}=(\d+)(ms|s|m)", f"{options} --{option}={default}").groups()  # type: ignore[union-attr]
    return int(number) * {"ms": 0.001, "s": 1.0, "m": 60.0}[unit]


async def replies_of_cli(nc: Nats, subject: str, body: str, options: str) -> list[dict[str, Any]]:
    """What `nats req` prints (natscli's cli/req_command.go): with --replies=0 whatever comes within --timeout, which is here cut
    short a moment after the last event; with more, until so many are there, or none comes for the mean of their times since the
    question and --reply-timeout."""
    wanted = int(re.search(r"--replies=(\d+)", options).group(1))  # type: ignore[union-attr]
    whole, pause = seconds("timeout", options, "5s"), seconds("reply-timeout", options, "300ms")
    replies: asyncio.Queue[bytes] = asyncio.Queue()

    async def take(message: Msg) -> None:
        replies.put_nowait(message.data)

    inbox = nc.new_inbox()
    await nc.subscribe(inbox, cb=take)
    loop = asyncio.get_running_loop()
    began, patience = loop.time(), whole
    await nc.publish(subject, body.encode(), reply=inbox)
    events: list[dict[str, Any]] = []
    times = 0.0
    with contextlib.suppress(TimeoutError):
        while not wanted or len(events) < wanted:
            events.append(json.loads(await asyncio.wait_for(replies.get(), patience)))
            times += loop.time() - began
            patience = times / len(events) + pause if wanted else whole - (loop.time() - began)
            if not wanted and events[-1]["event"] in TERMINAL:
                patience = min(patience, 0.5)
    return events


async def test_the_ordinary_cli(deployment: Deployment) -> None:
    """The first example of the page, and the one with --replies=2."""
    commands = re.findall(r"nats req (llm\.v1\.generate\.demo) '(.*?)'( --replies=.*)", DOCS)
    assert {options[:12] for _, _, options in commands} == {" --replies=0", " --replies=2"}
    nc = Nats()
    await nc.connect(deployment.url)
    for subject, body, options in commands:
        if "messages" in body:  # this model has no chat template
            body = json.dumps({"prompt": START, "stream": json.loads(body).get("stream", True), "max_tokens": 20})
        events = await replies_of_cli(nc, subject, body, options)
        names = [event["event"] for event in events]
        streamed = "--replies=0" in options
        assert set(names) == ({"accepted", "tokens", "finished"} if streamed else {"accepted", "finished"})
        assert names[-1] == "finished" and names.count("finished") == 1
    await nc.close()
