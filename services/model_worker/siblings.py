"""Sequences of one request: they have the same prompt, so one computes it and the others begin with its blocks of the KV cache. Pure.

A sibling that has the prompt in the cache is a *source*: its full blocks are shared by reference, and the rows of the last, partial one
are copied, as both go on writing there. As long as the first is at work on the prompt, the others are *awaited*: they are not admitted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.model_worker.sequence import Sequence, Status

if TYPE_CHECKING:
    from services.model_worker.step_plan import SchedulerLimits, StepPlan

Key = tuple[str, int]  # (request id, epoch)


class Siblings:
    """All sequences that have not ended, by request and epoch."""

    def __init__(self) -> None:
        self._by_request: dict[Key, list[Sequence]] = {}

    def __len__(self) -> int:
        """Requests."""
        return len(self._by_request)

    def add(self, sequence: Sequence) -> None:
        self._by_request.setdefault(_key(sequence), []).append(sequence)

    def remove(self, sequence: Sequence) -> None:
        family = self._by_request[_key(sequence)]
        family.remove(sequence)
        if not family:
            del self._by_request[_key(sequence)]

    @staticmethod
    def common(sequence: Sequence) -> int:
        """Rows that the sequence may take from a source: those of the prompt, but not that of its own last token."""
        return min(sequence.prompt_len, sequence.reusable)

    def source(self, sequence: Sequence, plan: StepPlan, limits: SchedulerLimits) -> Sequence | None:
        """A running sibling whose blocks hold the common rows from steps before `plan`."""
        common = self.common(sequence)
        if common:
            for sibling in self._running_siblings(sequence):
                # A sliding window may have released blocks that the newcomer's first row still sees.
                kept = not sibling.released or sibling.released * limits.block_size <= common - limits.window + 1
                if kept and _in_cache(sibling, plan) >= common:
                    return sibling
        return None

    def is_awaited(self, sequence: Sequence, plan: StepPlan) -> bool:
        """A running sibling computes the common rows, and none has done so: waiting for it saves computing them again."""
        common = self.common(sequence)
        computed = [_in_cache(sibling, plan) for sibling in self._running_siblings(sequence)] if common else []
        return bool(computed) and max(computed) < common

    def _running_siblings(self, sequence: Sequence) -> list[Sequence]:
        family = self._by_request[_key(sequence)]
        if len(family) == 1:
            return []
        return [s for s in family if s is not sequence and s.status is Status.RUNNING]


def _key(sequence: Sequence) -> Key:
    return sequence.request.request_id, sequence.request.epoch


def _in_cache(sequence: Sequence, plan: StepPlan) -> int:
    """Rows that steps before this one have written: what this one adds may be written after they are copied."""
    chunk = next((chunk for chunk in plan.chunks if chunk.sequence is sequence), None)
    return (
        chunk.start if chunk is not None else sequence.computed - (sequence in plan.decodes or sequence in plan.guided)
    )
