"""Which workers live, judged by progress and not by pings. Pure: time is passed in.

Silence proves something only while one's own link works. The proof that it does is the echo of one's own heartbeats through NATS:
when NATS stalls, everybody falls silent, the echo too, and nobody is declared lost.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.messages import WorkerHeartbeat


class Link:
    """Whether this process hears what is said. `trusted_since` is when silence of others began to count."""

    def __init__(self, patience: float, reconnect_grace: float) -> None:
        self._patience = patience
        self._grace = reconnect_grace
        self._echo: float | None = None
        self.trusted_since: float | None = None

    def echoed(self, now: float) -> None:
        gap = None if self._echo is None else now - self._echo
        self._echo = now
        if gap is None or gap > self._grace:
            self.trusted_since = now + self._grace  # others need time to come back, too
        elif gap > self._patience:
            self.trusted_since = max(now, self.trusted_since or now)

    def silence_of(self, heard: float, now: float) -> float:
        """Seconds of silence that count, since a sign of life at `heard`."""
        if self._echo is None or now - self._echo > self._patience or self.trusted_since is None:
            return 0.0
        return now - max(heard, self.trusted_since)


@dataclass(slots=True)
class Worker:
    """One incarnation and its last heartbeat. `reserved` counts requests on their way to it that the ledger does not show yet."""

    instance: str
    beat: WorkerHeartbeat
    heard: float
    reserved: int = 0
    reserved_tokens: int = 0  # KV tokens promised since the last heartbeat


@dataclass
class Fleet:
    link: Link
    silence: float
    step_margin: float
    workers: dict[str, Worker] = field(default_factory=dict)
    peers: dict[str, float] = field(default_factory=dict)  # schedulers, this one included
    first_missed: dict[str, float] = field(default_factory=dict)

    def heard(self, beat: WorkerHeartbeat, now: float) -> bool:
        """Takes a heartbeat; True if this worker is new (or back)."""
        worker = self.workers.get(beat.base.instance)
        self.first_missed.pop(beat.base.instance, None)
        if worker is None:
            self.workers[beat.base.instance] = Worker(beat.base.instance, beat, now)
            return True
        worker.beat, worker.heard, worker.reserved_tokens = beat, now, 0
        return False

    def heard_peer(self, instance: str, draining: bool, now: float) -> None:
        if draining:
            self.peers.pop(instance, None)
        else:
            self.peers[instance] = now

    def live_peers(self, now: float) -> list[str]:
        return [name for name, heard in self.peers.items() if self.link.silence_of(heard, now) <= 3 * self.silence]

    def judge(self, now: float) -> dict[str, str]:
        """Workers that cannot go on, with the reason: "lost" (silent), "hung" (a step beyond its bound), "died" (said so)."""
        verdicts = {}
        for worker in self.workers.values():
            beat = worker.beat
            age = beat.step_age + (now - worker.heard if beat.step_age else 0.0)
            if beat.suspects:
                verdicts[worker.instance] = "died"
            elif self.link.silence_of(worker.heard, now) > max(self.silence, 3 * beat.base.interval):
                verdicts[worker.instance] = "lost"
            elif beat.step_age and beat.step_age > beat.step_bound * self.step_margin and age > beat.step_bound:
                verdicts[worker.instance] = "hung"
        return verdicts

    def is_missing(self, instance: str, now: float, grace: float) -> bool:
        """Whether a worker that the ledger names is known to nobody: it died before this scheduler began to listen."""
        if instance in self.workers or self.link.silence_of(now, now) < 0 or self.link.trusted_since is None:
            self.first_missed.pop(instance, None)
            return False
        since = self.first_missed.setdefault(instance, now)
        return self.link.silence_of(since, now) > grace

    def remove(self, instance: str) -> None:
        self.workers.pop(instance, None)

    def available(self) -> list[Worker]:
        """Workers that take new requests, hung ones excluded."""
        return [
            w
            for w in self.workers.values()
            if not w.beat.base.draining
            and not w.beat.suspects
            and w.beat.step_age <= w.beat.step_bound * self.step_margin
        ]
