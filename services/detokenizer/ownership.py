"""Which detokenizers live, and so who owns which partition. Everybody computes it alike, from heartbeats; nothing is leased."""

from __future__ import annotations

from shared.messages import Heartbeat
from shared.rendezvous import owner


class Fleet:
    """The detokenizers of one model as this one (`me`) sees them. Times are the event loop's seconds.

    Silence counts only while one's own link is healthy, and while this process itself has not been standing still.
    """

    def __init__(self, me: str, grace: float) -> None:
        self.me = me
        self._grace = grace
        self._seen: dict[str, float] = {}
        self._looked: float | None = None

    def saw(self, beat: Heartbeat, now: float) -> None:
        if beat.instance == self.me:
            return
        if beat.draining:
            self._seen.pop(beat.instance, None)
        else:
            self._seen[beat.instance] = now

    def others(self, now: float, connected_for: float) -> frozenset[str]:
        """Everybody else who can own partitions. To be called often: a long time without a call was a standstill of our own."""
        stood_still = now - self._looked > self._grace / 2 if self._looked is not None else False
        self._looked = now
        if stood_still:
            self._seen = dict.fromkeys(self._seen, now)
        if connected_for > self._grace:
            self._seen = {name: seen for name, seen in self._seen.items() if now - seen <= self._grace}
        return frozenset(self._seen)


def partitions_of(me: str, nodes: frozenset[str], model: str, partitions: int) -> frozenset[int]:
    """What `me` owns when `nodes` are there."""
    return frozenset(p for p in range(partitions) if owner(f"{model}.{p}", nodes) == me)
