"""A tokenizer that the grammar library does not understand keeps nobody from serving the model without constraints; and how long a
constraint may take."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

pytest.importorskip("llguidance")

from services.model_worker.constraints import Constraints
from services.tokenizer.constraints import ConstraintChecker
from shared.errors import GorgonError
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


async def check(seconds: float, timeout: float, standing_still: float) -> None:
    """A constraint that takes so long to compile, in a process that is stopped for a while meanwhile."""
    checker = ConstraintChecker(None, threads=1, timeout=timeout, waiting=8, retry_after=1.0)
    checker._vocabulary = object()  # type: ignore[assignment]
    checker._compile = lambda constraint: time.sleep(seconds)  # type: ignore[method-assign]
    asyncio.get_running_loop().call_later(0.01, time.sleep, standing_still)
    try:
        await checker.check("x", "structured", "tenant")
    finally:
        checker.close()


async def test_a_constraint_is_not_refused_because_the_process_stood_still() -> None:
    await check(0.05, 0.3, 0.6)


async def test_a_constraint_that_takes_too_long_is_refused() -> None:
    with pytest.raises(GorgonError, match="not compiled within"):
        await check(1.0, 0.2, 0.0)
