"""What the heartbeats say: who is there, and which models are served."""

from __future__ import annotations

from typing import Any, NamedTuple

from shared.messages import WorkerHeartbeat
from shared.presence import Heard, base_of, longest

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


class Fleet(Heard):
    def models(self, now: float) -> dict[str, Model]:
        """Those that a tokenizer serves now, by name."""
        stages: dict[str, set[str]] = {}
        contexts: dict[str, int] = {}
        for beat in self.live(now):
            base = base_of(beat)
            stages.setdefault(base.model, set()).add(base.stage)
            if isinstance(beat, WorkerHeartbeat):
                contexts[base.model] = max(contexts.get(base.model, 0), longest(beat))
        return {
            name: Model(name, self._served[name][0], frozenset(there), contexts.get(name))
            for name, there in sorted(stages.items())
            if "tokenizer" in there
        }

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
