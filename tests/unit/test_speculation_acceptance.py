"""Acceptance: the accepted path against a walk in Python, its distribution against the target's, its rows in the cache."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.ops import SamplingBatch
from kernels.reference import ReferenceOps
from services.model_worker.speculation.acceptance import (
    DeviceTree,
    accept,
    exact_match,
    moves,
    typical_match,
)
from services.model_worker.speculation.tree import Tree, default_trees
from tests.unit.test_speculation_tree import trees

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


def guesses(tree: Tree, candidates: Tensor, last: Tensor) -> Tensor:
    """candidates int64 [R, depth, width] → tokens of the nodes [R, n]."""
    tokens = [last] + [candidates[:, len(node) - 1, node[-1]] for node in tree.nodes[1:]]
    return torch.stack(tokens, dim=1)


@settings(max_examples=100, deadline=None)
@given(trees(), st.integers(0, 2**32))
def test_the_path_is_that_of_a_walk(tree: Tree, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    width = max(tree.width, 1)
    rows, vocabulary = 20, width + 1
    candidates = torch.rand(rows, max(tree.depth, 1), vocabulary, generator=generator).argsort(-1)[..., :width]
    tokens = guesses(tree, candidates, torch.zeros(rows, dtype=torch.int64))
    chosen = torch.randint(0, vocabulary, tokens.shape, generator=generator)
    device_tree = DeviceTree(tree, CPU)
    accepted = accept(device_tree, tokens, chosen, exact_match(device_tree, tokens, chosen))
    for row in range(rows):
        node, walked, ids = 0, [0], [int(chosen[row, 0])]
        while True:
            children = [
                j for j in range(1, tree.size) if tree.parents[j] == node and tokens[row, j] == chosen[row, node]
            ]
            if not children:
                break
            (node,) = children
            walked.append(node)
            ids.append(int(chosen[row, node]))
        padding = [-1] * (tree.depth + 1 - len(walked))
        assert accepted.path[row].tolist() == walked + padding
        assert accepted.ids[row].tolist() == ids + padding
        assert (accepted.last[row], accepted.count[row]) == (node, len(walked))


def test_accepted_rows_move_behind_the_context() -> None:
    tree = Tree.of([(0,), (1,), (0, 0), (1, 0), (1, 1), (1, 1, 0)])  # nodes 1 … 6 in that order
    slots = torch.tensor([[10, 11, 12, 13, 40, 41, 42], [7, 8, 9, 20, 21, 22, 23], [-1] * 7], dtype=torch.int32)
    paths = torch.tensor([[0, 2, 5, 6], [0, 1, 3, -1], [0, 1, -1, -1]])
    source, target = moves(paths, slots)
    wanted = [(12, 11), (41, 12), (42, 13), (20, 9)]
    assert [(s, t) for s, t in zip(source.tolist(), target.tolist(), strict=True) if t >= 0] == wanted
    cache = torch.arange(48.0).view(3, 16, 1, 1)
    ReferenceOps().move_kv(cache, cache.clone(), source, target)
    assert cache.flatten()[[11, 12, 13, 9]].tolist() == [12, 41, 42, 20]
    assert tree.nodes[6] == (1, 1, 0)


VOCABULARY = 5
TARGET = torch.randn(VOCABULARY, VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(11)) * 0.7
TREE = Tree.of([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 1, 0)])
TEMPERATURE = 0.8


def target_logits(before: Tensor, last: Tensor) -> Tensor:
    """A model whose next token depends on the two before it."""
    return TARGET[before, last]


def sample(logits: Tensor, seeds: Tensor, position: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    count = len(seeds)
    zeros = torch.zeros(count, dtype=torch.int32)
    batch = SamplingBatch(
        torch.full((count,), temperature), zeros, torch.ones(count), torch.zeros(count), seeds, zeros, position,
        any_random=temperature > 0, any_filter=False,
    )  # fmt: skip
    return ReferenceOps().sample(logits, batch)


Rule = Callable[[DeviceTree, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def exact(tree: DeviceTree, tokens: Tensor, chosen: Tensor, *_: Tensor) -> Tensor:
    return exact_match(tree, tokens, chosen)


def independent_coin(
    tree: DeviceTree, tokens: Tensor, chosen: Tensor, logits: Tensor, seeds: Tensor, positions: Tensor
) -> Tensor:
    """Wrong: a guess is accepted with its own probability, but by another draw than the one that replaces it if rejected."""
    other = sample(logits.flatten(0, 1), seeds.repeat_interleave(tokens.shape[1]) + 2**40, positions.flatten())
    return exact_match(tree, tokens, other.view_as(tokens))


def plausible(
    tree: DeviceTree, tokens: Tensor, chosen: Tensor, logits: Tensor, seeds: Tensor, positions: Tensor
) -> Tensor:
    """Wrong as a lossless rule: the paper's typical acceptance."""
    return typical_match(tree, tokens, logits, torch.full((len(tokens),), TEMPERATURE), 0.09, 0.3)


