"""Trees: their tables, their design, their files."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.model_worker.speculation.tree import (
    MAX_NODES,
    Candidate,
    Tree,
    TreeSet,
    default_trees,
    design,
    independent,
    observed,
)


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Any tree of at most 64 nodes: each new node hangs on one that is there."""
    nodes: list[Candidate] = [()]
    for _ in range(draw(st.integers(0, MAX_NODES - 1))):
        parent = nodes[draw(st.integers(0, len(nodes) - 1))]
        if len(parent) < 6:
            nodes.append((*parent, sum(node[:-1] == parent for node in nodes if node)))
    return Tree.of(draw(st.permutations(nodes[1:])))


@settings(deadline=None)
@given(trees())
def test_the_tables_say_the_same(tree: Tree) -> None:
    assert tree.nodes[0] == () and tree.parents[0] == 0
    assert tree.depth == max(map(len, tree.nodes)) and tree.width == 1 + max([-1, *(r for n in tree.nodes for r in n)])
    for index, node in enumerate(tree.nodes):
        path = [step for step in tree.paths[index] if step >= 0]
        assert [tree.nodes[step] for step in path] == [node[:end] for end in range(len(node) + 1)]
        assert tree.paths[index][len(path) :] == [-1] * (tree.depth + 1 - len(path))
        assert path == sorted(path) and all(step >= depth for depth, step in enumerate(path))
        assert {bit for bit in range(64) if tree.ancestor_words[index] >> bit & 1} == set(path)
        assert index == 0 or tree.nodes[tree.parents[index]] == node[:-1]
        assert -(2**63) <= tree.ancestor_words[index] < 2**63


@pytest.mark.parametrize(
    "nodes",
    [(), ((0,),), ((), (0, 1)), ((), (0,), (0,)), ((), (0, 0), (0,)), ((), (-1,)), ((), *((i,) for i in range(64)))],
)
def test_what_is_no_tree(nodes: tuple[Candidate, ...]) -> None:
    with pytest.raises(ValueError, match=r"tree|ranks"):
        Tree(nodes, (0.0,) * len(nodes))


accuracies_strategy = st.lists(
    st.lists(st.floats(0.01, 0.3), min_size=3, max_size=3).map(lambda shares: list(itertools.accumulate(shares))),
    min_size=1,
    max_size=3,
)


@settings(deadline=None)
@given(accuracies_strategy, st.integers(2, 8))
def test_the_design_is_the_best_there_is(accuracies: list[list[float]], size: int) -> None:
    gain = independent(accuracies)
    ordered = design(gain, len(accuracies), 3, size)
    values = [value for _, value in ordered]
    assert (
        values == sorted(values, reverse=True) and len(Tree.of([path for path, _ in ordered]).nodes) == len(values) + 1
    )
    # No set of paths can hold more than the best of all paths, of which the design must be one such set.
    paths = [p for depth in range(1, len(accuracies) + 1) for p in itertools.product(range(3), repeat=depth)]
    assert sum(values) == pytest.approx(sum(sorted(map(gain, paths), reverse=True)[: size - 1]))


def test_gains_counted_need_no_independence() -> None:
    ranks = [(0, 0), (0, 0), (1, 2), (1, -1), (-1, 0), (0, 3), (5, 0), (0, 0)]
    gain = observed(ranks)
    assert (gain((0,)), gain((0, 0)), gain((1,)), gain((1, 2)), gain((2,))) == (4 / 8, 3 / 8, 2 / 8, 1 / 8, 0)
    ordered = design(gain, 2, 4, 64)
    assert [path for path, _ in ordered][:3] == [(0,), (0, 0), (1,)]
    assert all(value > 0 for _, value in ordered), "a node that never helps is a row for nothing"
    assert Tree.of(*zip(*ordered, strict=True)).expected_extra == pytest.approx(
        sum((a in {0, 1}) + ((a, b) in {(0, 0), (1, 2), (0, 3)}) for a, b in ranks) / 8
    )


def test_trees_of_all_sizes_and_their_file(tmp_path: Path) -> None:
    trees = default_trees(4)
    assert [tree.size for tree in trees.trees] == [2, 4, 8, 16, 32, 64]
    for smaller, larger in itertools.pairwise(trees.trees):
        assert set(smaller.nodes) < set(larger.nodes) and smaller.expected_extra < larger.expected_extra
    file = tmp_path / "trees.json"
    trees.save(file)
    assert [tree.nodes for tree in TreeSet.load(file).trees] == [tree.nodes for tree in trees.trees]
    assert {tree.depth for tree in TreeSet.load(file).limited(2).trees} == {1, 2}
    few = TreeSet(design(observed([(0,), (1,)]), 1, 10, 64))
    assert [tree.size for tree in few.trees] == [2, 3]
    for content in ("{}", "[]", '{"sizes": [2], "paths": [[0, 0]], "gains": [0.5]}', "no"):
        file.write_text(content)
        with pytest.raises(ValueError):
            TreeSet.load(file)


def test_a_random_model_accepts_what_the_design_promises() -> None:
    """The sum of gains is the expected number of accepted tokens, counted on positions that the design did not see."""
    rng = random.Random(3)

    def ranks(count: int) -> list[tuple[int, ...]]:
        return [tuple(min(int(rng.expovariate(0.5 + 0.2 * head)), 9) for head in range(3)) for _ in range(count)]

    tree = Tree.of(*zip(*design(observed(ranks(20_000)), 3, 10, 16), strict=True))
    accepted = [max(len(node) for node in tree.nodes if node == position[: len(node)]) for position in ranks(20_000)]
    assert sum(accepted) / len(accepted) == pytest.approx(tree.expected_extra, abs=0.05)  # four deviations
