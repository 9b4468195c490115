"""Which fields of a request go together with which decoding strategy. Pure; used by shared/api.py.

A strategy that does not honour a field refuses it. So each one names the fields that it takes: a new field goes together with none of
them until somebody has looked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What says nothing about the choice of tokens, or is the same for all.
_ALWAYS = frozenset({
    "id", "tenant", "model", "prompt", "messages", "tools", "chat_template_kwargs", "max_tokens", "seed", "n", "stop_token_ids",
    "ignore_eos", "priority", "deadline", "stream", "batched", "metadata", "traceparent",
})  # fmt: skip
_TAKES = {
    "num_beams": _ALWAYS | {"num_beams", "length_penalty", "early_stopping"},
    "penalty_alpha": _ALWAYS | {"penalty_alpha", "top_k", "stop"},
    "cd_alpha": _ALWAYS
    | {"cd_alpha", "cd_beta", "cd_temperature", "stop", "temperature", "top_k", "top_p", "min_p", "logprobs"},
}
# What these strategies do anyhow.
_NOTHING_NEW = (("temperature", 0), ("tool_choice", "auto"))
_NEEDS = {
    "length_penalty": "num_beams",
    "early_stopping": "num_beams",
    "cd_beta": "cd_alpha",
    "cd_temperature": "cd_alpha",
}


def strategy_of(fields: Mapping[str, Any]) -> str | None:
    """The field that chooses the strategy, None for sampling. `fields`: those that were given."""
    if fields.get("num_beams", 1) > 1:
        return "num_beams"
    return next((name for name in ("penalty_alpha", "cd_alpha") if name in fields), None)


def complaint(fields: Mapping[str, Any]) -> str | None:
    """What is wrong with the combination of fields that were given with another value than their default."""
    strategy = strategy_of(fields)
    for name, needed in _NEEDS.items():
        if name in fields and strategy != needed:
            return f"{name!r} needs {needed!r}" + (" above 1" if needed == "num_beams" else "")
    if strategy is None:
        return None
    others = sorted(name for name in fields.keys() - _TAKES[strategy] if (name, fields[name]) not in _NOTHING_NEW)
    if others:
        return f"{', '.join(map(repr, others[:5]))} cannot be used with {strategy!r}"
    choices = fields.get("n", 1)
    if strategy == "num_beams" and choices > fields["num_beams"]:
        return f"'n' is {choices}, but there are only {fields['num_beams']} beams"
    if strategy == "penalty_alpha" and choices > 1:
        return "contrastive search has one result: 'n' must be 1"
    if strategy == "penalty_alpha" and fields.get("top_k", 0) < 2:
        return "contrastive search needs 'top_k', at least 2"
    return None
