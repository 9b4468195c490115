"""From hidden states to the next token of each row, all on the device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.ops import Ops, SamplingBatch
from services.model_worker.logit_edits import remembers_tokens
from services.model_worker.step_state import FIELDS, FLOAT_FIELDS, StepState
from shared.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class SamplingMode:
    """What at least one row of a batch needs: bounds known to the host, so that the device does no work that nobody asked for.

    logprobs  the most top log-probabilities that a row wants, -1: no row wants any
    typical   typical_p, which is among the filters too
    edits     logit_bias, bad_words or min_tokens
    recent    edits that depend on the newest tokens
    """

    random: bool = False
    filters: bool = False
    penalties: bool = False
    logprobs: int = -1
    typical: bool = False
    edits: bool = False
    recent: bool = False

    @property
    def logits_alone(self) -> bool:
        """Every row takes the likeliest token, whatever its sequence."""
        return not (self.random or self.penalties or self.edits)

    @property
    def capturable(self) -> bool:
        """Common enough for a CUDA graph of its own."""
        return not (self.penalties or self.typical or self.edits) and self.logprobs < 0

    @staticmethod
    def of(params: SamplingParams) -> SamplingMode:
        random = not params.greedy
        typical = random and params.typical_p < 1.0
        filters = typical or (random and (params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0))
        logprobs = -1 if params.worker_logprobs is None else params.worker_logprobs
        recent = remembers_tokens(params)
        return SamplingMode(random, filters, params.has_penalties, logprobs, typical, params.has_edits, recent)

    @staticmethod
    def union(modes: Iterable[SamplingMode]) -> SamplingMode:
        distinct = set(modes)
        if len(distinct) == 1:
            return distinct.pop()
        return SamplingMode(
            any(mode.random for mode in distinct),
            any(mode.filters for mode in distinct),
            any(mode.penalties for mode in distinct),
            max((mode.logprobs for mode in distinct), default=-1),
            any(mode.typical for mode in distinct),
            any(mode.edits for mode in distinct),
            any(mode.recent for mode in distinct),
        )


@dataclass(slots=True)
class RowMasks:
    """Which tokens the rows of a step may choose: `Ops.apply_token_bitmask`'s masks int32 [K, ⌈V / 32⌉] and mask_rows int32 [R]."""

    masks: Tensor
    mask_rows: Tensor

    def part(self, start: int, end: int) -> RowMasks:
        """Of the rows start … end - 1."""
        return RowMasks(self.masks, self.mask_rows[start:end])


CAPTURED_MODES = (SamplingMode(), SamplingMode(random=True), SamplingMode(random=True, filters=True))


@dataclass(slots=True)
class Sampled:
    """ids int64 [R, W]: up to W new tokens of each sequence, then -1; logprobs (chosen f32 [R × W], top f32 [R × W, n], their ids
    int64 [R × W, n]) if any sequence wants them."""

    ids: Tensor
    logprobs: tuple[Tensor, Tensor, Tensor] | None = None


def sample(
    ops: Ops, state: StepState, logits: Tensor, slots: Tensor, context_len: Tensor, mode: SamplingMode,
    masks: RowMasks | None = None,
) -> Sampled:  # fmt: skip
    """`choose` for sequences with a row each."""
    ids = choose(ops, state, logits, slots, context_len, mode, masks=masks)
    return Sampled(ids[:, None], ops.logprobs(logits, ids, mode.logprobs) if mode.logprobs >= 0 else None)


def choose(
    ops: Ops, state: StepState, logits: Tensor, slots: Tensor, context_len: Tensor, mode: SamplingMode,
    counted: Tensor | None = None, masks: RowMasks | None = None,
) -> Tensor:  # fmt: skip
    """The token after each row, int64 [R], counted towards its sequence's penalties.

    logits [R, V], overwritten unless log-probabilities are wanted of them; slots int64 [≥ R], padded to a multiple of four so that the
    gathered rows stay aligned; context_len int32 [R]: tokens of each row's sequence, its own included (neither is looked at where
    `mode.logits_alone`); counted int64: the rows whose tokens count (None: all); masks: of the R rows, None: every token is allowed.
    """
    if mode.logits_alone:
        scores = _masked(ops, logits, logits, mode, masks)
        return ops.sample(
            scores, SamplingBatch.greedy(state.fields[0].view(torch.float32), state.fields[-1], state.seed)
        )
    rows = logits.shape[0]
    gathered = state.fields.index_select(1, slots)
    values = [row.view(torch.float32) for row in gathered[:FLOAT_FIELDS]] + list(gathered[FLOAT_FIELDS:])
    field = {name: row[:rows] for name, row in zip(FIELDS, values, strict=True)}
    slots = slots[:rows]
    scores = logits
    position = context_len - field["prompt_len"]
    if mode.penalties or mode.edits:
        scores = logits.to(torch.float32, copy=mode.logprobs >= 0)
    if mode.penalties:
        penalised = field["penalised"] > 0
        ops.apply_penalties(
            scores, state.token_counts, state.prompt_mask, torch.where(penalised, slots, -1).int(),
            field["repetition"], field["presence"], field["frequency"],
        )  # fmt: skip
    if mode.edits:
        edit_rows = torch.where(field["edited"] > 0, slots, -1).int()
        recent = state.edits.recent.index_select(0, slots)
        ops.edit_logits(scores, state.edits.tables, edit_rows, position, recent)
    scores = _masked(ops, scores, logits, mode, masks)
    ids = ops.sample(
        scores,
        SamplingBatch(
            temperature=field["temperature"],
            top_k=field["top_k"],
            top_p=field["top_p"],
            min_p=field["min_p"],
            seed=state.seed.index_select(0, slots),
            choice=field["choice"],
            position=position,
            any_random=mode.random,
            any_filter=mode.filters,
            typical_p=field["typical_p"] if mode.typical else None,
        ),
    )
    if mode.penalties:
        places = (slots, ids) if counted is None else (slots[counted], ids[counted])
        amounts = field["penalised"] if counted is None else field["penalised"][counted]
        state.token_counts.index_put_(places, amounts, accumulate=True)
    if mode.recent:
        state.edits.append(*((slots, ids) if counted is None else (slots[counted], ids[counted])))
    return ids


def _masked(ops: Ops, scores: Tensor, logits: Tensor, mode: SamplingMode, masks: RowMasks | None) -> Tensor:
    """scores, which may be the logits, without the tokens that are not allowed; the logits stay where log-probabilities are wanted."""
    if masks is None:
        return scores
    if scores is logits and mode.logprobs >= 0:
        scores = logits.clone()
    return ops.apply_token_bitmask(scores, masks.masks, masks.mask_rows)
