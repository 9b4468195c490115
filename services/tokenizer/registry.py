"""What the heartbeats of others say: which models are served, how long a sequence may be, how many requests wait."""

from __future__ import annotations

from enum import Enum

from shared.capabilities import KNOWN, knows, needed_of_detokenizers, needed_of_schedulers, needed_of_workers
from shared.messages import Heartbeat, Request, WorkerHeartbeat
from shared.presence import base_of

# Seconds of silence after which a stage counts as gone, at least so many of its beats.
_SILENCE, _MISSED_BEATS = 1.0, 5
# Seconds for which a model is remembered whose stages are all gone: they may be restarting.
_MEMORY = 600.0


class Presence(Enum):
    SERVED = "served"
    ABSENT = "absent"  # was there not long ago
    UNKNOWN = "unknown"


class Registry:
    """`now` is always the loop's time, in seconds."""

    def __init__(self) -> None:
        self._beats: dict[str, tuple[Heartbeat | WorkerHeartbeat, float]] = {}
        self._models: dict[str, float] = {}

    def hear(self, beat: Heartbeat | WorkerHeartbeat, now: float) -> None:
        base = base_of(beat)
        if base.stage == "tokenizer":
            self._models[base.model] = now
        if not base.draining:  # one that drains serves on until its last ordinary beat is stale
            self._beats[base.instance] = beat, now

    def _live(self, stage: str, model: str, now: float) -> list[Heartbeat | WorkerHeartbeat]:
        def is_live(base: Heartbeat, heard: float) -> bool:
            return now - heard < max(_SILENCE, _MISSED_BEATS * base.interval)

        return [
            beat
            for beat, heard in self._beats.values()
            if (base := base_of(beat)).stage == stage and base.model == model and is_live(base, heard)
        ]

    def presence(self, model: str, now: float) -> Presence:
        if self._live("tokenizer", model, now):
            return Presence.SERVED
        return Presence.ABSENT if now - self._models.get(model, -_MEMORY) < _MEMORY else Presence.UNKNOWN

    def context(self, model: str, now: float) -> int | None:
        """The longest sequence that some live worker takes; None if none is known."""
        return max(
            (
                min(beat.max_model_len, beat.kv_tokens_total)
                for beat in self._live("model_worker", model, now)
                if isinstance(beat, WorkerHeartbeat)
            ),
            default=None,
        )

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

    def forget_old(self, now: float) -> None:
        self._beats = {name: (beat, heard) for name, (beat, heard) in self._beats.items() if now - heard < _MEMORY}
        self._models = {model: heard for model, heard in self._models.items() if now - heard < _MEMORY}
