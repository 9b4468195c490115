"""The fold: a seeded simulation, and for each of its rules the proof that the simulation needs it."""

from __future__ import annotations

import os

import msgpack
import pytest

from shared import codec
from shared import messages as m
from shared.tokenlog import Committed, Effect, Ended, PartitionFold, RequestState
from tests.protocol.fold_simulation import Broken, Simulation

SEEDS = int(os.environ.get("GORGON_FOLD_SEEDS", "1500"))


def test_no_seed_breaks_the_fold() -> None:
    for seed in range(SEEDS):
        try:
            Simulation(seed).simulate()
        except Broken as broken:
            pytest.fail(f"seed {seed}: {broken}")


class AsksForEach(PartitionFold):
    @staticmethod
    def _usual(request: RequestState, tokens: m.Tokens, effects: list[Effect]) -> bool:
        return False


def test_the_usual_entry_has_the_effects_that_the_rules_give_it() -> None:
    for seed in range(200):
        simulation = Simulation(seed)
        simulation.simulate()
        fold, asking = PartitionFold(), AsksForEach()
        for stamp, data in enumerate(simulation.log):
            entry = codec.decode(data)
            assert fold.apply(entry, stamp) == asking.apply(entry, stamp), f"seed {seed}, entry {stamp}"
        assert fold.snapshot() == asking.snapshot()


def test_what_the_prefix_cache_had_is_told_once_by_the_first_tokens() -> None:
    fold = PartitionFold()

    def tokens(epoch: int, position: int, cached: int = 0, choice: int = 0) -> m.StepTokens:
        one = m.Tokens("t.a", choice, epoch, position, codec.pack_ids([7]), cached=cached)
        return m.StepTokens("w", 0, (one,))

    # Before OPEN, from a worker that has lost its request, and what an old worker sends behind its successor.
    for stamp, entry in enumerate((tokens(1, 0, 16), _open(), m.Fence("t.a", 2), tokens(1, 1, 99), tokens(2, 1))):
        fold.apply(entry, stamp)
    assert fold.requests["t.a"].cached == 16 and len(fold.requests["t.a"].choices[0].ids) == 2
    again = PartitionFold.restore(fold.snapshot())
    assert again.requests["t.a"].cached == 16
    rows = msgpack.unpackb(fold.snapshot(), strict_map_key=False)
    assert PartitionFold.restore(msgpack.packb([row[:10] for row in rows])).requests["t.a"].cached == 0


def test_a_snapshot_of_a_newer_version_is_understood() -> None:
    """Of whose rows this one does not know the last fields."""
    fold = PartitionFold()
    logprobs = (m.TokenLogprobs(-0.5, codec.pack_ids([1]), (-0.5,)),)
    held = m.Tokens("t.a", 0, 1, 3, codec.pack_ids([9]), logprobs=logprobs, failure=m.Failure("internal", "no"))
    failed = m.End("t.b", "error", failure=m.Failure("internal", "no"))
    entries = [_open(), _tokens(0, [1, 2]), m.StepTokens("w", 0, (held,)), _open()._replace(key="t.b"), failed]
    for stamp, entry in enumerate(entries):
        fold.apply(entry, stamp)
    rows = msgpack.unpackb(fold.snapshot(), strict_map_key=False)
    for row in rows:
        opened, reply, choices, waiting, terminal = row[1], row[2], row[4], row[5], row[6]
        opened[1].append("new")
        for known in (opened, reply, *choices, *waiting, *(t[7][0] for t in waiting), *(t[8] for t in waiting)):
            known.append("new")
        if terminal is not None:
            terminal[1].append("new")
            terminal.append("new")
        row.append("new")
    assert PartitionFold.restore(msgpack.packb(rows)).snapshot() == fold.snapshot()


class AnyEpoch(PartitionFold):
    def is_current(self, request, tokens):  # type: ignore[no-untyped-def]
        return True


class Duplicates(PartitionFold):
    def is_duplicate(self, choice, tokens):  # type: ignore[no-untyped-def]
        return False


class NoHolding(PartitionFold):
    def holds(self, choice, tokens):  # type: ignore[no-untyped-def]
        return False


class NoAwaiting(PartitionFold):
    def awaits_prompt(self, request):  # type: ignore[no-untyped-def]
        return False


class NotWaitingForOpen(PartitionFold):
    def waits_for_open(self, request):  # type: ignore[no-untyped-def]
        return False


class AnyFence(PartitionFold):
    def raises_epoch(self, request, fence):  # type: ignore[no-untyped-def]
        return True


class HeldOutlivesFence(PartitionFold):
    def clear_held(self, request):  # type: ignore[no-untyped-def]
        pass


class SecondTerminal(PartitionFold):
    def is_open_for_entries(self, request):  # type: ignore[no-untyped-def]
        return True


class ForgetsEarlyEnd(PartitionFold):
    def remembers_early_end(self) -> bool:
        return False


class ForgetsAttach(PartitionFold):
    def keeps_attached_reply(self) -> bool:
        return False


RULES = [
    AnyEpoch,
    Duplicates,
    NoHolding,
    NoAwaiting,
    NotWaitingForOpen,
    AnyFence,
    HeldOutlivesFence,
    SecondTerminal,
    ForgetsEarlyEnd,
    ForgetsAttach,
]


@pytest.mark.parametrize("mutant", RULES, ids=lambda c: c.__name__)
def test_without_a_rule_some_seed_breaks(mutant: type[PartitionFold]) -> None:
    for seed in range(3000):
        try:
            Simulation(seed, mutant).simulate()
        except Broken:
            return
    pytest.fail("no seed needs this rule")


