"""Picks the tree of each step, or none, so that speculation never loses to plain decoding. Pure: times come from outside.

For a batch of R sequences a tree T gives R + Σ m_i E(T) tokens in t(R, T) seconds. E(T) is what the tree's design promises to
accept for a sequence, m_i how much better or worse a request has done than promised, t the time that such steps took of late.
The tree with the most tokens per second is taken, none unless one beats the plain step by a margin.

A step that follows one of another kind may take longer, for reasons that are not its own. So a choice holds for some steps, times
count only within a row of alike steps, and small gains are not gone after. A kind of step that is wrongly believed to take long is
never taken, and so never put right. So what is believed grows in small steps only, no tree is believed to take longer than a larger
one that was timed later, and what was measured before the first request is scaled by what it turned out to mean. And when the steps
that are taken all the time become slower or faster, all kinds of steps are believed to: longer contexts, or somebody else on the
device, are no reason to try one kind after the other.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from services.model_worker.interface import RequestSpeculation, SpeculationStats
from services.model_worker.speculation.tree import Tree

MEMORY = 0.95  # of a request: a step counts half after some 14 further ones
PRIOR_WEIGHT = 4.0  # guessed tokens promised, in which a new request is believed to do as the average
AVERAGE_MEMORY = 0.99  # of the average over all requests, in steps of one sequence
ENTER, LEAVE = 1.04, 1.0  # rate over the plain step's at which trees are begun with, and below which they are given up
CHANGE = 1.02  # over the present tree's at which another one is taken
HOLD = 4  # steps of a batch size for which a choice holds
SAMPLES = 16  # times remembered of each kind of step. The lower quartile counts: what disturbs steps makes them longer, often several
SLOWER = 1.01  # with each time a kind of step is believed to have become at most so many times as long
AGREED = 1.05  # times what it is believed to take: SAMPLES quartiles up to there in a row, and it is known
ENOUGH = 3  # times before a kind of step is known
TRIAL_EVERY = 128  # steps of a batch size after which the kind of step not seen for longest is looked at again
TIMED_TRIAL = 8  # every so many trials one lasts long enough to tell the time, too:
TRIAL = SAMPLES // 2 + 2  # steps, as the first and, if steps overlap, the last do not count
DOUBT, MOST_DOUBT = 0.99, 0.05  # a kind of step may take so much of its time by the next trial, and at last
UNMEASURED = 0.4  # the same of one whose time is from before the first request
LOOK = 0.007  # share of the time that looks at drafts may take while no tree is settled on
LOOK_EVERY = 16  # steps between two looks, at least
NOBODY = 0  # the place of those that have ended
HOPELESS = 0.6  # when a tree falls so far behind, larger ones are not tried


class Acceptances:
    """What came of the guesses for each request that runs or waits, in arrays by place (but NOBODY's). Fading sums fade with MEMORY.

    able           False: its output depends on more than the tokens of a path (penalties), so nothing is ever accepted
    recent         guessed tokens accepted, fading;  promised: as many as its trees promised, fading
    plain, steps   in all, without a tree and with one;  nodes: of those trees together
    accepted       [place, n]: how many of the steps with a tree accepted n guesses
    """

    def __init__(self, depth: int) -> None:
        self._free: list[int] = []
        self.able = np.zeros(0, dtype=bool)
        self.recent, self.promised = np.zeros((2, 0))
        self.plain, self.steps, self.nodes = np.zeros((3, 0), dtype=np.int64)
        self.accepted = np.zeros((0, depth + 1), dtype=np.int64)

    def admit(self, able: bool = True) -> int:
        """A place for a new request."""
        if not self._free:
            self._grow()
        place = self._free.pop()
        self.able[place] = able
        for values in (self.recent, self.promised, self.plain, self.steps, self.nodes, self.accepted):
            values[place] = 0
        return place

    def release(self, place: int) -> None:
        self._free.append(place)

    def _grow(self) -> None:
        held = len(self.able)
        more = max(64, held)
        self._free = list(range(held + more - 1, max(held, NOBODY + 1) - 1, -1))
        for name in ("able", "recent", "promised", "plain", "steps", "nodes", "accepted"):
            values = getattr(self, name)
            setattr(self, name, np.concatenate((values, np.zeros((more, *values.shape[1:]), values.dtype))))

    def factors(self, places: NDArray[np.int64], average: float) -> float:
        """The sum of how many times its promise each keeps, believed to be the average at first."""
        kept = (PRIOR_WEIGHT * average + self.recent[places]) / (PRIOR_WEIGHT + self.promised[places])
        return float(kept @ self.able[places])

    def observe(self, places: NDArray[np.int64], accepted: NDArray[np.int64], tree: Tree) -> None:
        """A step with a tree, of those that are able."""
        self.steps[places] += 1
        self.nodes[places] += tree.size
        self.accepted[places, accepted] += 1
        self.recent[places] = MEMORY * self.recent[places] + accepted
        self.promised[places] = MEMORY * self.promised[places] + _promise(tree)

    def summary(self, place: int) -> RequestSpeculation:
        # Up to the last head whose guess was ever accepted.
        by_head = tuple(count for count in _by_head(self.accepted[place]) if count)
        return RequestSpeculation(int(self.plain[place]), int(self.steps[place]), by_head, int(self.nodes[place]))


def _promise(tree: Tree) -> float:
    return max(tree.expected_extra, 1e-3)


def _by_head(accepted: NDArray[np.int64]) -> list[int]:
    """Steps by the number of their accepted guesses → steps in which each head's guess was accepted."""
    by_head: list[int] = accepted[::-1].cumsum()[::-1][1:].tolist()
    return by_head


@dataclass(slots=True)
class _Arm:
    """Steps of one batch size with one tree (or none). seconds: what they take, from `times`, both over the batch size's `load`;
    expected: from before the first request, 0 if there is none; last, tried, timed: the picks at which it was last taken, tried for
    its time, and timed."""

    times: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    seconds: float = math.inf
    expected: float = 0.0
    last: int = 0
    tried: int = 0
    timed: int = 0

    @property
    def measured(self) -> bool:
        return len(self.times) >= ENOUGH

    @property
    def known(self) -> bool:
        return self.measured or self.expected > 0

    def add(self, seconds: float, picks: int) -> bool:
        """Whether this agrees with what was believed."""
        self.times.append(seconds)
        quartile = _quartile(self.times)
        # The quartile of few times is the least of them, and a short one would stand for hundreds of steps.
        self.seconds = quartile if len(self.times) < SAMPLES else min(quartile, SLOWER * self.seconds)
        self.timed = picks
        return quartile <= AGREED * self.seconds

    def doubt(self, picks: int) -> float:
        """How much of what it is believed to take it may well take by now: only doubt can mend what seems too slow to be taken."""
        if not (self.measured or self.tried):
            return UNMEASURED
        return max(MOST_DOUBT, float(DOUBT ** ((picks - max(self.timed, self.tried)) / TRIAL_EVERY)))


@dataclass(slots=True)
class _BatchSize:
    """arms: no tree, then all of them; settled: the one that seems best; present: that of the newest step, which may be on trial;
    trial: steps of it still to come.

    load       how many times as long as they are believed to all steps take now, by the settled ones, `followed`, once these are
               known: their last times are `recent`, and so many in a row agreed
    """

    arms: list[_Arm]
    picks: int = 0
    settled: int = 0
    present: int = 0
    trial: int = 0
    load: float = 1.0
    followed: int = -1
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    agreed: int = 0

    def add_time(self, index: int, seconds: float) -> None:
        arm = self.arms[index]
        if index != self.settled:
            arm.add(seconds / self.load, self.picks)
            return
        if index != self.followed:
            self.followed, self.agreed = index, 0
            self.recent.clear()
        self.recent.append(seconds)
        if self.agreed < SAMPLES:
            median = sorted(self.recent)[len(self.recent) // 2]
            if arm.measured and len(self.recent) >= ENOUGH and median * AGREED < self.load * arm.seconds:
                self.load = median / arm.seconds  # all kinds have become faster: else this one alone would seem so
            self.agreed = self.agreed + 1 if arm.add(seconds / self.load, self.picks) else 0
        else:
            self.load = min(_quartile(self.recent) / arm.seconds, SLOWER * self.load)
            arm.timed = self.picks

    def believed(self, most: int) -> list[float]:
        """Seconds of a step with each of the first `most` arms, up to one that is not known."""
        arms = list(itertools.takewhile(lambda arm: arm.known, self.arms[:most]))
        ratios = sorted(arm.seconds / arm.expected for arm in self.arms if arm.measured and arm.expected)
        scale = ratios[len(ratios) // 2] if ratios else 1.0
        seconds = [arm.seconds if arm.measured else scale * arm.expected for arm in arms]
        for index in reversed(range(len(arms))):
            for larger in range(index + 1, len(arms)):
                if arms[larger].timed > arms[index].timed:
                    seconds[index] = min(seconds[index], seconds[larger])
        return seconds


def _quartile(times: deque[float]) -> float:
    return sorted(times)[len(times) // 4]


class TreeController:
    """trees: by growing size. sizes: batch sizes that take alike (those of the CUDA graphs). max_rows: of all sequences' nodes."""

    def __init__(self, trees: Sequence[Tree], sizes: Sequence[int], max_rows: int) -> None:
        self.trees = list(trees)
        self._nodes = [tree.size for tree in trees]
        self._depth = max(tree.depth for tree in trees)
        self._sizes = sorted(sizes)
        self._max_rows = max_rows
        self._by_size: dict[int, _BatchSize] = {}
        # (batch size, arm) of the newest step that was picked, and of the last one whose time was told
        self._picked: tuple[int, int] | None = None
        self._timed: tuple[int, int] | None = None
        self.average = 1.0  # of all requests' factors
        self.requests = Acceptances(self._depth)
        self._steps: Counter[int] = Counter()  # by nodes
        self._accepted = np.zeros(self._depth + 1, dtype=np.int64)  # sequences' steps by accepted tokens
        self._fading: NDArray[np.float64] = np.zeros(0)  # powers of AVERAGE_MEMORY

    def bucket(self, sequences: int) -> int:
        return self._sizes[min(bisect.bisect_left(self._sizes, sequences), len(self._sizes) - 1)]

    def pick(self, batch: NDArray[np.int64]) -> Tree | None:
        """The tree for a step of the sequences with these places, None: plain decoding."""
        size = self.bucket(len(batch))
        usable = bisect.bisect_right(self._nodes, self._max_rows // max(size, len(batch)))
        if not usable:
            return None
        state = self._of(size)
        state.picks += 1
        if state.present > usable:
            state.trial = 0
            self._choose(state, batch, usable)
        elif state.trial:
            state.trial -= 1
        elif state.arms[state.present].known and (
            state.picks % HOLD == 0 or state.present != state.settled or state.picks == 1
        ):
            self._choose(state, batch, usable)
        state.arms[state.present].last = state.picks
        self._picked = size, state.present
        return self.trees[state.present - 1] if state.present else None

    def _choose(self, state: _BatchSize, batch: NDArray[np.int64], usable: int) -> None:
        """Sets `present`, and `trial` if it is one. usable: how many trees, from the smallest on, have few enough rows."""
        arms, count = state.arms, len(batch)
        total, able = self.requests.factors(batch, self.average), int(self.requests.able[batch].sum())

        def rate(index: int, factors: float, seconds: float) -> float:
            """Tokens per second of a step with the tree before `index`, if the requests' factors have this sum."""
            if index == 0:
                return count / seconds
            tree = self.trees[index - 1]
            return (count + min(factors * tree.expected_extra, count * tree.depth)) / seconds

        seconds = state.believed(usable + 1)
        least = [value * arm.doubt(state.picks) for value, arm in zip(seconds, arms, strict=False)]
        rates: list[float] = []
        for index in range(usable + 1):
            if index == len(seconds):
                state.present = index
                return
            rates.append(rate(index, total, seconds[index]))
            if rate(index, total, least[index]) < HOPELESS * max(rates):
                break
        best = max(range(len(rates)), key=rates.__getitem__)
        before = state.settled if state.settled < len(rates) else 0
        if rates[best] < (LEAVE if before else ENTER) * rates[0]:
            best = 0
        elif before and rates[before] >= rates[0] and rates[best] < CHANGE * rates[before]:
            best = before
        state.settled = state.present = best
        if state.picks % TRIAL_EVERY == 0:
            hopes = [rate(index, max(total, able), least[index]) for index in range(len(rates))]
            self._try_another(state, {index for index, hope in enumerate(hopes) if hope >= rates[best]})
        if state.present == best == 0 and len(rates) > 1:
            # What would be accepted, plain steps do not show: what a look costs says how often it can be had.
            cheapest = min(range(1, len(rates)), key=seconds.__getitem__)
            every = HOLD * math.ceil(max(LOOK_EVERY, (seconds[cheapest] / seconds[0] - 1) / LOOK) / HOLD)
            if state.picks % every == 0 and rate(cheapest, max(total, able), seconds[cheapest]) >= rates[0]:
                state.present = cheapest

    def _try_another(self, state: _BatchSize, near: set[int]) -> None:
        """near: the arms that would be better than the best if drafts did as promised. Nothing else can turn out to be."""
        arms = state.arms
        timed = state.picks % (TIMED_TRIAL * TRIAL_EVERY) == 0
        if timed:  # what plain steps take must be known: trees are measured against them
            near.add(0)
        if unmeasured := {index for index in near if not (arms[index].measured or arms[index].tried)}:
            near, timed = unmeasured, True
        if not timed and state.settled == 0:
            return  # `_choose` looks at drafts more often
        oldest = min(near, key=lambda index: arms[index].tried if timed else arms[index].last)
        if timed:
            arms[oldest].tried = state.picks
        if oldest != state.settled:
            state.present, state.trial = oldest, TRIAL - 1 if timed else 0

    def _of(self, size: int) -> _BatchSize:
        if (state := self._by_size.get(size)) is None:
            state = self._by_size[size] = _BatchSize([_Arm() for _ in range(len(self.trees) + 1)])
        return state

    def _arm_of(self, sequences: int, tree: Tree | None) -> tuple[int, int]:
        return self.bucket(sequences), 0 if tree is None else 1 + self._nodes.index(tree.size)

    def expect(self, sequences: int, tree: Tree | None, seconds: Sequence[float]) -> None:
        """What such steps take, measured before there are any."""
        size, index = self._arm_of(sequences, tree)
        self._of(size).arms[index].expected = min(seconds)

    def observe_time(self, sequences: int, tree: Tree | None, seconds: float | None) -> None:
        """A step of so many sequences took so long; None: it had other rows as well."""
        if seconds is None:
            self._timed = None
            return
        size, index = kind = self._arm_of(sequences, tree)
        state = self._of(size)
        # The step behind it is picked already if steps overlap.
        if kind == self._timed == self._picked or not state.arms[index].known:
            state.add_time(index, seconds)
        self._timed = kind

    def observe(self, batch: NDArray[np.int64], accepted: NDArray[np.int64], tree: Tree | None) -> None:
        """How many guessed tokens were accepted for each sequence of a step, by place."""
        self._steps[1 if tree is None else tree.size] += 1
        if tree is None:
            self.requests.plain[batch] += 1
            return
        able = self.requests.able[batch]
        if not able.all():
            self.requests.plain[batch[~able]] += 1
            batch, accepted = batch[able], accepted[able]
        self.requests.observe(batch, accepted, tree)
        self._accepted += np.bincount(accepted, minlength=self._depth + 1)
        # As if they came one after the other: what each adds to the average fades with those behind it.
        if len(self._fading) <= len(batch):
            self._fading = np.power(AVERAGE_MEMORY, np.arange(2 * len(batch) + 1), dtype=np.float64)
        fading = self._fading[: len(batch) + 1][::-1]
        news = (1.0 - AVERAGE_MEMORY) / _promise(tree) * float(fading[1:] @ accepted)
        self.average = float(fading[0]) * self.average + news

    def times(self, sequences: int) -> dict[int, float]:
        """Seconds of a step of so many sequences, by nodes: of the kinds that are known."""
        state = self._of(self.bucket(sequences))
        arms = zip([1, *self._nodes], state.arms, strict=True)
        return {nodes: state.load * arm.seconds for nodes, arm in arms if arm.measured}

    def stats(self) -> SpeculationStats:
        # Copies: another thread may be asking.
        steps, accepted = dict(self._steps), self._accepted.copy()
        return SpeculationStats(steps, int(accepted.sum()), _by_head(accepted), self.average)
