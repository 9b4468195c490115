"""How a sequence's tokens are found. Pure."""

from __future__ import annotations

from enum import Enum, auto

from services.model_worker.block_pool import ROOT_HASH, block_hash
from shared.sampling import SamplingParams

# Blocks of sequences that the amateur has computed, too, are no use to others, nor theirs to them.
_AMATEUR_ROOT = block_hash(ROOT_HASH, [])


class Strategy(Enum):
    SAMPLING = auto()  # greedy included
    BEAM_SEARCH = auto()
    CONTRASTIVE_SEARCH = auto()
    CONTRASTIVE_DECODING = auto()

    @staticmethod
    def of(params: SamplingParams) -> Strategy:
        if params.num_beams > 1:
            return Strategy.BEAM_SEARCH
        if params.penalty_alpha > 0:
            return Strategy.CONTRASTIVE_SEARCH
        return Strategy.CONTRASTIVE_DECODING if params.cd_alpha > 0 else Strategy.SAMPLING

    @property
    def root_hash(self) -> bytes:
        """What a chain of block hashes begins with."""
        return _AMATEUR_ROOT if self is Strategy.CONTRASTIVE_DECODING else ROOT_HASH