def speculate(seeds: Tensor, rule: Rule, length: int = 3, temperature: float = TEMPERATURE) -> tuple[Tensor, float]:
    """The first `length` tokens after (0, 0) of each seed, int64 [R, length], generated with a tree; and tokens per step."""
    tree = DeviceTree(TREE, CPU)
    rows = torch.arange(len(seeds))
    before = last = torch.zeros(len(seeds), dtype=torch.int64)
    count = torch.zeros(len(seeds), dtype=torch.int64)
    out = torch.full((len(seeds), length + TREE.depth + 1), -1)
    steps = 0
    while int(count.min()) < length:
        steps += 1
        ranked = target_logits(before, last).argsort(-1, descending=True)
        # Drafts that know less the further ahead they look, as heads do: the candidates depend on the root alone.
        candidates = torch.stack([(ranked + depth) % VOCABULARY for depth in range(TREE.depth)], dim=1)
        tokens = guesses(TREE, candidates, last)
        previous = torch.where(tree.depths == 0, before[:, None], tokens[:, tree.parents])
        logits = target_logits(previous, tokens)
        positions = (count[:, None] + tree.depths).int()
        chosen = sample(logits.flatten(0, 1), seeds.repeat_interleave(TREE.size), positions.flatten(), temperature)
        chosen = chosen.view_as(tokens)
        accepted = accept(tree, tokens, chosen, rule(tree, tokens, chosen, logits, seeds, positions))
        place = (count[:, None] + torch.arange(TREE.depth + 1)).clamp(max=out.shape[1] - 1)
        kept = torch.where(accepted.ids >= 0, accepted.ids, out.gather(1, place))
        out.scatter_(1, place, kept)
        before = torch.where(accepted.count > 1, accepted.ids[rows, (accepted.count.long() - 2).clamp(min=0)], last)
        last = accepted.ids[rows, accepted.count.long() - 1]
        count = (count + accepted.count).clamp(max=length)  # what is complete may run on: its row is full
    return out[:, :length], float(length * len(seeds) / (steps * len(seeds)))


def plain(seeds: Tensor, length: int = 3, temperature: float = TEMPERATURE) -> Tensor:
    before = last = torch.zeros(len(seeds), dtype=torch.int64)
    out = []
    for position in range(length):
        token = sample(target_logits(before, last), seeds, torch.full((len(seeds),), position).int(), temperature)
        before, last = last, token
        out.append(token)
    return torch.stack(out, dim=1)


def p_value(draws: Tensor) -> float:
    """Chi-square test (Pearson 1900) of triples int64 [N, 3] against the model's own probabilities."""
    probabilities = (TARGET / TEMPERATURE).double().softmax(-1)
    observed = torch.bincount(
        draws[:, 0] * VOCABULARY**2 + draws[:, 1] * VOCABULARY + draws[:, 2], minlength=VOCABULARY**3
    )
    expected = torch.stack([
        probabilities[0, 0, a] * probabilities[0, a, b] * probabilities[a, b, c]
        for a, b, c in itertools.product(range(VOCABULARY), repeat=3)
    ]) * len(draws)  # fmt: skip
    assert expected.min() > 5
    statistic = ((observed - expected).square() / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((VOCABULARY**3 - 1) / 2.0).double(), statistic / 2))


DRAWS = 200_000


def drawn(rule: Rule) -> Tensor:
    return torch.cat([speculate(torch.arange(start, start + 20_000), rule)[0] for start in range(0, DRAWS, 20_000)])


def test_sampling_with_a_tree_has_the_targets_distribution() -> None:
    draws = drawn(exact)
    assert p_value(draws) > 1e-4
    assert torch.equal(draws[:20_000], plain(torch.arange(20_000))), (
        "the very tokens of plain sampling, not only their like"
    )


@pytest.mark.parametrize("rule", [independent_coin, plausible])
def test_a_wrong_rule_is_caught(rule: Rule) -> None:
    assert p_value(drawn(rule)) < 1e-12


def test_greedy_is_the_same_rule_and_accepts() -> None:
    seeds = torch.arange(3)
    tokens, _ = speculate(seeds, exact, length=24, temperature=0.0)
    assert torch.equal(tokens, plain(seeds, length=24, temperature=0.0))
    assert speculate(torch.arange(2000), exact, length=24)[1] > 1.2


def test_typical_acceptance_is_the_papers_rule() -> None:
    tree = DeviceTree(TREE, CPU)
    logits = torch.randn(7, TREE.size, VOCABULARY, generator=torch.Generator().manual_seed(2)) * 2
    logits[0, 0, 3] = -torch.inf  # a masked token does not make the entropy NaN
    tokens = torch.randint(0, VOCABULARY, (7, TREE.size), generator=torch.Generator().manual_seed(3))
    temperature = torch.linspace(0.4, 1.5, 7)
    match = typical_match(tree, tokens, logits, temperature, 0.09, 0.3)
    for row, node in itertools.product(range(7), range(1, TREE.size)):
        p = (logits[row, TREE.parents[node]] / temperature[row]).softmax(-1)
        entropy = -sum(float(x * x.log()) for x in p if x > 0)
        bound = min(0.09, 0.3 * torch.tensor(-entropy).exp().item())
        assert bool(match[row, node]) == (float(p[tokens[row, node]]) > bound)
    assert 0 < match[:, 1:].float().mean() < 1


def test_of_two_children_that_may_follow_the_deeper_then_the_likelier_wins() -> None:
    tree = DeviceTree(Tree.of([(0,), (1,), (2,), (1, 0)]), CPU)
    tokens = torch.tensor([[9, 1, 2, 3, 4]] * 3)
    chosen = torch.tensor([[5, 6, 7, 8, 0]] * 3)
    match = torch.tensor([[True] * 5, [True, True, True, True, False], [False, False, False, False, True]])
    accepted = accept(tree, tokens, chosen, match)
    assert accepted.ids.tolist() == [[2, 4, 0], [1, 6, -1], [5, -1, -1]]


def test_token_zero_is_a_token_like_others() -> None:
    """Paths padded with 0 instead of -1 accept rows that were rejected when 0 is predicted."""
    tree = DeviceTree(default_trees(4).trees[3], CPU)
    size = tree.tree.size
    accepted = accept(
        tree, torch.full((1, size), 7), torch.zeros(1, size, dtype=torch.int64), torch.zeros(1, size, dtype=torch.bool)
    )
    assert accepted.ids.tolist() == [[0] + [-1] * tree.tree.depth] and accepted.count.tolist() == [1]
