"""What the heartbeats say: who is there, and which models are served."""

from __future__ import annotations

from typing import Any, NamedTuple

from shared.messages import Heartbeat, WorkerHeartbeat
from shared.presence import base_of

# Seconds of silence after which a stage counts as gone, at least so many of its beats.
SILENCE, MISSED_BEATS = 1.0, 5
# Seconds for which a model is remembered whose stages are all gone: they may be restarting.
MEMORY = 600.0
# Stages that a request of a model needs.
NEEDED = frozenset({"tokenizer", "scheduler", "model_worker", "detokenizer"})


class Model(NamedTuple):
    """`since` is the loop's time at which it was first heard of; `context` the longest sequence that some live worker takes."""

    name: str
    since: float
    stages: frozenset[str]
    context: int | None

    @property
    def ready(self) -> bool:
        return not self.missing

    @property
    def missing(self) -> frozenset[str]:
        """Stages that nobody runs at the moment."""
        return NEEDED - self.stages


class Fleet:
    """`now` is always the loop's time, in seconds."""

    def __init__(self) -> None:
        self._beats: dict[str, tuple[Heartbeat | WorkerHeartbeat, float]] = {}
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}

    def hear(self, beat: Heartbeat | WorkerHeartbeat, now: float) -> None:
        base = base_of(beat)
        self._beats[base.instance] = beat, now
        if base.stage == "tokenizer":
            self._first.setdefault(base.model, now)
            self._last[base.model] = now

    def live(self, now: float) -> list[Heartbeat | WorkerHeartbeat]:
        return [
            beat
            for beat, heard in self._beats.values()
            if now - heard < max(SILENCE, MISSED_BEATS * base_of(beat).interval)
        ]

    def models(self, now: float) -> dict[str, Model]:
        """Those that a tokenizer serves now, by name."""
        stages: dict[str, set[str]] = {}
        contexts: dict[str, int] = {}
        for beat in self.live(now):
            base = base_of(beat)
            stages.setdefault(base.model, set()).add(base.stage)
            if isinstance(beat, WorkerHeartbeat):
                longest = min(beat.max_model_len, beat.kv_tokens_total)
                contexts[base.model] = max(contexts.get(base.model, 0), longest)
        return {
            name: Model(name, self._first[name], frozenset(there), contexts.get(name))
            for name, there in sorted(stages.items())
            if "tokenizer" in there
        }

    def remembers(self, model: str, now: float) -> bool:
        """Whether the model was served not long ago."""
        return now - self._last.get(model, -MEMORY) < MEMORY

    def forget_old(self, now: float) -> None:
        self._beats = {name: (beat, heard) for name, (beat, heard) in self._beats.items() if now - heard < MEMORY}
        for model in [m for m, heard in self._last.items() if now - heard >= MEMORY]:
            del self._last[model], self._first[model]

    def picture(self, now: float) -> list[dict[str, Any]]:
        """One row an instance, for the web page."""
        rows = []
        for beat in self.live(now):
            base = base_of(beat)
            row: dict[str, Any] = dict(
                stage=base.stage,
                model=base.model,
                instance=base.instance,
                load=round(base.load, 3),
                in_flight=base.in_flight,
                draining=base.draining,
                detail={k: v for k, v in base.detail.items() if isinstance(v, (int, float, str))},
            )
            if isinstance(beat, WorkerHeartbeat):
                row |= dict(
                    step=beat.step,
                    running=len(beat.running),
                    max_seqs=beat.max_seqs,
                    kv_used=beat.kv_tokens_total - beat.kv_tokens_free,
                    kv_total=beat.kv_tokens_total,
                )
            rows.append(row)
        return sorted(rows, key=lambda row: (row["model"], row["stage"], row["instance"]))
