"""What a client is told of: a choice, or the prompt, as a growing list of ids with their text and log-probabilities."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from services.detokenizer.stream import ChoiceStream
from shared.codec import unpack_ids
from shared.messages import TokenLogprobs


class Track(NamedTuple):
    """ids        those of the log; the first `stream.shown` of them are told
    logprobs   of the ids, if they are to be told
    index      of the choice in the log; PROMPT of the prompt, whose first token has no log-probability
    """

    stream: ChoiceStream
    ids: list[int]
    logprobs: list[TokenLogprobs] | None
    index: int  # type: ignore[assignment]  # not the tuple's method

    def logprob_rows(self, start: int, end: int) -> list[dict[str, Any]] | None:
        if self.logprobs is None:
            return None
        rows = [
            dict(
                id=token, logprob=row.chosen, top=[list(p) for p in zip(unpack_ids(row.top_ids), row.top, strict=True)]
            )
            for token, row in zip(self.ids[start:end], self.logprobs[start:end], strict=False)
        ]
        if self.index < 0 and start == 0 and rows:
            rows[0]["logprob"] = None
        return rows


class NoText:
    """A `Decoding` for tokens whose text nobody wants."""

    def feed(self, ids: Iterable[int]) -> str:
        return ""

    def flush(self) -> str:
        return ""


def mean_logprob(track: Track) -> float:
    """Over the tokens that are told, as OpenAI ranks with best_of; of no tokens: that of a certain one."""
    rows = (track.logprobs or ())[: track.stream.shown]
    return sum(row.chosen for row in rows) / max(1, len(rows))
