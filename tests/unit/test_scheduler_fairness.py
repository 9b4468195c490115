"""Turns: tokens served are shared by weight, whoever floods."""

from __future__ import annotations

import random
from collections import Counter

from services.scheduler import fairness
from services.scheduler.fairness import PRESENT, FairQueue, Shares


def serve(queue: FairQueue[str], count: int, output: int = 100) -> Counter[str]:
    """Serves `count` requests of 10 prompt tokens; returns how many each tenant got."""
    served: Counter[str] = Counter()
    for _ in range(count):
        tenant, _ = queue.candidates()[0]
        queue.pop(tenant)
        queue.correct(queue.charge(tenant, 10, 1000), output)
        served[tenant] += 1
    return served


def test_one_that_floods_waits_for_itself() -> None:
    queue: FairQueue[str] = FairQueue()
    for i in range(1000):
        queue.put("flood", 0, f"f{i}")
    serve(queue, 50)
    for i in range(20):
        queue.put("calm", 0, f"c{i}")
    served = serve(queue, 40)
    assert abs(served["calm"] - served["flood"]) <= 1


def test_weights() -> None:
    queue: FairQueue[str] = FairQueue({"gold": 3.0})
    for i in range(400):
        queue.put("gold", 0, f"g{i}")
        queue.put("iron", 0, f"i{i}")
    served = serve(queue, 400)
    assert 2.7 < served["gold"] / served["iron"] < 3.3


def test_nobody_saves_up_by_being_idle() -> None:
    """Neither while others wait, nor while just nobody does: the queue was empty for a moment when the newcomer came."""
    queue: FairQueue[str] = FairQueue()
    queue.put("new", 0, "n")
    serve(queue, 1)
    for i in range(200):
        queue.put("busy", 0, f"b{i}")
        serve(queue, 1)
    for i in range(100):
        queue.put("new", 0, f"n{i}")
        queue.put("busy", 0, f"b{i}")
    served = serve(queue, 40)
    assert abs(served["new"] - served["busy"]) <= 3


def test_priority_then_order_within_a_tenant() -> None:
    queue: FairQueue[str] = FairQueue()
    for name, priority in (("late", -1), ("first", 0), ("second", 0), ("urgent", 5)):
        queue.put("t", priority, name)
    assert [queue.pop("t") for _ in range(4)] == ["urgent", "first", "second", "late"]


def test_a_refund_takes_back_what_was_charged() -> None:
    queue: FairQueue[str] = FairQueue({"t": 2.0})
    before = queue.charge("t", 10, 50)
    count = queue.counters()["t"]
    queue.refund(queue.charge("t", 999, 7))
    assert queue.counters()["t"] == count
    queue.correct(before, 50)
    assert queue.counters()["t"] == (fairness.INPUT_COST * 10 + fairness.OUTPUT_COST * 50) / 2


def test_long_answers_are_expected_of_those_who_had_them() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(50):
        queue.correct(queue.charge("t", 1, 10_000), 5000)
    assert queue.charge("t", 1, 10_000).output_tokens > 4500
    assert queue.charge("t", 1, 7).output_tokens == 7


def test_removal_keeps_the_order() -> None:
    queue: FairQueue[str] = FairQueue()
    names = [f"r{i}" for i in range(50)]
    for name in names:
        queue.put("t", 0, name)
    gone = set(random.Random(1).sample(names, 20))
    for name in sorted(gone):
        queue.remove("t", name)
    assert len(queue) == 30
    assert [queue.pop("t") for _ in range(30)] == [name for name in names if name not in gone]
    assert queue.candidates() == [] and queue.waiting("t") == queue.waiting("unknown") == 0


def test_made_up_tenants_are_forgotten() -> None:
    queue: FairQueue[str] = FairQueue()
    for i in range(fairness.REMEMBERED_TENANTS * 2):
        queue.put(f"t{i}", 0, "x")
        serve(queue, 1)
    assert len(queue.counters()) <= fairness.REMEMBERED_TENANTS + 1


def test_who_is_alone_may_have_everything() -> None:
    shares = Shares()
    shares.seen("a", 0.0)
    assert not shares.has_its_share("a", 64, 64, ["a"])
    shares.seen("b", 1.0)
    assert shares.has_its_share("a", 32, 64, ["a"])
    assert not shares.has_its_share("a", 31, 64, ["a"])
    assert not shares.has_its_share("b", 0, 64, ["a"])


def test_shares_go_by_weight_and_by_who_is_present() -> None:
    shares = Shares({"gold": 3.0})
    shares.seen("gold", 0.0)
    shares.seen("iron", 0.0)
    assert not shares.has_its_share("gold", 47, 64, ["gold"])
    assert shares.has_its_share("gold", 48, 64, ["gold"])
    assert shares.has_its_share("iron", 16, 64, ["iron"])
    shares.seen("gold", PRESENT + 1.0)
    assert not shares.has_its_share("gold", 64, 64, ["gold"]), "iron has long been away"
    assert shares.has_its_share("gold", 48, 64, ["gold", "iron"]), "it has a sequence that runs"


def test_among_many_tenants_nobody_keeps_places_free_that_floods_nobody() -> None:
    shares = Shares()
    for number in range(100):
        shares.seen(f"t{number}", 0.0)
    assert not shares.has_its_share("t0", 15, 64, ["t0"])
    assert shares.has_its_share("t0", 16, 64, ["t0"])
