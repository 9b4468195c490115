"""The requests that this scheduler has seen, as the stream REQ holds them: prompt, parameters, deadline."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass

from services.scheduler.clock import ServerClock
from shared import codec, subjects
from shared import messages as m
from shared.bus import Bus, Stored
from shared.logging import note_request
from shared.retry import until_done

REMEMBERED = 4096


@dataclass(slots=True)
class Known:
    """`stamp`: the server's time at which it was stored. `opened`: this process has seen its OPEN acknowledged. `trace`: the
    traceparent for the worker that is next ordered to run it."""

    request: m.Request
    seq: int
    stamp: float
    trace: str
    opened: bool = False


class Requests:
    """The latest are kept, which saves reading them again at most migrations."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._clock = ServerClock()
        self._known: OrderedDict[int, Known] = OrderedDict()  # by REQ sequence

    def take(self, stored: Stored) -> Known:
        """Raises CodecError."""
        self.observe_clock(stored.stamp)
        known = self._known.get(stored.seq)
        if known is None:
            request = codec.decode_as(m.Request, stored.data)
            known = self._known[stored.seq] = Known(request, stored.seq, stored.stamp, request.trace)
            note_request(request.key, trace=request.trace)
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        return known

    def forget(self, seq: int) -> None:
        """Its request has ended: a prompt may be long. Should it be needed again, it is read again."""
        self._known.pop(seq, None)

    async def read(self, seq: int) -> Known | None:
        """None if it is no longer stored. Raises CodecError."""
        if (known := self._known.get(seq)) is not None:
            return known
        stored = await until_done("read", str(seq), lambda: self._bus.read(subjects.STREAM_REQ, seq))
        return None if stored is None else self.take(stored)

    def observe_clock(self, stamp: float) -> None:
        self._clock.observe(stamp, asyncio.get_running_loop().time())

    def age(self, known: Known) -> float:
        """Seconds since it was stored."""
        return self._clock.age(known.stamp, asyncio.get_running_loop().time())

    def expires(self, known: Known) -> float | None:
        """Loop time of its deadline, None if it has none."""
        deadline = known.request.deadline
        return None if deadline is None else asyncio.get_running_loop().time() + deadline - self.age(known)
