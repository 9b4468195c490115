"""What tokenizers and workers read alike from a Hugging Face model folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def named_eos_ids(config: Mapping[str, Any], generation: Mapping[str, Any]) -> frozenset[int]:
    """End-of-sequence ids of config.json and generation_config.json.

    What the authors generate with goes before what they trained with: chat models end their turns by ids named only there. Raises
    ValueError.
    """
    eos = generation.get("eos_token_id")
    if eos is None:
        eos = config.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if any(type(token) is not int or token < 0 for token in ids):
        raise ValueError(f"eos_token_id is {eos!r:.80}, not a token id or a list of them")
    return frozenset(ids)


def eos_ids(config: Mapping[str, Any], generation: Mapping[str, Any], vocab_size: int) -> frozenset[int]:
    """Those of them that the model can generate: there are logits of no others. Raises ValueError."""
    return frozenset(token for token in named_eos_ids(config, generation) if token < vocab_size)
