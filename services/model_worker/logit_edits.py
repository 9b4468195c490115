"""Logit bias, bad words and min_tokens on the device: a row of a fixed-size table for each slot, and the newest tokens of each."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.ops import LogitEdits
from shared.sampling import (
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)

Words = NDArray[np.int32]

MAX_EOS_IDS = 64  # of a model
_EDITS = MAX_LOGIT_BIAS + MAX_STOP_TOKEN_IDS + MAX_EOS_IDS
_PREFIX = MAX_BAD_WORD_TOKENS  # a column more than needed: the kernel wants a power of two
# A slot's words, as they are staged: ids, values, until, words, prefixes.
_PARTS = (_EDITS, _EDITS, _EDITS, MAX_BAD_WORDS, MAX_BAD_WORDS * _PREFIX)
ROW_WORDS = sum(_PARTS)
_ALWAYS = 2**31 - 1


def edit_row(params: SamplingParams, eos_ids: Collection[int]) -> Words | None:
    """A sequence's row of the table, int32 [ROW_WORDS], None if it changes no logits. Raises ValueError for what does not fit in."""
    if not params.has_edits:
        return None
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_ids))
    if len(params.logit_bias) > MAX_LOGIT_BIAS or len(params.bad_words) > MAX_BAD_WORDS:
        raise ValueError(f"more than {MAX_LOGIT_BIAS} tokens in logit_bias, or {MAX_BAD_WORDS} sequences in bad_words")
    if params.min_tokens and len(stops) > MAX_STOP_TOKEN_IDS + MAX_EOS_IDS:
        raise ValueError(f"min_tokens with more than {MAX_STOP_TOKEN_IDS + MAX_EOS_IDS} ids that end the sequence")
    row = np.full(ROW_WORDS, -1, dtype=np.int32)
    ids, values, until, words, prefixes = _split(row)
    bias = len(params.logit_bias)
    if bias:
        ids[:bias], values[:bias].view(np.float32)[:] = zip(*params.logit_bias, strict=True)
        until[:bias] = _ALWAYS
    if params.min_tokens:
        end = bias + len(stops)
        ids[bias:end] = sorted(stops)
        values[bias:end].view(np.float32)[:] = -np.inf
        until[bias:end] = params.min_tokens
    for index, word in enumerate(params.bad_words):
        if not 1 <= len(word) <= MAX_BAD_WORD_TOKENS:
            raise ValueError(f"a sequence in bad_words has {len(word)} tokens, not 1 to {MAX_BAD_WORD_TOKENS}")
        words[index] = word[-1]
        if len(word) > 1:
            prefixes.reshape(MAX_BAD_WORDS, _PREFIX)[index, 1 - len(word) :] = word[:-1]
    return row


def edited_ids(params: SamplingParams) -> list[int]:
    """All token ids that a request names in what it changes of its logits."""
    return [token for token, _ in params.logit_bias] + [token for word in params.bad_words for token in word]


def remembers_tokens(params: SamplingParams) -> bool:
    """Its edits depend on the sequence's newest tokens."""
    return any(len(word) > 1 for word in params.bad_words)


def _split(row: Words) -> list[Words]:
    return np.split(row, np.cumsum(_PARTS)[:-1])


class EditState:
    """Tensors by slot. recent int32 [slots, L]: the newest tokens of sequences that have edits, the newest last, -1 before the
    beginning."""

    def __init__(self, slots: int, device: torch.device) -> None:
        def table(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full((slots, *shape), -1, dtype=dtype, device=device)

        self.tables = LogitEdits(
            ids=table(_EDITS),
            values=table(_EDITS, dtype=torch.float32),
            until=table(_EDITS),
            words=table(MAX_BAD_WORDS),
            prefixes=table(MAX_BAD_WORDS, _PREFIX),
        )
        self.recent = table(_PREFIX)

    def write(self, slots: Tensor, rows: Tensor, recent: Tensor) -> None:
        """slots int64 [n], rows int32 [n, ROW_WORDS], recent int32 [n, L]."""
        tables = self.tables
        ids, values, until, words, prefixes = rows.split(_PARTS, dim=1)
        tables.ids.index_copy_(0, slots, ids)
        tables.values.index_copy_(0, slots, values.contiguous().view(torch.float32))
        tables.until.index_copy_(0, slots, until)
        tables.words.index_copy_(0, slots, words)
        tables.prefixes.index_copy_(0, slots, prefixes.reshape(-1, MAX_BAD_WORDS, _PREFIX))
        self.recent.index_copy_(0, slots, recent)

    def append(self, slots: Tensor, ids: Tensor) -> None:
        """One more token of each sequence: slots, ids int64 [n]."""
        recent = self.recent.index_select(0, slots)
        self.recent.index_copy_(0, slots, torch.cat((recent[:, 1:], ids[:, None].int()), dim=1))


def recent_tokens(tokens: NDArray[np.int32]) -> Words:
    """The newest of a sequence's known tokens, int32 [L], as in EditState."""
    recent = np.full(_PREFIX, -1, dtype=np.int32)
    newest = tokens[-_PREFIX:]
    recent[_PREFIX - len(newest) :] = newest
    return recent
