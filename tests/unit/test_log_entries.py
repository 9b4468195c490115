"""Entries of sequences that just go on are what they would be one by one."""

from __future__ import annotations

import random

from services.model_worker.interface import EngineRequest, TokenRows
from services.model_worker.log_entries import ActiveRun, Batch, SteadyEntries, packed
from shared import codec
from shared import messages as m
from shared.sampling import SamplingParams

PARAMS = SamplingParams(max_tokens=100)


def run_of(key: str, partition: int, choices: int = 1, first: float = 1.0) -> ActiveRun:
    return ActiveRun(key, 3, partition, [0] * choices, set(range(choices)), set(), 0.5, 4, 0, "", first=first)


class World:
    """Runs with one to three choices in four partitions, and rows of all of them in a shuffled order."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.runs = {f"t.{i}": run_of(f"t.{i}", self.draw.randrange(4), self.draw.randint(1, 3)) for i in range(20)}
        self.requests = [EngineRequest(r.key, c, 3, [1], PARAMS) for r in self.runs.values() for c in sorted(r.open)]
        self.draw.shuffle(self.requests)
        self.asked = 0
        self.steady = SteadyEntries(self.run_of)

    def run_of(self, request: EngineRequest) -> ActiveRun | None:
        self.asked += 1
        return self.runs.get(request.request_id)

    def rows(self, most: int) -> TokenRows:
        ids = [[self.draw.randrange(2**31) for _ in range(self.draw.randint(1, most))] for _ in self.requests]
        return TokenRows(self.requests, [self.draw.randrange(1000) for _ in ids], ids)

    def expected(self, rows: TokenRows) -> dict[int, list[m.Tokens]]:
        found: dict[int, list[m.Tokens]] = {}
        for output in rows:
            if (run := self.runs.get(output.request_id)) is not None:
                entry = m.Tokens(run.key, output.choice, 3, output.position, codec.pack_ids(output.ids))
                found.setdefault(run.partition, []).append(entry)
        return found


def logged(batches: dict[int, Batch]) -> dict[int, list[m.Tokens]]:
    """As a reader of the log sees it."""
    found: dict[int, list[m.Tokens]] = {}
    for partition, batch in batches.items():
        for part in batch.messages():
            message = codec.decode(codec.encode(m.StepTokens("w", 1, part)))  # type: ignore[arg-type]
            found.setdefault(partition, []).extend(message.entries)
    return found


def test_rows_are_logged_as_their_outputs_would_be() -> None:
    for seed in range(20):
        world = World(seed)
        for most in (1, 1, 4):
            rows, batches = world.rows(most), dict[int, Batch]()
            assert world.steady.add(rows, batches)
            assert logged(batches) == world.expected(rows)
            assert {b.size for b in batches.values()} == {sum(len(e[4]) for e in b.entries) for b in batches.values()}
            for output in rows:
                assert world.runs[output.request_id].lengths[output.choice] == output.position + len(output.ids)
        assert world.asked == len(world.requests), "once for as long as the batch stays the same"


def test_they_come_after_what_is_there_already() -> None:
    world = World(1)
    rows = world.rows(1)
    before = m.Tokens("t.0", 0, 3, 0, codec.pack_ids([5]), "length")
    batches = {world.runs["t.0"].partition: Batch()}
    batches[world.runs["t.0"].partition].add(before)
    assert world.steady.add(rows, batches)
    entries = logged(batches)[world.runs["t.0"].partition]
    assert entries == [before, *world.expected(rows)[world.runs["t.0"].partition]]


def test_who_has_ended_is_left_out_from_then_on() -> None:
    world = World(2)
    assert world.steady.add(world.rows(1), {})
    del world.runs["t.3"]
    world.steady.forget()
    rows, batches = world.rows(2), dict[int, Batch]()
    assert world.steady.add(rows, batches)
    assert logged(batches) == world.expected(rows)
    assert "t.3" not in {entry[0] for batch in batches.values() for entry in batch.entries}


def test_first_tokens_and_suspects_are_looked_at_one_by_one() -> None:
    for change in (dict(first=0.0), dict(unproven={0})):
        world = World(3)
        for name, value in change.items():
            setattr(world.runs["t.7"], name, value)
        batches: dict[int, Batch] = {}
        assert not world.steady.add(world.rows(1), batches)
        assert not batches and not any(any(run.lengths) for run in world.runs.values())
        world.runs["t.7"].first, world.runs["t.7"].unproven = 1.0, set()
        assert world.steady.add(world.rows(1), batches) and batches


def test_packed_ids() -> None:
    for rows in ([[1], [2], [-1]], [[1, 2], [], [3]], [[], [7, 8]], []):
        assert packed(rows) == [codec.pack_ids(row) for row in rows]
