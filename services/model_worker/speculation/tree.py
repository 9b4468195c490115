"""Static trees of candidate tokens (Cai et al. 2024, §2.1.2 and §2.3.3). Pure: no tensors.

A candidate is a path (r1, r2, …): the r1-likeliest token of the first head, then the r2-likeliest of the second, … counted from 0.
The root is the newest token, which is not in doubt: its path is empty. A tree holds with each path all beginnings of it.
"""

from __future__ import annotations

import heapq
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

Candidate = tuple[int, ...]

MAX_NODES = 64  # the ancestors of a node are a 64-bit word
SIZES = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Tree:
    """Nodes by depth, then by path; node 0 is the root, `nodes[0] == ()`. Raises ValueError for what is no tree.

    gains  what each node adds to the expected number of tokens of a step: the probability that it is accepted (the root's is 1)
    """

    nodes: tuple[Candidate, ...]
    gains: tuple[float, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.nodes) <= MAX_NODES:
            raise ValueError(f"a tree has 1 to {MAX_NODES} nodes, not {len(self.nodes)}")
        if len(set(self.nodes)) != len(self.nodes) or list(self.nodes) != sorted(self.nodes, key=_by_depth):
            raise ValueError("the nodes of a tree are distinct and sorted by depth and path")
        if self.nodes[0] != () or any(node[:-1] not in self._index for node in self.nodes[1:]):
            raise ValueError("a tree holds the root and the parent of each node")
        if any(rank < 0 for node in self.nodes for rank in node) or len(self.gains) != len(self.nodes):
            raise ValueError("ranks are not negative, and each node has a gain")

    @classmethod
    def of(cls, paths: Iterable[Sequence[int]], gains: Iterable[float] | None = None) -> Tree:
        """From paths in any order, the root not among them; gains default to 0."""
        candidates = [tuple(path) for path in paths]
        values = [0.0] * len(candidates) if gains is None else list(gains)
        pairs = sorted(zip([(), *candidates], [1.0, *values], strict=True), key=lambda pair: _by_depth(pair[0]))
        return cls(tuple(node for node, _ in pairs), tuple(gain for _, gain in pairs))

    @cached_property
    def _index(self) -> dict[Candidate, int]:
        return {node: index for index, node in enumerate(self.nodes)}

    @property
    def size(self) -> int:
        return len(self.nodes)

    @cached_property
    def depth(self) -> int:
        """The longest path: how many guessed tokens a step can accept."""
        return len(self.nodes[-1])

    @cached_property
    def width(self) -> int:
        """How many candidates of a head are wanted at most."""
        return 1 + max((node[-1] for node in self.nodes[1:]), default=-1)

    @cached_property
    def expected_extra(self) -> float:
        """Guessed tokens that a step is expected to accept, beside the one that it samples anyway."""
        return sum(self.gains[1:])

    @cached_property
    def promises(self) -> tuple[float, ...]:
        """Entry d: how likely a step is expected to accept more than d guessed tokens."""
        of_depth = [0.0] * self.depth
        for node, gain in zip(self.nodes[1:], self.gains[1:], strict=True):
            of_depth[len(node) - 1] += gain
        return tuple(of_depth)

    @cached_property
    def chances(self) -> tuple[float, ...]:
        """Entry d: how likely the guess behind d accepted ones is expected to be accepted, too."""
        before = (1.0, *self.promises)
        return tuple(then / max(first, 1e-9) for first, then in itertools.pairwise(before))

    @cached_property
    def parents(self) -> list[int]:
        """By node; the root's is 0, itself."""
        return [self._index[node[:-1]] for node in self.nodes]

    @cached_property
    def paths(self) -> list[list[int]]:
        """For each node the nodes from the root to itself, then -1 up to depth + 1 entries. (Padding with a valid node would make
        rejected rows look accepted.)"""
        return [
            [self._index[node[:end]] for end in range(len(node) + 1)] + [-1] * (self.depth - len(node))
            for node in self.nodes
        ]

    @cached_property
    def ancestor_words(self) -> list[int]:
        """For each node the set of its ancestors and itself, as the bits of a signed 64-bit word."""
        words = [sum(1 << index for index in path if index >= 0) for path in self.paths]
        return [word - (1 << 64) if word >> 63 else word for word in words]


