"""Liveness: silence counts only as far as our own link has proven to work."""

from __future__ import annotations

from typing import Any

from services.scheduler.fleet import LONGEST_BLACKOUT, Fleet, Link
from shared.messages import Heartbeat, WorkerHeartbeat

INTERVAL, GRACE, SILENCE = 0.1, 1.5, 0.45


def beat(instance: str = "w", **changes: Any) -> WorkerHeartbeat:
    base = Heartbeat("model_worker", "m", instance, 1, INTERVAL, draining=changes.pop("draining", False))
    figures = dict(
        step=1, step_age=0.0, step_bound=1.0, running={}, max_seqs=4, kv_tokens_total=100, kv_tokens_free=100
    )
    return WorkerHeartbeat(base, **(figures | dict(max_model_len=100, vocab_size=9) | changes))


class Clock:
    """Echoes of our own heartbeats, and those of the workers that are alive."""

    def __init__(self) -> None:
        self.now = 0.0
        self.fleet = Fleet(Link(INTERVAL, GRACE), SILENCE, 1.5)

    def run(self, seconds: float, *alive: str, echo: bool = True) -> set[str]:
        """Returns who was judged to be lost on the way."""
        lost: set[str] = set()
        for _ in range(round(seconds / INTERVAL)):
            self.now += INTERVAL
            for name in alive:
                self.fleet.heard(beat(name))
            if echo:
                self.fleet.link.echoed(self.now)
            lost |= {name for name, verdict in self.fleet.judge().items() if verdict == "lost"}
        return lost


def ready() -> Clock:
    clock = Clock()
    assert clock.run(3, "a", "b") == set()
    return clock


def test_a_silent_worker_is_lost_soon_and_not_sooner() -> None:
    clock = ready()
    assert clock.run(0.3, "a") == set()
    assert clock.run(0.2, "a") == {"b"}


def test_nobody_is_lost_before_our_own_link_is_proven() -> None:
    clock = Clock()
    clock.fleet.heard(beat("a"))
    assert clock.run(GRACE, echo=True) == set()
    assert clock.run(10, echo=False) == set()


def test_a_standstill_of_nats_proves_nothing_whatever_its_length() -> None:
    """The last beats before it, and the first after it, may come in any order: our echo last or first."""
    for stall in (0.2, 0.3, 0.4, 0.6, 1.0, 1.4, 2.0, 6.0):
        clock = ready()
        clock.now += INTERVAL
        clock.fleet.link.echoed(clock.now)  # the workers' beats of this round did not come through any more
        clock.now += stall
        clock.fleet.link.echoed(clock.now)
        assert clock.fleet.judge() == {}, f"after {stall} s"
        assert clock.run(1, "a", "b") == set()
        assert clock.run(GRACE + 1, "a") == {"b"}, "afterwards the dead are found again"


def test_all_workers_silent_at_once_are_not_lost_until_one_is_back() -> None:
    clock = ready()
    assert clock.run(5) == set()
    assert clock.run(0.2, "a") == set(), "the others get the same time to come back"
    assert clock.run(0.5, "a") == {"b"}


def test_when_all_died_a_new_one_proves_it() -> None:
    clock = ready()
    assert clock.run(5) == set()
    assert clock.run(0.5, "c") == {"a", "b"}


def test_when_all_stay_silent_they_are_lost_in_the_end() -> None:
    clock = ready()
    assert clock.run(LONGEST_BLACKOUT - 0.2) == set()
    assert clock.run(0.4) == {"a", "b"}


def test_the_only_worker_is_lost_when_silent() -> None:
    clock = Clock()
    clock.run(3, "a")
    assert clock.run(0.5) == {"a"}


def test_beats_more_seldom_than_the_silence_are_no_silence() -> None:
    fleet = Fleet(Link(1.0, GRACE), SILENCE, 1.5)
    slow = beat("a")
    slow = slow._replace(base=slow.base._replace(interval=1.0))
    for second in range(10):
        fleet.heard(slow)
        fleet.link.echoed(float(second))
        assert fleet.judge() == {}
    for second in range(10, 14):
        fleet.link.echoed(float(second))
    assert fleet.judge() == {"a": "lost"}


def test_progress_not_pings() -> None:
    fleet = Fleet(Link(INTERVAL, GRACE), SILENCE, 1.5)
    fleet.heard(beat("prefills", step_age=50.0, step_bound=60.0))
    fleet.heard(beat("hangs", step_age=2.0, step_bound=1.0))
    fleet.heard(beat("died", suspects=("t.a",)))
    fleet.heard(beat("drains", draining=True))
    assert fleet.judge() == {"hangs": "hung", "died": "died"}
    assert [w.instance for w in fleet.available(fleet.able({}))] == ["prefills"]


def test_a_worker_that_refuses_is_asked_ever_more_seldom() -> None:
    fleet = Fleet(Link(INTERVAL, GRACE), SILENCE, 1.5)
    fleet.heard(beat("a"))
    fleet.answered("unknown", accepted=False)
    closures = []
    for _ in range(6):
        fleet.answered("a", accepted=False)
        closures.append(0)
        while not fleet.available(fleet.able({})):
            fleet.heard(beat("a"))
            closures[-1] += 1
    assert closures == [2, 4, 8, 16, 16, 16]
    fleet.answered("a", accepted=True)
    fleet.answered("a", accepted=False)
    fleet.heard(beat("a"))
    fleet.heard(beat("a"))
    assert [w.instance for w in fleet.available(fleet.able({}))] == ["a"]


def test_too_long_for_some_workers() -> None:
    fleet = Fleet(Link(INTERVAL, GRACE), SILENCE, 1.5)
    fleet.heard(beat("short", max_model_len=10))
    fleet.heard(beat("long", max_model_len=100))
    assert [w.instance for w in fleet.available(fleet.able({}), lambda b: b.max_model_len >= 50)] == ["long"]
    fleet.answered("long", accepted=False)
    assert fleet.available(fleet.able({}), lambda b: b.max_model_len >= 50) == [], "it waits for the one that can"
    assert [w.instance for w in fleet.available(fleet.able({}), lambda b: b.max_model_len >= 500)] == ["short"], (
        "which says that it cannot"
    )


def test_peers() -> None:
    clock = ready()
    clock.fleet.heard_peer("x", draining=False)
    clock.fleet.heard_peer("y", draining=False)
    assert clock.fleet.live_peers() == ["x", "y"]
    clock.fleet.heard_peer("y", draining=True)
    assert clock.fleet.live_peers() == ["x"]
    clock.run(1, "a", "b")
    assert clock.fleet.live_peers() == []
