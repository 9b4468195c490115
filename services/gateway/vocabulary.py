"""Bytes of token ids, asked of a model's tokenizers when first needed (log-probabilities name tokens, events only ids)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from services.gateway.errors import ApiError
from shared import codec, subjects
from shared.bus import Bus, BusError
from shared.errors import ErrorCode, GorgonError
from shared.messages import PiecesQuery, PiecesReply

TIMEOUT = 1.0
ATTEMPTS = 10
PAUSE = 0.1
AT_ONCE = 65536  # ids in one question


class Vocabulary:
    """Of one model. `pieces` holds what is known so far, `special` the ids among them that leave no text."""

    def __init__(self, bus: Bus, model: str) -> None:
        self.pieces: dict[int, bytes] = {}
        self.special: set[int] = set()
        self._bus = bus
        self._subject = subjects.pieces(model)

    async def learn(self, ids: Iterable[int]) -> None:
        """Returns when `pieces` has all of the ids. Raises ApiError 503 if no tokenizer answers for long."""
        unknown = [i for i in ids if i not in self.pieces]
        for start in range(0, len(unknown), AT_ONCE):
            asked = unknown[start : start + AT_ONCE]
            reply = await self._ask(PiecesQuery(ids=codec.pack_ids(asked)))
            self.pieces.update(zip(asked, reply.pieces, strict=True))
            self.special.update(codec.unpack_ids(reply.special))

    async def _ask(self, query: PiecesQuery) -> PiecesReply:
        data = codec.encode(query)
        for _ in range(ATTEMPTS):
            try:
                return codec.decode_as(PiecesReply, (await self._bus.request(self._subject, data, TIMEOUT)).data)
            except BusError:
                await asyncio.sleep(PAUSE)
        raise ApiError.of(GorgonError(ErrorCode.UNAVAILABLE, "no tokenizer of the model answers", retry_after=1.0))
