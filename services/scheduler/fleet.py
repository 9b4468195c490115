"""Which workers and schedulers live, judged by progress and not by pings. Pure: heartbeats and times are passed in.

Silence proves something only while one's own link works, and only the echo of one's own heartbeats proves that it does. So silence
is measured in *proven time*, which advances with each echo, by no more than echoes are apart when all is well. While NATS, the link
or this very process stands still, proven time does too, and nobody is declared lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shared.capabilities import Fields, knows
from shared.messages import WorkerHeartbeat

LONGEST_STEP = 1.5  # of proven time, in intervals between echoes
LOST_LINK = 3.5  # intervals without an echo: the link was lost, and the others' may have been, too
SILENT_BEATS = 4.5  # intervals of silence that are never too short: four beats were missed, and nothing came in between
LONGEST_CLOSURE = 16  # heartbeats for which a worker that refuses orders is given none
BLACKOUT = 2.5  # missed heartbeats: more is no longer chance
# Seconds, more than an election takes: then all workers count as lost, so that somebody looks at the deadlines of what they had.
LONGEST_BLACKOUT = 10.0
PEER_PATIENCE = 2.0  # schedulers, who have more to do between two heartbeats, are given so much more time than workers


class Link:
    """Proven time. `interval`: seconds between own heartbeats; `grace`: seconds that others may take to come back after a loss."""

    def __init__(self, interval: float, grace: float) -> None:
        self.proven = 0.0
        self._interval = interval
        self._grace = grace
        self._echo: float | None = None
        self._counts_from = 0.0

    def echoed(self, now: float) -> None:
        """An own heartbeat has come back."""
        gap = None if self._echo is None else now - self._echo
        self._echo = now
        if gap is None or gap > LOST_LINK * self._interval:
            self._counts_from = now + self._grace
        elif now > self._counts_from:
            self.proven += min(gap, LONGEST_STEP * self._interval)


@dataclass(slots=True)
class Worker:
    """One incarnation and its last heartbeat, `heard` at that proven time.

    reserved   sequences on their way to it that the ledger does not show yet;  reserved_tokens: KV tokens promised since the heartbeat
    refusals   orders in a row that it has refused;  closed_for: heartbeats until it is asked again
    isolated_reserved   suspects among the reserved
    """

    instance: str
    beat: WorkerHeartbeat
    heard: float
    reserved: int = 0
    reserved_tokens: int = 0
    refusals: int = 0
    closed_for: int = 0
    isolated_reserved: int = 0

    def is_hung(self, margin: float) -> bool:
        return self.beat.step_age > self.beat.step_bound * margin


@dataclass
class Fleet:
    """silence      seconds of a worker's silence (at least 4.5 of its intervals) after which it is lost
    step_margin  a step that has taken this many times its declared bound hangs
    """

    link: Link
    silence: float
    step_margin: float
    workers: dict[str, Worker] = field(default_factory=dict)
    peers: dict[str, float] = field(default_factory=dict)  # schedulers, and the proven time at which they were heard
    holds: dict[str, str] = field(default_factory=dict)  # by scheduler: a worker of which it keeps what becomes free

    def silence_of(self, since: float) -> float:
        """Seconds of silence that count, since a sign of life at the proven time `since`."""
        return self.link.proven - since

    def heard(self, beat: WorkerHeartbeat) -> bool:
        """Takes a heartbeat; True if this worker is new (or back)."""
        worker = self.workers.get(beat.base.instance)
        if worker is None:
            self.workers[beat.base.instance] = Worker(beat.base.instance, beat, self.link.proven)
            return True
        if self.is_blacked_out():  # it was not their fault: the others get the time to be heard, too
            for other in self.workers.values():
                other.heard = self.link.proven
        worker.beat, worker.heard, worker.reserved_tokens = beat, self.link.proven, 0
        worker.closed_for = max(0, worker.closed_for - 1)
        return False

    def heard_peer(self, instance: str, draining: bool, holds: str = "") -> None:
        self.holds[instance] = holds
        if draining:
            self._forget_peer(instance)
        else:
            self.peers[instance] = self.link.proven

    def held_by_peers(self) -> set[str]:
        """A scheduler that died keeps nothing."""
        return {self.holds[name] for name in self.live_peers()}

    def _forget_peer(self, instance: str) -> None:
        self.peers.pop(instance, None)
        self.holds.pop(instance, None)

    def live_peers(self) -> list[str]:
        silent = [name for name, heard in self.peers.items() if self.silence_of(heard) > PEER_PATIENCE * self.silence]
        for name in silent:
            self._forget_peer(name)
        return list(self.peers)

    def is_blacked_out(self) -> bool:
        """Several workers, and all of them silent at once: rather NATS's fault than theirs. Nor is there anywhere to migrate to."""
        return len(self.workers) > 1 and all(
            self.silence_of(w.heard) > BLACKOUT * w.beat.base.interval for w in self.workers.values()
        )

    def judge(self) -> dict[str, str]:
        """Workers that cannot go on, with the reason: "lost" (silent), "hung" (a step beyond its bound), "died" (said so)."""
        verdicts = {}
        blacked_out = self.is_blacked_out()
        for worker in self.workers.values():
            beat = worker.beat
            patience = max(LONGEST_BLACKOUT if blacked_out else self.silence, SILENT_BEATS * beat.base.interval)
            if beat.suspects:
                verdicts[worker.instance] = "died"
            elif self.silence_of(worker.heard) > patience:
                verdicts[worker.instance] = "lost"
            elif worker.is_hung(self.step_margin):
                verdicts[worker.instance] = "hung"
        return verdicts

    def remove(self, instance: str) -> None:
        self.workers.pop(instance, None)

    def answered(self, instance: str, accepted: bool) -> None:
        """A worker has accepted an order, or refused it (or said nothing): then it is left alone for a while, longer each time."""
        if (worker := self.workers.get(instance)) is not None:
            worker.refusals = 0 if accepted else worker.refusals + 1
            worker.closed_for = 0 if accepted else min(LONGEST_CLOSURE, 2**worker.refusals)

    def able(self, needed: Fields) -> list[Worker]:
        """Those that honour everything that a request says: in a rolling upgrade not all may."""
        return [worker for worker in self.workers.values() if knows(worker.beat.base, needed)]

    def available(
        self, workers: Sequence[Worker], fits: Callable[[WorkerHeartbeat], bool] = lambda _: True
    ) -> list[Worker]:
        """Of these the ones that take new requests. Those that never can (`fits`) only if all are like that: one of them says why."""
        takes = [
            w
            for w in workers
            if not (w.beat.base.draining or w.beat.suspects or w.closed_for or w.is_hung(self.step_margin))
        ]
        return [w for w in takes if fits(w.beat)] or ([] if any(fits(w.beat) for w in workers) else takes)
