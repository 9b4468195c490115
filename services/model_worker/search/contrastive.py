"""Contrastive search (Su et al. 2022, arXiv 2202.06417) and contrastive decoding (Li et al. 2022, arXiv 2210.15097): formulas, and what
they keep on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference import LEAST_TEMPERATURE
from services.model_worker.kv_cache import KVCache
from services.model_worker.models.decoder import Decoder
from shared.sampling import MAX_CONTRASTIVE


@dataclass(slots=True)
class Amateur:
    """The second model of contrastive decoding. Its cache has the blocks of the first one's, for the same tokens."""

    decoder: Decoder
    cache: KVCache


def guided_scores(expert: Tensor, amateur: Tensor, alpha: Tensor, beta: Tensor, temperature: Tensor) -> Tensor:
    """Scores f32 [R, V] from both models' logits [R, V]; alpha, beta, temperature f32 [R].

    Of the tokens that the expert gives at least alpha × its largest probability: log p_expert − log p_amateur, with the amateur's
    logits divided by `temperature` (Li et al., eq. 2 and 3); where beta ≥ 0, (1 + beta) × log p_expert − beta × log p_amateur
    instead (O'Brien & Lewis 2023, arXiv 2309.09117; log-probabilities for logits shift all scores alike). All others: −∞.
    """
    expert = expert.float().log_softmax(dim=-1)
    amateur = (amateur.float() / temperature[:, None].clamp(min=LEAST_TEMPERATURE)).log_softmax(dim=-1)
    plausible = expert >= expert.amax(dim=-1, keepdim=True) + alpha.log()[:, None]
    strength = torch.where(beta < 0, 1.0, beta)[:, None]
    ours = torch.where(beta < 0, 1.0, 1 + beta)[:, None]
    # The likeliest token stays even where both models agree that nothing else is possible.
    scores = ours * expert - strength * amateur.clamp(min=torch.finfo(torch.float32).min / 4)
    return scores.masked_fill(~plausible, -math.inf)


class Memories:
    """What contrastive search keeps of a sequence, by `Sequence.memory`.

    directions     [memories, tokens, H]: the final hidden states of all its tokens, divided by their lengths
    candidates     int64 [memories, MAX_CONTRASTIVE]: the likeliest next tokens, best first
    probabilities  f32, likewise: theirs
    """

    def __init__(self, memories: int, tokens: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tokens = tokens
        self.directions = torch.zeros(memories, tokens, hidden_size, dtype=dtype, device=device)
        self.candidates = torch.zeros(memories, MAX_CONTRASTIVE, dtype=torch.int64, device=device)
        self.probabilities = torch.zeros(memories, MAX_CONTRASTIVE, dtype=torch.float32, device=device)

    def remember(self, memory: Tensor, positions: Tensor, directions: Tensor) -> None:
        """memory, positions int64 [R]; directions [R, H]."""
        self.directions[memory, positions] = directions

    def propose(self, memory: Tensor, logits: Tensor) -> None:
        """What may come next, after logits [R, V]; memory int64 [R]."""
        count = min(MAX_CONTRASTIVE, logits.shape[1])
        probabilities, candidates = logits.float().softmax(dim=-1).topk(count, dim=-1)
        self.candidates[memory, :count] = candidates
        self.probabilities[memory, :count] = probabilities


def direction(hidden: Tensor) -> Tensor:
    """Hidden states [R, H] divided by their lengths."""
    return F.normalize(hidden.float(), dim=-1).to(hidden.dtype)


def degeneration(directions: Tensor, context: Tensor, candidates: Tensor) -> Tensor:
    """The greatest cosine similarity of each candidate with what came before it: f32 [k]. directions [L, H] of one sequence, of which
    `context` (int32 [1]) count; candidates [k, H]."""
    similarity = candidates.float() @ directions.float().T
    known = torch.arange(directions.shape[0], device=context.device) < context
    return similarity.masked_fill(~known, -1.0).amax(dim=1)


def best_candidate(probabilities: Tensor, penalties: Tensor, alpha: Tensor) -> Tensor:
    """argmax of (1 − α) × p − α × penalty (eq. 5), the likelier of equals: int64 [R]. probabilities, penalties f32 [R, k], best first;
    alpha f32 [R]."""
    alpha = alpha[:, None]
    return ((1 - alpha) * probabilities - alpha * penalties).argmax(dim=-1)
