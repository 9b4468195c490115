from services.tokenizer.registry import Presence, Registry
from shared.messages import Heartbeat, WorkerHeartbeat


def beat(stage: str, instance: str, model: str = "m", draining: bool = False, **detail: int) -> Heartbeat:
    return Heartbeat(stage, model, instance, 1, 0.1, draining, detail=detail)


def worker(instance: str, max_model_len: int, kv_tokens: int) -> WorkerHeartbeat:
    return WorkerHeartbeat(beat("model_worker", instance), 0, 0.0, 1.0, {}, 8, kv_tokens, kv_tokens, max_model_len, 100)


def test_presence():
    registry = Registry()
    assert registry.presence("m", 0.0) is Presence.UNKNOWN
    registry.hear(beat("scheduler", "s"), 10.0)
    assert registry.presence("m", 10.0) is Presence.UNKNOWN
    registry.hear(beat("tokenizer", "a"), 10.0)
    assert registry.presence("m", 10.9) is Presence.SERVED
    assert registry.presence("m", 11.1) is Presence.ABSENT
    registry.hear(beat("tokenizer", "a"), 12.0)
    registry.hear(beat("tokenizer", "a", draining=True), 12.9)
    assert registry.presence("m", 12.95) is Presence.SERVED
    assert registry.presence("m", 13.1) is Presence.ABSENT
    registry.forget_old(1000.0)
    assert registry.presence("m", 1000.0) is Presence.UNKNOWN


def test_slow_beats_take_longer_to_be_missed():
    registry = Registry()
    registry.hear(beat("tokenizer", "a")._replace(interval=2.0), 0.0)
    assert registry.presence("m", 9.9) is Presence.SERVED
    assert registry.presence("m", 10.1) is Presence.ABSENT


def test_figures_of_the_living():
    registry = Registry()
    assert (registry.context("m", 0.0), registry.waiting("m", 0.0)) == (None, 0)
    registry.hear(worker("w1", 512, 4096), 0.0)
    registry.hear(worker("w2", 8192, 2048), 0.5)
    registry.hear(beat("scheduler", "s1", waiting=3), 0.5)
    registry.hear(beat("scheduler", "s2", waiting=4), 0.5)
    registry.hear(beat("scheduler", "s3", model="other", waiting=100), 0.5)
    assert (registry.context("m", 0.6), registry.waiting("m", 0.6)) == (2048, 7)
    registry.hear(worker("w1", 512, 4096), 1.5)
    assert (registry.context("m", 1.6), registry.waiting("m", 1.6)) == (512, 0)
