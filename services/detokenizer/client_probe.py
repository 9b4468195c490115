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

PROBES = 6  # in the time after which a client that does not listen has vanished
AT_ONCE = 8
TIMEOUT = 0.25


class _Silence(NamedTuple):
    subject: str
    since: float  # the loop's seconds
    probes: int


class ClientProbe:
    """Calls `vanished` with the key of a live request whose reply subject had no listener for `vanished_after` seconds. `catch_up`
    returns when all is folded that is in the log: the client may listen elsewhere since."""

    def __init__(
        self,
        bus: Bus,
        vanished_after: float,
        spawn: Callable[[Coroutine[Any, Any, None], str], None],
        catch_up: Callable[[], Awaitable[None]],
        vanished: Callable[[str], None],
    ) -> None:
        self._bus = bus
        self._vanished_after = vanished_after
        self._spawn = spawn
        self._catch_up = catch_up
        self._vanished = vanished
        self._silent: dict[str, _Silence] = {}  # by request key

    def forget(self, key: str) -> None:
        """The client was heard, or its request is over."""
        self._silent.pop(key, None)

    async def probe_forever(self, core: PartitionCore) -> None:
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
                    self._spawn(self._probe(answer), "probe")

    async def _probe(self, answer: Answer) -> None:
        reply = answer.state.reply
        if answer.ended or reply is None or not reply.subject:
            return
        (data,) = encode_for(reply, [answer.sign_of_life()])
        try:
            await self._bus.request(reply.subject, data, TIMEOUT)
        except NoResponders:
            if not answer.ended and answer.state.reply == reply:
                await self._count(answer, reply)
            return
        except BusError:
            pass
        self.forget(answer.state.key)

    async def _count(self, answer: Answer, reply: ReplyTo) -> None:
        """Time alone proves nothing, as this process may have stood still: as many probes count as there are in that time."""
        key, now = answer.state.key, asyncio.get_running_loop().time()
        silence = self._silent.get(key)
        if silence is None or silence.subject != reply.subject:
            silence = _Silence(reply.subject, now, 0)
        self._silent[key] = silence._replace(probes=silence.probes + 1)
        if silence.probes < PROBES or now - silence.since < self._vanished_after:
            return
        self.forget(key)
        await self._catch_up()
        if not answer.ended and answer.state.reply == reply:
            self._vanished(key)
