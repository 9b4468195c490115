"""Grammars of requests, compiled beside the engine's thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import structlog

from services.model_worker.interface import EngineRequest
from shared.structured import ConstraintError, Matcher, Vocabulary

log = structlog.get_logger()
_THREADS = 2


class Constraints:
    """vocabulary: None where the model's folder has no tokenizer.json, or one that the library does not understand: the model is
    served all the same, but no request may have a constraint."""

    def __init__(self, vocabulary: Vocabulary | None) -> None:
        self._vocabulary = vocabulary
        self._threads = ThreadPoolExecutor(_THREADS, "constraint")

    @classmethod
    def load(cls, model: Path, vocab_size: int, eos_ids: frozenset[int]) -> Constraints:
        path = model / "tokenizer.json"
        if not path.exists():
            return cls(None)
        try:
            return cls(Vocabulary(path.read_text(encoding="utf-8"), vocab_size, eos_ids))
        except Exception as error:  # whatever the library raises for a tokenizer that it does not understand
            log.warning("no_constraints", error=f"{path}: {error}")
            return cls(None)

    @property
    def special_ids(self) -> frozenset[int]:
        return frozenset() if self._vocabulary is None else self._vocabulary.special_ids

    @property
    def available(self) -> bool:
        return self._vocabulary is not None

    def prepare(self, request: EngineRequest, done: Callable[[Matcher | ConstraintError], None]) -> None:
        """Calls `done`, on another thread, with a matcher that has followed what the request has generated already."""

        def work() -> None:
            try:
                result: Matcher | ConstraintError = self.start(request)
            except ConstraintError as error:
                result = error
            except Exception as error:
                result = ConstraintError(f"{type(error).__name__}: {error}")
            done(result)

        try:
            self._threads.submit(work)
        except RuntimeError:  # the engine has stopped, and with it all that it held
            return

    def start(self, request: EngineRequest) -> Matcher:
        """Raises ConstraintError."""
        assert self._vocabulary is not None
        matcher = self._vocabulary.compile(request.constraint)
        if not matcher.advance(request.generated_ids):
            raise ConstraintError(f"what was generated before does not follow the constraint: {matcher.error}")
        return matcher

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
