"""Philox4x32-10 in plain torch (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

Counter-based: a word depends on its key and counter alone. So the noise of a token is the same in every batch, on every
worker and at every speculation depth. Words are unsigned 32-bit integers kept in int64, whose wrapping product has the
64 bits that are needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
_WORD = 0xFFFFFFFF


def philox4x32(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four output words for each counter. Key and counter words: int64 tensors that broadcast, values in 0..2^32-1."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        # The product may wrap to a negative int64; the mask takes its high word as unsigned all the same.
        c0, c1, c2, c3 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD, ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & _WORD, (k1 + KEY_INCREMENTS[1]) & _WORD
    return c0, c1, c2, c3


def gumbel_noise(seed: Tensor, position: Tensor, choice: Tensor, vocabulary: int) -> Tensor:
    """Standard Gumbel noise f32 [R, vocabulary] of the rows' keys; see `Ops.sample` for the counter's layout.

    seed int64 [R] (its two's-complement bits are the key), position and choice int [R].
    """
    seed, position, choice = seed[:, None], position[:, None].long() & _WORD, choice[:, None].long() & _WORD
    quads = torch.arange((vocabulary + 3) // 4, device=seed.device)[None, :]
    words = philox4x32((seed & _WORD, (seed >> 32) & _WORD), (quads, position, choice, torch.zeros_like(position)))
    return gumbel_from_words(torch.stack(words, dim=-1).flatten(1)[:, :vocabulary])


def gumbel_from_words(words: Tensor) -> Tensor:
    """-log(-log1p(-v)) in f32. A small v (not a v near 1) makes large noise: f32 keeps the tail where argmax looks."""
    v = ((words.float() + 0.5) * 2.0**-32).clamp_(max=1 - 2.0**-24)
    return torch.log1p(v.neg_()).neg_().log_().neg_()
