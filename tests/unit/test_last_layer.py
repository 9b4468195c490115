"""The last layer of a step with prompts, computed for the rows alone that somebody wants: nothing else may change."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from services.model_worker.models.decoder import Decoder
from tests.unit.engine_harness import Collected, RepeatedFunctions, dummy_model, running
from tests.unit.test_engine import sampled
from tests.unit.test_speculation_engine import RandomPicks, random_heads

pytestmark = pytest.mark.usefixtures("one_thread")
NEVER = 1 << 30
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}


def run(model: Path, rows_from: int, trees: bool, graphs: bool, options: dict[str, Any]) -> list[Collected]:
    """Requests that come one after the other, so that their prompts, in chunks, share steps with decodes."""
    draw = random.Random(3)
    settings: dict[str, Any] = dict(
        load_format="dummy", max_seqs=8, max_batched_tokens=256, whole_prompts=False, speculate=trees
    )
    with running(model, **(settings | options)) as started:
        if trees:
            RandomPicks(started)
        if graphs:
            started.engine.runner.capture_graphs(RepeatedFunctions(), lambda fraction: None)
        started.engine.runner.last_rows_from = rows_from
        submitted: list[Collected] = []
        for number in range(8):
            prompt = [draw.randrange(3, 90) for _ in range(150 if not number else draw.randint(1, 150))]
            started.wait_for(lambda: all(output.ids for output in submitted))
            more = {"prompt_logprobs": 0} if number == 5 else {}
            submitted.append(
                started.submit(sampled(str(number), prompt, logprobs=2, max_tokens=40, seed=number, **more))
            )
        started.wait(submitted)
        return submitted


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("trees", [False, True])
@pytest.mark.parametrize("options", [{}, {"max_batched_tokens": 72}])
@pytest.mark.parametrize("window", [0, 24])
def test_nothing_else_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graphs: bool, trees: bool, options: dict[str, Any], window: int
) -> None:
    model = dummy_model(tmp_path, **MISTRAL | {"sliding_window": window} if window else {})
    if trees:
        random_heads(model / "medusa", 32)
    taken = []
    rest = Decoder.last_rows

    def counted(self: Decoder, q: Any, residual: Any, cache: Any, wanted: Any, batch: Any) -> Any:
        taken.append(len(wanted))
        return rest(self, q, residual, cache, wanted, batch)

    monkeypatch.setattr(Decoder, "last_rows", counted)
    usual = run(model, NEVER, trees, graphs, options)
    assert not taken
    fewer = run(model, 1, trees, graphs, options)
    assert taken and (0 in taken) == bool(options), "chunks that are not final want no row at all"
    for one, other in zip(usual, fewer, strict=True):
        assert one.ids == other.ids
        chosen = [[entry.chosen for entry in output.logprobs] for output in (one, other)]
        assert chosen[0] == pytest.approx(chosen[1], abs=1e-4)
