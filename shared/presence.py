"""Who is there: what heartbeats tell, and one question to every stage of a deployment (`gorgon ps`, health checks, tests that wait
for readiness)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from shared import codec, subjects
from shared.bus import Bus, Message
from shared.messages import Heartbeat, WorkerHeartbeat


def base_of(beat: Heartbeat | WorkerHeartbeat) -> Heartbeat:
    return beat.base if isinstance(beat, WorkerHeartbeat) else beat


# Seconds of silence after which a process counts as gone, at least so many of its beats.
SILENCE, MISSED_BEATS = 1.0, 5
# Seconds for which a model is remembered whose stages are all gone: they may be restarting.
MEMORY = 600.0


def longest(beat: WorkerHeartbeat) -> int:
    """The longest sequence that the worker takes, in tokens."""
    return min(beat.max_model_len, beat.kv_tokens_total)


def is_fresh(base: Heartbeat, heard: float, now: float) -> bool:
    return now - heard < max(SILENCE, MISSED_BEATS * base.interval)


class Heard:
    """What heartbeats have told lately. `now` is always the loop's time, in seconds."""

    def __init__(self) -> None:
        self._beats: dict[str, tuple[Heartbeat | WorkerHeartbeat, float]] = {}
        self._served: dict[str, tuple[float, float]] = {}  # when a tokenizer of the model was heard first, and last

    def hear(self, beat: Heartbeat | WorkerHeartbeat, now: float) -> None:
        base = base_of(beat)
        self._beats[base.instance] = beat, now
        if base.stage == "tokenizer":
            self._served[base.model] = self._served.get(base.model, (now, now))[0], now

    def live(self, now: float) -> list[Heartbeat | WorkerHeartbeat]:
        return [beat for beat, heard in self._beats.values() if is_fresh(base_of(beat), heard, now)]

    def remembers(self, model: str, now: float) -> bool:
        """Whether the model was served not long ago."""
        return model in self._served and now - self._served[model][1] < MEMORY

    def forget_old(self, now: float) -> None:
        self._beats = {name: (beat, heard) for name, (beat, heard) in self._beats.items() if now - heard < MEMORY}
        self._served = {model: times for model, times in self._served.items() if now - times[1] < MEMORY}


async def gather(
    bus: Bus, wait: float = 0.5, enough: Callable[[list[Heartbeat | WorkerHeartbeat]], bool] | None = None
) -> list[Heartbeat | WorkerHeartbeat]:
    """The heartbeat of every stage that answers within `wait` seconds, or until `enough` says so."""
    beats: list[Heartbeat | WorkerHeartbeat] = []
    done = asyncio.Event()

    def on_reply(message: Message) -> None:
        if not message.data:
            done.set()  # NATS's "no responders"
            return
        beats.append(codec.decode(message.data))
        if enough is not None and enough(beats):
            done.set()

    inbox = bus.new_inbox()
    subscription = await bus.subscribe(inbox, on_reply)
    try:
        bus.publish(subjects.PS, b"", reply=inbox)
        await asyncio.wait_for(done.wait(), wait)
    except TimeoutError:
        pass
    finally:
        await subscription.unsubscribe()
    return beats


async def wait_for_stages(bus: Bus, wanted: dict[str, int], model: str, wait: float) -> None:
    """Returns once at least `wanted[stage]` ready instances of each stage serve `model`. Raises TimeoutError that names what is
    missing."""
    deadline = asyncio.get_running_loop().time() + wait
    missing: dict[str, int] = dict(wanted)

    def complete(beats: list[Heartbeat | WorkerHeartbeat]) -> bool:
        nonlocal missing
        counts: dict[str, int] = {}
        for base in map(base_of, beats):
            if base.model == model and not base.draining:
                counts[base.stage] = counts.get(base.stage, 0) + 1
        missing = {stage: n - counts.get(stage, 0) for stage, n in wanted.items() if counts.get(stage, 0) < n}
        return not missing

    while True:
        await gather(bus, 0.2, complete)
        if not missing:
            return
        if asyncio.get_running_loop().time() > deadline:
            raise TimeoutError(f"after {wait:.0f} s these stages are missing: {missing}")
        await asyncio.sleep(0.05)
