"""Greedy ids of every family through the whole pipeline, 16 prompts of mixed lengths at once, equal those of transformers.

In `make test` one family, the one with a sliding window; all of them with GORGON_FAMILIES=llama,llama3_rope,mistral,qwen2,qwen3.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import ModuleType

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

pytest.importorskip("transformers")

from tests.pipeline.harness import RawClient, deployed
from tests.unit.test_models_vs_transformers import TOKENS, Oracle, prompts

FAMILIES = os.environ.get("GORGON_FAMILIES", "mistral").split(",")
VOCABULARY = 512


def add_tokenizer(folder: Path) -> None:
    """A word for each id: prompts are ids, and the text is not what is looked at."""
    tokenizer = Tokenizer(models.WordLevel({f"t{number}": number for number in range(VOCABULARY)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("family", FAMILIES)
async def test_greedy_ids(tiny_models: ModuleType, tmp_path: Path, family: str) -> None:
    folder = tmp_path / "model"
    oracle = Oracle(folder, tiny_models.make(family, max_position_embeddings=512))
    add_tokenizer(folder)
    worker = ["--device", "cpu", "--threads", "1", "--max-seqs", "16", "--max-batched-tokens", "24"]
    async with (
        deployed(tmp_path / "data", family, folder, {"model_worker": worker}) as deployment,
        RawClient(deployment.url, family) as client,
    ):
        for _ in range(2):  # the second time, the prefix cache has something for the families without a window
            answers = await asyncio.gather(
                *(
                    client.ask(
                        dict(prompt=prompt, max_tokens=TOKENS, temperature=0, ignore_eos=True), encoding="msgpack"
                    )
                    for prompt in prompts()
                )
            )
            assert [answer.ids[0] for answer in answers] == oracle.expected
            for answer in answers:
                assert answer.text[0] == " ".join(f"t{number}" for number in answer.ids[0])
        await deployment.until_idle()
        client.check()