def _open(key: str = "t.a", choices: int = 1) -> m.Open:
    return m.Open(key, m.ReplyTo("inbox"), 1, 3, 8, choices=choices)


def _tokens(position: int, ids: list[int], epoch: int = 1, finish: str | None = None) -> m.StepTokens:
    return m.StepTokens("w", 0, (m.Tokens("t.a", 0, epoch, position, codec.pack_ids(ids), finish),))


def test_fence_fixes_the_prefix_that_the_next_epoch_continues() -> None:
    fold = PartitionFold()
    for stamp, entry in enumerate(
        [_open(), _tokens(0, [1, 2]), _tokens(3, [9]), m.Fence("t.a", 2), _tokens(2, [7], epoch=1)]
    ):
        fold.apply(entry, stamp)
    assert fold.requests["t.a"].prefix == ([1, 2],)
    effects = fold.apply(_tokens(2, [3], epoch=2), 9)
    assert effects == [Committed("t.a", 0, 2, [3], None)]
    assert fold.requests["t.a"].prefix == ([1, 2],), "the prefix is that of the fence, whatever came after"


def test_tokens_that_overtake_open_wait_for_it_and_for_no_other_epoch() -> None:
    fold = PartitionFold()
    assert fold.apply(_tokens(0, [1, 2]), 0) == [] == fold.apply(_tokens(2, [3], finish="length"), 1)
    fold = PartitionFold.restore(fold.snapshot())
    effects = fold.apply(_open(), 2)
    assert [type(e).__name__ for e in effects] == ["Opened", "Committed", "Committed", "ChoiceFinished", "Ended"]
    fold = PartitionFold()
    for entry in (_tokens(0, [1, 2]), m.Fence("t.a", 2), _tokens(0, [5]), _tokens(0, [7], epoch=2)):
        assert not [e for e in fold.apply(entry, 0) if isinstance(e, Committed)]
    assert fold.apply(_open(), 1)[1:] == [Committed("t.a", 0, 0, [7], None)]
    fold = PartitionFold()
    for entry in (_tokens(0, [1]), m.End("t.a", "cancelled")):
        fold.apply(entry, 0)
    assert [type(e).__name__ for e in fold.apply(_open(), 1)] == ["Opened", "Ended"]
    fold.apply(_tokens(0, [1], epoch=1), 2)
    fold = PartitionFold()
    fold.apply(_tokens(0, [1]), 0)
    assert fold.prune(before=1.0) == ["t.a"], "what is never opened is forgotten"


def test_all_choices_must_finish() -> None:
    fold = PartitionFold()
    fold.apply(_open(choices=2), 0)
    fold.apply(m.StepTokens("w", 0, (m.Tokens("t.a", 0, 1, 0, codec.pack_ids([5]), "stop", 5),)), 1)
    assert fold.requests["t.a"].terminal is None
    effects = fold.apply(m.End("t.a", "stop", choice=1, length=0, stop="\n"), 2)
    assert isinstance(effects[-1], Ended) and effects[-1].terminal.reason == "finished"


def test_prune_forgets_what_ended_and_nothing_else() -> None:
    fold = PartitionFold()
    fold.apply(_open("t.live"), 0)
    fold.apply(_open("t.a"), 0)
    fold.apply(_tokens(0, [1], finish="length"), 1)
    fold.apply(m.End("t.never-opened", "cancelled"), 1)
    assert sorted(fold.prune(before=1.5)) == ["t.a", "t.never-opened"]
    assert list(fold.requests) == ["t.live"]


def test_what_comes_after_the_end_does_not_prolong_its_memory() -> None:
    fold = PartitionFold()
    fold.apply(_open(), 0)
    fold.apply(_tokens(0, [1], finish="length"), 1)
    for entry in (_tokens(1, [2]), m.Fence("t.a", 2), m.Attach("t.a", m.ReplyTo("there"))):
        fold.apply(entry, 9)
    later = _open()._replace(req_seq=99)
    assert not fold.make_way(later, before=1.0) and not fold.make_way(_open("t.b"), before=9.0)
    assert not fold.make_way(_open(), before=9.0), "a scheduler repeats itself"
    assert fold.make_way(later, before=1.5) and not fold.requests


def test_choices_wait_for_the_prompt_and_a_fence_fixes_how_much_of_it_is_told() -> None:
    fold = PartitionFold()
    fold.apply(_open()._replace(prompt_logprobs=True), 0)

    def told(position: int, ids: list[int], epoch: int = 1) -> list[object]:
        rows = tuple(m.TokenLogprobs(-0.5, b"", ()) for _ in ids)
        entry = m.Tokens("t.a", m.PROMPT, epoch, position, codec.pack_ids(ids), logprobs=rows)
        return list(fold.apply(m.StepTokens("w", 0, (entry,)), 1))

    assert fold.apply(_tokens(0, [7], finish="length"), 1) == [], "held"
    assert len(told(0, [1, 2])) == 1
    fold.apply(m.Fence("t.a", 2), 2)
    state = fold.requests["t.a"]
    assert (state.prefix, state.prompt_done) == (([],), 2)
    fold = PartitionFold.restore(fold.snapshot())
    assert fold.requests["t.a"].prompt_done == 2
    assert told(2, [9]) == [] and told(0, [1], epoch=2) == []
    assert fold.apply(_tokens(0, [5], epoch=2, finish="length"), 3) == []
    effects = told(2, [3], epoch=2)
    assert [type(e).__name__ for e in effects] == ["Committed", "Committed", "ChoiceFinished", "Ended"]
    assert [e.ids for e in effects[:2]] == [[3], [5]]  # type: ignore[attr-defined]
