"""What the heartbeats of others say: which models are served, how long a sequence may be, how many requests wait."""

from __future__ import annotations

from enum import Enum

from shared.capabilities import KNOWN, knows, needed_of_detokenizers, needed_of_schedulers, needed_of_workers
from shared.messages import Heartbeat, Request, WorkerHeartbeat
from shared.presence import Heard, base_of, is_fresh, longest


class Presence(Enum):
    SERVED = "served"
    ABSENT = "absent"  # was there not long ago
    UNKNOWN = "unknown"


class Registry(Heard):
    def hear(self, beat: Heartbeat | WorkerHeartbeat, now: float) -> None:
        if not base_of(beat).draining:  # one that drains serves on until its last ordinary beat is stale
            super().hear(beat, now)

    def _live(self, stage: str, model: str, now: float) -> list[Heartbeat | WorkerHeartbeat]:
        return [  # not by `live`: few beats are of the stage, and every request asks three times
            beat
            for beat, heard in self._beats.values()
            if (base := base_of(beat)).stage == stage and base.model == model and is_fresh(base, heard, now)
        ]

    def presence(self, model: str, now: float) -> Presence:
        if self._live("tokenizer", model, now):
            return Presence.SERVED
        return Presence.ABSENT if self.remembers(model, now) else Presence.UNKNOWN

    def context(self, model: str, now: float) -> int | None:
        """The longest sequence that some live worker takes; None if none is known."""
        workers = (b for b in self._live("model_worker", model, now) if isinstance(b, WorkerHeartbeat))
        return max(map(longest, workers), default=None)

    def unable(self, request: Request, now: float) -> str:
        """A stage that would not honour all that the request says, being of an older version; "" if there is none. Any scheduler and
        detokenizer may get a request, and of the workers one that is able to."""
        for stage, needed, enough in (
            ("scheduler", needed_of_schedulers, all),
            ("model_worker", needed_of_workers, any),
            ("detokenizer", needed_of_detokenizers, all),
        ):
            live = [base_of(beat) for beat in self._live(stage, request.model, now)]
            if all(knows(base, KNOWN) for base in live):
                continue  # the usual case: what the request needs is not looked at
            fields = needed(request)
            if not enough(knows(base, fields) for base in live):
                return stage
        return ""

    def waiting(self, model: str, now: float) -> int:
        """Requests that schedulers hold without a worker."""
        return sum(int(base_of(beat).detail.get("waiting", 0)) for beat in self._live("scheduler", model, now))
