"""The controller against simulated costs: it finds the best tree and, above all, never loses to plain decoding."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from services.model_worker.speculation.controller import Acceptance, TreeController
from services.model_worker.speculation.tree import Tree, default_trees

TREES = default_trees(4).trees
SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256]

Cost = Callable[[int], float]  # rows → seconds


def gpu(rows: int) -> float:
    """Weights are read once, then the arithmetic of the rows counts: an H200 on the 8 B shape, about."""
    return 4e-3 + 0.2e-3 + 30e-6 * rows


def cpu(rows: int) -> float:
    """Bound by arithmetic from the first row."""
    return 1e-3 + 8e-3 * rows


@dataclass
class Outcome:
    seconds: float = 0.0
    tokens: int = 0
    plain: int = 0
    steps: int = 0

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def simulate(
    cost: Cost, batch: int, quality: list[float], steps: int = 3000, noise: float = 0.05, seed: int = 1,
    fixed: Tree | bool | None = False, length: int = 150,
) -> Outcome:  # fmt: skip
    """Requests come and go; quality[i % len]: how many times the promise request i keeps. fixed: a tree for all steps."""
    rng = random.Random(seed)
    controller = TreeController(TREES, SIZES, 512)
    requests = [(Acceptance(), quality[i % len(quality)]) for i in range(batch)]
    ages = [rng.randrange(length) for _ in range(batch)]
    outcome = Outcome()
    arrivals = batch
    for _ in range(steps):
        tree = controller.pick([acceptance for acceptance, _ in requests]) if fixed is False else fixed
        nodes = 1 if tree is None else tree.size  # type: ignore[union-attr]
        seconds = cost(batch * nodes) * max(0.5, rng.gauss(1, noise)) * (20 if rng.random() < 0.003 else 1)
        controller.observe_time(batch, tree, seconds)  # type: ignore[arg-type]
        outcome.seconds += cost(batch * nodes)
        outcome.steps += 1
        outcome.plain += tree is None
        accepted = [0] * batch
        if tree is not None:
            for index, (_, factor) in enumerate(requests):
                extra = min(tree.expected_extra * factor, tree.depth)  # type: ignore[union-attr]
                accepted[index] = int(extra) + (rng.random() < extra - int(extra))
            controller.observe([(a, n) for (a, _), n in zip(requests, accepted, strict=True)], tree)  # type: ignore[arg-type]
        outcome.tokens += batch + sum(accepted)
        for index in range(batch):
            ages[index] += 1 + accepted[index]
            if ages[index] >= length:
                requests[index], ages[index] = (Acceptance(), quality[arrivals % len(quality)]), 0
                arrivals += 1
    return outcome


def best(cost: Cost, batch: int, quality: list[float]) -> float:
    usable = [tree for tree in TREES if batch * tree.size <= 512]
    return max(
        simulate(cost, batch, quality, fixed=tree, steps=60 if batch > 32 else 400).rate for tree in [None, *usable]
    )


@pytest.mark.parametrize("batch", SIZES)
@pytest.mark.parametrize("cost", [gpu, cpu])
@pytest.mark.parametrize("quality", [[1.0], [0.5], [0.0], [0.02], [0.0, 0.0, 0.0, 1.0], [1.4]])
def test_it_never_loses_to_plain_decoding(cost: Cost, batch: int, quality: list[float]) -> None:
    steps = 2500 if batch <= 8 else 1500 if batch <= 32 else 1200
    got = simulate(cost, batch, quality, steps).rate
    plain = batch / cost(batch)
    assert got >= 0.98 * plain, f"{got / plain:.3f} of plain decoding"
    assert got >= 0.93 * best(cost, batch, quality)


def test_it_does_nothing_where_nothing_is_gained() -> None:
    hopeless = simulate(gpu, 8, [0.0])
    assert hopeless.plain / hopeless.steps > 0.97
    good = simulate(gpu, 1, [1.0])
    assert good.plain / good.steps < 0.05 and good.rate > 1.5 / gpu(1)


def test_too_many_rows_are_never_taken() -> None:
    controller = TreeController(TREES, SIZES, 512)
    for batch in range(1, 300):
        for _ in range(8):
            tree = controller.pick([Acceptance()] * batch)
            assert tree is None or controller.bucket(batch) * tree.size <= 512
            controller.observe_time(batch, tree, 1e-3)
    assert controller.pick([Acceptance()] * 257) is None


def test_requests_that_cannot_speculate_count_for_nothing() -> None:
    def pick(able: list[bool]) -> Tree | None:
        controller = TreeController(TREES[:1], [4], 512)
        for tree, seconds in ((None, 1.0), (TREES[0], 1.2)):
            for _ in range(3):
                controller.observe_time(4, tree, seconds)
        return controller.pick([Acceptance(able=one) for one in able])

    assert TREES[0].expected_extra > 0.25
    assert pick([True] * 4) is TREES[0] and pick([True, False, False, False]) is None
    controller = TreeController(TREES, SIZES, 512)
    unable = Acceptance(able=False)
    controller.observe([(unable, 0)] * 100, TREES[0])
    assert controller.average == 1.0 and unable.steps == 0


def test_when_traffic_gets_better_it_notices() -> None:
    controller = TreeController(TREES, SIZES, 512)

    def run(steps: int, factor: float) -> float:
        """Share of steps with a tree. Every step has a new request, so only the average is known."""
        with_tree = 0
        for _ in range(steps):
            request = Acceptance()
            tree = controller.pick([request])
            controller.observe_time(1, tree, gpu(1 if tree is None else tree.size))
            if tree is not None:
                with_tree += 1
                controller.observe([(request, round(factor * tree.expected_extra))], tree)
        return with_tree / steps

    run(4000, 0.0)
    assert run(500, 0.0) < 0.2
    run(12_000, 1.0)
    assert run(500, 1.0) > 0.9
