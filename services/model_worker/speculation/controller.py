"""Picks the tree of each step, or none, so that speculation never loses to plain decoding. Pure: times come from outside.

For a batch of R sequences a tree T gives R + Σ m_i E(T) tokens in t(R, T) seconds. E(T) is what the tree's design promises to
accept for a sequence, m_i how much better or worse a request has done than promised, t the time that such steps took of late.
The tree with the most tokens per second is taken, none unless one beats the plain step by a margin.
"""

from __future__ import annotations

import bisect
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from services.model_worker.interface import RequestSpeculation, SpeculationStats
from services.model_worker.speculation.tree import Tree

MEMORY = 0.95  # of a request: a step counts half after some 14 further ones
PRIOR_WEIGHT = 4.0  # guessed tokens promised, in which a new request is believed to do as the average
AVERAGE_MEMORY = 0.99  # of the average over all requests, in steps of one sequence
MARGIN = 1.02
SAMPLES = 7  # times remembered of each kind of step; their median counts
ENOUGH = 3  # times before a kind of step is known
PROBE_EVERY = 128  # steps of a batch size after which the kind of step not seen for longest is looked at again
HOPELESS = 0.6  # when a tree falls so far behind, larger ones are not tried


@dataclass(slots=True)
class Acceptance:
    """Of one request, running: guessed tokens accepted, and as many as its trees promised. Both fade with MEMORY.

    plain, steps   in all, without a tree and with one;  nodes: of those trees together
    accepted       how many of the steps with a tree accepted 0, 1, 2 … guesses
    able              False: its output depends on more than the tokens of a path (penalties), so nothing is ever accepted
    """

    able: bool = True
    plain: int = 0
    steps: int = 0
    nodes: int = 0
    accepted: Counter[int] = field(default_factory=Counter)
    recent: float = 0.0
    promised: float = 0.0

    def factor(self, average: float) -> float:
        """How many times the promise it keeps, believed to be the average at first."""
        if not self.able:
            return 0.0
        return (PRIOR_WEIGHT * average + self.recent) / (PRIOR_WEIGHT + self.promised)

    def summary(self) -> RequestSpeculation:
        return RequestSpeculation(self.plain, self.steps, tuple(_by_head(self.accepted)), self.nodes)


def _by_head(accepted: Mapping[int, int]) -> list[int]:
    """Steps by the number of their accepted guesses → steps in which each head's guess was accepted."""
    return [
        sum(count for length, count in accepted.items() if length > head) for head in range(max(accepted, default=0))
    ]


@dataclass(slots=True)
class _Arm:
    """Steps of one batch size with one tree (or none)."""

    times: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    seconds: float = 0.0
    last: int = 0

    @property
    def known(self) -> bool:
        return len(self.times) >= ENOUGH


class TreeController:
    """trees: by growing size. sizes: batch sizes that take alike (those of the CUDA graphs). max_rows: of all sequences' nodes."""

    def __init__(self, trees: Sequence[Tree], sizes: Sequence[int], max_rows: int) -> None:
        self.trees = list(trees)
        self._sizes = sorted(sizes)
        self._max_rows = max_rows
        self._arms: dict[int, list[_Arm]] = {}
        self._picks: dict[int, int] = {}
        self.average = 1.0  # of all requests' factors
        self._steps: Counter[int] = Counter()  # by nodes
        self._accepted: Counter[int] = Counter()  # sequences' steps by accepted tokens

    def bucket(self, sequences: int) -> int:
        return self._sizes[min(bisect.bisect_left(self._sizes, sequences), len(self._sizes) - 1)]

    def pick(self, batch: Sequence[Acceptance]) -> Tree | None:
        """The tree for a step of these sequences, None: plain decoding."""
        size = self.bucket(len(batch))
        usable = [tree for tree in self.trees if max(size, len(batch)) * tree.size <= self._max_rows]
        if not usable:
            return None
        total = sum(acceptance.factor(self.average) for acceptance in batch)
        arms = self._of(size)
        picks = self._picks[size] = self._picks.get(size, 0) + 1

        def rate(index: int, factors: float) -> float:
            """Tokens per second of a step with the tree before `index`, if the requests' factors have this sum."""
            if index == 0:
                return len(batch) / arms[0].seconds
            tree = usable[index - 1]
            return (len(batch) + min(factors * tree.expected_extra, len(batch) * tree.depth)) / arms[index].seconds

        rates: list[float] = []
        for index in range(len(usable) + 1):
            if not arms[index].known:
                return self._take(arms, index, picks)
            rates.append(rate(index, total))
            if rates[-1] < HOPELESS * max(rates):
                break
        best = max(range(len(rates)), key=rates.__getitem__)
        if rates[best] < MARGIN * rates[0]:
            best = 0
        if picks % PROBE_EVERY == 0:
            # Only what would be better than the best if drafts did as promised: nothing else can turn out to be.
            near = [index for index in range(len(rates)) if rate(index, max(total, len(batch))) >= rates[best]]
            best = min(near, key=lambda index: arms[index].last)
        return self._take(arms, best, picks)

    def _take(self, arms: list[_Arm], index: int, picks: int) -> Tree | None:
        arms[index].last = picks
        return self.trees[index - 1] if index else None

    def _of(self, size: int) -> list[_Arm]:
        return self._arms.setdefault(size, [_Arm() for _ in range(len(self.trees) + 1)])

    def observe_time(self, sequences: int, tree: Tree | None, seconds: float) -> None:
        """A step of so many sequences, decodes alone, took so long."""
        arm = self._of(self.bucket(sequences))[0 if tree is None else 1 + self.trees.index(tree)]
        arm.times.append(seconds)
        arm.seconds = median(arm.times)

    def observe(self, outcomes: Iterable[tuple[Acceptance, int]], tree: Tree | None) -> None:
        """How many guessed tokens were accepted for each sequence of a step."""
        self._steps[1 if tree is None else tree.size] += 1
        if tree is None:
            for acceptance, _ in outcomes:
                acceptance.plain += 1
            return
        promise = max(tree.expected_extra, 1e-3)
        for acceptance, accepted in outcomes:
            if not acceptance.able:
                acceptance.plain += 1
                continue
            self._accepted[accepted] += 1
            acceptance.steps += 1
            acceptance.nodes += tree.size
            acceptance.accepted[accepted] += 1
            acceptance.recent = MEMORY * acceptance.recent + accepted
            acceptance.promised = MEMORY * acceptance.promised + promise
            self.average += (1.0 - AVERAGE_MEMORY) * (accepted / promise - self.average)

    def stats(self) -> SpeculationStats:
        depth = max(tree.depth for tree in self.trees)
        # Copies: another thread may be asking.
        steps, accepted = dict(self._steps), dict(self._accepted)
        by_head = _by_head(accepted)
        by_head += [0] * (depth - len(by_head))
        return SpeculationStats(steps, sum(accepted.values()), by_head, self.average)
