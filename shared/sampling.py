"""How a request wants its tokens chosen: the parameters that every stage passes on unchanged and the worker obeys.

The noise of a sampled token is keyed by (seed, choice, position) and nothing else: not by the batch, the step, the worker or the
speculation. That is what makes a migrated stream continue as if nothing had happened, so the seed is drawn once, at admission.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_LOGPROBS = 20
MAX_STOP_TOKEN_IDS = 64
MAX_BEAMS = 16
MAX_CONTRASTIVE = 16  # candidates of a step of contrastive search
# The tables on the device are of fixed size.
MAX_LOGIT_BIAS = 384  # tokens
MAX_BAD_WORDS = 256  # sequences of tokens
MAX_BAD_WORD_TOKENS = 16  # of one sequence


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters of one request, validated at admission (services/tokenizer), never afterwards.

    max_tokens          most tokens to generate; 0 only where the prompt alone is wanted (prompt_logprobs, echo)
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
    typical_p           typical sampling (Meister et al. 2022, arXiv 2202.00666), the last of the filters; 1 keeps all
    logit_bias          (token id, what is added to its logit), each id once, at most MAX_LOGIT_BIAS
    bad_words           sequences of token ids whose last id is banned behind the others, at most MAX_BAD_WORDS of
                        MAX_BAD_WORD_TOKENS ids; the others may be tokens of the prompt
    min_tokens          ids that would end the sequence are banned until so many tokens are generated
    prompt_logprobs     None: none. n ≥ 0: as logprobs, of the prompt's tokens but the first
    ranked              log-probabilities of chosen tokens are wanted, though the client asked for none: to find the best choices
    num_beams           above 1: beam search over the raw distribution. Everything above but max_tokens, stop ids and ignore_eos does
                        not apply
    length_penalty      a finished beam's log-probability is divided by its length to this power
    early_stopping      see services/model_worker/search/beam.py
    penalty_alpha       above 0: contrastive search (Su et al. 2022, arXiv 2202.06417) among top_k candidates
    cd_alpha            above 0: contrastive decoding (Li et al. 2022, arXiv 2210.15097) with the worker's amateur model: tokens below
                        cd_alpha × the largest probability are out
    cd_beta             None: expert's minus amateur's log-probabilities (Li et al.); else (1 + cd_beta) × expert's − cd_beta ×
                        amateur's logits (O'Brien & Lewis 2023, arXiv 2309.09117)
    cd_temperature      of the amateur's distribution

    Order of processing, as in transformers: penalties; logit_bias, bad_words, min_tokens; temperature; top_k, top_p, min_p, typical_p.
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
    typical_p: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0
    prompt_logprobs: int | None = None
    ranked: bool = False
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    penalty_alpha: float = 0.0
    cd_alpha: float = 0.0
    cd_beta: float | None = None
    cd_temperature: float = 1.0

    def slots(self, choices: int) -> int:
        """Places in a worker's batch that a request with so many choices takes."""
        return max(choices, self.num_beams)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def has_edits(self) -> bool:
        """Some logits are changed one by one."""
        return bool(self.logit_bias or self.bad_words or self.min_tokens)

    @property
    def worker_logprobs(self) -> int | None:
        """As `logprobs`, of what the worker must tell."""
        return 0 if self.logprobs is None and self.ranked else self.logprobs