def _by_depth(node: Candidate) -> tuple[int, Candidate]:
    return len(node), node


def design(gain: Callable[[Candidate], float], depth: int, width: int, size: int) -> list[tuple[Candidate, float]]:
    """The size - 1 paths that add most, best first, each after its parent, and what each adds: greedy expansion by marginal gain.

    gain(path): probability that the whole path is accepted, at most that of its beginning; paths have at most `depth` ranks below
    `width`. Since gains only fall along a path, greedy is optimal. Paths of gain 0 are left out.
    """
    chosen: list[tuple[Candidate, float]] = []
    open_paths: list[tuple[float, Candidate]] = []

    def expand(path: Candidate) -> None:
        if len(path) < depth:
            for rank in range(width):
                if (value := gain((*path, rank))) > 0:
                    heapq.heappush(open_paths, (-value, (*path, rank)))

    expand(())
    while open_paths and len(chosen) < size - 1:
        negative, path = heapq.heappop(open_paths)
        chosen.append((path, -negative))
        expand(path)
    return chosen


def independent(accuracies: Sequence[Sequence[float]]) -> Callable[[Candidate], float]:
    """Gains by the paper's assumption that heads err independently. accuracies[h][k]: share of positions where the target is among
    the k + 1 likeliest tokens of head h."""

    def gain(path: Candidate) -> float:
        product = 1.0
        for top, rank in zip(accuracies, path, strict=False):
            product *= max(0.0, top[rank] - (top[rank - 1] if rank else 0.0)) if rank < len(top) else 0.0
        return product

    return gain


def observed(ranks: Iterable[Sequence[int]]) -> Callable[[Candidate], float]:
    """Gains counted, without that assumption. ranks: for each position the ranks that the heads gave to what really came, -1 where
    it is not known."""
    counts: Counter[Candidate] = Counter()
    total = 0
    for position in ranks:
        total += 1
        for end in range(1, len(position) + 1):
            if position[end - 1] < 0:
                break
            counts[tuple(position[:end])] += 1
    return lambda path: counts[path] / max(1, total)


class TreeSet:
    """Nested trees of growing size: each holds the best nodes, as `design` ordered them."""

    def __init__(self, ordered: Sequence[tuple[Candidate, float]], sizes: Sequence[int] = SIZES) -> None:
        self.ordered = [(tuple(path), float(value)) for path, value in ordered]
        usable = sorted({min(size, len(self.ordered) + 1) for size in sizes} - {1})
        self.trees = [
            Tree.of([path for path, _ in self.ordered[: size - 1]], [value for _, value in self.ordered[: size - 1]])
            for size in usable
        ]

    def limited(self, depth: int) -> TreeSet:
        """The same, for a drafter that guesses only `depth` tokens."""
        kept = [(path, value) for path, value in self.ordered if len(path) <= depth]
        return TreeSet(kept, [tree.size for tree in self.trees])

    def save(self, file: Path) -> None:
        content = {
            "sizes": [tree.size for tree in self.trees],
            "paths": [list(path) for path, _ in self.ordered],
            "gains": [round(value, 6) for _, value in self.ordered],
        }
        file.write_text(json.dumps(content) + "\n")

    @classmethod
    def load(cls, file: Path) -> TreeSet:
        """Raises ValueError if the file does not hold trees, OSError if it cannot be read."""
        try:
            content = json.loads(file.read_text())
            ordered = list(zip(content["paths"], content["gains"], strict=True))
            return cls(ordered, content["sizes"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file} does not hold trees: {error}") from None


def default_trees(heads: int) -> TreeSet:
    """For heads that nothing is known of: accuracies as the paper reports them for Vicuna, about, falling from head to head."""
    accuracies = [[0.6 * 0.75**head * (1 - 0.55 ** (k + 1)) / 0.45 for k in range(10)] for head in range(heads)]
    accuracies = [[min(value, 0.95) for value in top] for top in accuracies]
    return TreeSet(design(independent(accuracies), heads, 10, MAX_NODES))
