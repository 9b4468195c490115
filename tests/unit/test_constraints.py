"""A tokenizer that the grammar library does not understand keeps nobody from serving the model without constraints."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

pytest.importorskip("llguidance")

from services.model_worker.constraints import Constraints
from tests.unit.engine_harness import needs_weights, weights


def test_an_unknown_kind_of_tokenizer(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({f"t{n}": n for n in range(16)}, unk_token="t0")).save(str(tmp_path / "tokenizer.json"))
    constraints = Constraints.load(tmp_path, 16, frozenset({2}))
    assert not constraints.available and constraints.special_ids == frozenset()
    constraints.close()


@needs_weights
def test_a_known_one() -> None:
    constraints = Constraints.load(weights("stories260K"), 512, frozenset({2}))
    assert constraints.available
    constraints.close()
