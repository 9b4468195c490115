"""Clients that are gone: who listens no more to the reply subject of a live request, and for how long. Nobody else would notice, as
messages to a subject without listeners are no error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NamedTuple

from services.detokenizer.answer import Answer
from services.detokenizer.core import PartitionCore
from shared.api import encode_for
from shared.bus import Bus, BusError, NoResponders
from shared.messages import ReplyTo

Spawn = Callable[[Coroutine[Any, Any, None], str], None]
Gone = Callable[[Answer, ReplyTo], Awaitable[None]]  # told of an answer whose client listens no more there

PROBES = 6  # in the time after which a client that does not listen has vanished
AT_ONCE = 8
TIMEOUT = 0.25


class _Silence(NamedTuple):
    subject: str
    since: float  # the loop's seconds
    probes: int


class ClientProbe:
    """Counts as gone whose reply subject had no listener for `vanished_after` seconds."""

    def __init__(self, bus: Bus, vanished_after: float) -> None:
        self._bus = bus
        self._vanished_after = vanished_after
        self._silent: dict[str, _Silence] = {}  # by request key

    def forget(self, key: str) -> None:
        """The client was heard, or its request is over."""
        self._silent.pop(key, None)

    async def probe_forever(self, core: PartitionCore, spawn: Spawn, gone: Gone) -> None:
        """Asks every live client's reply subject now and then with an event without news; the server says at once if nobody listens.
        Nobody needs to answer: silence means that somebody is there. Who does not stream counts on a single event, and is asked only
        after a time in which nobody would wait for it in vain."""
        interval = self._vanished_after / PROBES
        while True:
            asked_from = core.stamp - self._vanished_after
            live = [
                answer
                for answer in core.answers.values()
                if not (answer.ended or answer.opened.durable)
                and (answer.state.reply is None or answer.state.reply.stream or answer.opened_at < asked_from)
            ]
            # Evenly over the interval: all at once would keep every stream waiting.
            rounds = max(1, -(-len(live) // AT_ONCE))
            for start in range(0, rounds * AT_ONCE, AT_ONCE):
                await asyncio.sleep(interval / rounds)
                for answer in live[start : start + AT_ONCE]:
                    spawn(self._probe(answer, gone), "probe")

    async def _probe(self, answer: Answer, gone: Gone) -> None:
        key, reply = answer.state.key, answer.state.reply
        if answer.ended or reply is None or not reply.subject:
            return
        (data,) = encode_for(reply, [answer.sign_of_life()])
        try:
            await self._bus.request(reply.subject, data, TIMEOUT)
        except NoResponders:
            if not answer.ended and answer.state.reply == reply and self._is_gone(key, reply.subject):
                await gone(answer, reply)
            return
        except BusError:
            pass
        self.forget(key)

    def _is_gone(self, key: str, subject: str) -> bool:
        """Time alone proves nothing, as this process may have stood still: as many probes count as there are in that time."""
        now = asyncio.get_running_loop().time()
        silence = self._silent.get(key)
        if silence is None or silence.subject != subject:
            silence = _Silence(subject, now, 0)
        self._silent[key] = silence._replace(probes=silence.probes + 1)
        if silence.probes < PROBES or now - silence.since < self._vanished_after:
            return False
        self.forget(key)
        return True
