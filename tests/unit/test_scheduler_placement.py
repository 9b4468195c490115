"""Where a request goes: room, cached prefixes, balance, suspects apart."""

from __future__ import annotations

import tracemalloc
from array import array

from services.scheduler.fleet import Worker
from services.scheduler.ledger import Ledger
from services.scheduler.placement import Need, PrefixIndex, choose, prefix_chunks
from shared.messages import Assignment
from tests.unit.test_scheduler_fleet import beat


def prompt(*parts: int, tokens: int = 64) -> bytes:
    return b"".join(array("i", [part] * tokens).tobytes() for part in parts)


def fill(ledger: Ledger, worker: str, count: int, suspect: int = 0) -> None:
    for _ in range(count):
        key = f"t.{worker}{len(ledger.live)}"
        ledger.apply(key, Assignment(1, 1, worker, b"", suspect), len(ledger.live) + 1, 0.0)


def workers(*names: str, max_seqs: int = 8, free: int = 10_000) -> list[Worker]:
    return [Worker(name, beat(name, max_seqs=max_seqs, kv_tokens_free=free), 0.0) for name in names]


SMALL = Need(10)


def place(
    seats: list[Worker], ledger: Ledger, need: Need = SMALL, index: PrefixIndex | None = None, ids: bytes = b""
) -> str | None:
    chosen = choose(seats, ledger, index or PrefixIndex(), need, prefix_chunks(ids))
    return chosen.instance if chosen is not None else None


def test_chunks_are_equal_exactly_as_far_as_the_prompts_are() -> None:
    a, b = prefix_chunks(prompt(1, 2, 3, 4)), prefix_chunks(prompt(1, 2, 9, 4))
    assert a[:2] == b[:2] and a[2] != b[2] and a[3] != b[3]
    assert prefix_chunks(prompt(1, tokens=63)) == []
    assert len(prefix_chunks(prompt(*range(100)))) == 64


def test_the_least_loaded_gets_it() -> None:
    ledger = Ledger()
    fill(ledger, "a", 3)
    fill(ledger, "b", 2)
    assert place(workers("a", "b"), ledger) == "b"


def test_a_cached_prefix_wins_unless_it_costs_balance() -> None:
    ledger, index, ids = Ledger(), PrefixIndex(), prompt(1, 2, 3)
    index.placed("a", prefix_chunks(ids))
    fill(ledger, "a", 2)
    assert place(workers("a", "b"), ledger, index=index, ids=ids) == "a"
    fill(ledger, "a", 1)
    assert place(workers("a", "b"), ledger, index=index, ids=ids) == "b"
    index.forget("a")
    assert index.overlap("a", prefix_chunks(ids)) == 0


def test_what_a_worker_was_given_takes_the_same_memory_however_much_it_is() -> None:
    index = PrefixIndex()
    index.placed("a", prefix_chunks(prompt(1, 2, 3)))
    tracemalloc.start()
    try:
        for number in range(3000):
            index.placed("a", [hash((number, i)) % 2**64 for i in range(64)])
        grown, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert grown < 10_000
    assert index.overlap("a", prefix_chunks(prompt(1, 2, 3))) < 3, "old ones have lost their places"


def test_the_last_chunk_that_is_known_stands_for_those_before_it() -> None:
    index, chunks = PrefixIndex(), prefix_chunks(prompt(1, 2, 3, 4))
    index.placed("a", chunks[:3])
    index.placed("a", [chunks[0] ^ 1 << 40])
    assert index.overlap("a", chunks) == 3
    assert index.overlap("b", chunks) == 0


def test_a_full_worker_gets_nothing() -> None:
    ledger = Ledger()
    fill(ledger, "a", 8)
    assert place(workers("a"), ledger) == "a", "one more than it has slots, so that a free one is filled at once"
    fill(ledger, "a", 1)
    assert place(workers("a"), ledger) is None


def test_places_are_kept_free_for_others() -> None:
    ledger = Ledger()
    fill(ledger, "a", 6)
    assert choose(workers("a"), ledger, PrefixIndex(), Need(10), [], keep_free=True) is not None
    fill(ledger, "a", 1)
    assert choose(workers("a"), ledger, PrefixIndex(), Need(10), [], keep_free=True) is None, "the last of eight"
    assert place(workers("a"), ledger) == "a"


def test_choices_are_sequences() -> None:
    ledger = Ledger()
    fill(ledger, "a", 6)
    assert place(workers("a"), ledger, Need(10, choices=3)) == "a"
    assert place(workers("a"), ledger, Need(10, choices=4)) is None
    assert place(workers("b"), Ledger(), Need(10, choices=99)) == "b", "the worker itself says that this is too much"


def test_reservations_count() -> None:
    (worker,) = workers("a")
    worker.reserved = 9
    assert place([worker], Ledger()) is None


def test_the_cache_must_have_room_unless_the_worker_is_empty() -> None:
    ledger = Ledger()
    seats = workers("a", free=100)
    assert place(seats, ledger, Need(1000)) == "a"
    fill(ledger, "a", 1)
    assert place(seats, ledger, Need(101)) is None
    assert place(seats, ledger, Need(100)) == "a"
    seats[0].reserved_tokens = 50
    assert place(seats, ledger, Need(100)) is None


def test_one_suspect_a_worker_until_it_is_acquitted() -> None:
    ledger, suspect = Ledger(), Need(10, isolated=True)
    fill(ledger, "a", 1, suspect=2)
    (key,) = ledger.live
    (seat,) = workers("a")
    assert place([seat], ledger, suspect) is None, "the order may be on its way"
    assert place([seat], ledger) == "a", "others just pause meanwhile"
    seat.beat = seat.beat._replace(running={key: 1}, isolated=(key,))
    assert place([seat], ledger, suspect) is None
    seat.beat = seat.beat._replace(isolated=())
    assert place([seat], ledger, suspect) == "a"
    seat.isolated_reserved = 1
    assert place([seat], ledger, suspect) is None
