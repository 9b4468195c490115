"""What a process of another version would lose. During a rolling upgrade a message may be read by a process that does not know its last
fields, and the codec drops what the reader does not know: so heartbeats say how much of each kind of message their process knows, and
a request goes only where all that it says is honoured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from shared import messages as m
from shared.sampling import SamplingParams

# By kind of message, how many of its fields are known.
Fields = Mapping[str, int]

_ORDER: dict[str, tuple[str, ...]] = {
    "request": m.Request._fields,
    "open": m.Open._fields,
    "run": m.Run._fields,
    "sampling": tuple(field.name for field in fields(SamplingParams)),
}
KNOWN: Fields = {kind: len(names) for kind, names in _ORDER.items()}
# Of a process whose heartbeats do not say: what there was before they did, and before most ways to decode.
_FIRST: Fields = {"request": 14, "open": 13, "run": 11, "sampling": 13}
_DEFAULTS = SamplingParams()


def knows(process: m.Heartbeat, needed: Fields) -> bool:
    known = process.knows or _FIRST
    return all(known.get(kind, 0) >= count for kind, count in needed.items())


def needed_of_workers(request: m.Request) -> Fields:
    """To run it."""
    sampling = request.sampling
    run = {"constraint": request.constraint, "prompt_done": sampling.prompt_logprobs is not None}
    changed = {name: getattr(sampling, name) != getattr(_DEFAULTS, name) for name in _ORDER["sampling"]}
    return {"run": _count("run", run), "sampling": _count("sampling", changed)}


def needed_of_detokenizers(request: m.Request) -> Fields:
    """To serve its answer."""
    return {
        "open": _count(
            "open",
            {
                "tool_format": request.tool_format,
                "best": request.best,
                "prompt_logprobs": request.sampling.prompt_logprobs is not None,
                "prompt_ids": request.echo,
            },
        )
    }


def needed_of_schedulers(request: m.Request) -> Fields:
    """To pass all of it on."""
    own = {name: getattr(request, name) for name in ("tool_format", "best", "echo", "constraint", "refused_as")}
    return {
        "request": _count("request", own),
        **needed_of_workers(request),
        **needed_of_detokenizers(request),
    }


def _count(kind: str, used: Mapping[str, Any]) -> int:
    """How many fields a reader must know so that none of those that are used is lost."""
    names = _ORDER[kind]
    return max(
        (names.index(name) + 1 for name, value in used.items() if value and name in names[_FIRST[kind] :]), default=0
    )
