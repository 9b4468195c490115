"""Searches through a whole deployment: what they find is found again when the worker that computes them is killed."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest

from shared.messages import WorkerHeartbeat
from tests.pipeline.harness import Answer, Deployment, RawClient, deployed, needs_weights, weights
from tests.unit.engine_harness import save_first_layers

PROMPT = [1, 403, 407, 261, 378]
TOKENS = 400
SEARCHES: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 4, "n": 2, "length_penalty": 0.8, "early_stopping": True},
    "contrastive search": {"penalty_alpha": 0.5, "top_k": 4},
    "contrastive decoding": {"cd_alpha": 0.1, "cd_beta": 0.5, "temperature": 0.7, "seed": 11},
}


@pytest.fixture(scope="module")
def amateur(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("amateur")
    save_first_layers(weights("stories260K"), 2, folder)
    return folder


def body(name: str, **more: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "max_tokens": TOKENS, "ignore_eos": True} | SEARCHES[name] | more


async def worker_of(deployment: Deployment, request_id: str) -> str:
    """The instance that computes it."""
    async with asyncio.timeout(20):
        while True:
            for beat in await deployment.beats():
                if isinstance(beat, WorkerHeartbeat) and f"default.{request_id}" in beat.running:
                    return beat.base.instance


@needs_weights
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_searches_survive_the_loss_of_their_worker(tmp_path: Path, amateur: Path, how: signal.Signals) -> None:
    flags = ["--device", "cpu", "--threads", "1", "--max-seqs", "16", "--amateur", str(amateur)]
    async with (
        deployed(tmp_path, "m", weights("stories260K"), {"model_worker": flags}, {"model_worker": 2}) as deployment,
        RawClient(deployment.url, "m") as client,
    ):
        whole = {name: await client.ask(body(name)) for name in SEARCHES}
        for name, undisturbed in whole.items():
            assert undisturbed.names[-1] == "finished", undisturbed.end
            assert [len(ids) for ids in undisturbed.ids.values()] == [TOKENS] * SEARCHES[name].get("n", 1)
        # Another one beside them tells that work has begun: beams give out nothing before their end.
        broken: dict[str, Answer] = {}
        for name in SEARCHES:
            broken[name] = await client.send(body(name, id=name.replace(" ", "-")))
        await broken["contrastive search"].until_tokens(10)
        lost = await worker_of(deployment, "beams")
        (child,) = (child for child in deployment.supervisor.children() if lost.startswith(child.name))
        assert broken["beams"].end is None, "too late to break it"
        deployment.expected_deaths[child.name] = 1
        child.kill(how)
        for name, answer in broken.items():
            await answer.wait()
            assert answer.ids == whole[name].ids, name
            assert answer.text == whole[name].text, name
        async with asyncio.timeout(20):
            while child.restarts == 0:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await deployment.until_idle()
        client.check()


@needs_weights
async def test_how_searches_end_and_what_is_refused(tmp_path: Path) -> None:
    flags = ["--device", "cpu", "--threads", "1", "--max-seqs", "8", "--max-model-len", "512"]
    async with (
        deployed(tmp_path, "m", weights("stories260K"), {"model_worker": flags}) as deployment,
        RawClient(deployment.url, "m") as client,
    ):
        quiet = await client.ask(body("beams", max_tokens=30, stream=False))
        streamed = await client.ask(body("beams", max_tokens=30))
        assert quiet.end is not None and [choice["ids"] for choice in quiet.end["choices"]] == list(
            streamed.ids.values()
        )
        assert quiet.end["usage"]["completion_tokens"] == 60

        late = await client.ask(body("beams", deadline=0.2))
        assert late.code == "deadline_exceeded"
        cancelled = await client.send(body("beams", id="away"))
        await worker_of(deployment, "away")
        await client.nc.request("llm.v1.cancel.m", b'{"id": "away"}', timeout=5)
        assert (await cancelled.wait()).names[-1] in ("cancelled", "finished")

        refused = {
            "invalid_request": [
                body("beams", temperature=0.5),
                body("beams", n=5),
                body("contrastive search", top_k=1),
            ],
            "unsupported": [body("contrastive decoding"), body("beams", num_beams=9)],
        }
        for code, bodies in refused.items():
            for wrong in bodies:
                assert (await client.ask(wrong)).code == code, wrong
        await deployment.until_idle()
        client.check()
