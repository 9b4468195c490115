"""Beam search over scores, as transformers does it (generation/utils.py, `_beam_search`, without sampling). Pure: no tensors, no cache.

Arithmetic is in f32, operation by operation as there, so that near ties fall alike. Of equal scores the better beam's goes first, then
the likelier token's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.model_worker.interface import FinishReason
from shared.sampling import MAX_BEAMS, MAX_STOP_TOKEN_IDS

# What a step can tell of each beam: more than any request needs, unless a model has more than 16 ids that end a text.
MAX_CANDIDATES = MAX_BEAMS + MAX_STOP_TOKEN_IDS + 16

Scores = NDArray[np.float32]
Ids = NDArray[np.int64]


class Candidates(NamedTuple):
    """Of each beam its likeliest next tokens, best first: log-probabilities f32 and ids int64, both [beams, candidates]."""

    logprobs: Scores
    ids: Ids


class Hypothesis(NamedTuple):
    """A finished beam. score: sum of its tokens' log-probabilities / length ** length_penalty."""

    ids: list[int]
    score: float
    finish: FinishReason


class _Finished(NamedTuple):
    score: np.float32
    step: int
    beam: int  # among those that went into the step
    token: int


@dataclass(frozen=True, slots=True)
class Step:
    """For each beam that goes on after it: the beam that it continues, and with which token."""

    parents: list[int]
    tokens: list[int]


class BeamSearch:
    """num_beams        beams that run at the same time, and hypotheses that are kept
    max_tokens       tokens after which a beam ends
    stops            ids that end a beam, with the reason
    early_stopping   True: ends with num_beams hypotheses; False: when no beam can improve on them at its present length; "never":
                     when none can at any length (for length_penalty > 0)

    It begins with one beam without tokens; from the first step on there are `num_beams`.
    """

    def __init__(
        self,
        num_beams: int,
        max_tokens: int,
        stops: Mapping[int, FinishReason],
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
    ) -> None:
        self._num_beams = num_beams
        self._max_tokens = max_tokens
        self._stops = stops
        self._length_penalty = length_penalty
        self._early_stopping = early_stopping
        self._scores: Scores = np.zeros(1, np.float32)
        self._steps: list[Step] = []
        self._finished: list[_Finished] = []  # best first
        self.done = False

    @property
    def length(self) -> int:
        """Tokens of each running beam."""
        return len(self._steps)

    @property
    def candidates(self) -> int:
        """The likeliest tokens of each beam that `advance` needs: each may be wanted by all beams, after those that stop."""
        return candidates_needed(self._num_beams, len(self._stops))

    def advance(self, candidates: Candidates) -> Step:
        """candidates: of each running beam, `self.candidates` of them. Returns which beams go on, best first; none if that was the
        last step."""
        logprobs, ids = candidates
        scores = (self._scores[:, None] + logprobs.astype(np.float32)).ravel()
        order = np.argsort(-scores, kind="stable")
        width, length = logprobs.shape[1], self.length + 1
        tokens = ids.ravel()
        divisor = np.float32(length**self._length_penalty)
        last = length >= self._max_tokens
        parents: list[int] = []
        chosen: list[int] = []
        running: list[np.float32] = []
        for rank, index in enumerate(order.tolist()):
            token = int(tokens[index])
            if last or token in self._stops:
                # Only the best `num_beams` candidates may end; those behind are there to go on.
                if rank < self._num_beams:
                    self._finished.append(_Finished(scores[index] / divisor, self.length, index // width, token))
            elif len(chosen) < self._num_beams:
                parents.append(index // width)
                chosen.append(token)
                running.append(scores[index])
            if rank >= self._num_beams - 1 and (last or len(chosen) == self._num_beams):
                break
        self._finished.sort(key=lambda finished: -finished.score)  # stable: of equals the earlier stays
        del self._finished[self._num_beams :]
        step = Step(parents, chosen)
        self._steps.append(step)
        self._scores = np.array(running, np.float32)
        self.done = last or not self._can_improve()
        return step

    def _can_improve(self) -> bool:
        if len(self._finished) < self._num_beams:
            return True
        if self._early_stopping is True:
            return False
        length = self.length
        if self._early_stopping == "never" and self._length_penalty > 0:
            length = self._max_tokens
        best = self._scores[0] / np.float32(length**self._length_penalty)
        return bool(best > self._finished[-1].score)

    def best(self, count: int) -> list[Hypothesis]:
        """The best hypotheses, once it is done."""
        return [self._hypothesis(finished) for finished in self._finished[:count]]

    def _hypothesis(self, finished: _Finished) -> Hypothesis:
        ids, beam = [finished.token], finished.beam
        for step in reversed(self._steps[: finished.step]):
            ids.append(step.tokens[beam])
            beam = step.parents[beam]
        reason = self._stops.get(finished.token, FinishReason.LENGTH)
        return Hypothesis(ids[::-1], float(finished.score), reason)


def candidates_needed(num_beams: int, stops: int) -> int:
    return num_beams + stops
