"""Runs a model over whole texts and measures how well its heads guess: what training, its report and the tree design have in common."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from kernels import select_ops
from kernels.ops import AttentionBatch
from services.model_worker.kv_cache import KVCache
from services.model_worker.loader import load_weights
from services.model_worker.models.config import load_config
from services.model_worker.models.decoder import Decoder
from services.model_worker.speculation.medusa import MedusaHeads, tied_output

_BLOCK = 16
_LOGITS_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}  # logits of a slice of rows, all heads, in f32


class Backbone:
    """A frozen model without a scheduler: the hidden states of all positions of whole rows of text, by the engine's own decoder."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.config = load_config(folder)
        self.device, self.dtype = device, dtype
        weights = load_weights(folder, self.config, dtype, device)
        self.decoder = Decoder(self.config, weights, select_ops(device), self.config.max_position)
        self._cache: KVCache | None = None

    @torch.no_grad()
    def hidden(self, ids: Tensor) -> Tensor:
        """ids int64 [S, L], each row a sequence from its beginning → final hidden states, normed, [S, L, H]."""
        rows, length = ids.shape
        blocks = -(-length // _BLOCK)
        if self._cache is None or self._cache.num_blocks < rows * blocks:
            self._cache = KVCache(self.config, rows * blocks, _BLOCK, self.dtype, self.device)

        def arange(*bounds: int) -> Tensor:
            return torch.arange(*bounds, dtype=torch.int32, device=self.device)

        batch = AttentionBatch(
            query_start=arange(0, rows * length + 1, length),
            context_len=torch.full((rows,), length, dtype=torch.int32, device=self.device),
            block_table=arange(rows * blocks).view(rows, blocks),
            decode_seqs=0,
            decode_rows=1,
            max_query=length,
            max_context=length,
        )
        positions = arange(length).repeat(rows)
        slots = arange(rows).repeat_interleave(length) * (blocks * _BLOCK) + positions
        hidden = self.decoder.forward(ids.flatten(), positions, slots, batch, self._cache.layers, None)
        return hidden.view(rows, length, -1)


def rows_per_slice(heads: MedusaHeads, model_head: Tensor) -> int:
    """How many rows' logits of all heads fit into the memory set aside for them."""
    return max(64, _LOGITS_BYTES[model_head.device.type] // (4 * heads.num_heads * model_head.shape[0]))


def head_targets(ids: Tensor, heads: int, first: int = 0) -> Tensor:
    """ids int64 [S, L] → what each head should guess at each position, int64 [heads, S, L]; -1 where that lies beyond the row, or
    before its position `first`."""
    targets = torch.full((heads, *ids.shape), -1, dtype=torch.int64, device=ids.device)
    for head in range(heads):
        ahead = head + 2
        targets[head, :, :-ahead] = ids[:, ahead:]
        targets[head, :, : max(0, first - ahead)] = -1
    return targets


def known_targets(heads: MedusaHeads, targets: Tensor, vocabulary: int) -> Tensor:
    """Token ids as the heads number them; -1 where there is no target or the heads do not know the token."""
    if heads.token_map is None:
        return targets
    index = torch.full((vocabulary,), -1, dtype=torch.int64, device=targets.device)
    index[heads.token_map] = torch.arange(len(heads.token_map), device=targets.device)
    return torch.where(targets >= 0, index[targets.clamp(min=0)], -1)


@torch.no_grad()
def target_ranks(heads: MedusaHeads, model_head: Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
    """hidden [R, H], targets int64 [heads, R] → how many tokens each head holds for likelier than the target, int64 [heads, R];
    -1 where the target is -1 or the head does not know the token. `hidden` and the heads have one dtype."""
    output = tied_output(heads, model_head).to(hidden.dtype)
    known = known_targets(heads, targets, model_head.shape[0])
    ranks = torch.empty_like(targets)
    step = rows_per_slice(heads, model_head)
    for start in range(0, hidden.shape[0], step):
        part = known[:, start : start + step]
        logits = heads.logits(heads.states(hidden[start : start + step]), output)
        own = logits.gather(2, part.clamp(min=0)[..., None])
        ranks[:, start : start + step] = torch.where(part >= 0, (logits > own).sum(-1), -1)
    return ranks


def top_accuracies(ranks: Tensor, valid: Tensor, top: int) -> list[list[float]]:
    """ranks, valid [heads, N] → for each head the share of valid targets among its 1, 2, … `top` likeliest tokens."""
    result = []
    for of_head, counted in zip(ranks, valid, strict=True):
        hits = of_head[counted]
        found = [((hits >= 0) & (hits < k)).sum().item() for k in range(1, top + 1)]
        result.append([count / max(1, len(hits)) for count in found])
    return result
