"""The containers as a user runs them: up, scaled, one of each killed inside its container, down. Needs a Docker engine."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from shared import presence
from shared.client import Client
from shared.config import StageSettings
from shared.nats_bus import NatsBus

pytestmark = [pytest.mark.compose, pytest.mark.timeout(1500)]

ROOT = Path(__file__).resolve().parents[2]
PORT = 14222
URL = f"nats://127.0.0.1:{PORT}"
SCALED = {"tokenizer": 2, "model_worker": 2, "detokenizer": 2}
COPIES = {"gateway": 1, "scheduler": 1, **SCALED}
HTTP_PORT = 18000


def compose(*args: str, wait: float = 900) -> str:
    env = os.environ | {"NATS_PORT": str(PORT), "HTTP_PORT": str(HTTP_PORT), "COMPOSE_PROJECT_NAME": "gorgontest"}
    done = subprocess.run(
        ["docker", "compose", *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=wait, check=False
    )
    assert done.returncode == 0, f"docker compose {' '.join(args)}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def deployment() -> Iterator[None]:
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "info"], capture_output=True, check=False).returncode
    ):
        pytest.skip("no Docker engine runs here")
    compose("build")
    scale = [arg for stage, n in SCALED.items() for arg in ("--scale", f"{stage}={n}")]
    try:
        compose("up", "-d", "--wait", "--wait-timeout", "240", *scale)
        yield
    finally:
        compose("down", "-v", "--timeout", "20")


async def ask(client: Client, number: int) -> str:
    stream = client.generate(f"Chapter {number}. The old man", max_tokens=24, temperature=0.8, seed=number)
    result = await stream.result()
    assert result.usage["completion_tokens"] > 0
    return result.id


async def fifty(first: int) -> None:
    bus = await NatsBus.connect(StageSettings(nats_url=URL))
    try:
        async with Client(bus, "demo") as client:
            ids = await asyncio.gather(*(ask(client, first + n) for n in range(50)))
        assert len(set(ids)) == 50
    finally:
        await bus.close()


async def wait_ready() -> None:
    bus = await NatsBus.connect(StageSettings(nats_url=URL))
    try:
        await presence.wait_for_stages(bus, COPIES, "demo", 120)
    finally:
        await bus.close()


def kill_inside(stage: str) -> None:
    """Kills the stage's process inside its first container, as a crash would; the restart policy brings it back."""
    containers = [json.loads(line) for line in compose("ps", "--format", "json", stage).splitlines()]
    name = containers[0]["Name"]
    script = (
        "import os, signal; pids = [int(p) for p in os.listdir('/proc') if p.isdigit() and p not in ('1', str(os.getpid()))];"
        + (
            f"[os.kill(p, signal.SIGKILL) for p in pids if b'services.{stage}' in open(f'/proc/{{p}}/cmdline', 'rb').read()]"
        )
    )
    # The container ends with its process, and the exec with the container: its status tells nothing.
    subprocess.run(["docker", "exec", name, "python", "-c", script], check=False, capture_output=True, timeout=60)
    inspect = ["docker", "inspect", "-f", "{{.RestartCount}} {{.State.Status}}", name]
    for _ in range(300):
        count, state = subprocess.run(inspect, check=True, capture_output=True, text=True).stdout.split()
        if int(count) > 0 and state == "running":
            return
        time.sleep(0.1)
    pytest.fail(f"{name} was not restarted: {count} restarts, {state}")


async def test_up_scaled_killed_and_answered(deployment: None) -> None:
    await wait_ready()
    await fifty(0)
    for stage in COPIES:
        kill_inside(stage)
    await fifty(100)
    await wait_ready()


def test_the_openai_door_and_its_page(deployment: None) -> None:
    url = f"http://127.0.0.1:{HTTP_PORT}"
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    answer = client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "Hello"}], max_tokens=8)
    assert answer.usage is not None and answer.usage.completion_tokens > 0
    with urllib.request.urlopen(url, timeout=5) as page:
        assert b"<title>Gorgon</title>" in page.read()
    kill = urllib.request.Request(f"{url}/api/kill", b'{"instance": "x"}', {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(kill, timeout=5)


def test_stages_without_torch_are_small(deployment: None) -> None:
    for stage in ("gateway", "tokenizer", "scheduler", "detokenizer"):
        found = subprocess.run(
            ["docker", "run", "--rm", "--entrypoint", "python", f"gorgontest-{stage}", "-c", "import torch"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert "No module named 'torch'" in found.stderr
