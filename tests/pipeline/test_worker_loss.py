"""A worker goes, killed or asked to: its streams continue on the other one as if nothing had happened."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from services.model_worker.fixed_engine import expected_ids
from services.model_worker.interface import EngineRequest
from services.model_worker.settings import FixedEngineSettings
from shared.messages import WorkerHeartbeat
from shared.sampling import SamplingParams
from tests.pipeline.harness import RawClient, deployed, needs_weights, weights

STREAMS, TOKENS, STEP = 24, 150, 0.02


@needs_weights
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_streams_survive_the_loss_of_their_worker(tmp_path: Path, how: signal.Signals) -> None:
    fixed = FixedEngineSettings(step_time=STEP, vocab_size=512)
    flags = ["--engine", "fixed", "--fixed.step-time", str(STEP), "--fixed.vocab-size", "512"]
    async with (
        deployed(tmp_path, "m", weights("stories260K"), {"model_worker": flags}, {"model_worker": 2}) as deployment,
        RawClient(deployment.url, "m") as client,
    ):
        prompts = [[3 + number, 4, 5] for number in range(STREAMS)]
        answers = [
            await client.send(dict(prompt=prompt, max_tokens=TOKENS, seed=9, temperature=1.0, stream=True))
            for prompt in prompts
        ]
        for answer in answers:
            await answer.until_tokens(10)
        lost = deployment.supervisor.stages["model_worker-1"]
        beats = [beat for beat in await deployment.beats() if isinstance(beat, WorkerHeartbeat)]
        assert any(beat.running for beat in beats if beat.base.instance.startswith(lost.name)), "it is at work"
        deployment.expected_deaths["model_worker-1"] = 1
        lost.kill(how)
        for prompt, answer in zip(prompts, answers, strict=True):
            await answer.wait()
            params = SamplingParams(max_tokens=TOKENS, seed=9)
            assert answer.ids[0] == expected_ids(EngineRequest("", 0, 1, prompt, params), fixed)
            assert answer.end is not None
            assert answer.end["usage"]["completion_tokens"] == TOKENS
        async with asyncio.timeout(20):
            while lost.restarts == 0:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await deployment.until_idle()
        client.check()
