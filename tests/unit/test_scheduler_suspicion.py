"""Poison: what kills its worker alone, twice, is found; a kill from outside convicts nobody."""

from __future__ import annotations

import random

from services.scheduler.suspicion import after_death, is_guilty, is_isolated
from shared.messages import Assignment

FRESH = Assignment(1, 1, "w", b"")


def test_the_way_to_quarantine() -> None:
    assignment, history = FRESH, []
    for _ in range(4):
        assignment = after_death(assignment, 3, named=False)
        history.append((is_isolated(assignment), is_guilty(assignment)))
    assert history == [(False, False), (True, False), (True, False), (True, True)], "twice in company, twice alone"


def test_progress_acquits() -> None:
    assignment = FRESH
    for committed in (3, 3, 3, 4, 4, 4):
        assignment = after_death(assignment, committed, named=False)
        assert not is_guilty(assignment)
    assert after_death(assignment, 5, named=False).suspect == 1


def test_who_is_named_runs_apart_at_once() -> None:
    assignment = after_death(FRESH, 0, named=True)
    assert is_isolated(assignment) and not is_guilty(assignment)
    assignment = after_death(after_death(assignment, 0, named=True), 0, named=True)
    assert is_guilty(assignment)


def test_random_kills_convict_nobody() -> None:
    """Ten thousand requests, each killed at random between tokens, half of the time before it could generate another."""
    random.seed(3)
    for _ in range(10_000):
        assignment, committed = FRESH, 0
        for _ in range(3):  # a fourth kill in a row without a token in between is beyond chance
            assignment = after_death(assignment, committed, named=False)
            assert not is_guilty(assignment)
            committed += random.randrange(2)
