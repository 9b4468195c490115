"""What a worker says to a search before it takes it. Pure."""

from __future__ import annotations

from services.model_worker.search.beam import MAX_CANDIDATES, candidates_needed
from services.model_worker.search.beam_group import blocks_needed
from services.model_worker.search.strategy import Strategy
from services.model_worker.sequence import Sequence
from shared.errors import ErrorCode
from shared.sampling import MAX_CONTRASTIVE

Refusal = tuple[str, str]  # error code and message


def refusal(
    sequence: Sequence,
    *,
    max_seqs: int,
    num_blocks: int,
    block_size: int,
    vocab_size: int,
    amateur: bool,
    memory_tokens: int,
) -> Refusal | None:
    """Why a sequence with another strategy than sampling can never run here. memory_tokens: 0 without contrastive search."""
    params = sequence.request.params
    if params.max_tokens < 1:
        return ErrorCode.INVALID_REQUEST, "max_tokens: a search generates one token at least"
    match sequence.strategy:
        case Strategy.BEAM_SEARCH:
            if sequence.request.choices > params.num_beams:
                return ErrorCode.INVALID_REQUEST, f"{sequence.request.choices} choices of {params.num_beams} beams"
            if params.num_beams > max_seqs:
                return ErrorCode.UNSUPPORTED, f"num_beams: at most {max_seqs} sequences run here at a time"
            if candidates_needed(params.num_beams, len(sequence.stops)) > min(vocab_size, MAX_CANDIDATES):
                return ErrorCode.INVALID_REQUEST, "num_beams: too many beams and stop ids for this vocabulary"
            needed = blocks_needed(sequence.prompt_len, sequence.limit, params.num_beams, block_size)
            if needed > num_blocks:
                message = f"{params.num_beams} beams of {sequence.limit} tokens need {needed} blocks of KV cache of {num_blocks}"
                return ErrorCode.CONTEXT_LENGTH_EXCEEDED, message
        case Strategy.CONTRASTIVE_SEARCH:
            if not memory_tokens:
                return ErrorCode.UNSUPPORTED, "penalty_alpha: this worker has no memory for contrastive search"
            if not 1 < params.top_k <= min(MAX_CONTRASTIVE, vocab_size):
                return ErrorCode.INVALID_REQUEST, f"top_k: contrastive search takes 2 to {MAX_CONTRASTIVE} candidates"
            if sequence.limit > memory_tokens:
                message = f"contrastive search takes {memory_tokens} tokens here, not {sequence.limit}"
                return ErrorCode.CONTEXT_LENGTH_EXCEEDED, message
            if -(-(sequence.limit + params.top_k) // block_size) > num_blocks:
                message = f"{sequence.limit} tokens and {params.top_k} candidates exceed the KV cache"
                return ErrorCode.CONTEXT_LENGTH_EXCEEDED, message
        case Strategy.CONTRASTIVE_DECODING:
            if not amateur:
                return ErrorCode.UNSUPPORTED, "cd_alpha: this worker has no amateur model"
    return None
