"""Log-probabilities of prompts: which rows of a step tell them, their computation in pieces, and the way back to the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.ops import Ops
from services.model_worker.interface import TokenLogprobs
from services.model_worker.step_plan import Chunk, StepPlan
from shared.sampling import MAX_LOGPROBS

# Rows whose logits are in memory at the same time.
PIECE = 128
FIRST = TokenLogprobs(0.0, [], [])  # of a prompt's first token, which nothing comes before

# Chosen f32 [R], top f32 [R, n], their ids int64 [R, n].
Logprobs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class ReportedRows:
    """rows     of the step, in the order of its chunks
    targets  the token after each
    top      the most alternatives that a chunk wants
    """

    rows: list[int]
    targets: list[int]
    top: int

    @classmethod
    def of(cls, chunks: Sequence[Chunk], begins: NDArray[np.int32]) -> ReportedRows:
        """begins int32 [chunks]: the first row of each in the step."""
        rows: list[int] = []
        targets: list[int] = []
        top = 0
        for chunk, begin in zip(chunks, begins.tolist(), strict=True):
            reported = chunk.report_rows
            if reported:
                rows += range(begin + reported.start - chunk.start, begin + reported.stop - chunk.start)
                targets += chunk.sequence.tokens[reported.start + 1 : reported.stop + 1]
                top = max(top, chunk.sequence.request.params.prompt_logprobs or 0)
        return cls(rows, targets, top)

    def logprobs(self, hidden: Tensor, targets: Tensor, logits: Callable[[Tensor], Tensor], ops: Ops) -> list[Logprobs]:
        """hidden [len(rows), H] and targets int64 [len(rows)] on the device → pieces in order."""
        pieces = range(0, len(self.rows), PIECE)
        return [ops.logprobs(logits(hidden[i : i + PIECE]), targets[i : i + PIECE], self.top) for i in pieces]


class PromptBuffers:
    """Where a step's prompt log-probabilities go on the host."""

    def __init__(self, rows: int, pinned: bool) -> None:
        self._chosen = torch.empty(rows, dtype=torch.float32, pin_memory=pinned)
        self._top = torch.empty(rows * MAX_LOGPROBS, dtype=torch.float32, pin_memory=pinned)
        self._top_ids = torch.empty(rows * MAX_LOGPROBS, dtype=torch.int64, pin_memory=pinned)

    def fetch(self, pieces: list[Logprobs]) -> Logprobs | None:
        if not pieces:
            return None
        rows, top = sum(len(chosen) for chosen, _, _ in pieces), pieces[0][1].shape[1]
        host = self._chosen[:rows], self._top[: rows * top].view(rows, top), self._top_ids[: rows * top].view(rows, top)
        start = 0
        for piece in pieces:
            end = start + len(piece[0])
            for target, source in zip(host, piece, strict=True):
                target[start:end].copy_(source, non_blocking=True)
            start = end
        return host


def prompt_reports(plan: StepPlan, logprobs: Logprobs | None) -> list[list[TokenLogprobs]]:
    """For each of plan.chunks the tokens that it reports. logprobs: of all rows that are reported, on the host."""
    chosen, top, top_ids = (tensor.tolist() for tensor in logprobs) if logprobs is not None else ([], [], [])
    reports, row = [], 0
    for chunk in plan.chunks:
        first, end = chunk.reported
        report = [FIRST] if end and first == 0 else []
        wanted = chunk.sequence.request.params.prompt_logprobs or 0
        for _ in chunk.report_rows:
            report.append(TokenLogprobs(chosen[row], top_ids[row][:wanted], top[row][:wanted]))
            row += 1
        reports.append(report)
    return reports
