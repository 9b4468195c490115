"""The way back to the host: what a step has chosen, in buffers that are used again and again."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.model_worker.decode_table import id_lists
from services.model_worker.interface import TokenLogprobs
from services.model_worker.prompt_logprobs import Logprobs, PromptBuffers, prompt_reports
from services.model_worker.sampler import Sampled
from services.model_worker.search.beam import MAX_CANDIDATES, Candidates
from services.model_worker.step_plan import StepPlan


@dataclass(slots=True)
class StepResult:
    """decoded      the new token ids of plan.decodes, [n, W]: one each, or more with speculation, then -1
    ids          of the rest of plan.chosen
    logprobs     of plan.chosen, where they are wanted; None: nowhere
    reports      of plan.chunks: the log-probabilities of the prompt's tokens that they report
    candidates   of plan.beams: what may follow their beams
    """

    decoded: NDArray[np.int64]
    ids: list[list[int]]
    logprobs: list[list[TokenLogprobs] | None] | None
    reports: list[list[TokenLogprobs]] = field(default_factory=list)
    candidates: list[Candidates] = field(default_factory=list)


class Ticket:
    """A launched step. `result` waits for it, without the GIL. On the host: `parts`, what was chosen, in the order of plan.chosen;
    `prompts`, log-probabilities of the rows that are reported, in the order of plan.chunks; `beams`, what may follow them."""

    __slots__ = ("_beams", "_event", "_parts", "_prompts", "plan")

    def __init__(
        self,
        plan: StepPlan,
        parts: list[Sampled],
        prompts: Logprobs | None,
        beams: list[Sampled],
        event: torch.cuda.Event | None,
    ) -> None:
        self.plan = plan
        self._parts = parts
        self._prompts = prompts
        self._beams = beams
        self._event = event

    def result(self) -> StepResult:
        if self._event is not None:
            self._event.synchronize()
        parts: list[NDArray[np.int64]] = [part.ids.numpy() for part in self._parts]
        decodes = len(self.plan.decodes)
        decoded = parts[0][:decodes] if decodes else np.empty((0, 1), np.int64)
        ids = [new for part in [parts[0][decodes:], *parts[1:]] for new in id_lists(part)] if parts else []
        return StepResult(decoded, ids, self._logprobs(), prompt_reports(self.plan, self._prompts), self._candidates())

    def _logprobs(self) -> list[list[TokenLogprobs] | None] | None:
        if all(part.logprobs is None for part in self._parts):
            return None
        logprobs: list[list[TokenLogprobs] | None] = []
        sequences = iter(self.plan.chosen)
        for part in self._parts:
            ids, width = id_lists(part.ids.numpy()), part.ids.shape[1]
            chosen, top, top_ids = ([], [], []) if part.logprobs is None else (t.tolist() for t in part.logprobs)
            for row, (new, sequence) in enumerate(zip(ids, sequences, strict=False)):
                wanted = sequence.request.params.worker_logprobs
                entries = range(row * width, row * width + len(new))
                logprobs.append(
                    None
                    if wanted is None or part.logprobs is None
                    else [TokenLogprobs(chosen[i], top_ids[i][:wanted], top[i][:wanted]) for i in entries]
                )
        return logprobs

    def _candidates(self) -> list[Candidates]:
        candidates: list[Candidates] = []
        for part in self._beams:
            assert part.logprobs is not None
            _, top, top_ids = (tensor.numpy() for tensor in part.logprobs)
            start = 0
            for sequence in self.plan.beams:
                assert sequence.group is not None
                end = start + sequence.step_rows
                wanted = sequence.group.search.candidates
                candidates.append(Candidates(top[start:end, :wanted], top_ids[start:end, :wanted]))
                start = end
        return candidates


class Readback:
    """Pinned buffers for one step's ids and log-probabilities, used again when its ticket has been redeemed.

    rows: the most tokens of a step, and the most beams; prompt_rows: the most rows of it that tell log-probabilities of prompts.
    """

    def __init__(self, rows: int, prompt_rows: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.ids = torch.empty(rows, dtype=torch.int64, pin_memory=pinned)
        self.chosen = torch.empty(rows, dtype=torch.float32, pin_memory=pinned)
        # Wider than MAX_LOGPROBS.
        self.top = torch.empty(rows * MAX_CANDIDATES, dtype=torch.float32, pin_memory=pinned)
        self.top_ids = torch.empty(rows * MAX_CANDIDATES, dtype=torch.int64, pin_memory=pinned)
        self.prompts = PromptBuffers(prompt_rows, pinned)
        self.event = torch.cuda.Event() if pinned else None

    def fetch(
        self,
        plan: StepPlan,
        parts: list[Sampled],
        prompts: list[Logprobs],
        searched: list[Sampled],
        beams: list[Sampled],
    ) -> Ticket:
        """parts: what was sampled for plan.sampled, in that order; the last may have padded rows behind. prompts: of the rows that
        are reported. searched: what was chosen for the rest of plan.chosen; beams: what may follow them."""
        used = 0

        def copy(target: Tensor, source: Tensor) -> Tensor:
            # Parts differ in width, so each gets room for the widest.
            start = used * (target.numel() // len(self.ids))
            return target[start : start + source.numel()].view(source.shape).copy_(source, non_blocking=True)

        def keep(part: Sampled, rows: int) -> Sampled:
            nonlocal used
            ids = copy(self.ids, part.ids[:rows])
            logprobs = None
            if part.logprobs is not None:
                chosen, top, top_ids = part.logprobs
                logprobs = copy(self.chosen, chosen), copy(self.top, top), copy(self.top_ids, top_ids)
            used += ids.numel()
            return Sampled(ids, logprobs)

        kept: list[Sampled] = []
        left = len(plan.sampled)
        for part in parts:
            kept.append(keep(part, min(left, len(part.ids))))
            left -= len(kept[-1].ids)
        kept += [keep(part, len(part.ids)) for part in searched]
        of_beams = [keep(part, len(part.ids)) for part in beams]
        on_host = self.prompts.fetch(prompts)
        if self.event is not None:
            self.event.record()
        return Ticket(plan, kept, on_host, of_beams, self.event)
