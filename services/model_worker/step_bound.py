"""How long a step may take before the engine should be taken for stalled: learnt from the steps before."""

from __future__ import annotations

_SLACK = 10.0  # a step that takes that many times what was expected is no longer just slow
_DECAY = 0.99  # a slow step is remembered for some hundred steps


class StepBound:
    """Expects a step to take a base time and a time for each row of prompts; remembers the slowest of late.

    minimum  seconds; no bound is below. A first step of either kind has no predecessor: `first` is its bound.
    """

    def __init__(self, minimum: float, first: float) -> None:
        self._minimum = minimum
        self._first = first
        self._base = 0.0
        self._per_row = 0.0

    def declare(self, prompt_rows: int) -> float:
        """The bound in seconds of a step with that many rows of prompts."""
        if self._base == 0.0 or (prompt_rows and self._per_row == 0.0):
            return self._first
        return max(self._minimum, _SLACK * (self._base + prompt_rows * self._per_row))

    def observe(self, prompt_rows: int, seconds: float) -> None:
        if prompt_rows:
            self._per_row = max(max(0.0, seconds - self._base) / prompt_rows, _DECAY * self._per_row)
        else:
            self._base = max(seconds, _DECAY * self._base)
