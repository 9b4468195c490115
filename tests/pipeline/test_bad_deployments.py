"""What an operator gets wrong: models that cannot be served, and storage without room. Real processes, a real nats-server."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from shared.broker import Broker, free_port
from tests.pipeline.harness import RawClient, deployed, needs_weights, weights

ROOT = Path(__file__).resolve().parents[2]


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def truncated_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])


def unsupported_architecture(folder: Path) -> None:
    change_config(folder, architectures=["MambaForCausalLM"], model_type="mamba")


def wrong_dtype(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.astype("int8") for name, tensor in tensors.items()}, folder / "model.safetensors")


BAD_MODELS: dict[str, Callable[[Path], None]] = {
    "weights_missing": without_weights,
    "weights_corrupt": truncated_weights,
    "unsupported_architecture": unsupported_architecture,
    "unsupported_dtype": wrong_dtype,
}


async def start(url: str, folder: Path) -> tuple[int, str]:
    """A worker's exit status and what it said."""
    command = [
        sys.executable,
        "-m",
        "services.model_worker",
        "--nats",
        url,
        "--model",
        "m",
        "--model-path",
        str(folder),
    ]
    process = await asyncio.create_subprocess_exec(
        *command,
        "--device",
        "cpu",
        "--log-format",
        "json",
        cwd=ROOT,
        stderr=-1,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    async with asyncio.timeout(90):
        _, said = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode()


@needs_weights
async def test_a_worker_says_why_it_cannot_serve_a_model(nats_server: Broker, tmp_path: Path) -> None:
    for code, spoil in BAD_MODELS.items():
        shutil.copytree(weights("stories260K"), tmp_path / code, copy_function=shutil.copyfile)
        (tmp_path / code).chmod(0o755)
        spoil(tmp_path / code)
    ends = await asyncio.gather(*(start(nats_server.url, tmp_path / code) for code in BAD_MODELS))
    for code, (status, said) in zip(BAD_MODELS, ends, strict=True):
        assert status != 0, said
        lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        (last,) = [line for line in lines if line["event"] == "cannot_start"]
        assert (last["code"], last["level"], last["stage"]) == (code, "critical", "model_worker") and last["error"], (
            said
        )
        assert "Traceback" not in said


@needs_weights
async def test_gorgon_up_says_it_at_once(tmp_path: Path) -> None:
    shutil.copytree(weights("stories260K"), tmp_path / "model", copy_function=shutil.copyfile)
    (tmp_path / "model").chmod(0o755)
    truncated_weights(tmp_path / "model")
    command = [
        sys.executable,
        "-m",
        "services.cli",
        "up",
        "--model",
        str(tmp_path / "model"),
        "--data",
        str(tmp_path / "data"),
        "--gateway",
        "0",
    ]
    process = await asyncio.create_subprocess_exec(*command, "--port", str(free_port()), cwd=ROOT, stderr=-1)
    async with asyncio.timeout(60):
        _, said = await process.communicate()
    assert process.returncode == 1
    assert "model_worker cannot start: weights_corrupt" in " ".join(said.decode().split()), said.decode()


@needs_weights
async def test_a_full_stream_refuses_and_takes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was accepted is answered, the next request is told that it may come again, and once there is room it is taken."""
    monkeypatch.setenv("GORGON_STREAM_MAX_BYTES", "150000")
    flags = {
        "model_worker": ["--engine", "fixed", "--fixed.step-time", "0.01", "--fixed.vocab-size", "512"],
        "tokenizer": ["--max-context", "100000"],
        "scheduler": ["--trim-interval", "0.5"],
    }
    async with (
        deployed(tmp_path, "m", weights("stories260K"), flags) as deployment,
        RawClient(deployment.url, "m") as client,
    ):
        body = dict(prompt=[5] * 10_000, max_tokens=4)  # 40 kB of ids
        answers = await asyncio.gather(*(client.ask(body, encoding="msgpack") for _ in range(8)))
        kinds = [answer.code or answer.names[-1] for answer in answers]
        assert set(kinds) == {"finished", "storage_full"}, kinds
        refused = next(answer for answer in answers if answer.code)
        assert refused.end is not None and refused.end["retryable"] and refused.end["retry_after"] > 0
        async with asyncio.timeout(20):
            while (await client.ask(body, encoding="msgpack")).code == "storage_full":  # noqa: ASYNC110
                await asyncio.sleep(0.25)
        await deployment.until_idle()
        client.check()
