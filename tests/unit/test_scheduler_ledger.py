"""The ledger: own writes and the watch's echo of them in any order."""

from __future__ import annotations

import itertools
from typing import Any

from services.scheduler.ledger import REMEMBER_ENDED, Ledger
from services.scheduler.recovery import DEATHS, diagnose, moved_because, stale_runs
from shared.messages import Assignment, Tombstone
from tests.unit.test_scheduler_fleet import beat, ready


def assigned(worker: str = "w", epoch: int = 1, seq: int = 1, **rest: Any) -> Assignment:
    return Assignment(seq, epoch, worker, b"h", **rest)


def tombstone(epoch: int = 1) -> Tombstone:
    return Tombstone(1, epoch, "finished", b"h", 5)


def test_the_order_in_which_changes_come_does_not_matter() -> None:
    changes = [(1, assigned("a")), (2, assigned("", 2)), (3, assigned("b", 2)), (4, tombstone(2))]
    for count in range(1, 5):
        for order in itertools.permutations(changes[:count]):
            ledger = Ledger()
            for revision, value in order + order:
                ledger.apply("t.x", value, revision, 0.0)
            newest = changes[count - 1][1]
            if isinstance(newest, Tombstone):
                assert not ledger.live and ledger.ended_epoch("t.x") == 2
            else:
                assert ledger.live["t.x"].assignment == newest
                assert ledger.on_worker(newest.worker) == ["t.x"] and ledger.sequences_on(newest.worker) == 1
            assert sum(ledger.sequences_on(w) for w in ("a", "b", "")) == len(ledger.live)


def test_an_end_is_told_once_and_only_of_what_lived() -> None:
    ledger = Ledger()
    assert ledger.apply("t.x", assigned(choices=3), 1, 0.0) is None
    assert ledger.sequences_on("w") == 3
    ended = ledger.apply("t.x", tombstone(), 2, 0.0)
    assert ended is not None and ended.assignment.worker == "w"
    assert ledger.apply("t.x", tombstone(), 2, 0.0) is None
    assert ledger.apply("t.y", tombstone(), 3, 0.0) is None
    assert ledger.sequences_on("w") == 0 and ledger.on_worker("w") == []
    ledger.apply("t.x", None, 4, 0.0)
    assert ledger.ended_epoch("t.x") is None


def test_what_ended_is_remembered_within_bounds() -> None:
    ledger = Ledger()
    for number in range(REMEMBER_ENDED + 1):
        ledger.apply(f"t.{number}", tombstone(), number + 1, 0.0)
    assert [ledger.ended_epoch(f"t.{number}") for number in (0, 1, REMEMBER_ENDED)] == [None, 1, 1]


def test_the_oldest_prompt_that_is_needed() -> None:
    ledger = Ledger()
    assert ledger.oldest() is None
    ledger.apply("t.x", assigned(seq=7), 1, 0.0)
    ledger.apply("t.y", assigned(seq=5), 2, 0.0)
    assert ledger.oldest() == 5


def test_stale_runs() -> None:
    ledger = Ledger()
    ledger.apply("t.fenced", assigned("", 3), 1, 0.0)
    ledger.apply("t.moved", assigned("other", 2), 2, 0.0)
    ledger.apply("t.mine", assigned("w", 2), 3, 0.0)
    ledger.apply("t.ended", tombstone(), 4, 0.0)
    running = {"t.fenced": 2, "t.moved": 2, "t.mine": 2, "t.ended": 1, "t.news": 1}
    assert stale_runs(running, "w", ledger) == [("t.fenced", 2), ("t.moved", 2), ("t.ended", 1)]
    assert stale_runs({"t.mine": 3}, "w", ledger) == [], "the ledger is behind"


def test_diagnosis() -> None:
    clock, ledger = ready(), Ledger()
    fleet, start = clock.fleet, clock.fleet.link.proven
    for revision, (key, worker) in enumerate(
        [("t.ok", "a"), ("t.mute", "a"), ("t.gone", "z"), ("t.stuck", ""), ("t.drained", "b"), ("t.ended", "a")], 1
    ):
        ledger.apply(key, assigned(worker), revision, start)

    def problems(**ended: int) -> dict[str, str | None]:
        fleet.heard(beat("a", running={"t.ok": 1, "t.mute": 9} | {f"t.{key}": epoch for key, epoch in ended.items()}))
        fleet.heard(beat("b", draining=True))
        graces = dict(report_grace=1.0, finish_grace=4.0, stuck_grace=3.0)
        return {key: diagnose(live, fleet, **graces) for key, live in ledger.live.items()}

    nothing = dict.fromkeys(ledger.live)
    assert problems(ended=1) == nothing | {"t.drained": "draining"}
    clock.run(1.2, "a", "b")
    assert problems() == nothing | {"t.drained": "draining", "t.mute": "unreported", "t.gone": "missing"}
    clock.run(9, echo=False)
    assert problems()["t.stuck"] is None, "time that our link does not prove does not count"
    clock.run(5, "a", "b")
    assert problems()["t.stuck"] == "stuck"
    assert problems()["t.ended"] == "unreported", "in the end: its tombstone should have come long ago"


def test_a_step_that_hung_already_is_nobody_elses_doing() -> None:
    ledger = Ledger()
    ledger.apply("t.x", assigned("w", 2), 1, 0.0)
    live = ledger.live["t.x"]
    for running, behind, reason in (
        ({"t.x": 2}, (), "hung"),
        ({"t.x": 2}, ("t.x",), "behind"),
        ({"t.x": 1}, (), "behind"),  # its order came after the heartbeat, or has yet to come
        ({}, (), "behind"),
    ):
        assert moved_because("hung", live, beat("w", running=running, behind=behind)) == reason
        assert moved_because("lost", live, beat("w", running=running, behind=behind)) == "lost"
    assert "behind" not in DEATHS and "hung" in DEATHS


def test_a_suspect_that_came_through_steps_is_not_blamed_for_a_slow_log() -> None:
    ledger = Ledger()
    ledger.apply("t.x", assigned("w", 2), 1, 0.0)
    live = ledger.live["t.x"]
    for verdict in DEATHS:
        for running, suspects, counts in (
            ({"t.x": 2}, (), False),
            ({"t.x": 1}, (), True),  # it was another epoch that came through
            ({"t.x": 2}, ("t.x",), True),  # its last step raised, says the worker
        ):
            told = beat("w", running=running, cleared=("t.x",), suspects=suspects)
            reason = moved_because(verdict, live, told)
            assert (reason in DEATHS) == counts or (reason == "behind" and verdict == "hung")


def test_sequences_of_tenants_are_counted_while_workers_have_them() -> None:
    ledger = Ledger()
    ledger.apply("a.1", Assignment(1, 1, "w", b"", choices=2), 1, 0.0)
    ledger.apply("b.1", Assignment(2, 1, "w", b""), 2, 0.0)
    assert ledger.tenants() == {"a": 2, "b": 1}
    ledger.apply("a.1", Assignment(1, 2, "", b"", choices=2), 3, 0.0)
    assert ledger.tenants() == {"b": 1}, "it waits for another worker"
    ledger.apply("b.1", None, 4, 0.0)
    assert ledger.tenants() == {}
