"""schemathesis against the OpenAPI description: whatever is sent, no answer is a 5xx, and nothing is left behind.

GORGON_FUZZ_EXAMPLES   for each operation (default 25)
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from pathlib import Path

from services.cli import DEMO_MODEL
from tests.pipeline.harness import deployed
from tests.pipeline.http_client import call

EXAMPLES = os.environ.get("GORGON_FUZZ_EXAMPLES", "25")
ROOT = Path(__file__).resolve().parents[2]
COMMAND = shutil.which("schemathesis") or str(Path(sys.executable).parent / "schemathesis")


async def test_no_request_is_answered_with_a_5xx(tmp_path: Path) -> None:
    vocabulary = json.loads((DEMO_MODEL / "config.json").read_text())["vocab_size"]
    worker = ["--engine", "fixed", "--fixed.step-time", "0.0005", "--fixed.vocab-size", str(vocabulary)]
    async with deployed(tmp_path, "demo", DEMO_MODEL, {"model_worker": worker}, {"gateway": 1}) as deployment:
        port = deployment.supervisor.plan.http_port
        fuzzer = await asyncio.create_subprocess_exec(
            *(COMMAND, "run", f"http://127.0.0.1:{port}/openapi.json", "--checks", "not_a_server_error", "--no-color"),
            *("--max-examples", EXAMPLES, "--request-timeout", "30", "--exclude-path", "/api/pipeline", "--seed", "1"),
            env=os.environ | {"SCHEMATHESIS_HOOKS": "tests.pipeline.schemathesis_hooks"},
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output = (await fuzzer.communicate())[0].decode()
        assert fuzzer.returncode == 0, output[-4000:]
        metrics = b"".join([chunk async for chunk in (await call(port, "/metrics")).chunks()]).decode()
        assert 'status="200"' in metrics and 'status="400"' in metrics, (
            "it got to the pipeline, and was refused there too"
        )
        await deployment.until_idle()
