"""Picks the tree of each step, or none, so that speculation never loses to plain decoding. Pure: times come from outside.

For a batch of R sequences a tree T gives R + Σ_i E(T, m_i) tokens in t(R, T) seconds, t the time that such steps took of late. The
tree's design promises that more than d guesses are accepted with probability p(T, d). m_i is how many times as often as promised the
first guess was right for a request, and then E(T, m) = Σ_d p(T, d) m c^d, with no factor of it above 1: behind a right guess the next
one is right c times as often as promised. Before that is known it is believed to be m: where the first guess is right half as
often as promised, so are those behind it. (With E = m Σ_d p(T, d) large trees would seem good for what they are not whenever drafts are
poor.) Then c is that of all requests: drafts that are all right or all wrong have a large one. What a tree is believed to give is
taken times the share of it that came true when it was taken before: a tree that is taken because chance, or a request's best moments,
made it look good gives less than was believed. The tree with the most tokens per second is taken, none unless one beats the plain step
by a margin.

A step that follows one of another kind may take longer, for reasons that are not its own. So a choice holds for some steps, times
count only within a row of alike steps, and small gains are not gone after. A kind of step that is wrongly believed to take long is
never taken, and so never put right. So what is believed grows in small steps only, no tree is believed to take longer than a larger
one that was timed later, and what was measured before the first request is scaled by what it turned out to mean. And when the steps
that are taken all the time become slower or faster, all kinds of steps are believed to: longer contexts, or somebody else on the
device, are no reason to try one kind after the other.

Steps that are not what seems best are for learning: what the drafts are good for, while none are taken; what plain steps take, while
they are not; what other trees take. They are paid for: an account gets a small share of all time, and what such steps, and those
right behind them, took longer than their tokens are worth is taken from it. While it is empty, nothing is learned.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from services.model_worker.interface import RequestSpeculation, SpeculationStats
from services.model_worker.speculation.tree import Tree

MEMORY = 0.96  # of a request: a step counts half after some 17 further ones
PRIOR_WEIGHT = 4.0  # first guesses promised, in which a new request is believed to do as the average
AVERAGE_MEMORY = 0.98  # of the average over all requests, with each sequence of a step
DEEPER_MEMORY, DEEPER_PRIOR = 0.995, 16.0  # the same of c, and the guesses promised in which it is believed to be m
# Of what a tree gave and was believed to give, with each sequence of a step; and the guesses for which that is believed to be the same.
YIELD_MEMORY, YIELD_PRIOR = 0.999, 60.0
# Steps with trees vary more, so that the lower quartile, which is believed, flatters them.
ENTER, LEAVE = 1.06, 1.02  # rate over the plain step's at which trees are begun with, and below which they are given up
CHANGE = 1.02  # over the present tree's at which another one is taken
HOLD = 8  # steps of a batch size for which a choice of a tree holds
SAMPLES = 16  # times remembered of each kind of step. The lower quartile counts: what disturbs steps makes them longer, often several
SLOWER = 1.01  # with each time a kind of step is believed to have become at most so many times as long
AGREED = 1.05  # times what it is believed to take: SAMPLES quartiles up to there in a row, and it is known
ENOUGH = 3  # times before a kind of step is known
TRIAL_EVERY = 128  # steps of a batch size after which the kind of step not seen for longest is looked at again
TIMED_TRIAL = 8  # every so many trials one lasts long enough to tell the time, too:
TRIAL = SAMPLES // 2 + 2  # steps, as the first and, if steps overlap, the last do not count
DOUBT, MOST_DOUBT = 0.99, 0.05  # a kind of step may take so much of its time by the next trial, and at last
UNMEASURED = 0.4  # the same of one whose time is from before the first request
SHARES = 0.002, 0.001, 0.001  # of the time for each purpose of learning: drafts change most
FIRST = 12  # steps whose time is there for each in the beginning, and for which a choice does not hold
SAVED = 64  # the most that an account holds
OWED = 16  # the most that it owes: what was disturbed, or misjudged, must not keep it empty for ever
LOOK = 4  # sequences in one of these, at least, over as many steps as it takes
LOOK_EVERY = 16  # steps between two looks at drafts, and for which the choice of no tree holds, at least
LOOK_DEEPER = 4  # every so many looks one is at more than the first guess
PLAIN_EVERY = 256  # the same between two looks at plain steps
AFTER = 4  # steps behind those that learn which are paid for, too: until the host knows what was accepted it plans with more work
CLIPPED = 4.0  # no step is paid for as more than so many usual ones: it was disturbed
PACE_MEMORY = 0.98  # of what usual steps take
NOBODY = 0  # the place of those that have ended
IN_FLIGHT = 3  # steps, at most, that know a request when it ends
HOPELESS = 0.6  # when a tree falls so far behind, larger ones are not tried


class Acceptances:
    """What came of the guesses for each request that runs or waits, in arrays by place (but NOBODY's). Fading sums fade with MEMORY.

    able      False: its output depends on more than the tokens of a path (penalties), so nothing is ever accepted
    fading    [place, 2]: steps whose first guess was right, and as many as its trees promised
    deeper    [2]: of all together, guesses that were right behind a right one, and as many as the trees promised there
    plain     steps without a tree;  nodes: of the trees of the other steps together
    accepted  [place, n]: how many of the steps with a tree accepted n guesses
    """

    def __init__(self, depth: int) -> None:
        self._free: list[int] = []
        self.able = np.zeros(0, dtype=bool)
        self.fading = np.zeros((0, 2))
        self.deeper = np.zeros(2)
        self.plain, self.nodes = np.zeros((2, 0), dtype=np.int64)
        self.accepted = np.zeros((0, depth + 1), dtype=np.int64)
        self._unable = 0  # of those that run or wait
        self.told = 0  # grows with all that makes another choice likely
        self._ended = 0  # steps that may still tell of somebody who has ended
        self._before = np.zeros(depth + 1, dtype=np.int64)  # accepted by those that have gone

    def admit(self, able: bool = True) -> int:
        """A place for a new request."""
        if not self._free:
            self._grow()
        place = self._free.pop()
        self.able[place] = able
        self._unable += not able
        self.told += 1
        for values in (self.fading, self.plain, self.nodes):
            values[place] = 0
        self._clear(place)
        return place

    def release(self, place: int) -> None:
        self._unable -= not self.able[place]
        self.told += 1
        self._ended = IN_FLIGHT
        self._free.append(place)

    def _clear(self, place: int) -> None:
        self._before += self.accepted[place]
        self.accepted[place] = 0

    def _grow(self) -> None:
        held = len(self.able)
        more = max(64, held)
        self._free = list(range(held + more - 1, max(held, NOBODY + 1) - 1, -1))
        for name in ("able", "fading", "plain", "nodes", "accepted"):
            values = getattr(self, name)
            setattr(self, name, np.concatenate((values, np.zeros((more, *values.shape[1:]), values.dtype))))

    def all_able(self, places: NDArray[np.int64]) -> bool:
        """For the places of a step that is read back. NOBODY is not able."""
        if not (self._unable or self._ended):
            return True
        self._ended = max(0, self._ended - 1)
        return bool(self.able[places].all())

    def extras(
        self, places: NDArray[np.int64], average: float, chances: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """chances [D, T], see Tree → guesses accepted in a step of all these requests with each tree, [T]: as they do now (believed
        to be the average at first), and if all do as promised or better."""
        right, promised = self.fading[places].T
        first = (PRIOR_WEIGHT * average + right) / (PRIOR_WEIGHT + promised)
        if self._unable:
            first = first[self.able[places]]
        behind = (DEEPER_PRIOR * first + self.deeper[0]) / (DEEPER_PRIOR + self.deeper[1])

        def of(first: NDArray[np.float64], behind: NDArray[np.float64]) -> NDArray[np.float64]:
            likely = np.minimum(np.multiply.outer(chances[0], first), 1.0)
            accepted = likely.copy()
            for chance in chances[1:]:
                likely *= np.minimum(np.multiply.outer(chance, behind), 1.0)
                accepted += likely
            total: NDArray[np.float64] = accepted.sum(axis=1)
            return total

        return of(first, behind), of(np.maximum(first, 1.0), np.maximum(behind, 1.0))

    def observe(self, places: NDArray[np.int64], accepted: NDArray[np.int64], tree: Tree) -> None:
        """A step with a tree, of those that are able."""
        self.told += 1
        self.nodes[places] += tree.size
        self.accepted[places, accepted] += 1
        if tree.depth > 1:
            counts = np.bincount(accepted, minlength=tree.depth + 1).tolist()
            reached = list(itertools.accumulate(reversed(counts)))[-2::-1]  # guesses that were right, by depth
            promised = sum(before * chance for before, chance in zip(reached, tree.chances[1:], strict=False))
            self.deeper *= DEEPER_MEMORY ** len(accepted)
            self.deeper += sum(reached[1:]), promised
        fading = self.fading[places]
        fading *= MEMORY
        fading[:, 0] += accepted > 0
        fading[:, 1] += _promise(tree)
        self.fading[places] = fading

    def total(self) -> NDArray[np.int64]:
        """Steps of a sequence with a tree, by accepted guesses, since the start."""
        total: NDArray[np.int64] = self._before + self.accepted.sum(axis=0)
        return total

    def summary(self, place: int) -> RequestSpeculation:
        steps = int(self.accepted[place].sum())
        # Up to the last head whose guess was ever accepted.
        by_head = tuple(count for count in _by_head(self.accepted[place]) if count)
        return RequestSpeculation(int(self.plain[place]), steps, by_head, int(self.nodes[place]))


def _promise(tree: Tree) -> float:
    return max(tree.promises[0], 1e-3)


def _by_head(accepted: NDArray[np.int64]) -> list[int]:
    """Steps by the number of their accepted guesses → steps in which each head's guess was accepted."""
    by_head: list[int] = accepted[::-1].cumsum()[::-1][1:].tolist()
    return by_head


_PURPOSES = _DRAFTS, _PLAIN, _TREES = range(3)  # how good drafts are; what plain steps take; what other trees take


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
    """arms: no tree, then all of them; settled: the one that seems best; present: that of the newest step, which may be to learn
    from; trial: steps of it still to come; looks: at drafts, those included that were not worth it; told: of the requests, at the last
    choice.

    pace       seconds that a token takes in steps of what is settled, fading;  usual: seconds of such a step
    accounts   seconds that learning may take, by its purpose;  paying: from which; paid: steps still to be paid for
    load       how many times as long as they are believed to all steps take now, by the settled ones, `followed`, once these are
               known: their last times are `recent`, and so many in a row agreed
    """

    arms: list[_Arm]
    picks: int = 0
    settled: int = 0
    present: int = 0
    trial: int = 0
    looks: int = 0
    told: int = 0
    pace: float = 0.0
    usual: float = 0.0
    accounts: list[float] = field(default_factory=lambda: [0.0] * len(_PURPOSES))
    paying: int = 0
    paid: int = 0
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

    def learn(self, index: int, purpose: int, steps: int = 1) -> None:
        """The next steps are to learn from."""
        self.present, self.trial, self.paying = index, steps - 1, purpose

    def account(self, seconds: float, tokens: int) -> None:
        """A step took so long and brought so many tokens."""
        if not self.usual:
            self.pace, self.usual = seconds / tokens, seconds
            self.accounts = [FIRST * seconds / 2, FIRST * seconds, FIRST * seconds]
        seconds = min(seconds, CLIPPED * self.usual)
        if self.paid:
            self.accounts[self.paying] -= seconds - tokens * self.pace
            self.paid -= self.present == self.settled
            return
        self.pace = PACE_MEMORY * self.pace + (1 - PACE_MEMORY) * seconds / tokens
        self.usual = PACE_MEMORY * self.usual + (1 - PACE_MEMORY) * seconds
        least, most = -OWED * self.usual, SAVED * self.usual
        saved = zip(self.accounts, SHARES, strict=True)
        self.accounts = [min(max(left + share * seconds, least), most) for left, share in saved]

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
        self._chances = np.array([tree.chances + (0.0,) * (self._depth - tree.depth) for tree in trees]).T.copy()
        self._sizes = sorted(sizes)
        self._max_rows = max_rows
        self._by_size: dict[int, _BatchSize] = {}
        # (batch size, arm) of the newest step that was picked, and of the last one whose time was told
        self._picked: tuple[int, int] | None = None
        self._timed: tuple[int, int] | None = None
        self.average = 1.0  # how many times as often as promised first guesses are right
        self.requests = Acceptances(self._depth)
        # By tree, guesses of a sequence: accepted and foreseen, fading; foreseen by the last choice.
        self._yields = np.zeros((len(trees), 2))
        self._foreseen = np.zeros(len(trees))
        self._steps: Counter[int] = Counter()  # by nodes
        self._tokens = 0  # of the newest step with a tree

    def bucket(self, sequences: int) -> int:
        return self._sizes[min(bisect.bisect_left(self._sizes, sequences), len(self._sizes) - 1)]

    def pick(self, count: int, places: Callable[[], NDArray[np.int64]]) -> Tree | None:
        """The tree for a step of `count` sequences, whose places are asked for only when there is something to choose. None: plain
        decoding."""
        size = self.bucket(count)
        usable = bisect.bisect_right(self._nodes, self._max_rows // max(size, count))
        if not usable:
            return None
        state = self._of(size)
        state.picks += 1
        if state.present > usable:
            state.trial = 0
            self._choose(state, places(), usable)
        elif state.trial:
            state.trial -= 1
        elif state.arms[state.present].known and self._due(state):
            self._choose(state, places(), usable)
        if state.present != state.settled:
            state.paid = 1 + AFTER
        state.arms[state.present].last = state.picks
        self._picked = size, state.present
        return self.trees[state.present - 1] if state.present else None

    def _due(self, state: _BatchSize) -> bool:
        """Whether it is time to choose. Where no tree seems best, only steps with trees and other requests change that."""
        if state.present != state.settled or state.picks < FIRST:
            return True
        if state.settled:
            return state.picks % HOLD == 0
        news = state.told != self.requests.told or state.accounts[_DRAFTS] > 0 or state.picks % TRIAL_EVERY == 0
        return news and state.picks % LOOK_EVERY == 0

    def _choose(self, state: _BatchSize, batch: NDArray[np.int64], usable: int) -> None:
        """Sets `present`, and `trial` if it is one. usable: how many trees, from the smallest on, have few enough rows."""
        arms, count = state.arms, len(batch)
        state.told = self.requests.told
        believed, hoped_of = self.requests.extras(batch, self.average, self._chances[:, :usable])
        self._foreseen[:usable] = believed / count
        given, foreseen = self._yields[:usable].T
        extras = [0.0, *(believed * (YIELD_PRIOR + given) / (YIELD_PRIOR + foreseen)).tolist()]
        hoped = [0.0, *hoped_of.tolist()]

        seconds = state.believed(usable + 1)
        least = [value * arm.doubt(state.picks) for value, arm in zip(seconds, arms, strict=False)]
        rates: list[float] = []
        for index in range(usable + 1):
            if index == len(seconds):
                state.present = index
                return
            rates.append((count + extras[index]) / seconds[index])
            if (count + extras[index]) / least[index] < HOPELESS * max(rates):
                break
        best = max(range(len(rates)), key=rates.__getitem__)
        before = state.settled if state.settled < len(rates) else 0
        if rates[best] < (LEAVE if before else ENTER) * rates[0]:
            best = 0
        elif before and rates[before] >= rates[0] and rates[best] < CHANGE * rates[before]:
            best = before
        state.settled = state.present = best
        if state.picks % HOLD or len(rates) == 1:
            return
        drafts, plain, others = (left > 0 for left in state.accounts)
        if others and state.picks % TRIAL_EVERY == 0:
            outlook, needed = (hoped, rates[best]) if best else (extras, ENTER * rates[best])
            near = {i for i in range(1, len(rates)) if (count + outlook[i]) / least[i] >= needed}
            self._try_another(state, near)
        if state.present != best:
            return
        if best == 0 and drafts:  # what would be accepted, plain steps do not show
            due = state.picks % LOOK_EVERY == 0
            deep = state.looks % LOOK_DEEPER == LOOK_DEEPER - 1
            state.looks += due  # also if it is not worth it: the next one is at another tree
            trees = [i for i in range(1, len(rates)) if not deep or self.trees[i - 1].depth > 1] or range(1, len(rates))
            looked = min(trees, key=seconds.__getitem__)
            if due and (count + hoped[looked]) / seconds[looked] >= rates[0]:
                state.learn(looked, _DRAFTS, max(1, LOOK // count))
            elif due:  # thinking of it took time, too
                state.accounts[_DRAFTS] -= state.usual / 4
        # Trees are measured against plain steps.
        if best and plain and state.picks - max(arms[0].timed, arms[0].tried) >= PLAIN_EVERY:
            arms[0].tried = state.picks
            state.learn(0, _PLAIN, TRIAL)

    def _try_another(self, state: _BatchSize, near: set[int]) -> None:
        """near: the trees that would be better than the best if steps took as little time as they well may, and drafts did as promised
        (while no tree is taken: as they are believed to do). Nothing else can turn out to be."""
        arms = state.arms
        timed = state.picks % (TIMED_TRIAL * TRIAL_EVERY) == 0
        if unmeasured := {index for index in near if not (arms[index].measured or arms[index].tried)}:
            near, timed = unmeasured, True
        if not near or (not timed and state.settled == 0):
            return  # `_choose` looks at drafts more often
        oldest = min(near, key=lambda index: arms[index].tried if timed else arms[index].last)
        if timed:
            arms[oldest].tried = state.picks
        if oldest != state.settled:
            state.learn(oldest, _TREES, TRIAL if timed else 1)

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
        state.account(seconds, sequences if tree is None else max(self._tokens, sequences))

    def observe(self, batch: NDArray[np.int64], accepted: NDArray[np.int64] | None, tree: Tree | None) -> None:
        """How many guessed tokens were accepted for each sequence of a step, by place; None without a tree."""
        self._steps[1 if tree is None else tree.size] += 1
        if tree is None or accepted is None:
            self.requests.plain[batch] += 1
            return
        sequences = len(batch)
        if not self.requests.all_able(batch):
            able = self.requests.able[batch]
            self.requests.plain[batch[~able]] += 1
            batch, accepted = batch[able], accepted[able]
        self.requests.observe(batch, accepted, tree)
        extra = int(accepted.sum())
        index = self._nodes.index(tree.size)
        self._yields[index] *= YIELD_MEMORY ** len(accepted)
        self._yields[index] += extra, self._foreseen[index] * sequences
        self._tokens = len(accepted) + extra
        if len(batch):
            fading, right = AVERAGE_MEMORY ** len(batch), np.count_nonzero(accepted)
            self.average = fading * self.average + (1 - fading) * right / (len(batch) * _promise(tree))

    def times(self, sequences: int) -> dict[int, float]:
        """Seconds of a step of so many sequences, by nodes: of the kinds that are known."""
        state = self._of(self.bucket(sequences))
        arms = zip([1, *self._nodes], state.arms, strict=True)
        return {nodes: state.load * arm.seconds for nodes, arm in arms if arm.measured}

    def stats(self) -> SpeculationStats:
        # Copies: another thread may be asking.
        steps, accepted = dict(self._steps), self.requests.total()
        return SpeculationStats(steps, int(accepted.sum()), _by_head(accepted), self.average)
