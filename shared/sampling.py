"""How a request wants its tokens chosen: the parameters that every stage passes on unchanged and the worker obeys.

The noise of a sampled token is keyed by (seed, choice, position) and nothing else: not by the batch, the step, the worker or the
speculation. That is what makes a migrated stream continue as if nothing had happened, so the seed is drawn once, at admission.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_LOGPROBS = 20
MAX_STOP_TOKEN_IDS = 64


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters of one request, validated at admission (services/tokenizer), never afterwards.

    max_tokens          most tokens to generate, at least 1
    temperature         0 means greedy (argmax; ties go to the lowest id)
    top_k               0 keeps all; otherwise the k most probable tokens (ties with the k-th are kept)
    top_p               nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751), applied after top_k on renormalised probabilities
    min_p               drops tokens below min_p × the largest probability (Nguyen et al. 2024, arXiv 2407.01082)
    seed                64-bit key of the counter-based noise
    stop_token_ids      ids that end the sequence, beside the model's own end-of-sequence ids
    ignore_eos          the model's own end-of-sequence ids do not end the sequence (stop_token_ids still do)
    repetition_penalty  Keskar et al. 2019 (CTRL, arXiv 1909.05858), over prompt and generated tokens
    presence_penalty    subtracted once from the logit of every token already generated
    frequency_penalty   subtracted for each time the token has been generated
    logprobs            None: none. n ≥ 0: the chosen token's log-probability and those of the n likeliest, from the raw
                        logits (before temperature, penalties and filters)
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
